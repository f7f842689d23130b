"""Pinning: segments of rings are page-locked, one after the other, while reading into the first of them already runs."""

from __future__ import annotations

import threading
from collections.abc import Callable

from weightstream.device.backend import Backend
from weightstream.prefetch.ring import Ring, Segment
from weightstream.scheduler.exits import ended_at_exit

__all__ = ["LIMITED", "Pinning"]

#: What a smaller ring must still have to be worth more than a larger one that is not page-locked: one slot to read into
#: while another is copied from.
_LEAST_SLOTS = 2

#: What is said of a ring that is smaller than it should be.
LIMITED = "page-locking host memory was refused from some size on: the ring is as small as what was locked"
_REFUSED = "page-locking host memory was refused: copies to the device are pageable and slower"


class Pinning:
    """See the module. Once page-locking has been refused, it is not asked for again."""

    def __init__(self) -> None:
        self._is_refused = False
        self._threads: list[threading.Thread] = []
        self._unpin: dict[Segment, Callable[[], None]] = {}

    def is_limit_reached(self, ring: Ring, backend: Backend) -> bool:
        """Whether a ring is as large as it can be and be page-locked, and large enough to be of use."""
        return backend.pinnable and self._is_refused and _is_enough(ring)

    def begin(
        self,
        ring: Ring,
        segments: list[Segment],
        backend: Backend,
        *,
        may_shrink: bool,
        on_fallback: Callable[[str], None],
    ) -> None:
        """Page-lock new segments for a device on a thread of their own, or settle them at once if it needs none.

        Args:
            ring: whose segments they are.
            segments: the new ones; each is `settled` in the end.
            backend: the device.
            may_shrink: whether the ring may do without those that cannot be locked, if there are enough others.
            on_fallback: told if page-locking is refused.
        """
        if backend.pinnable and self._is_refused:
            on_fallback(_REFUSED)
        if not backend.pinnable:
            for segment in segments:
                segment.settled.set()
            return
        if not segments:
            return

        def pin() -> None:
            with ended_at_exit(lambda _: None):  # it has so little left to do
                for segment in segments:
                    self._pin(ring, segment, backend, may_shrink=may_shrink, on_fallback=on_fallback)

        self._threads = [one for one in self._threads if one.is_alive()]
        thread = threading.Thread(target=pin, name="weightstream-pin", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads can be had, and loads wait for `settled`
            pin()
        else:
            self._threads.append(thread)

    def unpin(self, segment: Segment) -> None:
        """Unlock a segment, if it is locked. It must be settled, and still be mapped."""
        unpin = self._unpin.pop(segment, None)
        if unpin is not None:
            unpin()

    def join(self) -> None:
        """Wait until nothing is being page-locked any more."""
        for thread in self._threads:
            thread.join()

    def _pin(
        self,
        ring: Ring,
        segment: Segment,
        backend: Backend,
        *,
        may_shrink: bool,
        on_fallback: Callable[[str], None],
    ) -> None:
        try:
            unpin = backend.pin(segment.memory) if segment.wanted and not self._is_refused else None
        except Exception:  # noqa: BLE001 (the driver's ways of saying no; loads wait for `settled`)
            unpin = None
        try:
            if unpin is not None:
                self._unpin[segment] = unpin
                segment.pinned = True
            elif segment.wanted:
                self._is_refused = True
                if may_shrink and _is_enough(ring):
                    ring.retire(segment)
                    on_fallback(LIMITED)
                else:
                    on_fallback(_REFUSED)
        finally:  # whatever `on_fallback` does
            segment.settled.set()


def _is_enough(ring: Ring) -> bool:
    return ring.statistics().pinned_bytes >= _LEAST_SLOTS * ring.slot_bytes
