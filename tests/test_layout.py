"""The repository's layout: three stages at the top, one import package for users."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "weightstream"
STAGES = ["device", "prefetch", "scheduler"]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def packages_below(folder: Path, name: str) -> set[str]:
    """Names of the packages in `folder`, links not followed."""
    packages = {name}
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink() and any(child.glob("**/*.py")):
            packages |= packages_below(child, f"{name}.{child.name}")
    return packages


def test_declared_packages_are_the_folders() -> None:
    folders = packages_below(SOURCE, "weightstream")
    for stage in STAGES:
        folders |= packages_below(ROOT / stage, f"weightstream.{stage}")
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders)


def test_declared_packages_are_found_where_the_map_says() -> None:
    mapped = SETUPTOOLS["package-dir"]
    for package in SETUPTOOLS["packages"]:
        nearest = max((name for name in mapped if f"{package}.".startswith(f"{name}.")), key=len)
        inside = package.removeprefix(nearest).strip(".").replace(".", "/")
        assert (ROOT / mapped[nearest] / inside / "__init__.py").is_file(), package


@pytest.mark.parametrize("stage", STAGES)
def test_link_leads_to_the_stage(stage: str) -> None:
    link = SOURCE / stage
    assert link.readlink() == Path("../..") / stage
    assert link.resolve() == ROOT / stage


def test_stages_have_no_name_of_their_own() -> None:
    program = (
        "import sys, weightstream.config\n"
        f"import {', '.join(f'weightstream.{stage}' for stage in STAGES)}\n"
        f"print([name for name in {STAGES} if name in sys.modules])"
    )
    # From another folder: in the root the bare names would be importable, by anybody.
    output = subprocess.check_output([sys.executable, "-c", program], cwd=SOURCE.parent, text=True)
    assert output == "[]\n"


def test_every_test_folder_is_a_package() -> None:
    folders = {file.parent for file in (ROOT / "tests").glob("**/*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_no_manifest_grafts_the_source() -> None:
    assert not (ROOT / "MANIFEST.in").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_architecture_names_every_module_of_a_stage(stage: str) -> None:
    (row,) = re.findall(rf"^\| `{stage}/` .*$", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    modules = {path.stem for path in (ROOT / stage).glob("*.py")} - {"__init__"}
    assert modules - set(re.findall(r"`(\w+)`", row)) == set()
