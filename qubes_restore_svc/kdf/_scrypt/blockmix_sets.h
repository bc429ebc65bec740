/* The sets of kernels, one per instruction set; for blockmix.c alone, which knows what can run. */
#ifndef BLOCKMIX_SETS_H
#define BLOCKMIX_SETS_H

#include "blockmix.h"

/* The vector kernels need a compiler that builds for an instruction set per function. */
#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_VECTOR_KERNELS
extern const struct kernels kernels_sse2;
extern const struct kernels kernels_avx2;
extern const struct kernels kernels_avx512;
#endif
extern const struct kernels kernels_portable;

#endif
