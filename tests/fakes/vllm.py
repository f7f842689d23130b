"""A stand-in for vLLM where it is not installed: what our plugin and our page touch of it, and no model.

It takes only what the page uses; `make test-vllm` runs the same page with the real one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

__all__ = ["LoadConfig", "install", "loader_of"]

_HOME = "vllm.model_executor.model_loader"


@dataclass(frozen=True)
class LoadConfig:
    """vLLM's, with the fields that a loader of ours reads."""

    load_format: str
    model_loader_extra_config: object = field(default_factory=dict[str, object])


@dataclass(frozen=True)
class Source:
    """Where weights come from, as vLLM's own loader describes it."""

    model_or_path: str
    prefix: str = ""
    subfolder: str | None = None
    revision: str | None = None
    fall_back_to_pt: bool = True
    allow_patterns_overrides: list[str] | None = None


class DefaultModelLoader:
    """The base of our loader. Finds the files of a folder."""

    counter_before_loading_weights = 0.0

    def __init__(self, load_config: LoadConfig) -> None:
        assert (load_config.load_format, load_config.model_loader_extra_config) == ("safetensors", {})

    def _prepare_weights(self, model: str, *_: object) -> tuple[str, list[str], bool, str]:
        files = [str(file) for file in Path(model).glob("*.safetensors")]
        return model, files, True, "model.safetensors.index.json"


class SamplingParams:
    """How to generate."""

    def __init__(self, *, temperature: float, max_tokens: int, detokenize: bool) -> None:
        self.max_tokens = max_tokens


class LLM:
    """An engine that loads weights as vLLM's does, keeps them as `weights`, and generates nothing but zeros."""

    made: list[LLM] = []  # noqa: RUF012 - a test looks here for what a program made

    def __init__(
        self,
        model: str,
        *,
        load_format: str,
        model_loader_extra_config: dict[str, object],
        skip_tokenizer_init: bool,
        enforce_eager: bool,
        max_model_len: int,
    ) -> None:
        loader = loader_of(LoadConfig(load_format, model_loader_extra_config))
        weights: Iterator[tuple[str, torch.Tensor]] = loader._get_weights_iterator(Source(model))
        self.weights = dict(weights)
        self.made.append(self)

    def generate(self, prompts: list[dict[str, list[int]]], parameters: SamplingParams) -> list[Any]:
        outputs = [SimpleNamespace(token_ids=[0] * parameters.max_tokens)]
        return [SimpleNamespace(outputs=outputs) for _ in prompts]


def loader_of(config: LoadConfig) -> Any:
    """The loader that is registered under a name, as vLLM looks it up."""
    return sys.modules[_HOME].__dict__["_LOAD_FORMAT_TO_MODEL_LOADER"][config.load_format](config)


def install(monkeypatch: pytest.MonkeyPatch, plugin: EntryPoint) -> None:
    """Be vLLM for one test, and call a plugin as vLLM does when it starts."""
    loaders: dict[str, type] = {}

    def register_model_loader(name: str) -> Callable[[type], type]:
        def register(loader: type) -> type:
            assert issubclass(loader, DefaultModelLoader)
            return loaders.setdefault(name, loader)

        return register

    _module(monkeypatch, "vllm", LLM=LLM, SamplingParams=SamplingParams)
    _module(monkeypatch, "vllm.model_executor")
    _module(monkeypatch, _HOME, _LOAD_FORMAT_TO_MODEL_LOADER=loaders, register_model_loader=register_model_loader)
    _module(monkeypatch, f"{_HOME}.default_loader", DefaultModelLoader=DefaultModelLoader)
    monkeypatch.setattr(LLM, "made", [])
    ours = "weightstream.integrations.vllm_loader"  # has to be made anew, on this base
    monkeypatch.setitem(sys.modules, ours, ModuleType(ours))
    del sys.modules[ours]
    plugin.load()()


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    module = ModuleType(name)
    module.__dict__.update(contents)
    module.__path__ = []
    monkeypatch.setitem(sys.modules, name, module)
