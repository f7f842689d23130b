"""Run by test_vllm.py as a program: load a model with vLLM, generate, print what came out as JSON.

Arguments: the model's folder, the load format, and its extra configuration as JSON.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

PROMPTS = [[5, 9, 200, 31], [17, 4], [300, 299, 298, 297, 296]]


def main() -> None:
    folder, load_format, extra = sys.argv[1:]
    vllm: Any = import_module("vllm")
    engine = vllm.LLM(
        folder,
        load_format=load_format,
        model_loader_extra_config=json.loads(extra),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=4,
        dtype="bfloat16",
    )
    greedy = vllm.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], greedy, use_tqdm=False)
    sys.stdout.write("tokens:" + json.dumps([list(output.outputs[0].token_ids) for output in outputs]) + "\n")


if __name__ == "__main__":
    main()
