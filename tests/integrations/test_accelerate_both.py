"""What accelerate's tests check of `load_checkpoint_in_model`, as far as it is supported here: true of both functions.

Their devices are two accelerators, of which this machine has none: here they are `cpu` and `meta`, and for ours alone, at
the end, two fake accelerators.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from tests.builders import assert_same, write_checkpoint
from tests.fakes.rig import Rig
from tests.models import tensors_of
from weightstream.errors import DtypeMismatchError, PlacementError, ShapeMismatchError, UnexpectedKeysError
from weightstream.integrations import accelerate as ours
from weightstream.scheduler.engine import Engine

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
Load = Callable[..., None]
Tensors = dict[str, torch.Tensor]
CPU = {"": "cpu"}


@pytest.fixture(params=["accelerate", "weightstream"])
def load(request: pytest.FixtureRequest) -> Load:
    module: Any = {"accelerate": accelerate, "weightstream": ours}[request.param]

    def load(model: nn.Module, path: Path, **options: Any) -> None:
        module.load_checkpoint_in_model(model, str(path), **options)  # accelerate's does not take a file as a Path

    load.__qualname__ = "ours" if module is ours else "theirs"
    return load


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate collects garbage after every file, half a second each in a process that has imported so much."""
    monkeypatch.setattr("accelerate.utils.modeling.gc", SimpleNamespace(collect=lambda: None))


