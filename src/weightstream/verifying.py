"""`weightstream verify`: hash the files of a checkpoint, compare the digests, write a manifest. Imports no torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import anyio
from rich.console import Console

from weightstream.config import LoaderConfig
from weightstream.display import Display, format_bytes, format_rate
from weightstream.errors import shown
from weightstream.outputs import Verification, VerifiedShard
from weightstream.prefetch.attempts import sleeping
from weightstream.prefetch.checkpoint import Checkpoint, open_checkpoint
from weightstream.prefetch.config import PrefetchConfig
from weightstream.prefetch.digests import MANIFEST_NAME, Digest, find_digests, write_manifest
from weightstream.prefetch.memory import usable_cores
from weightstream.prefetch.source import ByteRange, FileSource
from weightstream.summary import print_facts, print_table, print_title
from weightstream.warm import in_thread

__all__ = ["ManifestExistsError", "ShardFinding", "Verdict", "print_verdict", "verify"]

#: Read and hashed at a time, by each thread. Not measured: long enough for the disk, short enough for Ctrl-C.
_PIECE_BYTES = 8 * 2**20

_REFRESH_S = 0.05


class ManifestExistsError(Exception):
    """Raised when a manifest is to be written where one is."""


@dataclass(frozen=True, slots=True)
class ShardFinding:
    """What was found out about one file. `expected`: None if nobody says what it should be."""

    name: str
    num_bytes: int
    sha256: str
    expected: Digest | None

    @property
    def status(self) -> Literal["ok", "wrong", "unknown"]:
        if self.expected is None:
            return "unknown"
        return "ok" if self.expected.sha256 == self.sha256 else "wrong"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found out about a checkpoint. `manifest`: what was written."""

    checkpoint: str
    shards: tuple[ShardFinding, ...]
    wall_s: float
    num_retries: int
    manifest: Path | None

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def is_good(self) -> bool:
        """Whether every file is what it should be; one of which nobody knows that only if a manifest was written."""
        return all(shard.status == "ok" or (shard.status == "unknown" and self.manifest) for shard in self.shards)

    def printed(self) -> Verification:
        """Return it as `--json` prints it."""
        return Verification(
            checkpoint=self.checkpoint,
            ok=self.is_good,
            num_shards=len(self.shards),
            num_bytes=self.num_bytes,
            wall_s=self.wall_s,
            num_retries=self.num_retries,
            manifest=None if self.manifest is None else str(self.manifest),
            shards=tuple(
                VerifiedShard(
                    shard.name, shard.num_bytes, shard.status, shard.sha256, *(shard.expected or (None, None))
                )
                for shard in self.shards
            ),
        )


def print_verdict(console: Console, found: Verdict) -> None:
    """Print what was found out, for people."""
    rate = format_rate(found.num_bytes / found.wall_s)
    num_good = sum(shard.status == "ok" for shard in found.shards)
    print_title(
        console,
        f"{format_bytes(found.num_bytes)} hashed in {found.wall_s:.2f} s, {rate}: "
        f"{num_good} of {len(found.shards)} files are what they should be",
    )
    facts = [("checkpoint", found.checkpoint)]
    if found.num_retries:
        facts.append(("retries", str(found.num_retries)))
    if found.manifest is not None:
        facts.append(("written", str(found.manifest)))
    print_facts(console, facts)
    rows = [
        (shown(shard.name), format_bytes(shard.num_bytes), _says(shard.expected), shard.status.upper())
        for shard in found.shards
    ]
    print_table(console, "Files", rows)
    for shard in found.shards:
        if shard.status == "wrong" and shard.expected is not None:
            print_table(console, shown(shard.name), [("expected", shard.expected.sha256), ("found", shard.sha256)])
    if found.manifest is None and any(shard.status == "unknown" for shard in found.shards):
        print_facts(console, [("unknown", "nobody says what it should be; --write-manifest says so from now on")])


def _says(expected: Digest | None) -> str:
    return "" if expected is None else f"says the {expected.source}"


