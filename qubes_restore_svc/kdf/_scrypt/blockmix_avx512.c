/*
 * Kernels for AVX-512 (F and VL): a register holds four lanes, and two of them take turns for eight.
 *
 * Rotating is one instruction here, but on some processors (Zen 4) it takes two cycles.  Two shifts side by side
 * and an xor of three operands take one cycle less than to rotate and to xor, and one instruction more.  So they are
 * for where a lane waits for itself and the processor has nothing else to do.
 */
#include "blockmix_sets.h"

#ifdef HAVE_VECTOR_KERNELS

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512vl")))
/* The truth table of x xor y xor z. */
#define XOR_3 0x96
#define XOR_ROTATED_128(x, y, bits) \
	_mm_ternarylogic_epi32(x, _mm_slli_epi32(y, bits), _mm_srli_epi32(y, 32 - (bits)), XOR_3)
#define XOR_ROTATED_256(x, y, bits) \
	_mm256_ternarylogic_epi32(x, _mm256_slli_epi32(y, bits), _mm256_srli_epi32(y, 32 - (bits)), XOR_3)

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

#define KERNEL blockmix_8
#define GROUPS 2
#include "blockmix_vector.h"

const struct kernels kernels_avx512 = {
	.name = "AVX-512",
	.lanes = 8,
	.for_lanes = {[1] = {1, blockmix_1}, [2] = {2, blockmix_2}, [4] = {4, blockmix_4}, [8] = {4, blockmix_8}},
};

#endif
