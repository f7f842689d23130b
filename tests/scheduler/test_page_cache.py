"""What a load leaves in the page cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import weightstream as ws
from tests.builders import SINGLE, assert_same, write_in_order
from weightstream import pagecache
from weightstream.prefetch.residency import resident_shares

MIB = 2**20


@pytest.fixture(name="tensors")
def fixture_tensors() -> dict[str, torch.Tensor]:
    """32 MiB, at odd offsets."""
    return {f"t{i}": torch.randint(256, (8 * MIB + i,), dtype=torch.uint8) for i in range(4)}


@pytest.fixture(name="file")
def fixture_file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """One file, of which nothing is in the page cache."""
    file = write_in_order(tmp_path, tensors) / SINGLE
    pagecache.drop([file])
    if pagecache.resident_share([file]):
        pytest.skip("this file system keeps everything in memory")
    return file


def config(**prefetch: Any) -> ws.LoaderConfig:
    sections: dict[str, Any] = {
        "strategy": "stream",
        # One reader: where several read out of order, reading ahead may still be under way at the very end.
        "prefetch": {"io": "buffered", "chunk": MIB, "workers": 1, **prefetch},
        "device": {"target": "cpu"},
    }
    return ws.LoaderConfig(**sections)


def load(file: Path, tensors: dict[str, torch.Tensor], **prefetch: Any) -> None:
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_buffer(name, torch.empty_like(tensor, device="meta"))
    ws.load_sync(model, file, config=config(**prefetch))
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name])


def test_what_was_read_stays_in_the_page_cache(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    load(file, tensors)
    assert pagecache.resident_share([file]) == 1


def test_nothing_that_was_read_stays_with_drop(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    load(file, tensors, page_cache="drop")
    assert pagecache.resident_share([file]) == 0


def test_what_was_there_before_stays_with_drop(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        opened.read(8 * MIB)
        load(file, tensors, page_cache="drop")
        num_bytes = file.stat().st_size
        ranges = [(0, 6 * MIB), (num_bytes - 6 * MIB, num_bytes)]
        assert resident_shares(opened.fileno(), num_bytes, ranges, num_samples=None) == [1, 0]


def test_load_that_fails_leaves_nothing_with_drop(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_buffer(name, torch.empty_like(tensor, device="meta"))
    (file.parent / "SHA256SUMS").write_text(f"{'0' * 64}  {file.name}\n")
    settings = config(page_cache="drop")
    with pytest.raises(ws.IntegrityError):
        ws.load_sync(
            model,
            file,
            config=settings.model_copy(update={"prefetch": settings.prefetch.model_copy(update={"verify": "sha256"})}),
        )
    assert pagecache.resident_share([file]) == 0


async def test_warming_the_page_cache_keeps_what_it_reads(file: Path) -> None:
    async with ws.Loader(config(page_cache="drop")) as loader:
        await loader.warm(file)
    assert pagecache.resident_share([file]) == 1


def test_mapped_tensors_and_an_empty_page_cache_contradict_each_other() -> None:
    with pytest.raises(ValidationError, match="strategy: map keeps tensors in the page cache"):
        ws.LoaderConfig(strategy="map", prefetch={"page_cache": "drop"})  # type: ignore[arg-type]  # pydantic makes it
