"""Versions: what files of `torch.save` say of the modules that a state dict is of, and these ask for when they load it.

torch keeps it in the attribute `_metadata` of the dict, by the names of modules, mostly as `{"version": 2}`. Safetensors have
nothing like it. Modules with an overridden `_load_from_state_dict` change what older versions of themselves have saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from weightstream.errors import some

__all__ = ["Versions", "merge_versions", "take_versions"]

#: Name of a module ("" is the model) -> what is said of it.
Versions = Mapping[str, Mapping[str, object]]

#: Limit of our own for one module: each of them is given a copy. torch writes one entry.
MAX_ENTRIES = 100

_PLAIN = (type(None), bool, int, float, str)


def take_versions(metadata: object, file: str) -> tuple[Versions, list[str]]:
    """Take what is plain of a `_metadata`; return it, and sentences about the rest.

    Each dict is looked at once, however often the pickle mentions it.
    """
    if metadata is None:
        return {}, []
    if not isinstance(metadata, dict):
        return {}, [f"format: left out of {file}: its _metadata is not a dict"]
    found: dict[str, Mapping[str, object]] = {}
    seen: dict[int, tuple[Mapping[str, object], bool]] = {}
    refused: list[object] = []
    for name, entries in cast("dict[object, object]", metadata).items():
        if id(entries) not in seen:
            seen[id(entries)] = _plain(entries)
        plain, is_whole = seen[id(entries)]
        if isinstance(name, str):
            found[name] = plain
        if not is_whole or not isinstance(name, str):
            refused.append(name)
    if not refused:
        return found, []
    return found, [f"format: left out of {file}: what is not plain data in the _metadata of {some(refused)}"]


def merge_versions(shards: Sequence[tuple[Iterable[str], Versions]]) -> Versions:
    """Return what the shards of a checkpoint say together.

    As if `load_state_dict` were called for each of them, which is what transformers does: what is said of a module comes
    from the file that its tensors are in, and is nothing where that file says nothing. Of several the first counts.

    Args:
        shards: of each, the names of what is in it, and what it says.
    """
    if not any(versions for _, versions in shards):
        return {}
    if len(shards) == 1:
        return shards[0][1]
    merged: dict[str, Mapping[str, object]] = {}
    for names, versions in shards:
        for module in _modules_of(names):
            merged.setdefault(module, versions.get(module, {}))
    return merged


def _plain(entries: object) -> tuple[Mapping[str, object], bool]:
    """Return what is plain data under names of what is said of one module, and whether that is all of it."""
    if not isinstance(entries, dict) or len(cast("dict[object, object]", entries)) > MAX_ENTRIES:
        return {}, False
    pairs = cast("dict[object, object]", entries)
    plain = {key: value for key, value in pairs.items() if isinstance(key, str) and type(value) in _PLAIN}
    return plain, len(plain) == len(pairs)


def _modules_of(names: Iterable[str]) -> set[str]:
    """Return the names of all modules that hold tensors of these names, or hold such modules."""
    modules: set[str] = set()
    for name in names:
        module = name
        while module:
            module = module.rpartition(".")[0]
            if module in modules:
                break
            modules.add(module)
    return modules
