/* Vectors of 512 bits for blockmix_vector.h: four lanes.  Expects TARGET and XOR_3. */

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

#define VEC __m512i
#define VEC_LANES 4
#define VEC_ADD _mm512_add_epi32
#define VEC_XOR _mm512_xor_si512
#define VEC_AND _mm512_and_si512
#define VEC_TURN(x, places) \
	_mm512_shuffle_epi32(x, _MM_SHUFFLE((places + 3) % 4, (places + 2) % 4, (places + 1) % 4, (places) % 4))
#define VEC_ROW(rows, i) ((rows)[i])
#define VEC_LOAD(address) _mm512_load_si512((const __m512i *)(address))
#define VEC_STORE(address, x) _mm512_store_si512((__m512i *)(address), x)
#define VEC_GATHER gather_4
#define VEC_SCATTER scatter_4

/*
 * Two groups that take turns keep the processor busy: the fewer instructions, the better.  One group waits for itself,
 * so half of the rotations are done the quick way of blockmix_avx512.c.  All of them would be too many shifts for
 * processors that shift 512 bits in one place only.
 */
#define VEC_XOR_ROTATED(x, y, bits) \
	(GROUPS > 1 || (bits) > 9 \
	 ? _mm512_xor_si512(x, _mm512_rol_epi32(y, bits)) \
	 : _mm512_ternarylogic_epi32(x, _mm512_slli_epi32(y, bits), _mm512_srli_epi32(y, 32 - (bits)), XOR_3))

/* Transpose a 4 x 4 matrix of 128-bit parts: a lane's four rows per vector become a row of four lanes. */
TARGET static inline __attribute__((always_inline)) void
transpose_4(__m512i out[4], const __m512i in[4])
{
	__m512i low_01 = _mm512_shuffle_i32x4(in[0], in[1], 0x44);
	__m512i high_01 = _mm512_shuffle_i32x4(in[0], in[1], 0xee);
	__m512i low_23 = _mm512_shuffle_i32x4(in[2], in[3], 0x44);
	__m512i high_23 = _mm512_shuffle_i32x4(in[2], in[3], 0xee);

	out[0] = _mm512_shuffle_i32x4(low_01, low_23, 0x88);
	out[1] = _mm512_shuffle_i32x4(low_01, low_23, 0xdd);
	out[2] = _mm512_shuffle_i32x4(high_01, high_23, 0x88);
	out[3] = _mm512_shuffle_i32x4(high_01, high_23, 0xdd);
}

TARGET static inline __attribute__((always_inline)) void
gather_4(__m512i rows[4], const uint32_t *const p[], size_t at)
{
	__m512i blocks[4];
	int lane;

	for (lane = 0; lane < 4; lane++)
		blocks[lane] = VEC_LOAD(p[lane] + at);
	transpose_4(rows, blocks);
}

TARGET static inline __attribute__((always_inline)) void
scatter_4(uint32_t *const p[], size_t at, const __m512i rows[4], unsigned past_cache)
{
	__m512i blocks[4];
	int lane;

	transpose_4(blocks, rows);
	for (lane = 0; lane < 4; lane++) {
		if (p[lane] == NULL)
			continue;
		if (past_cache >> lane & 1)
			_mm512_stream_si512((__m512i *)(p[lane] + at), blocks[lane]);
		else
			VEC_STORE(p[lane] + at, blocks[lane]);
	}
}