class Net(nn.Module):
    """A module of each kind: plain, one that loads itself and has buffers, a frozen one, a buffer that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 5).requires_grad_(requires_grad=False)
        self.register_buffer("steps", torch.arange(6))
        self.register_buffer("table", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.norm(self.first(x)))
        return result


def empty() -> Net:
    """As `init_empty_weights` makes it: parameters on meta, buffers not."""
    with accelerate.init_empty_weights():
        return Net()


def on_meta() -> Net:
    with torch.device("meta"):
        return Net()


MAKE = pytest.mark.parametrize("make", [Net, empty, on_meta], ids=["materialised", "empty", "meta"])
BY_MODULE = dict.fromkeys(["first", "norm", "last", "steps"], "cpu")


def stored() -> Tensors:
    tensors = tensors_of(Net())
    tensors["norm.running_var"].abs_()
    return tensors


def assert_holds(model: nn.Module, tensors: Tensors, dtypes: dict[str, torch.dtype] | None = None) -> None:
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name].to((dtypes or {}).get(name, tensors[name].dtype)))


# Files


def one_safetensors(folder: Path, tensors: Tensors) -> Path:
    return write_checkpoint(folder, tensors) / "model.safetensors"


def shards_of_safetensors(folder: Path, tensors: Tensors) -> Path:
    return write_checkpoint(folder, tensors, num_shards=3)


def one_bin(folder: Path, tensors: Tensors) -> Path:
    torch.save(tensors, folder / "any.bin")
    return folder / "any.bin"


def one_pt(folder: Path, tensors: Tensors) -> Path:
    torch.save(tensors, folder / "any.pt")
    return folder / "any.pt"


def folder_with_bin(folder: Path, tensors: Tensors) -> Path:
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def index_of_bins(folder: Path, tensors: Tensors) -> Path:
    """Files and an index whose names say nothing."""
    files = {name: f"part-of-{name.split('.', maxsplit=1)[0]}.bin" for name in tensors}
    for file in set(files.values()):
        torch.save({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    index = folder / "of_weights.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    return index


def folder_of_bins(folder: Path, tensors: Tensors) -> Path:
    return index_of_bins(folder, tensors).parent


SAVE = pytest.mark.parametrize(
    "save",
    [
        one_safetensors,
        shards_of_safetensors,
        one_bin,
        one_pt,
        folder_with_bin,
        index_of_bins,
        folder_of_bins,
    ],
    ids=lambda save: save.__name__,
)


@SAVE
@pytest.mark.parametrize(
    ("make", "device_map"),
    [(Net, BY_MODULE), (empty, CPU), (on_meta, {"first.weight": "cpu", **CPU})],
    ids=["materialised", "empty", "meta"],
)
def test_every_file_fills_every_model(
    tmp_path: Path, load: Load, save: Callable[[Path, Tensors], Path], make: Callable[[], Net], device_map: Any
) -> None:
    tensors, model = stored(), make()
    load(model, save(tmp_path, tensors), device_map=device_map)
    assert_holds(model, tensors)
    assert [parameter.requires_grad for parameter in model.parameters()] == [True] * 4 + [False] * 2
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert model.table.is_meta == (make is on_meta)  # no file holds it


@SAVE
def test_without_a_map_what_is_there_is_written_to(
    tmp_path: Path, load: Load, save: Callable[[Path, Tensors], Path]
) -> None:
    tensors, model = stored(), Net()
    before = model.first.weight
    load(model, save(tmp_path, tensors), dtype=torch.float16)  # which counts with a map alone
    assert model.first.weight is before
    assert_holds(model, tensors)


@pytest.mark.parametrize("save", [one_safetensors, one_bin], ids=lambda save: save.__name__)
@MAKE
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {}),
        ("float16", {"offload_state_dict": True, "offload_buffers": True}),
        ("torch.bfloat16", {}),
    ],
    ids=["dtype", "name, and options that change nothing", "name"],
)
def test_floats_are_cast_and_integers_are_not(
    tmp_path: Path,
    load: Load,
    save: Callable[[Path, Tensors], Path],
    make: Callable[[], Net],
    options: Any,
    dtype: Any,
) -> None:
    tensors, model = stored(), make()
    load(model, save(tmp_path, tensors), device_map=CPU, dtype=dtype, **options)
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    assert_holds(model, tensors, {name: wanted for name, tensor in tensors.items() if tensor.is_floating_point()})
    assert model.get_buffer("steps").dtype == model.get_buffer("norm.num_batches_tracked").dtype == torch.int64
    assert model.get_buffer("table").dtype == torch.float32


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float16])
def test_without_a_dtype_the_models_counts(tmp_path: Path, load: Load, model_dtype: torch.dtype) -> None:
    tensors = {name: t.bfloat16() if t.is_floating_point() else t for name, t in stored().items()}
    model = Net().to(model_dtype)
    load(model, one_bin(tmp_path, tensors), device_map=CPU)
    assert_holds(model, tensors, {name: model_dtype for name, t in tensors.items() if t.is_floating_point()})


@pytest.mark.parametrize("make", [Net, on_meta], ids=["materialised", "meta"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kept", "names"),
    [
        (["norm"], ["norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]),
        (["last.bias"], ["last.bias"]),
        (["las"], []),
    ],
    ids=["module", "tensor", "part-of-a-name"],
)
def test_named_modules_stay_in_float32_beside_float16_alone(
    tmp_path: Path, load: Load, make: Callable[[], Net], dtype: torch.dtype, kept: list[str], names: list[str]
) -> None:
    tensors, model = stored(), make()
    load(model, one_bin(tmp_path, tensors), device_map=CPU, dtype=dtype, keep_in_fp32_modules=kept)
    dtypes = {name: dtype for name, tensor in tensors.items() if tensor.is_floating_point()}
    if dtype is torch.float16:
        dtypes |= dict.fromkeys(names, torch.float32)
    assert_holds(model, tensors, dtypes)


@MAKE
def test_module_that_the_map_sends_to_meta_is_there_afterwards(
    tmp_path: Path, load: Load, make: Callable[[], Net]
) -> None:
    """From a `.bin`: safetensors refuses to read for meta."""
    tensors, model = stored(), make()
    load(model, one_bin(tmp_path, tensors), device_map={**CPU, "last": "meta"})
    assert model.last.weight.is_meta
    assert model.last.bias.is_meta
    assert_same(model.first.weight, tensors["first.weight"])


@pytest.mark.parametrize("device_map", [None, CPU], ids=["no-map", "map"])
def test_unexpected_names_are_logged_and_are_errors_if_strict(
    tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture, device_map: Any
) -> None:
    tensors = stored()
    path = one_pt(tmp_path, {**tensors, "stranger": torch.rand(4, 5)})
    model = Net()
    with caplog.at_level(logging.WARNING):
        load(model, path, device_map=device_map)
    assert_holds(model, tensors)
    assert any("not used" in line and "stranger" in line for line in caplog.messages)
    with pytest.raises((ValueError, RuntimeError), match="stranger"):
        load(Net(), path, device_map=device_map, strict=True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["as-it-is", "cast"])
def test_what_the_checkpoint_lacks_stays_as_it_is(
    tmp_path: Path, load: Load, *, strict: bool, dtype: torch.dtype | None
) -> None:
    tensors, model = stored(), Net()
    missing = {"last.weight", "norm.running_mean", "steps"}
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    path = one_bin(tmp_path, {name: tensor for name, tensor in tensors.items() if name not in missing})
    load(model, path, device_map=CPU, dtype=dtype, strict=strict)
    for name, tensor in model.state_dict().items():
        if name in missing:
            assert tensor.data_ptr() == before[name][0]
            assert_same(tensor, before[name][1])
        else:
            assert_same(tensor, tensors[name].to(dtype or tensor.dtype if tensor.is_floating_point() else None))


@pytest.mark.parametrize("device_map", [None, CPU], ids=["no-map", "map"])
def test_other_shapes_are_an_error(tmp_path: Path, load: Load, device_map: Any) -> None:
    path = one_bin(tmp_path, {**stored(), "first.weight": torch.zeros(2, 2)})
    with pytest.raises((ValueError, RuntimeError), match="shape"):
        load(Net(), path, device_map=device_map)


def test_nothing_or_too_much_to_choose_from_is_a_value_error(tmp_path: Path, load: Load) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        load(Net(), tmp_path / "nowhere", device_map=CPU)
    with pytest.raises(ValueError, match=tmp_path.name):
        load(Net(), tmp_path, device_map=CPU)
    for name in ("one.safetensors.index.json", "two.safetensors.index.json"):
        (tmp_path / name).write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    with pytest.raises(ValueError, match=tmp_path.name):
        load(Net(), tmp_path, device_map=CPU)


def test_tensor_without_a_device_is_a_value_error(tmp_path: Path, load: Load) -> None:
    with pytest.raises(ValueError, match="device"):
        load(Net(), one_bin(tmp_path, stored()), device_map={"first": "cpu"})


def test_disk_without_a_folder_is_a_value_error(tmp_path: Path, load: Load) -> None:
    with pytest.raises(ValueError, match="disk"):
        load(Net(), one_bin(tmp_path, stored()), device_map={"": "cpu", "first": "disk"})


def test_module_that_the_model_lacks_may_be_in_the_map(tmp_path: Path, load: Load) -> None:
    tensors, model = stored(), Net()
    load(model, one_bin(tmp_path, tensors), device_map={**CPU, "vision.tower": "cpu"})
    assert_holds(model, tensors)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["as-it-is", "cast"])
@pytest.mark.parametrize("lacks", [None, "first.weight", "last.weight"])
@pytest.mark.parametrize("begins", ["meta", "cpu"])
def test_what_was_tied_is_tied_afterwards(
    tmp_path: Path, load: Load, lacks: str | None, begins: str, dtype: torch.dtype | None
) -> None:
    with torch.device(begins):
        model = Tied()
    tensors = tensors_of(Tied())
    tensors["last.weight"] = tensors["first.weight"].clone()
    path = one_bin(tmp_path, {name: tensor for name, tensor in tensors.items() if name != lacks})
    if (load.__qualname__, lacks, begins) == ("theirs", "first.weight", "cpu"):
        pytest.skip("accelerate ties both to what the first had before")
    load(model, path, device_map=CPU, dtype=dtype)
    assert model.last.weight is model.first.weight
    assert_holds(model, tensors, dict.fromkeys(tensors, dtype) if dtype else None)


@pytest.mark.parametrize("kept", ["first", "last"])
@pytest.mark.parametrize("lacks", [None, "first.weight", "last.weight"])
def test_what_is_tied_stays_in_float32_if_one_of_its_modules_does(
    tmp_path: Path, load: Load, lacks: str | None, kept: str
) -> None:
    with torch.device("meta"):
        model = Tied()
    tensors = tensors_of(Tied())
    tensors["last.weight"] = tensors["first.weight"].clone()
    path = one_bin(tmp_path, {name: tensor for name, tensor in tensors.items() if name != lacks})
    if load.__qualname__ == "theirs" and (lacks is None or lacks.startswith(kept)):
        pytest.skip("accelerate goes by the names that are in the checkpoint, one by one")
    load(model, path, device_map=CPU, dtype=torch.float16, keep_in_fp32_modules=[kept])
    assert model.last.weight is model.first.weight
    if load.__qualname__ == "theirs":  # which may have rounded it before
        assert model.last.weight.dtype is torch.float32
    else:
        assert_same(model.last.weight, tensors["last.weight"])


@pytest.mark.parametrize("save", [one_bin, shards_of_safetensors], ids=lambda save: save.__name__)
@pytest.mark.parametrize("make", [Net, empty], ids=["materialised", "empty"])
def test_load_and_dispatch_computes_the_same(
    tmp_path: Path,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    save: Callable[[Path, Tensors], Path],
    make: Callable[[], Net],
) -> None:
    """With accelerate's function that calls it, and the map that accelerate makes."""
    monkeypatch.setattr("accelerate.big_modeling.load_checkpoint_in_model", load)
    tensors, model, reference = stored(), make(), Net().eval()
    reference.load_state_dict(tensors)
    path = save(tmp_path, tensors)
    device_map = accelerate.infer_auto_device_map(model, max_memory={"cpu": 10**9})
    table = model.table
    found = accelerate.load_checkpoint_and_dispatch(model, str(path), device_map=device_map)
    assert found.table is table
    x = torch.randn(2, 3)
    assert torch.equal(found.eval()(x), reference(x))


