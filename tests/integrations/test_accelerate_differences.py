"""Where docs/integrations/accelerate.md says that the two functions differ: tried on both, so that it stays true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.builders import assert_same
from weightstream.errors import DtypeMismatchError
from weightstream.integrations.accelerate import load_checkpoint_in_model as ours

theirs: Any = pytest.importorskip("accelerate", reason="accelerate is not installed").load_checkpoint_in_model
CPU = {"": "cpu"}
WITH_AND_WITHOUT_A_MAP = pytest.mark.parametrize("device_map", [None, CPU], ids=["no-map", "map"])


def saved(path: Path, tensors: dict[str, Any]) -> str:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    return str(path)


class Holder(nn.Module):
    """One buffer, and a parameter, without which accelerate goes other ways."""

    buffer: torch.Tensor

    def __init__(self, buffer: torch.Tensor, *, persistent: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("buffer", buffer, persistent=persistent)


@WITH_AND_WITHOUT_A_MAP
def test_integers_of_another_width(tmp_path: Path, device_map: Any) -> None:
    path = saved(tmp_path / "a.bin", {"weight": torch.zeros(1), "buffer": torch.ones(2, dtype=torch.int32)})
    model = Holder(torch.zeros(2, dtype=torch.int64))
    theirs(model, path, device_map=device_map)
    assert_same(model.buffer, torch.ones(2, dtype=torch.int64))
    with pytest.raises(DtypeMismatchError):
        ours(model, path, device_map)


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "not-stored"])
def test_count_of_a_batch_norm_that_the_file_lacks(tmp_path: Path, *, stored: bool) -> None:
    """A BatchNorm's own loading begins to count at 0, for files from before there was a count."""
    tensors = {name: tensor for name, tensor in nn.BatchNorm1d(2).state_dict().items() if stored and "num" not in name}
    path = saved(tmp_path / "a.bin", {**tensors, "other": torch.ones(1)})
    models = [nn.BatchNorm1d(2, device="meta") for _ in range(2)]
    theirs(models[0], path, device_map=CPU)
    ours(models[1], path, CPU)
    assert models[0].num_batches_tracked is not None
    assert models[1].num_batches_tracked is not None
    assert models[0].num_batches_tracked.is_meta
    assert_same(models[1].num_batches_tracked, torch.tensor(0))
    assert [model.weight.is_meta for model in models] == [not stored] * 2


def test_what_has_storage_beside_what_is_on_meta(tmp_path: Path) -> None:
    """All tensors are assigned by torch in a model of which one is on meta, so what a program has of the others is left behind."""
    tensors = {
        name: tensor.half() for name, tensor in nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict().items()
    }
    path = saved(tmp_path / "model.safetensors", tensors)
    models = [nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2)) for _ in range(2)]
    before = [model[1].weight for model in models]
    theirs(models[0], path)
    ours(models[1], path)
    assert [model[1].weight is weight for model, weight in zip(models, before, strict=True)] == [False, True]
    assert [model[1].weight.dtype for model in models] == [torch.float16, torch.float32]
    for model in models:
        assert model[0].weight.dtype is torch.float16
        for name, tensor in model.state_dict().items():
            assert_same(tensor, tensors[name].to(tensor.dtype))


def test_what_has_storage_and_goes_to_meta(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", nn.Sequential(nn.Linear(2, 2)).state_dict())
    models = [nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(2)]
    device_map = {"0": "cpu", "1": "meta"}
    theirs(models[0], path, device_map=device_map)
    ours(models[1], path, device_map)
    assert [model.get_parameter("1.weight").is_meta for model in models] == [False, True]
    models = [nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(2)]
    theirs(models[0], path, device_map=device_map, dtype="float16")
    ours(models[1], path, device_map, dtype="float16")
    assert [model.get_parameter("1.weight").dtype for model in models] == [torch.float32, torch.float16]


@WITH_AND_WITHOUT_A_MAP
def test_state_dict_inside_a_dict(tmp_path: Path, device_map: Any) -> None:
    reference = nn.Linear(2, 2)
    path = saved(tmp_path / "a.bin", {"model": reference.state_dict()})
    models = [nn.Linear(2, 2) for _ in range(2)]
    theirs(models[0], path, device_map=device_map)
    ours(models[1], path, device_map)
    assert not torch.equal(models[0].weight, reference.weight)
    assert_same(models[1].weight, reference.weight)


def test_offload_state_dict(tmp_path: Path) -> None:
    reference = nn.Linear(2, 2).half()
    path = saved(tmp_path / "a.safetensors", dict(reference.state_dict()))
    models = [nn.Linear(2, 2, device="meta") for _ in range(2)]
    for function, model in zip((theirs, ours), models, strict=True):
        function(model, path, device_map=CPU, offload_state_dict=True, offload_folder=str(tmp_path))
    assert [model.weight.dtype for model in models] == [torch.float16, torch.float32]
    assert_same(models[1].weight, reference.weight.float())


class TestBufferThatTheModelComputesItself:
    @WITH_AND_WITHOUT_A_MAP
    @pytest.mark.parametrize("function", [theirs, ours], ids=["accelerate", "weightstream"])
    def test_is_left_alone_by_both(self, tmp_path: Path, device_map: Any, function: Any) -> None:
        path = saved(tmp_path / "a.bin", {"weight": torch.zeros(1), "buffer": torch.ones(2)})
        model = Holder(torch.full((2,), 5.0), persistent=False)
        function(model, path, device_map=device_map)
        assert_same(model.buffer, torch.full((2,), 5.0))

    def test_with_strict(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "a.bin", {"weight": torch.zeros(1), "buffer": torch.ones(2)})
        models = [Holder(torch.full((2,), 5.0), persistent=False) for _ in range(2)]
        with pytest.raises(RuntimeError, match="Unexpected key"):
            theirs(models[0], path, strict=True)
        ours(models[1], path, strict=True)
        theirs(models[0], path, device_map=CPU, strict=True)
        ours(models[1], path, CPU, strict=True)
        assert [model.buffer.tolist() for model in models] == [[1, 1], [5, 5]]


class Keeper(nn.Linear):
    """Keeps something besides parameters."""

    kept: Any = None

    def get_extra_state(self) -> Any:
        return {"n": 3}

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


def test_extra_state(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", Keeper(2, 2).state_dict())
    for function, device_map in ((theirs, None), (ours, None), (ours, CPU)):
        model = Keeper(2, 2)
        function(model, path, device_map=device_map)
        assert model.kept == {"n": 3}
    with pytest.raises(ValueError, match="_extra_state"):
        theirs(Keeper(2, 2), path, device_map=CPU)


def test_scalar_stored_as_a_vector(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"weight": torch.zeros(1), "buffer": torch.ones(1)})
    model = Holder(torch.zeros(()))
    with pytest.raises(ValueError, match="shape"):
        theirs(model, path, device_map=CPU)
    ours(model, path, CPU)
    assert_same(model.buffer, torch.ones(()))
