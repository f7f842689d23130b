"""Where and with what something was measured: hardware, versions, date, commit, command. No names of hosts, no paths."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from weightstream.prefetch.memory import usable_cores

__all__ = ["describe", "folder_name", "kernel_release", "sentence"]

ROOT = Path(__file__).parents[1]
_PACKAGES = (
    "weightstream",
    "torch",
    "safetensors",
    "accelerate",
    "transformers",
    "runai-model-streamer",
    "fastsafetensors",
    "tensorizer",
    "instanttensor",
)


def describe(checkpoints: Path, device: str) -> dict[str, Any]:
    """Return what a reader needs to judge a measurement by, as plain data."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": _cpu(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else None,
        "cuda": torch.version.cuda,
        "kernel": kernel_release(),
        "file_system": _file_system(checkpoints),
        "huge_pages": _selected(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "command": " ".join(["python -m benchmarks", *map(_without_folder, sys.argv[1:])]),
    }


def kernel_release() -> str:
    """Return the kernel's version without what a distributor adds."""
    return "".join(re.findall(r"^[\d.]*\d", platform.release()))


def folder_name(machine: dict[str, Any]) -> str:
    """Return a name for the results of a machine on a day: `2026-11-24-amd-epyc-2-cores`."""
    kind = machine["gpu"] or f"{machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", f"{machine['date']} {kind}".lower()).strip("-")


def sentence(machine: dict[str, Any]) -> str:
    """Return the machine in words, for below a table."""
    packages = ", ".join(f"{name} {found}" for name, found in machine["packages"].items() if found)
    gpu = f"{machine['gpu']}, CUDA {machine['cuda']}, " if machine["gpu"] else ""
    return (
        f"{gpu}{machine['cores']} cores of {machine['cpu']}, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"Linux {machine['kernel']}, {machine['file_system']}, Python {machine['python']}, {packages}; "
        f"{machine['date']}, commit {machine['commit']}: `{machine['command']}`"
    )


def _cpu() -> str:
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return str(names[0]).strip() if names else platform.machine()


def _file_system(folder: Path) -> str:
    """Return the type of the file system that a folder is on."""
    place, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, found, *_ = line.split()
        if len(mount) >= len(place) and folder.resolve().is_relative_to(mount):
            place, kind = mount, found
    return kind


def _selected(file: Path) -> str | None:
    """Return the word that stands in brackets in one of the kernel's files of choices."""
    return next(iter(re.findall(r"\[(\w+)\]", file.read_text())), None) if file.exists() else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """Return the short commit, with `+` behind it if files differ from it; `unknown` outside of a clone."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changes = subprocess.run(status, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _without_folder(argument: str) -> str:
    option, equals, value = argument.rpartition("=")
    return f"{option}{equals}{Path(value).name}" if "/" in value else argument
