"""Turns: with `direct`, modules that load themselves and have storage do so one after the other, and let go at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import weightstream as ws
from tests.builders import assert_same, leaves_nothing, write_in_order, write_sums
from tests.fakes.rig import KIB, Rig
from tests.models import tensors_of
from weightstream.device.layout import padded
from weightstream.device.turns import Turn, Turns
from weightstream.scheduler import staging
from weightstream.scheduler.turns import TurnByTurn

MakeRig = Callable[..., Rig]

WIDTH = 48


class Witness:
    """A hook for many modules: notes in which order they load, what was read by then, and what lives of what was given."""

    def __init__(self, rig: Rig | None = None) -> None:
        self.rig = rig
        self.order: list[str] = []
        self.num_begun: list[int] = []
        self.num_alive: list[int] = []
        self.fails_at = -1
        self._given: list[weakref.ref[torch.Tensor]] = []

    def watch(self, module: nn.Module) -> None:
        cast("Any", module).register_load_state_dict_pre_hook(self)

    def __call__(self, module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
        if len(self.order) == self.fails_at:
            raise RuntimeError("half-way")
        self.order.append(prefix[:-1])
        self.num_begun.append(0 if self.rig is None else self.rig.disk.num_begun)
        self.num_alive.append(sum(ref() is not None for ref in self._given))
        self._given += map(weakref.ref, state.values())


def hooked(witness: Witness, *, width: int = WIDTH) -> nn.Sequential:
    """Linear layers with storage, each larger than the one before, all of which load themselves."""
    layers = [nn.Linear(width, width * (number + 1)) for number in range(5)]
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        witness.watch(layer)
    return nn.Sequential(*layers)


def scattered(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same in an order that takes modules apart: all biases, the last one first, then all weights."""
    return dict(sorted(tensors.items(), key=lambda item: (item[0].endswith("weight"), -int(item[0][0]))))


def assert_loaded(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name])


orders = pytest.mark.parametrize("order", ["model", "file"])


def test_first_turn_begins_when_all_that_is_in_none_has_been_placed() -> None:
    """Hooks may look at it: another reader may still be reading it when the first tensor of a turn could be."""
    turns = TurnByTurn(Turns((Turn((1,), (1,)), Turn((2, 4), (2, 4))), {1: 0, 2: 1, 4: 1}), num_places=5)
    assert turns.admit(0)
    assert not turns.admit(1)
    assert turns.completed([0]) == []
    assert not turns.admit(1)
    assert turns.admit(3)
    assert turns.completed([3]) == []
    assert turns.admit(1)
    assert not turns.admit(2)
    assert [turn.places for turn in turns.completed([1])] == [(1,)]
    assert not turns.admit(2)
    turns.end()
    assert turns.admit(2)
    assert turns.admit(4)
    assert [turn.places for turn in turns.completed([2, 4])] == [(2, 4)]


@orders
async def test_no_module_s_tensors_are_read_before_the_one_before_has_let_go_of_its_own(
    rig: Rig, tmp_path: Path, order: str
) -> None:
    witness = Witness(rig)
    model = hooked(witness)
    tensors = tensors_of(model)
    path = write_in_order(tmp_path, scattered(tensors), num_shards=2)
    async with rig.loader(strategy="direct", scheduler={"order": order, "adaptive": False}) as loader:
        report = await loader.load(model, path)
    assert_loaded(model, tensors)
    assert witness.num_alive == [0] * 5
    assert witness.num_begun == [2, 4, 6, 8, 10]  # a weight and a bias for each
    assert witness.order == list("01234")  # as without turns, whatever the order of the files
    (said,) = [sentence for sentence in report.fallbacks if "hooks of their own" in sentence]
    assert "0 (Linear), 1 (Linear)" in said


@pytest.mark.parametrize("strategy", ["stream", "preload"])
async def test_other_strategies_place_modules_that_load_themselves_at_the_end(
    rig: Rig, tmp_path: Path, strategy: str
) -> None:
    witness = Witness(rig)
    model = nn.Sequential(*hooked(witness), nn.Linear(WIDTH, 3))
    tensors = tensors_of(model)
    async with rig.loader(strategy=strategy) as loader:
        await loader.load(model, write_in_order(tmp_path, tensors))
    assert_loaded(model, tensors)
    assert witness.order == list("01234")
    assert set(witness.num_begun) == {rig.disk.num_begun}


