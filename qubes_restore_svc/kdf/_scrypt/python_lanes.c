/* The Python type `Lanes`. */
#include "python_types.h"
#include "romix.h"

/* The r that the scrypt program takes; a step takes a time in proportion to r. */
#define USUAL_R 8

/* A lane; it holds its arena and its blocks for as long as a derivation runs in it. */
struct lane {
	struct romix romix;
	ArenaObject *arena;     /* NULL: the lane is free */
	Py_buffer blocks;
};

typedef struct {
	PyObject_HEAD
	const struct kernels *kernels;
	struct lane lanes[MAX_LANES];
	size_t turn;            /* which lane goes first: those with another r than the first one wait */
	int advancing;          /* a thread is computing without the interpreter lock */
} LanesObject;

static PyObject *
Lanes_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"instruction_set", NULL};
	LanesObject *self;
	const struct kernels *kernels;
	const char *name = NULL;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|z:Lanes", names, &name))
		return NULL;
	kernels = kernels_find(name);
	if (kernels == NULL) {
		PyErr_Format(PyExc_ValueError, "this machine cannot run %s", name);
		return NULL;
	}
	self = (LanesObject *)type->tp_alloc(type, 0);
	if (self != NULL)
		self->kernels = kernels;
	return (PyObject *)self;
}

/* Free a lane whose derivation is finished or given up. */
static void
vacate(struct lane *lane)
{
	ArenaObject *arena = lane->arena;

	romix_wipe(&lane->romix);
	lane->arena = NULL;
	arena->in_use = 0;
	PyBuffer_Release(&lane->blocks);
	Py_DECREF(arena);
}

static int
check_not_advancing(const LanesObject *self)
{
	if (!self->advancing)
		return 0;
	PyErr_SetString(PyExc_RuntimeError, "another thread is advancing these lanes");
	return -1;
}

/* The first lane that is free; NULL, with an exception set, if none is. */
static struct lane *
free_lane(LanesObject *self)
{
	size_t index;

	for (index = 0; index < self->kernels->lanes; index++)
		if (self->lanes[index].arena == NULL)
			return &self->lanes[index];
	PyErr_SetString(PyExc_RuntimeError, "no lane is free");
	return NULL;
}

static PyObject *
Lanes_begin(PyObject *object, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"blocks", "log_n", "r", "stride", "arena", NULL};
	LanesObject *self = (LanesObject *)object;
	PyObject *blocks;
	ArenaObject *arena;
	struct lane *lane;
	Py_ssize_t log_n, r, stride;
	size_t memory, block_size;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "YnnnO!:begin", names, &blocks, &log_n, &r, &stride,
	                                 &Arena_Type, &arena))
		return NULL;
	if (check_not_advancing(self) != 0)
		return NULL;
	lane = free_lane(self);
	if (lane == NULL)
		return NULL;
	if (log_n < 0 || log_n > ROMIX_MAX_LOG_N || r < 0 || r > ROMIX_MAX_R || stride < 1 ||
	    stride > ROMIX_MAX_STRIDE || (memory = romix_memory((unsigned)log_n, (size_t)r, (unsigned)stride)) == 0) {
		PyErr_SetString(PyExc_ValueError, "parameters out of bounds");
		return NULL;
	}
	if (arena->in_use || arena->arena.size < memory) {
		PyErr_SetString(PyExc_ValueError, arena->in_use ? "the arena is in use" : "the arena is too small");
		return NULL;
	}

	if (PyObject_GetBuffer(blocks, &lane->blocks, PyBUF_WRITABLE) != 0)
		return NULL;
	block_size = (size_t)r * 2 * SALSA_BYTES;
	if (lane->blocks.len == 0 || (size_t)lane->blocks.len % block_size != 0) {
		PyErr_SetString(PyExc_ValueError, "the blocks are not a multiple of 128 * r bytes");
		PyBuffer_Release(&lane->blocks);
		return NULL;
	}
	Py_INCREF(arena);
	arena->in_use = 1;
	if (arena->arena.used < memory)
		arena->arena.used = memory;
	lane->arena = arena;
	romix_begin(&lane->romix, lane->blocks.buf, (size_t)r, (size_t)lane->blocks.len / block_size,
	            (unsigned)log_n, (unsigned)stride, arena->arena.memory);
	return PyLong_FromSsize_t(lane - self->lanes);
}

static PyObject *
Lanes_take_over(PyObject *object, PyObject *args)
{
	LanesObject *self = (LanesObject *)object, *other;
	struct lane *from, *to;
	Py_ssize_t number;

	if (!PyArg_ParseTuple(args, "O!n:take_over", &Lanes_Type, &other, &number))
		return NULL;
	if (check_not_advancing(self) != 0 || check_not_advancing(other) != 0)
		return NULL;
	if (number < 0 || number >= MAX_LANES || other->lanes[number].arena == NULL) {
		PyErr_SetString(PyExc_ValueError, "nothing runs in that lane");
		return NULL;
	}
	to = free_lane(self);
	if (to == NULL)
		return NULL;
	/* Nothing in a lane points into it: all of a derivation's state lies in its arena. */
	from = &other->lanes[number];
	*to = *from;
	from->arena = NULL;
	return PyLong_FromSsize_t(to - self->lanes);
}

