"""The memory that native derivations run in, kept between them.

Strategy: a derivation takes hundreds of MiB and mapping them fresh costs a page fault for each page, so an
arena that comes back is kept and handed out again. The pool has no limit of its own: the owner of the budget
sees what is held and says how much of it may stay.
"""

from threading import Lock

from qubes_restore_svc.kdf._romix import Arena

#: How many times as large as it has to be an arena may be. What is larger is memory that another could have,
#: who would take a smaller stride with it.
_LOOSEST_FIT = 1.2


class ArenaPool:
    """Arenas, those in use and those that wait for their next use. For any number of threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._idle: list[Arena] = []
        self._in_use = 0
        self._being_released = 0

    @property
    def held(self) -> int:
        """Bytes that all arenas take together, used or idle or on their way out."""
        with self._lock:
            return self._held()

    @property
    def idle(self) -> int:
        """Bytes of `held` that no derivation uses."""
        with self._lock:
            return sum(arena.size for arena in self._idle)

    @property
    def largest_idle(self) -> int:
        """Bytes of the largest arena that no derivation uses."""
        with self._lock:
            return max((arena.size for arena in self._idle), default=0)

    def take(self, size: int, limit: int | None = None) -> Arena | None:
        """The smallest idle arena of `size` bytes or little more, or a new one of that size; MemoryError.

        All arenas together may take `limit` bytes: idle ones are released to make room, and None is
        returned if it is not enough. To be handed to `put_back` after use.
        """
        with self._lock:
            arena = self._fitting_idle(size, limit)
        if arena is not None:
            return arena
        if limit is not None:
            self.trim(limit - size)
        with self._lock:
            if limit is not None and self._held() + size > limit:
                return None
            arena = Arena(size)
            self._in_use += arena.size
            return arena

    def _fitting_idle(self, size: int, limit: int | None) -> Arena | None:
        fitting = [
            arena
            for arena in self._idle
            if size <= arena.size <= _LOOSEST_FIT * size
            and (limit is None or self._in_use + arena.size <= limit)
        ]
        if not fitting or (limit is not None and self._held() > limit):
            return None
        arena = min(fitting, key=lambda arena: arena.size)
        self._idle.remove(arena)
        self._in_use += arena.size
        return arena

    def _held(self) -> int:
        return self._in_use + self._being_released + sum(arena.size for arena in self._idle)

    def put_back(self, arena: Arena) -> None:
        """Keep an arena that `take` gave, for the next who needs one."""
        with self._lock:
            self._in_use -= arena.size
            self._idle.append(arena)

    def trim(self, keep: int = 0) -> int:
        """Wipe and release idle arenas, the largest first, until at most `keep` bytes are held.

        Arenas in use stay, so more than `keep` may remain. Returns the bytes that were released; takes
        about a second for 8 GiB, and lets other threads run meanwhile.
        """
        released = 0
        while True:
            with self._lock:
                held = self._in_use + sum(arena.size for arena in self._idle)
                if held <= keep or not self._idle:
                    return released
                arena = max(self._idle, key=lambda arena: arena.size)
                self._idle.remove(arena)
                size = arena.size
                self._being_released += size
            arena.release()
            with self._lock:
                self._being_released -= size
            released += size
