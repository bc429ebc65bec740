/* scryptROMix: the two loops of the RFC, turned inside out into steps of one scryptBlockMix each. */
#define _DEFAULT_SOURCE
#include "romix.h"

#include <string.h>

/* The four of `shared`, saved, saved_next and zero, behind V. */
#define WORKING_BLOCKS 7

/* Words and bytes of what the RFC calls a block of scryptROMix. */
#define BLOCK_WORDS(r) ((r) * 2 * SALSA_WORDS)
#define BLOCK_BYTES(r) ((r) * 2 * SALSA_BYTES)

static void enter_group(struct group *group, struct romix *const m[], size_t active, size_t in_group,
                        size_t first);
static void leave_group(struct group *group, struct romix *const m[], size_t active, size_t in_group,
                        size_t first);
static int end_step(struct group *group, struct romix *const m[], size_t active, size_t in_group, size_t first);
static uint64_t take_steps_alike(blockmix_fn *blockmix, struct group groups[], struct romix *const m[],
                                 size_t active, size_t all, size_t in_group, uint64_t steps);
static uint64_t steps_alike(const struct romix *m);
static void begin_part(struct romix *m, uint32_t *x);
static void end_part(struct romix *m, struct group *group, size_t in_group, size_t lane);
static void complete_step(struct romix *m, struct group *group, size_t in_group, size_t lane);
static void prepare_fill(struct romix *m);
static uint64_t integerify(const struct romix *m, const struct group *group, size_t in_group, size_t lane);
static void prepare_mix(struct romix *m, uint64_t j);
static void prepare_recompute(struct romix *m, const uint32_t *add, int drops_x);
static void set_step(struct group *group, size_t lane, const struct romix *m);
static void prefetch_v(struct romix *const m[], size_t active);
static uint32_t *piece(uint32_t *const pieces[], size_t in_group, size_t lane, size_t row);
static void get_lane(uint32_t *words, const struct group *group, size_t in_group, size_t lane);
static void put_lane(const struct group *group, size_t in_group, size_t lane, const uint32_t *words);
static void swap(uint32_t **x, uint32_t **y);

size_t
romix_memory(unsigned log_n, size_t r, unsigned stride)
{
	uint64_t stored;

	if (log_n < 1 || log_n > ROMIX_MAX_LOG_N || r < 1 || r > ROMIX_MAX_R || log_n >= 16 * r)
		return 0;
	if (stride < 1 || stride > ROMIX_MAX_STRIDE)
		return 0;
	stored = (((uint64_t)1 << log_n) - 1) / stride + 1;
	if (stored + WORKING_BLOCKS > SIZE_MAX / BLOCK_BYTES(r))
		return 0;
	return (size_t)(stored + WORKING_BLOCKS) * BLOCK_BYTES(r);
}

void
romix_begin(struct romix *m, uint8_t *blocks, size_t r, size_t p, unsigned log_n, unsigned stride,
            void *memory)
{
	uint32_t *working;
	size_t i;

	m->blocks = blocks;
	m->r = r;
	m->p = p;
	m->n = (uint64_t)1 << log_n;
	m->stride = stride;
	m->part = 0;
	m->missing = 0;

	m->v = memory;
	working = m->v + romix_memory(log_n, r, stride) / sizeof(uint32_t) - WORKING_BLOCKS * BLOCK_WORDS(r);
	for (i = 0; i < MAX_GROUPS; i++) {
		m->shared[i][0] = working + 2 * i * BLOCK_WORDS(r);
		m->shared[i][1] = working + (2 * i + 1) * BLOCK_WORDS(r);
	}
	m->x = m->shared[0][0];
	m->saved = working + 4 * BLOCK_WORDS(r);
	m->saved_next = working + 5 * BLOCK_WORDS(r);
	m->zero = working + 6 * BLOCK_WORDS(r);
	memset(m->zero, 0, BLOCK_BYTES(r));

	begin_part(m, m->x);
}

