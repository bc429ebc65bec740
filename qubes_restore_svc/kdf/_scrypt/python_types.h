/* What the two Python types of the extension know of each other. */
#ifndef PYTHON_TYPES_H
#define PYTHON_TYPES_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "arena.h"

typedef struct {
	PyObject_HEAD
	struct arena arena;
	int in_use;     /* a derivation runs in it, or it is being wiped without the interpreter lock */
} ArenaObject;

extern PyTypeObject Arena_Type;
extern PyTypeObject Lanes_Type;

#endif
