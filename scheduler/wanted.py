"""What a load wants of a checkpoint, by the names of the model; and where that is, for those who complain about it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from weightstream.device.config import DeviceConfig
from weightstream.device.names import NameRules
from weightstream.errors import WeightstreamError
from weightstream.prefetch.checkpoint import Checkpoint
from weightstream.prefetch.header import TensorSpec

__all__ = ["Wanted"]


class Wanted:
    """The tensors of a checkpoint that a load wants.

    Attributes:
        tensors: by their names in the model, in the order of shards and bytes.

    Raises:
        PlacementError: two get one name.
    """

    def __init__(self, checkpoint: Checkpoint, config: DeviceConfig) -> None:
        self._checkpoint = checkpoint
        self.tensors: Mapping[str, TensorSpec] = {}
        with self.locating():
            self.tensors = NameRules(config).apply(checkpoint.tensors)

    @contextmanager
    def locating(self) -> Generator[None, None, None]:
        """Let errors that name a tensor say in which file it is, and as what."""
        try:
            yield
        except WeightstreamError as error:
            spec = self.tensors.get(error.tensor or "")
            error.file = str(self._checkpoint.path if spec is None else self._checkpoint.shards[spec.shard].path)
            if spec is not None and spec.name != error.tensor:
                error.stored_as = spec.name
            raise
