"""What the two dialects of translation share: sentences in, the best translations joined again."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise

from app.api.deps import Attendance, gather, note_times, prepare
from app.casing import in_small_letters, reads_badly
from app.endings import in_words, is_unmarked, set_apart, without_full_stop
from app.engine.registry import GeneratingLane, Task
from app.engine.sequence import Hypothesis, Sequence
from app.errors import InvalidRequest
from app.languages import Detected, detect_language
from app.markdown import read_markdown
from app.markup import (
    Around,
    Element,
    Segment,
    escape,
    find_units,
    place_elements,
    place_point,
    read_html,
    set_tags,
    tag_in_place,
)
from app.middleware import RequestRecord
from app.protection import (
    MAX_HIDDEN,
    Edited,
    Glossary,
    Shield,
    Span,
    find_spans,
    is_particle,
    is_translatable,
    replace_runs,
    shield,
    without_parts,
)
from app.questions import asks
from app.sentences import Part, split_text
from app.settings import Settings
from app.spaces import composed
from app.spelling import narrow, plain_signs, respelt
from model.constraints import Phrase
from model.examples import Example, Examples
from model.languages import UNDETERMINED, find_language, iso_code
from model.nearest import ExampleIds, example_ids, find_examples
from model.sampling import BeamParams
from model.tokenizer import Tokenizer, text_pieces

# The source and target language of a text, which has a name for messages.
Direction = Callable[[str, str], tuple[str, str]]
Found = dict[Sequence, list[Hypothesis]]
# As in Markdown and in what people type: bullets, headings, quotes, notes, numbers in circles.
_LIST_SIGNS = re.compile(
    r"(?:(?:[-*+•·–—>]|#+|[①-⓿❶-➓㉠-㉻]|[■-◿](?![■-◿])|\(?(?:\d{1,2}|[A-Za-z]|[가나다라마바사아자차카타파하])\))\s+|※\s*)+"
    r"(?=\S)(?!(?:and|or|to|through|is|are|및|또는|내지|혹은)(?!\w))"
)
# Between the steps of a path, the entries of a menu, the columns of a table: each is translated by itself.
_BETWEEN = re.compile(r"(?<!\s)\s*(?:[→←↔➔➜➡⇒⇔⟶▶►▷❯]\ufe0f?|(?<!\S)(?:\|+|[-=]+>|[»›])(?!\S))\s*")
_ENDS_IN_FIGURE, _BEGINS_WITH_FIGURE = re.compile(r"\d[^\s\d]{0,3}$"), re.compile(r"[$€£₩¥~약]? ?\d")
_LONE_LETTER = re.compile(r"[A-Za-zα-ωΑ-Ω]")
# A sentence with none of its language's letters is in the other language already.
_LETTERS = {"ko": re.compile("[가-힣ㄱ-ㅎㅏ-ㅣ]"), "en": re.compile("[A-Za-z]")}
# What a tokenizer of bytes may spell wrong, and what means the same in every language.
_PICTURE = re.compile("[\u2600-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff]")
# Pictures within a sentence, but for arrows and signs, which are read as words. A heart may be a verb.
_WITH_ONE = "[\ufe0f\u200d\u20e3\u2640\u2642\u2764\U000e0020-\U000e007f]"
_WITHIN = re.compile(f"(?<!\\s)\\s*(?:[\u2600-\u26ff\u2705\u2728\u2764\U0001f000-\U0001faff]{_WITH_ONE}*)+")
_HEARTS = "\u2665\u2764\U0001f493\U0001f495-\U0001f49f\U0001f90d\U0001f90e\U0001f9e1\U0001fa75-\U0001fa77"
_IS_LOVE = re.compile(f"\\s*[{_HEARTS}]\ufe0f?")
_LOVING = re.compile(r"(?:^|[.!?,;]\s)(?:I|We|They|You)$")
# A picture behind one of these ends a sentence, and so do laughing and weeping.
_AFTER_SENTENCE = re.compile(
    "(?<=[요죠까ㅋㅎㅠㅜ])(?:[\u2600-\u26ff\u2764\U0001f000-\U0001faff\ufe0f\u200d]+|\\^\\^+) (?=[가-힣])"
    "|(?<![ㅋㅎㅠㅜ])[ㅋㅎㅠㅜ]{2,}[.!?~]* +(?=\\S)"
)
_MARK = re.compile(r"[.!?](?=[\"'”’)]*\s*$)")
_SENTENCE_END = re.compile(r"""[.!?…。！？]["'”’)\]]*$""")
# Of names that look as if a sentence ended in them: Booking.Com, README.Md.
_AFTER_A_DOT = re.compile(
    r"(?:com|net|org|io|ai|edu|gov|kr|jp|uk|md|txt|pdf|docx?|xlsx?|py|js|ts|java|html?|json|ya?ml|out|exe)\b",
    re.IGNORECASE,
)
_LOOKUP_CHARS = 1024  # of text are prepared in the time of one look-up
_BESIDE_PICTURE = re.compile("[\\s\ufe0f\u200d\u20e3\U000e0020-\U000e007f]")


