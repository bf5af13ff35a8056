"""What the two dialects of translation share: sentences in, the best translations joined again."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from app.api.deps import Attendance, gather, note_times, prepare
from app.engine.registry import GeneratingLane, Task
from app.engine.sequence import Hypothesis, Sequence
from app.middleware import RequestRecord
from app.sentences import split_text
from model.sampling import BeamParams
from model.tokenizer import Tokenizer

_HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3]")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]")

# The source and target language of a text.
Direction = Callable[[str], tuple[str, str]]
# A run of a text, with the encoder's input where it is a sentence, None where it stays as it is.
Source = tuple[str, list[int] | None]
Found = dict[Sequence, list[Hypothesis]]


@dataclass(frozen=True)
class Search:
    """The checked parameters of all sentences of a request."""

    beams: BeamParams
    max_new_tokens: int | None
    limit: int

    def of_sentence(self, n_source: int) -> BeamParams:
        """The parameters for a sentence of n_source tokens."""
        by_length = min(self.limit, 3 * n_source + 20)
        return replace(self.beams, max_new_tokens=self.max_new_tokens or by_length)


@dataclass(frozen=True)
class Piece:
    """A run of a text; the sequence translates it, what stays as it is has none."""

    text: str
    sequence: Sequence | None


@dataclass(frozen=True)
class Plan:
    """The texts of a request as sentences that are ready for the lane."""

    tokenizer: Tokenizer
    texts: list[list[Piece]]
    n_best: int

    @property
    def sequences(self) -> list[Sequence]:
        return [piece.sequence for text in self.texts for piece in text if piece.sequence is not None]


async def plan_texts(
    texts: list[str], direction: Direction, search: Search, task: Task[GeneratingLane]
) -> Plan:
    """Split and tokenise; a text whose source is its target stays as it is."""
    sources = await prepare(sum(map(len, texts)), _split_all, texts, direction, task)
    pieces = [[_piece(source, search) for source in text] for text in sources]
    return Plan(task.tokenizer, pieces, search.beams.num_return_sequences)


async def translate_plan(plan: Plan, attendance: Attendance, record: RequestRecord) -> Found:
    """The hypotheses of every sentence, once they are in the lane."""
    results = await attendance.wait_for(gather(sequence.result() for sequence in plan.sequences))
    note_times(record, plan.sequences)
    record.n_generated_tokens = sum(len(best.token_ids) for best, *_ in results)
    return dict(zip(plan.sequences, results, strict=True))


@dataclass(frozen=True)
class Joined:
    """A translated text, and the hypotheses that it was joined from."""

    text: str
    chosen: list[tuple[Sequence, Hypothesis]]


def join_text(text: list[Piece], found: Found, rank: int, tokenizer: Tokenizer) -> Joined:
    """The rank-th best translation of a text, joined from that of each of its sentences."""
    chosen: list[tuple[Sequence, Hypothesis]] = []
    joined = ""
    for piece in text:
        if piece.sequence is None:
            joined += piece.text
            continue
        hypotheses = found[piece.sequence]
        hypothesis = hypotheses[min(rank, len(hypotheses) - 1)]
        chosen.append((piece.sequence, hypothesis))
        joined += tokenizer.decode(hypothesis.token_ids).strip()
    return Joined(joined, chosen)


def count_scripts(text: str) -> tuple[int, int]:
    """How many letters are Hangul, and how many Latin."""
    return len(_HANGUL.findall(text)), len(_LATIN.findall(text))


def detect_language(text: str) -> str:
    """By script: "ko" when there is one Hangul letter or more to two Latin ones, else "en"."""
    n_hangul, n_latin = count_scripts(text)
    return "ko" if n_hangul and 2 * n_hangul >= n_latin else "en"


def _split_all(texts: list[str], direction: Direction, task: Task[GeneratingLane]) -> list[list[Source]]:
    return [_split(text, *direction(text), task) for text in texts]


def _split(text: str, src: str, tgt: str, task: Task[GeneratingLane]) -> list[Source]:
    if src == tgt:
        return [(text, None)]
    tokenizer = task.tokenizer
    max_tokens = task.lane.limits.max_prompt_tokens - len(tokenizer.source_ids([], tgt))
    return [
        (part.text, tokenizer.source_ids(tokenizer.encode(part.text), tgt) if part.is_sentence else None)
        for part in split_text(text, src, tokenizer, max_tokens)
    ]


def _piece(source: Source, search: Search) -> Piece:
    text, source_ids = source
    if source_ids is None:
        return Piece(text, None)
    return Piece(text, Sequence(source_ids, search.of_sentence(len(source_ids))))
