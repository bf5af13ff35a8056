"""Lanes whose output one can compute by hand, and the services around them.

Generation says the alphabet on from the last letter of the prompt and ends after z; a script may say
otherwise. Translation shouts the source, with one more "!" for each lower rank. Fill-mask ranks a fixed
list of words. A pair of sentences follows when both have the same length.
"""

import asyncio
from collections.abc import Sequence as Items
from functools import cache
from pathlib import Path
from typing import Any

from app.api.deps import Services
from app.engine.batch import BatchItem, BatchLimits, Logits
from app.engine.decode import DecodeLimits
from app.engine.errors import Aborted, Draining, Overloaded, StepFailed
from app.engine.registry import AnyTask, Registry, Task
from app.engine.sequence import FinishReason, Hypothesis, Sequence, TokenEvent
from app.lifecycle import Lifecycle
from app.settings import Settings
from model.config import TransformerConfig
from model.sampling import BeamParams, SamplingParams
from model.tokenizer import SPECIAL_TOKENS, Tokenizer

WORDS = ("home", "school", "집", "학교")


@cache
def byte_tokenizer() -> Tokenizer:
    """No merges: every UTF-8 byte is a token."""
    return Tokenizer.train([""], 256 + len(SPECIAL_TOKENS))


@cache
def word_tokenizer() -> Tokenizer:
    """Knows WORDS as tokens, with and without a space before them."""
    texts = [text for word in WORDS for text in (f" {word}", word)]
    return Tokenizer.train(texts * 10, 256 + len(SPECIAL_TOKENS) + 60)