@dataclass(frozen=True)
class Search:
    """The checked parameters of all sentences of a request."""

    beams: BeamParams
    max_new_tokens: int | None
    limit: int
    default_beams: int

    def of_sentence(
        self, n_source: int, phrases: tuple[Phrase, ...], longest: int, *, align: bool
    ) -> BeamParams:
        """The parameters for a sentence of n_source tokens, whose longest known translation has so many.

        Where there are phrases to be said the search is as wide as usual at least: one beam alone would say
        them at once. And it gives all it has found, because other tokens need not be another text.
        """
        beams = self.beams
        num_beams = max(beams.num_beams, self.default_beams) if phrases else beams.num_beams
        return replace(
            beams,
            num_beams=num_beams,
            num_return_sequences=num_beams if phrases or beams.num_return_sequences > 1 else 1,
            max_new_tokens=self.max_new_tokens or min(self.limit, max(3 * n_source + 20, longest)),
            required=phrases,
            return_alignment=beams.return_alignment or align,
        )


@dataclass(frozen=True)
class TextForm:
    """What texts are, and what must become of some of their words."""

    is_html: bool = False
    glossary: Glossary | None = None

    def output(self, span: Span) -> str:
        return escape(span.output) if self.is_html and not span.is_markup else span.output

    def verbatim(self, text: str) -> str:
        return escape(text) if self.is_html else text


@dataclass(frozen=True)
class Sentence:
    """A sentence that the sequence translates; the elements are in characters of the shield's text."""

    sequence: Sequence
    shield: Shield
    elements: list[Element]
    is_unmarked: bool
    examples: tuple[Example, ...]  # that it reads


Piece = str | Sentence


@dataclass(frozen=True)
class Plan:
    """The texts of a request as sentences that are ready for the lane, and what stays between them."""

    tokenizer: Tokenizer
    form: TextForm
    texts: list[list[Piece]]
    n_best: int

    @property
    def n_chars(self) -> int:
        """Of the sentences, as the models read them."""
        pieces = (piece for text in self.texts for piece in text)
        return sum(len(piece.shield.text) for piece in pieces if isinstance(piece, Sentence))

    @property
    def sequences(self) -> list[Sequence]:
        return [piece.sequence for text in self.texts for piece in text if isinstance(piece, Sentence)]

    def join(self, text: list[Piece], found: Found) -> list["Joined"]:
        """The translations of a text that differ, best first: one at least, no more than were asked for."""
        variants = [
            [Rendered(piece)] if isinstance(piece, str) else self._variants(piece, found[piece.sequence])
            for piece in text
        ]
        n_different = max(map(len, variants), default=1)
        return [
            Joined(_marked([each[min(rank, len(each) - 1)] for each in variants]))
            for rank in range(min(self.n_best, n_different))
        ]

    def _variants(self, sentence: Sentence, hypotheses: list[Hypothesis]) -> list["Rendered"]:
        """One for each text; where some keep all that they must, no others."""
        variants: dict[str, Rendered] = {}
        for hypothesis in hypotheses:
            rendered = self._render(sentence, hypothesis)
            variants.setdefault(rendered.text, rendered)
        fewest = min(len(each.unmet) for each in variants.values())
        return [each for each in variants.values() if len(each.unmet) == fewest]

    def _render(self, sentence: Sentence, hypothesis: Hypothesis) -> "Rendered":
        translated = self.tokenizer.decode(hypothesis.token_ids).strip()
        if sentence.is_unmarked:
            translated = without_full_stop(translated)
        if self.form.is_html or sentence.elements:
            text = _set_markup(sentence, hypothesis, translated, self)
        else:
            text = sentence.shield.restore(translated)
        return Rendered(text, sentence, hypothesis, tuple(sentence.shield.unmet(translated)))