void
romix_advance(const struct kernels *kernels, struct romix *const lanes[], size_t count, uint64_t steps)
{
	struct romix *m[MAX_LANES];
	struct group groups[MAX_GROUPS];
	blockmix_fn *blockmix;
	size_t active = 1, all = 1, in_group, i;
	int finished = 0;

	m[0] = lanes[0];
	for (i = 1; i < count; i++)
		if (lanes[i]->r == m[0]->r)
			m[active++] = lanes[i];
	while (all < active)
		all *= 2;
	in_group = kernels->for_lanes[all].in_group;
	blockmix = kernels->for_lanes[all].blockmix;

	for (i = 0; i < all; i += in_group)
		enter_group(&groups[i / in_group], m, active, in_group, i);
	for (; steps > 0 && !finished; steps--) {
		steps -= take_steps_alike(blockmix, groups, m, active, all, in_group, steps - 1);
		blockmix(groups);
		for (i = 0; i < all; i += in_group)
			finished |= end_step(&groups[i / in_group], m, active, in_group, i);
		prefetch_v(m, active);
	}
	for (i = 0; i < all; i += in_group)
		leave_group(&groups[i / in_group], m, active, in_group, i);
	for (i = 0; i < active; i++) {
		explicit_bzero(m[i]->shared[0][1], BLOCK_BYTES(m[i]->r));
		explicit_bzero(m[i]->shared[1][0], 2 * BLOCK_BYTES(m[i]->r));
	}
}

int
romix_is_finished(const struct romix *m)
{
	return m->state == ROMIX_FINISHED;
}

void
romix_wipe(struct romix *m)
{
	explicit_bzero(m->shared[0][0], WORKING_BLOCKS * BLOCK_BYTES(m->r));
}

/*
 * Form a group of the lanes m[first], m[first + 1], ...: interleave what they mix.  It is given one of their
 * `shared` pairs for it, another one than the other group, which is also another part of the cache.  Lanes from
 * `active` on mix zeros, in the pair that a lane of the first group has left.
 */
static void
enter_group(struct group *group, struct romix *const m[], size_t active, size_t in_group, size_t first)
{
	size_t lane, pair;
	const struct romix *owner;

	memset(group, 0, sizeof(*group));
	group->r = m[0]->r;
	for (lane = 0; lane < in_group; lane++) {
		pair = first + lane < active ? first / in_group : 1;
		owner = m[first + lane < active ? first + lane : first + lane - active];
		group->x[lane] = owner->shared[pair][1];  /* not [0], where X may lie now */
		group->y[lane] = owner->shared[pair][0];
		group->add[lane] = owner->zero;
		memset(group->keep + lane * ROW_WORDS, 0xff, ROW_WORDS * sizeof(uint32_t));
	}
	for (lane = 0; lane < in_group; lane++) {
		if (first + lane < active) {
			put_lane(group, in_group, lane, m[first + lane]->x);
			set_step(group, lane, m[first + lane]);
		} else {
			put_lane(group, in_group, lane, m[0]->zero);
		}
	}
}

/* Give each lane of a group what it mixes back. */
static void
leave_group(struct group *group, struct romix *const m[], size_t active, size_t in_group, size_t first)
{
	size_t lane;

	for (lane = 0; lane < in_group && first + lane < active; lane++)
		get_lane(group->y[lane], group, in_group, lane);
	for (lane = 0; lane < in_group && first + lane < active; lane++)
		if (group->y[lane] != m[first + lane]->x)
			memcpy(m[first + lane]->x, group->y[lane], BLOCK_BYTES(group->r));
}

/* A kernel has taken a step of a group: prepare the next one.  Nonzero if a lane is finished. */
static int
end_step(struct group *group, struct romix *const m[], size_t active, size_t in_group, size_t first)
{
	size_t lane;
	int finished = 0;

	group->does = 0;
	group->past_cache = 0;
	for (lane = 0; lane < in_group; lane++)
		swap(&group->x[lane], &group->y[lane]);
	for (lane = 0; lane < in_group && first + lane < active; lane++) {
		complete_step(m[first + lane], group, in_group, lane);
		set_step(group, lane, m[first + lane]);
		finished |= romix_is_finished(m[first + lane]);
	}
	return finished;
}

/*
 * Take as many of the next `steps` steps as every lane takes in the same way as the one that is prepared, and
 * return how many; one more is prepared.  These are nearly all where all blocks are stored, and all that changes
 * from one to the next is done here, in a fraction of the time of end_step().
 */
