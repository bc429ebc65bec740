/* Kernels for SSE2, which every 64-bit x86 processor has: two lanes take turns. */
#include "blockmix_sets.h"

#ifdef HAVE_VECTOR_KERNELS

#include <emmintrin.h>

#define TARGET
#define XOR_ROTATED_128(x, y, bits) \
	_mm_xor_si128(x, _mm_or_si128(_mm_slli_epi32(y, bits), _mm_srli_epi32(y, 32 - (bits))))

#include "vector_128.h"

#define KERNEL blockmix_1
#define GROUPS 1
#include "blockmix_vector.h"

#define KERNEL blockmix_2
#define GROUPS 2
#include "blockmix_vector.h"

const struct kernels kernels_sse2 = {
	.name = "SSE2",
	.lanes = 2,
	.for_lanes = {[1] = {1, blockmix_1}, [2] = {1, blockmix_2}},
};

#endif
