"""Volumes that wait to be fetched: where the pipeline's thread meets the daemon's calls.

Strategy: one volume is on offer at a time. The call that names it takes it, once; others are refused.
"""

import socket
from concurrent.futures import Future

from qubes_restore_svc.wire import service


class Fetches:
    """The offer, shared between the pipeline's thread and the event loop."""

    def __init__(self) -> None:
        self._argument = ""
        self._offer: Future[socket.socket] | None = None

    def offer(self, key: str, volume: str) -> "Future[socket.socket]":
        """Put a volume on offer, in place of the one before.

        The future brings the connection of the call that takes it. Whoever cancels it withdraws the offer.
        """
        offer: Future[socket.socket] = Future()
        self._argument, self._offer = service.volume_argument(key, volume), offer
        return offer

    def take(self, argument: str, connection: socket.socket) -> bool:
        """Hand `connection` to the offer that `argument` names; False if there is no such offer."""
        offer = self._offer
        if offer is None or offer.done() or argument != self._argument:
            return False
        if not offer.set_running_or_notify_cancel():
            return False
        offer.set_result(connection)
        return True