# What differs: docs/integrations/accelerate.md


def flat_index(folder: Path, tensors: Tensors) -> Path:
    index = index_of_bins(folder, tensors)
    index.write_text(json.dumps(json.loads(index.read_text())["weight_map"]))
    return index


def with_integers(folder: Path, tensors: Tensors) -> Path:
    return one_bin(folder, {**tensors, "first.bias": torch.ones(4, dtype=torch.int64)})


def both_formats(folder: Path, tensors: Tensors) -> Path:
    write_checkpoint(folder, tensors)
    return folder_with_bin(folder, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})


def without_one(folder: Path, tensors: Tensors) -> Path:
    return one_bin(folder, {name: tensor for name, tensor in tensors.items() if name != "last.bias"})


@pytest.mark.filterwarnings("ignore:`_get_pg_default_device`")
@pytest.mark.parametrize(
    ("save", "make", "options", "theirs", "error"),
    [
        pytest.param(one_bin, on_meta, {}, ValueError, None, id="meta without a map"),
        pytest.param(without_one, Net, {"strict": True}, None, RuntimeError, id="missing, strict, no map"),
        pytest.param(
            without_one,
            Net,
            {"device_map": {"first": "cpu", "norm": "cpu", "steps": "cpu", "last.weight": "cpu"}},
            None,
            ValueError,
            id="no device for what is missing",
        ),
        pytest.param(with_integers, Net, {"device_map": CPU}, None, DtypeMismatchError, id="integers into floats"),
        pytest.param(flat_index, Net, {"device_map": CPU}, None, ValueError, id="flat index"),
        pytest.param(
            one_safetensors,
            Net,
            {"device_map": {**CPU, "last": "meta"}},
            SafetensorError,
            None,
            id="safetensors for meta",
        ),
    ],
)
def test_what_only_one_of_them_takes(
    tmp_path: Path, save: Any, make: Callable[[], Net], options: Any, theirs: Any, error: Any
) -> None:
    path = save(tmp_path, stored())
    for function, expected in ((accelerate.load_checkpoint_in_model, theirs), (ours.load_checkpoint_in_model, error)):
        with nullcontext() if expected is None else pytest.raises(expected):
            function(make(), str(path), **options)


