"""A program: one of several processes that load the same checkpoint, as torch.distributed starts them.

    python rank_process.py STORE RANK WORLD_SIZE CHECKPOINT FREE_BYTES

STORE: a file over which they find each other. FREE_BYTES: what the host is said to have free. What is printed is JSON: the
report, the log lines with what their records carry, and the digest of what was loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from datetime import timedelta
from typing import Any

from torch import distributed as dist
from torch import nn

import weightstream as ws
from weightstream.scheduler import survey


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Any, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        rank, world_size = vars(record).get("rank"), vars(record).get("world_size")
        self.found.append((record.getMessage(), rank, world_size))


def main(store: str, rank: str, world_size: str, path: str, free_bytes: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=int(rank),
        world_size=int(world_size),
        timeout=timedelta(seconds=60),
    )
    setattr(survey, "available_bytes", lambda: int(free_bytes))  # noqa: B010 (as an assignment, no type would fit)
    logger, lines = logging.getLogger("weightstream"), Lines()
    logger.addHandler(lines)
    logger.setLevel("DEBUG")
    model = nn.Linear(256, 256, device="meta")
    dist.barrier()  # both are there, and load at the same time
    config = ws.LoaderConfig.model_validate({"device": {"target": "cpu"}, "prefetch": {"chunk": "64KiB"}})
    report = ws.load_sync(model, path, config=config)
    dist.barrier()
    digest = hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in model.parameters())).hexdigest()
    sys.stdout.write(json.dumps({"report": report.to_dict(), "lines": lines.found, "digest": digest}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
