"""Tensors that are tied to those of modules that load themselves: the last name that is loaded decides, as in torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.builders import assert_same, bytes_of, random_tensors, write_in_order
from tests.fakes.rig import Rig
from weightstream.errors import MissingKeysError, PlacementError
from weightstream.scheduler.report import LoadReport

commits = pytest.mark.parametrize("commit", ["progressive", "atomic"])
places = pytest.mark.parametrize("where", ["meta", "cpu"], ids=["adopt", "in-place"])


async def load(rig: Rig, folder: Path, model: nn.Module, tensors: dict[str, torch.Tensor], **device: Any) -> LoadReport:
    path = write_in_order(folder / "checkpoint", tensors)
    async with rig.loader(num_slots=4, **device) as loader:
        return await loader.load(model, path)


def before_loading(module: nn.Module, hook: Callable[..., None]) -> None:
    register: Callable[..., object] = module.register_load_state_dict_pre_hook  # torch gives it no types
    register(hook)


def after_loading(module: nn.Module, hook: Callable[..., None]) -> None:
    register: Callable[..., object] = module.register_load_state_dict_post_hook
    register(hook)


def plain() -> nn.Module:
    return nn.Linear(3, 3, bias=False)


def twice() -> nn.Module:
    """Computes its weight from what it is given."""

    def double(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        if f"{prefix}weight" in state:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2

    module = plain()
    before_loading(module, double)
    return module


def tripled() -> nn.Module:
    """Changes its weight where it is, once that has been loaded."""

    @torch.no_grad()
    def triple(module: nn.Module, _: object) -> None:
        module.get_parameter("weight").mul_(3)

    module = plain()
    after_loading(module, triple)
    return module


def strict_one() -> nn.Module:
    """Fails where it is not given its weight."""

    def negate(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        state[f"{prefix}weight"] = -state[f"{prefix}weight"]

    module = plain()
    before_loading(module, negate)
    return module


def tied(*kinds: Callable[[], nn.Module], where: str, hooked: bool = False) -> nn.Sequential:
    with torch.device(where):
        model = nn.Sequential(*(kind() for kind in kinds), nn.Linear(3, 3))
    for module in list(model)[1 : len(kinds)]:
        module.weight = model[0].weight
    if hooked:
        after_loading(model, lambda *_: None)
    return model


pairs = pytest.mark.parametrize(
    "kinds",
    [
        (plain, twice),
        (twice, plain),
        (plain, tripled),
        (tripled, plain),
        (twice, tripled),
        (twice, plain, tripled),
        (strict_one, plain),
        (plain, strict_one),
    ],
    ids=lambda kinds: "-".join(kind.__name__ for kind in kinds),
)


@pairs
@pytest.mark.parametrize("names", ["0", "1", "01", "10"])
@pytest.mark.parametrize("hooked", [False, True], ids=["", "below a hook"])
@commits
@places
async def test_last_name_that_is_loaded_decides(
    rig: Rig,
    tmp_path: Path,
    kinds: tuple[Callable[[], nn.Module], ...],
    names: str,
    hooked: bool,  # noqa: FBT001
    commit: str,
    where: str,
) -> None:
    weight = torch.randn(3, 3)
    rest = {f"{len(kinds)}.{name}": tensor for name, tensor in plain_linear().items()}
    stored = {f"{name}.weight": weight for name in names} | rest
    reference = tied(*kinds, where="cpu", hooked=hooked)
    model = tied(*kinds, where=where, hooked=hooked)
    before = dict(model.named_parameters())
    try:
        reference.load_state_dict(dict(stored), strict=False)
    except KeyError:
        with pytest.raises(PlacementError, match=r"\.weight"):
            await load(rig, tmp_path, model, stored, commit=commit)
        assert [parameter.is_meta for parameter in model.parameters()] == [where == "meta"] * 3
        return
    report = await load(rig, tmp_path, model, stored, commit=commit)
    assert report.missing_keys == report.unexpected_keys == ()
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    assert all(module.weight is model[0].weight for module in list(model)[: len(kinds)])
    for name, tensor in reference.state_dict().items():
        assert_same(model.state_dict()[name], tensor)


def plain_linear() -> dict[str, torch.Tensor]:
    return random_tensors({"weight": (3, 3), "bias": (3,)})


@pairs
@pytest.mark.parametrize("hooked", [False, True], ids=["", "below a hook"])
@places
async def test_other_values_under_another_name_are_refused(
    rig: Rig,
    tmp_path: Path,
    kinds: tuple[Callable[[], nn.Module], ...],
    hooked: bool,  # noqa: FBT001
    where: str,
) -> None:
    model = tied(*kinds, where=where, hooked=hooked)
    stored = {f"{name}.weight": torch.randn(3, 3) for name in range(len(kinds))}
    stored |= {f"{len(kinds)}.{name}": tensor for name, tensor in plain_linear().items()}
    with pytest.raises(PlacementError, match="ties this tensor"):
        await load(rig, tmp_path, model, stored)
    assert [parameter.is_meta for parameter in model.parameters()] == [where == "meta"] * 3


@pairs
@pytest.mark.parametrize("hooked", [False, True], ids=["", "below a hook"])
async def test_missing_names_are_those_of_torch(
    rig: Rig,
    tmp_path: Path,
    kinds: tuple[Callable[[], nn.Module], ...],
    hooked: bool,  # noqa: FBT001
) -> None:
    if strict_one in kinds:
        kinds = tuple(plain if kind is strict_one else kind for kind in kinds)
    stored = {f"{len(kinds)}.{name}": tensor for name, tensor in plain_linear().items()}
    missing = tied(*kinds, where="cpu", hooked=hooked).load_state_dict(stored, strict=False).missing_keys
    model = tied(*kinds, where="cpu", hooked=hooked)
    report = await load(rig, tmp_path, model, stored, strict=False)
    assert sorted(report.missing_keys) == sorted(missing) == [f"{index}.weight" for index in range(len(kinds))]
    with pytest.raises(MissingKeysError):
        await load(rig, tmp_path, model, stored)


@places
async def test_hooks_below_a_module_that_only_hooks_after_loading_may_slice(
    rig: Rig, tmp_path: Path, where: str
) -> None:
    def slice_rows(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        state[f"{prefix}weight"] = state[f"{prefix}weight"][:2]

    inner = nn.Linear(3, 2, bias=False, device=where)
    before_loading(inner, slice_rows)
    model = nn.Sequential(inner)
    after_loading(model, lambda *_: None)
    whole = torch.randn(4, 3)
    await load(rig, tmp_path, model, {"0.weight": whole})
    assert_same(inner.weight, whole[:2])


def caching() -> nn.Module:
    """Keeps something that it has computed of its weight."""

    def keep(module: nn.Module, _: object) -> None:
        module.cache = module.get_parameter("weight").detach().t().contiguous()

    module = plain()
    after_loading(module, keep)
    return module


@commits
@places
@pytest.mark.parametrize("names", ["0", "1", "01"])
async def test_hook_sees_the_tied_weight_that_was_loaded(
    rig: Rig, tmp_path: Path, where: str, commit: str, names: str
) -> None:
    weight = torch.randn(3, 3)
    rest = {f"2.{name}": tensor for name, tensor in plain_linear().items()}
    model = tied(plain, caching, where=where)
    report = await load(rig, tmp_path, model, {f"{name}.weight": weight for name in names} | rest, commit=commit)
    cache = model[1].cache
    assert isinstance(cache, torch.Tensor)
    assert_same(cache, weight.t().contiguous())
    said = any("what else their hooks may change" in sentence for sentence in report.fallbacks)
    assert said == (commit == "atomic")


@places
async def test_tied_weight_is_put_back_when_a_module_behind_it_fails(rig: Rig, tmp_path: Path, where: str) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("half-way")

    model = tied(plain, caching, twice, where=where)
    after_loading(model[3], fail)
    before = {name: None if tensor.is_meta else bytes_of(tensor) for name, tensor in model.named_parameters()}
    weight = torch.randn(3, 3)
    rest = {f"3.{name}": tensor for name, tensor in plain_linear().items()}
    with pytest.raises(PlacementError, match="half-way") as caught:
        await load(rig, tmp_path, model, {"0.weight": weight, "2.weight": weight} | rest, commit="atomic")
    assert caught.value.partly_written == ()
    for name, tensor in model.named_parameters():
        assert (None if tensor.is_meta else bytes_of(tensor)) == before[name], name


@pytest.mark.parametrize("hook", [before_loading, after_loading], ids=["pre", "post"])
@pytest.mark.parametrize("first_too", [False, True], ids=["", "the first too"])
@pytest.mark.parametrize("names", ["0", "1", "10"])
@commits
async def test_module_that_a_map_leaves_on_meta_takes_no_tensor_along(
    make_rig: Callable[..., Rig],
    tmp_path: Path,
    hook: Callable[..., None],
    first_too: bool,  # noqa: FBT001
    names: str,
    commit: str,
) -> None:
    """A tied tensor goes to where the map sends its first name."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3), nn.LayerNorm(3))
    model[1].weight = model[0].weight
    for module in list(model)[0 if first_too else 1 : 2]:
        hook(module, lambda *_: None)
    weight = torch.randn(3, 3)
    rest = random_tensors({"1.bias": (3,), "2.weight": (3,), "2.bias": (3,)})
    path = write_in_order(tmp_path / "checkpoint", {f"{name}.weight": weight for name in names} | rest)
    async with make_rig("host").loader(commit=commit, device_map={"": "cpu", "1": "meta"}) as loader:
        report = await loader.load(model, path)
    assert_same(model.get_parameter("0.weight"), weight)
    assert model[1].weight is model[0].weight
    assert_same(model.get_parameter("2.weight"), rest["2.weight"])
    assert (report.missing_keys, report.unexpected_keys) == ((), ())
    assert report.unloaded_keys == ("1.bias",)


