"""Ranks: which of several processes this one is, for log lines, the report, and the share of the host's memory.

Imports nothing of the package, and no torch: what torch.distributed knows is asked only where a program has imported it.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Ranks", "find_ranks", "ranked_logger"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """`rank` of `world_size` processes, `local_size` of which are on this host. Alone: 0 of 1, and 1."""

    rank: int
    world_size: int
    local_size: int


def find_ranks() -> Ranks:
    """Ask torch.distributed, if it is initialised, else the variables that launchers set; as of now.

    Where no variable says how many processes are on this host, it is all of them: they share its memory then, or the
    answer is too cautious.
    """
    local_size = _variable("LOCAL_WORLD_SIZE")
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
    else:
        ranks = _variable("RANK"), _variable("LOCAL_RANK")
        rank = next((found for found in ranks if found is not None), 0)
        sizes = _variable("WORLD_SIZE"), local_size, rank + 1
        world_size = next(found for found in sizes if found is not None)
    return Ranks(rank, world_size, world_size if local_size is None else local_size)


def _variable(name: str) -> int | None:
    """Return a variable's number; None where there is none: these are not ours, and nobody's mistake here."""
    value = os.environ.get(name, "")
    return int(value) if value.isascii() and value.isdecimal() else None


class _RankedLogger(logging.LoggerAdapter[logging.Logger]):
    """Begins messages with the rank, where there is more than one, and gives every record `rank` and `world_size`.

    An adapter, because a filter on the package's logger would not see the records of the loggers below it, and one on
    handlers would have to be put on those of the host application.

    What a handler raises is shown as `logging.Handler.handleError` shows it, and goes no further: lines are written while
    slots, threads and memory are on their way back, on threads that nobody waits for, and all of that must go on.
    """

    def log(self, level: int, msg: object, *args: object, stacklevel: int = 1, **kwargs: Any) -> None:  # noqa: ANN401
        try:
            super().log(
                level, msg, *args, stacklevel=stacklevel + 1, **kwargs
            )  # the line is the caller's, not this one
        except Exception:  # noqa: BLE001 (see the class)
            if logging.raiseExceptions:
                traceback.print_exc()

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:  # noqa: ANN401 (as the base has it)
        ranks = find_ranks()
        kwargs["extra"] = {**(kwargs.get("extra") or {}), "rank": ranks.rank, "world_size": ranks.world_size}
        return (msg if ranks.world_size == 1 else f"[rank {ranks.rank} of {ranks.world_size}] {msg}"), kwargs


def ranked_logger(name: str) -> logging.LoggerAdapter[logging.Logger]:
    """Return the logger of a module, whose lines say which rank they are of."""
    return _RankedLogger(logging.getLogger(name))
