"""POST /translate: texts of any length, sentence by sentence."""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NotRequired

from fastapi import APIRouter, Depends
from pydantic import Field
from typing_extensions import TypedDict

from app.api.bounds import Strict, check_count, check_penalty, check_range, check_texts
from app.api.deps import (
    AttendanceDep,
    GeneratingLane,
    RecordDep,
    ServicesDep,
    Task,
    admitted,
    gather,
    note_times,
    prepare,
)
from app.engine.sequence import FinishReason, Hypothesis, Sequence
from app.errors import InvalidRequest, Json
from app.sentences import split_text
from app.settings import Settings
from model.sampling import BeamParams
from model.tokenizer import TextStream, Tokenizer

router = APIRouter()

_HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3]")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]")


class BeamParameters(Strict):
    """How to search; null means the default."""

    num_beams: int | None = Field(None, description="4 by default; 1 is greedy")
    num_return_sequences: int | None = Field(None, description="entries for each text, at most num_beams")
    length_penalty: float | None = Field(
        None, description="above 0 favours long translations; 1.0 by default"
    )
    max_new_tokens: int | None = Field(
        None, description="for each sentence; by default three times its length"
    )
    no_repeat_ngram_size: int | None = Field(None, description="no run of so many tokens twice; 0 is off")
    repetition_penalty: float | None = None


class TranslateParameters(BeamParameters):
    """Without languages the script decides: Hangul is translated to English, all else to Korean."""

    src_lang: str | None = None
    tgt_lang: str | None = None
    generate_parameters: BeamParameters | None = None
    return_alignment: bool | None = Field(None, description="cross-attention weights, sentence by sentence")
    return_scores: bool | None = Field(
        None, description="mean log-probability of a token, over the sentences"
    )
    # Clients of the Hugging Face form may send these; the only behaviour there is has these values.
    clean_up_tokenization_spaces: Literal[False] | None = None
    truncation: Literal["do_not_truncate"] | None = None


class TranslateRequest(Strict):
    """One text or a list of texts."""

    inputs: str | list[str] = Field(examples=["I go home."])
    parameters: TranslateParameters | None = None


class Alignment(TypedDict):
    """weights[t][s]: how much target token t looked at source token s."""

    source_tokens: list[str]
    target_tokens: list[str]
    weights: list[list[float]]


class Translation(TypedDict):
    """finish_reason stands only where a sentence ended for its length."""

    translation_text: str
    score: NotRequired[float]
    finish_reason: NotRequired[Literal["length"]]
    alignment: NotRequired[list[Alignment]]


# A run of a text, with the encoder's input where it is a sentence, None where it is white space.
Source = tuple[str, list[int] | None]


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
    """A run of a text; the sequence translates it, white space has none."""

    text: str
    sequence: Sequence | None


@dataclass(frozen=True)
class TranslateWork:
    """A request whose sentences are in the lane."""

    tokenizer: Tokenizer
    texts: list[list[Piece]]
    n_best: int
    parameters: TranslateParameters
    is_list: bool

    @property
    def sequences(self) -> list[Sequence]:
        return [piece.sequence for text in self.texts for piece in text if piece.sequence is not None]


async def admit(
    body: TranslateRequest, services: ServicesDep, record: RecordDep
) -> AsyncIterator[TranslateWork]:
    """Check, split, tokenise and submit all sentences of all texts; abort what is left on exit."""
    task = services.loaded(services.translate, "translate")
    parameters = body.parameters or TranslateParameters()
    search = _resolve(parameters, services.settings, task)
    _check_languages(parameters, task.tokenizer)
    texts = check_texts(body.inputs, services.settings)
    sources = await prepare(sum(map(len, texts)), _split_all, texts, parameters, task)
    pieces = [[_piece(source, search) for source in text] for text in sources]
    n_best = search.beams.num_return_sequences
    work = TranslateWork(task.tokenizer, pieces, n_best, parameters, isinstance(body.inputs, list))
    record.n_prompt_tokens = sum(len(sequence.prompt_ids) for sequence in work.sequences)
    async with admitted(services, task.lane, work.sequences):
        yield work


@router.post("/translate", response_model=list[Translation] | list[list[Translation]])
async def translate(
    work: Annotated[TranslateWork, Depends(admit)], attendance: AttendanceDep, record: RecordDep
) -> Json:
    """Translate each text; white space and line breaks between its sentences stay as they are."""
    sequences = work.sequences
    results = await attendance.wait_for(gather(sequence.result() for sequence in sequences))
    note_times(record, sequences)
    record.n_generated_tokens = sum(len(best.token_ids) for best, *_ in results)
    found = dict(zip(sequences, results, strict=True))
    answers = [[_join(text, found, rank, work) for rank in range(work.n_best)] for text in work.texts]
    if not work.is_list:
        return Json(answers[0])
    return Json(answers if work.n_best > 1 else [answer[0] for answer in answers])


def detect_language(text: str) -> str:
    """By script: "ko" when there is one Hangul letter or more to two Latin ones, else "en"."""
    n_hangul, n_latin = len(_HANGUL.findall(text)), len(_LATIN.findall(text))
    return "ko" if n_hangul and 2 * n_hangul >= n_latin else "en"


