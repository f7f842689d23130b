"""Finding: which file a path stands for, by names alone. Opens nothing.

A path is a file, a folder with one checkpoint in it, or the name of a repository in the local Hugging Face cache. Where
a folder leaves a choice, nothing is guessed: the candidates are listed, and one is named by its path.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from weightstream.errors import CheckpointError, UnsupportedFormatError, some
from weightstream.prefetch.attempts import refused

__all__ = ["Found", "find_checkpoint", "is_repository", "refuse_rivals"]

_INDEX = re.compile(r"(?P<stem>.+)\.(?P<format>safetensors|bin)\.index(\.(?P<variant>[^.]+))?\.json")
_FILE = re.compile(r"(?P<stem>.+)\.(?P<format>safetensors|bin|pt|pth)")
_SHARD = re.compile(r"-(\d+)-of-(\d+)")
_VARIANT = re.compile(r"\d*[A-Za-z]\w*")

#: What trainers and adapters put beside a model, and no model is in.
_NO_MODEL = re.compile(
    r"(adapter_model|optimizer|scheduler|scaler|training_args|trainer_state|rng_state|random_states|custom_checkpoint)\b"
    r".*|(rng_state|random_states|custom_checkpoint)_\d+.*"
)

_REPOSITORY = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)

_EXPECTED = "model.safetensors.index.json, a .safetensors file, or a .bin, .pt or .pth file of torch.save"


@dataclass(frozen=True, slots=True)
class Found:
    """What a path stands for.

    Attributes:
        path: an index, or a single file.
        named: whether it was named by its own path.
        rivals: names of files in its folder that are checkpoints of their own, unless the index lists them.
        notes: what was left alone, for the report.
    """

    path: Path
    named: bool
    rivals: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Candidate:
    name: str
    base: str
    variant: str | None
    is_index: bool
    is_shard: bool


def find_checkpoint(path: str | os.PathLike[str], *, variant: str | None = None) -> Found:
    """Find the index or the single file that `path` stands for.

    Args:
        path: a file; a folder; or, where there is neither, `org/name` or `org/name@revision`, which is looked for in the
            local cache of the Hugging Face hub and never fetched.
        variant: which of the checkpoints in a folder: `fp16` stands for `model.fp16.safetensors` and the like.

    Raises:
        CheckpointError: nothing there, nothing loadable in it, or several that are not one checkpoint.
        UnsupportedFormatError: there are weights, but in another format.
        ReadError: the operating system refused a look at it.
    """
    given = Path(path)
    names = _look(given)
    if names is None and is_repository(given):
        given = _find_in_cache(str(given))
        names = _look(given)
    if names is None:
        raise CheckpointError("no such file or folder", file=given)
    if names != _NO_FOLDER:
        return _find_in_folder(given, names, variant)
    if given.name.endswith(".index.json") or _INDEX.fullmatch(given.name) or _FILE.fullmatch(given.name):
        return Found(given, named=True)
    raise UnsupportedFormatError(
        "not a checkpoint that can be loaded",
        file=given,
        expected="a folder, *.index.json, *.safetensors, *.bin, *.pt or *.pth",
        hint="Convert other formats to safetensors first",
    )


def is_repository(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path may be meant as the name of a repository: `org/name` or `org/name@revision`."""
    text = str(path)
    return _REPOSITORY.fullmatch(text) is not None and ".." not in text and not text.startswith(".")


_NO_FOLDER = [""]


def _look(path: Path) -> list[str] | None:
    """Return the names in a folder, `_NO_FOLDER` for a file, or None where there is nothing."""
    try:
        return sorted(os.listdir(path)) if stat.S_ISDIR(os.stat(path).st_mode) else _NO_FOLDER
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a path with a NUL
        return None
    except OSError as exc:
        raise refused("look for it", exc, file=path) from exc


def _find_in_cache(given: str) -> Path:
    """Return the snapshot of a repository in the local cache, wherever HF_HOME or HF_HUB_CACHE say that it is."""
    matched = _REPOSITORY.fullmatch(given)
    assert matched is not None
    try:
        hub = import_module("huggingface_hub")  # an extra, and slow to import
    except ImportError as exc:
        raise CheckpointError(
            "no such file or folder",
            file=given,
            hint="For a repository in the local Hugging Face cache, install weightstream[hub]",
        ) from exc
    try:
        return Path(hub.snapshot_download(matched["name"], revision=matched["revision"], local_files_only=True))
    except (OSError, ValueError) as exc:  # what the library raises for what it has not got, and for names it forbids
        raise CheckpointError(
            "no such file or folder, nor a repository in the local Hugging Face cache",
            file=given,
            hint="Nothing is fetched here: `hf download` does that",
        ) from exc


