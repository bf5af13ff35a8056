"""Who takes part: this project's engine and what a user would pick instead, each in a process of its own.

A process a contestant, because thread pools in one process fight: only the one whose turn it is has work,
and the others' threads sleep.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.workload import Case

Outputs = list[list[int]]  # per prompt the new tokens

_WARM_TOKENS = 8


class Contestant(ABC):
    """Runs cases on one folder's weights."""

    @abstractmethod
    def run(self, case: Case) -> tuple[Outputs, float]:
        """What came out, and the seconds that it took."""

    def prepare(self, case: Case) -> str:
        """Make ready for a case, its warm-up included; returns a note on how it will be run."""
        self.run(Case(case.task, case.prompts, min(case.n_new, _WARM_TOKENS), case.num_beams))
        return ""

    def close(self) -> None:  # noqa: B027  # most hold nothing
        """Let go of threads and files."""


class _Service:
    """All of the service but HTTP: settings, models, lanes and the device thread, on a loop of its own."""

    def __init__(self, settings: dict[str, Any], where: Path) -> None:
        from app.lifecycle import Lifecycle
        from app.main import load_services, warm_up
        from app.settings import Settings

        logging.getLogger("app").setLevel(logging.ERROR)  # it warns of every model that is not there
        self.loop = asyncio.new_event_loop()
        own = {"examples": ""} | settings  # which texts are like known ones is no matter of the engine
        with contextlib.chdir(where):
            self.services = load_services(Settings(**own), Lifecycle())
        self.services.worker.start(self.loop)
        self.loop.run_until_complete(warm_up(self.services))

    def close(self) -> None:
        self.services.worker.stop()
        self.loop.close()


class Engine(Contestant):
    """The real thing without HTTP: settings, scheduler, runner and device thread, as the service has them."""

    def __init__(self, folder: Path, task: str, settings: dict[str, Any]) -> None:
        # It is asked for all at once, and may take as long as it takes.
        model = {f"{task}_model": str(folder.resolve()), "max_wait_seconds": 3600.0}
        # From an empty folder: no `.env`, and the models that are not measured are not there.
        with tempfile.TemporaryDirectory() as empty:
            self._service = _Service(model | settings, Path(empty))

    def run(self, case: Case) -> tuple[Outputs, float]:
        return self._service.loop.run_until_complete(self._run(case))

    async def _run(self, case: Case) -> tuple[Outputs, float]:
        sequences = [make_sequence(case, prompt) for prompt in case.prompts]
        started = time.perf_counter()
        results = await self._results(case.task, sequences)
        return [best[0].token_ids for best in results], time.perf_counter() - started

    def results(self, task: str, sequences: list[Any]) -> list[Any]:
        """What comes out of sequences that are submitted together, the hypotheses of each."""
        return self._service.loop.run_until_complete(self._results(task, sequences))

    async def _results(self, task: str, sequences: list[Any]) -> list[Any]:
        lane: Any = self._service.services.tasks[task].lane
        lane.submit(sequences)
        return [await sequence.result() for sequence in sequences]

    def close(self) -> None:
        self._service.close()


def make_sequence(case: Case, prompt: list[int]) -> Any:
    """A prompt of a case as the engine's unit of work."""
    from app.engine.sequence import Sequence
    from model.sampling import BeamParams, SamplingParams

    n, beams = case.n_new, case.num_beams
    if case.task == "generate":
        return Sequence(prompt, SamplingParams(max_new_tokens=n, min_new_tokens=n))
    return Sequence(prompt, BeamParams(num_beams=beams, max_new_tokens=n, min_new_tokens=n))


@dataclass(frozen=True)
class Loop:
    """A closed loop without HTTP: seconds in all and of each request, and the tokens that came out."""

    seconds: float
    latencies: list[float]
    n_tokens: int


