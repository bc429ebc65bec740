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

static void
blockmix_1(uint32_t *const out[], const uint32_t *const p[], const uint32_t *const q[], size_t r)
{
	uint32_t x[SALSA_WORDS];
	size_t last = (2 * r - 1) * SALSA_WORDS;
	size_t block, from, to, i;

	for (i = 0; i < SALSA_WORDS; i++)
		x[i] = p[0][last + diagonal_place[i]] ^ q[0][last + diagonal_place[i]];
	for (block = 0; block < 2 * r; block++) {
		/* The even blocks of the result come first, then the odd ones. */
		from = block * SALSA_WORDS;
		to = (block / 2 + (block % 2) * r) * SALSA_WORDS;
		for (i = 0; i < SALSA_WORDS; i++)
			x[i] ^= p[0][from + diagonal_place[i]] ^ q[0][from + diagonal_place[i]];
		salsa20_8(x);
		for (i = 0; i < SALSA_WORDS; i++)
			out[0][to + diagonal_place[i]] = x[i];
	}
}

const struct kernels kernels_portable = {"portable", 1, {NULL, blockmix_1}};