static uint64_t
take_steps_alike(blockmix_fn *blockmix, struct group groups[], struct romix *const m[], size_t active, size_t all,
                 size_t in_group, uint64_t steps)
{
	const size_t words = BLOCK_WORDS(m[0]->r);
	uint64_t alike, step;
	struct group *group;
	size_t i, lane;

	for (i = 0; i < active; i++) {
		alike = steps_alike(m[i]);
		if (alike < steps)
			steps = alike;
	}
	for (step = 0; step < steps; step++) {
		blockmix(groups);
		for (i = 0; i < all; i++) {
			group = &groups[i / in_group];
			lane = i % in_group;
			swap(&group->x[lane], &group->y[lane]);
			if (i >= active)
				continue;
			if (m[i]->state == ROMIX_FILL)
				group->copy[lane] = m[i]->copy += words;
			else
				group->add[lane] = m[i]->add = m[i]->v + integerify(m[i], group, in_group, lane) * words;
		}
		prefetch_v(m, active);
	}
	for (i = 0; i < active; i++)
		m[i]->turn += steps;
	return steps;
}

/* After how many steps a lane is still in the same loop, and not at its end, if it stores all blocks. */
static uint64_t
steps_alike(const struct romix *m)
{
	int alike = m->stride == 1 && (m->state == ROMIX_FILL || m->state == ROMIX_MIX);

	return alike && m->n - m->turn > 2 ? m->n - m->turn - 2 : 0;
}

/* Begin with the next of the p blocks; x is where X is to be. */
static void
begin_part(struct romix *m, uint32_t *x)
{
	to_diagonals(x, m->blocks + m->part * BLOCK_BYTES(m->r), 2 * m->r);
	memcpy(m->v, x, BLOCK_BYTES(m->r));
	m->state = ROMIX_FILL;
	m->turn = 0;
	prepare_fill(m);
}

static void
end_part(struct romix *m, struct group *group, size_t in_group, size_t lane)
{
	/* Nothing is to be computed again any more, so this place is free. */
	get_lane(m->saved, group, in_group, lane);
	from_diagonals(m->blocks + m->part * BLOCK_BYTES(m->r), m->saved, 2 * m->r);
	if (++m->part < m->p) {
		begin_part(m, m->saved);
		put_lane(group, in_group, lane, m->saved);
	} else {
		m->state = ROMIX_FINISHED;
	}
}

/* The step that was prepared has been taken: prepare the next one. */
static void
complete_step(struct romix *m, struct group *group, size_t in_group, size_t lane)
{
	switch (m->state) {
	case ROMIX_FILL:
		/* X = scryptBlockMix(X) has been done, and where it is to be stored, it is. */
		if (++m->turn < m->n) {
			prepare_fill(m);
		} else {
			m->turn = 0;
			prepare_mix(m, integerify(m, group, in_group, lane));
		}
		break;
	case ROMIX_MIX:
		/* X = scryptBlockMix(X xor V_j) has been done. */
		swap(&m->saved, &m->saved_next);
		if (++m->turn < m->n)
			prepare_mix(m, integerify(m, group, in_group, lane));
		else
			end_part(m, group, in_group, lane);
		break;
	case ROMIX_RECOMPUTE:
		/* T = scryptBlockMix(a block of V) has been done; T is the next block of V. */
		if (--m->missing > 0) {
			prepare_recompute(m, m->zero, 0);
		} else {
			m->state = ROMIX_MIX;
			m->drops_x = 0;
			m->add = m->saved;
			m->copy = m->saved_next;
		}
		break;
	case ROMIX_FINISHED:
		break;
	}
}

/* The RFC's first loop: V_i is stored, X = scryptBlockMix(X), which is V_(i + 1) or, at last, what is mixed. */
static void
prepare_fill(struct romix *m)
{
	uint64_t following = m->turn + 1;

	m->drops_x = 0;
	m->add = m->zero;
	m->copy = NULL;
	m->past_cache = following < m->n;
	if (following == m->n)
		m->copy = m->stride > 1 ? m->saved : NULL;
	else if (following % m->stride == 0)
		m->copy = m->v + following / m->stride * BLOCK_WORDS(m->r);
}

/* The RFC's j = Integerify(X) mod N. */
static uint64_t
integerify(const struct romix *m, const struct group *group, size_t in_group, size_t lane)
{
	/* The first word of the last block of 64 bytes; the words above never count. */
	return piece(group->x, in_group, lane, 0)[BLOCK_WORDS(m->r) - SALSA_WORDS] & (m->n - 1);
}

