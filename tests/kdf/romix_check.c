/*
 * Checks of the scrypt sources that are best run under a sanitizer: built and run by test_romix_c.py.
 * Memory comes from malloc at its exact size, so that the address sanitizer sees a step beyond it.
 * Link with -Wl,--wrap=munmap.
 */
#define _DEFAULT_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "arena.h"
#include "romix.h"

#define CHECK(condition) \
	do { \
		if (!(condition)) { \
			fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
			exit(1); \
		} \
	} while (0)

static const char *const set_names[] = {"portable", "SSE2", "AVX2", "AVX-512"};
#define SETS (sizeof(set_names) / sizeof(set_names[0]))

/* RFC 7914 section 9: input and output of scryptBlockMix; section 10 has the same input for scryptROMix. */
static const char block_input[] =
	"f7ce0b653d2d72a4108cf5abe912ffdd777616dbbb27a70e8204f3ae2d0f6fad"
	"89f68f4811d1e87bcc3bd7400a9ffd29094f0184639574f39ae5a1315217bcd7"
	"894991447213bb226c25b54da86370fbcd984380374666bb8ffcb5bf40c254b0"
	"67d27c51ce4ad5fed829c90b505a571b7f4d1cad6a523cda770e67bceaaf7e89";
static const char blockmix_output[] =
	"a41f859c6608cc993b81cacb020cef05044b2181a2fd337dfd7b1c6396682f29"
	"b4393168e3c9e6bcfe6bc5b7a06d96bae424cc102c91745c24ad673dc7618f81"
	"20edc975323881a80540f64c162dcd3c21077cfe5f8d5fe2b1a4168f953678b7"
	"7d3b3d803b60e4ab920996e59b4d53b65d2a225877d5edf5842cb9f14eefe425";
static const char romix_16_output[] =
	"79ccc193629debca047f0b70604bf6b62ce3dd4a9626e355fafc6198e6ea2b46"
	"d58413673b99b029d665c357601fb426a0b2f4bba200ee9f0a43d19b571a9c71"
	"ef1142e65d5a266fddca832ce59faa7cac0b9cf1be2bffca300d01ee387619c4"
	"ae12fd4438f203a0e4e1c47ec314861f4e9087cb33396a6873e8f9d2539a4b8e";

static void
from_hex(uint8_t *bytes, const char *hex, size_t size)
{
	unsigned byte;
	size_t i;

	for (i = 0; i < size; i++) {
		CHECK(sscanf(hex + 2 * i, "%2x", &byte) == 1);
		bytes[i] = (uint8_t)byte;
	}
}

static void *
allocate(size_t size)
{
	void *memory = NULL;

	CHECK(posix_memalign(&memory, 64, size) == 0);
	memset(memory, 0xa5, size);
	return memory;
}

static int
is_zero(const uint8_t *bytes, size_t size)
{
	while (size > 0 && bytes[size - 1] == 0)
		size--;
	return size == 0;
}

/* Where row `row` of a lane lies in a group's x or y: see struct group. */
static uint32_t *
row_of(uint32_t *const pieces[], size_t in_group, size_t lane, size_t row)
{
	size_t word = (row * in_group + lane) * ROW_WORDS;

	return pieces[word / SALSA_WORDS] + word % SALSA_WORDS;
}

/* What the lanes of a kernel do in one step: all that a group can, each lane something else than its neighbours. */
enum { PLAIN, ADDS, DROPS, COPIES, ADDS_AND_COPIES, ALL_OF_IT, WAYS };

/*
 * One step of `all` lanes.  `way` is what lane 0 does; the others do the same, or each of them the next one.  The
 * portable kernel, which the vectors of the RFC have checked, says what comes out when it is all done beforehand.
 */
