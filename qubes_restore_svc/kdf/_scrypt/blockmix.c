/* Which kernels this machine can run, and the order of words that they share. */
#include "blockmix.h"
#include "blockmix_sets.h"

#include <string.h>

const uint8_t diagonal_place[SALSA_WORDS] = {0, 13, 10, 7, 4, 1, 14, 11, 8, 5, 2, 15, 12, 9, 6, 3};

static int
always(void)
{
	return 1;
}

#ifdef HAVE_VECTOR_KERNELS
/* The compiler's own check: CPUID for the processor, XGETBV for the operating system. */
static int
has_avx2(void)
{
	__builtin_cpu_init();
	return __builtin_cpu_supports("avx2") != 0;
}

static int
has_avx512(void)
{
	__builtin_cpu_init();
	return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512vl") != 0;
}
#endif

/* Fastest first. */
static const struct {
	const struct kernels *kernels;
	int (*can_run)(void);
} sets[] = {
#ifdef HAVE_VECTOR_KERNELS
	{&kernels_avx512, has_avx512},
	{&kernels_avx2, has_avx2},
	{&kernels_sse2, always},
#endif
	{&kernels_portable, always},
};

const struct kernels *
kernels_find(const char *name)
{
	size_t i;

	for (i = 0; i < sizeof(sets) / sizeof(sets[0]); i++) {
		if (name != NULL && strcmp(name, sets[i].kernels->name) != 0)
			continue;
		if (sets[i].can_run())
			return sets[i].kernels;
	}
	return NULL;
}

void
to_diagonals(uint32_t *words, const uint8_t *bytes, size_t blocks)
{
	size_t i;

	for (; blocks > 0; blocks--, words += SALSA_WORDS, bytes += SALSA_BYTES)
		for (i = 0; i < SALSA_WORDS; i++)
			words[diagonal_place[i]] = (uint32_t)bytes[4 * i] | (uint32_t)bytes[4 * i + 1] << 8 |
			                           (uint32_t)bytes[4 * i + 2] << 16 | (uint32_t)bytes[4 * i + 3] << 24;
}

void
from_diagonals(uint8_t *bytes, const uint32_t *words, size_t blocks)
{
	size_t i;
	uint32_t word;

	for (; blocks > 0; blocks--, words += SALSA_WORDS, bytes += SALSA_BYTES)
		for (i = 0; i < SALSA_WORDS; i++) {
			word = words[diagonal_place[i]];
			bytes[4 * i] = (uint8_t)word;
			bytes[4 * i + 1] = (uint8_t)(word >> 8);
			bytes[4 * i + 2] = (uint8_t)(word >> 16);
			bytes[4 * i + 3] = (uint8_t)(word >> 24);
		}
}
