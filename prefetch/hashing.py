"""Hashing: the SHA-256 of a file, from its first byte to its last, out of memory that others have filled."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

__all__ = ["FileHash"]

#: Between two looks at whether to go on: some 2 ms of work, in which the GIL is free.
_STEP_BYTES = 4 * 2**20


class FileHash:
    """The hash of one file, up to `position`. To be used by one thread at a time."""

    def __init__(self) -> None:
        self.position = 0
        self._sha256 = hashlib.sha256()

    def update(self, memory: bytes | memoryview, *, goes_on: Callable[[], bool] = lambda: True) -> None:
        """Hash the bytes that follow. Where `goes_on` says no, it ends early, and the hash is of no more use."""
        whole = memoryview(memory)
        for first in range(0, len(whole), _STEP_BYTES):
            if not goes_on():
                return
            self._sha256.update(whole[first : first + _STEP_BYTES])
        self.position += len(whole)

    def hexdigest(self) -> str:
        """Return the digest of everything so far, as 64 small hexadecimal digits."""
        return self._sha256.hexdigest()
