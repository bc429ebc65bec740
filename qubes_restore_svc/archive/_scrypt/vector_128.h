/* Vectors of 128 bits for blockmix_vector.h: one lane.  Expects TARGET and ROTATE_128(x, bits). */

#undef VEC
#undef VEC_LANES
#undef VEC_ADD
#undef VEC_XOR
#undef VEC_ROTATE
#undef VEC_TURN
#undef VEC_LOAD
#undef VEC_STORE

#define VEC __m128i
#define VEC_LANES 1
#define VEC_ADD _mm_add_epi32
#define VEC_XOR _mm_xor_si128
#define VEC_ROTATE ROTATE_128
#define VEC_TURN(x, places) \
	_mm_shuffle_epi32(x, _MM_SHUFFLE((places + 3) % 4, (places + 2) % 4, (places + 1) % 4, (places) % 4))
#define VEC_LOAD load_1
#define VEC_STORE store_1

TARGET static inline __attribute__((always_inline)) void
load_1(__m128i rows[4], const uint32_t *const p[], const uint32_t *const q[], size_t at)
{
	const __m128i *x = (const __m128i *)(p[0] + at);
	const __m128i *y = (const __m128i *)(q[0] + at);
	int i;

	for (i = 0; i < 4; i++)
		rows[i] = _mm_xor_si128(_mm_load_si128(x + i), _mm_load_si128(y + i));
}

TARGET static inline __attribute__((always_inline)) void
store_1(uint32_t *const p[], size_t at, const __m128i rows[4])
{
	__m128i *x = (__m128i *)(p[0] + at);
	int i;

	for (i = 0; i < 4; i++)
		_mm_store_si128(x + i, rows[i]);
}
