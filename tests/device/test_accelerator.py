"""What can be said of the accelerator's driver without one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from weightstream.device import accelerator


@pytest.mark.parametrize(
    ("content", "expected"), [("1\n", 1), ("-1\n", None), ("", None), (None, None)], ids=["node", "none", "odd", "gone"]
)
def test_memory_node_of_a_device_is_what_the_kernel_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, expected: int | None
) -> None:
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    module = SimpleNamespace(get_device_properties=lambda device: properties)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    if content is not None:
        slot = tmp_path / "0000:3b:00.0"
        slot.mkdir()
        (slot / "numa_node").write_text(content)
    assert accelerator.numa_node_of(torch.device("cuda", 0), devices=tmp_path) == expected


def test_memory_node_is_unknown_where_torch_does_not_tell_the_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(get_device_properties=lambda device: SimpleNamespace())
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert accelerator.numa_node_of(torch.device("cuda", 0), devices=tmp_path) is None
