"""The plugin that gives vLLM `load_format="weightstream"`.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`. That imports nothing of
weightstream but this module and the loader's class; what reads is imported when a model is loaded.
"""

from __future__ import annotations

from importlib import import_module

__all__ = ["register"]


def register() -> None:
    """Make `load_format="weightstream"` known to vLLM. May be called more than once in a process."""
    loaders = import_module("vllm.model_executor.model_loader")
    if "weightstream" not in loaders._LOAD_FORMAT_TO_MODEL_LOADER:  # noqa: SLF001 - twice is a warning
        home = import_module("weightstream.integrations.vllm_loader")
        loaders.register_model_loader("weightstream")(home.WeightstreamLoader)
