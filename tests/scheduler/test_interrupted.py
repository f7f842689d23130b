"""Ctrl-C in the middle of starting a thread: what it was for is done, or never begins, and nothing is left."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import weightstream as ws
from tests.builders import leaves_nothing

CONFIG = ws.LoaderConfig.model_validate({"device": {"target": "cpu"}})


class Interrupts:
    """Stands for `Thread.start`, and interrupts the first start of a thread, as a signal does.

    Args:
        name: of the thread.
        when: `before` there is a thread; `early`: there is one, which does nothing yet; `late`: it is at work.
    """

    def __init__(self, name: str, when: str) -> None:
        self.name: str | None = name
        self.when = when
        self.may_begin = threading.Event()
        self._is_at_work = threading.Event()
        self._start = threading.Thread.start

    def start(self, thread: threading.Thread) -> None:
        if thread.name == "weightstream-files":  # that is what a load begins with
            self._is_at_work.set()
        if thread.name != self.name:
            self._start(thread)
            return
        self.name = None
        if self.when == "early":
            run = thread.run
            thread.run = lambda: (self.may_begin.wait(30), run())[1]  # type: ignore[method-assign]  # for this one
        if self.when != "before":
            self._start(thread)
        if self.when == "late":
            assert self._is_at_work.wait(30)
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("how", "name", "when"),
    [
        *[
            (how, "weightstream-load", when)
            for how in ("load_sync", "iter_tensors")
            for when in ("before", "early", "late")
        ],
        *[("iter_tensors", "weightstream-call", when) for when in ("before", "early")],
    ],
)
def test_interrupted_start_of_a_thread_leaves_nothing(
    tmp_path: Path, how: str, name: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    interrupts = Interrupts(name, when)

    def start(thread: threading.Thread) -> None:
        interrupts.start(thread)

    monkeypatch.setattr(threading.Thread, "start", start)

    def run() -> object:
        if how == "load_sync":
            return ws.load_sync(nn.Linear(4, 4, bias=False, device="meta"), tmp_path, config=CONFIG)
        return list(ws.iter_tensors(tmp_path, CONFIG))

    with leaves_nothing():
        with pytest.raises(KeyboardInterrupt):
            run()
        interrupts.may_begin.set()
        assert run()
