"""How the command line gets a model: from an import path, through transformers, or from a checkpoint's tensors."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from weightstream.complaints import ConfigurationError
from weightstream.device.accelerator import find_device
from weightstream.device.dtypes import torch_dtype, torch_shape, unsupported
from weightstream.errors import PlacementError, WeightstreamError, shown
from weightstream.prefetch.header import TensorSpec

__all__ = ["BuildError", "build_model", "model_for", "target_device"]


class BuildError(WeightstreamError):
    """Raised when code that builds a model fails. Its cause is the error of that code."""


def target_device(target: str) -> torch.device:
    """Return the device that `device.target` stands for. May start a driver.

    Raises:
        ConfigurationError: this machine has no such device, or torch cannot use it.
    """
    try:
        return find_device(target)
    except PlacementError as error:
        raise ConfigurationError(f"{error.what}, but {error.expected}") from error


def build_model(spec: str, checkpoint: Path, device: torch.device, *, variant: str | None = None) -> nn.Module:
    """Build the model that `model` in the configuration names.

    Args:
        spec: `package.module:callable`, or `transformers`.
        checkpoint: what will be loaded; for `transformers`, its folder has the config.json. No module is found in that
            folder: whoever made the weights must not choose code.
        device: for `transformers`, where the buffers go that are in no checkpoint.
        variant: for `transformers`, which of the checkpoints in a folder.

    Raises:
        ConfigurationError: there is no such callable, or it does not return an nn.Module.
        BuildError: it raised an exception.
        WeightstreamError: from `weightstream.integrations.transformers.build_on_meta`.
    """
    if spec == "transformers":
        _leave_out(checkpoint)
        _refuse_brought_along("transformers", checkpoint)
        try:
            bridge = importlib.import_module("weightstream.integrations.transformers")
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            raise ConfigurationError(
                "model: transformers is not installed: pip install 'weightstream[transformers]'"
            ) from error
        model = bridge.build_on_meta(checkpoint, device=device, variant=variant)
        assert isinstance(model, nn.Module)
        return model
    builder = _find(spec, checkpoint)
    if not callable(builder):
        raise ConfigurationError(f"model: {spec} is not callable, but of type {type(builder).__qualname__}")
    try:
        inspect.signature(builder).bind()
    except TypeError as error:
        raise ConfigurationError(f"model: {spec} must be callable without arguments: {error}") from error
    except ValueError:
        pass  # some callables have no signature to look at
    try:
        model = builder()
    except (Exception, SystemExit) as error:
        raise BuildError(f"model: {spec} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model: {spec} must return a torch.nn.Module, found {type(model).__qualname__}")
    return model


def model_for(specs: Iterable[TensorSpec]) -> nn.Module:
    """Return a model on meta that has exactly these tensors, as parameters of modules with the names' parts.

    Raises:
        PlacementError: one module would need a tensor and a module, or something of its own, under the same name.
        UnsupportedFormatError: torch lacks one of the dtypes, or cannot have it in such a shape.
    """
    modules = {"": nn.Module()}
    for spec in specs:
        dtype = torch_dtype(spec.dtype)
        if dtype is None:
            raise unsupported(spec.dtype, spec.name)
        tensor = torch.empty(torch_shape(spec.dtype, spec.shape, tensor=spec.name), dtype=dtype, device="meta")
        parent, _, name = spec.name.rpartition(".")
        try:
            _module_at(modules, parent).register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        except KeyError as error:
            raise PlacementError(
                f"no torch module can have a tensor of this name beside the others ({error.args[0]})", tensor=spec.name
            ) from error
    return modules[""]


def _module_at(modules: dict[str, nn.Module], path: str) -> nn.Module:
    """Return a module, after making it and those above it where they are missing. `modules` holds all by their paths."""
    if path not in modules:
        parent, _, name = path.rpartition(".")
        modules[path] = nn.Module()
        _module_at(modules, parent).add_module(name, modules[path])
    return modules[path]


def _leave_out(checkpoint: Path) -> None:
    """Take a checkpoint's folder, and those below it, out of the places in which Python looks for modules."""
    sys.path[:] = [place for place in sys.path if not _is_in_folder_of(checkpoint, place)]


def _refuse_brought_along(module_name: str, checkpoint: Path) -> None:
    """Refuse a module that Python would take from the checkpoint's folder, as part of a namespace package from above it.

    Packages are looked at from the outermost, so that none is imported (which looking for what is inside does) before it
    has been looked at. A namespace package is refused for one of its places: what it has there is found first, or later.

    Raises:
        ConfigurationError: it would.
        Exception: from importing what it lies in.
    """
    parts = module_name.split(".")
    for prefix in (".".join(parts[:count]) for count in range(1, len(parts) + 1)):
        if prefix in sys.modules:  # nothing of it runs any more
            continue
        found = importlib.util.find_spec(prefix)
        if found is None:
            return  # the import says so
        places = [*(found.submodule_search_locations or ()), *([found.origin] if found.has_location else ())]
        for place in places:
            if place is not None and _is_in_folder_of(checkpoint, place):
                raise ConfigurationError(
                    f"model: {prefix} would be taken from the checkpoint's folder ({shown(place)}), and no code is:"
                    " rename one of the two"
                )


def _is_in_folder_of(checkpoint: Path, place: str) -> bool:
    """Tell whether a path leads into or through a checkpoint's folder, whatever links are on the way."""
    if not checkpoint.exists():
        return False
    root = (checkpoint if checkpoint.is_dir() else checkpoint.parent).resolve()
    path = Path(place).absolute()
    return any(step.resolve().is_relative_to(root) for step in (path, *path.parents))


def _find(spec: str, checkpoint: Path) -> object:
    module_name, _, attributes = spec.partition(":")
    if os.getcwd() not in sys.path:  # noqa: PTH109 - a string is what sys.path holds
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    _leave_out(checkpoint)
    try:
        _refuse_brought_along(module_name, checkpoint)
        found: object = importlib.import_module(module_name)
    except ConfigurationError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigurationError(
                f"model: there is no module {error.name!r} here or among the installed packages"
                " (the checkpoint's folder is not searched)"
            ) from error
        raise ConfigurationError(f"model: importing {module_name} failed: {type(error).__name__}: {error}") from error
    path = module_name
    for name in attributes.split("."):
        if not hasattr(found, name):
            raise ConfigurationError(f"model: {path} has no attribute {name!r}")
        found = getattr(found, name)
        path = f"{path}.{name}"
    return found
