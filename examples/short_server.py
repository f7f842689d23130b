"""The shortest server: it begins to answer when its weights are there.

    pip install 'weightstream[transformers]' fastapi uvicorn
    WEIGHTSTREAM_DEVICE__TARGET=cpu WEIGHTSTREAM_CHECKPOINT=/models/small uvicorn short_server:app

Until then it answers nothing, and takes no notice of SIGTERM: see server.py for one that does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import torch
from fastapi import FastAPI

import weightstream
from weightstream.integrations.transformers import build_on_meta


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load, then let the server answer."""
    config = weightstream.LoaderConfig()  # from the environment
    assert config.checkpoint is not None, "set WEIGHTSTREAM_CHECKPOINT"
    model = build_on_meta(config.checkpoint)
    await weightstream.load(model, config=config)
    app.state.model = model.eval()
    yield


app = FastAPI(lifespan=lifespan)


@app.post("/next-token")
async def next_token(token_ids: list[int]) -> int:
    """Return the most likely one."""
    with torch.inference_mode():
        return int(app.state.model(torch.tensor([token_ids])).logits[0, -1].argmax())