@dataclass(frozen=True)
class Rendered:
    """A piece of a translation; what stays as it was has no sentence."""

    text: str
    sentence: Sentence | None = None
    hypothesis: Hypothesis | None = None
    unmet: tuple[str, ...] = ()


@dataclass(frozen=True)
class Joined:
    """A translated text, by its pieces."""

    pieces: list[Rendered]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def chosen(self) -> list[tuple[Sentence, Hypothesis]]:
        return [(p.sentence, p.hypothesis) for p in self.pieces if p.sentence and p.hypothesis]

    @property
    def unmet(self) -> list[str]:
        """What had to be kept, or said, and is not there."""
        return [source for piece in self.pieces for source in piece.unmet]


def _marked(pieces: list["Rendered"]) -> list["Rendered"]:
    """Pieces in which no translation runs into the next of its line for want of its sentence's mark."""
    marked: list[Rendered] = []
    goes_on = False
    for piece in reversed(pieces):
        made = piece
        if piece.sentence:
            mark = _MARK.search(piece.sentence.shield.text)
            if goes_on and mark and piece.text[-1:].isalnum():
                made = replace(piece, text=piece.text + mark.group())
            goes_on = True
        elif "\n" in piece.text:
            goes_on = False
        marked.append(made)
    return marked[::-1]


def default_round_trip(settings: Settings, task: Task[GeneratingLane]) -> float:
    """What the way back counts where a request does not say."""
    return task.config.round_trip if settings.use_round_trip else 0.0


async def plan_texts(
    texts: dict[str, str], direction: Direction, search: Search, task: Task[GeneratingLane], form: TextForm
) -> Plan:
    """Split and tokenise texts by their names; one whose source is its target stays as it is.

    Raises InvalidRequest where a text is in a language that the model does not know.
    """
    n_chars = sum(map(len, texts.values()))
    beams = search.beams
    reads = beams.example_weight > 0 and beams.repetition_penalty == 1.0  # which is on the model's own logits
    examples = task.examples if reads else None
    drafts = await prepare(n_chars, _draft_all, texts, direction, task, form)
    if examples is not None:
        n_sentences = sum(isinstance(draft, _Draft) for text in drafts for draft in text)
        if n_sentences <= task.lane.limits.max_queue_items:  # else no queue takes them
            drafts = await prepare(_LOOKUP_CHARS * n_sentences, _with_examples, drafts, examples, task)
    pieces = [[_piece(draft, search) for draft in text] for text in drafts]
    return Plan(task.tokenizer, form, pieces, search.beams.num_return_sequences)


async def translate_plan(plan: Plan, attendance: Attendance, record: RequestRecord) -> Found:
    """The hypotheses of every sentence, once they are in the lane."""
    results = await attendance.wait_for(gather(sequence.result() for sequence in plan.sequences))
    note_times(record, plan.sequences)
    record.n_generated_tokens = sum(len(best.token_ids) for best, *_ in results)
    return dict(zip(plan.sequences, results, strict=True))


def named_language(name: str, code: str, known: list[str]) -> str:
    """What the model calls a language, for its own code or ISO's. Raises InvalidRequest."""
    found = find_language(code, known)
    if found is None:
        raise InvalidRequest(f"{name}: no language {code[:20]!r}; there are {', '.join(sorted(known))}")
    return found


