/* The kernel for every processor: one lane, plain C, the quarter rounds as the RFC writes them. */
#include "blockmix_sets.h"

#define ROTATE(x, bits) ((x) << (bits) | (x) >> (32 - (bits)))

/* Salsa20/8 (RFC 7914 section 3) of x in place; x is in the order of the RFC. */
static void
salsa20_8(uint32_t x[SALSA_WORDS])
{
	uint32_t z[SALSA_WORDS];
	size_t i;

#define QUARTER(a, b, c, d) \
	do { \
		z[b] ^= ROTATE(z[a] + z[d], 7); \
		z[c] ^= ROTATE(z[b] + z[a], 9); \
		z[d] ^= ROTATE(z[c] + z[b], 13); \
		z[a] ^= ROTATE(z[d] + z[c], 18); \
	} while (0)

	for (i = 0; i < SALSA_WORDS; i++)
		z[i] = x[i];
	for (i = 0; i < 8; i += 2) {
		/* Columns. */
		QUARTER(0, 4, 8, 12);
		QUARTER(5, 9, 13, 1);
		QUARTER(10, 14, 2, 6);
		QUARTER(15, 3, 7, 11);
		/* Rows. */
		QUARTER(0, 1, 2, 3);
		QUARTER(5, 6, 7, 4);
		QUARTER(10, 11, 8, 9);
		QUARTER(15, 12, 13, 14);
	}
	for (i = 0; i < SALSA_WORDS; i++)
		x[i] += z[i];
#undef QUARTER
}

/* Word i, in the order of the RFC, of the block at word `at` of the input. */
static uint32_t
input_word(const struct group *group, size_t at, size_t i)
{
	size_t word = at + diagonal_place[i];
	uint32_t x = group->x[0][word];

	if (group->does & GROUP_DROPS)
		x &= group->keep[0];
	if (group->does & GROUP_ADDS)
		x ^= group->add[0][word];
	return x;
}

static void
blockmix_1(struct group groups[])
{
	const struct group *group = &groups[0];
	const size_t last = (2 * group->r - 1) * SALSA_WORDS;
	uint32_t x[SALSA_WORDS];
	size_t block, to, i;

	for (i = 0; i < SALSA_WORDS; i++)
		x[i] = input_word(group, last, i);
	for (block = 0; block < 2 * group->r; block++) {
		to = MIXED_PLACE(block, group->r) * SALSA_WORDS;
		for (i = 0; i < SALSA_WORDS; i++)
			x[i] ^= input_word(group, block * SALSA_WORDS, i);
		salsa20_8(x);
		for (i = 0; i < SALSA_WORDS; i++) {
			group->y[0][to + diagonal_place[i]] = x[i];
			if (group->copy[0] != NULL)
				group->copy[0][to + diagonal_place[i]] = x[i];
		}
	}
}

const struct kernels kernels_portable = {
	.name = "portable",
	.lanes = 1,
	.for_lanes = {[1] = {1, blockmix_1}},
};