@pytest.mark.parametrize("settings", [{"commit": "atomic"}, {"verify": "sha256"}], ids=["atomic", "verified"])
async def test_what_cannot_come_in_turns_is_placed_at_the_end(
    make_rig: MakeRig, tmp_path: Path, settings: dict[str, Any]
) -> None:
    rig = make_rig("host")
    witness = Witness(rig)
    model = hooked(witness)
    tensors = tensors_of(model)
    path = write_in_order(tmp_path, tensors)
    write_sums(path)
    async with rig.loader(strategy="direct", **settings) as loader:
        report = await loader.load(model, path)
    assert_loaded(model, tensors)
    assert set(witness.num_begun) == {rig.disk.num_begun}
    assert report.host_peak_bytes >= sum(tensor.nbytes for tensor in tensors.values())


async def test_module_partly_on_meta_lets_go_of_what_it_does_not_keep(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig("host")
    witness = Witness(rig)
    model = hooked(witness)
    for layer in model:
        layer.bias = nn.Parameter(torch.empty_like(cast("Any", layer).bias, device="meta"))
    tensors = tensors_of(model)
    path = write_in_order(tmp_path, scattered(tensors))
    async with rig.loader(strategy="direct") as loader:
        report = await loader.load(model, path)
    assert_loaded(model, tensors)
    kept = sum(padded(tensor.nbytes) for name, tensor in tensors.items() if name.endswith("bias"))
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert kept + largest >= report.host_peak_bytes >= largest


@pytest.mark.parametrize("begins", ["meta", "cpu"])
async def test_what_a_module_takes_under_another_name_counts_while_it_keeps_it(
    make_rig: MakeRig, tmp_path: Path, begins: str
) -> None:
    rig = make_rig("host")

    def rename(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
        state[f"{prefix}weight"] = state.pop(f"{prefix}old")

    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH * (i + 1), bias=False, device=begins) for i in range(3)))
    for layer in model:
        cast("Any", layer).register_load_state_dict_pre_hook(rename)
    tensors = tensors_of(model)
    path = write_in_order(tmp_path, {name.replace("weight", "old"): tensor for name, tensor in tensors.items()})
    async with rig.loader(strategy="direct") as loader:
        report = await loader.load(model, path)
    assert_loaded(model, tensors)
    sizes = [padded(tensor.nbytes) for tensor in tensors.values()]
    assert report.host_peak_bytes == (sum(sizes) if begins == "meta" else max(sizes))