def counterpart(language: str, known: list[str]) -> str | None:
    """The usual other language: English, or Korean for English."""
    usual = (find_language(code, known) for code in ("en", "ko"))
    return next((code for code in (*usual, *known) if code is not None and code != language), None)


def known_language(name: str, text: str, task: Task[GeneratingLane], parameter: str) -> tuple[Detected, str]:
    """The language of a text, and what the model calls it; raises InvalidRequest where it knows none.

    A short sentence may look like one of another language: what is known is what it is known to be.
    """
    detected, known = detect_language(narrow(composed(text))), task.tokenizer.sources
    found = find_language(detected.code, known) or find_language(UNDETERMINED, known)
    if found is None and task.examples is not None:
        pairs = ((src, tgt) for src in known for tgt in task.tokenizer.targets if src != tgt)
        for src, tgt in pairs:
            if any(example.is_same for example in find_examples(task.examples, text, src, tgt)):
                return Detected(iso_code(src), 1.0), src
    if found is None:
        raise InvalidRequest(
            f"{name} is in {detected.name} ({detected.code}), as it seems, and there is no such direction: "
            f"the languages are {', '.join(sorted(known))}. If it is in one of them, name it as {parameter}"
        )
    return detected, found


@dataclass(frozen=True)
class _Draft:
    """A sentence before its sequence is made, which belongs to the event loop."""

    prompt_ids: list[int]
    target_ids: list[int]
    shield: Shield
    elements: list[Element]
    is_unmarked: bool
    languages: tuple[str, str]
    examples: tuple[tuple[Example, ExampleIds], ...] = ()


def _piece(draft: str | _Draft, search: Search) -> Piece:
    if isinstance(draft, str):
        return draft
    examples, in_tokens = zip(*draft.examples, strict=True) if draft.examples else ((), ())
    phrases = draft.shield.phrases
    # What must be said may not stand in it as it must.
    known = [ids.target[1:] for example, ids in draft.examples if example.is_same and not phrases]
    longest = max(map(len, known), default=0)
    params = search.of_sentence(len(draft.prompt_ids), phrases, longest, align=bool(draft.elements))
    sequence = Sequence(
        draft.prompt_ids, params, target_ids=draft.target_ids, examples=in_tokens, known=known
    )
    # A translation of exactly this text has the marks that it should have.
    is_exact = bool(known) and examples[0].source == draft.shield.text.strip()
    return Sentence(sequence, draft.shield, draft.elements, draft.is_unmarked and not is_exact, examples)


def _draft_all(
    texts: dict[str, str], direction: Direction, task: Task[GeneratingLane], form: TextForm
) -> list[list[str | _Draft]]:
    """The sentences of all texts; no further than to the one with which no queue could take them any more."""
    drafts: list[list[str | _Draft]] = []
    n_sentences, limit = 0, task.lane.limits.max_queue_items
    for name, text in texts.items():
        src, tgt = direction(name, text)
        drafts.append(_draft(text, _Drafting(task, form, src, tgt)))
        n_sentences += sum(isinstance(draft, _Draft) for draft in drafts[-1])
        if n_sentences > limit and len(drafts) < len(texts):
            raise InvalidRequest(
                f"the first {len(drafts)} of {len(texts)} texts hold {n_sentences} sentences, "
                f"the limit is {limit} in one request"
            )
    return drafts


def _with_examples(
    drafts: list[list[str | _Draft]], examples: Examples, task: Task[GeneratingLane]
) -> list[list[str | _Draft]]:
    """Every sentence with those that it reads; one that comes again is looked up once."""
    tokenizer, max_len = task.tokenizer, task.lane.limits.max_prompt_tokens

    @cache
    def look_up(text: str, src: str, tgt: str) -> tuple[tuple[Example, ExampleIds], ...]:
        found = find_examples(examples, text, src, tgt)
        return tuple(example_ids(found, text, tokenizer, src, tgt, max_len))

    return [
        [
            draft
            if isinstance(draft, str)
            else replace(draft, examples=look_up(draft.shield.text, *draft.languages))
            for draft in text
        ]
        for text in drafts
    ]