class Bare:
    """The service's engine with its settings, asked directly what `benchmarks.serve` asks over HTTP."""

    def __init__(self, folder: Path, task: str, settings: dict[str, Any]) -> None:
        self._service = _Service(settings, folder)
        self._task: Any = self._service.services.tasks[task]
        self._name = task

    def loop(self, texts: list[str], n_clients: int, n_new: int, sampling: dict[str, Any]) -> Loop:
        """So many clients, each asking for the next text when its last one is done."""
        return self._service.loop.run_until_complete(self._loop(texts, n_clients, n_new, sampling))

    async def _loop(self, texts: list[str], n_clients: int, n_new: int, sampling: dict[str, Any]) -> Loop:
        waiting = iter([self._work(text, n_new, sampling) for text in texts])
        latencies: list[float] = []
        n_tokens = 0

        async def client() -> None:
            nonlocal n_tokens
            for work in waiting:
                started = time.perf_counter()
                self._task.lane.submit([work])
                await work.result()
                latencies.append(time.perf_counter() - started)
                n_tokens += getattr(work, "n_generated_tokens", 0)

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(n_clients)))
        return Loop(time.perf_counter() - started, latencies, n_tokens)

    def _work(self, text: str, n_new: int, sampling: dict[str, Any]) -> Any:
        from app.engine.batch import BatchItem
        from app.engine.sequence import Sequence
        from model.sampling import BeamParams, SamplingParams

        tokenizer = self._task.tokenizer
        if self._name == "generate":
            return Sequence(tokenizer.encode(text), SamplingParams(max_new_tokens=n_new, **sampling))
        if self._name == "translate":
            source = tokenizer.source_ids(tokenizer.encode(text), "ko")
            own = self._task.config  # as the service asks where a client does not
            asked = {"length_penalty": own.length_penalty, "round_trip": own.round_trip}
            return Sequence(source, BeamParams(num_beams=4, max_new_tokens=n_new, **asked))
        ids, spaced = tokenizer.encode_masked(text)
        ids = [tokenizer.cls_id, *ids, tokenizer.sep_id]
        return BatchItem(
            token_ids=ids,
            segment_ids=[0] * len(ids),
            task="fill-mask",
            top_k=5,
            targets=[None] * len(spaced),
            allowed=["space" if space else "no_space" for space in spaced],
        )

    def close(self) -> None:
        """End the device thread."""
        self._service.close()


@dataclass(frozen=True)
class _Mode:
    """A way to run `transformers`' generate."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False


class Transformers(Contestant):
    """`generate` of transformers, in whichever of its cache and compile settings is fastest for the case."""

    def __init__(self, folder: Path, device: str, dtype: str, n_threads: int, compile_too: bool) -> None:
        from transformers.utils import logging

        from benchmarks.convert import transformers_model

        logging.set_verbosity_error()
        torch.set_num_threads(n_threads)
        self._device = device
        self._model = transformers_model(folder).to(device=device, dtype=getattr(torch, dtype))
        self._modes = list(_modes(device, compile_too))
        self._mode = self._modes[0]

    def prepare(self, case: Case) -> str:
        """Choose the mode on an eighth of the length; a compiled one runs once at full length."""
        n_new = max(_WARM_TOKENS, case.n_new // 8)
        trial = Case(case.task, case.prompts, n_new, case.num_beams)
        seconds: dict[str, float] = {}
        for mode in self._modes:
            try:
                self._generate(trial, mode)
                seconds[mode.name] = self._generate(trial, mode)[1]
            except Exception as error:
                print(f"  transformers, {mode.name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        if not seconds:
            raise RuntimeError("no cache setting of transformers works for this case")
        self._mode = min(self._modes, key=lambda mode: seconds.get(mode.name, float("inf")))
        if self._mode.compiled:
            self._generate(case, self._mode)
        tried = ", ".join(f"{name} {trial.n_tokens / s:.0f}" for name, s in seconds.items())
        return f"{self._mode.name} (tried with {n_new} new tokens, tokens/s: {tried})"

    def run(self, case: Case) -> tuple[Outputs, float]:
        return self._generate(case, self._mode)

    @torch.inference_mode()
    def _generate(self, case: Case, mode: _Mode) -> tuple[Outputs, float]:
        ids = torch.tensor(case.prompts, device=self._device)
        started = time.perf_counter()
        out = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=case.num_beams,
            max_new_tokens=case.n_new,
            min_new_tokens=case.n_new,
            length_penalty=1.0,
            early_stopping=False,
            **mode.options,
        )
        rows = out.tolist()  # waits for the device
        taken = time.perf_counter() - started
        return [row[-case.n_new :] for row in rows], taken


def _modes(device: str, compile_too: bool) -> Iterator[_Mode]:
    yield _Mode("dynamic cache")
    yield _Mode("static cache", {"cache_implementation": "static", "disable_compile": True})
    if compile_too:
        from transformers import CompileConfig

        config = CompileConfig(mode="reduce-overhead" if device == "cuda" else "default")
        config._compile_all_devices = True  # noqa: SLF001  # the only switch for a CPU
        yield _Mode(
            "static cache, compiled", {"cache_implementation": "static", "compile_config": config}, True
        )


class CTranslate2(Contestant):
    """The compiled engine; all inputs of a case in one batch."""

    def __init__(
        self, folder: Path, device: str, compute_type: str, n_threads: int, use_map: bool = False
    ) -> None:
        """With `use_map` translations choose among the tokens of the folder's shortlist."""
        import ctranslate2

        from benchmarks.convert import ctranslate2_folder
        from model.checkpoint import load_config

        self._use_map = use_map
        maker = {"causal_lm": ctranslate2.Generator, "translator": ctranslate2.Translator}
        with tempfile.TemporaryDirectory() as scratch:
            out = ctranslate2_folder(folder, Path(scratch) / "model")
            self._model = maker[load_config(folder).architecture](
                str(out), device=device, compute_type=compute_type, inter_threads=1, intra_threads=n_threads
            )

    def run(self, case: Case) -> tuple[Outputs, float]:
        prompts = [[str(token) for token in prompt] for prompt in case.prompts]
        started = time.perf_counter()
        if case.task == "generate":
            found = self._model.generate_batch(
                prompts, max_length=case.n_new, min_length=case.n_new, include_prompt_in_result=False
            )
            outputs = [result.sequences[0] for result in found]
        else:
            found = self._model.translate_batch(
                prompts,
                beam_size=case.num_beams,
                max_decoding_length=case.n_new,
                min_decoding_length=case.n_new,
                use_vmap=self._use_map,
            )
            outputs = [result.hypotheses[0] for result in found]
        taken = time.perf_counter() - started
        return [[int(token) for token in output] for output in outputs], taken