def five_times(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    state.update({key: value * 5 for key, value in state.items() if key.startswith(prefix)})


def seven_times(module: nn.Module, _: object) -> None:
    module.get_parameter("0.weight").data.mul_(7)


@pytest.mark.parametrize("parent", [before_loading, after_loading, None], ids=["pre", "post", "child alone"])
@pytest.mark.parametrize("child", [plain, twice, tripled], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("inside_first", [True, False], ids=["inside first", "outside first"])
@pytest.mark.parametrize("names", [("inside.0",), ("outside",), ("inside.0", "outside")], ids="+".join)
@places
async def test_module_that_is_registered_inside_and_outside_of_one_with_hooks(
    rig: Rig,
    tmp_path: Path,
    parent: Callable[..., None] | None,
    child: Callable[[], nn.Module],
    inside_first: bool,  # noqa: FBT001
    names: tuple[str, ...],
    where: str,
) -> None:
    def make(device: str) -> nn.Module:
        with torch.device(device):
            inner = child()
        inside = nn.Sequential(inner)
        if parent is before_loading:
            before_loading(inside, five_times)
        elif parent is after_loading:
            after_loading(inside, seven_times)
        parts = {"inside": inside, "outside": inner}
        return nn.ModuleDict({name: parts[name] for name in sorted(parts, reverse=not inside_first)})

    weight = torch.randn(3, 3)
    stored = {f"{name}.weight": weight.clone() for name in names}
    reference, model = make("cpu"), make(where)
    reference.load_state_dict(dict(stored), strict=False)
    await load(rig, tmp_path, model, stored)
    if child is tripled and len(names) == 1:
        return  # what changes its weight once more each time that it is asked to is asked as often as torch asks
    for name, tensor in reference.state_dict().items():
        assert_same(model.state_dict()[name], tensor)


@pytest.mark.parametrize("names", ["a", "b", "ab"])
@places
async def test_older_names_may_be_those_under_any_name_of_a_module(
    rig: Rig, tmp_path: Path, names: str, where: str
) -> None:
    def rename(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        if f"{prefix}kernel" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")

    with torch.device(where):
        module = plain()
    before_loading(module, rename)
    model = nn.ModuleDict({"a": module, "b": module})
    weight = torch.randn(3, 3)
    report = await load(rig, tmp_path, model, {f"{name}.kernel": weight for name in names})
    assert_same(module.get_parameter("weight"), weight)
    assert report.missing_keys == report.unexpected_keys == ()


async def test_missing_names_of_a_module_with_two_are_both_named(rig: Rig, tmp_path: Path) -> None:
    norm = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": norm, "b": norm, "c": nn.Linear(3, 3)})
    stored = {f"c.{name}": tensor for name, tensor in plain_linear().items()}
    missing = model.load_state_dict(stored, strict=False).missing_keys
    report = await load(rig, tmp_path, model, stored, strict=False)
    assert sorted(report.missing_keys) == sorted(missing)


@pytest.mark.parametrize("kinds", [(twice, twice), (plain, twice), (twice, plain)])
@pytest.mark.parametrize(("stored", "wanted"), [("0", "1"), ("1", "0")])
async def test_part_that_the_checkpoint_has_under_another_name_alone_is_missing(
    rig: Rig, tmp_path: Path, kinds: tuple[Callable[[], nn.Module], ...], stored: str, wanted: str
) -> None:
    model = tied(*kinds, where="meta")
    with pytest.raises(MissingKeysError):
        await load(rig, tmp_path, model, {f"{stored}.weight": torch.randn(3, 3)}, include=[rf"^{wanted}\."])


async def test_tied_tensor_that_was_put_back_is_not_named_as_written(rig: Rig, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("half-way")

    model = tied(tripled, twice, plain, where="cpu")
    model[1].weight = nn.Parameter(torch.zeros(3, 3))
    after_loading(model[1], fail)
    weight = torch.randn(3, 3)
    rest = {f"3.{name}": tensor for name, tensor in plain_linear().items()}
    with pytest.raises(PlacementError, match="half-way") as caught:
        await load(rig, tmp_path, model, {"1.weight": weight, "2.weight": weight} | rest, commit="atomic")
    assert caught.value.partly_written == ()


@commits
@pytest.mark.parametrize("names", ["0", "1", "01"])
async def test_tied_weight_that_was_adopted_is_on_meta_again(rig: Rig, tmp_path: Path, names: str, commit: str) -> None:
    """Two modules look at it after it is there, and the last of them fails."""

    def fail(*_: Any) -> None:
        raise RuntimeError("half-way")

    model = tied(caching, plain, caching, where="meta")
    after_loading(model[2], fail)
    before = dict(model.named_parameters())
    rest = {f"3.{name}": tensor for name, tensor in plain_linear().items()}
    weight = torch.randn(3, 3)
    stored = {f"{name}.weight": weight for name in names} | rest
    with pytest.raises(PlacementError, match="half-way") as caught:
        await load(rig, tmp_path, model, stored, commit=commit)
    assert caught.value.partly_written == ()
    assert all(parameter.is_meta and before[name] is parameter for name, parameter in model.named_parameters())
