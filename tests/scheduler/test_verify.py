"""What is loaded with `prefetch.verify` has the digest that was promised, or is not loaded."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.builders import (
    assert_same,
    bytes_of,
    flip,
    leaves_nothing,
    random_tensors,
    write_checkpoint,
    write_in_order,
    write_index,
    write_sums,
)
from tests.fakes.rig import KIB, Rig
from tests.fakes.source import Gate
from tests.models import SmallNet, tensors_of
from weightstream.errors import IntegrityError, LoadCancelledError, UnsupportedFormatError
from weightstream.prefetch.checkpoint import open_checkpoint
from weightstream.prefetch.hashing import FileHash
from weightstream.scheduler import plan as planning
from weightstream.scheduler.plan import LoadPlan

MakeRig = Callable[..., Rig]
Saved = tuple[dict[str, torch.Tensor], Path]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """Three shards and a manifest."""
    tensors = tensors_of(SmallNet())
    path = write_in_order(tmp_path / "checkpoint", tensors, num_shards=3)
    write_sums(path)
    return tensors, path


def on_meta() -> SmallNet:
    with torch.device("meta"):
        return SmallNet()


def assert_loaded(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert_same(tensor, tensors[name])


def assert_all_free(rig: Rig) -> None:
    for ring in rig.rings:
        assert ring.statistics().num_free == ring.statistics().num_slots


def files_of(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def body_begin(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def body_bytes(path: Path) -> int:
    return sum(file.stat().st_size - body_begin(file) for file in files_of(path))


class Hashed:
    """What was hashed, buffer by buffer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate: Gate | None = None
        self.gate_at = -1
        self.num_calls = 0
        update = FileHash.update
        hashed = self

        def watched(self: FileHash, memory: bytes | memoryview, *, goes_on: Callable[[], bool] = lambda: True) -> None:
            number = hashed.num_calls
            hashed.num_calls += 1
            if hashed.gate is not None and number == hashed.gate_at:
                hashed.gate.pass_through()
            update(self, memory, goes_on=goes_on)

        monkeypatch.setattr(FileHash, "update", watched)


@pytest.mark.parametrize("where", ["meta", "cpu"], ids=["adopt", "in-place"])
@pytest.mark.parametrize("order", ["model", "file"])
async def test_every_byte_is_read_once_and_hashed(rig: Rig, saved: Saved, order: str, where: str) -> None:
    tensors, path = saved
    with torch.device(where):
        model = SmallNet()
    with leaves_nothing():
        async with rig.loader(verify="sha256", scheduler={"order": order}) as loader:
            report = await loader.load(model, path)
        assert_loaded(model, tensors)
        assert_all_free(rig)
    assert report.verified == "sha256 (manifest)"
    assert rig.disk.num_bytes_begun == body_bytes(path) == report.num_bytes
    assert sum(report.phases.values()) == pytest.approx(report.wall_s)
    assert any("3 shards were read in the order of their bytes" in said for said in report.decisions)
    assert report.fallbacks == ()


@pytest.mark.parametrize("where", ["meta", "cpu"], ids=["adopt", "in-place"])
@pytest.mark.parametrize("commit", ["progressive", "atomic"])
@pytest.mark.parametrize("strategy", ["stream", "preload", "direct", "map"])
async def test_every_strategy_and_commit_is_verified(
    make_rig: MakeRig, saved: Saved, strategy: str, commit: str, where: str
) -> None:
    """What is wrong in the last byte is refused; a model that is not committed yet stays as it was, bit for bit."""
    tensors, path = saved
    with torch.device(where):
        model = SmallNet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rig = make_rig("host" if strategy == "map" else "fake")
    last = files_of(path)[-1]
    with leaves_nothing():
        async with rig.loader(strategy=strategy, verify="sha256", commit=commit) as loader:
            flip(last, last.stat().st_size - 1)
            with pytest.raises(IntegrityError, match="SHA-256 is not what the manifest says") as caught:
                await loader.load(model, path)
            assert caught.value.file == str(last)
            if where == "meta":
                assert all(parameter.is_meta for parameter in model.parameters())
            elif commit == "atomic" or strategy == "preload":
                assert caught.value.partly_written == ()
                for name, tensor in model.state_dict().items():
                    assert_same(tensor, before[name])
            flip(last, last.stat().st_size - 1)
            report = await loader.load(model, path)
        assert_all_free(rig)
    assert report.verified == "sha256 (manifest)"
    assert_loaded(model, tensors)


