/*
 * The vector kernels, as a template: define KERNEL and GROUPS and include this, once per kernel.  The
 * rest comes from the vector_*.h that was included last.
 *
 *   KERNEL        name of the kernel
 *   GROUPS        how many vectors of lanes take turns, 1 or 2
 *   TARGET        attribute that lets the compiler use the instruction set
 *   VEC           a vector: VEC_LANES lanes of four words
 *   VEC_LANES     how many lanes lie side by side in a vector
 *   VEC_ADD(x, y), VEC_XOR(x, y), VEC_AND(x, y)
 *                 on every word
 *   VEC_XOR_ROTATED(x, y, bits)
 *                 on every word, x xor y, which is rotated first
 *   VEC_TURN(x, places)
 *                 within every lane, move the words `places` down, the lowest ones to the top
 *   VEC_ROW(rows, i)
 *                 where row i of every lane lies, of the block whose pieces are rows[0..VEC_LANES - 1]
 *   VEC_LOAD(address), VEC_STORE(address, x)
 *                 a vector in memory
 *   VEC_GATHER(rows, p, at)
 *                 rows[0..3] = the block at word `at` of p[lane], for every lane
 *   VEC_SCATTER(p, at, rows, past_cache)
 *                 the block at word `at` of p[lane] = rows[0..3], where p[lane] is not NULL; bit `lane` of
 *                 past_cache says that the cache is to be left alone
 */

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define SALSA20_8 PASTE(KERNEL, _salsa20_8)
#define MIX_BLOCKS PASTE(KERNEL, _mix_blocks)
#define LOAD_INPUT PASTE(KERNEL, _load_input)

/* Do it for group 0 and for group 1, next to each other in the instruction stream. */
#if GROUPS == 1
#define EACH_GROUP(statement) do { enum { g = 0 }; statement; } while (0)
#else
#define EACH_GROUP(statement) do { { enum { g = 0 }; statement; } { enum { g = 1 }; statement; } } while (0)
#endif

#define QUARTER(to, x, y, bits) \
	EACH_GROUP(VEC sum = VEC_ADD(x[g], y[g]); to[g] = VEC_XOR_ROTATED(to[g], sum, bits))
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

/* in = the block at word `at` of a group's input. */
TARGET static inline __attribute__((always_inline)) void
LOAD_INPUT(VEC in[4], const struct group *group, size_t at, unsigned does)
{
	VEC add[4];
	VEC keep;
	int i;

	for (i = 0; i < 4; i++)
		in[i] = VEC_LOAD(VEC_ROW(group->x, i) + at);
	if (does & GROUP_DROPS) {
		keep = VEC_LOAD(group->keep);
		for (i = 0; i < 4; i++)
			in[i] = VEC_AND(in[i], keep);
	}
	if (does & GROUP_ADDS) {
		VEC_GATHER(add, group->add, at);
		for (i = 0; i < 4; i++)
			in[i] = VEC_XOR(in[i], add[i]);
	}
}

/* The loop of scryptBlockMix, for groups that do nothing but what `does`, a constant, has. */
TARGET static inline __attribute__((always_inline)) void
MIX_BLOCKS(struct group groups[], unsigned does)
{
	const size_t r = groups[0].r;
	VEC x[GROUPS][4], in[GROUPS][4];
	size_t block, following, to;
	int i;

	EACH_GROUP(LOAD_INPUT(x[g], &groups[g], (2 * r - 1) * SALSA_WORDS, does));
	EACH_GROUP(LOAD_INPUT(in[g], &groups[g], 0, does));
	for (block = 0; block < 2 * r; block++) {
		EACH_GROUP(x[g][0] = VEC_XOR(x[g][0], in[g][0]));
		EACH_GROUP(x[g][1] = VEC_XOR(x[g][1], in[g][1]));
		EACH_GROUP(x[g][2] = VEC_XOR(x[g][2], in[g][2]));
		EACH_GROUP(x[g][3] = VEC_XOR(x[g][3], in[g][3]));
		/* Salsa20/8 leaves time to load the input that follows; in the last turn it is for nobody. */
		following = block + 1 < 2 * r ? block + 1 : 0;
		EACH_GROUP(LOAD_INPUT(in[g], &groups[g], following * SALSA_WORDS, does));
		SALSA20_8(x);
		to = MIXED_PLACE(block, r) * SALSA_WORDS;
		EACH_GROUP(for (i = 0; i < 4; i++) VEC_STORE(VEC_ROW(groups[g].y, i) + to, x[g][i]));
		if (does & GROUP_COPIES)
			EACH_GROUP(VEC_SCATTER(groups[g].copy, to, x[g], groups[g].past_cache));
	}
}

/* A blockmix_fn of GROUPS groups of VEC_LANES lanes. */
TARGET static void
KERNEL(struct group groups[])
{
	/* A loop for each step that is frequent, and one that can do all. */
	switch (groups[0].does | groups[GROUPS - 1].does) {
	case 0:
		MIX_BLOCKS(groups, 0);
		break;
	case GROUP_COPIES:
		MIX_BLOCKS(groups, GROUP_COPIES);
		break;
	case GROUP_ADDS:
		MIX_BLOCKS(groups, GROUP_ADDS);
		break;
	default:
		MIX_BLOCKS(groups, GROUP_ADDS | GROUP_COPIES | GROUP_DROPS);
		break;
	}
}

#undef TURN
#undef QUARTER
#undef EACH_GROUP
#undef MIX_BLOCKS
#undef LOAD_INPUT
#undef SALSA20_8
#undef PASTE
#undef PASTE_
#undef GROUPS
#undef KERNEL
