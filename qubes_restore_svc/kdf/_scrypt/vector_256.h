/* Vectors of 256 bits for blockmix_vector.h: two lanes.  Expects TARGET and XOR_ROTATED_256(x, y, bits). */

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

#define VEC __m256i
#define VEC_LANES 2
#define VEC_ADD _mm256_add_epi32
#define VEC_XOR _mm256_xor_si256
#define VEC_AND _mm256_and_si256
#define VEC_XOR_ROTATED XOR_ROTATED_256
#define VEC_TURN(x, places) \
	_mm256_shuffle_epi32(x, _MM_SHUFFLE((places + 3) % 4, (places + 2) % 4, (places + 1) % 4, (places) % 4))
#define VEC_ROW(rows, i) ((rows)[(i) / 2] + 8 * ((i) % 2))
#define VEC_LOAD(address) _mm256_load_si256((const __m256i *)(address))
#define VEC_STORE(address, x) _mm256_store_si256((__m256i *)(address), x)
#define VEC_GATHER gather_2
#define VEC_SCATTER scatter_2

/* The low 128 bits of x and then those of y; the high ones. */
#define LOW_HALVES(x, y) _mm256_permute2x128_si256(x, y, 0x20)
#define HIGH_HALVES(x, y) _mm256_permute2x128_si256(x, y, 0x31)

TARGET static inline __attribute__((always_inline)) void
gather_2(__m256i rows[4], const uint32_t *const p[], size_t at)
{
	__m256i x, y;
	int half;

	for (half = 0; half < 2; half++) {
		x = VEC_LOAD(p[0] + at + 8 * half);
		y = VEC_LOAD(p[1] + at + 8 * half);
		rows[2 * half] = LOW_HALVES(x, y);
		rows[2 * half + 1] = HIGH_HALVES(x, y);
	}
}

/* Rows 0 and 1 of a lane's block, and rows 2 and 3. */
TARGET static inline __attribute__((always_inline)) void
put_block(uint32_t *block, __m256i low, __m256i high, unsigned past_cache)
{
	if (past_cache) {
		_mm256_stream_si256((__m256i *)block, low);
		_mm256_stream_si256((__m256i *)block + 1, high);
	} else {
		_mm256_store_si256((__m256i *)block, low);
		_mm256_store_si256((__m256i *)block + 1, high);
	}
}

TARGET static inline __attribute__((always_inline)) void
scatter_2(uint32_t *const p[], size_t at, const __m256i rows[4], unsigned past_cache)
{
	if (p[0] != NULL)
		put_block(p[0] + at, LOW_HALVES(rows[0], rows[1]), LOW_HALVES(rows[2], rows[3]), past_cache & 1);
	if (p[1] != NULL)
		put_block(p[1] + at, HIGH_HALVES(rows[0], rows[1]), HIGH_HALVES(rows[2], rows[3]), past_cache & 2);
}

#undef LOW_HALVES
#undef HIGH_HALVES
