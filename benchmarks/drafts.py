"""What drafts from the text itself would save a generation: is it worth guessing several tokens ahead?

    python -m benchmarks.drafts                      two minutes on two cores
    python -m benchmarks.drafts --weights runs/mine/model --length 400

Prompt lookup (Saxena 2023): where the last two or three tokens stood before, what followed them there is the
draft; one step reads draft and last token together, and as many tokens are gained as the draft has right. The
model's own texts tell what that gives, whoever would do it: they are written here as ever, and then counted.
A step over a draft is timed as one over as many rows, which multiplies as much and attends to as much.
Text that goes round in circles is drafted best, so the share of tokens that repeat six others tells it apart.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence as Items
from pathlib import Path
from statistics import median
from typing import NamedTuple

from app.engine.sequence import Sequence
from benchmarks.arguments import add_device, add_settings, check_device, command_line, make_parser
from benchmarks.contestants import Engine
from benchmarks.machine import head
from benchmarks.steps import Driver, load_lane
from benchmarks.table import Table
from benchmarks.workload import SHIPPED, random_prompts
from model.checkpoint import load_config
from model.sampling import SamplingParams
from model.tokenizer import Tokenizer

BEGINNINGS = (
    "Once upon a time",
    "The little boat had been tied to the pier",
    "When my grandmother was young, she",
    "The city lies on a wide river and",
    'The old teacher looked up. "Who',
    "A bridge of stone was built in",
    "Every morning the baker",
    "Nobody in the village knew why",
    "옛날 옛적에",
    "작은 고양이가 지붕 위에서",
    "그 도시는 강가에 있으며",
    "할머니는 매일 아침",
    "어느 추운 겨울날",
    "이 섬은 남쪽 바다에",
    "소년은 문을 열고",
    "그 책은 처음에",
)
WAYS = {
    "greedy": SamplingParams(),
    "greedy, repetition penalty 1.2": SamplingParams(repetition_penalty=1.2),
    "drawn, temperature 0.8, top_p 0.95": SamplingParams(temperature=0.8, top_p=0.95, seed=7),
}
_NGRAMS = (3, 2)
_CIRCLE = 6


class Tally(NamedTuple):
    """Tokens that were written, the steps that drafts would have left, and those that had a draft."""

    n_tokens: int
    n_steps: int
    n_drafted: int


def find_draft(tokens: Items[int], length: int) -> list[int]:
    """What followed the last tokens where they stood most recently before; empty where they did not."""
    for n in _NGRAMS:
        key = list(tokens[-n:])
        for start in range(len(tokens) - n - 1, -1, -1):
            if list(tokens[start : start + n]) == key:
                return list(tokens[start + n : start + n + length])
    return []


def count_steps(prompt: Items[int], written: Items[int], length: int) -> Tally:
    """The steps in which a text would have been written with drafts of so many tokens."""
    tokens, position, n_steps, n_drafted = [*prompt, *written], len(prompt), 0, 0
    while position < len(tokens):
        draft = find_draft(tokens[:position], length)
        n_right = 0
        # The last token of all is never gained by a draft: the step itself gives one.
        for guess, token in zip(draft, tokens[position:-1], strict=False):
            if guess != token:
                break
            n_right += 1
        position += n_right + 1
        n_steps += 1
        n_drafted += bool(draft)
    return Tally(len(written), n_steps, n_drafted)


def circling(written: Items[int]) -> int:
    """How many tokens end a run of six that stood in the text before."""
    seen: set[tuple[int, ...]] = set()
    n = 0
    for end in range(_CIRCLE, len(written) + 1):
        run = tuple(written[end - _CIRCLE : end])
        n += run in seen
        seen.add(run)
    return n


def main(words: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--weights", type=Path, default=SHIPPED["generate"], help="a language model's folder")
    parser.add_argument("--length", type=int, default=200, help="new tokens of a text")
    parser.add_argument("--draft", type=int, default=4, help="most tokens of a draft")
    parser.add_argument("--steps", type=int, default=20, help="steps of a round that are timed")
    parser.add_argument("--rounds", type=int, default=5)
    add_device(parser)
    add_settings(parser)
    arguments = parser.parse_args(words)
    check_device(arguments.device)
    print(head(command_line("drafts", words), notes=(f"{arguments.device}, {arguments.threads} threads",)))
    cost = step_cost(arguments)
    settings = {"device": arguments.device, "n_threads": arguments.threads, **dict(arguments.settings)}
    engine = Engine(arguments.weights, "generate", settings)
    tokenizer = Tokenizer.load(arguments.weights)
    prompts = [tokenizer.prompt_ids(tokenizer.encode(text)) for text in BEGINNINGS]
    table = Table("text", "tokens", "in circles", "steps with a draft", "tokens a step", "gain")
    for name, way in WAYS.items():
        params = dataclasses.replace(way, max_new_tokens=arguments.length)
        results = engine.results("generate", [Sequence(prompt, params) for prompt in prompts])
        texts = [hypotheses[0].token_ids for hypotheses in results]
        tallies = [
            count_steps(prompt, text, arguments.draft) for prompt, text in zip(prompts, texts, strict=True)
        ]
        n_tokens, n_steps, n_drafted = (sum(column) for column in zip(*tallies, strict=True))
        gain = n_tokens / (n_steps + n_drafted * (cost - 1))
        table.row(
            name,
            n_tokens,
            f"{sum(map(circling, texts)) / n_tokens:.2f}",
            f"{n_drafted / n_steps:.2f}",
            f"{n_tokens / n_steps:.2f}",
            f"{gain:.2f}",
        )
    engine.close()
    print()


def step_cost(arguments: argparse.Namespace) -> float:
    """The time of a step over a draft and the token before it, in steps of one token."""
    settings = {"device": arguments.device, "n_threads": arguments.threads, **dict(arguments.settings)}
    lane = load_lane("generate", arguments.weights, settings)
    driver = Driver(lane, arguments.device)
    vocab_size = load_config(arguments.weights).vocab_size
    ratios = []
    for _ in range(arguments.rounds):  # in turn, so that a busy machine slows both
        one, many = (
            driver.step_seconds(random_prompts(vocab_size, n, 64), arguments.steps, 1)[0]
            for n in (1, 1 + arguments.draft)
        )
        ratios.append(many / one)
    cost = median(ratios)
    print(f"a step over {1 + arguments.draft} tokens takes {cost:.2f} of one over one\n")
    return cost


if __name__ == "__main__":
    main()