def _draft(text: str, drafting: "_Drafting") -> list[str | _Draft]:
    if drafting.src == drafting.tgt:
        return [text]
    drafts: list[str | _Draft] = []
    for chunk in read_html(text) if drafting.form.is_html else read_markdown(text):
        drafts += [chunk] if isinstance(chunk, str) else drafting.draft(chunk)
    return drafts


@dataclass(frozen=True)
class _Drafting:
    """From running text to sentences in the encoder's terms."""

    task: Task[GeneratingLane]
    form: TextForm
    src: str
    tgt: str

    def draft(self, segment: Segment) -> list[str | _Draft]:
        """The sentences of a segment, and between them white space and tags that go around several."""
        if (whole := without_parts(segment.text)).edits:
            segment = replace(
                segment,
                text=whole.text,
                spans=[
                    replace(s, start=whole.place(s.start), stop=whole.place(s.stop)) for s in segment.spans
                ],
                elements=_moved(segment.elements, whole),
            )
        # Places are the same in ordinary width; what stays comes back in its own.
        found = find_spans(narrow(segment.text), self.form.glossary, iso_code(self.tgt))
        mark, own = segment.mark, [_as_typed(span, segment.text) for span in found]
        marked = replace_runs(segment.text, [(span.start, span.stop, mark) for span in own])
        spans = sorted([*segment.spans, *own], key=lambda span: span.start)
        # With tags, what they are around stays one sentence.
        moved = _moved(segment.elements, marked)
        parts = self._parts(marked.text, mark, moved)
        ends = list(accumulate(len(part.text) for part in parts))
        bounds = [(end - len(part.text), end) for part, end in zip(parts, ends, strict=True)]
        around = Around(moved, bounds, [part.is_sentence for part in parts])
        drafts: list[str | _Draft] = []
        n_spans, ended = 0, False
        for i, (part, (start, _)) in enumerate(zip(parts, bounds, strict=True)):
            n = part.text.count(mark)
            own_spans, n_spans = spans[n_spans : n_spans + n], n_spans + n
            elements = [replace(e, start=e.start - start, stop=e.stop - start) for e in around.within(i)]
            drafted = self._draft_part(part, mark, own_spans, elements)
            if _goes_on(parts[i + 1 : i + 3]):
                drafted = [d if isinstance(d, str) else replace(d, is_unmarked=False) for d in drafted]
            begins = part.is_sentence and part.text[0].isalnum() and not _AFTER_A_DOT.match(part.text)
            if ended and begins and not segment.elements:
                drafts.append(" ")  # they were typed without one
            ended = part.is_sentence and _SENTENCE_END.search(part.text) is not None
            drafts += [around.before(i), *drafted, around.after(i)]
        return drafts

    def _parts(self, text: str, mark: str, elements: list[Element]) -> list[Part]:
        tokenizer = self.task.tokenizer
        n_around = len(tokenizer.source_ids([], self.tgt, src_lang=self.src))
        max_tokens = self.task.lane.limits.max_prompt_tokens - n_around
        parts: list[Part] = []
        at = 0
        for whole in split_text(text, iso_code(self.src), tokenizer, max_tokens):
            stop = at + len(whole.text)
            near = elements if _BETWEEN.search(whole.text) else []
            inside = [(e.start - at, e.stop - at) for e in near if at < e.stop and e.start < stop]
            parts += _cut(whole, mark, inside, with_pictures=not elements)
            at = stop
        return parts

    def _draft_part(
        self, part: Part, mark: str, spans: list[Span], elements: list[Element]
    ) -> list[str | _Draft]:
        """A part as it goes to the model, with the pictures that stand before and behind it, or as it is."""
        bare = part.text.replace(mark, "")
        if self._is_foreign(part.text, mark, spans):
            spans = [replace(span, output=span.source, unit="") for span in spans]
            return [self._verbatim(part.text, mark, spans, elements)]
        if not part.is_sentence or not is_translatable(set_apart(bare)[0]):
            spans = [
                replace(span, output=span.source[:1] + span.output) if span.unit else span for span in spans
            ]
            text = part.text if elements else self._in_words(part.text, attached=False)
            return [self._verbatim(text, mark, spans, elements)]
        language = iso_code(self.src)
        pulled, before, behind = _pull_pictures(part.text, mark, elements, is_english=language == "en")
        elements = _moved(elements, pulled)
        words, more = (pulled.text, "") if elements else set_apart(pulled.text)
        if not is_translatable(words.replace(mark, "")):
            return [self._verbatim(part.text, mark, spans, elements)]
        text, behind = plain_signs(words, language), self._in_words(more, attached=True) + behind
        if language == "en" and reads_badly(text):
            text = in_small_letters(text)
        runs = respelt(text, language)
        if asks(replace_runs(text, runs).text, language):
            runs.append((len(text), len(text), "?"))
        usual = replace_runs(text, runs)
        tokenizer = self.task.tokenizer
        hidden, edited = shield(usual.text, mark, spans, tokenizer)
        prompt_ids = tokenizer.source_ids(tokenizer.encode(hidden.text), self.tgt, src_lang=self.src)
        elements = _moved(_moved(elements, usual), edited)
        ends = spans[usual.text.count(mark) - 1].source if usual.text.endswith(mark) else usual.text
        target_ids = tokenizer.target_ids(self.tgt)
        languages = self.src, self.tgt
        draft = _Draft(prompt_ids, target_ids, hidden, elements, is_unmarked(ends), languages)
        return [before, draft, behind]

    def _in_words(self, signs: str, *, attached: bool) -> str:
        return signs if iso_code(self.tgt) == "ko" else in_words(signs, attached=attached)

    def _is_foreign(self, text: str, mark: str, spans: list[Span]) -> bool:
        """Is a sentence in the letters of the target alone, and holds no term to be translated?"""
        source, target = (_LETTERS.get(iso_code(language)) for language in (self.src, self.tgt))
        if not (source and target) or any(span.is_noun and span.output != span.source for span in spans):
            return False
        whole = narrow(text.replace(mark, "") + "".join(span.source for span in spans))
        return target.search(whole) is not None and source.search(whole) is None

    def _verbatim(self, text: str, mark: str, spans: list[Span], elements: list[Element]) -> str:
        """What no model needs to see, with its tags where they were."""
        places = [i for i, character in enumerate(text) if character == mark]
        hidden = dict(zip(places, spans, strict=True))

        def show(start: int, stop: int) -> str:
            span = hidden.get(start)
            return self.form.verbatim(text[start:stop]) if span is None else self.form.output(span)

        return tag_in_place((cut for i in places for cut in (i, i + 1)), elements, len(text), show)


