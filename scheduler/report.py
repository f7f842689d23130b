"""What happened, as data: the report of a load that has ended, and the progress of one that runs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

__all__ = ["LoadReport", "Progress", "State"]

#: Where a load is: checking; reading and copying; placing what is left; over.
State = Literal["preflight", "loading", "finishing", "done", "failed"]


@dataclass(frozen=True, slots=True)
class Progress:
    """A snapshot of a running load. Bytes count up to `total_bytes`, tensors to `total_tensors`.

    `mapped_bytes` of all are in tensors that are views of mapped files: these are placed and never read, so `bytes_read`
    ends so much earlier.
    `current_module` is the one whose tensors were placed last; "" where none was, or where there is no model.
    """

    state: State
    bytes_read: int
    bytes_placed: int
    total_bytes: int
    tensors_ready: int
    total_tensors: int
    elapsed_s: float
    current_module: str = ""
    mapped_bytes: int = 0

    @property
    def eta_s(self) -> float | None:
        """Seconds that are left if it goes on as it did on average; None as long as nothing has been placed."""
        if not self.bytes_placed:
            return 0.0 if self.state == "done" else None
        return self.elapsed_s * (self.total_bytes - self.bytes_placed) / self.bytes_placed


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did. As JSON it is what `weightstream warm --json` prints."""

    __pydantic_config__: ClassVar[ConfigDict] = {
        "use_attribute_docstrings": True,
        "json_schema_serialization_defaults_required": True,
    }

    checkpoint: str
    """The index or file that was loaded."""
    strategy: str
    """How it was loaded: stream, preload, direct or map."""
    reason: str
    """Why so, in one sentence."""
    device: str
    """Where the tensors are, as torch writes it, all devices of a map; "page-cache" where bytes were only read."""
    dtype: str
    """Of the loaded tensors, the one with most bytes first."""
    num_tensors: int
    """How many tensors were loaded."""
    num_shards: int
    """How many files they were in."""
    num_bytes: int
    """Of the loaded tensors together, as stored."""
    wall_s: float
    """Seconds from the call to the last tensor in place."""
    throughput_bytes_per_s: float
    """`num_bytes` / `wall_s`; what is mapped is there without having been read, so this says nothing of disks then."""
    phases: dict[str, float]
    """Seconds in which the load waited for preflight, disk, copy, bind and other, for verify where that was asked for, and
    for the consumer of a stream; they sum to `wall_s`."""
    overlap: float
    """Time in which a read and a copy were both in progress, as a share of the less busy stage's time; 0.0 where one of the
    two had nothing to do."""
    host_peak_bytes: int
    """The most that ring and host blocks held together while this load ran, by our own account."""
    pinned_bytes: int
    """How much of the ring was page-locked at the end."""
    device_peak_bytes: int
    """The most device memory that this load had allocated at once for blocks; 0 on the CPU. Of several devices the sum."""
    num_copies: int
    """Copies from slots to blocks or parameters; where readers copy what they have read, one for each read."""
    num_retries: int
    """Reads that were repeated after an error that passed."""
    decisions: tuple[str, ...]
    """How it was read and on which measurements that was decided, one sentence each."""
    fallbacks: tuple[str, ...]
    """Every downgrade and special way, one sentence each."""
    missing_keys: tuple[str, ...]
    """As torch names them; empty where `device.strict` holds."""
    unexpected_keys: tuple[str, ...]
    """As torch names them; where `device.strict` holds, only what the model computes itself (buffers that are not
    persistent), of which checkpoints of older versions may hold values. What is listed was not loaded."""
    verified: str
    """What the bytes of every shard that was read were compared with: "sha256 (manifest)"; "sha256 (hub)" for the names of
    blobs in the Hugging Face cache; "none" if nothing."""
    hash_s: float = 0.0
    """Seconds that threads spent on hashing, added up; how long the load waited for that is in `phases`."""
    rank: int = 0
    """Which of several processes this is, from 0 on; see `weightstream.ranks`."""
    world_size: int = 1
    """How many processes there are; 1 where it is alone."""
    unloaded_keys: tuple[str, ...] = ()
    """What a device map leaves on meta."""
    read_bytes: int = 0
    """How much was read, from the page cache or from storage, with what was read only to be verified."""
    mapped_bytes: int = 0
    """How much of `num_bytes` is in tensors that are views of mapped files, and comes into memory when it is used."""
    cast_bytes: int = 0
    """How much of `num_bytes` was cast to another dtype."""
    cached_read_s: float = 0.0
    """Seconds that readers spent on what was in the page cache before, added up."""
    storage_read_s: float = 0.0
    """Seconds that they spent on all that was not, or of which that is not known."""
    storage_cpu_s: float = 0.0
    """Processor time of these, which the kernel's copies out of the page cache take; not of reads past it that readers copy."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data; the keys are the attributes' names."""
        return dataclasses.asdict(self)

    def to_json(self, *, indent: int | None = None) -> str:
        """Return the report as JSON."""
        return json.dumps(self.to_dict(), indent=indent)