class FakeDecodeLane:
    """Runs on the event loop, one task a sequence; `pause_seconds` lie before each token."""

    def __init__(self, tokenizer: Tokenizer, limits: DecodeLimits) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self.pause_seconds = 0.0
        self.scripts: dict[str, list[int]] = {}
        self.fail_at: int | None = None
        self.draining = False
        self.submitted: list[Sequence] = []
        self.running: dict[Sequence, asyncio.Task[None]] = {}

    def submit(self, sequences: list[Sequence]) -> None:
        if self.draining:
            raise Draining(7.0)
        if len(self.running) + len(sequences) > self.limits.max_queue_items:
            raise Overloaded(1.5)
        self.submitted += sequences
        for sequence in sequences:
            sequence.admitted_at = sequence.submitted_at + 0.001
            sequence.prompt_logprobs_out = [None] + [-1.0] * (len(sequence.prompt_ids) - 1)
            self.running[sequence] = asyncio.get_running_loop().create_task(self._run(sequence))

    def abort(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            task = self.running.pop(sequence, None)
            if task is not None:
                task.cancel()
                sequence.deliver(Aborted())

    def abort_all(self) -> None:
        self.abort(list(self.running))

    async def _run(self, sequence: Sequence) -> None:
        try:
            if isinstance(sequence.params, BeamParams):
                await asyncio.sleep(self.pause_seconds)
                sequence.deliver(self._translate(sequence.prompt_ids, sequence.params))
            else:
                await self._generate(sequence, sequence.params)
        except StepFailed as error:
            sequence.deliver(error)
        self.running.pop(sequence, None)

    def _translate(self, source_ids: list[int], params: BeamParams) -> list[Hypothesis]:
        text = self.tokenizer.decode(source_ids).upper()
        return [
            self._hypothesis(text + "!" * rank, rank, params) for rank in range(params.num_return_sequences)
        ]

    def _hypothesis(self, text: str, rank: int, params: BeamParams) -> Hypothesis:
        ids = self.tokenizer.encode(text)
        reason = FinishReason.EOS if len(ids) <= params.max_new_tokens else FinishReason.LENGTH
        ids = ids[: params.max_new_tokens]
        alignment = [[1.0, 0.0] for _ in ids] if params.return_alignment else None
        return Hypothesis(ids, -0.5 - rank, [-0.5] * len(ids), reason, alignment)

    async def _generate(self, sequence: Sequence, params: SamplingParams) -> None:
        text = self.tokenizer.decode(sequence.prompt_ids)
        script = self.scripts.get(text)
        for index in range(1, params.max_new_tokens + 1):
            await asyncio.sleep(self.pause_seconds)
            if self.fail_at == index:
                raise StepFailed("the fake step failed")
            token_id = next_letter(text, self.tokenizer) if script is None else script[index - 1]
            text += self.tokenizer.decode([token_id])
            reason = FinishReason.LENGTH if index == params.max_new_tokens else None
            reason = FinishReason.EOS if token_id == self.tokenizer.eos_id else reason
            logprob = -0.25 * (1 + (params.seed or 0) % 4)
            top = ((token_id, logprob), (self.tokenizer.eos_id, -5.0))[: params.top_n_tokens]
            sequence.deliver(TokenEvent(index, token_id, logprob, top, reason))
            if reason is not None:
                sequence.deliver([])
                return


def next_letter(text: str, tokenizer: Tokenizer) -> int:
    """The letter after the text's last one; the end after z."""
    if text.endswith("z"):
        return tokenizer.eos_id
    return tokenizer.encode(chr(ord(text[-1]) + 1) if text else "a")[0]


class FakeBatchLane:
    """Answers after `pause_seconds`."""

    def __init__(self, tokenizer: Tokenizer, limits: BatchLimits) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self.pause_seconds = 0.0
        self.submitted: list[BatchItem] = []
        self.running: dict[BatchItem, asyncio.Task[None]] = {}

    def submit(self, items: list[BatchItem]) -> None:
        if len(self.running) + len(items) > self.limits.max_queue_items:
            raise Overloaded(0.2)
        self.submitted += items
        for item in items:
            item.started_at = item.submitted_at + 0.001
            self.running[item] = asyncio.get_running_loop().create_task(self._run(item))

    def abort(self, items: list[BatchItem]) -> None:
        for item in items:
            task = self.running.pop(item, None)
            if task is not None:
                task.cancel()
                item.deliver(Aborted())

    def abort_all(self) -> None:
        self.abort(list(self.running))

    async def _run(self, item: BatchItem) -> None:
        await asyncio.sleep(self.pause_seconds)
        if item.task == "fill-mask":
            item.deliver([self._rank(item, k) for k in range(len(item.targets))])
        elif item.task == "classify":
            item.deliver(Logits([float(item.n_tokens), 0.0, -1.0]))
        else:
            item.deliver(0.75 if item.segment_ids.count(0) - 2 == item.segment_ids.count(1) - 1 else 0.25)
        self.running.pop(item, None)

    def _rank(self, item: BatchItem, k: int) -> list[tuple[int, float]]:
        space = " " if item.allowed[k] == "space" else ""
        ids = item.targets[k] or [self.tokenizer.encode(space + word)[0] for word in WORDS]
        return [(token_id, 0.5**rank) for rank, token_id in enumerate(ids, start=1)][: item.top_k]


class FakeWorker:
    """There is no thread: the lanes run on the event loop."""

    def __init__(self, lanes: Items[FakeDecodeLane | FakeBatchLane]) -> None:
        self.lanes = list(lanes)
        self.fault: str | None = "not started"

    def add(self, lane: FakeDecodeLane | FakeBatchLane) -> None:
        self.lanes.append(lane)

    async def remove(self, lane: FakeDecodeLane | FakeBatchLane) -> None:
        self.lanes.remove(lane)
        lane.abort_all()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.fault = None

    def begin_drain(self) -> None:
        for lane in self.lanes:
            if isinstance(lane, FakeDecodeLane):
                lane.draining = True

    def stop(self) -> None:
        """Called from another thread, as the real one is."""
        self.fault = "stopped"
        for lane in self.lanes:
            self.loop.call_soon_threadsafe(lane.abort_all)


class FakeWorkshop:
    """Nothing needs to be warm; what it builds, a test puts into `ready` by endpoint and name."""

    def __init__(self) -> None:
        self.ready: dict[tuple[str, str], AnyTask | Exception] = {}

    def build(self, endpoint: str, name: str, folder: Path, loaded: list[AnyTask]) -> AnyTask:
        built = self.ready[endpoint, name]
        if isinstance(built, Exception):
            raise built
        return built

    async def warm_up(self, endpoint: str, task: AnyTask) -> None:
        return None


def make_settings(**values: object) -> Settings:
    """Settings that no environment and no `.env` can change; by default without examples."""
    return Settings(_env_file=None, **({"examples": ""} | values))  # type: ignore[arg-type]


def load_fakes(settings: Settings, lifecycle: Lifecycle) -> Services:
    """In the place of `load_services`."""
    decode_limits = DecodeLimits(64, 100, 8, 16, 2000)
    translate = FakeDecodeLane(byte_tokenizer(), decode_limits)
    generate = FakeDecodeLane(byte_tokenizer(), decode_limits)
    fill_mask = FakeBatchLane(word_tokenizer(), BatchLimits(32, 16, 2000))
    tasks: dict[str, list[Any]] = {
        "translate": [Task(translate, byte_tokenizer(), make_config("translator"), "shout", "aa")],
        "fill-mask": [Task(fill_mask, word_tokenizer(), make_config("masked_lm"), "words", "bb")],
        "generate": [Task(generate, byte_tokenizer(), make_config("causal_lm"), "alphabet", "cc")],
    }
    worker = FakeWorker([translate, generate, fill_mask])
    registry = Registry(tasks, worker, FakeWorkshop(), max_models=settings.max_models)
    return Services(registry, settings, lifecycle)


def classify_task(name: str = "moods", sha256: str = "dd") -> Task[Any]:
    """A classifier of three labels; the first has the number of a text's tokens for its logit."""
    lane = FakeBatchLane(word_tokenizer(), BatchLimits(32, 16, 2000))
    return Task(lane, word_tokenizer(), make_config("classifier"), name, sha256)


def generate_task(name: str, sha256: str) -> Task[Any]:
    """One more alphabet."""
    lane = FakeDecodeLane(byte_tokenizer(), DecodeLimits(64, 100, 8, 16, 2000))
    return Task(lane, byte_tokenizer(), make_config("causal_lm"), name, sha256)


def make_config(architecture: str) -> TransformerConfig:
    n_encoder, n_decoder = architecture != "causal_lm", architecture in ("translator", "causal_lm")
    return TransformerConfig(
        architecture=architecture,  # type: ignore[arg-type]
        vocab_size=300,
        n_encoder_layers=int(n_encoder),
        n_decoder_layers=int(n_decoder),
        labels=["glad", "calm", "sad"] if architecture == "classifier" else [],
    )