@pytest.mark.parametrize("device", ["host", "fake"])
async def test_strided_parameters_come_in_turns_too(make_rig: MakeRig, tmp_path: Path, device: str) -> None:
    rig = make_rig(device)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH * (i + 1), bias=False) for i in range(3)))
    for layer in model:
        weight = cast("Any", layer).weight
        layer.weight = nn.Parameter(torch.zeros(weight.shape[::-1]).t())
    tensors = tensors_of(model)
    path = write_in_order(tmp_path, scattered(tensors))
    async with rig.loader(strategy="direct") as loader:
        report = await loader.load(model, path)
    assert_loaded(model, tensors)
    assert not cast("Any", model[0]).weight.is_contiguous()
    largest = max(tensor.nbytes for tensor in tensors.values())
    slot_bytes = -(-largest // (4 * KIB)) * 4 * KIB
    assert report.host_peak_bytes == (
        slot_bytes if device == "fake" else largest
    )  # which is read to where it is staged
    assert report.device_peak_bytes == (largest if device == "fake" else 0)


@pytest.mark.parametrize("begins", ["meta", "cpu"])
@pytest.mark.parametrize("different", [False, True], ids=["equal", "different"])
async def test_tied_tensors_under_several_names_are_compared_in_turns(
    rig: Rig,
    tmp_path: Path,
    begins: str,
    different: bool,  # noqa: FBT001
) -> None:
    """The first of three pairs is there under a third name, too; only one tensor is held beside the model at a time."""
    model = nn.Module()
    for number in range(3):
        weight = nn.Parameter(torch.zeros(WIDTH, WIDTH * (number + 1), device=begins))
        for name in ("a", "b", "c") if number == 0 else ("a", "b"):
            model.register_parameter(f"{name}{number}", weight)
    tensors = {f"a{number}": torch.rand(WIDTH, WIDTH * (number + 1)) for number in range(3)}
    tensors |= {name: tensors[f"a{name[1]}"].clone() for name in ("b0", "b1", "b2", "c0")}
    if different:
        tensors["b1"][3, 3] += 1
    path = write_in_order(tmp_path, tensors)
    async with rig.loader(strategy="direct") as loader:
        if different:
            with pytest.raises(ws.PlacementError, match=r"b1 .*the model ties this tensor to a1"):
                await loader.load(model, path)
            assert all(parameter.is_meta == (begins == "meta") for parameter in model.parameters())
            return
        report = await loader.load(model, path)
    assert_loaded(model, tensors)
    assert cast("Any", model).a0 is cast("Any", model).c0
    if rig.device == "host" and rig.io == "buffered":
        sizes = [padded(tensors[f"a{number}"].nbytes) for number in range(3)]
        kept_bytes = sum(sizes) if begins == "meta" else 28 * KIB  # in storage, a slot of whole pages for the largest
        assert report.host_peak_bytes == kept_bytes + sizes[2]


async def test_budget_has_to_hold_one_module_and_not_all(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig("host")
    model = hooked(Witness(), width=2 * WIDTH)
    tensors = tensors_of(model)
    path = write_in_order(tmp_path, scattered(tensors))
    enough = sum(padded(tensors[f"4.{key}"].nbytes) for key in ("weight", "bias"))
    async with rig.loader(strategy="direct", host_memory=enough - 1) as loader:
        with pytest.raises(ws.MemoryBudgetError, match=f"Set prefetch.host_memory to {enough} bytes"):
            await loader.load(model, path)
    assert rig.disk.num_begun == 0
    async with rig.loader(host_memory=enough) as loader:
        report = await loader.load(model, path)
    assert_loaded(model, tensors)
    assert report.strategy == "direct"
    assert "beside the model at once, but in turns" in report.reason


async def test_memory_that_is_free_has_to_hold_one_module_and_a_slot(
    make_rig: MakeRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig("host")
    model = nn.Sequential(*hooked(Witness(), width=2 * WIDTH), nn.Linear(2 * WIDTH, 200))
    tensors = tensors_of(model)
    path = write_in_order(tmp_path, scattered(tensors))
    enough = 64 * KIB + sum(padded(tensors[f"4.{key}"].nbytes) for key in ("weight", "bias"))
    free_bytes = enough * 8 // 7 + KIB  # of which host_memory gets seven eighths
    assert free_bytes < sum(tensor.nbytes for name, tensor in tensors.items() if name[0] != "5")
    monkeypatch.setattr(staging, "available_bytes", lambda: free_bytes)
    async with rig.loader(strategy="direct") as loader:
        report = await loader.load(model, path)
    assert_loaded(model, tensors)
    assert report.host_peak_bytes >= enough


async def test_read_that_fails_leaves_what_has_had_its_turn_written_and_says_so(rig: Rig, tmp_path: Path) -> None:
    witness = Witness(rig)
    model = nn.Sequential(*hooked(witness), nn.Linear(WIDTH, 3, device="meta"))
    tensors = tensors_of(model)
    path = write_in_order(tmp_path, tensors)
    rig.disk.fail_at(3, ws.ReadError("broken"))
    with leaves_nothing():
        async with rig.loader(strategy="direct", workers=1, scheduler={"adaptive": False}) as loader:
            with pytest.raises(ws.ReadError, match="broken") as caught:
                await loader.load(model, path)
            done = [f"{name}.{key}" for name in witness.order for key in ("weight", "bias")]
            assert done
            assert list(caught.value.partly_written) == done
            assert all(parameter.any() == (name in done) for name, parameter in list(model.named_parameters())[:-2])
            assert cast("Any", model[5]).weight.is_meta
            await loader.load(model, path)
    assert_loaded(model, tensors)


async def test_module_that_fails_in_its_turn_ends_the_load_and_is_named(rig: Rig, tmp_path: Path) -> None:
    witness = Witness(rig)
    witness.fails_at = 2
    model = nn.Sequential(nn.Linear(WIDTH, 3, device="meta"), *hooked(witness))
    tensors = tensors_of(model)
    path = write_in_order(tmp_path, tensors)
    with leaves_nothing():
        async with rig.loader(strategy="direct") as loader:
            with pytest.raises(
                ws.PlacementError, match=r"3 \(Linear\), which loads itself, failed: half-way"
            ) as caught:
                await loader.load(model, path)
            assert caught.value.partly_written == tuple(f"{n}.{key}" for n in "123" for key in ("weight", "bias"))
            assert str(tmp_path) in str(caught.value)
            assert cast("Any", model[0]).weight.is_meta
            witness.fails_at = -1
            await loader.load(model, path)
    assert_loaded(model, tensors)


async def test_load_is_cancelled_between_turns_and_leaves_nothing(rig: Rig, tmp_path: Path) -> None:
    witness = Witness(rig)
    model = hooked(witness)
    path = write_in_order(tmp_path, tensors_of(model))
    gate = rig.disk.stop_at(2)
    with leaves_nothing():
        async with rig.loader(strategy="direct", workers=1, scheduler={"adaptive": False}) as loader:
            handle = await loader.start(model, path)
            gate.wait_reached()
            handle_cancel = handle.cancel()
            gate.open()
            await handle_cancel
            with pytest.raises(ws.LoadCancelledError):
                await handle.wait()
    assert witness.order in (["0"], ["0", "1"])


@orders
async def test_missing_and_unexpected_keys_are_said_as_without_turns(rig: Rig, tmp_path: Path, order: str) -> None:
    """At the end, in the order of the model, whatever order they were read in."""
    model = hooked(Witness())
    tensors = tensors_of(model)
    del tensors["1.bias"], tensors["3.weight"]
    tensors |= {"2.more": torch.zeros(3), "0.more": torch.zeros(3)}
    path = write_in_order(tmp_path, dict(reversed(tensors.items())))
    found: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    scheduler = {"order": order}
    for strategy in ("stream", "direct"):
        async with rig.loader(strategy=strategy, strict=False, scheduler=scheduler) as loader:
            report = await loader.load(model, path)
            found.append((report.missing_keys, report.unexpected_keys))
    assert found == [(("1.bias", "3.weight"), ("0.more", "2.more"))] * 2
    async with rig.loader(strategy="direct", scheduler=scheduler) as loader:
        with pytest.raises(ws.UnexpectedKeysError, match=r"says 0 \(Linear\), which loads itself"):
            await loader.load(model, path)


async def test_module_is_ready_when_its_turn_is_over(rig: Rig, tmp_path: Path) -> None:
    model = hooked(Witness())
    tensors = tensors_of(model)
    path = write_in_order(tmp_path, tensors)
    gate = rig.disk.stop_at(4)
    async with rig.loader(strategy="direct", workers=1, scheduler={"adaptive": False}) as loader:
        handle = await loader.start(model, path)
        gate.wait_reached()
        await handle.ready("0")
        assert_same(cast("Any", model[0]).weight, tensors["0.weight"])
        gate.open()
        await handle.wait()


def tied(model: nn.Sequential) -> None:
    cast("Any", model[1]).weight = cast("Any", model[0]).weight


def views(model: nn.Sequential) -> None:
    """The first rows of one are the rows of the other."""
    cast("Any", model[0]).weight = nn.Parameter(cast("Any", model[4]).weight.data[:WIDTH])


@pytest.mark.parametrize("entangle", [tied, views])
async def test_modules_whose_memory_others_have_too_are_placed_at_the_end(
    rig: Rig, tmp_path: Path, entangle: Callable[[nn.Sequential], None]
) -> None:
    """In the order of the model, because that decides what is there in the end."""
    witness = Witness(rig)
    model = hooked(witness)
    if entangle is tied:
        model[1] = nn.Linear(WIDTH, WIDTH)
        witness.watch(model[1])
    entangle(model)
    tensors = tensors_of(model)
    if entangle is tied:
        tensors["1.weight"] = tensors["0.weight"].clone()
    path = write_in_order(tmp_path, dict(reversed(tensors.items())))
    async with rig.loader(strategy="direct", scheduler={"order": "file"}) as loader:
        await loader.load(model, path)
    loaded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(tensors)
    assert_loaded(model, loaded)
    assert witness.order[:5] == (list("23401") if entangle is tied else list("12304"))


def joined(state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
    state[f"{prefix}weight"] = torch.cat([state.pop(f"{prefix}q"), state.pop(f"{prefix}k")])


def sliced(state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
    state[f"{prefix}weight"] = state[f"{prefix}weight"][:WIDTH]


def doubled(state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
    state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2


@pytest.mark.parametrize("fails", [False, True], ids=["loaded", "failed"])
@pytest.mark.parametrize("hook", [joined, sliced, doubled])
async def test_modules_on_meta_let_go_of_what_their_hooks_have_made_something_else_of(
    make_rig: MakeRig, tmp_path: Path, hook: Callable[..., None], *, fails: bool
) -> None:
    rig = make_rig("host")
    witness = Witness(rig)
    rows = WIDTH * (2 if hook is joined else 1)
    model = nn.Sequential(*(nn.Linear(WIDTH, rows, bias=False, device="meta") for _ in range(6)))
    for layer in model:
        witness.watch(layer)
        cast("Any", layer)._register_load_state_dict_pre_hook(hook)
    names = ("q", "k") if hook is joined else ("weight",)
    shape = (WIDTH * (4 if hook is sliced else 1), WIDTH)
    tensors = {f"{number}.{name}": torch.rand(shape) for number in range(6) for name in names}
    path = write_in_order(tmp_path, tensors)
    witness.fails_at = 4 if fails else -1
    if fails:
        async with rig.loader(strategy="direct") as loader:
            with pytest.raises(ws.PlacementError, match=r"4 \(Linear\), which loads itself, failed: half-way"):
                await loader.load(model, path)
        assert all(parameter.is_meta for parameter in model.parameters())
        return
    largest_turn = sum(tensors[f"0.{name}"].nbytes for name in names)
    async with rig.loader(strategy="direct", host_memory=160 * KIB) as loader:
        report = await loader.load(model, path)
    assert witness.num_alive == [0] * 6
    expected = nn.Sequential(*(nn.Linear(WIDTH, rows, bias=False) for _ in range(6)))
    for layer in expected:
        cast("Any", layer)._register_load_state_dict_pre_hook(hook)
    expected.load_state_dict(tensors)
    assert_loaded(model, expected.state_dict())
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert report.host_peak_bytes == model_bytes + largest_turn


async def test_what_hooks_of_a_model_on_meta_slice_off_counts_towards_the_budget(
    make_rig: MakeRig, tmp_path: Path
) -> None:
    rig = make_rig("host")

    def build() -> nn.Sequential:
        model = nn.Sequential(*(nn.Linear(2 * WIDTH, WIDTH, bias=False, device="meta") for _ in range(10)))
        for layer in model:
            cast("Any", layer)._register_load_state_dict_pre_hook(sliced)
        return model

    tensors = {f"{number}.weight": torch.rand(2 * WIDTH, 2 * WIDTH) for number in range(10)}
    path = write_in_order(tmp_path, tensors)
    beside_bytes = 10 * 2 * WIDTH * WIDTH * 4
    async with rig.loader(strategy="stream", host_memory=beside_bytes - 1) as loader:
        with pytest.raises(ws.MemoryBudgetError, match=f"Set prefetch.host_memory to {beside_bytes} bytes or more, or"):
            await loader.load(build(), path)
    model = build()
    async with rig.loader(strategy="auto", host_memory=beside_bytes - 1) as loader:
        report = await loader.load(model, path)
    assert report.strategy == "direct"
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name][:WIDTH])