async def test_without_it_nothing_is_hashed(rig: Rig, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = Hashed(monkeypatch)
    _, path = saved
    async with rig.loader() as loader:
        report = await loader.load(on_meta(), path)
    assert (hashed.num_calls, report.verified, report.hash_s) == (0, "none", 0.0)
    assert "verify" not in report.phases


@pytest.mark.parametrize("num_slots", [2, 3], ids=["2-slots", "3-slots"])
@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["same-dtype", "cast"])
@pytest.mark.parametrize(
    "speeds", [(None, None), (1000, 100), (100, 1000)], ids=["at-once", "slow-copies", "slow-reads"]
)
async def test_small_ring_does_not_dead_lock(
    make_rig: MakeRig,
    tmp_path: Path,
    speeds: tuple[int | None, int | None],
    stored: torch.dtype,
    workers: int,
    num_slots: int,
) -> None:
    read, copy = (None if speed is None else speed * KIB for speed in speeds)
    rig = make_rig("fake", read_bytes_per_s=read, copy_bytes_per_s=copy)
    tensors = tensors_of(SmallNet(), dtype=stored)
    path = write_in_order(tmp_path / "c", tensors, num_shards=4)
    write_sums(path)
    model = on_meta()
    async with rig.loader(verify="sha256", workers=workers, num_slots=num_slots) as loader:
        report = await loader.load(model, path)
    assert_loaded(model, {name: tensor.to(model.state_dict()[name].dtype) for name, tensor in tensors.items()})
    assert report.verified == "sha256 (manifest)"
    assert_all_free(rig)


async def test_ring_of_one_slot_does_not_dead_lock(make_rig: MakeRig, saved: Saved) -> None:
    """One of two slots is lost to a read that hangs; the next load has the other one alone."""
    rig = make_rig("fake")
    tensors, path = saved
    gate = rig.disk.stop_at(0, is_stuck=True)
    async with rig.loader(verify="sha256", workers=3, num_slots=2) as loader:
        handle = await loader.start(on_meta(), path)
        gate.wait_reached()
        await handle.cancel()
        model = on_meta()
        await loader.load(model, path)
        assert (rig.ring.num_slots, rig.ring.num_written_off, rig.ring.num_free) == (2, 1, 1)
        gate.open()
    assert_loaded(model, tensors)


