"""Volumes that wait to be fetched: where the pipeline's thread meets the daemon's calls.

Strategy: one volume is on offer at a time. The call that names it takes it, once; others are refused.
"""

import socket
import threading
from concurrent.futures import Future

from qubes_restore_svc.wire import service


class Fetches:
    """The offer, shared between the pipeline's thread and the event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key = ""
        self._argument = ""
        self._taker: Future[socket.socket | None] | None = None
        self._withdrawn: set[str] = set()
        self._closed = False

    def offer(self, key: str, volume: str) -> "Future[socket.socket | None]":
        """Put a volume on offer.

        The future brings the connection of the call that takes it, or None if it is withdrawn.
        """
        taker: Future[socket.socket | None] = Future()
        with self._lock:
            if self._closed or key in self._withdrawn:
                taker.set_result(None)
            else:
                self._key, self._argument = key, service.volume_argument(key, volume)
                self._taker = taker
        return taker

    def take(self, argument: str, connection: socket.socket) -> bool:
        """Hand `connection` to the offer that `argument` names; False if there is no such offer."""
        with self._lock:
            if self._taker is None or argument != self._argument:
                return False
            self._taker.set_result(connection)
            self._taker = None
            return True

    def withdraw(self, key: str | None = None) -> None:
        """Take back what is on offer, now and later: of the qube `key`, or all if it is None."""
        with self._lock:
            if key is None:
                self._closed = True
            else:
                self._withdrawn.add(key)
            if self._taker is not None and key in (None, self._key):
                self._taker.set_result(None)
                self._taker = None
