"""Lanes come and go under a running worker; models are built, proved, replaced and forgotten."""

import asyncio
import dataclasses
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from app import metrics
from app.engine.batch import BatchItem, Logits
from app.engine.errors import Aborted, Draining, ModelConflict, NoRoom, NoSuchModel, UnfitModel
from app.engine.memory import (
    RowSizing,
    _available,
    _Cgroup,
    _left_in_container,
    cache_bytes,
    free_bytes,
    held_bytes,
    total_bytes,
    weight_bytes,
)
from app.engine.registry import Registry, Task, in_thread
from app.engine.sequence import Sequence
from app.engine.worker import DeviceWorker
from app.engine.workshop import ModelWorkshop, share_weights
from model import checkpoint
from model.adapter import Adapter
from model.adopted import AdoptedTokenizer, Manner
from model.checkpoint import CheckpointError
from model.models import build_model
from model.quantize import Int8Linear
from model.sampling import SamplingParams
from model.tokenizer import Tokenizer
from tests.engine.test_worker import Ball, Juggler
from tests.tiny import TinyFolders, fitting_config

CPU = torch.device("cpu")


def make_workshop(**changes: Any) -> ModelWorkshop:
    numbers: dict[str, Any] = {
        "n_slots": {"translate": 4, "generate": 3},
        "prefill_tokens": 64,
        "max_batch_tokens": 256,
        "max_queue_items": 50,
        "max_queue_tokens": 5000,
        "max_wait_seconds": 600.0,
    }
    return ModelWorkshop(CPU, torch.float32, **numbers | changes)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.fixture
async def worker() -> AsyncIterator[DeviceWorker]:
    worker = DeviceWorker([])
    worker.start(asyncio.get_running_loop())
    yield worker
    worker.stop()


@pytest.fixture
def registry(worker: DeviceWorker) -> Iterator[Registry]:
    registry = Registry({}, worker, make_workshop(), max_models=2)
    yield registry
    for name in ("a", "b"):
        metrics.remove_model("generate", name)


# The worker


async def test_a_lane_that_comes_later_has_its_turns(worker: DeviceWorker) -> None:
    lane, ball = Juggler(), Ball(3)
    worker.add(lane)
    lane.throw([ball])
    await asyncio.wait_for(ball.back.wait(), 10)
    assert ball.deliveries == [1, 2, 3]


async def test_what_a_lane_still_holds_ends_as_aborted(worker: DeviceWorker) -> None:
    leaving, staying = Juggler("leaving"), Juggler("staying")
    balls = [Ball(1000_000), Ball(5)]
    for lane, ball in ((leaving, balls[0]), (staying, balls[1])):
        worker.add(lane)
        lane.throw([ball])
    await worker.remove(leaving)
    await asyncio.wait_for(balls[1].back.wait(), 10)
    assert isinstance(balls[0].deliveries[-1], Aborted)
    assert worker.lanes == [staying]
    with pytest.raises(Draining):
        leaving.throw([Ball(1)])
    n_turns = leaving.n_turns
    await asyncio.sleep(0.01)
    assert leaving.n_turns == n_turns
    assert leaving.door.n_inside == 0


async def test_removing_from_a_worker_that_has_stopped() -> None:
    worker, lane = DeviceWorker([]), Juggler()
    worker.start(asyncio.get_running_loop())
    worker.add(lane)
    worker.stop()
    await asyncio.wait_for(worker.remove(lane), 10)
    assert worker.lanes == []
    late = Juggler()
    worker.add(late)
    assert late.door.draining


async def test_many_lanes_come_and_go_at_once(worker: DeviceWorker) -> None:
    async def visit(n_turns: int) -> list[Any]:
        lane, ball = Juggler(), Ball(n_turns)
        worker.add(lane)
        lane.throw([ball])
        await asyncio.wait_for(ball.back.wait(), 10)
        await worker.remove(lane)
        return ball.deliveries

    assert await asyncio.gather(*map(visit, range(1, 40))) == [list(range(1, n + 1)) for n in range(1, 40)]
    assert worker.lanes == []


# Building


