"""The systemd unit and the Kubernetes pod: the commands in them do what they say."""

from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from torch import nn

from tests.builders import write_checkpoint
from tests.cli.conftest import Run, fixture_weightstream
from weightstream import LoaderConfig, LoadReport, load_sync, pagecache
from weightstream.device.config import DeviceConfig

__all__ = ["fixture_weightstream"]

EXAMPLES = Path(__file__).parents[2] / "examples"


def systemd_command() -> list[str]:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # keys keep their case
    unit.read(EXAMPLES / "weightstream-warm.service")
    assert unit["Service"]["Type"] == "oneshot"
    return shlex.split(unit["Service"]["ExecStart"])


def kubernetes_command() -> list[str]:
    pod: Any = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text())
    command: list[str] = pod["spec"]["initContainers"][0]["command"]
    return command


@pytest.mark.parametrize("command", [systemd_command, kubernetes_command], ids=["systemd", "kubernetes"])
def test_command_leaves_a_warm_page_cache_for_the_next_load(
    command: Callable[[], list[str]], tmp_path: Path, weightstream: Run
) -> None:
    tensors = {f"{number}.weight": torch.rand(256, 1024) for number in range(4)}
    folder = write_checkpoint(tmp_path / "model", tensors, num_shards=2)
    config = tmp_path / "model.yaml"
    config.write_text(f"checkpoint: {folder}\nmodel: somewhere:unused\ndevice: {{target: cpu}}\n")
    files = sorted(folder.glob("*.safetensors"))
    pagecache.drop(files)
    if pagecache.resident_share(files) > 0:
        pytest.skip("this file system keeps its files in memory")
    program, *arguments = command()
    assert Path(program).name == "weightstream"
    result = weightstream(*(str(config) if argument.endswith("model.yaml") else argument for argument in arguments))
    assert (result.code, result.err) == (0, "")
    report = TypeAdapter(LoadReport).validate_json(result.out)
    assert report.device == "page-cache"
    assert pagecache.resident_share(files) == 1
    model = nn.ModuleList(nn.Linear(1024, 256, bias=False, device="meta") for _ in tensors)
    num_chunks = 2
    assert (
        f"page cache: {num_chunks} of {num_chunks} chunks are in it and are read from there"
        in load_sync(model, folder, config=LoaderConfig(device=DeviceConfig(target="cpu"), strategy="stream")).decisions
    )


def test_probes_are_what_the_server_answers() -> None:
    pod: Any = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text())
    server = pod["spec"]["containers"][0]
    source = (EXAMPLES / "server.py").read_text()
    for probe in ("livenessProbe", "readinessProbe"):
        assert f'@app.get("{server[probe]["httpGet"]["path"]}")' in source


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    text = (EXAMPLES / "weightstream-warm.service").read_text()
    unit = tmp_path / "weightstream-warm.service"
    unit.write_text(text.replace("/opt/inference/bin/weightstream", sys.executable))  # it must exist here
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
