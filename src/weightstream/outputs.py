"""What `--json` prints: one class for each command, of which `weightstream schema` and docs/json.md are made.

Keys are attributes, in their order. None is renamed or removed without a new major version; new ones may come.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter

from weightstream.config import LoaderConfig
from weightstream.scheduler.report import LoadReport

if TYPE_CHECKING:
    from weightstream.prefetch.checkpoint import Checkpoint

__all__ = [
    "SCHEMAS",
    "Benchmark",
    "BenchmarkRow",
    "Inspection",
    "Kind",
    "Sample",
    "Verification",
    "VerifiedShard",
    "schema_of",
    "to_json",
]

#: What a row is about: a load by weightstream, or a ceiling: raw reads from the page cache, from the disk through the
#: page cache, past the page cache (O_DIRECT), and raw copies to the device.
Kind = Literal["load cached", "load cold", "read cached", "read cold", "read direct", "copy"]

_DESCRIBED: ConfigDict = {"use_attribute_docstrings": True, "json_schema_serialization_defaults_required": True}


@dataclass(frozen=True, slots=True)
class InspectedShard:
    """A file of the checkpoint."""

    __pydantic_config__: ClassVar[ConfigDict] = _DESCRIBED

    name: str
    """The file's name."""
    num_bytes: int
    """Its length, with its header."""


@dataclass(frozen=True, slots=True)
class InspectedTensor:
    """A tensor of the checkpoint."""

    __pydantic_config__: ClassVar[ConfigDict] = _DESCRIBED

    name: str
    """As in the checkpoint."""
    dtype: str
    """As safetensors writes it: F32, BF16, I64, ..."""
    shape: tuple[int, ...]
    """Empty for a scalar."""
    num_bytes: int
    """As stored."""
    shard: str
    """The name of the file that it is in."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `weightstream inspect --json` prints: everything that is in a checkpoint that passed the checks of a load."""

    __pydantic_config__: ClassVar[ConfigDict] = _DESCRIBED

    checkpoint: str
    """The path of its index, or of its one file."""
    num_bytes: int
    """Of all tensors together, as stored."""
    num_tensors: int
    """The length of `tensors`."""
    num_shards: int
    """The length of `shards`."""
    shards: tuple[InspectedShard, ...]
    """Every file of the checkpoint."""
    tensors: tuple[InspectedTensor, ...]
    """Every tensor, file by file."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Inspection:
        """Describe a checkpoint."""
        names = [shard.path.name for shard in checkpoint.shards]
        return cls(
            checkpoint=str(checkpoint.path),
            num_bytes=checkpoint.num_bytes,
            num_tensors=len(checkpoint.tensors),
            num_shards=len(names),
            shards=tuple(
                InspectedShard(name, shard.num_bytes) for name, shard in zip(names, checkpoint.shards, strict=True)
            ),
            tensors=tuple(
                InspectedTensor(spec.name, spec.dtype, tuple(spec.shape), spec.num_bytes, names[spec.shard])
                for spec in checkpoint.tensors.values()
            ),
        )


@dataclass(frozen=True, slots=True)
class VerifiedShard:
    """A file that was hashed."""

    __pydantic_config__: ClassVar[ConfigDict] = _DESCRIBED

    name: str
    """Its path in the checkpoint's folder."""
    num_bytes: int
    """Its length."""
    status: Literal["ok", "wrong", "unknown"]
    """Whether it is what it should be; "unknown" where nobody says what that is."""
    sha256: str
    """Its SHA-256, in 64 small hexadecimal digits."""
    expected: str | None
    """What its SHA-256 should be; null where nobody says so."""
    source: str | None
    """Who says so: "manifest" (SHA256SUMS or *.sha256) or "hub" (the name of its blob in the Hugging Face cache)."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What `weightstream verify --json` prints: the digest of every file, and whether it is what it should be."""

    __pydantic_config__: ClassVar[ConfigDict] = _DESCRIBED

    checkpoint: str
    """The path of its index, or of its one file."""
    ok: bool
    """Whether the exit code is 0: every file is what it should be, or unknown and now in the manifest."""
    num_shards: int
    """The length of `shards`."""
    num_bytes: int
    """Of all files together: this much was hashed."""
    wall_s: float
    """Seconds that it took, with the checks of the checkpoint."""
    num_retries: int
    """How many reads were repeated after an error that may pass, those of headers, index and manifests included."""
    manifest: str | None
    """The path of the manifest that --write-manifest wrote; null if it wrote none."""
    shards: tuple[VerifiedShard, ...]
    """Every file of the checkpoint."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One run."""

    __pydantic_config__: ClassVar[ConfigDict] = _DESCRIBED

    num_bytes: int
    """What was read, copied or loaded; of a load, without what is mapped, which nobody moves."""
    wall_s: float
    """Seconds that it took."""
    cpu_s: float
    """Seconds of all cores together."""
    peak_bytes: int | None
    """By how much the process grew meanwhile; null if that is not known."""
    report: LoadReport | None = None
    """Of a load, as `warm --json` prints it; null for ceilings."""


@dataclass(frozen=True, slots=True)
class BenchmarkRow:
    """One thing that was measured, every time."""

    __pydantic_config__: ClassVar[ConfigDict] = _DESCRIBED

    name: str
    """For people."""
    kind: Kind
    """A load by weightstream, or a ceiling: raw reads from the page cache, from the disk through the page cache, past the
    page cache (O_DIRECT), or raw copies to the device."""
    num_threads: int | None
    """How many threads read; null for loads and copies."""
    bytes_per_s: float
    """Of the run in the middle; of an even number of runs, of the faster of the two."""
    share_of_ceiling: float | None
    """A load's rate as a share of its ceiling's; null for ceilings."""
    ceiling: str | None
    """The name of the row that bounds this load: the fastest read that it could have done, or the copies if they are
    slower."""
    bound: str | None
    """What this load waited for most, and what could be changed, in one sentence."""
    samples: tuple[Sample, ...]
    """Every run, in order."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What `weightstream bench --json` prints: every run of what was measured."""

    __pydantic_config__: ClassVar[ConfigDict] = _DESCRIBED

    checkpoint: str
    """The path of its index, or of its one file."""
    num_bytes: int
    """Of all tensors together, as stored."""
    num_tensors: int
    """How many tensors."""
    num_shards: int
    """How many files."""
    device: str
    """Where the loads went, as torch writes it."""
    io: str
    """`prefetch.io` as configured."""
    workers: int | str
    """`prefetch.workers` as configured."""
    rows: tuple[BenchmarkRow, ...]
    """What was measured, in the order of a round."""
    notes: tuple[str, ...]
    """What could not be measured, or not as its name says, one sentence each."""


#: What `weightstream schema` describes: the YAML file, and what the commands print.
SCHEMAS: dict[str, type[LoaderConfig | LoadReport | Inspection | Verification | Benchmark]] = {
    "config": LoaderConfig,
    "report": LoadReport,
    "inspect": Inspection,
    "verify": Verification,
    "bench": Benchmark,
}


def schema_of(name: str) -> dict[str, Any]:
    """Return a JSON schema: of what is read ("config"), or else of what is printed."""
    return TypeAdapter(SCHEMAS[name]).json_schema(mode="validation" if name == "config" else "serialization")


def to_json(printed: Inspection | Verification | Benchmark) -> str:
    """Return what a command prints. Names that are no valid Unicode are escaped, as everything beyond ASCII is."""
    return json.dumps(dataclasses.asdict(printed), indent=2)