def test_what_a_model_needs(tiny_folders: TinyFolders) -> None:
    built = make_workshop().build("generate", "some", tiny_folders.generate, [])
    lane: Any = built.lane
    held = sum(p.nbytes for p in lane.runner.model.parameters()) + lane.runner.cache.n_bytes
    assert built.n_bytes == held
    assert held == weight_bytes(built.config, torch.float32) + cache_bytes(built.config, torch.float32, 3)
    translator = make_workshop().build("translate", "some", tiny_folders.translate, [])
    runner: Any = translator.lane.runner  # type: ignore[union-attr]
    held = sum(p.nbytes for p in runner.model.parameters()) + runner.cache.n_bytes + runner.memory.n_bytes
    assert translator.n_bytes == held
    assert built.lane.name == "generate"  # type: ignore[union-attr]
    assert (built.name, lane.runner.model_name) == ("some", "some")


def test_8_bits_are_for_models_trained_here_unless_asked_for(
    tiny_folders: TinyFolders, tmp_path: Path
) -> None:
    own = checkpoint.load(tiny_folders.generate)
    manner = Manner("bytes", own.tokenizer.vocab_size, sorted(own.tokenizer.special_ids), eos_id=2, bos_id=1)
    checkpoint.save(tmp_path, own.model, AdoptedTokenizer(own.tokenizer.backend, manner))

    def is_int8(folder: Path, **choice: str) -> bool:
        model = make_workshop(**choice).build("generate", "some", folder, []).model
        assert model is not None
        return any(isinstance(module, Int8Linear) for module in model.modules())

    choices = [{}, {"quantization": "none"}, {"quantization": "auto"}, {"quantization": "int8"}]
    assert [is_int8(tiny_folders.generate, **choice) for choice in choices] == [False, False, True, True]
    assert [is_int8(tmp_path, **choice) for choice in choices] == [False, False, False, True]


