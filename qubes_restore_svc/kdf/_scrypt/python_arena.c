/* The Python type `Arena`. */
#include "python_types.h"

#include <errno.h>

static PyObject *
Arena_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"size", NULL};
	ArenaObject *self;
	Py_ssize_t size;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "n:Arena", names, &size))
		return NULL;
	if (size <= 0) {
		PyErr_SetString(PyExc_ValueError, "an arena has at least one byte");
		return NULL;
	}
	self = (ArenaObject *)type->tp_alloc(type, 0);
	if (self == NULL)
		return NULL;
	if (arena_create(&self->arena, (size_t)size) != 0) {
		if (errno == ENOMEM)
			PyErr_NoMemory();
		else
			PyErr_SetFromErrno(PyExc_OSError);
		Py_DECREF(self);
		return NULL;
	}
	return (PyObject *)self;
}

static void
Arena_dealloc(PyObject *object)
{
	ArenaObject *self = (ArenaObject *)object;

	arena_release(&self->arena);
	Py_TYPE(self)->tp_free(object);
}

static PyObject *
Arena_release(PyObject *object, PyObject *unused)
{
	ArenaObject *self = (ArenaObject *)object;
	(void)unused;

	if (self->in_use) {
		PyErr_SetString(PyExc_RuntimeError, "the arena is in use");
		return NULL;
	}
	/* Wiping takes a while; nobody may begin to use the arena meanwhile. */
	self->in_use = 1;
	Py_BEGIN_ALLOW_THREADS
	arena_release(&self->arena);
	Py_END_ALLOW_THREADS
	self->in_use = 0;
	Py_RETURN_NONE;
}

static PyObject *
Arena_get_size(PyObject *object, void *unused)
{
	(void)unused;
	return PyLong_FromSize_t(((ArenaObject *)object)->arena.size);
}

static PyMethodDef Arena_methods[] = {
	{"release", Arena_release, METH_NOARGS,
	 "Overwrite what has been used and give the memory back; the size is 0 from then on.\n\n"
	 "Without the interpreter lock. RuntimeError while a derivation runs in the arena."},
	{NULL, NULL, 0, NULL},
};

static PyGetSetDef Arena_properties[] = {
	{"size", Arena_get_size, NULL, "How many bytes it takes: a multiple of 2 MiB, 0 once released.", NULL},
	{NULL, NULL, NULL, NULL, NULL},
};

PyTypeObject Arena_Type = {
	PyVarObject_HEAD_INIT(NULL, 0)
	.tp_name = "_romix.Arena",
	.tp_doc = "Arena(size): private memory of at least `size` bytes for one derivation at a time.\n\n"
	          "In huge pages where granted. MemoryError if there is none.",
	.tp_basicsize = sizeof(ArenaObject),
	.tp_flags = Py_TPFLAGS_DEFAULT,
	.tp_new = Arena_new,
	.tp_dealloc = Arena_dealloc,
	.tp_methods = Arena_methods,
	.tp_getset = Arena_properties,
};
