/* scryptROMix: the two loops of the RFC, turned inside out into steps of one scryptBlockMix each. */
#define _DEFAULT_SOURCE
#include "romix.h"

#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

/* x, x_next, t, t_next, zero and waste, behind V. */
#define WORKING_BLOCKS 6

/* Words and bytes of what the RFC calls a block of scryptROMix. */
#define BLOCK_WORDS(r) ((r) * 2 * SALSA_WORDS)
#define BLOCK_BYTES(r) ((r) * 2 * SALSA_BYTES)

static void begin_part(struct romix *m);
static void end_part(struct romix *m);
static void complete_step(struct romix *m);
static void prepare_fill(struct romix *m);
static void prepare_mix(struct romix *m);
static void set_step(struct romix *m, const uint32_t *p, const uint32_t *q, uint32_t *out);
static void swap(uint32_t **x, uint32_t **y);
static void store_past_cache(uint32_t *to, const uint32_t *from, size_t words);

size_t
romix_memory(unsigned log_n, size_t r, unsigned log_stride)
{
	uint64_t stored;

	if (log_n < 1 || log_n > ROMIX_MAX_LOG_N || r < 1 || r > ROMIX_MAX_R || log_n >= 16 * r)
		return 0;
	if (log_stride > ROMIX_MAX_LOG_STRIDE)
		return 0;
	stored = (uint64_t)1 << (log_n > log_stride ? log_n - log_stride : 0);
	if (stored + WORKING_BLOCKS > SIZE_MAX / BLOCK_BYTES(r))
		return 0;
	return (size_t)(stored + WORKING_BLOCKS) * BLOCK_BYTES(r);
}

void
romix_begin(struct romix *m, uint8_t *blocks, size_t r, size_t p, unsigned log_n, unsigned log_stride,
            void *memory)
{
	uint32_t *working;

	m->blocks = blocks;
	m->r = r;
	m->p = p;
	m->n = (uint64_t)1 << log_n;
	m->log_stride = log_stride;
	m->part = 0;
	m->missing = 0;

	m->v = memory;
	working = m->v + romix_memory(log_n, r, log_stride) / sizeof(uint32_t) - WORKING_BLOCKS * BLOCK_WORDS(r);
	m->x = working;
	m->x_next = working + BLOCK_WORDS(r);
	m->t = working + 2 * BLOCK_WORDS(r);
	m->t_next = working + 3 * BLOCK_WORDS(r);
	m->zero = working + 4 * BLOCK_WORDS(r);
	m->waste = working + 5 * BLOCK_WORDS(r);
	memset(m->zero, 0, BLOCK_BYTES(r));

	begin_part(m);
}

