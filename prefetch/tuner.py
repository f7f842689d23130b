"""The tuner: how the next bytes are read, decided by what reading has brought so far.

Three things can be set: past the page cache or through it, how many reads go on at a time, and how many bytes one read
fetches. Which setting is best depends on the storage, and no rule that looks at its name is right everywhere. So the
tuner tries: it changes one thing, lets some reads go by that ran beside those of the old setting, measures a window of
reads, and keeps the change if it paid. Reads are small in the beginning, so that trying costs little.

Pure arithmetic: no thread, no clock, no file. Guarded by its user's lock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from dataclasses import dataclass

__all__ = ["COPYING_WORKERS", "FIRST_READ_BYTES", "FIRST_WORKERS", "MAX_WORKERS", "Setting", "Tuner"]

#: The first reads of a load that may adapt, and how many of them go on at a time. On a disk of 2 GB/s, two reads of
#: 2 MiB reached half its rate, these nearly all of it; larger ones make trying slow where storage is.
FIRST_READ_BYTES = 4 * 2**20
FIRST_WORKERS = 8
#: So many more where readers copy what they have read past the page cache, which took them a tenth of their time: of 8 only
#: 7.2 were reading, on two cores. Seconds for 2.56 GB: 0.80 with 8 of them, 0.77 with 10, 0.76 with 12, in turn, three times.
COPYING_WORKERS = 2
_LEAST_READ_BYTES = 2**18
#: Never more workers than this. On the slowest storage that was tried (20 ms a request) 32 were enough; not measured
#: beyond.
MAX_WORKERS = 32

#: A window is at least so long and at least so many reads: shorter ones say more about noise than about the storage.
_WINDOW_S = 0.05
_WINDOW_READS = 2
#: No trial is begun that could not be paid back: when everything is read in less than this, it stays as it is. On a disk of
#: 3.4 GB/s past the page cache and 1.1 GB/s through it, to try everything took 0.05 to 0.1 s more than to read at once.
_WORTHWHILE_S = 1.0
#: What a change must bring. More workers cost cores, larger reads save some.
_GAIN_IO = 1.10
#: The same for buffered reads instead of direct ones, where workers mostly wait: at equal rates, read-ahead fills the time
#: between the reads of a worker, which no rate of reads shows. With 8 ms a request, 8 workers took 3.28 s for 2 GiB through
#: the page cache and 3.64 s past it, at 0.70 GB/s both (docs/performance.md, storage of five kinds).
_GAIN_LATE_BUFFERED = 1 / 1.10
_GAIN_MORE_WORKERS = 1.10
_GAIN_LEAP = 1.7  # from that on, what is missing is far more of them
_GAIN_FEWER_WORKERS = 1.05
_EACH_COUNTS = 0.6  # half of them bring less than that: far more are tried at once
_GAIN_SMALLER_READS = 1.10
_GAIN_LARGER_READS = 0.97
_GAIN_LARGER = 1.05  # from that on, smaller ones are not tried any more
#: Bytes per second of each worker: below, the number of workers is tried first.
_FAST = 100e6
#: After trying: when the rates of two long windows fall below this share of the best one seen, trying begins again.
_DROP = 0.6
_LOW_WINDOWS = 2


@dataclass(frozen=True, slots=True)
class Setting:
    """How to read: past the page cache or through it, so many reads at a time, so many bytes each."""

    direct: bool
    workers: int
    read_bytes: int

    def __str__(self) -> str:
        io = "direct" if self.direct else "buffered"
        return f"{io}, {self.workers} workers, reads of {_mib(self.read_bytes)}"


#: Yields the setting to try next, is sent its rate in bytes per second, and returns the one to stay with.
_Trial = Generator[Setting, float, Setting]


class Tuner:
    """See the module.

    Args:
        first: what to begin with.
        total_bytes: how much will be read in this way.
        is_known: `first` has proved itself here: nothing is tried until the rate falls.
        can_direct: whether direct reads may be chosen instead of buffered ones; if not, `first.direct` stays.
        max_workers: the most reads at a time; None: their number stays.
        max_read_bytes: the most that one read may fetch; None: its size stays.

    Attributes:
        setting: how to read now.
        decisions: what was decided and on which figures, one sentence each.
    """

    def __init__(
        self,
        first: Setting,
        *,
        total_bytes: int,
        is_known: bool = False,
        can_direct: bool,
        max_workers: int | None,
        max_read_bytes: int | None,
    ) -> None:
        self.setting = first
        self.decisions: list[str] = []
        self._can_direct = can_direct
        self._max_workers = max_workers
        self._max_read_bytes = max_read_bytes
        self._left_bytes = total_bytes
        self._number = 0
        self._num_begun = 0
        self._measured_s = 0.0
        self._measured_bytes = 0
        self._num_measured = 0
        self._best_rate = 0.0
        self._num_low = 0
        self._trial: _Trial | None = None
        self._tries = can_direct or max_workers is not None or max_read_bytes is not None
        if self._tries and not is_known:
            self._trial = self._try_all(first)
            next(self._trial)

    @property
    def has_settled(self) -> bool:
        """Whether something was tried, and what came out of it holds."""
        return self._tries and self._trial is None

    def begin(self) -> int | None:
        """Note that a read begins that follows the setting; return the setting's number.

        None: it runs beside reads of an older setting, and is not measured.
        """
        self._num_begun += 1
        return self._number if self._num_begun > self.setting.workers else None

    def end(self, number: int | None, num_bytes: int, seconds: float, *, busy: bool) -> bool:
        """Note that such a read has ended.

        Args:
            number: what `begin` returned.
            num_bytes: how many bytes it fetched.
            seconds: how long it took.
            busy: whether all workers were reading; if not, something else than reading is the bottleneck.

        Returns:
            Whether the setting has changed.
        """
        self._left_bytes -= num_bytes
        if number != self._number or not busy or seconds <= 0:
            return False
        self._measured_s += seconds
        self._measured_bytes += num_bytes
        self._num_measured += 1
        workers = self.setting.workers
        window_s = _WINDOW_S if self._trial is not None else 10 * _WINDOW_S
        if self._num_measured < max(_WINDOW_READS, workers) or self._measured_s < window_s * workers:
            return False
        rate = workers * self._measured_bytes / self._measured_s
        self._measured_s, self._measured_bytes, self._num_measured = 0.0, 0, 0
        return self._advance(rate)

    def refuse_direct(self) -> None:
        """Never read directly any more: the file system says no."""
        self._can_direct = False
        if self.setting.direct:
            self._trial = None
            self._change(dataclasses.replace(self.setting, direct=False))

    def _advance(self, rate: float) -> bool:
        """Go on with a trial, or see whether it is time for a new one."""
        before = self.setting
        self._best_rate = max(self._best_rate, rate)
        if self._trial is None:
            self._num_low = self._num_low + 1 if rate < _DROP * self._best_rate else 0
            if self._num_low >= _LOW_WINDOWS and self._is_worthwhile(rate) and self._tries:
                self._best_rate, self._num_low = 0.0, 0
                self.decisions.append(f"trying again: the rate fell to {_rate(rate)}")
                self._trial = self._try_all(self.setting)
                next(self._trial)
            return False
        try:
            self._change(self._trial.send(rate))
        except StopIteration as stop:
            self._trial = None
            self._change(stop.value)
        return self.setting != before

    def _change(self, setting: Setting) -> None:
        if setting != self.setting:
            self.setting = setting
            self._number += 1
            self._num_begun = 0
            self._measured_s, self._measured_bytes, self._num_measured = 0.0, 0, 0

    def _is_worthwhile(self, rate: float) -> bool:
        return self._left_bytes > _WORTHWHILE_S * rate

    def _try_all(self, setting: Setting) -> _Trial:
        first = setting
        rate = yield setting
        is_slow = rate < _FAST * setting.workers
        if is_slow:  # with a wrong number of them, all else takes long to try
            setting, rate = yield from self._try_workers(setting, rate)
        waits = is_slow and setting.workers >= first.workers  # for storage that is late, and not crowded by its readers
        compared, compared_rate = setting, rate
        setting, rate = yield from self._try_io(setting, rate, gain_buffered=_GAIN_LATE_BUFFERED if waits else _GAIN_IO)
        if not is_slow or (setting != compared and rate >= _GAIN_IO * compared_rate):
            setting, rate = yield from self._try_workers(setting, rate)
        setting, _ = yield from self._try_sizes(setting, rate)
        return setting

    def _try_io(
        self, setting: Setting, rate: float, *, gain_buffered: float
    ) -> Generator[Setting, float, tuple[Setting, float]]:
        if not self._can_direct or not self._is_worthwhile(rate):
            return setting, rate
        other = dataclasses.replace(setting, direct=not setting.direct)
        other_rate = yield other
        direct, buffered = (other_rate, rate) if other.direct else (rate, other_rate)
        is_better = other_rate >= (_GAIN_IO if other.direct else gain_buffered) * rate
        self.decisions.append(
            f"io: buffered {_rate(buffered)}, direct {_rate(direct)}, with {setting.workers} workers and reads of"
            f" {_mib(setting.read_bytes)}: {'direct' if is_better == other.direct else 'buffered'}"
        )
        return (other, other_rate) if is_better else (setting, rate)

    def _try_workers(self, setting: Setting, rate: float) -> Generator[Setting, float, tuple[Setting, float]]:
        """Try fewer workers, which is cheap; more of them only if that showed that each one counts."""
        if self._max_workers is None:
            return setting, rate
        seen = [f"{setting.workers} workers {_rate(rate)}"]
        first, factor = setting, 2
        while setting.workers > 1 and self._is_worthwhile(rate):
            other = dataclasses.replace(setting, workers=setting.workers // 2)
            other_rate = yield other
            seen.append(f"{other.workers} {_rate(other_rate)}")
            if other_rate < _GAIN_FEWER_WORKERS * rate:
                factor = 4 if other_rate < _EACH_COUNTS * rate else 2 if other_rate * _GAIN_MORE_WORKERS < rate else 1
                break
            setting, rate = other, other_rate
        if setting != first:
            factor = 1
        while factor > 1 and self._is_worthwhile(rate):
            workers = min(self._max_workers, setting.workers * factor)
            if workers == setting.workers:
                break
            other = dataclasses.replace(setting, workers=workers)
            other_rate = yield other
            seen.append(f"{workers} {_rate(other_rate)}")
            if other_rate < _GAIN_MORE_WORKERS * rate:
                factor //= 2  # a leap that was too far is followed by a step
            else:
                factor = 4 if other_rate > _GAIN_LEAP * rate else 2
                setting, rate = other, other_rate
        if len(seen) > 1:
            self.decisions.append(f"workers: {', '.join(seen)}: {setting.workers}")
        return setting, rate

    def _try_sizes(self, setting: Setting, rate: float) -> Generator[Setting, float, tuple[Setting, float]]:
        if self._max_read_bytes is None:
            return setting, rate
        seen = [f"{_mib(setting.read_bytes)} {_rate(rate)}"]
        first, first_rate = setting.read_bytes, rate
        for factor, gain in ((4.0, _GAIN_LARGER_READS), (0.5, _GAIN_SMALLER_READS)):
            if factor < 1 and rate > _GAIN_LARGER * first_rate:  # larger ones were better, not as good
                break
            read_bytes = first
            while self._is_worthwhile(rate):
                following = min(self._max_read_bytes, max(_LEAST_READ_BYTES, int(read_bytes * factor)))
                if following == read_bytes:
                    break
                read_bytes = following
                other = dataclasses.replace(setting, read_bytes=read_bytes)
                other_rate = yield other
                seen.append(f"{_mib(read_bytes)} {_rate(other_rate)}")
                if other_rate < gain * rate:
                    break
                setting, rate = other, max(rate, other_rate)
        if len(seen) > 1:
            self.decisions.append(f"reads: {', '.join(seen)}: {_mib(setting.read_bytes)}")
        return setting, rate


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:g} MiB"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e8 else f"{bytes_per_s / 1e6:.3g} MB/s"
