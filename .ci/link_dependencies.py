"""Link the dependencies that a package declares, and nothing else, from this environment into another one.

`link_dependencies.py PACKAGE VENV`: a clean environment in a second, without installing gigabytes of torch once more. A
module that is imported but not declared is then missing, as it would be for a user.
"""

from __future__ import annotations

import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(package: str) -> set[str]:
    """Return the names of all distributions that `package` needs here, directly or not, without itself."""
    seen: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(package), "")]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for requirement in map(Requirement, distribution(name).requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed = canonicalize_name(requirement.name)
                waiting += [(needed, wanted) for wanted in ("", *requirement.extras)]
    return {name for name, _ in seen} - {canonicalize_name(package)}


def main(package: str, venv: str) -> None:
    """Link the top-level files and folders of every needed distribution."""
    here = Path(sysconfig.get_path("purelib"))
    there = Path(sysconfig.get_path("purelib", vars={"base": venv, "platbase": venv}))
    names = closure(package)
    entries = {file.parts[0] for name in names for file in distribution(name).files or []} - {"..", "__pycache__"}
    for entry in entries:
        (there / entry).symlink_to(here / entry)
    print(f"linked {len(names)} dependencies: {' '.join(sorted(names))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
