"""Names: what the checkpoint's tensors are called in the model, which of them are wanted, and which may be missing.

Pure decisions on strings. Without a rule nothing is done for each name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Protocol, TypeVar

from weightstream.device.config import DeviceConfig, Pattern, Rename
from weightstream.errors import PlacementError

__all__ = ["NameRules"]


class _Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=_Named)


class NameRules:
    """The rules of one configuration, ready to be applied.

    Attributes:
        is_partial: whether tensors may be left out; `selects` says which.
        renames: whether the model's names may differ from the checkpoint's.
        ignores_missing: says whether nobody minds that this name of the model is not in the checkpoint.
        ignores_unexpected: says whether nobody minds that this name of the checkpoint is not in the model.
    """

    def __init__(self, config: DeviceConfig) -> None:
        self.is_partial = bool(config.include or config.exclude)
        self.ignores_missing = _any_of(config.ignore_missing)
        self.ignores_unexpected = _any_of(config.ignore_unexpected)
        self._is_included = _any_of(config.include or ("",))  # which is found in every name
        self._is_excluded = _any_of(config.exclude)
        self.renames = bool(config.rename)
        self._rename = config.rename

    def selects(self, name: str) -> bool:
        """Say whether the tensor of this name, in the model, is to be loaded."""
        return self._is_included(name) and not self._is_excluded(name)

    def apply(self, stored: Mapping[str, T]) -> Mapping[str, T]:
        """Return the tensors that are wanted, in their order, by their names in the model.

        Args:
            stored: all of the checkpoint's, by their names there. It is itself the answer where there is no rule.

        Raises:
            PlacementError: two of them get one name.
        """
        if not self.renames and not self.is_partial:
            return stored
        names = reduce(_follow, self._rename, list(stored))
        wanted: Iterable[tuple[str, T]] = zip(names, stored.values(), strict=True)
        if self.is_partial:
            wanted = ((name, spec) for name, spec in wanted if self.selects(name))
        found: dict[str, T] = {}
        for name, spec in wanted:
            other = found.setdefault(name, spec)
            if other is not spec:
                raise PlacementError(
                    "device.rename gives two tensors of the checkpoint the same name",
                    tensor=name,
                    expected="one tensor for each name",
                    actual=f"{other.name} and {spec.name}",
                    hint="Make the rules' patterns narrower, or leave one of the two out",
                )
        return found


def _follow(names: list[str], rule: Rename) -> list[str]:
    replace, to = re.compile(rule.pattern).sub, rule.to
    return [replace(to, name) for name in names]


def _any_of(patterns: Iterable[Pattern]) -> Callable[[str], bool]:
    searches = [re.compile(pattern).search for pattern in patterns]
    return lambda name: any(search(name) is not None for search in searches)
