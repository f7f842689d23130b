"""Readiness: which tensors may be used already, and who waits for which."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future

__all__ = ["Readiness"]


class Readiness:
    """Knows every name of a load, and resolves futures when all names below one are ready. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: Sequence[str] = ()
        self._prefixes: Sequence[str] = ()
        self._pending: set[str] = set()
        self._num_names = 0
        self._last = ""
        self._missing: dict[Future[None], int] = {}
        self._waiting: dict[str, list[Future[None]]] = {}
        self._ended = False
        self._error: BaseException | None = None

    @property
    def num_ready(self) -> int:
        return self._num_names - len(self._pending)

    @property
    def num_names(self) -> int:
        return self._num_names

    @property
    def last_module(self) -> str:
        """The module of the tensor that became ready last; "" if none has, or if it belongs to the model itself."""
        return self._last.rpartition(".")[0]

    def expect(self, names: Sequence[str], prefixes: Sequence[str]) -> None:
        """Set, once, the names of the tensors that will become ready, and the prefixes ("layers.0.") of all modules.

        They are kept as they are: an order or an index that few will ask for would take longer than the asking.
        """
        with self._lock:
            self._pending = set(names)
            self._names, self._prefixes = names, prefixes
            self._num_names = len(names)

    def mark(self, names: Sequence[str]) -> None:
        """Say that these tensors hold their final values, and that the host has seen their last copy complete."""
        done: list[Future[None]] = []
        with self._lock:
            self._pending.difference_update(names)
            self._last = names[-1] if names else self._last
            if self._waiting:
                for name in names:
                    for future in self._waiting.pop(name, ()):
                        self._missing[future] -= 1
                        if not self._missing[future]:
                            del self._missing[future]
                            done.append(future)
        for future in done:
            future.set_result(None)

    def end(self, error: BaseException | None) -> None:
        """Resolve everybody who still waits: with the load's error, or, after success, as ready."""
        with self._lock:
            self._ended, self._error = True, error
            waiting = list(self._missing)
            self._missing.clear()
            self._waiting.clear()
        for future in waiting:
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    def wait_for(self, name: str) -> Future[None]:
        """Return a future that resolves when a tensor, or every tensor of a module, is ready. "" is the whole model.

        Takes time in proportion to the number of tensors below the name.

        Raises:
            ValueError: the model has no such tensor or module.
        """
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # so that a waiter that is cancelled cannot cancel it for the others
        with self._lock:
            below = self._below(name)
            if not below and (f"{name}." if name else "") not in self._prefixes:
                raise ValueError(f"the model has no module and the load no tensor named {name!r}")
            if self._error is not None:
                future.set_exception(self._error)
                return future
            missing = [] if self._ended else [one for one in below if one in self._pending]
            if missing:
                self._missing[future] = len(missing)
                for one in missing:
                    self._waiting.setdefault(one, []).append(future)
                return future
        future.set_result(None)
        return future

    def _below(self, name: str) -> list[str]:
        prefix = f"{name}." if name else ""
        return [one for one in self._names if one.startswith(prefix) or one == name]