/* The RFC's second loop: X = scryptBlockMix(X xor V_j). */
static void
prepare_mix(struct romix *m, uint64_t j)
{
	const uint32_t *stored = m->v + j / m->stride * BLOCK_WORDS(m->r);

	m->missing = (unsigned)(j % m->stride);
	if (m->missing > 0) {
		m->state = ROMIX_RECOMPUTE;
		prepare_recompute(m, stored, 1);
	} else {
		m->state = ROMIX_MIX;
		m->drops_x = 0;
		m->add = stored;
		m->copy = m->stride > 1 ? m->saved_next : NULL;
		m->past_cache = 0;
	}
}

/* T = scryptBlockMix(T xor add), or of `add` alone where X stands in the place of T, a copy of which is saved. */
static void
prepare_recompute(struct romix *m, const uint32_t *add, int drops_x)
{
	m->drops_x = drops_x;
	m->add = add;
	m->copy = NULL;
	m->past_cache = 0;
}

/* Tell the group what a lane's next step is. */
static void
set_step(struct group *group, size_t lane, const struct romix *m)
{
	group->add[lane] = m->add;
	group->copy[lane] = m->copy;
	memset(group->keep + lane * ROW_WORDS, m->drops_x ? 0 : 0xff, ROW_WORDS * sizeof(uint32_t));
	group->does |= (m->add != m->zero ? GROUP_ADDS : 0) | (m->copy != NULL ? GROUP_COPIES : 0) |
	               (m->drops_x ? GROUP_DROPS : 0);
	group->past_cache |= (unsigned)(m->past_cache != 0) << lane;
}

/*
 * Let the blocks of V that the lanes add in their next step be on their way, in the order in which the kernel
 * takes them: of every lane the last 64 bytes, then the first, and so on.  They are brought into the second-level
 * cache: more of them can be under way there at once than into the first.
 */
static void
prefetch_v(struct romix *const m[], size_t active)
{
	const uint32_t *from_v[MAX_LANES];
	const size_t last = BLOCK_WORDS(m[0]->r) - SALSA_WORDS;
	size_t count = 0, word, i;

	for (i = 0; i < active; i++)
		if (m[i]->add != m[i]->zero && m[i]->add != m[i]->saved)
			from_v[count++] = m[i]->add;
	if (count == 0)
		return;
	for (i = 0; i < count; i++)
		__builtin_prefetch(from_v[i] + last, 0, 2);
	for (word = 0; word < last; word += SALSA_WORDS)
		for (i = 0; i < count; i++)
			__builtin_prefetch(from_v[i] + word, 0, 2);
}

/* Where a lane's row lies in the first block of a group's x or y; in the others, as many blocks further. */
static uint32_t *
piece(uint32_t *const pieces[], size_t in_group, size_t lane, size_t row)
{
	size_t word = (row * in_group + lane) * ROW_WORDS;

	return pieces[word / SALSA_WORDS] + word % SALSA_WORDS;
}

/* Take what one lane mixes out of the group's x. */
static void
get_lane(uint32_t *words, const struct group *group, size_t in_group, size_t lane)
{
	size_t at, row;

	for (at = 0; at < BLOCK_WORDS(group->r); at += SALSA_WORDS)
		for (row = 0; row < SALSA_WORDS / ROW_WORDS; row++)
			memcpy(words + at + row * ROW_WORDS, piece(group->x, in_group, lane, row) + at,
			       ROW_WORDS * sizeof(uint32_t));
}

/* Put what one lane mixes into the group's x. */
static void
put_lane(const struct group *group, size_t in_group, size_t lane, const uint32_t *words)
{
	size_t at, row;

	for (at = 0; at < BLOCK_WORDS(group->r); at += SALSA_WORDS)
		for (row = 0; row < SALSA_WORDS / ROW_WORDS; row++)
			memcpy(piece(group->x, in_group, lane, row) + at, words + at + row * ROW_WORDS,
			       ROW_WORDS * sizeof(uint32_t));
}

static void
swap(uint32_t **x, uint32_t **y)
{
	uint32_t *old_x = *x;

	*x = *y;
	*y = old_x;
}
