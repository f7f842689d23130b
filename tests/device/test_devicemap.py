"""The longest name decides; and what is no device is refused where it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import weightstream as ws
from weightstream.device.config import DeviceConfig
from weightstream.device.devicemap import DeviceMap
from weightstream.errors import PlacementError


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("a.weight", 0),
        ("a.b.weight", 1),
        ("a.b.c.weight", 0),
        ("a.b.bias", None),
        ("a.bb.weight", 0),
        ("other", 2),
    ],
)
def test_longest_name_decides(name: str, index: int | None) -> None:
    entries = {"a": "cuda:0", "a.b": "cuda:1", "a.b.c": "cuda:0", "a.b.bias": "meta", "": "cpu"}
    devices = DeviceMap({key: torch.device(value) for key, value in entries.items()})
    assert devices.devices == (torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cpu"))
    assert devices.index_of(name) == index


def test_tensor_that_no_name_covers_is_an_error() -> None:
    devices = DeviceMap({"a": torch.device("cpu")})
    with pytest.raises(PlacementError, match="no device") as caught:
        devices.index_of("ab.weight")
    assert caught.value.tensor == "ab.weight"


def test_settings_take_numbers_names_and_devices() -> None:
    config = DeviceConfig().with_device_map({"": 0, "a": "cuda:1", "b": torch.device("cpu"), "c": "meta"})
    assert config.device_map == {"": 0, "a": "cuda:1", "b": "cpu", "c": "meta"}


def test_argument_goes_before_the_target() -> None:
    config = DeviceConfig(target="cpu", strict=False).with_device_map({"": "meta"})
    assert (config.target, config.strict) == ("auto", False)


@pytest.mark.parametrize(
    ("value", "message"),
    [("disk", "nothing is offloaded to disk here"), (-1, "greater than"), (1.5, "valid"), ("0", "pattern")],
)
def test_value_that_is_no_device_is_refused(value: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DeviceConfig().with_device_map({"": value})


def test_target_and_map_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="cannot both be set"):
        DeviceConfig(target="cpu", device_map={"": "cpu"})


def test_map_comes_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSTREAM_DEVICE__DEVICE_MAP", json.dumps({"": 0, "lm_head": "cpu"}))
    assert ws.LoaderConfig().device.device_map == {"": 0, "lm_head": "cpu"}


def test_map_comes_from_a_file(tmp_path: object) -> None:
    path = f"{tmp_path}/config.yaml"
    with open(path, "w") as file:  # noqa: PTH123 (the shortest)
        file.write('device:\n  device_map: {"": cpu, model.layers.0: 1}\n')
    assert ws.LoaderConfig.from_yaml(path).device.device_map == {"": "cpu", "model.layers.0": 1}


def test_map_is_one_value_and_replaces_that_of_a_lower_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that are merged would send modules where neither of the two maps says."""
    file = tmp_path / "config.yaml"
    file.write_text("device: {device_map: {'': cpu, head: meta}, strict: false}")
    assert ws.LoaderConfig.from_yaml(file).device.device_map == {"": "cpu", "head": "meta"}
    keyword: Any = {"device_map": {"": 0}}
    assert ws.LoaderConfig.from_yaml(file, device=keyword).device.device_map == {"": 0}
    monkeypatch.setenv("WEIGHTSTREAM_DEVICE__DEVICE_MAP", '{"embed": "cuda:1"}')
    config = ws.LoaderConfig.from_yaml(file)
    assert config.device.device_map == {"embed": "cuda:1"}
    assert not config.device.strict
    assert ws.LoaderConfig.from_yaml(file, device=keyword).device.device_map == {"": 0}
    assert ws.LoaderConfig(device=keyword).device.device_map == {"": 0}