def _merge(parameters: TranslateParameters) -> BeamParameters:
    """The search parameters from both places where clients put them."""
    inner = parameters.generate_parameters or BeamParameters()
    merged: dict[str, Any] = {}
    for name in BeamParameters.model_fields:
        here, there = getattr(parameters, name), getattr(inner, name)
        if here is not None and there is not None and here != there:
            raise InvalidRequest(f"{name} is {here} in parameters but {there} in generate_parameters")
        merged[name] = there if here is None else here
    return BeamParameters(**merged)


def _resolve(parameters: TranslateParameters, settings: Settings, task: Task[GeneratingLane]) -> Search:
    """Fill in the defaults and check the bounds."""
    asked = _merge(parameters)
    limit = min(settings.max_new_tokens, task.lane.limits.max_new_tokens)
    max_beams = min(settings.max_beams, task.lane.limits.n_slots)
    num_beams = min(settings.default_beams, max_beams) if asked.num_beams is None else asked.num_beams
    n_best = 1 if asked.num_return_sequences is None else asked.num_return_sequences
    check_count("num_beams", num_beams, 1, max_beams)
    check_count("num_return_sequences", n_best, 1, num_beams)
    given = {name: value for name, value in asked.model_dump().items() if value is not None}
    beams = BeamParams(
        return_alignment=bool(parameters.return_alignment),
        **(given | {"num_beams": num_beams, "max_new_tokens": given.get("max_new_tokens", limit)}),
    )
    check_count("max_new_tokens", beams.max_new_tokens, 1, limit)
    check_range(
        "length_penalty", beams.length_penalty, -settings.max_length_penalty, settings.max_length_penalty
    )
    check_count("no_repeat_ngram_size", beams.no_repeat_ngram_size, 0, settings.max_ngram_size)
    check_penalty("repetition_penalty", beams.repetition_penalty, settings)
    return Search(beams, asked.max_new_tokens, limit)


def _check_languages(parameters: TranslateParameters, tokenizer: Tokenizer) -> None:
    known = ", ".join(sorted(tokenizer.languages))
    for name, code in (("src_lang", parameters.src_lang), ("tgt_lang", parameters.tgt_lang)):
        if code is not None and code not in tokenizer.languages:
            raise InvalidRequest(f"{name}: no language {code[:20]!r}; there are {known}")
    if parameters.src_lang is not None and parameters.src_lang == parameters.tgt_lang:
        raise InvalidRequest(f"src_lang and tgt_lang are both {parameters.src_lang!r}; they must differ")


def _languages(text: str, parameters: TranslateParameters, tokenizer: Tokenizer) -> tuple[str, str]:
    """Source and target: as given, else the other of the two, else by script."""
    src, tgt = parameters.src_lang, parameters.tgt_lang
    if src is None:
        detected = detect_language(text)
        src = detected if detected != tgt else _other(tgt, tokenizer)
    return src, tgt or _other(src, tokenizer)


def _other(language: str, tokenizer: Tokenizer) -> str:
    """The usual counterpart: English, or Korean for English."""
    return next(
        code
        for code in ("en", "ko", *tokenizer.languages)
        if code in tokenizer.languages and code != language
    )


def _split_all(
    texts: list[str], parameters: TranslateParameters, task: Task[GeneratingLane]
) -> list[list[Source]]:
    return [_split(text, parameters, task) for text in texts]


def _split(text: str, parameters: TranslateParameters, task: Task[GeneratingLane]) -> list[Source]:
    tokenizer = task.tokenizer
    src, tgt = _languages(text, parameters, tokenizer)
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


def _join(
    text: list[Piece], found: dict[Sequence, list[Hypothesis]], rank: int, work: TranslateWork
) -> Translation:
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
        joined += work.tokenizer.decode(hypothesis.token_ids).strip()
    answer = Translation(translation_text=joined)
    if work.parameters.return_scores:
        answer["score"] = sum(h.score for _, h in chosen) / max(len(chosen), 1)
    if any(h.finish_reason is FinishReason.LENGTH for _, h in chosen):
        answer["finish_reason"] = "length"
    if work.parameters.return_alignment:
        answer["alignment"] = [_alignment(sequence, h, work.tokenizer) for sequence, h in chosen]
    return answer


def _alignment(sequence: Sequence, hypothesis: Hypothesis, tokenizer: Tokenizer) -> Alignment:
    target_ids = hypothesis.token_ids
    weights = (hypothesis.alignment or [])[: len(target_ids)]
    return Alignment(
        source_tokens=_token_texts(sequence.prompt_ids, tokenizer),
        target_tokens=_token_texts(target_ids, tokenizer),
        weights=[[round(weight, 4) for weight in row] for row in weights],
    )


def _token_texts(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """Special tokens by their names; a character of several tokens stands whole at its last."""
    stream = TextStream(tokenizer)
    return [tokenizer.token_text(i) if i in tokenizer.special_ids else stream.push(i) for i in ids]