KINDS: dict[str, Callable[..., Contestant | Bare]] = {
    "engine": Engine,
    "bare": Bare,
    "transformers": Transformers,
    "ctranslate2": CTranslate2,
}


# What `python -m app` sets before torch is loaded.
_AS_THE_SERVICE = {"OMP_WAIT_POLICY": "PASSIVE"}
_VARIABLES = {"engine": _AS_THE_SERVICE, "bare": _AS_THE_SERVICE}


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """With variables that are not set otherwise, for the processes that are started meanwhile."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


class ContestantFailed(Exception):
    """A contestant's process could not do what it was asked; the message is its traceback."""


class Remote:
    """A contestant in a process of its own, with the same methods."""

    def __init__(self, name: str, kind: str, folder: Path, options: dict[str, Any]) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, kind, folder, options), name=name, daemon=True
        )
        with _environment(_VARIABLES.get(kind, {})):
            self._process.start()
        theirs.close()
        self._answer()

    def prepare(self, case: Case) -> str:
        """Make ready for a case; raises `ContestantFailed`."""
        return str(self._ask("prepare", case))

    def run(self, case: Case) -> tuple[Outputs, float]:
        """Outputs and seconds; raises `ContestantFailed`, also where lengths are not those of the case."""
        outputs, seconds = self._ask("run", case)
        wrong = {len(output) for output in outputs} - {case.n_new}
        if wrong or len(outputs) != len(case.prompts):
            raise ContestantFailed(f"{self.name}: {len(outputs)} outputs, lengths {wrong} not {case.n_new}")
        return outputs, seconds

    def loop(self, texts: list[str], n_clients: int, n_new: int, sampling: dict[str, Any]) -> Loop:
        """For a bare engine; raises `ContestantFailed`."""
        done = self._ask("loop", texts, n_clients, n_new, sampling)
        assert isinstance(done, Loop)
        return done

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(ContestantFailed, OSError):
            self._ask("close")
        self._process.join(timeout=20)
        if self._process.is_alive():
            self._process.terminate()

    def _ask(self, method: str, *arguments: object) -> Any:
        self._pipe.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            ok, value = self._pipe.recv()
        except EOFError:
            raise ContestantFailed(f"{self.name}: its process ended") from None
        if not ok:
            raise ContestantFailed(f"{self.name}: {value}")
        return value


def _serve(pipe: Connection, kind: str, folder: Path, options: dict[str, Any]) -> None:
    """The contestant's process: make it, then answer call by call until it is closed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        contestant = KINDS[kind](folder, **options)
        pipe.send((True, None))
    except Exception:
        pipe.send((False, traceback.format_exc()))
        return
    while True:
        method, arguments = pipe.recv()
        try:
            pipe.send((True, getattr(contestant, method)(*arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
        if method == "close":
            return
