/* Vectors of 128 bits for blockmix_vector.h: one lane.  Expects TARGET and XOR_ROTATED_128(x, y, bits). */

#undef VEC
#undef VEC_LANES
#undef VEC_ADD
#undef VEC_XOR
#undef VEC_XOR_ROTATED
#undef VEC_TURN
#undef VEC_AND
#undef VEC_ROW
#undef VEC_LOAD
#undef VEC_STORE
#undef VEC_GATHER
#undef VEC_SCATTER

#define VEC __m128i
#define VEC_LANES 1
#define VEC_ADD _mm_add_epi32
#define VEC_XOR _mm_xor_si128
#define VEC_AND _mm_and_si128
#define VEC_XOR_ROTATED XOR_ROTATED_128
#define VEC_TURN(x, places) \
	_mm_shuffle_epi32(x, _MM_SHUFFLE((places + 3) % 4, (places + 2) % 4, (places + 1) % 4, (places) % 4))
#define VEC_ROW(rows, i) ((rows)[0] + 4 * (i))
#define VEC_LOAD(address) _mm_load_si128((const __m128i *)(address))
#define VEC_STORE(address, x) _mm_store_si128((__m128i *)(address), x)
#define VEC_GATHER gather_1
#define VEC_SCATTER scatter_1

TARGET static inline __attribute__((always_inline)) void
gather_1(__m128i rows[4], const uint32_t *const p[], size_t at)
{
	int i;

	for (i = 0; i < 4; i++)
		rows[i] = VEC_LOAD(p[0] + at + 4 * i);
}

TARGET static inline __attribute__((always_inline)) void
scatter_1(uint32_t *const p[], size_t at, const __m128i rows[4], unsigned past_cache)
{
	int i;

	if (p[0] == NULL)
		return;
	for (i = 0; i < 4; i++)
		if (past_cache & 1)
			_mm_stream_si128((__m128i *)(p[0] + at) + i, rows[i]);
		else
			_mm_store_si128((__m128i *)(p[0] + at) + i, rows[i]);
}
