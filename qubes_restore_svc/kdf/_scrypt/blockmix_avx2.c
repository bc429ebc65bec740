/* Kernels for AVX2: a register holds two lanes, and two registers take turns for four. */
#include "blockmix_sets.h"

#ifdef HAVE_VECTOR_KERNELS

#include <immintrin.h>

#define TARGET __attribute__((target("avx2")))
#define XOR_ROTATED_128(x, y, bits) \
	_mm_xor_si128(x, _mm_or_si128(_mm_slli_epi32(y, bits), _mm_srli_epi32(y, 32 - (bits))))
#define XOR_ROTATED_256(x, y, bits) \
	_mm256_xor_si256(x, _mm256_or_si256(_mm256_slli_epi32(y, bits), _mm256_srli_epi32(y, 32 - (bits))))

#include "vector_128.h"

#define KERNEL blockmix_1
#define GROUPS 1
#include "blockmix_vector.h"

#include "vector_256.h"

#define KERNEL blockmix_2
#define GROUPS 1
#include "blockmix_vector.h"

#define KERNEL blockmix_4
#define GROUPS 2
#include "blockmix_vector.h"

const struct kernels kernels_avx2 = {
	.name = "AVX2",
	.lanes = 4,
	.for_lanes = {[1] = {1, blockmix_1}, [2] = {2, blockmix_2}, [4] = {2, blockmix_4}},
};

#endif