def test_what_does_not_fit_is_refused(tiny_folders: TinyFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_workshop().build("generate", "first", tiny_folders.generate, [])
    enough = make_workshop(max_bytes=2 * first.n_bytes)
    assert enough.build("generate", "second", tiny_folders.generate, [first]).name == "second"
    short = make_workshop(max_bytes=2 * first.n_bytes - 1)
    message = f"needs {first.n_bytes} bytes .* there are left {first.n_bytes - 1}"
    with pytest.raises(NoRoom, match=message):
        short.build("generate", "second", tiny_folders.generate, [first])
    # The second shares the first one's weights, so that there is room for a third beside them.
    second = enough.build("generate", "second", tiny_folders.generate, [first])
    three = make_workshop(max_bytes=3 * first.n_bytes - held_bytes([first.model]))
    assert three.build("generate", "third", tiny_folders.generate, [first, second]).model is not None
    monkeypatch.setattr("app.engine.workshop.free_bytes", lambda device: first.n_bytes - 1)
    with pytest.raises(NoRoom, match=f"the device has {first.n_bytes - 1}"):
        make_workshop().build("generate", "second", tiny_folders.generate, [])


def test_big_models_get_fewer_rows_where_nobody_said_how_many(
    tiny_folders: TinyFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = checkpoint.load_config(tiny_folders.generate)
    weights, row = weight_bytes(config, torch.float32), cache_bytes(config, torch.float32, 1)

    def n_rows(n_free: int, fewest: int | None, **changes: Any) -> int:
        monkeypatch.setattr("app.engine.workshop.free_bytes", lambda _: n_free)
        changes |= {"n_slots": {"generate": 12}, "fewest": {"generate": fewest} if fewest else {}}
        task: Any = make_workshop(**changes).build("generate", "g", tiny_folders.generate, [])
        return int(task.lane.limits.n_slots)

    assert n_rows(weights + 12 * row, 3) == 12
    assert n_rows(weights + 12 * row - 1, 3) == 6
    assert n_rows(weights + 3 * row, 3) == 3
    assert n_rows(weights + 12 * row, 3, max_bytes=weights + 6 * row) == 6
    with pytest.raises(NoRoom):
        n_rows(weights + 3 * row - 1, 3)
    with pytest.raises(NoRoom):
        n_rows(weights + 12 * row - 1, None)


def test_rows_fill_the_share_of_memory_that_they_may(
    tiny_folders: TinyFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a device of a million bytes, whose allocator says what it has left."""
    config = checkpoint.load_config(tiny_folders.generate)
    row = cache_bytes(config, torch.float32, 1) + 4 * config.vocab_size
    translating = checkpoint.load_config(tiny_folders.translate)
    wide_row = cache_bytes(translating, torch.float32, 1) + 4 * translating.vocab_size
    kept = cache_bytes(config, torch.float32, 1, 0, 64) - cache_bytes(config, torch.float32, 1)
    free, reserved, allocated = 40 * row, 7 * row, 2 * row  # 45 rows are to be had
    total = 100 * row
    monkeypatch.setattr("app.engine.workshop.total_bytes", lambda _: total)
    monkeypatch.setattr("app.engine.workshop.free_bytes", lambda _: free + reserved - allocated)
    monkeypatch.setattr("app.engine.workshop.pass_bytes", lambda _, n_tokens: 64 * row // n_tokens)

    def n_rows(*endpoints: str, utilization: float = 0.9, most: int = 256, n_sharing: int = 1) -> list[int]:
        sizing = RowSizing(frozenset(endpoints[:1]), utilization, most, n_sharing)
        workshop = make_workshop(sizing=sizing, n_prefix_tokens=64)
        folders = {"generate": tiny_folders.generate, "translate": tiny_folders.translate}
        tasks = [workshop.build(endpoint, endpoint, folders[endpoint], []) for endpoint in endpoints]
        for task in tasks:
            lane: Any = task.lane
            assert lane.runner.cache.n_slots == lane.scheduler.n_slots == lane.limits.n_slots
            kept_too = kept if task.name == "generate" else 0
            assert task.n_cache_bytes >= lane.runner.cache.n_bytes + kept_too
        return [task.lane.limits.n_slots for task in tasks]  # type: ignore[union-attr]

    # 90 of 100, less the 55 that are taken; a pass takes one, and what is kept of prompts its own.
    assert n_rows("generate") == [(34 * row - kept) // row]
    assert n_rows("generate", utilization=0.7) == [(14 * row - kept) // row]
    assert n_rows("generate", most=5) == [5]
    assert n_rows("generate", utilization=0.56) == [3]  # the least
    # The other's rows were given, and its share is left to it.
    assert n_rows("generate", "translate", n_sharing=2) == [(35 * row // 2 - row - kept) // row, 4]
    assert n_rows("translate", n_sharing=1) == [(34 * row) // wide_row]
    assert make_workshop().build("generate", "g", tiny_folders.generate, []).lane.limits.n_slots == 3  # type: ignore[union-attr]


def test_what_a_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (500, 1000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: 90)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: 20)
    assert (free_bytes(cuda), total_bytes(cuda)) == (570, 1000)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_ends_while_loading(
    tiny_folders: TinyFolders, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("app.engine.workshop.load", fail)
    with pytest.raises(NoRoom):
        make_workshop().build("generate", "some", tiny_folders.generate, [])
    monkeypatch.setattr("app.engine.workshop.load", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_workshop().build("generate", "some", tiny_folders.generate, [])


def test_free_memory(tmp_path: Path) -> None:
    free = free_bytes(CPU)
    assert free is None or free > 0
    meminfo = tmp_path / "meminfo"
    assert _available(meminfo) is None
    meminfo.write_text("MemTotal:  9 kB\nMemAvailable:       7 kB\n")
    assert _available(meminfo) == 7 * 1024
    group = _Cgroup(tmp_path, "max", "now", "inactive_file")
    assert _left_in_container([group]) is None
    (tmp_path / "max").write_text("1000\n")
    (tmp_path / "now").write_text("700\n")
    assert _left_in_container([group]) == 300
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 50\n")
    assert _left_in_container([group]) == 350
    (tmp_path / "max").write_text("max\n")
    assert _left_in_container([group]) is None


# An addition to a masked model


@pytest.fixture(scope="module")
def addition(
    tiny_folders: TinyFolders, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A classifier that shares all but one map with the masked model beside it."""
    root = tmp_path_factory.mktemp("addition")
    (root / "fill-mask").symlink_to(tiny_folders.fill_mask)
    labels = ["no", "yes"]
    whole = build_model(
        fitting_config(
            "classifier", tokenizer, positions="rotary", n_decoder_layers=0, n_segments=2, labels=labels
        )
    )
    own = {name: t.detach() for name, t in whole.named_parameters() if name.startswith("head.")}
    name = next(n for n, p in whole.named_parameters() if n.startswith("encoder.") and p.ndim == 2)
    shape = dict(whole.named_parameters())[name].shape
    own |= {f"{name}.up": torch.ones(shape[0], 2), f"{name}.down": torch.ones(2, shape[1])}
    sha256 = checkpoint.file_sha256(tiny_folders.fill_mask / "model.safetensors")
    checkpoint.save_adapter(root / "classify", Adapter("../fill-mask", sha256, 0.1, labels), own)
    return root / "classify"


async def test_a_shared_encoder_is_held_once(
    addition: Path, tiny_folders: TinyFolders, worker: DeviceWorker, tokenizer: Tokenizer
) -> None:
    workshop = make_workshop()
    alone = workshop.build("classify", "alone", addition, [])
    base = workshop.build("fill-mask", "base", tiny_folders.fill_mask, [])
    beside = workshop.build("classify", "beside", addition, [base])
    assert alone.model is not None
    assert base.model is not None
    assert beside.model is not None
    pointers = {p.data_ptr() for p in base.model.parameters()}
    own = {n: p for n, p in beside.model.named_parameters() if p.data_ptr() not in pointers}
    together = held_bytes([base.model, beside.model])
    assert together - base.n_bytes == sum(p.nbytes for p in own.values()) < alone.n_bytes / 4
    assert beside.n_bytes == alone.n_bytes
    assert {name.partition(".")[0] for name in own} == {"head", "encoder"}
    assert len([name for name in own if name.startswith("encoder.")]) == 1
    ids = [tokenizer.cls_id, *tokenizer.encode("I go home."), tokenizer.sep_id]
    results = []
    for task in (alone, beside):
        lane: Any = task.lane
        worker.add(lane)
        item = BatchItem(token_ids=ids, segment_ids=[0] * len(ids), task="classify")
        lane.submit([item])
        results.append(await asyncio.wait_for(item.result(), 10))
    assert isinstance(results[0], Logits)
    assert results[0] == results[1]
    with torch.inference_mode():
        expected = alone.model(torch.tensor([ids]))[0].tolist()
    assert results[0] == pytest.approx(expected, abs=1e-5)


async def test_labels_in_a_batch_are_those_of_each_alone(
    addition: Path, worker: DeviceWorker, tokenizer: Tokenizer
) -> None:
    task = make_workshop().build("classify", "some", addition, [])
    texts = ["I go home.", "", "나는 집에 간다. 형은 피곤할 때 국을 끓인다."]
    rows = [[tokenizer.cls_id, *tokenizer.encode(text), tokenizer.sep_id] for text in texts]
    items = [BatchItem(token_ids=row, segment_ids=[0] * len(row), task="classify") for row in rows]
    lane: Any = task.lane
    lane.submit(items)
    worker.add(lane)  # after the work: all of it is one batch
    assert task.model is not None
    for row, item in zip(rows, items, strict=True):
        with torch.inference_mode():
            alone = task.model(torch.tensor([row]))[0].tolist()
        assert await asyncio.wait_for(item.result(), 10) == pytest.approx(alone, abs=1e-5)


def test_only_what_is_the_same_is_shared(tiny_folders: TinyFolders) -> None:
    one, two = (checkpoint.load(tiny_folders.fill_mask).model for _ in range(2))
    with torch.no_grad():
        two.embeddings.tokens.weight[3, 3] += 1
    share_weights(one, [two])
    assert held_bytes([one, two]) == held_bytes([one]) + one.embeddings.tokens.weight.nbytes
    assert one.embeddings.tokens.weight is not two.embeddings.tokens.weight
    same = checkpoint.load(tiny_folders.fill_mask).model
    share_weights(same, [one])
    assert held_bytes([same, one]) == held_bytes([same]) == held_bytes([one])  # what is tied is so still
    other = checkpoint.load(tiny_folders.fill_mask, dtype=torch.bfloat16).model
    share_weights(other, [two])
    assert held_bytes([other, two]) == held_bytes([other]) + held_bytes([two])


# The registry


async def test_load_replace_unload(registry: Registry, tiny_folders: TinyFolders) -> None:
    first = await registry.load("generate", "a", tiny_folders.generate)
    assert registry.generate.default is first
    second = await registry.load("generate", "b", tiny_folders.generate)
    assert registry.generate.names == ["a", "b"]
    with pytest.raises(ModelConflict, match="generate has 2 models, the limit is 2"):
        await registry.load("generate", "c", tiny_folders.generate)
    third = await registry.load("generate", "a", tiny_folders.generate)
    assert registry.generate.default is third  # in the first one's place
    await until(lambda: not registry.leaving)
    assert {id(lane) for lane in registry.worker.lanes} == {id(second.lane), id(third.lane)}  # type: ignore[attr-defined]
    registry.unload("generate", "a")
    assert registry.generate.default is second
    for endpoint, name in (("generate", "a"), ("translate", "b"), ("nothing", "b")):
        with pytest.raises(NoSuchModel, match=f"no model '{name}' for {endpoint}"):
            registry.unload(endpoint, name)


async def test_a_model_leaves_with_its_last_user_and_its_memory_is_free(
    registry: Registry, tiny_folders: TinyFolders
) -> None:
    old = await registry.load("generate", "a", tiny_folders.generate)
    assert old.model is not None
    lane: Any = old.lane
    traces = [weakref.ref(old.model), weakref.ref(lane.runner.cache), weakref.ref(lane)]
    old.n_users = 1
    await registry.load("generate", "a", tiny_folders.generate)
    sequence = Sequence([300, 301], SamplingParams(max_new_tokens=3))
    await asyncio.sleep(0.05)
    lane.submit([sequence])  # chosen before, submitted after: the old one still takes it
    await asyncio.wait_for(sequence.result(), 10)
    assert [task for _, task in registry.leaving] == [old]
    old.n_users = 0
    await until(lambda: not registry.leaving)
    del old, lane
    gc.collect()
    assert [trace() for trace in traces] == [None, None, None]


async def test_what_fails_leaves_the_running_one(
    registry: Registry, tiny_folders: TinyFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await registry.load("generate", "a", tiny_folders.generate)
    (tmp_path / "cut").mkdir()
    for file in tiny_folders.generate.iterdir():
        (tmp_path / "cut" / file.name).write_bytes(file.read_bytes()[:5000])
    for folder in (tmp_path / "cut", tmp_path / "none", tiny_folders.translate):
        with pytest.raises(CheckpointError):
            await registry.load("generate", "a", folder)
    nan = checkpoint.load(tiny_folders.generate)
    for parameter in nan.model.parameters():
        parameter.fill_(float("nan"))
    checkpoint.save(tmp_path / "nan", nan.model, nan.tokenizer, torch.float32)
    with pytest.raises(UnfitModel, match="first work failed"):
        await registry.load("generate", "a", tmp_path / "nan")
    assert registry.generate.default is running
    assert registry.worker.lanes == [running.lane]  # type: ignore[attr-defined]
    assert registry.loading is None
    lane: Any = running.lane
    sequence = Sequence([300, 301], SamplingParams(max_new_tokens=3))
    lane.submit([sequence])
    assert len((await sequence.result())[0].token_ids) <= 3


async def test_closed(registry: Registry, tiny_folders: TinyFolders) -> None:
    task = await registry.load("generate", "a", tiny_folders.generate)
    task.n_users = 1
    registry.unload("generate", "a")
    registry.close()
    with pytest.raises(Draining):
        await registry.load("generate", "a", tiny_folders.generate)
    await asyncio.sleep(0.05)
    assert len(registry.leaving) == 1  # it waits for nobody any more


async def test_loading_is_off_the_event_loop_and_off_the_device_thread(
    registry: Registry, worker: DeviceWorker, tiny_folders: TinyFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, names = threading.Event(), []
    load = checkpoint.load

    def slow(*args: Any, **kwargs: Any) -> Any:
        names.append(threading.current_thread().name)
        assert gate.wait(10)
        return load(*args, **kwargs)

    monkeypatch.setattr("app.engine.workshop.load", slow)
    loading = asyncio.create_task(registry.load("generate", "a", tiny_folders.generate))
    await until(lambda: names)
    other, ball = Juggler(), Ball(20)
    worker.add(other)
    other.throw([ball])
    await asyncio.wait_for(ball.back.wait(), 10)
    assert not loading.done()
    with pytest.raises(ModelConflict, match="'a' is being loaded for generate"):
        await registry.load("generate", "b", tiny_folders.generate)
    gate.set()
    assert (await loading).name == "a"
    assert names == ["load"]


async def test_in_thread_passes_on_what_comes_out() -> None:
    assert await in_thread(lambda: threading.current_thread().daemon)
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 / 0)
    given_up = asyncio.create_task(in_thread(threading.Event().is_set))
    await asyncio.sleep(0)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    await asyncio.sleep(0.01)


def test_a_task_is_itself() -> None:
    first: Task[Any] = Task(None, None, None, "a", "b")  # type: ignore[arg-type]
    assert first != dataclasses.replace(first)
