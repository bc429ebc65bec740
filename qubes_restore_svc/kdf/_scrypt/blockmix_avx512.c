/*
 * Kernels for AVX-512 (F and VL): a register holds four lanes, and rotating is one instruction instead
 * of three, for narrower registers as well.
 */
#include "blockmix_sets.h"

#ifdef HAVE_VECTOR_KERNELS

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512vl")))
#define ROTATE_128 _mm_rol_epi32
#define ROTATE_256 _mm256_rol_epi32

#include "vector_128.h"

#define KERNEL blockmix_1
#define GROUPS 1
#include "blockmix_vector.h"

#include "vector_256.h"

#define KERNEL blockmix_2
#define GROUPS 1
#include "blockmix_vector.h"

#include "vector_512.h"

#define KERNEL blockmix_4
#define GROUPS 1
#include "blockmix_vector.h"

const struct kernels kernels_avx512 = {
	.name = "AVX-512",
	.lanes = 4,
	.for_lanes = {[1] = {1, blockmix_1}, [2] = {2, blockmix_2}, [4] = {4, blockmix_4}},
};

#endif