async def test_order_of_the_plan_is_what_prevents_the_dead_lock(
    make_rig: MakeRig, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chunks of one shard in another order a small ring fills up with what cannot be hashed yet."""
    rig = make_rig("fake")
    _, path = saved
    in_order = planning._side_by_side
    monkeypatch.setattr(planning, "_side_by_side", lambda *args: reversed(list(in_order(*args))))
    async with rig.loader(verify="sha256", workers=2, num_slots=2) as loader:
        handle = await loader.start(on_meta(), path)
        rig.clock.wait_idle()
        assert handle.progress.bytes_placed == 0
        await handle.cancel()
    assert_all_free(rig)


def spots(path: Path) -> dict[str, tuple[Path, int]]:
    first, middle, last = files_of(path)
    return {
        "header": (first, body_begin(first) - 1),
        "first-byte": (first, body_begin(first)),
        "middle": (middle, (body_begin(middle) + middle.stat().st_size) // 2),
        "last-byte": (last, last.stat().st_size - 1),
    }


def pad_headers(path: Path) -> None:
    """Give every header eight bytes of padding, as writers do; what is padding may be any white space."""
    for file in files_of(path):
        raw = file.read_bytes()
        begin = body_begin(file)
        file.write_bytes((begin - 8 + 8).to_bytes(8, "little") + raw[8:begin] + b" " * 7 + b"\n" + raw[begin:])


@pytest.mark.parametrize("spot", ["header", "first-byte", "middle", "last-byte"])
async def test_changed_byte_ends_the_load(rig: Rig, tmp_path: Path, spot: str) -> None:
    path = write_in_order(tmp_path / "checkpoint", tensors_of(SmallNet()), num_shards=3)
    pad_headers(path)
    write_sums(path)
    file, position = spots(path)[spot]
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    if spot == "header":  # a line feed becomes a tab, and the header stays valid
        raw = bytearray(file.read_bytes())
        raw[position] = ord("\t")
        file.write_bytes(raw)
    else:
        flip(file, position)
    model = on_meta()
    before = dict(model.state_dict(keep_vars=True))
    with leaves_nothing():
        async with rig.loader(verify="sha256") as loader:
            handle = await loader.start(model, path)
            with pytest.raises(IntegrityError, match="SHA-256 is not what the manifest says") as caught:
                await handle.wait()
            with pytest.raises(IntegrityError):
                await handle.ready()
        assert_all_free(rig)
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is tensor and tensor.is_meta for name, tensor in before.items())
    actual = hashlib.sha256(file.read_bytes()).hexdigest()
    assert (caught.value.file, caught.value.expected, caught.value.actual) == (str(file), expected, actual)


async def test_last_chunk_of_a_wrong_shard_is_never_handed_on(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig("host")
    path = write_in_order(tmp_path, random_tensors({"a": (64, KIB // 4), "b": (64, KIB // 4)}))
    write_sums(path)
    flip(path / "model.safetensors", body_begin(path / "model.safetensors"))
    async with rig.loader(verify="sha256") as loader:
        stream = loader.stream(path)
        names: list[str] = []

        async def take_all() -> None:
            async for name, _ in stream:
                names.append(name)

        with pytest.raises(IntegrityError):
            await take_all()
        assert "b" not in names
        with pytest.raises(IntegrityError):
            await stream.report()


async def test_materialised_parameters_are_named_as_partly_written(rig: Rig, saved: Saved) -> None:
    _, path = saved
    async with rig.loader(workers=1, verify="sha256", scheduler={"order": "file"}) as loader:
        await loader.load(SmallNet(), path)
    gate = rig.disk.stop_at(2 * rig.disk.num_begun - 1, is_stuck=True)
    model = SmallNet()
    before = {name: bytes_of(tensor) for name, tensor in model.state_dict().items()}
    last = files_of(path)[-1]
    flip(last, last.stat().st_size - 1)
    async with rig.loader(workers=1, verify="sha256", scheduler={"order": "file"}) as loader:
        handle = await loader.start(model, path)
        gate.wait_reached()
        rig.clock.wait_idle()  # all but the last chunk are in place
        gate.open()
        with pytest.raises(IntegrityError) as caught:
            await handle.wait()
    changed = {name for name, tensor in model.state_dict().items() if bytes_of(tensor) != before[name]}
    assert changed
    assert changed <= set(caught.value.partly_written)


class Part(nn.Module):
    """Two of the tensors, and neither the first nor the last."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.empty(50, KIB // 4))
        self.d = nn.Parameter(torch.empty(50, KIB // 4))


def write_parts(path: Path) -> dict[str, torch.Tensor]:
    tensors = random_tensors(dict.fromkeys("abcdefgh", (50, KIB // 4)))
    write_in_order(path, tensors, num_shards=2)
    write_sums(path)
    return tensors


@pytest.mark.parametrize("strategy", ["stream", "map"])
async def test_what_is_not_loaded_is_hashed_too(
    rig: Rig, tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if strategy == "map" and rig.device != "host":
        pytest.skip("mapped tensors are on the host")
    tensors = write_parts(tmp_path)
    with torch.device("meta"):
        model = Part()
    async with rig.loader(verify="sha256", strategy=strategy, strict=False) as loader:
        report = await loader.load(model, tmp_path)
        assert_loaded(model, tensors)
        assert_all_free(rig)
        unwanted = 2 * 50 * KIB
        assert f"verify: {unwanted} bytes that this load does not need were read to be hashed" in report.decisions
        assert "verify: 1 shards that this load needs nothing of were not read" in report.decisions
        assert report.num_bytes == unwanted
        if strategy == "stream":
            assert rig.disk.num_bytes_begun == 4 * 50 * KIB  # the first shard, and nothing of the second

        first = files_of(tmp_path)[0]
        for position in (body_begin(first), body_begin(first) + 120 * KIB):  # in `a` and in `c`
            flip(first, position)
            with torch.device("meta"):
                model = Part()
            with pytest.raises(IntegrityError):
                await loader.load(model, tmp_path)
            assert model.b.is_meta
            assert model.d.is_meta
            flip(first, position)


async def test_small_ring_and_a_partial_load(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig("fake")
    tensors = write_parts(tmp_path)
    with torch.device("meta"):
        model = Part()
    async with rig.loader(verify="sha256", num_slots=2, workers=4, strict=False) as loader:
        await loader.load(model, tmp_path)
    assert_loaded(model, tensors)
    assert_all_free(rig)


async def test_shard_without_digest_is_refused_before_anything_moves(rig: Rig, saved: Saved) -> None:
    _, path = saved
    manifest = path / "SHA256SUMS"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    model = on_meta()
    async with rig.loader(verify="sha256") as loader:
        with pytest.raises(IntegrityError, match=r"nobody says.*weightstream verify --write-manifest") as caught:
            await loader.start(model, path)
    assert caught.value.file == str(files_of(path)[-1])
    assert rig.disk.num_begun == 0
    assert all(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize("all_mapped", [True, False], ids=["all-mapped", "some-read"])
async def test_mapped_tensors_are_hashed_where_they_are(make_rig: MakeRig, tmp_path: Path, *, all_mapped: bool) -> None:
    rig = make_rig("host")
    tensors = tensors_of(SmallNet())
    path = (write_checkpoint if all_mapped else write_in_order)(tmp_path / "c", tensors, num_shards=3)
    write_sums(path)
    model = on_meta()
    async with rig.loader(verify="sha256", strategy="map") as loader:
        report = await loader.load(model, path)
        assert_loaded(model, tensors)
        assert (report.strategy, report.verified) == ("map", "sha256 (manifest)")
        mapped = next(said for said in report.decisions if said.startswith("map: "))
        assert (int(mapped.split()[1]) == len(tensors) - 1) == all_mapped  # one is empty
        assert (rig.disk.num_begun == 0) == all_mapped

        found = {name: tensor async for name, tensor in loader.stream(path)}
        assert found.keys() == tensors.keys()
        for name, tensor in found.items():
            assert_same(tensor, tensors[name])

        for file, position in list(spots(path).values())[1:]:
            flip(file, position)
            model = on_meta()
            with pytest.raises(IntegrityError):
                await loader.load(model, path)
            assert all(tensor.is_meta for tensor in model.state_dict().values())
            with pytest.raises(IntegrityError):
                async for _ in loader.stream(path):
                    pass
            flip(file, position)


async def test_stream_honours_it(rig: Rig, saved: Saved) -> None:
    tensors, path = saved
    async with rig.loader(verify="sha256", host_memory=2048 * KIB) as loader:
        stream = loader.stream(path)
        found = {name: tensor.clone() async for name, tensor in stream}
        assert (await stream.report()).verified == "sha256 (manifest)"
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        assert_same(tensor, tensors[name])


async def test_warming_the_page_cache_honours_it(rig: Rig, saved: Saved) -> None:
    _, path = saved
    async with rig.loader(verify="sha256", num_slots=3) as loader:
        report = await loader.warm(path)
        assert (report.verified, rig.disk.num_bytes_begun) == ("sha256 (manifest)", body_bytes(path))
        flip(files_of(path)[1], body_begin(files_of(path)[1]))
        with pytest.raises(IntegrityError):
            await loader.warm(path)


@pytest.mark.parametrize("number", [1, 4, 8])
@pytest.mark.parametrize("strategy", ["stream", "map"])
async def test_cancelled_while_a_chunk_is_hashed(
    rig: Rig, saved: Saved, monkeypatch: pytest.MonkeyPatch, strategy: str, number: int
) -> None:
    if strategy == "map" and rig.device != "host":
        pytest.skip("mapped tensors are on the host")
    hashed = Hashed(monkeypatch)
    hashed.gate, hashed.gate_at = Gate(), 6 + number  # two calls for each of three headers
    tensors, path = saved
    model = on_meta()
    with leaves_nothing():
        async with rig.loader(verify="sha256", num_slots=3, strategy=strategy) as loader:
            handle = await loader.start(model, path)
            hashed.gate.wait_reached()
            cancelling = asyncio.create_task(handle.cancel())
            while handle._job._stop is None:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0)
            hashed.gate.open()
            await cancelling
            with pytest.raises(LoadCancelledError):
                await handle.wait()
            assert all(tensor.is_meta for tensor in model.state_dict().values())
            assert_all_free(rig)
            await loader.load(model, path)
            assert_loaded(model, tensors)


async def test_hash_that_fails_ends_the_load(rig: Rig, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = saved
    update = FileHash.update

    def failing(self: FileHash, memory: bytes | memoryview, *, goes_on: Callable[[], bool] = lambda: True) -> None:
        if isinstance(memory, memoryview):
            raise MemoryError("no memory for hashing")  # noqa: TRY004 - not about the type
        update(self, memory, goes_on=goes_on)

    monkeypatch.setattr(FileHash, "update", failing)
    model = on_meta()
    with leaves_nothing():
        async with rig.loader(verify="sha256") as loader:
            with pytest.raises(MemoryError, match="for hashing"):
                await loader.load(model, path)
            assert_all_free(rig)
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def orders(plan: LoadPlan) -> list[list[tuple[int, int]]]:
    by_shard: dict[int, list[tuple[int, int]]] = {}
    for chunk in plan.chunks:
        by_shard.setdefault(chunk.source.shard, []).append((chunk.source.begin, chunk.source.end))
    return list(by_shard.values())


@pytest.mark.parametrize("what", ["model", "stream", "warm"])
async def test_chunks_of_each_shard_ascend_and_leave_nothing_out(
    rig: Rig, saved: Saved, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    _, path = saved
    plans: list[LoadPlan] = []
    make = planning.make_plan

    def noting(*args: Sequence[object], **options: object) -> LoadPlan:
        plans.append(make(*args, **options))  # type: ignore[arg-type]  # whatever it was called with
        return plans[-1]

    monkeypatch.setattr("weightstream.scheduler.sinks.make_plan", noting)
    async with rig.loader(verify="sha256") as loader:
        if what == "model":
            await loader.load(on_meta(), path)
        elif what == "warm":
            await loader.warm(path)
        else:
            async for _ in loader.stream(path):
                pass
    (plan,) = plans
    for file, ranges in zip(files_of(path), sorted(orders(plan), key=lambda part: part[0][0]), strict=True):
        assert len(ranges) > 0, file
        assert [begin for begin, _ in ranges[1:]] == [end for _, end in ranges[:-1]]


# Files of torch.save


def saved_by_torch(folder: Path, tensors: dict[str, torch.Tensor], *, zipped: bool = True) -> Path:
    """Two files with an index, and a manifest."""
    folder.mkdir()
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file, _use_new_zipfile_serialization=zipped)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map, "pytorch_model.bin.index.json")
    write_sums(folder)
    return folder


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("where", ["meta", "cpu"], ids=["adopt", "in-place"])
@pytest.mark.parametrize("strategy", ["stream", "preload", "direct", "map"])
async def test_torch_files_are_hashed_from_their_first_byte_to_their_last(
    rig: Rig, tmp_path: Path, strategy: str, where: str, *, zipped: bool
) -> None:
    if strategy == "map" and rig.device != "host":
        pytest.skip("tensors in mapped files are on the host")
    tensors = tensors_of(SmallNet())
    path = saved_by_torch(tmp_path / "c", tensors, zipped=zipped)
    with torch.device(where):
        model = SmallNet()
    async with rig.loader(verify="sha256", strategy=strategy) as loader:
        report = await loader.load(model, path)
    assert_loaded(model, tensors)
    assert report.verified == "sha256 (manifest)"
    unwanted = sum(file.stat().st_size for file in path.glob("*.bin")) - report.num_bytes
    assert f"verify: {unwanted} bytes that this load does not need were read to be hashed" in report.decisions


async def test_changed_byte_of_a_torch_file_ends_the_load(rig: Rig, tmp_path: Path) -> None:
    """Also in the padding, which nothing else looks at, and in a tensor."""
    tensors = tensors_of(SmallNet())
    path = saved_by_torch(tmp_path / "c", tensors)
    file = min(path.glob("*.bin"))
    padding = file.read_bytes().index(b"ZZZZ")
    with open_checkpoint(file) as checkpoint:
        tensor = checkpoint.tensors["flag"].begin
    for position in (padding, tensor):
        flip(file, position)
        model = on_meta()
        async with rig.loader(verify="sha256") as loader:
            with pytest.raises(IntegrityError, match="SHA-256 is not what the manifest says") as caught:
                await loader.load(model, path)
        assert file.name in str(caught.value)
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        flip(file, position)
    async with rig.loader(verify="sha256") as loader:
        await loader.load(on_meta(), path)


async def test_tensors_that_share_bytes_are_not_verified(rig: Rig, tmp_path: Path) -> None:
    whole = torch.rand(4, 3)
    torch.save({"a": whole, "b": whole[1:3]}, tmp_path / "model.bin")
    write_sums(tmp_path)
    with torch.device("meta"):
        model = nn.ParameterDict({"a": nn.Parameter(torch.rand(4, 3)), "b": nn.Parameter(torch.rand(2, 3))})
    async with rig.loader(verify="sha256") as loader:
        with pytest.raises(UnsupportedFormatError, match="share bytes"):
            await loader.load(model, tmp_path)
        assert rig.disk.num_bytes_begun == 0
    assert all(tensor.is_meta for tensor in model.state_dict().values())
