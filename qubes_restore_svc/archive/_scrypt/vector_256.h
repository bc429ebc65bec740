/* Vectors of 256 bits for blockmix_vector.h: two lanes.  Expects TARGET and ROTATE_256(x, bits). */

#undef VEC
#undef VEC_LANES
#undef VEC_ADD
#undef VEC_XOR
#undef VEC_ROTATE
#undef VEC_TURN
#undef VEC_LOAD
#undef VEC_STORE

#define VEC __m256i
#define VEC_LANES 2
#define VEC_ADD _mm256_add_epi32
#define VEC_XOR _mm256_xor_si256
#define VEC_ROTATE ROTATE_256
#define VEC_TURN(x, places) \
	_mm256_shuffle_epi32(x, _MM_SHUFFLE((places + 3) % 4, (places + 2) % 4, (places + 1) % 4, (places) % 4))
#define VEC_LOAD load_2
#define VEC_STORE store_2

/* The low 128 bits of x and then those of y; the high ones. */
#define LOW_HALVES(x, y) _mm256_permute2x128_si256(x, y, 0x20)
#define HIGH_HALVES(x, y) _mm256_permute2x128_si256(x, y, 0x31)

/* Rows 2 * half and 2 * half + 1 of one lane's block. */
TARGET static inline __attribute__((always_inline)) __m256i
load_two_rows(const uint32_t *p, const uint32_t *q, int half)
{
	return _mm256_xor_si256(_mm256_load_si256((const __m256i *)p + half),
	                        _mm256_load_si256((const __m256i *)q + half));
}

TARGET static inline __attribute__((always_inline)) void
load_2(__m256i rows[4], const uint32_t *const p[], const uint32_t *const q[], size_t at)
{
	__m256i x, y;
	int half;

	for (half = 0; half < 2; half++) {
		x = load_two_rows(p[0] + at, q[0] + at, half);
		y = load_two_rows(p[1] + at, q[1] + at, half);
		rows[2 * half] = LOW_HALVES(x, y);
		rows[2 * half + 1] = HIGH_HALVES(x, y);
	}
}

TARGET static inline __attribute__((always_inline)) void
store_2(uint32_t *const p[], size_t at, const __m256i rows[4])
{
	int half;

	for (half = 0; half < 2; half++) {
		_mm256_store_si256((__m256i *)(p[0] + at) + half, LOW_HALVES(rows[2 * half], rows[2 * half + 1]));
		_mm256_store_si256((__m256i *)(p[1] + at) + half, HIGH_HALVES(rows[2 * half], rows[2 * half + 1]));
	}
}

#undef LOW_HALVES
#undef HIGH_HALVES