def _goes_on(parts: list[Part]) -> bool:
    """Does another sentence follow in the same line, with nothing but white space between?"""
    between = "" if not parts or parts[0].is_sentence else parts[0].text
    follow = parts[1:2] if between else parts[:1]
    in_line = not between.strip() and len(f"{between}.".splitlines()) == 1
    return in_line and bool(follow) and follow[0].is_sentence


def _moved(elements: list[Element], edited: Edited) -> list[Element]:
    """Elements of a text in the places that they have after it was edited."""
    return [replace(e, start=edited.place(e.start), stop=edited.place(e.stop, end=True)) for e in elements]


def _cut(part: Part, mark: str, elements: list[tuple[int, int]], *, with_pictures: bool) -> list[Part]:
    """A sentence without the signs of a list before it, without arrows and bars, and pictures around it.

    In parts with as many marks as can be hidden; `elements` are the places of those that arrows may stand in.
    """
    if not part.is_sentence:
        return [part]
    text, around, at = part.text, [], 0
    if signs := _LIST_SIGNS.match(text):
        around.append(Part(signs.group(), False))
        text, at = text[signs.end() :], signs.end()
    # With tags, what they are around stays one sentence.
    cut = _cut_at_pictures if with_pictures else _cut_at_marks
    inside = [(start - at, stop - at) for start, stop in elements if start > at or stop < len(part.text)]
    runs = [cut(entry.text, mark) if entry.is_sentence else [entry] for entry in _entries(text, mark, inside)]
    return [*around, *(part for run in runs for part in run if part.text)]