static void
check_step(const struct kernels *kernels, size_t all, size_t r, unsigned way, int alike)
{
	const size_t words = 2 * r * SALSA_WORDS, in_group = kernels->for_lanes[all].in_group;
	struct group groups[MAX_GROUPS] = {{0}}, alone;
	uint32_t *x[MAX_LANES], *add[MAX_LANES], *copy[MAX_LANES], *input[MAX_LANES];
	uint32_t *expected = allocate(words * 4), *zero = allocate(words * 4);
	size_t lane, at, row, i;
	unsigned does;

	memset(zero, 0, words * 4);
	for (lane = 0; lane < all; lane++) {
		struct group *group = &groups[lane / in_group];
		size_t place = lane % in_group;

		does = alike ? way : (way + (unsigned)lane) % WAYS;
		group->r = r;
		group->x[place] = x[lane] = allocate(words * 4);
		group->y[place] = allocate(words * 4);
		input[lane] = allocate(words * 4);
		add[lane] = allocate(words * 4);
		copy[lane] = allocate(words * 4);
		for (i = 0; i < words; i++) {
			input[lane][i] = (uint32_t)((i + 7) * 2654435761u * (lane + 3));
			add[lane][i] = (uint32_t)((i + 5) * 2246822519u * (lane + 11));
		}
		group->add[place] = does == PLAIN || does == COPIES ? zero : add[lane];
		group->copy[place] = does == COPIES || does == ADDS_AND_COPIES || does == ALL_OF_IT ? copy[lane] : NULL;
		group->past_cache |= (unsigned)(does == COPIES) << place;
		memset(group->keep + place * ROW_WORDS, does == DROPS || does == ALL_OF_IT ? 0 : 0xff, 16);
		group->does |= (group->add[place] != zero ? GROUP_ADDS : 0) | (group->copy[place] ? GROUP_COPIES : 0) |
		               (does == DROPS || does == ALL_OF_IT ? GROUP_DROPS : 0);
	}
	for (lane = 0; lane < all; lane++)
		for (at = 0; at < words; at += SALSA_WORDS)
			for (row = 0; row < 4; row++)
				memcpy(row_of(groups[lane / in_group].x, in_group, lane % in_group, row) + at,
				       input[lane] + at + row * ROW_WORDS, 16);

	kernels->for_lanes[all].blockmix(groups);

	for (lane = 0; lane < all; lane++) {
		struct group *group = &groups[lane / in_group];
		size_t place = lane % in_group;

		memset(&alone, 0, sizeof(alone));
		alone.r = r;
		for (i = 0; i < words; i++)
			input[lane][i] = (input[lane][i] & group->keep[place * ROW_WORDS]) ^ group->add[place][i];
		alone.x[0] = input[lane];
		alone.y[0] = expected;
		kernels_find("portable")->for_lanes[1].blockmix(&alone);
		for (at = 0; at < words; at += SALSA_WORDS)
			for (row = 0; row < 4; row++)
				CHECK(memcmp(row_of(group->y, in_group, place, row) + at, expected + at + row * ROW_WORDS, 16) == 0);
		if (group->copy[place] != NULL)
			CHECK(memcmp(copy[lane], expected, words * 4) == 0);
		else
			CHECK(copy[lane][0] == 0xa5a5a5a5);
	}
	for (lane = 0; lane < all; lane++) {
		free(x[lane]);
		free(groups[lane / in_group].y[lane % in_group]);
		free(input[lane]);
		free(add[lane]);
		free(copy[lane]);
	}
	free(expected);
	free(zero);
}

static void
check_blockmix(const struct kernels *kernels)
{
	uint8_t input[128], expected[128], result[128];
	uint32_t *x = allocate(128), *y = allocate(128);
	struct group group = {.r = 1, .x = {x}, .y = {y}};
	size_t all, r;
	unsigned way;

	from_hex(input, block_input, 128);
	from_hex(expected, blockmix_output, 128);
	to_diagonals(x, input, 2);
	kernels->for_lanes[1].blockmix(&group);
	from_diagonals(result, y, 2);
	CHECK(memcmp(result, expected, 128) == 0);
	free(x);
	free(y);
	for (all = 1; all <= kernels->lanes; all *= 2)
		for (r = 1; r <= 9; r += r < 3 ? 1 : 5)
			for (way = 0; way < WAYS; way++) {
				check_step(kernels, all, r, way, 0);
				check_step(kernels, all, r, way, 1);
			}
}

static void
check_romix(const struct kernels *kernels, unsigned stride)
{
	uint8_t blocks[128], expected[128];
	struct romix romix, *lane = &romix;
	void *memory = allocate(romix_memory(4, 1, stride));

	from_hex(blocks, block_input, 128);
	from_hex(expected, romix_16_output, 128);
	romix_begin(&romix, blocks, 1, 1, 4, stride, memory);
	while (!romix_is_finished(&romix))
		romix_advance(kernels, &lane, 1, 5);
	CHECK(memcmp(blocks, expected, 128) == 0);
	romix_wipe(&romix);
	free(memory);
}

/* One derivation of the mixture below, `seed` of which says what it is. */
struct sample {
	unsigned log_n, stride;
	size_t r, p;
	uint8_t *blocks;
	void *memory;
	struct romix romix;
};

static void
begin_sample(struct sample *sample, unsigned seed, unsigned stride)
{
	size_t i, size;

	sample->log_n = 1 + seed % 7;
	sample->r = (const size_t[]){8, 8, 3, 8, 1, 8}[seed % 6];
	sample->p = 1 + seed % 2;
	sample->stride = stride;
	size = sample->p * sample->r * 128;
	sample->blocks = malloc(size);
	CHECK(sample->blocks != NULL);
	for (i = 0; i < size; i++)
		sample->blocks[i] = (uint8_t)(i * 151 + seed * 89 + i / 251);
	size = romix_memory(sample->log_n, sample->r, stride);
	sample->memory = allocate(size);
	memset(sample->memory, 0, size);
	romix_begin(&sample->romix, sample->blocks, sample->r, sample->p, sample->log_n, stride, sample->memory);
}

static void
end_sample(struct sample *sample)
{
	size_t all = romix_memory(sample->log_n, sample->r, sample->stride);
	size_t stored = (((size_t)1 << sample->log_n) - 1) / sample->stride + 1;
	size_t of_v = stored * sample->r * 128;

	romix_wipe(&sample->romix);
	CHECK(is_zero((const uint8_t *)sample->memory + of_v, all - of_v));
	free(sample->memory);
	free(sample->blocks);
}

