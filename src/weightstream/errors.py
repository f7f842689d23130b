"""The errors that weightstream raises. This module imports nothing of the package, so every stage may use it.

WeightstreamError
├── CheckpointError            what is on disk is not a usable checkpoint
│   ├── MissingShardError      the index names a file that is not there
│   ├── HeaderError            what a file says of itself breaks its format, or does not fit its length
│   ├── IndexMismatchError     the index and the shards' headers disagree
│   └── UnsupportedFormatError a format or dtype that cannot be loaded
├── PlacementError             the checkpoint does not fit the model, or the model does not fit the device
│   ├── ShapeMismatchError
│   ├── DtypeMismatchError
│   ├── MissingKeysError       the model has tensors that the checkpoint lacks
│   └── UnexpectedKeysError    the checkpoint has tensors that the model lacks
├── ReadError                  the operating system refused or broke off a read
├── IntegrityError             the bytes are not the ones that were promised
├── MemoryBudgetError          the load does not fit into host or device memory
├── LoadTimeoutError           the load, or one read of it, took longer than the settings allow
└── LoadCancelledError         somebody else cancelled the load that is being waited for

What is wrong with a checkpoint, or does not fit, can be caught as a ValueError too, and names and shapes that do not fit
as a RuntimeError: that is what accelerate's functions and torch's `load_state_dict` raise for it.

Configuration mistakes are pydantic's `ValidationError`. Calls that make no sense (a closed `Loader`, an unknown
module name) are `RuntimeError` and `ValueError`.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "DtypeMismatchError",
    "HeaderError",
    "IndexMismatchError",
    "IntegrityError",
    "LoadCancelledError",
    "LoadTimeoutError",
    "MemoryBudgetError",
    "MissingKeysError",
    "MissingShardError",
    "PlacementError",
    "ReadError",
    "ShapeMismatchError",
    "UnexpectedKeysError",
    "UnsupportedFormatError",
    "WeightstreamError",
]


class WeightstreamError(Exception):
    """Base of every error of this package.

    The parts are attributes, for programs; `str()` puts them into one sentence, for people. Names come from files that
    nobody vouches for, so the sentence has each part shortened, and without characters that a terminal or a log obeys.

    Args:
        what: what went wrong, without the parts below.
        file: the file concerned, as a path.
        tensor: the tensor concerned, by its name in the checkpoint or in the model.
        expected: what should have been there, with its unit.
        actual: what was there, with its unit.
        hint: what the reader can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        file: object = None,
        tensor: str | None = None,
        expected: object = None,
        actual: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.file = None if file is None else str(file)
        self.tensor = tensor
        self.expected = expected
        self.actual = actual
        self.hint = hint
        #: The checkpoint's own name of `tensor`, where `device.rename` has made another one of it.
        self.stored_as: str | None = None
        #: Names of materialised parameters that a failed load had already written to (in-place placement only).
        self.partly_written: tuple[str, ...] = ()
        #: Every downgrade of the load that failed, as `LoadReport.fallbacks` has them; also the slots that it has lost.
        self.fallbacks: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = " in ".join(shown(part) for part in (self.tensor, self.file) if part)
        if self.stored_as:
            where += f", where it is {shown(self.stored_as)}"
        what = "\n".join(shown(line) for line in self.what.split("\n"))
        text = f"{where}: {what}" if where else what
        if self.expected is not None:
            text += f": expected {shown(self.expected)}"
        if self.actual is not None:
            text += f"{',' if self.expected is not None else ':'} found {shown(self.actual)}"
        if self.hint:
            text += f". {self.hint}"
        if self.partly_written:
            text += f" (the model is partly written: {some(self.partly_written)})"
        return text


def shown(part: object, *, most: int = 1000) -> str:
    """Write a part of a message so that it is short and does nothing but be read."""
    text = str(part)
    if len(text) > most:
        text = f"{text[: most // 2]} [...] {text[-most // 2 :]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def some(names: Iterable[object], *, total: int | None = None) -> str:
    """Write down the first five of many names, and how many more there are; `total`: how many in all, if not these."""
    listed = list(names)
    more = (len(listed) if total is None else total) - 5
    return ", ".join(map(shown, listed[:5])) + (f" and {more} more" if more > 0 else "")


class CheckpointError(WeightstreamError, ValueError):
    """Raised when what is on disk is not a usable checkpoint."""


class MissingShardError(CheckpointError):
    """Raised when the index names a shard that does not exist."""


class HeaderError(CheckpointError):
    """Raised when what a file says of itself breaks its format or does not match its length."""


class IndexMismatchError(CheckpointError):
    """Raised when the index and the headers of its shards name different tensors."""


class UnsupportedFormatError(CheckpointError):
    """Raised when a checkpoint's format, or the dtype of one of its tensors, cannot be loaded."""


class PlacementError(WeightstreamError, ValueError):
    """Raised when a checkpoint cannot be placed into a model on the device asked for."""


class ShapeMismatchError(PlacementError, RuntimeError):
    """Raised when a tensor has another shape in the checkpoint than in the model."""


class DtypeMismatchError(PlacementError):
    """Raised when a tensor's dtype differs from the model's and no cast is allowed between the two."""


class MissingKeysError(PlacementError, RuntimeError):
    """Raised, with `device.strict`, when the model has persistent tensors that the checkpoint lacks."""


class UnexpectedKeysError(PlacementError, RuntimeError):
    """Raised, with `device.strict`, when the checkpoint has tensors that the model lacks."""


class ReadError(WeightstreamError):
    """Raised when a read fails for good: the operating system's error, or an end of file that came too early."""


class IntegrityError(WeightstreamError):
    """Raised when bytes are not what was promised: another digest, or none to compare, or a file that changed meanwhile."""


class MemoryBudgetError(WeightstreamError):
    """Raised when a load would not fit into host memory, into its budget, or into device memory."""


class LoadTimeoutError(WeightstreamError):
    """Raised when a load takes longer than `scheduler.timeout_s`, or one read or file longer than `prefetch.stall_s`."""


class LoadCancelledError(WeightstreamError):
    """Raised to those who wait for a load that somebody else cancelled."""