def _entries(text: str, mark: str, elements: list[tuple[int, int]]) -> list[Part]:
    """What stands between arrows and bars, and those; one where it is a formula's letters.

    An arrow between two figures is a verb, and one within an element or brackets parts none.
    """
    entries: list[Part] = []
    at = 0
    for match in _BETWEEN.finditer(text):
        start, stop = match.span()
        before, after = text[at:start].replace(mark, "0"), text[stop : stop + 3].replace(mark, "0")
        is_change = _ENDS_IN_FIGURE.search(before[-5:]) and _BEGINS_WITH_FIGURE.match(after)
        is_open = before.count("(") > before.count(")")
        if is_change or is_open or any(first < start < last for first, last in elements):
            continue
        entries += [Part(text[at:start], True), Part(match.group(), False)]
        at = stop
    entries = [entry for entry in (*entries, Part(text[at:], True)) if entry.text]
    is_formula = any(entry.is_sentence and _LONE_LETTER.fullmatch(entry.text) for entry in entries)
    return [Part(text, True)] if is_formula else entries


def _cut_at_pictures(text: str, mark: str) -> Iterator[Part]:
    """A text that pictures may stand around, or part in two."""
    at = 0
    for end in [*(match.end() for match in _AFTER_SENTENCE.finditer(text)), len(text)]:
        whole, at = text[at:end], end
        sentence = whole.rstrip()
        start, stop = _without_pictures(sentence)
        yield Part(sentence[:start], False)
        yield from _cut_at_marks(sentence[start:stop], mark)
        yield Part(sentence[stop:] + whole[len(sentence) :], False)


def _without_pictures(text: str) -> tuple[int, int]:
    """Where a sentence begins and ends, but for pictures with white space; all where there is no more."""
    start, stop = 0, len(text)
    while start < stop and _in_run(text[start]):
        start += 1
    while stop > start and _in_run(text[stop - 1]):
        stop -= 1
    # What a run begins with belongs to what stands before it (1️⃣).
    while stop < len(text) and not _PICTURE.match(text[stop]) and not text[stop].isspace():
        stop += 1
    if not _PICTURE.search(text[stop:]):
        stop = len(text)
    if not _PICTURE.search(text[:start]):
        start = 0
    return (start, stop) if start < stop else (0, len(text))


def _pull_pictures(
    text: str, mark: str, elements: list[Element], *, is_english: bool
) -> tuple[Edited, str, str]:
    """A sentence without the pictures in it, and those that stand before it then, and behind it.

    The model would spell them, and the sentence around them, badly. I ❤ Seoul is read as "I love Seoul". What
    is all that a tag goes around stays.
    """
    runs, before, behind, at, leads = [], "", "", 0, True
    for match in _WITHIN.finditer(text):
        start, stop = max(match.start(), at), match.end()
        leads = leads and not text[at:start].strip()
        if any(not e.is_point and start <= e.start and e.stop <= stop for e in elements):
            continue
        after = text[stop : stop + 1]
        gap = " " if (after.isalnum() and not is_particle(text, stop)) or after == mark else ""
        if is_english and _IS_LOVE.fullmatch(match.group()) and text[stop:].strip()[:1].isalpha():
            gap = f" love{gap}" if _LOVING.search(text[max(0, start - 6) : start]) else gap
        if leads:  # with the white space behind it
            stop += len(text[stop:]) - len(text[stop:].lstrip())
            gap, before = "", f"{before}{match.group().strip()} "
        else:
            behind += f" {match.group().strip()}"
        runs.append((start, stop, gap))
        at = stop
    bare = replace_runs(text, runs)
    return (bare, before, behind) if is_translatable(bare.text) else (Edited(text, ()), "", "")


def _as_typed(span: Span, text: str) -> Span:
    """A span that was found in ordinary width, as it stands in a text."""
    typed = text[span.start : span.stop]
    return replace(span, source=typed, output=typed if span.output == span.source else span.output)


def _in_run(character: str) -> bool:
    return bool(_PICTURE.match(character) or _BESIDE_PICTURE.match(character))


