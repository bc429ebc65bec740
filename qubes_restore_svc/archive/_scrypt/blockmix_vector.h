/*
 * The vector kernels, as a template: define KERNEL and GROUPS and include this, once per kernel.  The
 * rest comes from the vector_*.h that was included last.
 *
 *   KERNEL        name of the kernel
 *   GROUPS        how many vectors of lanes take turns, 1 or 2
 *   TARGET        attribute that lets the compiler use the instruction set
 *   VEC           a vector: VEC_LANES lanes of four words
 *   VEC_LANES     how many lanes lie side by side in a vector
 *   VEC_ADD(x, y), VEC_XOR(x, y), VEC_ROTATE(x, bits)
 *                 on every word
 *   VEC_TURN(x, places)
 *                 within every lane, move the words `places` down, the lowest ones to the top
 *   VEC_LOAD(rows, p, q, at)
 *                 rows[0..3] = the block at word `at` of p[lane] xor the one of q[lane]
 *   VEC_STORE(p, at, rows)
 *                 the block at word `at` of p[lane] = rows[0..3]
 */

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define SALSA20_8 PASTE(KERNEL, _salsa20_8)
#define MIX_BLOCK PASTE(KERNEL, _mix_block)

/* Do it for group 0 and for group 1, next to each other in the instruction stream. */
#if GROUPS == 1
#define EACH_GROUP(statement) do { enum { g = 0 }; statement; } while (0)
#else
#define EACH_GROUP(statement) do { { enum { g = 0 }; statement; } { enum { g = 1 }; statement; } } while (0)
#endif

#define QUARTER(to, x, y, bits) \
	EACH_GROUP(to[g] = VEC_XOR(to[g], VEC_ROTATE(VEC_ADD(x[g], y[g]), bits)))
#define TURN(x, places) EACH_GROUP(x[g] = VEC_TURN(x[g], places))

/* Salsa20/8 (RFC 7914 section 3) of every group's matrix, in place; rows are diagonals. */
TARGET static inline __attribute__((always_inline)) void
SALSA20_8(VEC x[GROUPS][4])
{
	VEC a[GROUPS], b[GROUPS], c[GROUPS], d[GROUPS];
	int i;

	EACH_GROUP(a[g] = x[g][0]);
	EACH_GROUP(b[g] = x[g][1]);
	EACH_GROUP(c[g] = x[g][2]);
	EACH_GROUP(d[g] = x[g][3]);
	for (i = 0; i < 8; i += 2) {
		/* Columns. */
		QUARTER(b, a, d, 7);
		QUARTER(c, b, a, 9);
		QUARTER(d, c, b, 13);
		QUARTER(a, d, c, 18);
		TURN(b, 3);
		TURN(c, 2);
		TURN(d, 1);
		/* Rows: the turned diagonals hold them, b and d having changed places. */
		QUARTER(d, a, b, 7);
		QUARTER(c, d, a, 9);
		QUARTER(b, c, d, 13);
		QUARTER(a, b, c, 18);
		TURN(b, 1);
		TURN(c, 2);
		TURN(d, 3);
	}
	EACH_GROUP(x[g][0] = VEC_ADD(x[g][0], a[g]));
	EACH_GROUP(x[g][1] = VEC_ADD(x[g][1], b[g]));
	EACH_GROUP(x[g][2] = VEC_ADD(x[g][2], c[g]));
	EACH_GROUP(x[g][3] = VEC_ADD(x[g][3], d[g]));
}

/* One turn of scryptBlockMix's loop: x = Salsa20/8(x xor block `from` of the input), to block `to`. */
TARGET static inline __attribute__((always_inline)) void
MIX_BLOCK(VEC x[GROUPS][4], uint32_t *const out[], size_t to, const uint32_t *const p[],
          const uint32_t *const q[], size_t from)
{
	VEC in[GROUPS][4];

	EACH_GROUP(VEC_LOAD(in[g], &p[g * VEC_LANES], &q[g * VEC_LANES], from * SALSA_WORDS));
	EACH_GROUP(x[g][0] = VEC_XOR(x[g][0], in[g][0]));
	EACH_GROUP(x[g][1] = VEC_XOR(x[g][1], in[g][1]));
	EACH_GROUP(x[g][2] = VEC_XOR(x[g][2], in[g][2]));
	EACH_GROUP(x[g][3] = VEC_XOR(x[g][3], in[g][3]));
	SALSA20_8(x);
	EACH_GROUP(VEC_STORE(&out[g * VEC_LANES], to * SALSA_WORDS, x[g]));
}

/* A blockmix_fn of VEC_LANES * GROUPS lanes. */
TARGET static void
KERNEL(uint32_t *const out[], const uint32_t *const p[], const uint32_t *const q[], size_t r)
{
	VEC x[GROUPS][4];
	size_t i;

	EACH_GROUP(VEC_LOAD(x[g], &p[g * VEC_LANES], &q[g * VEC_LANES], (2 * r - 1) * SALSA_WORDS));
	for (i = 0; i < r; i++) {
		/* The even blocks of the result come first, then the odd ones. */
		MIX_BLOCK(x, out, i, p, q, 2 * i);
		MIX_BLOCK(x, out, r + i, p, q, 2 * i + 1);
	}
}

#undef TURN
#undef QUARTER
#undef EACH_GROUP
#undef MIX_BLOCK
#undef SALSA20_8
#undef PASTE
#undef PASTE_
#undef GROUPS
#undef KERNEL