def test_file_may_be_a_path(tmp_path: Path) -> None:
    path = one_bin(tmp_path, stored())
    with pytest.raises(AttributeError):
        accelerate.load_checkpoint_in_model(Net(), path)
    ours.load_checkpoint_in_model(Net(), path)


def test_of_both_formats_each_has_another_favourite(tmp_path: Path) -> None:
    tensors = stored()
    path = both_formats(tmp_path, tensors)
    models = Net(), Net()
    accelerate.load_checkpoint_in_model(models[0], str(path))
    ours.load_checkpoint_in_model(models[1], str(path))
    assert not models[0].first.weight.any()
    assert_holds(models[1], tensors)


def test_tied_parameters_with_other_values_are_an_error_here(tmp_path: Path) -> None:
    tensors = tensors_of(Tied()) | {"last.weight": torch.rand(4, 4)}
    path = one_bin(tmp_path, tensors)
    accelerate.load_checkpoint_in_model(Tied(), str(path), device_map=CPU)
    with pytest.raises(PlacementError, match="ties this tensor"):
        ours.load_checkpoint_in_model(Tied(), path, CPU)


@pytest.mark.parametrize(("device_map", "expected"), [(None, [1, 1]), (CPU, [0, 1])], ids=["no-map", "map"])
def test_hooks_are_called_with_a_map_too(tmp_path: Path, device_map: Any, expected: list[int]) -> None:
    path = one_bin(tmp_path, stored())
    called = [0, 0]
    for number, function in enumerate([accelerate.load_checkpoint_in_model, ours.load_checkpoint_in_model]):

        def count(*_: Any, number: int = number) -> None:
            called[number] += 1

        model = Net()
        cast("Any", model.first).register_load_state_dict_pre_hook(count)
        function(model, str(path), device_map=device_map)
    assert called == expected


