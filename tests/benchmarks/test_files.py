"""What the measurements stand on: files that are in the page cache or not, memory that is mapped or not, the check."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.checkpoints import Recipe, build, shards_of, write
from benchmarks.memory import mapped_file_bytes, read_every_byte
from benchmarks.residency import evict, fill
from benchmarks.verify import verify
from weightstream import pagecache

RECIPE = Recipe("tiny", 5, 64, 32, 2)
CPU = torch.device("cpu")


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return shards_of(write(RECIPE, tmp_path))


@pytest.fixture
def model(shards: list[Path]) -> nn.Module:
    model = build(RECIPE)
    for shard in shards:
        model.load_state_dict(load_file(shard), assign=True, strict=False)
    return model


def test_other_loaders_read_what_was_written(model: nn.Module, shards: list[Path]) -> None:
    assert verify(model, shards, CPU) == 5


def test_check_finds_one_wrong_bit(model: nn.Module, shards: list[Path]) -> None:
    with torch.no_grad():
        next(model.parameters()).view(torch.int16)[3, 4] ^= 1
    with pytest.raises(ValueError, match=r"layers\.0\.experts\.0\.up\.weight differs"):
        verify(model, shards, CPU)


def test_check_finds_a_parameter_that_is_still_on_meta(shards: list[Path]) -> None:
    with pytest.raises(ValueError, match="is on meta"):
        verify(build(RECIPE), shards, CPU)


def test_check_finds_a_parameter_that_no_file_has(model: nn.Module, shards: list[Path]) -> None:
    model.register_parameter("more", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="the first is more"):
        verify(model, shards, CPU)


def test_mapped_tensors_are_told_from_filled_ones(model: nn.Module) -> None:
    assert mapped_file_bytes(model.parameters()) == 5 * 64 * 32 * 2
    assert mapped_file_bytes([torch.zeros(1000)]) == 0


def test_every_byte_is_read_once() -> None:
    far_apart = torch.zeros(64 * 1024, dtype=torch.uint8)
    first, second = far_apart[:3], far_apart[32 * 1024 :][:17]
    first.fill_(1)
    second.fill_(1)
    word = 0x0101010101010101
    assert read_every_byte([second, first]) == 3 + 2 * word + 1


def test_files_enter_the_page_cache(shards: list[Path]) -> None:
    fill(shards)
    assert pagecache.resident_share(shards) == 1


def test_files_leave_the_page_cache(shards: list[Path]) -> None:
    fill(shards)
    evict(shards)
    if share := pagecache.resident_share(shards):
        pytest.skip(f"this file system keeps {share:.0%} of it: it may live in the page cache")
