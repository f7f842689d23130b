"""The example servers, with real uvicorn and a real client: they answer while weights arrive, and end as they should."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import flip, write_sums
from tests.documents import blocks, commands_in
from tests.fakes.filesystem import Behaviour, Fault, Speed, mounted
from tests.fakes.fuse import why_not
from weightstream import LoaderConfig

httpx = pytest.importorskip("httpx")
for package in ("fastapi", "uvicorn", "opentelemetry.exporter.prometheus"):
    pytest.importorskip(package)
transformers: Any = pytest.importorskip("transformers")
from tests.real.families import save_small  # noqa: E402 - which is not there without transformers

pytestmark = pytest.mark.timeout(120)

EXAMPLES = Path(__file__).parents[2] / "examples"
PATIENCE_S = 60.0
PROMPT = [1, 2, 3]
NO_FUSE = why_not()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model with random weights."""
    return write_model(tmp_path_factory.mktemp("model"), hidden_size=32)


def write_model(folder: Path, *, hidden_size: int) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def configured(tmp_path: Path, checkpoint: Path, more: str = "") -> Path:
    file = tmp_path / "model.yaml"
    file.write_text(f"checkpoint: {checkpoint}\ndevice: {{target: cpu}}\n{more}")
    return file


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


class Server:
    """A server in a process of its own, and its client."""

    def __init__(self, *command: object, port: int, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command), "--port", str(port)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=EXAMPLES,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S)
        self._log: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            self._log.extend(lines)

    @property
    def log(self) -> str:
        return "".join(self._log)

    def until(self, path: str, condition: Callable[[Any], bool]) -> Any:
        """Ask again and again, until the answer is as it should be."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log
            try:
                answer = self.client.get(path)
            except httpx.TransportError:
                time.sleep(0.02)
                continue
            if condition(answer):
                return answer
            time.sleep(0.02)
        raise AssertionError(f"{path} did not become what it should be: {self.log}")

    def end(self, within_s: float = PATIENCE_S) -> int:
        code = self.process.wait(within_s)
        self._reader.join()
        return code


@contextmanager
def serving(*command: object, **environment: str) -> Generator[Server, None, None]:
    server = Server(*command, port=free_port(), **environment)
    try:
        yield server
    finally:
        server.client.close()
        server.process.kill()
        server.end()


def expected_tokens(checkpoint: Path, num_tokens: int) -> list[int]:
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    found = model.generate(torch.tensor([PROMPT]), max_new_tokens=num_tokens, do_sample=False)
    tokens: list[int] = found[0].tolist()
    return tokens


@pytest.mark.skipif(NO_FUSE is not None, reason=str(NO_FUSE))
def test_server_answers_while_its_weights_arrive_and_then_serves(tmp_path: Path, checkpoint: Path) -> None:
    last = (checkpoint / "model.safetensors").stat().st_size - 1
    stalled = Behaviour(is_cached=False, faults=(Fault("model.safetensors", "stall", offset=last, times=None),))
    with (
        mounted(checkpoint, stalled) as mount,
        serving("server.py", configured(tmp_path, mount.path, "prefetch: {chunk: 64KiB}\n")) as server,
    ):
        answer = server.until("/health/ready", lambda answer: answer.json()["bytes"] > 0)
        mount.wait_stalled(1)
        assert answer.status_code == 503
        state = server.client.get("/health/ready").json()
        for _ in range(20):  # nothing of the load makes it late, and it hangs all the time
            assert server.client.get("/health/live").json() == {"status": "alive"}
        assert 0 < state["percent"] < 100
        assert state["eta_s"] > 0
        assert state["bytes"] < state["total_bytes"]
        assert server.client.post("/generate", json={"token_ids": PROMPT}).status_code == 503
        mount.release()
        state = server.until("/health/ready", lambda answer: answer.status_code == 200).json()
        assert state["percent"] == 100
        answer = server.client.post("/generate", json={"token_ids": PROMPT, "max_new_tokens": 8})
        assert answer.json() == {"token_ids": expected_tokens(checkpoint, 8)}
        assert server.client.post("/generate", json={"token_ids": [1, 64]}).status_code == 422
        assert "weightstream_" in server.client.get("/metrics").text
        server.process.send_signal(signal.SIGTERM)
        assert server.end() in (0, -signal.SIGTERM)
        assert "Traceback" not in server.log


@pytest.mark.skipif(NO_FUSE is not None, reason=str(NO_FUSE))
def test_server_answers_throughout_a_load_and_sigterm_ends_it_within_two_seconds(tmp_path: Path) -> None:
    """The one time that a test asks for: it is what is promised, and takes a fraction of it. A request takes half a second."""
    checkpoint = write_model(tmp_path, hidden_size=256)
    slow = Behaviour(is_cached=False, buffered=Speed(bytes_per_s=250e3))
    more = "prefetch: {chunk: 64KiB, workers: 1, io: buffered}\n"
    with mounted(checkpoint, slow) as mount, serving("server.py", configured(tmp_path, mount.path, more)) as server:
        server.until("/health/live", lambda answer: answer.status_code == 200)
        num_alive = 0
        while (state := server.client.get("/health/ready").json())["bytes"] < 2**17:
            assert server.client.get("/health/live").json() == {"status": "alive"}
            num_alive += 1
        assert num_alive > 20
        assert state["bytes"] < state["total_bytes"]
        server.process.send_signal(signal.SIGTERM)
        assert server.end(within_s=2) in (0, -signal.SIGTERM)
        assert "Traceback" not in server.log


@pytest.mark.skipif(NO_FUSE is not None, reason=str(NO_FUSE))
def test_sigterm_ends_a_server_whose_load_hangs(tmp_path: Path, checkpoint: Path) -> None:
    last = (checkpoint / "model.safetensors").stat().st_size - 1
    stalled = Behaviour(is_cached=False, faults=(Fault("model.safetensors", "stall", offset=last, times=None),))
    with mounted(checkpoint, stalled) as mount, serving("server.py", configured(tmp_path, mount.path)) as server:
        mount.wait_stalled(1)
        server.until("/health/live", lambda answer: answer.status_code == 200)
        server.process.send_signal(signal.SIGTERM)
        try:
            assert server.end() in (0, -signal.SIGTERM)
        finally:
            mount.release()
        assert "Traceback" not in server.log


def test_damaged_weights_end_the_process(tmp_path: Path, checkpoint: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in checkpoint.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    write_sums(damaged)
    flip(damaged / "model.safetensors", (damaged / "model.safetensors").stat().st_size - 100)
    with serving("server.py", configured(tmp_path, damaged, "prefetch: {verify: sha256}\n")) as server:
        assert server.end() == 1
        assert "IntegrityError" in server.log


def test_checkpoint_that_is_wrong_makes_start_up_fail(tmp_path: Path, checkpoint: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    (wrong / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-1])
    with serving("server.py", configured(tmp_path, wrong)) as server:
        assert server.end() > 0  # 3 from newer versions of uvicorn
        assert "HeaderError" in server.log


def test_checkpoint_that_transformers_converts_is_served_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It merges the experts, so `build_on_meta` refuses it. In this process: what uvicorn adds is tested above."""
    save_small("qwen3-moe", folder := tmp_path / "moe", dtype=torch.float32)
    monkeypatch.syspath_prepend(EXAMPLES)
    server: Any = importlib.import_module("server")
    config = LoaderConfig.from_yaml(configured(tmp_path, folder))
    stopped: list[bool] = []

    async def serve(config: LoaderConfig) -> list[int] | None:
        service = server.Service(config, lambda: stopped.append(True))
        async with service.lifespan(None):
            assert service.progress()["percent"] is None
            while not (service.is_ready or service.failed):  # noqa: ASYNC110 - the service tells nobody
                await asyncio.sleep(0.01)
            if service.failed:
                return None
            found: list[int] = (await service.generate(server.Request(token_ids=PROMPT))).token_ids
            return found

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False)[0].tolist()
    assert asyncio.run(serve(config)) == expected
    assert not stopped
    write_sums(folder)
    flip(max(folder.glob("*.safetensors")), -1)
    verified = LoaderConfig.from_yaml(configured(tmp_path, folder, "prefetch: {verify: sha256}\n"))
    assert asyncio.run(serve(verified)) is None
    assert stopped


def test_short_server_serves_when_its_weights_are_there(checkpoint: Path) -> None:
    with serving(
        "-m",
        "uvicorn",
        "short_server:app",
        WEIGHTSTREAM_CHECKPOINT=str(checkpoint),
        WEIGHTSTREAM_DEVICE__TARGET="cpu",
    ) as server:
        server.until("/docs", lambda answer: answer.status_code == 200)
        answer = server.client.post("/next-token", json=PROMPT)
        assert answer.json() == expected_tokens(checkpoint, 1)[-1]


def test_command_of_the_documentation_serves(tmp_path: Path, checkpoint: Path) -> None:
    (block,) = [block for block in blocks("docs/server.md", "console") if block.tried_by]
    ((python, program, *arguments),) = commands_in(block)
    assert python == "python"
    config = str(configured(tmp_path, checkpoint))
    words = [config if word == "model.yaml" else word for word in arguments]
    with serving(EXAMPLES.parent / program, *words) as server:  # the port that comes last counts
        server.until("/health/ready", lambda answer: answer.status_code == 200)