# Ours alone


@pytest.fixture
def machine(make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Two fake accelerators beside the host."""
    rig = make_rig("host", several=["cpu:1", "cpu:2"])
    monkeypatch.setattr("weightstream.api.Engine", functools.partial(Engine, machine=rig.machine))
    monkeypatch.setattr(ours, "find_device", rig.machine.find_device)
    return SimpleNamespace(
        rig=rig, map={"": "cpu", "first": "cpu:1", "norm": torch.device("cpu:1"), "last": "cpu:2", "last.bias": "cpu"}
    )


@MAKE
@pytest.mark.parametrize("save", [one_bin, shards_of_safetensors], ids=lambda save: save.__name__)
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["as-it-is", "cast"])
def test_parameters_with_storage_move_to_where_the_map_says(
    tmp_path: Path,
    machine: SimpleNamespace,
    save: Callable[[Path, Tensors], Path],
    make: Callable[[], Net],
    dtype: torch.dtype | None,
) -> None:
    tensors, model = stored(), make()
    objects = dict(model.named_parameters())
    bias = model.last.bias.data_ptr()
    ours.load_checkpoint_in_model(model, save(tmp_path, tensors), machine.map, dtype=dtype)
    assert dict(model.named_parameters()) == objects  # an optimiser that has them keeps them
    floats = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    assert_holds(model, tensors, dict.fromkeys(floats, dtype) if dtype else None)
    one, two = machine.rig.several["cpu:1"], machine.rig.several["cpu:2"]
    assert one.num_allocations > 0 < two.num_allocations
    assert (model.last.bias.data_ptr() == bias) == (make is Net and dtype is None)  # it is where it should be


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["move", "cast"])
def test_load_that_fails_puts_back_what_was_to_be_moved(
    tmp_path: Path, machine: SimpleNamespace, dtype: torch.dtype | None
) -> None:
    model = Net()
    before = {name: (id(t), t.data_ptr(), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    path = one_bin(tmp_path, stored())
    machine.rig.disk.fail_at(0, OSError("broken"))
    with pytest.raises(OSError, match="broken"):
        ours.load_checkpoint_in_model(model, path, machine.map, dtype=dtype)
    wrong = one_pt(tmp_path, {**stored(), "norm.bias": torch.zeros(9)})
    with pytest.raises(ShapeMismatchError):
        ours.load_checkpoint_in_model(model, wrong, machine.map, dtype=dtype)
    more = one_pt(tmp_path, {**stored(), "more": torch.zeros(9)})
    with pytest.raises(UnexpectedKeysError):
        ours.load_checkpoint_in_model(model, more, machine.map, dtype=dtype, strict=True)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert (id(tensor), tensor.data_ptr()) == before[name][:2]
        assert_same(tensor, before[name][2])
    assert [parameter.requires_grad for parameter in model.parameters()] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_gradient_hook_that_a_move_would_lose_is_named(tmp_path: Path, machine: SimpleNamespace, kind: str) -> None:
    called: list[object] = []
    model = Net()
    getattr(model.first.bias, kind)(called.append)
    path = one_bin(tmp_path, stored())
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with pytest.raises(PlacementError, match="gradient hook") as caught:
        ours.load_checkpoint_in_model(model, path, machine.map)
    assert caught.value.tensor == "first.bias"
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    ours.load_checkpoint_in_model(model, path, CPU)  # where it is, it keeps its hook
    model(torch.randn(2, 3)).sum().backward()
    assert len(called) == 1


class Quantises(nn.Parameter):
    """As bitsandbytes' parameters are: plain until they are moved to a device."""

    def to(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("nobody is to move it")


class Wrapped(torch.Tensor):
    """As torchao's tensors are: what it looks like is not what it stores."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # torch's stub has an instance method
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.float16}, {"device_map": CPU}], ids=["move", "cast", "neither"]
)
@pytest.mark.parametrize("kind", ["quantises", "wrapped", "lazy"])
def test_parameter_of_a_kind_of_its_own_is_refused_by_name(
    tmp_path: Path, machine: SimpleNamespace, kind: str, options: Any
) -> None:
    model: Any = Net()
    if kind == "lazy":
        model.first = nn.LazyLinear(4)
    elif kind == "quantises":
        model.first.weight = Quantises(torch.zeros(4, 3))
    else:
        wrapper: Any = torch.Tensor._make_wrapper_subclass(Wrapped, torch.Size([4, 3]), dtype=torch.float32)
        model.first.weight = nn.Parameter(wrapper, requires_grad=False)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items() if not name.startswith("first")}
    with pytest.raises(PlacementError) as caught:
        ours.load_checkpoint_in_model(model, one_bin(tmp_path, stored()), **{"device_map": machine.map, **options})
    assert caught.value.tensor in {"first.weight", "first.bias"}
    assert {name: model.state_dict()[name].data_ptr() for name in before} == before


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", torch.int8, "nonsense"], ids=str)
def test_dtype_that_floats_are_not_cast_to_is_refused(tmp_path: Path, dtype: Any) -> None:
    model = Net()
    with pytest.raises(PlacementError, match=r"expected torch\.bfloat16, torch\.float16"):
        ours.load_checkpoint_in_model(model, one_bin(tmp_path, stored()), CPU, dtype=dtype)
    assert model.first.weight.dtype == torch.float32
