"""Two loads into the same parameters: the second is refused, and nothing of it is left."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.builders import write_checkpoint
from tests.models import tensors_of
from weightstream import LoaderConfig, load_sync
from weightstream.device.claims import claim, num_ended
from weightstream.device.config import DeviceConfig
from weightstream.device.placement import Place, Placement
from weightstream.errors import PlacementError

LIMIT_S = 20
CPU = LoaderConfig.model_validate({"device": {"target": "cpu"}})


def halted(module: nn.Module) -> tuple[threading.Event, threading.Event]:
    """Have loads of a module stop in the middle: an event that says so, and one that they wait for."""
    reached, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        reached.set()
        assert go_on.wait(LIMIT_S)

    register: Callable[..., object] = module.register_load_state_dict_pre_hook  # torch gives it no types
    register(wait)
    return reached, go_on


@pytest.mark.parametrize("where", ["meta", "cpu"])
def test_second_load_into_a_shared_module_is_refused_until_the_first_has_ended(tmp_path: Path, where: str) -> None:
    with torch.device(where):
        shared, hooked = nn.Linear(4, 4), nn.Linear(4, 4)
        first, second = nn.Sequential(shared, hooked), nn.Sequential(shared, nn.Linear(4, 4))
    reached, go_on = halted(hooked)
    stored = {
        name: torch.rand_like(tensor)
        for name, tensor in tensors_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))).items()
    }
    path = write_checkpoint(tmp_path / "c", stored)
    thread = threading.Thread(target=load_sync, args=(first, path), kwargs={"config": CPU})
    thread.start()
    assert reached.wait(LIMIT_S)
    with pytest.raises(PlacementError, match="another load, which has not ended") as caught:
        load_sync(second, path, config=CPU)
    assert caught.value.tensor in ("0.weight", "0.bias")
    go_on.set()
    thread.join(LIMIT_S)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in first.state_dict().items())
    load_sync(second, path, config=CPU)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in second.state_dict().items())


def detached(first: nn.Linear, second: nn.Linear) -> None:
    second.weight = nn.Parameter(first.weight.detach())


def overlapping(first: nn.Linear, second: nn.Linear) -> None:
    buffer = torch.zeros(20)
    first.weight, second.weight = nn.Parameter(buffer[:16].view(4, 4)), nn.Parameter(buffer[4:].view(4, 4))


def halves_of_one_buffer(first: nn.Linear, second: nn.Linear) -> None:
    buffer = torch.zeros(2, 4, 4)
    first.weight, second.weight = nn.Parameter(buffer[0]), nn.Parameter(buffer[1])


@pytest.mark.parametrize(
    ("share", "is_refused"), [(detached, True), (overlapping, True), (halves_of_one_buffer, False)]
)
@pytest.mark.parametrize("commit", ["progressive", "atomic"])
def test_memory_is_filled_by_one_load_at_a_time(
    tmp_path: Path, share: Callable[[nn.Linear, nn.Linear], None], commit: str, *, is_refused: bool
) -> None:
    config = LoaderConfig.model_validate({"device": {"target": "cpu", "commit": commit}})
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    share(first, second)
    held = nn.Sequential(first, nn.Linear(4, 4))
    reached, go_on = halted(held[1])
    stored = {name: torch.ones(tensor.shape) for name, tensor in held.state_dict().items()}
    path = write_checkpoint(tmp_path / "first", stored)
    other = write_checkpoint(tmp_path / "second", {"weight": torch.zeros(4, 4), "bias": torch.zeros(4)})
    thread = threading.Thread(target=load_sync, args=(held, path), kwargs={"config": config})
    thread.start()
    assert reached.wait(LIMIT_S)
    with pytest.raises(PlacementError, match="another load") if is_refused else nullcontext():
        load_sync(second, other, config=config)
    go_on.set()
    thread.join(LIMIT_S)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in held.state_dict().items())
    if not is_refused:
        assert not second.weight.any()


@pytest.mark.parametrize(
    ("where", "has_ended", "is_refused"), [("cpu", 1, True), ("meta", 1, False), ("cpu", 0, False)]
)
def test_load_whose_parameters_were_filled_while_it_was_checked_is_refused(
    where: str, has_ended: int, *, is_refused: bool
) -> None:
    """Between its look at the model and its claim, another load may have ended."""
    place = Place("weight", 8, torch.float32, torch.float32, (2,), "adopt", 0, torch.empty(2, device=where))
    placement = Placement((torch.device("cpu"),), {}, DeviceConfig())
    placement.places.append(place)
    ended = num_ended() - has_ended
    with pytest.raises(PlacementError, match="has filled") if is_refused else nullcontext(), claim(placement, ended):
        assert not is_refused
    with claim(placement, num_ended()):
        pass


def test_parts_of_one_model_are_loaded_at_the_same_time(tmp_path: Path) -> None:
    """Also where modules that load themselves are among those that a load leaves out."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    reached, go_on = halted(model[1])
    stored = {name: torch.ones(tensor.shape).to(tensor.dtype) for name, tensor in model.state_dict().items()}
    path = write_checkpoint(tmp_path / "c", stored)
    first, second = (
        LoaderConfig.model_validate({"device": {"target": "cpu", "include": [f"^{part}"]}}) for part in ("1", "[02]")
    )
    thread = threading.Thread(target=load_sync, args=(model, path), kwargs={"config": first})
    thread.start()
    assert reached.wait(LIMIT_S)
    load_sync(model, path, config=second)
    go_on.set()
    thread.join(LIMIT_S)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
