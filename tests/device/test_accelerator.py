"""What can be said of the accelerator's driver without one."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import nn

import weightstream as ws
from tests.builders import write_checkpoint
from tests.models import tensors_of
from weightstream.device import accelerator
from weightstream.device.backend import HostBackend
from weightstream.errors import PlacementError
from weightstream.prefetch.arena import Arena
from weightstream.scheduler import consumer
from weightstream.scheduler.engine import Engine
from weightstream.scheduler.handle import in_own_thread
from weightstream.scheduler.loader import make_job
from weightstream.scheduler.machine import Machine
from weightstream.scheduler.sinks import ModelSink


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


@pytest.fixture(name="two_devices")
def fixture_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with cuda:0 and cuda:1, of which the second is the current one."""
    answers = {
        "is_available": True,
        "current_accelerator": torch.device("cuda"),
        "device_count": 2,
        "current_device_index": 1,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.accelerator, name, lambda answer=answer: answer)


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize(
    ("target", "expected"),
    [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu"), ("cpu:0", "cpu")],
)
def test_target_is_a_device_of_this_machine(target: str, expected: str) -> None:
    assert accelerator.find_device(target) == torch.device(expected)


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("target", ["bogus", "meta", "xpu", "cuda:2", "cpu:1", "cuda:01"])
def test_target_that_this_machine_lacks_is_told_with_those_it_has(target: str) -> None:
    with pytest.raises(PlacementError) as caught:
        accelerator.find_device(target)
    assert (caught.value.expected, caught.value.actual) == ("cpu, cuda, cuda:0, cuda:1", target)
    assert str(caught.value).startswith(f"device.target: there is no {target} here: expected cpu, ")
    assert "auto" in str(caught.value.hint)


class PerThread:
    """The driver of two devices, of which each thread has a current one: the first to begin with, as CUDA has it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._local = threading.local()
        self.num_streams_set = 0
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: getattr(self._local, "index", 0))
        monkeypatch.setattr(torch.accelerator, "set_device_index", self.set)
        monkeypatch.setattr(torch.accelerator, "current_stream", self.stream)
        monkeypatch.setattr(torch.accelerator, "set_stream", self.set_stream)
        monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(is_initialized=lambda: True))

    def set(self, index: int) -> None:
        self._local.index = index

    def stream(self, device: torch.device | int) -> tuple[int, str]:
        index = device if isinstance(device, int) else device.index
        return index, getattr(self._local, f"stream_{index}", "default")

    def set_stream(self, stream: tuple[int, str]) -> None:
        """Makes the stream's device current, too, as torch does."""
        index, name = stream
        setattr(self._local, f"stream_{index}", name)
        self.set(index)
        self.num_streams_set += 1


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("target", ["auto", "cuda"])
def test_load_goes_to_the_device_that_is_current_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str
) -> None:
    driver = PerThread(monkeypatch)
    opened: list[torch.device] = []

    def open_backend(device: torch.device) -> HostBackend:
        opened.append(device)
        return HostBackend(Arena().allocate)

    engine = Engine(ws.LoaderConfig(device={"target": target}), Machine(open_backend=open_backend))  # type: ignore[arg-type]
    driver.set(1)
    model = nn.Linear(2, 2, device="meta")
    path = write_checkpoint(tmp_path / "checkpoint", tensors_of(model))
    job = make_job(engine, path, ModelSink(engine, model), accelerator.caller_streams())
    job.start()
    job.finished.result()
    engine.close()
    assert opened == [torch.device("cuda", 1)]


@pytest.mark.usefixtures("two_devices")
def test_device_and_streams_of_the_caller_are_current_on_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the streams only those that the caller has chosen are made current: for the others nothing is touched."""
    driver = PerThread(monkeypatch)

    def look() -> tuple[int, dict[torch.device, object]]:
        return torch.accelerator.current_device_index(), accelerator.caller_streams()

    driver.set_stream((0, "side"))
    driver.set(1)
    here = look()
    assert here == (1, {torch.device("cuda", 0): (0, "side"), torch.device("cuda", 1): (1, "default")})
    result, thread = in_own_thread(accelerator.on_callers_streams(look))
    assert result.result() == here
    thread.join()
    assert driver.num_streams_set == 2  # one here, one there
    elsewhere, thread = in_own_thread(look)
    assert elsewhere.result()[1][torch.device("cuda", 0)] == (0, "default")
    thread.join()


def test_stream_that_is_current_where_a_tensor_is_taken_is_noted_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Who reads on a stream of its own and lets go must not see the next block written to that memory."""
    noted: list[object] = []
    elsewhere = SimpleNamespace(device=torch.device("cuda", 1), record_stream=noted.append)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: f"stream of {device}")
    accelerator.used_here(torch.zeros(2))
    accelerator.used_here(torch.zeros(2, device="meta"))
    assert noted == []
    accelerator.used_here(cast("torch.Tensor", elsewhere))
    assert noted == ["stream of cuda:1"]

    threads: list[threading.Thread] = []
    monkeypatch.setattr(consumer, "used_here", lambda tensor: threads.append(threading.current_thread()))
    path = write_checkpoint(tmp_path / "checkpoint", {"a": torch.zeros(2), "b": torch.zeros(3)})
    found = list(ws.iter_tensors(path, ws.LoaderConfig(device={"target": "cpu"})))  # type: ignore[arg-type]
    assert threads == [threading.current_thread()] * len(found) == [threading.current_thread()] * 2


@pytest.mark.parametrize("target", ["cuda", "cuda:0"])
def test_accelerator_is_no_target_where_torch_finds_none(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert accelerator.find_device("auto") == torch.device("cpu")
    with pytest.raises(PlacementError, match=f"no {target} here: expected cpu, found {target}"):
        accelerator.find_device(target)