/* Between calls, no lane's memory holds what a group had there: its lanes may be gone before. */
static void
check_nothing_of_others(const struct sample *sample)
{
	size_t size = sample->r * 128;

	CHECK(sample->romix.x == sample->romix.shared[0][0]);
	CHECK(is_zero((const uint8_t *)sample->romix.shared[0][1], size));
	CHECK(is_zero((const uint8_t *)sample->romix.shared[1][0], 2 * size));
}

/*
 * Lanes of different N, r, p and of so many strides, each finished one followed by another, as the portable one has
 * it.  Where all strides are 1, many steps of all lanes are alike.
 */
static void
check_mixture(const struct kernels *kernels, unsigned strides)
{
	enum { SAMPLES = 60 };
	struct sample samples[MAX_LANES], alone;
	struct romix *lanes[MAX_LANES], *first, *lone = &alone.romix;
	unsigned seeds[MAX_LANES], next = 0;
	size_t turn = 0;
	size_t i;

	for (i = 0; i < kernels->lanes; i++) {
		seeds[i] = next++;
		begin_sample(&samples[i], seeds[i], 1 + seeds[i] % strides);
		lanes[i] = &samples[i].romix;
	}
	while (next < SAMPLES) {
		/* Any number of lanes, of which another one is the first each time. */
		romix_advance(kernels, lanes, 1 + turn++ % kernels->lanes, 7);
		first = lanes[0];
		memmove(lanes, lanes + 1, (kernels->lanes - 1) * sizeof(lanes[0]));
		lanes[kernels->lanes - 1] = first;
		for (i = 0; i < kernels->lanes; i++)
			check_nothing_of_others(&samples[i]);
		for (i = 0; i < kernels->lanes; i++) {
			if (!romix_is_finished(&samples[i].romix))
				continue;
			begin_sample(&alone, seeds[i], 1);
			while (!romix_is_finished(&alone.romix))
				romix_advance(kernels_find("portable"), &lone, 1, 1000);
			CHECK(memcmp(samples[i].blocks, alone.blocks, alone.p * alone.r * 128) == 0);
			end_sample(&alone);
			end_sample(&samples[i]);
			seeds[i] = next++;
			begin_sample(&samples[i], seeds[i], 1 + seeds[i] % strides);
		}
	}
	for (i = 0; i < kernels->lanes; i++)
		end_sample(&samples[i]);
}

static int unmapped;

int __real_munmap(void *memory, size_t size);
int __wrap_munmap(void *memory, size_t size);

/* In the place of munmap(): all that an arena gives back has been wiped. */
int
__wrap_munmap(void *memory, size_t size)
{
	CHECK(is_zero(memory, size));
	unmapped++;
	return __real_munmap(memory, size);
}

static void
check_arena(void)
{
	struct arena arena;
	int status;
	pid_t child;

	CHECK(arena_size(0) == 0 && arena_size(1) == ARENA_UNIT && arena_size(SIZE_MAX) == 0);
	CHECK(arena_create(&arena, SIZE_MAX / 8) == -1 && arena.memory == NULL);
	CHECK(arena_create(&arena, ARENA_UNIT + 1) == 0 && arena.size == 2 * ARENA_UNIT);
	CHECK((uintptr_t)arena.memory % ARENA_UNIT == 0);
	arena.used = ARENA_UNIT + 1;
	memset(arena.memory, 0x5a, arena.used);

	child = fork();
	CHECK(child != -1);
	if (child == 0)
		_exit(is_zero(arena.memory, arena.size) ? 0 : 1);
	CHECK(waitpid(child, &status, 0) == child && status == 0);

	arena_release(&arena);
	CHECK(unmapped == 1 && arena.memory == NULL);
	arena_release(&arena);
	CHECK(unmapped == 1);
}

int
main(void)
{
	const struct kernels *kernels;
	unsigned stride;
	size_t i;

	CHECK(romix_memory(0, 8, 1) == 0 && romix_memory(33, 8, 1) == 0 && romix_memory(16, 1, 1) == 0);
	CHECK(romix_memory(10, 0, 1) == 0 && romix_memory(10, 8, 0) == 0 && romix_memory(10, 8, 17) == 0);
	CHECK(romix_memory(10, 8, 1) > 1 << 20);
	/* Blocks 0, 3, 6 and 9 of the 1024, up to 1023, are 342. */
	CHECK(romix_memory(10, 8, 1) - romix_memory(10, 8, 3) == (1024 - 342) << 10);
	CHECK(kernels_find("MMX") == NULL && kernels_find(NULL) != NULL);
	for (i = 0; i < SETS; i++) {
		kernels = kernels_find(set_names[i]);
		if (kernels == NULL)
			continue;
		check_blockmix(kernels);
		for (stride = 1; stride <= ROMIX_MAX_STRIDE; stride++)
			check_romix(kernels, stride);
		check_mixture(kernels, 1);
		check_mixture(kernels, ROMIX_MAX_STRIDE);
		printf("%s\n", kernels->name);
	}
	check_arena();
	return 0;
}
