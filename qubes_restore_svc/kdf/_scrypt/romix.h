/*
 * scryptROMix (RFC 7914 section 5) of several derivations side by side.
 *
 * A derivation is a small machine whose only step is one scryptBlockMix.  It says what is added to its
 * next step and where a copy of the result goes, so a kernel can take the next step of any derivations
 * together, whatever their N and wherever they stand.
 *
 * Storing only every second, third, ... block of V saves memory: a block that was left out is computed
 * again from the stored one before it.  With the stride s that takes (s + 3) / 4 times the steps.
 */
#ifndef ROMIX_H
#define ROMIX_H

#include <stddef.h>
#include <stdint.h>

#include "blockmix.h"

/* The bounds that romix_memory() checks; strides are at least 1. */
#define ROMIX_MAX_LOG_N 32
#define ROMIX_MAX_R (1 << 16)
#define ROMIX_MAX_STRIDE 16

enum romix_state {
	ROMIX_FILL,       /* first loop of the RFC: X becomes the next block of V */
	ROMIX_MIX,        /* second loop: X is mixed with V_j */
	ROMIX_RECOMPUTE,  /* between two turns of the second loop: on the way to a V_j that is not stored */
	ROMIX_FINISHED
};

/* One derivation.  Its memory belongs to the caller; nothing in here is for callers to touch. */
struct romix {
	/* What is derived. */
	uint8_t *blocks;
	size_t r, p;
	uint64_t n;
	unsigned stride;

	/* How far it is. */
	enum romix_state state;
	size_t part;          /* which of the p blocks */
	uint64_t turn;        /* the RFC's i, in either loop */
	unsigned missing;     /* how many steps V_j is away */

	/* Where things lie, 128 * r bytes each except v; in the order of to_diagonals(). */
	uint32_t *v;
	uint32_t *shared[MAX_GROUPS][2];  /* for x and y of a group, which hold pieces of all of its lanes */
	uint32_t *x;                      /* what is mixed, X or T, while nobody advances; one of `shared` */
	uint32_t *saved, *saved_next;     /* a copy of X, wherever some blocks of V have to be computed again */
	uint32_t *zero;

	/* The next step: scryptBlockMix(x xor add), or scryptBlockMix(add) if it drops x. */
	int drops_x;
	const uint32_t *add;
	uint32_t *copy;           /* where the result goes besides; NULL: nowhere */
	int past_cache;           /* it is a block of V, which will not be read for long */
};

/*
 * romix_memory(log_n, r, stride):
 * Return how many bytes of memory a derivation with N = 2^log_n takes when it stores every
 * `stride`th block of V; 0 if a parameter is out of bounds: N at least 2 and below 2^(16 * r),
 * as the RFC wants, and at most 2^ROMIX_MAX_LOG_N; r and the stride as above.
 */
size_t romix_memory(unsigned log_n, size_t r, unsigned stride);

/*
 * romix_begin(romix, blocks, r, p, log_n, stride, memory):
 * Prepare scryptROMix of each of the `p` (at least 1) blocks of 128 * r bytes at `blocks`, in place.
 * `memory` is aligned to 64 bytes and as large as romix_memory() says for these parameters, which are
 * within its bounds.  Both stay the caller's, who leaves them alone until the derivation is finished or
 * given up, and may then use or free them at once.
 */
void romix_begin(struct romix *romix, uint8_t *blocks, size_t r, size_t p, unsigned log_n,
                 unsigned stride, void *memory);

/*
 * romix_advance(kernels, lanes, count, steps):
 * Take steps with all `count` derivations, 1 to kernels->lanes of them and none finished, until the
 * first is finished or each has taken `steps` steps.  Derivations whose r is not that of the first one
 * wait.  The time is bounded by `steps`, a step being one scryptBlockMix.  Afterwards all that there is of
 * a derivation lies in its own memory, and nothing in that of the others.
 */
void romix_advance(const struct kernels *kernels, struct romix *const lanes[], size_t count, uint64_t steps);

/*
 * romix_is_finished(romix):
 * Return nonzero once all blocks are done; they then lie in `blocks`.
 */
int romix_is_finished(const struct romix *romix);

/*
 * romix_wipe(romix):
 * Overwrite the working blocks of a derivation, finished or given up; V is left to the owner of the
 * memory, who may want to use it for another derivation first.
 */
void romix_wipe(struct romix *romix);

#endif
