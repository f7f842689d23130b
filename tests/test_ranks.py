"""Which of several processes this is: found, logged, and reported."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import weightstream as ws
from tests.builders import write_checkpoint
from weightstream.ranks import Ranks, find_ranks, ranked_logger

ROOT = Path(__file__).parents[1]
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def fixture_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        pytest.param({}, Ranks(0, 1, 1), id="alone"),
        pytest.param({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, Ranks(3, 8, 4), id="torchrun"),
        pytest.param({"RANK": "0", "LOCAL_RANK": "2", "WORLD_SIZE": "8"}, Ranks(0, 8, 8), id="an explicit 0 counts"),
        pytest.param({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Ranks(1, 2, 2), id="local alone"),
        pytest.param({"LOCAL_RANK": "1"}, Ranks(1, 2, 2), id="no size"),
        pytest.param({"RANK": "-1", "WORLD_SIZE": "many"}, Ranks(0, 1, 1), id="no numbers"),
    ],
)
def test_variables_say_which_rank_this_is(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Ranks
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_ranks() == expected


def test_torch_distributed_knows_better_than_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "6")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert find_ranks() == Ranks(0, 1, 1)
    finally:
        torch.distributed.destroy_process_group()
    assert find_ranks() == Ranks(5, 6, 6)


def test_finding_ranks_imports_no_torch() -> None:
    program = "import sys, weightstream.ranks as r; r.find_ranks(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_lines_and_report_of_a_load_say_the_rank(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    config = ws.LoaderConfig(device={"target": "cpu"})  # type: ignore[arg-type]  # pydantic makes the section
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with caplog.at_level("DEBUG", logger="weightstream"):
        report = ws.load_sync(nn.Linear(2, 2, device="meta"), path, config=config)
    assert (report.rank, report.world_size) == (1, 4)
    ours = [record for record in caplog.records if record.name.startswith("weightstream")]
    assert any("loaded 2 tensors" in record.getMessage() for record in ours)
    for record in ours:
        assert record.getMessage().startswith("[rank 1 of 4] ")
        assert vars(record).items() >= {"rank": 1, "world_size": 4}.items()


@pytest.mark.parametrize(
    ("on_this_host", "strategy", "share"),
    [
        (None, "direct", "free for 2 ranks"),
        ("2", "direct", "free for 2 ranks"),
        ("1", "stream", "of host memory free)"),
    ],
    ids=["as many as there are", "two on this host", "one on each of two hosts"],
)
def test_two_processes_load_the_same_checkpoint_and_each_says_which_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, on_this_host: str | None, strategy: str, share: str
) -> None:
    """The free memory would do for one of them: weights that are cast to twice their size, and a ring."""
    weights = {"weight": torch.randn(256, 256), "bias": torch.randn(256)}
    stored = {name: tensor.bfloat16() for name, tensor in weights.items()}
    path = write_checkpoint(tmp_path / "checkpoint", stored)
    free_bytes = 600_000  # of which 7/8 count; 263,168 bytes of weights, and two slots of 73,728
    if on_this_host is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", on_this_host)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    program, store = ROOT / "tests" / "rank_process.py", tmp_path / "store"
    commands = [[sys.executable, str(program), str(store), rank, "2", str(path), str(free_bytes)] for rank in "01"]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    try:
        ended = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, (output, errors)) in enumerate(zip(processes, ended, strict=True)):
        assert process.returncode == 0, errors
        found = json.loads(output)
        report = found["report"]
        assert (report["rank"], report["world_size"], report["strategy"]) == (rank, 2, strategy)
        assert share in report["reason"]
        assert any("loaded 2 tensors" in line for line, *_ in found["lines"])
        for line, *carried in found["lines"]:
            assert line.startswith(f"[rank {rank} of 2] ")
            assert carried == [rank, 2]
        loaded = b"".join(tensor.float().numpy().tobytes() for tensor in stored.values())
        assert found["digest"] == hashlib.sha256(loaded).hexdigest()


def test_process_that_is_alone_says_nothing_of_ranks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = ranked_logger("weightstream.test")
    with caplog.at_level(logging.INFO, logger="weightstream"):
        logger.info("%d things", 3, extra={"more": 1})
    (record,) = caplog.records
    assert record.getMessage() == "3 things"
    assert record.pathname == __file__
    assert record.funcName == "test_process_that_is_alone_says_nothing_of_ranks"
    assert vars(record).items() >= {"rank": 0, "world_size": 1, "more": 1}.items()


def test_every_module_logs_through_it() -> None:
    """A line of a plain logger would not say of which rank it is."""
    plain = re.compile(r"getLogger\(__name__\)")
    for folder in ("prefetch", "device", "scheduler", "src/weightstream"):
        for file in (ROOT / folder).glob("**/*.py"):
            assert not plain.search(file.read_text()), f"{file}: use weightstream.ranks.ranked_logger"
