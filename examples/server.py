"""An inference server that answers from its first second: its weights arrive while it is already there.

    pip install 'weightstream[transformers]' fastapi uvicorn opentelemetry-sdk opentelemetry-exporter-prometheus
    python server.py model.yaml --port 8000

The YAML file names the checkpoint of a causal language model, as `weightstream schema` describes; `model` may stay
unset, because config.json says what to build.

While a server awaits its lifespan it answers nothing and takes no notice of SIGTERM. So the lifespan awaits only the
preflight, which makes start-up fail where the checkpoint is wrong, and leaves the rest to a task. `/health/live`
answers at once, `/health/ready` with 503 and how far the weights are, until they are there; a load that fails ends the
process with exit code 1.

Where transformers makes other tensors of the checkpoint's (it merges the experts of most mixture-of-experts models), or
has to read them itself, `from_pretrained_async` loads the model: nothing tells then how far the weights are.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import JSONResponse
from opentelemetry import metrics
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field
from torch import nn
from transformers import GenerationMixin

from weightstream import Loader, LoaderConfig, LoadHandle
from weightstream.errors import UnsupportedFormatError
from weightstream.integrations.transformers import build_on_meta, from_pretrained_async

logger = logging.getLogger("server")


class Request(BaseModel):
    """Numbers of tokens, as the model's tokenizer makes them, and how many to add."""

    token_ids: list[int] = Field(min_length=1)
    max_new_tokens: int = Field(default=16, ge=1, le=1024)


class Answer(BaseModel):
    """The same numbers, and those that were added."""

    token_ids: list[int]


class Service:
    """The model, and how far it is.

    Args:
        config: what to load, and how.
        stop: ends the server.
    """

    def __init__(self, config: LoaderConfig, stop: Callable[[], None]) -> None:
        self.failed = False
        self._config = config
        self._stop = stop
        self._model: nn.Module | None = None
        self._handle: LoadHandle | None = None
        self._turn = asyncio.Lock()

    @property
    def is_ready(self) -> bool:
        return self._model is not None

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Start the load; end whatever is left of it with the server."""
        if self._config.checkpoint is None:
            raise ValueError("the configuration names no checkpoint")
        checkpoint, device = self._config.checkpoint, _device(self._config.device.target)
        async with Loader(self._config) as loader:  # leaving it cancels the load, and waits until nothing is left
            work: Awaitable[nn.Module]
            try:
                model = await asyncio.to_thread(build_on_meta, checkpoint, device=device)
            except UnsupportedFormatError as error:
                logger.info("from_pretrained loads it: %s", error)
                work = from_pretrained_async(checkpoint, config=self._config)
            else:
                self._handle = await loader.start(model)
                work = _loaded(self._handle, model)
            watcher = asyncio.create_task(self._watch(work))
            yield
            watcher.cancel()
            await asyncio.wait([watcher])

    async def _watch(self, work: Awaitable[nn.Module]) -> None:
        try:
            self._model = (await work).eval()
        except Exception:
            logger.exception("the weights could not be loaded")
            self.failed = True
            self._stop()

    def progress(self) -> dict[str, float | None]:
        """Say how far the weights are, if that is known. The time that is left supposes that it goes on as it did."""
        if self._handle is None:
            return {"percent": None, "bytes": None, "total_bytes": None, "eta_s": None}
        now = self._handle.progress
        share = now.bytes_placed / now.total_bytes if now.total_bytes else 0.0
        return {
            "percent": round(100 * share, 1),
            "bytes": now.bytes_placed,
            "total_bytes": now.total_bytes,
            "eta_s": round(now.elapsed_s * (1 - share) / share, 2) if share else None,
        }

    async def generate(self, request: Request) -> Answer:
        """Add the most likely tokens, one request at a time."""
        model = self._model
        if model is None:
            raise HTTPException(503, "the weights are not there yet", headers={"Retry-After": "1"})
        num_tokens: int = cast("Any", model).get_input_embeddings().num_embeddings
        if not all(0 <= token < num_tokens for token in request.token_ids):
            raise HTTPException(422, f"the model knows the tokens 0 to {num_tokens - 1}")
        async with self._turn:
            return await asyncio.to_thread(_generate, model, request)


async def _loaded(handle: LoadHandle, model: nn.Module) -> nn.Module:
    """Return the model when its weights are there."""
    report = await handle.wait()
    logger.info("ready after %.2f s: %s", report.wall_s, report.reason)
    return model


def _device(target: str) -> torch.device:
    """Return where the buffers go that are in no checkpoint: to the weights."""
    if target != "auto":
        return torch.device(target)
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _generate(model: nn.Module, request: Request) -> Answer:
    assert isinstance(model, GenerationMixin)
    given = torch.tensor([request.token_ids], device=next(model.parameters()).device)
    with torch.inference_mode():
        found = cast("Any", model).generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=request.max_new_tokens, do_sample=False
        )
    return Answer(token_ids=found[0].tolist())


def make_app(service: Service) -> FastAPI:
    """Make the application around a service."""
    app = FastAPI(lifespan=service.lifespan)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        return JSONResponse(service.progress(), status_code=200 if service.is_ready else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    @app.post("/generate")
    async def generate(request: Request) -> Answer:
        return await service.generate(request)

    return app


def main() -> None:
    """Serve until SIGINT or SIGTERM, or until the load fails."""
    parser = argparse.ArgumentParser(description="Serve a causal language model while its weights still arrive.")
    parser.add_argument("config", help="a YAML file of weightstream's")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    metrics.set_meter_provider(MeterProvider(metric_readers=[PrometheusMetricReader()]))

    def stop() -> None:
        server.should_exit = True

    service = Service(LoaderConfig.from_yaml(options.config), stop)
    server = uvicorn.Server(uvicorn.Config(make_app(service), host=options.host, port=options.port))
    server.run()
    if service.failed or not server.started:
        sys.exit(1)


if __name__ == "__main__":
    main()
