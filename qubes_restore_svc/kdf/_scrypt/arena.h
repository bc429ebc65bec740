/* A large piece of private memory for derivations: in huge pages where granted, wiped when released. */
#ifndef ARENA_H
#define ARENA_H

#include <stddef.h>

struct arena {
	void *memory;      /* aligned to ARENA_UNIT; NULL when there is none */
	size_t size;       /* bytes, a multiple of ARENA_UNIT */
	size_t used;       /* bytes from the start that may hold secrets */
	void *mapping;     /* what the kernel gave, for giving it back */
	size_t mapping_size;
};

/* Bytes of a huge page; what is no multiple of it would be in small ones at the end. */
#define ARENA_UNIT ((size_t)2 << 20)

/*
 * arena_size(size):
 * Return how many bytes an arena for `size` bytes takes, a multiple of ARENA_UNIT; 0 if `size` is 0 or
 * too large for an address space.
 */
size_t arena_size(size_t size);

/*
 * arena_create(arena, size):
 * Map an arena of at least `size` bytes.  No memory is taken before it is written to.  It is left out of
 * core dumps, and a forked child sees zeros.  Return 0; or -1, with errno set and nothing mapped.
 */
int arena_create(struct arena *arena, size_t size);

/*
 * arena_release(arena):
 * Overwrite what has been used and unmap it.  Does nothing when there is none.
 */
void arena_release(struct arena *arena);

#endif
