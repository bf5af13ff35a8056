"""Who takes part: this project's engine and what a user would pick instead, each in a process of its own.

A process a contestant, because thread pools in one process fight: only the one whose turn it is has work,
and the others' threads sleep.
"""

from __future__ import annotations

import asyncio
import contextlib
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


class Engine(Contestant):
    """The real thing without HTTP: settings, scheduler, runner and device thread, as the service has them."""

    def __init__(self, folder: Path, task: str, settings: dict[str, Any]) -> None:
        from app.lifecycle import Lifecycle
        from app.main import load_services, warm_up
        from app.settings import Settings

        self._loop = asyncio.new_event_loop()
        folder = folder.resolve()
        # From an empty folder: no `.env`, and the models that are not measured are not there.
        with tempfile.TemporaryDirectory() as empty, contextlib.chdir(empty):
            model: dict[str, Any] = {f"{task}_model": folder}
            self._services = load_services(Settings(**model, **settings), Lifecycle())
        found = self._services.registry.shelves[task].default
        assert found is not None
        self._task = found
        self._services.worker.start(self._loop)
        self._loop.run_until_complete(warm_up(self._services))

    def run(self, case: Case) -> tuple[Outputs, float]:
        return self._loop.run_until_complete(self._run(case))

    async def _run(self, case: Case) -> tuple[Outputs, float]:
        from app.engine.sequence import Sequence
        from model.sampling import BeamParams, SamplingParams

        n = case.n_new
        params = (
            SamplingParams(max_new_tokens=n, min_new_tokens=n)
            if case.task == "generate"
            else BeamParams(num_beams=case.num_beams, max_new_tokens=n, min_new_tokens=n)
        )
        sequences = [Sequence(prompt, params) for prompt in case.prompts]
        started = time.perf_counter()
        self._task.lane.submit(sequences)
        results = [await sequence.result() for sequence in sequences]
        return [best[0].token_ids for best in results], time.perf_counter() - started

    def close(self) -> None:
        self._services.worker.stop()
        self._loop.close()


@dataclass(frozen=True)
class _Mode:
    """A way to run `transformers`' generate."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


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
        seconds: dict[str, float] = {}
        for mode in self._modes:
            try:
                self._generate(case, mode)  # compiles
                seconds[mode.name] = self._generate(case, mode)[1]
            except Exception as error:
                print(f"  transformers, {mode.name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        if not seconds:
            raise RuntimeError("no cache setting of transformers works for this case")
        self._mode = min(self._modes, key=lambda mode: seconds.get(mode.name, float("inf")))
        tried = ", ".join(f"{name} {case.n_tokens / s:.0f}" for name, s in seconds.items())
        return f"{self._mode.name} (tokens/s tried: {tried})"

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
        yield _Mode("static cache, compiled", {"cache_implementation": "static", "compile_config": config})


class CTranslate2(Contestant):
    """The compiled engine; all inputs of a case in one batch."""

    def __init__(self, folder: Path, device: str, compute_type: str, n_threads: int) -> None:
        import ctranslate2

        from benchmarks.convert import ctranslate2_folder
        from model.checkpoint import load_config

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
            )
            outputs = [result.hypotheses[0] for result in found]
        taken = time.perf_counter() - started
        return [[int(token) for token in output] for output in outputs], taken


KINDS: dict[str, Callable[..., Contestant]] = {
    "engine": Engine,
    "transformers": Transformers,
    "ctranslate2": CTranslate2,
}


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
        contestant: Contestant = KINDS[kind](folder, **options)
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
