"""The ceiling on host memory, measured: a fresh process, a checkpoint many times as large, the kernel's own account."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch

import weightstream as ws
from tests.builders import SINGLE, shard_name, write_index, write_sparse

KIB, MIB = 2**10, 2**20

#: The promise: what a load takes above the weights stays within `host_memory` and this, and 2 KiB for each tensor.
ALLOWANCE_BYTES = 64 * MIB
ALLOWANCE_PER_TENSOR_BYTES = 2 * KIB
#: What threads, imports and the plan take with few tensors.
DIRECT_ALLOWANCE_BYTES = 24 * MIB

PREFETCH = {"chunk": "4MiB", "host_memory": "16MiB", "workers": 4}
HOST_MEMORY_BYTES = 16 * MIB


def write_large(folder: Path, num_bytes: int, *, key: str = "") -> tuple[Path, int]:
    """Two shards of zeros, which take no room on the disk; return the number of tensors, too. `key`: ends their names."""
    count = num_bytes // (8 * MIB)
    weight_map: dict[str, str] = {}
    for number in range(2):
        names = [f"w{number}_{i}{key}" for i in range(count // 2)]
        file = shard_name(number, 2)
        write_sparse(folder / file, [(name, "F32", [2, MIB]) for name in names])
        weight_map |= dict.fromkeys(names, file)
    write_index(folder, weight_map)
    return folder, len(weight_map)


def measure(how: str, path: Path, *, device: str = "host", **prefetch: Any) -> dict[str, int]:
    strategy = prefetch.pop("strategy", "auto")
    config = {"strategy": strategy, "prefetch": PREFETCH | prefetch, "device": {"target": "cpu"}}
    command = [sys.executable, "-m", "tests.fresh_process", how, device, str(path), json.dumps(config)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, check=False, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


def check(found: dict[str, int], num_tensors: int, record: pytest.FixtureRequest) -> None:
    above = found["peak_bytes"] - found["held_bytes"]
    ceiling = HOST_MEMORY_BYTES + ALLOWANCE_BYTES + ALLOWANCE_PER_TENSOR_BYTES * num_tensors
    sentence = f"{above / MIB:.1f} MiB above the weights, of {ceiling / MIB:.1f} MiB"
    record.node.user_properties.append(("peak", sentence))
    assert above <= ceiling, sentence


@pytest.mark.parametrize("io", ["buffered", "direct"])
@pytest.mark.parametrize(
    ("how", "device"),
    [
        ("iter_tensors", "host"),
        ("stream", "host"),
        ("stream", "fake"),
        ("model", "host"),
        ("model", "fake"),
        ("warm", "host"),
    ],
)
def test_peak_above_the_weights_stays_below_the_ceiling_for_a_checkpoint_fifty_times_as_large(
    tmp_path: Path, request: pytest.FixtureRequest, how: str, device: str, io: str
) -> None:
    """What an accelerator holds is not memory of the host, and not that of the fake either."""
    path, num_tensors = write_large(tmp_path, 50 * HOST_MEMORY_BYTES)
    found = measure(how, path, device=device, io=io)
    assert found["loaded_bytes"] == 50 * HOST_MEMORY_BYTES
    assert found["held_bytes"] == (found["loaded_bytes"] if (how, device) == ("model", "host") else 0)
    check(found, num_tensors, request)


@pytest.mark.parametrize("how", ["iter_tensors", "model"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_peak_stays_below_the_ceiling_for_files_of_torch_save(
    tmp_path: Path, request: pytest.FixtureRequest, how: str, *, zipped: bool
) -> None:
    """Storage by storage: `torch.load` would hold all of it."""
    count = 20 * HOST_MEMORY_BYTES // (8 * MIB)
    tensors = {f"w{i}": torch.zeros(2, MIB) for i in range(count)}
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    del tensors
    found = measure(how, tmp_path)
    assert found["loaded_bytes" if how == "iter_tensors" else "held_bytes"] == 20 * HOST_MEMORY_BYTES
    check(found, count, request)


@pytest.mark.parametrize(("how", "io"), [("model", "buffered"), ("iter_tensors", "direct")])
def test_peak_stays_below_the_ceiling_for_many_small_tensors(
    tmp_path: Path, request: pytest.FixtureRequest, how: str, io: str
) -> None:
    count = 20_000
    write_sparse(tmp_path / SINGLE, [(f"layer_{i}_weight", "F32", [1000 + i % 7]) for i in range(count)])
    check(measure(how, tmp_path, io=io), count, request)


def test_checkpoint_larger_than_the_machine_s_memory_is_streamed(tmp_path: Path) -> None:
    """Only so much is there at once; so only that must fit."""
    count = 2 * psutil.virtual_memory().total // (32 * MIB)
    write_sparse(tmp_path / SINGLE, [(f"w{i}", "F32", [8, MIB]) for i in range(count)])
    config = ws.LoaderConfig.model_validate({"prefetch": {"host_memory": "64MiB"}, "device": {"target": "cpu"}})
    tensors = ws.iter_tensors(tmp_path, config)
    with contextlib.closing(cast("Generator[tuple[str, torch.Tensor], None, None]", tensors)):
        name, tensor = next(tensors)
    assert (name, tensor.nbytes) == ("w0", 32 * MIB)


def test_preload_holds_the_checkpoint_and_gives_it_back(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Into parameters that have storage: all of it is host memory of the loader, for as long as the load lasts."""
    num_bytes = 192 * MIB
    path, _ = write_large(tmp_path, num_bytes)
    found = measure("allocated", path, strategy="preload", host_memory="256MiB", io="buffered")
    sentence = f"{found['peak_bytes'] / MIB:.1f} MiB at most, {found['after_bytes'] / MIB:.1f} MiB afterwards"
    request.node.user_properties.append(("preload", sentence))
    assert num_bytes <= found["peak_bytes"] <= 256 * MIB + ALLOWANCE_BYTES, sentence
    assert found["after_bytes"] <= ALLOWANCE_BYTES, sentence
    # And the report says so, as it was measured.
    assert found["slots_bytes"] >= num_bytes
    assert found["resident_bytes"] - found["left_bytes"] >= num_bytes


@pytest.mark.parametrize("how", ["allocated", "hooked"])
def test_direct_holds_the_largest_tensor_at_most(tmp_path: Path, request: pytest.FixtureRequest, how: str) -> None:
    """The ring of `stream` would have 512 MiB here; a chunk 64; and the modules that load themselves, all at once, 512."""
    path, _ = write_large(tmp_path, 512 * MIB, key=".weight" if how == "hooked" else "")
    found = measure(how, path, strategy="direct", host_memory="1GiB", chunk="64MiB", io="buffered")
    sentence = f"{found['peak_bytes'] / MIB:.1f} MiB for tensors of 8 MiB"
    request.node.user_properties.append(("direct", sentence))
    assert found["peak_bytes"] <= 8 * MIB + DIRECT_ALLOWANCE_BYTES, sentence
