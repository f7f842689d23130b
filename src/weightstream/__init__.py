"""weightstream: fill a PyTorch model from a checkpoint as fast as disk and bus allow, awaited from an async server.

Importing this package imports neither torch nor anything that takes long: the names below are loaded when they are
first used. Code that starts loads on an event loop should use them once before the loop runs.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # typing's: the command must be able to answer Ctrl-C before that is imported
if TYPE_CHECKING:
    __version__: str
    from weightstream.api import Loader, iter_tensors, load, load_sync
    from weightstream.config import LoaderConfig
    from weightstream.errors import (
        CheckpointError,
        DtypeMismatchError,
        HeaderError,
        IndexMismatchError,
        IntegrityError,
        LoadCancelledError,
        LoadTimeoutError,
        MemoryBudgetError,
        MissingKeysError,
        MissingShardError,
        PlacementError,
        ReadError,
        ShapeMismatchError,
        UnexpectedKeysError,
        UnsupportedFormatError,
        WeightstreamError,
    )
    from weightstream.scheduler.handle import LoadHandle, TensorStream
    from weightstream.scheduler.report import LoadReport, Progress
    from weightstream.scheduler.timeline import Recorder, Timeline

__all__ = [
    "CheckpointError",
    "DtypeMismatchError",
    "HeaderError",
    "IndexMismatchError",
    "IntegrityError",
    "LoadCancelledError",
    "LoadHandle",
    "LoadReport",
    "LoadTimeoutError",
    "Loader",
    "LoaderConfig",
    "MemoryBudgetError",
    "MissingKeysError",
    "MissingShardError",
    "PlacementError",
    "Progress",
    "ReadError",
    "Recorder",
    "ShapeMismatchError",
    "TensorStream",
    "Timeline",
    "UnexpectedKeysError",
    "UnsupportedFormatError",
    "WeightstreamError",
    "__version__",
    "iter_tensors",
    "load",
    "load_sync",
]

_HOMES = {
    "LoadHandle": "weightstream.scheduler.handle",
    "LoadReport": "weightstream.scheduler.report",
    "Loader": "weightstream.api",
    "LoaderConfig": "weightstream.config",
    "Progress": "weightstream.scheduler.report",
    "Recorder": "weightstream.scheduler.timeline",
    "TensorStream": "weightstream.scheduler.handle",
    "Timeline": "weightstream.scheduler.timeline",
    "iter_tensors": "weightstream.api",
    "load": "weightstream.api",
    "load_sync": "weightstream.api",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return import_module("importlib.metadata").version("weightstream")  # takes as long as all the rest of --help
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES.get(name, "weightstream.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
