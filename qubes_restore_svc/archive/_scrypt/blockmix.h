/*
 * scryptBlockMix (RFC 7914 section 4) of several lanes at once.
 *
 * A lane is one independent derivation.  Within a lane each block of 64 bytes waits for the one
 * before it, so a single lane leaves most of the processor idle.  The kernels fill it in two ways:
 * lanes lie side by side in the 128-bit parts of a wide register, and two such registers take turns
 * in one instruction stream.
 *
 * A kernel takes each lane's blocks from wherever that lane has them.  So the lanes need not be at the
 * same place of the same derivation; only r is common to them.
 */
#ifndef BLOCKMIX_H
#define BLOCKMIX_H

#include <stddef.h>
#include <stdint.h>

/* The block that Salsa20/8 works on, in 32-bit words and in bytes. */
#define SALSA_WORDS 16
#define SALSA_BYTES 64

/* The largest number of lanes that a kernel has. */
#define MAX_LANES 4

/*
 * blockmix(out, p, q, r):
 * For each lane of the kernel, out[lane] = scryptBlockMix(p[lane] xor q[lane]).
 *
 * Every pointer leads to 2 * r blocks of 64 bytes, aligned to 64 bytes, in the word order of
 * to_diagonals(); r is at least 1.  An output overlaps no input and no other output; inputs may
 * coincide.
 */
typedef void blockmix_fn(uint32_t *const out[], const uint32_t *const p[], const uint32_t *const q[],
                         size_t r);

/*
 * The kernels of one instruction set.  `for_lanes[n]` mixes n lanes at once, n being 1, 2 or 4;
 * `lanes` is the largest n that it has.  It has every power of two below that as well.
 */
struct kernels {
	const char *name;
	size_t lanes;
	blockmix_fn *for_lanes[MAX_LANES + 1];
};

/*
 * kernels_find(name):
 * Return the kernels of that name, one of "AVX-512", "AVX2", "SSE2" and "portable"; with NULL as the
 * name, return the fastest ones.  Only kernels that were built, and that this processor and operating
 * system can run, are considered.  Return NULL if there are none of that name; "portable" always is.
 */
const struct kernels *kernels_find(const char *name);

/*
 * to_diagonals(words, bytes, blocks), from_diagonals(bytes, words, blocks):
 * Convert `blocks` blocks of 64 bytes from the order of the RFC (the 4 x 4 matrix of Salsa20 row by
 * row, in little-endian words) to the order that the kernels use, and back.
 *
 * The kernels keep the matrix as its four diagonals, words (0 5 10 15), (4 9 14 3), (8 13 2 7) and
 * (12 1 6 11): the quarter rounds of all columns are then one operation on whole vectors.  Word 0
 * stays first.
 */
void to_diagonals(uint32_t *words, const uint8_t *bytes, size_t blocks);
void from_diagonals(uint8_t *bytes, const uint32_t *words, size_t blocks);

/* diagonal_place[i]: where word i of the RFC's order stands in the order of the kernels. */
extern const uint8_t diagonal_place[SALSA_WORDS];

#endif
