"""The Hugging Face cache: where the files of a snapshot lie there.

Its layout, as huggingface_hub 2.4.0 makes it (`file_download.py`, `utils/_shared_blobs.py`):
models--ORG--NAME/snapshots/REVISION/, and folders in it, hold links to files right in models--ORG--NAME/blobs/, or the files
themselves. Such a blob may be a link in turn, into the store that the repositories of one cache share: blobs/XX/HASH beside
them, where HASH has 64 hexadecimal digits and begins with XX, and a file says that this is the store. Other folders may be
called `snapshots` and `blobs`, too, and what is beside them is not the checkpoint's.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

__all__ = ["blob_name", "is_blob"]

#: What the cache calls the folder of a repository, after its kind and its name.
_REPOSITORY = re.compile(r"(models|datasets|spaces|kernels)--.+", re.DOTALL)

_SHARED = re.compile("[0-9a-f]{64}")
_SHARED_MARKER = ".huggingface-shared-blobs"


def is_blob(root: Path, resolved: Path) -> bool:
    """Tell whether a file without links is a blob of the cache that `root` is a snapshot of, or a folder in one."""
    return any(
        resolved.parent == repository / "blobs" or _is_shared(repository.parent / "blobs", resolved)
        for repository in _repositories(root)
    )


def blob_name(root: Path, path: Path, resolved: Path) -> str | None:
    """Return what a snapshot's file is called among the blobs of its repository; None if it is none of them.

    The name in the shared store is another: a hash of another kind.
    """
    found = [repository / "blobs" for repository in _repositories(root)]
    if not found:
        return None
    if resolved.parent in found:
        return resolved.name
    if not path.is_symlink():
        return None
    target = path.parent / path.readlink()
    return target.name if target.parent.resolve() in found else None


@functools.lru_cache(maxsize=16)
def _repositories(root: Path) -> tuple[Path, ...]:
    """Return the folders of which `root`, by its name, is a snapshot or lies in one."""
    return tuple(
        parent.parent
        for parent in root.parents
        if parent.name == "snapshots" and _REPOSITORY.fullmatch(parent.parent.name)
    )


def _is_shared(store: Path, resolved: Path) -> bool:
    return (
        _SHARED.fullmatch(resolved.name) is not None
        and resolved.parent == store / resolved.name[:2]
        and (store / _SHARED_MARKER).is_file()
    )