def _find_in_folder(folder: Path, names: list[str], variant: str | None) -> Found:
    if not names:
        raise CheckpointError("the folder is empty", file=folder, expected=_EXPECTED)
    preferred = _candidates(names, ("safetensors",))
    others = _candidates(names, ("bin", "pt", "pth"))
    notes: tuple[str, ...] = ()
    if preferred and others:
        left = some(one.name for one in others if not one.is_shard)
        notes = (
            f"format: safetensors files are there and were taken; left alone: {left or 'shards without an index'}",
        )
    chosen = _of_variant(folder, preferred or others, variant)
    if not chosen:
        raise _nothing_in(folder, names)
    indexes = [one for one in chosen if one.is_index]
    files = [one for one in chosen if not one.is_index and not one.is_shard]
    if len(indexes) > 1 or (not indexes and len(files) > 1):
        rivals = indexes or files
        refuse_rivals(folder, [one.name for one in rivals], are_variants=len({one.variant for one in rivals}) > 1)
    if not indexes and not files:
        raise CheckpointError(
            "there are shards, and no index that says what is in them",
            file=folder,
            expected="*.index.json",
            actual=some(one.name for one in chosen),
            hint="Fetch the index too",
        )
    if not indexes:
        return Found(folder / files[0].name, named=False, notes=notes)
    return Found(folder / indexes[0].name, named=False, rivals=tuple(one.name for one in files), notes=notes)


def refuse_rivals(folder: Path, names: Sequence[str], *, are_variants: bool = False) -> None:
    """Refuse to choose between checkpoints.

    Args:
        folder: where they are.
        names: of their indexes, or files.
        are_variants: whether `prefetch.variant` would choose one of them.

    Raises:
        CheckpointError: always.
    """
    raise CheckpointError(
        "the folder holds several checkpoints",
        file=folder,
        actual=some(names),
        hint=f"Give the path of the one that is meant instead of the folder's, such as {folder / names[0]}"
        + (", or set prefetch.variant" if are_variants else ""),
    )


def _candidates(names: list[str], formats: tuple[str, ...]) -> list[_Candidate]:
    found: list[_Candidate] = []
    for name in names:
        matched = _INDEX.fullmatch(name) or _FILE.fullmatch(name)
        if matched is None or matched["format"] not in formats or _NO_MODEL.fullmatch(name):
            continue
        stem: str = matched["stem"]
        shard = _SHARD.search(stem)
        if shard is not None:  # the number may stand before the variant or behind it
            stem = stem[: shard.start()] + stem[shard.end() :]
        base, _, variant = stem.rpartition(".")
        if not base or not _VARIANT.fullmatch(variant):
            base, variant = stem, ""
        is_index = matched.re is _INDEX
        if is_index and matched["variant"]:  # transformers writes model.safetensors.index.fp16.json
            variant = matched["variant"]
        is_shard = shard is not None and int(shard[2]) > 1
        found.append(_Candidate(name, base, variant or None, is_index, is_shard))
    return found


def _of_variant(folder: Path, found: list[_Candidate], variant: str | None) -> list[_Candidate]:
    """Keep those of a variant; without one, leave out variants of what is there without."""
    if variant is None:
        plain = {one.base for one in found if one.variant is None}
        return [one for one in found if one.variant is None or one.base not in plain]
    chosen = [one for one in found if one.variant == variant]
    if found and not chosen:
        raise CheckpointError(
            "the folder has no checkpoint of this variant",
            file=folder,
            expected=f"prefetch.variant {variant}",
            actual=some(one.name for one in found),
        )
    return chosen


def _nothing_in(folder: Path, names: list[str]) -> CheckpointError:
    others = [name for name in names if name.endswith((".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"))]
    if others:
        return UnsupportedFormatError(
            "weights in formats that cannot be loaded", file=folder, actual=some(others), hint="Convert to safetensors"
        )
    trained = [name for name in names if _FILE.fullmatch(name)]
    if trained:
        return CheckpointError(
            "no model is here, only what belongs to one (an adapter, an optimiser)",
            file=folder,
            expected=_EXPECTED,
            actual=some(trained),
            hint="A file that is meant all the same can be named by its path",
        )
    return CheckpointError("not a checkpoint", file=folder, expected=_EXPECTED, actual=some(names))
