"""Which tensors of a placement come in turns, and what of that is let go."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

from weightstream.device.config import DeviceConfig
from weightstream.device.matching import match
from weightstream.device.placement import Placement
from weightstream.device.turns import find_turns
from weightstream.prefetch.header import TensorSpec


def placement_of(model: nn.Module) -> Placement:
    """For a checkpoint that has all names of the model, in their order."""
    stored: dict[str, TensorSpec] = {}
    end = 0
    for name, tensor in model.state_dict().items():
        stored[name] = TensorSpec(name, "F32", tuple(tensor.shape), 0, end, end + tensor.nbytes)
        end += tensor.nbytes
    return match(model, stored, DeviceConfig(), torch.device("cpu"))


def turns_of(model: nn.Module) -> list[tuple[list[str], list[str]]]:
    """What each turn has, and lets go, by name."""
    placement = placement_of(model)
    turns = find_turns(placement)
    if turns is None:
        return []
    assert turns.of == {place: number for number, turn in enumerate(turns.turns) for place in turn.places}
    return [
        ([placement.places[i].name for i in turn.places], [placement.places[i].name for i in turn.beside])
        for turn in turns.turns
    ]


def hooked(*, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(2, 3, bias=bias)
    cast("Any", layer).register_load_state_dict_pre_hook(lambda *_: None)
    return layer


def test_module_is_one_with_all_below_it() -> None:
    whole = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))
    cast("Any", whole).register_load_state_dict_pre_hook(lambda *_: None)
    names = ["1.0.weight", "1.1.weight"]
    found = turns_of(nn.Sequential(nn.Linear(2, 2), whole, hooked(bias=False)))
    assert found == [(names, names), (["2.weight"], ["2.weight"])]


@pytest.mark.parametrize("count", [0, 1])
def test_single_turn_is_none(count: int) -> None:
    assert turns_of(nn.Sequential(nn.Linear(2, 2), *(hooked() for _ in range(count)))) == []


def test_module_on_meta_has_something_to_let_go_if_hooks_may_make_something_else_of_it() -> None:
    assert turns_of(nn.Sequential(*(nn.BatchNorm1d(3, track_running_stats=False) for _ in range(3))).to("meta")) == []
    found = turns_of(nn.Sequential(hooked(), hooked()).to("meta"))
    assert found == [(["0.weight", "0.bias"], []), (["1.weight", "1.bias"], [])]
    model = nn.Sequential(hooked(), hooked(), hooked().to("meta"))
    model[1].bias = nn.Parameter(torch.empty(3, device="meta"))
    assert turns_of(model) == [
        (["0.weight", "0.bias"], ["0.weight", "0.bias"]),
        (["1.weight", "1.bias"], ["1.weight"]),
        (["2.weight", "2.bias"], []),
    ]


def test_tied_tensor_is_one_under_all_names_and_keeps_the_first() -> None:
    model = nn.Module()
    for key in ("a", "b"):
        model.register_parameter(f"{key}0", nn.Parameter(torch.zeros(3, 4)))
        for number in (1, 2):
            model.register_parameter(f"{key}{number}", model.get_parameter(f"{key}0"))
    assert turns_of(model) == [([f"{key}0", f"{key}1", f"{key}2"], [f"{key}1", f"{key}2"]) for key in "ab"]


def test_tied_tensor_that_is_strided_is_compared_at_the_end() -> None:
    """It is one for being strided already."""
    model = nn.Module()
    for key in ("a", "b"):
        model.register_parameter(f"{key}0", nn.Parameter(torch.zeros(4, 3).t()))
        model.register_parameter(f"{key}1", model.get_parameter(f"{key}0"))
    assert turns_of(model) == [(["a0"], ["a0"]), (["b0"], ["b0"])]


def test_what_lies_in_memory_of_others_is_in_none() -> None:
    model = nn.Sequential(*(hooked(bias=False) for _ in range(4)), nn.Linear(2, 3, bias=False))
    model[1].weight = nn.Parameter(cast("nn.Linear", model[0]).weight.data)
    model[2].weight = nn.Parameter(cast("nn.Linear", model[4]).weight.data)
    assert turns_of(model) == []
    model.append(hooked(bias=False))
    assert turns_of(model) == [(["3.weight"], ["3.weight"]), (["5.weight"], ["5.weight"])]


def test_module_with_a_tensor_that_is_loaded_elsewhere_is_none() -> None:
    """Nor is the tensor, of which the module gets the one under its own name."""
    model = nn.Sequential(nn.Linear(2, 3), hooked(), hooked(), hooked())
    model[1].weight = cast("nn.Linear", model[0]).weight
    assert [names for names, _ in turns_of(model)] == [["2.weight", "2.bias"], ["3.weight", "3.bias"]]
