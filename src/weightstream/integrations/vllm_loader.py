"""vLLM's model loader whose tensors come from weightstream. Imported by vLLM's processes alone: see `vllm`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from weightstream.config import LoaderConfig

__all__ = ["WeightstreamLoader"]

_default: Any = import_module("vllm.model_executor.model_loader.default_loader")


class WeightstreamLoader(_default.DefaultModelLoader):  # type: ignore[misc]  # vLLM is not there to be checked against
    """vLLM's own loader of safetensors files, with another iterator of weights.

    How models are looked up (folder, local cache, hub), secondary weights, prefixes, the check that every parameter was
    loaded, and the time that is logged are vLLM's.

    Args:
        load_config: its `model_loader_extra_config` has the keys of a `weightstream.LoaderConfig`, without `checkpoint`
            and `model`, which vLLM decides.

    Raises:
        ValueError: a key that has no place there, or a value that is not valid (pydantic's ValidationError).
    """

    counter_before_loading_weights: float

    def __init__(self, load_config: Any) -> None:  # noqa: ANN401 - vLLM's LoadConfig
        self._config = _configuration(load_config.model_loader_extra_config)
        own = dataclasses.replace(load_config, load_format="safetensors", model_loader_extra_config={})
        super().__init__(own)  # pyright: ignore[reportUnknownMemberType]  # likewise

    def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, torch.Tensor]]:  # noqa: ANN401
        folder, files, _, index_name = self._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        index = Path(folder) / index_name
        is_indexed = len(files) > 1 and source.allow_patterns_overrides is None and index.is_file()
        if self.counter_before_loading_weights == 0.0:
            self.counter_before_loading_weights = time.perf_counter()
        return self._tensors([index] if is_indexed else [Path(file) for file in sorted(files)], source.prefix)

    def _tensors(self, checkpoints: list[Path], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield named tensors on the device. Leaving early ends the load.

        A tensor's memory is not written to again, so a model may keep a reference; small ones share memory, so that
        keeping one keeps up to `prefetch.chunk` bytes.
        """
        api = import_module("weightstream.api")
        for checkpoint in checkpoints:
            with closing(api.iter_tensors(checkpoint, self._config)) as tensors:
                for name, tensor in tensors:
                    yield prefix + name, tensor


def _configuration(options: object) -> LoaderConfig:
    if not isinstance(options, dict):
        raise TypeError(f"model_loader_extra_config: expected a mapping, found {type(options).__qualname__}")
    taken = {"checkpoint", "model"} & options.keys()
    if taken:
        raise ValueError(f"model_loader_extra_config: {', '.join(sorted(taken))}: vLLM decides that")
    config: LoaderConfig = import_module("weightstream.config").LoaderConfig(**options)
    return config
