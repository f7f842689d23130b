"""transformers' own models, filled on meta by weightstream, compute what `from_pretrained`'s compute, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.builders import write_checkpoint
from tests.real.conftest import Target
from tests.real.families import FAMILIES, logits_of, save_small
from weightstream.integrations.transformers import build_on_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_logits_equal_those_of_from_pretrained(
    family: str, dtype: torch.dtype, target: Target, tmp_path: Path
) -> None:
    kind = save_small(family, tmp_path, dtype=dtype)
    model = build_on_meta(tmp_path, device=target.device)
    report = await target.fill(model, tmp_path)
    assert report.num_shards > 1
    assert not report.unexpected_keys
    reference = kind.from_pretrained(tmp_path).to(target.device)
    assert type(model) is kind
    expected, found = (logits_of(family, filled, target.device) for filled in (reference, model))
    assert expected.dtype == found.dtype
    assert next(model.parameters()).dtype == dtype
    assert torch.equal(expected, found)


async def test_hook_of_mamba_s_own_renames_what_older_checkpoints_have(target: Target, tmp_path: Path) -> None:
    save_small("mamba", tmp_path / "new", dtype=torch.float32)
    model = build_on_meta(tmp_path / "new", device=target.device)
    stored: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "new").glob("*.safetensors"):
        stored |= {name.replace("embeddings.", "embedding."): tensor for name, tensor in load_file(file).items()}
    assert "backbone.embedding.weight" in stored
    report = await target.fill(model, write_checkpoint(tmp_path / "old", stored))
    assert torch.equal(model.get_parameter("lm_head.weight").cpu(), stored["backbone.embedding.weight"])
    assert "backbone (MambaModel)" in report.fallbacks[0]
