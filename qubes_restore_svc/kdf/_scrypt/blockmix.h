/*
 * scryptBlockMix (RFC 7914 section 4) of several lanes at once.
 *
 * A lane is one independent derivation.  Within a lane each block of 64 bytes waits for the one
 * before it, so a single lane leaves most of the processor idle.  The kernels fill it in two ways:
 * the lanes of a group lie side by side in the 128-bit parts of a wide register, and two groups take
 * turns in one instruction stream.
 *
 * Lanes need not be at the same place of the same derivation; only r is common to them.  What differs
 * from lane to lane is what is xored to its blocks, and where a copy of the result goes.
 */
#ifndef BLOCKMIX_H
#define BLOCKMIX_H

#include <stddef.h>
#include <stdint.h>

/* The block that Salsa20/8 works on, in 32-bit words and in bytes. */
#define SALSA_WORDS 16
#define SALSA_BYTES 64

/* A row of its matrix, in words: what a lane has in a register. */
#define ROW_WORDS 4

/* The largest numbers of lanes in a register, of groups that take turns, and of lanes in all. */
#define GROUP_LANES 4
#define MAX_GROUPS 2
#define MAX_LANES 8

/* What the lanes of a group do besides mixing, in `does`. */
#define GROUP_ADDS 1    /* `add` is xored to the input; otherwise `add` is not read */
#define GROUP_COPIES 2  /* some lane has a `copy` */
#define GROUP_DROPS 4   /* some lane has zeros in `keep`; otherwise `keep` is not read */

/*
 * The lanes that lie side by side in one register, and one step of theirs:
 *
 *     y = scryptBlockMix((x and keep) xor add), of which a copy goes to `copy`.
 *
 * All pointers lead to 2 * r blocks of 64 bytes, aligned to 64 bytes, whose words are in the order of
 * to_diagonals().  `add` and `copy` belong to one lane each.  x and y belong to the whole group, whose
 * lanes are interleaved as the registers have them: first row 0 of every lane, then row 1 of every lane,
 * and so on.  Block b is cut into one piece of 64 bytes for each lane, and piece i lies in block b of x[i].
 * So a group takes no memory but what each of its lanes brings along.
 *
 * Nothing that is written overlaps anything else.
 */
struct group {
	size_t r;
	unsigned does;                  /* GROUP_ADDS, GROUP_COPIES, GROUP_DROPS */
	unsigned past_cache;            /* bit `lane`: nobody reads the copy soon, so the cache is left alone */
	uint32_t *x[GROUP_LANES];
	uint32_t *y[GROUP_LANES];
	const uint32_t *add[GROUP_LANES];
	uint32_t *copy[GROUP_LANES];    /* NULL: this lane wants none */
	uint32_t keep[GROUP_LANES * ROW_WORDS] __attribute__((aligned(64)));  /* for each row; all bits of a lane alike */
};

/*
 * blockmix(groups):
 * Take one step with one group, or with two in turns, which have the same r, at least 1.
 */
typedef void blockmix_fn(struct group groups[]);

/*
 * The kernels of one instruction set.  `for_lanes[n]` mixes n lanes at once, n being 1, 2, 4 or 8, which lie
 * in groups of `in_group`; `lanes` is the largest n that it has.  It has every power of two below that as well.
 */
struct kernels {
	const char *name;
	size_t lanes;
	struct {
		size_t in_group;
		blockmix_fn *blockmix;
	} for_lanes[MAX_LANES + 1];
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

/* MIXED_PLACE(i, r): which block of the result block i becomes; the even ones come first, then the odd ones. */
#define MIXED_PLACE(i, r) ((i) / 2 + (i) % 2 * (r))

/* diagonal_place[i]: where word i of the RFC's order stands in the order of the kernels. */
extern const uint8_t diagonal_place[SALSA_WORDS];

#endif
