"""The ledger: where the wall time of a load went.

Every moment of a load is booked to exactly one phase, by what the load was waiting for then, so the phases sum to the
wall time by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from weightstream.scheduler.timeline import Recorder

__all__ = ["Ledger", "Section"]

#: What the load's own thread is at: before the first read, waiting until everything has been read (`disk`; with
#: `preload` alone), between first read and last copy, placing what is left, or none of these.
Section = Literal["preflight", "disk", "pipeline", "bind", "other"]

#: So many chunks for each read in progress may wait for copies because reads end in bursts: twice as many, a choice.
_FEW = 2


class Ledger:
    """Counts who is busy and books the time between two changes. Guarded by its user's lock.

    In the pipeline the rule is: where filled chunks wait for the device stage, and readers for a slot that these have, or
    more of them wait than can be about to come, the copies are what holds the load up; where readers have all that they
    need, the disk is, although a chunk or two wait, as they do where several come at once; where nothing is being read, it
    is the copies, and then the binding, that are left. Of the chunks whose copies have been submitted only the first is
    being copied: the others wait behind it. Readers that copy what they have read (`landing`) do so side by side: nothing
    waits behind them, and they read nothing meanwhile, so it is what most readers are at that counts. A load that verifies what it reads waits for that where chunks that were read wait while others are hashed. Where tensors
    are handed to a consumer, and nobody is at work, the load waits for the consumer.

    Args:
        now: the clock, in seconds.
        recorder: told of every moment too, if there is one.

    Attributes:
        copies: whether what is read is copied; else it is only let go again, as a part of reading.
        starved: whether a reader has nothing to do because no slot is free. To be changed after `change`.
    """

    def __init__(self, now: Callable[[], float], recorder: Recorder | None = None) -> None:
        self.recorder = recorder
        self.copies = True
        self.starved = False
        self.reading = 0
        self.landing = 0
        self.unhashed = 0
        self.hashing = 0
        self.filled = 0
        self.copying = 0
        self.binding = 0
        self.read_busy_s = 0.0
        self.copy_busy_s = 0.0
        self.both_busy_s = 0.0
        self.phases = {"preflight": 0.0, "disk": 0.0, "copy": 0.0, "bind": 0.0, "other": 0.0}
        #: Those that are over: name, begin and end, in seconds since the start.
        self.sections: list[tuple[str, float, float]] = []
        self._idle = "other"
        self._section: Section = "preflight"
        self._entered_s = 0.0
        self._now = now
        self._start = self._last = now()
        if recorder is not None:
            recorder.start(now, self._start)

    @property
    def wall_s(self) -> float:
        """Seconds from the start to the last booking."""
        return self._last - self._start

    @property
    def overlap(self) -> float:
        """Time in which a read and a copy were both in progress, as a share of the less busy stage's time.

        0.0 where one of the two had nothing to do (reads that go straight to where the tensors stay need no copy).
        """
        less = min(self.read_busy_s, self.copy_busy_s)
        return self.both_busy_s / less if less > 0 else 0.0

    def enter(self, section: Section) -> None:
        """Book the time until now, and go on in another section."""
        self.change()
        self.sections.append((self._section, self._entered_s, self.wall_s))
        self._section, self._entered_s = section, self.wall_s

    def verifies(self) -> None:
        """Say that the load will also wait for hashing, which only then is a phase."""
        self.phases["verify"] = 0.0

    def delivers(self) -> None:
        """Say that somebody takes the tensors one by one: reads go on when enough of them have been taken."""
        self._idle = "consumer"
        self.phases["consumer"] = 0.0

    def change(
        self,
        *,
        reading: int = 0,
        landing: int = 0,
        unhashed: int = 0,
        hashing: int = 0,
        filled: int = 0,
        copying: int = 0,
        binding: int = 0,
    ) -> None:
        """Book the time until now, then add to the counts of chunks in each state."""
        now = self._now()
        last, self._last = self._last, now
        spent, phase = now - last, self._phase()
        self.phases[phase] += spent
        if self.recorder is not None:
            self.recorder.phase(phase, last, now)
        if self.reading:
            self.read_busy_s += spent
        if self.copying or self.landing:
            self.copy_busy_s += spent
            if self.reading:
                self.both_busy_s += spent
        self.reading += reading
        self.landing += landing
        self.unhashed += unhashed
        self.hashing += hashing
        self.filled += filled
        self.copying += copying
        self.binding += binding

    def _phase(self) -> str:
        if self._section not in ("disk", "pipeline"):
            return self._section
        waiting = self._section == "pipeline" and (self.filled or self.copying > 1) and self._copies_are_behind
        if not waiting and self.hashing and (self.unhashed or not (self.reading or self.landing)):
            return "verify"
        if waiting:
            return "bind" if self.binding and not self.copying else "copy"
        if self.landing > self.reading or (self.copying and not self.reading):
            return "copy"
        if self.reading or not self.copies or self._section == "disk":
            return "disk"
        return "bind" if self.binding else self._idle

    @property
    def _copies_are_behind(self) -> bool:
        """Whether readers could not help: they wait for a slot, or have read twice as much as they are reading now."""
        return self.starved or self.filled + self.copying > _FEW * self.reading