void
romix_advance(const struct kernels *kernels, struct romix *const lanes[], size_t count, uint64_t steps)
{
	struct romix *m[MAX_LANES];
	const uint32_t *p[MAX_LANES], *q[MAX_LANES];
	uint32_t *out[MAX_LANES];
	size_t r = lanes[0]->r, active = 1, width = 1, i;
	int finished = 0;

	m[0] = lanes[0];
	for (i = 1; i < count; i++)
		if (lanes[i]->r == r)
			m[active++] = lanes[i];

	/* The kernel that fits; where it has a lane too many, that one repeats the first one's work. */
	while (width < active)
		width *= 2;
	for (i = active; i < width; i++)
		m[i] = m[0];

	for (; steps > 0 && !finished; steps--) {
		for (i = 0; i < width; i++) {
			p[i] = m[i]->step_p;
			q[i] = m[i]->step_q;
			out[i] = i < active ? m[i]->step_out : m[i]->waste;
		}
		kernels->for_lanes[width](out, p, q, r);
		for (i = 0; i < active; i++) {
			complete_step(m[i]);
			finished |= romix_is_finished(m[i]);
		}
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
	uint32_t *const working[] = {m->x, m->x_next, m->t, m->t_next, m->waste};
	size_t i;

	for (i = 0; i < sizeof(working) / sizeof(working[0]); i++)
		explicit_bzero(working[i], BLOCK_BYTES(m->r));
}

static void
begin_part(struct romix *m)
{
	to_diagonals(m->x, m->blocks + m->part * BLOCK_BYTES(m->r), 2 * m->r);
	m->state = ROMIX_FILL;
	m->turn = 0;
	prepare_fill(m);
}

static void
end_part(struct romix *m)
{
	from_diagonals(m->blocks + m->part * BLOCK_BYTES(m->r), m->x, 2 * m->r);
	if (++m->part < m->p)
		begin_part(m);
	else
		m->state = ROMIX_FINISHED;
}

/* A kernel has taken the step that was prepared: take in its result and prepare the next one. */
static void
complete_step(struct romix *m)
{
	switch (m->state) {
	case ROMIX_FILL:
		/* V_i was stored before; X = scryptBlockMix(X) has been done. */
		swap(&m->x, &m->x_next);
		if (++m->turn < m->n) {
			prepare_fill(m);
		} else {
			m->turn = 0;
			prepare_mix(m);
		}
		break;
	case ROMIX_MIX:
		/* X = scryptBlockMix(X xor V_j) has been done. */
		swap(&m->x, &m->x_next);
		if (++m->turn < m->n)
			prepare_mix(m);
		else
			end_part(m);
		break;
	case ROMIX_RECOMPUTE:
		/* T = scryptBlockMix(a block of V) has been done; T is the next block of V. */
		swap(&m->t, &m->t_next);
		if (--m->missing > 0) {
			set_step(m, m->t, m->zero, m->t_next);
		} else {
			m->state = ROMIX_MIX;
			set_step(m, m->x, m->t, m->x_next);
		}
		break;
	case ROMIX_FINISHED:
		break;
	}
}

/* The RFC's first loop: V_i = X, X = scryptBlockMix(X). */
static void
prepare_fill(struct romix *m)
{
	uint64_t stride_mask = ((uint64_t)1 << m->log_stride) - 1;

	if ((m->turn & stride_mask) == 0)
		store_past_cache(m->v + (m->turn >> m->log_stride) * BLOCK_WORDS(m->r), m->x, BLOCK_WORDS(m->r));
	set_step(m, m->x, m->zero, m->x_next);
}

/* The RFC's second loop: j = Integerify(X) mod N, X = scryptBlockMix(X xor V_j). */
static void
prepare_mix(struct romix *m)
{
	uint64_t j = m->x[BLOCK_WORDS(m->r) - SALSA_WORDS] & (m->n - 1);
	const uint32_t *stored = m->v + (j >> m->log_stride) * BLOCK_WORDS(m->r);
	size_t word;

	/* The kernel begins with the last block of 64 bytes; all of them are on their way before it runs. */
	__builtin_prefetch(stored + BLOCK_WORDS(m->r) - SALSA_WORDS);
	for (word = 0; word < BLOCK_WORDS(m->r) - SALSA_WORDS; word += SALSA_WORDS)
		__builtin_prefetch(stored + word);

	m->missing = (unsigned)(j & (((uint64_t)1 << m->log_stride) - 1));
	if (m->missing > 0) {
		m->state = ROMIX_RECOMPUTE;
		set_step(m, stored, m->zero, m->t_next);
	} else {
		m->state = ROMIX_MIX;
		set_step(m, m->x, stored, m->x_next);
	}
}

static void
set_step(struct romix *m, const uint32_t *p, const uint32_t *q, uint32_t *out)
{
	m->step_p = p;
	m->step_q = q;
	m->step_out = out;
}

static void
swap(uint32_t **x, uint32_t **y)
{
	uint32_t *old_x = *x;

	*x = *y;
	*y = old_x;
}

/* Copy to where nothing will be read for long: not by way of the cache, which holds the lanes' X. */
static void
store_past_cache(uint32_t *to, const uint32_t *from, size_t words)
{
#ifdef __SSE2__
	size_t i;

	for (i = 0; i < words; i += 4)
		_mm_stream_si128((__m128i *)(to + i), _mm_load_si128((const __m128i *)(from + i)));
#else
	memcpy(to, from, words * sizeof(uint32_t));
#endif
}