static PyObject *
Lanes_advance(PyObject *object, PyObject *args)
{
	LanesObject *self = (LanesObject *)object;
	struct romix *running[MAX_LANES];
	struct romix *first;
	PyObject *finished, *number;
	Py_ssize_t steps;
	size_t count = 0, index;
	int error;

	if (!PyArg_ParseTuple(args, "n:advance", &steps))
		return NULL;
	if (check_not_advancing(self) != 0)
		return NULL;
	finished = PyList_New(0);
	if (finished == NULL)
		return NULL;
	for (index = 0; index < self->kernels->lanes; index++)
		if (self->lanes[index].arena != NULL)
			running[count++] = &self->lanes[index].romix;
	if (count > 0) {
		/* Another one goes first each time: a large r, which anybody can forge, holds up no other lane. */
		index = self->turn++ % count;
		first = running[index];
		running[index] = running[0];
		running[0] = first;
		if (steps > 0 && first->r >= 2 * USUAL_R)
			steps = steps / (Py_ssize_t)(first->r / USUAL_R) + 1;
	}
	if (count > 0 && steps > 0) {
		self->advancing = 1;
		Py_BEGIN_ALLOW_THREADS
		romix_advance(self->kernels, running, count, (uint64_t)steps);
		Py_END_ALLOW_THREADS
		self->advancing = 0;
	}
	for (index = 0; index < self->kernels->lanes; index++) {
		if (self->lanes[index].arena == NULL || !romix_is_finished(&self->lanes[index].romix))
			continue;
		number = PyLong_FromSize_t(index);
		error = number == NULL ? -1 : PyList_Append(finished, number);
		Py_XDECREF(number);
		if (error != 0) {
			/* The lane stays finished and occupied, until abandon(). */
			Py_DECREF(finished);
			return NULL;
		}
		vacate(&self->lanes[index]);
	}
	return finished;
}

static PyObject *
Lanes_abandon(PyObject *object, PyObject *unused)
{
	LanesObject *self = (LanesObject *)object;
	size_t index;
	(void)unused;

	if (check_not_advancing(self) != 0)
		return NULL;
	for (index = 0; index < MAX_LANES; index++)
		if (self->lanes[index].arena != NULL)
			vacate(&self->lanes[index]);
	Py_RETURN_NONE;
}

/* Nobody can be advancing: that thread would hold a reference. */
static void
Lanes_dealloc(PyObject *object)
{
	LanesObject *self = (LanesObject *)object;
	size_t index;

	for (index = 0; index < MAX_LANES; index++)
		if (self->lanes[index].arena != NULL)
			vacate(&self->lanes[index]);
	Py_TYPE(self)->tp_free(object);
}

static PyObject *
Lanes_get_count(PyObject *object, void *unused)
{
	(void)unused;
	return PyLong_FromSize_t(((LanesObject *)object)->kernels->lanes);
}

static PyObject *
Lanes_get_instruction_set(PyObject *object, void *unused)
{
	(void)unused;
	return PyUnicode_FromString(((LanesObject *)object)->kernels->name);
}

static PyMethodDef Lanes_methods[] = {
	{"begin", (PyCFunction)(void (*)(void))Lanes_begin, METH_VARARGS | METH_KEYWORDS,
	 "begin(blocks, log_n, r, stride, arena) -> int: occupy a free lane with a derivation.\n\n"
	 "`blocks` is a bytearray of p times 128 * r bytes; scryptROMix works on it in place. It and the\n"
	 "arena, of memory(log_n, r, stride) bytes at least, are held until the lane is free again.\n"
	 "Returns the number of the lane. ValueError for parameters, blocks or an arena that do not do;\n"
	 "RuntimeError if no lane is free."},
	{"take_over", Lanes_take_over, METH_VARARGS,
	 "take_over(lanes, lane) -> int: go on with what runs in that lane of others, in a free one of these.\n\n"
	 "Returns the number of the lane; the other one is free. ValueError if nothing runs there; RuntimeError\n"
	 "if no lane is free, or a thread is advancing either of them."},
	{"advance", Lanes_advance, METH_VARARGS,
	 "advance(steps) -> list[int]: compute until a derivation is finished, `steps` steps at most.\n\n"
	 "With an r above 8 it is fewer steps, which take as long. Derivations of another r wait for their turn.\n"
	 "Returns the numbers of the lanes that are finished, and free again. Without the interpreter lock;\n"
	 "RuntimeError if another thread is in here."},
	{"abandon", Lanes_abandon, METH_NOARGS, "Give up what is running; every lane is free afterwards."},
	{NULL, NULL, 0, NULL},
};

static PyGetSetDef Lanes_properties[] = {
	{"count", Lanes_get_count, NULL, "How many derivations it takes at once.", NULL},
	{"instruction_set", Lanes_get_instruction_set, NULL, "Name of the instruction set it uses.", NULL},
	{NULL, NULL, NULL, NULL, NULL},
};

PyTypeObject Lanes_Type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "_romix.Lanes",
	.tp_doc = "Lanes(instruction_set=None): derivations that run side by side, on one core.\n\n"
	          "The fastest instruction set that this machine has, or the one of that name; ValueError if it\n"
	          "cannot run.",
	.tp_basicsize = sizeof(LanesObject),
	.tp_flags = Py_TPFLAGS_DEFAULT,
	.tp_new = Lanes_new,
	.tp_dealloc = Lanes_dealloc,
	.tp_methods = Lanes_methods,
	.tp_getset = Lanes_properties,
};
