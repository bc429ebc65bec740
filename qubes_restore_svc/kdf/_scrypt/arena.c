#define _DEFAULT_SOURCE
#include "arena.h"

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

/* Larger than any address space of today; keeps the sums below from wrapping. */
#define MAX_SIZE (SIZE_MAX / 4)

size_t
arena_size(size_t size)
{
	if (size == 0 || size > MAX_SIZE)
		return 0;
	return (size + ARENA_UNIT - 1) / ARENA_UNIT * ARENA_UNIT;
}

int
arena_create(struct arena *arena, size_t size)
{
	uintptr_t start;

	memset(arena, 0, sizeof(*arena));
	arena->size = arena_size(size);
	if (arena->size == 0) {
		errno = ENOMEM;
		return -1;
	}

	/* A unit more, so that an aligned start lies in it. */
	arena->mapping_size = arena->size + ARENA_UNIT;
	arena->mapping = mmap(NULL, arena->mapping_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (arena->mapping == MAP_FAILED) {
		memset(arena, 0, sizeof(*arena));
		return -1;
	}
	start = ((uintptr_t)arena->mapping + ARENA_UNIT - 1) / ARENA_UNIT * ARENA_UNIT;
	arena->memory = (void *)start;

	/* Wishes: a kernel that does not know one of them still gives memory. */
#ifdef MADV_HUGEPAGE
	(void)madvise(arena->memory, arena->size, MADV_HUGEPAGE);
#endif
#ifdef MADV_DONTDUMP
	(void)madvise(arena->mapping, arena->mapping_size, MADV_DONTDUMP);
#endif
#ifdef MADV_WIPEONFORK
	(void)madvise(arena->mapping, arena->mapping_size, MADV_WIPEONFORK);
#endif
	return 0;
}

void
arena_release(struct arena *arena)
{
	if (arena->memory == NULL)
		return;
	explicit_bzero(arena->memory, arena->used);
	(void)munmap(arena->mapping, arena->mapping_size);
	memset(arena, 0, sizeof(*arena));
}