async def verify(config: LoaderConfig, display: Display, *, writes_manifest: bool, overwrites: bool) -> Verdict:
    """Hash every file of the checkpoint that the configuration names, several at a time.

    Args:
        config: names it; `prefetch.retries`, `variant` and `allow_outside_links` are used.
        display: shows progress.
        writes_manifest: write what was found beside the checkpoint, unless a file is not what it should be.
        overwrites: whether a manifest that is there is replaced, and not believed.

    Raises:
        ManifestExistsError: there is a manifest already; nothing has been read.
        WeightstreamError: the checkpoint is not one, or cannot be read, or changed meanwhile.
        OSError: the manifest cannot be written.
    """
    assert config.checkpoint is not None
    prefetch = config.prefetch.model_copy(update={"io": "buffered"})
    began_s = time.monotonic()
    retries = _Retries()
    attempts = sleeping(prefetch.retries, on_retry=retries.add)
    with display.step("checking the checkpoint"):
        checkpoint = await in_thread(
            lambda: open_checkpoint(
                config.checkpoint or "",
                variant=prefetch.variant,
                allow_outside_links=prefetch.allow_outside_links,
                hashes=True,
                attempts=attempts,
            )
        )
    with checkpoint:
        if writes_manifest and not overwrites and await in_thread((checkpoint.folder / MANIFEST_NAME).exists):
            raise ManifestExistsError(f"{checkpoint.folder / MANIFEST_NAME} exists")
        expected = await in_thread(
            lambda: find_digests(
                checkpoint,
                allow_outside_links=prefetch.allow_outside_links,
                except_manifest=MANIFEST_NAME if writes_manifest else None,
                attempts=attempts,
            )
        )
        hashing = _Hashing(checkpoint, prefetch, retries)
        with display.meters(("hashed",)) as update:
            await hashing.run(update)
        await in_thread(checkpoint.check_unchanged)
        shards = tuple(
            ShardFinding(str(shard.path.relative_to(checkpoint.folder)), shard.num_bytes, begun.hexdigest(), digest)
            for shard, begun, digest in zip(checkpoint.shards, checkpoint.hashes, expected, strict=True)
        )
        manifest: Path | None = None
        if writes_manifest and all(shard.status != "wrong" for shard in shards):
            lines = [(shard.name, shard.sha256) for shard in shards]
            manifest = await in_thread(lambda: write_manifest(checkpoint.folder, lines, overwrite=overwrites))
        return Verdict(str(checkpoint.path), shards, time.monotonic() - began_s, retries.num, manifest)


class _Retries:
    """How many reads were repeated. Thread-safe."""

    def __init__(self) -> None:
        self.num = 0
        self._lock = threading.Lock()

    def add(self) -> None:
        with self._lock:
            self.num += 1


class _Hashing:
    """Threads that read and hash the files of a checkpoint, one file each at a time."""

    def __init__(self, checkpoint: Checkpoint, config: PrefetchConfig, retries: _Retries) -> None:
        self._checkpoint = checkpoint
        self._stopped = threading.Event()
        self._source = FileSource(
            checkpoint,
            config,
            pause=lambda seconds: not self._stopped.wait(seconds),
            on_retry=retries.add,
            on_fallback=lambda _: None,
        )
        self._lock = threading.Lock()
        self._left = sorted(range(len(checkpoint.shards)), key=lambda number: checkpoint.shards[number].num_bytes)
        self._error: BaseException | None = None

    async def run(self, update: Callable[[int, int], None]) -> None:
        """Hash everything, and say how far that is; stop if the waiting task is cancelled.

        Raises:
            ReadError: a file cannot be read.
        """
        total_bytes = sum(shard.num_bytes for shard in self._checkpoint.shards)
        threads = [
            threading.Thread(target=self._work, name=f"weightstream-hash-{number}", daemon=True)
            for number in range(min(len(self._left), usable_cores()))
        ]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                update(total_bytes, sum(begun.position for begun in self._checkpoint.hashes))
                await anyio.sleep(_REFRESH_S)
        finally:
            self._stopped.set()
            with anyio.CancelScope(shield=True):  # the files stay open as long as somebody reads from them
                for thread in threads:
                    await in_thread(thread.join)
            self._source.close()
        if self._error is not None:
            raise self._error
        update(total_bytes, total_bytes)

    def _work(self) -> None:
        try:
            memory = memoryview(bytearray(_PIECE_BYTES))
            while not self._stopped.is_set():
                with self._lock:
                    if not self._left:
                        return
                    number = self._left.pop()
                self._hash(number, memory)
        except BaseException as error:  # noqa: BLE001 (whatever it is: a digest of a part must not pass for that of a file)
            self._error = self._error or error
            self._stopped.set()

    def _hash(self, number: int, memory: memoryview) -> None:
        begun, end = self._checkpoint.hashes[number], self._checkpoint.shards[number].num_bytes
        while begun.position < end and not self._stopped.is_set():
            count = min(len(memory), end - begun.position)
            self._source.read(ByteRange(number, begun.position, begun.position + count), [memory[:count]])
            begun.update(memory[:count])