def _cut_at_marks(text: str, mark: str) -> list[Part]:
    if text.count(mark) <= MAX_HIDDEN:
        return [Part(text, True)]
    pieces = text.split(mark)
    runs = [
        mark.join(["", *pieces[i : i + MAX_HIDDEN]] if i else pieces[:MAX_HIDDEN])
        for i in range(0, len(pieces), MAX_HIDDEN)
    ]
    return [trimmed for run in runs for trimmed in _trimmed(run)]


def _trimmed(run: str) -> list[Part]:
    """A run without the white space around it, and the white space."""
    text = run.strip()
    start = run.index(text)
    parts = (Part(run[:start], False), Part(text, True), Part(run[start + len(text) :], False))
    return [part for part in parts if part.text]


def _set_markup(sentence: Sentence, hypothesis: Hypothesis, translated: str, plan: Plan) -> str:
    """A translated sentence as HTML, its tags around the words that theirs became."""
    hidden, units = sentence.shield, find_units(translated)
    bounds = {place for run in (*hidden.runs(translated), *units) for place in run}
    cuts = sorted({0, len(translated), *bounds})
    runs = []
    for start, stop in pairwise(cuts):
        is_hidden = translated[start:stop] in hidden.hidden
        shown = hidden.show((start, stop), translated, plan.form.output)
        runs.append((start, shown if is_hidden else plan.form.verbatim(shown)))
    if not sentence.elements:
        return "".join(run for _, run in runs)
    looks = _Looks(sentence, hypothesis, units, plan.tokenizer)
    placed = place_elements(sentence.elements, units, looks.share, hidden.text, translated)
    points = [
        (e, place_point(units, looks.token_before(e.start), looks.share))
        for e in sentence.elements
        if e.is_point
    ]
    return set_tags(runs, units, placed, points, len(translated))


class _Looks:
    """How much each word of a translation looked at each part of its source, by the cross-attention."""

    def __init__(
        self, sentence: Sentence, hypothesis: Hypothesis, units: list[tuple[int, int]], tokenizer: Tokenizer
    ) -> None:
        pieces = tokenizer.encode_with_offsets(sentence.shield.text)
        first = _find(sentence.sequence.prompt_ids, [piece.id for piece in pieces])
        # A piece carries the space before it, which belongs to no word.
        self._places = [piece.stop - len(piece.text.lstrip()) for piece in pieces]
        self._stops = [piece.stop for piece in pieces]
        weights = [row[first : first + len(pieces)] for row in hypothesis.alignment or []]
        self._sums = {
            unit: list(accumulate(_mean([weights[t] for t in tokens], len(pieces)), initial=0.0))
            for unit, tokens in _tokens_of(units, hypothesis.token_ids, tokenizer).items()
        }

    def share(self, unit: tuple[int, int], source: tuple[int, int]) -> float:
        """The share of the source characters [start, stop) in what a unit looked at, 0 to 1."""
        sums = self._sums[unit]
        low, high = bisect_left(self._places, source[0]), bisect_left(self._places, source[1])
        return (sums[high] - sums[low]) / sums[-1] if sums[-1] > 0 else 0.0

    def token_before(self, place: int) -> tuple[int, int] | None:
        """The source characters of the last token that ends at a place or before it."""
        last = bisect_right(self._stops, place) - 1
        return (self._places[last], self._stops[last]) if last >= 0 else None


def _find(ids: list[int], part: list[int]) -> int:
    return next(i for i in range(len(ids)) if ids[i : i + len(part)] == part)


def _mean(rows: list[list[float]], size: int) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else [0.0] * size


def _tokens_of(
    units: list[tuple[int, int]], token_ids: list[int], tokenizer: Tokenizer
) -> dict[tuple[int, int], list[int]]:
    """The tokens, by their index, that give a unit its characters."""
    texts = list(text_pieces(tokenizer, token_ids))
    before = len("".join(texts)) - len("".join(texts).lstrip())
    ends = [end - before for end in accumulate(map(len, texts))]
    return {
        (start, stop): list(range(bisect_right(ends, start), min(bisect_left(ends, stop) + 1, len(texts))))
        for start, stop in units
    }
