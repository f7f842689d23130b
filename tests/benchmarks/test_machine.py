from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

from benchmarks import machine


def test_description_has_no_name_of_a_host_and_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["benchmarks", "compare", "--folder", str(tmp_path), "--python", f"a={tmp_path}/b"]
    )
    about = machine.describe(tmp_path, "cpu")
    assert about["command"] == f"python -m benchmarks compare --folder {tmp_path.name} --python a=b"
    text = f"{about} {machine.sentence(about)}"
    assert platform.node() not in text.split()
    assert str(tmp_path) not in text
    assert str(Path.home()) not in text


def test_results_are_named_after_date_and_machine() -> None:
    about = {"date": "2026-01-02", "gpu": None, "cpu": "AMD EPYC (v3)", "cores": 2}
    assert machine.folder_name(about) == "2026-01-02-amd-epyc-v3-2-cores"
    assert machine.folder_name(about | {"gpu": "NVIDIA H100 80GB HBM3"}) == "2026-01-02-nvidia-h100-80gb-hbm3"
