/* The extension module `_romix`: scryptROMix for Python.  PBKDF2 before and after it is not its business. */
#include "python_types.h"
#include "romix.h"

static PyObject *
memory(PyObject *module, PyObject *args)
{
	Py_ssize_t log_n, r, stride;
	size_t size = 0;
	(void)module;

	if (!PyArg_ParseTuple(args, "nnn:memory", &log_n, &r, &stride))
		return NULL;
	if (log_n >= 0 && log_n <= ROMIX_MAX_LOG_N && r >= 0 && r <= ROMIX_MAX_R && stride >= 1 &&
	    stride <= ROMIX_MAX_STRIDE)
		size = arena_size(romix_memory((unsigned)log_n, (size_t)r, (unsigned)stride));
	if (size == 0) {
		PyErr_SetString(PyExc_ValueError, "parameters out of bounds");
		return NULL;
	}
	return PyLong_FromSize_t(size);
}

static PyMethodDef functions[] = {
	{"memory", memory, METH_VARARGS,
	 "memory(log_n, r, stride) -> int: size in bytes of the arena that a derivation takes.\n\n"
	 "N is 2 ** log_n; every `stride`th block of V is stored. ValueError if out of bounds."},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "_romix",
	.m_doc = "scryptROMix (RFC 7914) of several derivations side by side.",
	.m_size = -1,
	.m_methods = functions,
};

PyMODINIT_FUNC
PyInit__romix(void)
{
	PyObject *module;

	if (PyType_Ready(&Arena_Type) != 0 || PyType_Ready(&Lanes_Type) != 0)
		return NULL;
	module = PyModule_Create(&definition);
	if (module == NULL)
		return NULL;
	if (PyModule_AddObjectRef(module, "Arena", (PyObject *)&Arena_Type) != 0 ||
	    PyModule_AddObjectRef(module, "Lanes", (PyObject *)&Lanes_Type) != 0) {
		Py_DECREF(module);
		return NULL;
	}
	return module;
}
