"""HTML as segments of running text and what stands between them, and tags put back where their words went.

Nothing of the markup goes through a model: what is between two segments stays as it was written (but for the
amount of white space beside text), and the tags within one are set around the words that the alignment gives
them. No tag is lost, none is doubled, and well-formed stays well-formed.
"""

import html
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

from app.protection import Span, is_translatable, unused_mark

# Elements that stand within a sentence. Every other tag parts sentences, and so does one of these that holds
# such a tag or has no partner.
_INLINE = frozenset(
    [
        "a",
        "abbr",
        "acronym",
        "b",
        "bdi",
        "bdo",
        "big",
        "cite",
        "code",
        "data",
        "del",
        "dfn",
        "em",
        "font",
        "i",
        "ins",
        "kbd",
        "label",
        "mark",
        "meter",
        "nobr",
        "output",
        "q",
        "ruby",
        "s",
        "samp",
        "small",
        "span",
        "strike",
        "strong",
        "sub",
        "sup",
        "time",
        "tt",
        "u",
        "var",
    ]
)
_INLINE_VOID = frozenset(("img", "input", "wbr", "embed", "area"))
_VOID = _INLINE_VOID | frozenset(
    ["base", "br", "col", "frame", "hr", "link", "meta", "param", "source", "track"]
)
# Their content is not text to be translated.
_KEPT = frozenset(
    [
        "script",
        "style",
        "code",
        "kbd",
        "samp",
        "var",
        "tt",
        "pre",
        "svg",
        "math",
        "template",
        "textarea",
        "object",
        "iframe",
        "noscript",
        "canvas",
    ]
)
_SPACE = re.compile(r"[ \t\n\r\f]+")
_UNIT = re.compile(r"\w+|[^\w\s]+")


@dataclass
class _Event:
    """A tag, a run of text, or what is neither (a comment, say), with the place where it begins."""

    kind: str  # open, close, void, text, other
    start: int
    tag: str = ""
    text: str = ""
    kept: bool = False
    stop: int = 0
    partner: int | None = None


class _Reader(HTMLParser):
    """Notes what is where."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.events: list[_Event] = []
        self._lines = [0, *(match.end() for match in re.finditer("\n", source))]
        # Behind the last ">" no tag ends: text, and the parser would look for an end from each of its "<".
        end = source.rfind(">") + 1
        self.feed(source[:end])
        self.close()
        if end < len(source):
            self.events.append(_Event("text", end, text=html.unescape(source[end:])))
        for event, following in zip(self.events, self.events[1:], strict=False):
            event.stop = following.start
        if self.events:
            self.events[-1].stop = len(source)

    def _note(self, kind: str, **values: object) -> None:
        line, column = self.getpos()
        self.events.append(_Event(kind, self._lines[line - 1] + column, **values))  # type: ignore[arg-type]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        kept = tag in _KEPT or given.get("translate") == "no" or "notranslate" in (given.get("class") or "")
        self._note("void" if tag in _VOID else "open", tag=tag, kept=kept)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note("void", tag=tag)

    def handle_endtag(self, tag: str) -> None:
        self._note("close", tag=tag)

    def handle_data(self, data: str) -> None:
        self._note("text", text=data)

    def handle_comment(self, data: str) -> None:
        self._note("other")

    def handle_decl(self, decl: str) -> None:
        self._note("other")

    def handle_pi(self, data: str) -> None:
        self._note("other")

    def unknown_decl(self, data: str) -> None:
        self._note("other")


@dataclass(frozen=True)
class Element:
    """Tags around characters [start, stop) of a segment; where close is empty, one tag at a place."""

    open: str
    close: str
    start: int
    stop: int

    @property
    def is_point(self) -> bool:
        return not self.close


@dataclass
class Segment:
    """Running text between two tags that part sentences; a `mark` stands in it for each span, in order."""

    text: str
    mark: str
    spans: list[Span] = field(default_factory=list)
    elements: list[Element] = field(default_factory=list)


def read_html(source: str) -> list[str | Segment]:
    """Verbatim runs and segments, in order."""
    events = _Reader(source).events
    _pair(events)
    parting = _find_parting(events)
    mark = unused_mark(html.unescape(source))
    chunks: list[str | Segment] = []
    at = begin = 0
    while at <= len(events):
        if at < len(events) and not parting[at]:
            at += 1
            continue
        chunks += _read_segment(source, events[begin:at], begin, mark)
        if at < len(events):
            last = _last_of_kept(events, at)
            chunks.append(source[events[at].start : events[last].stop])
            at = last
        at += 1
        begin = at
    return chunks


def _last_of_kept(events: list[_Event], at: int) -> int:
    """The end of an element whose content stays as it is."""
    partner = events[at].partner
    return partner if events[at].kept and events[at].kind == "open" and partner is not None else at


def _pair(events: list[_Event]) -> None:
    """Give each tag its partner; one that has none keeps None."""
    stack: list[int] = []
    n_open: dict[str, int] = {}
    for i, event in enumerate(events):
        if event.kind == "open":
            stack.append(i)
            n_open[event.tag] = n_open.get(event.tag, 0) + 1
        elif event.kind == "close" and n_open.get(event.tag):
            while True:
                j = stack.pop()
                n_open[events[j].tag] -= 1
                if events[j].tag == event.tag:
                    events[j].partner, event.partner = i, j
                    break


def _find_parting(events: list[_Event]) -> list[bool]:
    """Per event, does it part sentences?"""
    parting = [_parts(event) for event in events]
    n_before = [0]
    for each in parting:
        n_before.append(n_before[-1] + each)
    for i, event in enumerate(events):
        if event.kind != "open" or parting[i] or event.partner is None or event.kept:
            continue
        if n_before[event.partner] > n_before[i + 1]:
            parting[i] = parting[event.partner] = True
    return parting


def _parts(event: _Event) -> bool:
    if event.kind in ("text", "other"):
        return False
    if event.kind == "void":
        return event.tag not in _INLINE_VOID and event.tag not in _INLINE
    return event.tag not in _INLINE or event.partner is None


def _read_segment(source: str, events: list[_Event], first: int, mark: str) -> list[str | Segment]:
    """Events without a tag that parts sentences; `first` is the index of the first of them."""
    if not events:
        return []
    start, stop = events[0].start, events[-1].stop
    segment, opened = Segment("", mark), {}
    at = 0
    while at < len(events):
        event = events[at]
        raw = source[event.start : event.stop]
        if event.kind == "text":
            _append(segment, event.text, after_void=at > 0 and events[at - 1].kind == "void")
        elif event.kind == "open" and event.kept and event.partner is not None:
            at = event.partner - first
            raw = source[event.start : events[at].stop]
            here = len(segment.text)
            segment.spans.append(Span(here, here + 1, raw, raw, is_markup=True))
            segment.text += mark
        elif event.kind == "open":
            opened[at + first] = len(segment.text), len(segment.elements)
        elif event.kind == "close" and event.partner is not None:
            began, n_before = opened.pop(event.partner)
            _close(segment, source, began, n_before, events[event.partner - first], event)
        else:
            segment.elements.append(Element(raw, "", len(segment.text), len(segment.text)))
        at += 1
    if not is_translatable(segment.text.replace(mark, "")):
        return [source[start:stop]]
    return _strip(segment)


def _append(segment: Segment, text: str, *, after_void: bool) -> None:
    """Runs of white space are one space in HTML, but where something stands in them."""
    text = _SPACE.sub(" ", text)
    doubled = text.startswith(" ") and segment.text.endswith(" ") and not after_void
    segment.text += text[1:] if doubled else text


def _close(
    segment: Segment, source: str, start: int, n_before: int, opening: _Event, closing: _Event
) -> None:
    """An element ends that began at `start`, when the segment had `n_before` others."""
    inner = segment.text[start:]
    if inner.strip():
        tags = source[opening.start : opening.stop], source[closing.start : closing.stop]
        segment.elements.append(Element(*tags, start, len(segment.text)))
        return
    # Without words there is nothing to align: the whole of it is a point.
    raw = source[opening.start : closing.stop]
    del segment.elements[n_before:]
    segment.text = segment.text[:start]
    segment.elements.append(Element(raw, "", start, start))


def _strip(segment: Segment) -> list[str | Segment]:
    """The segment without the white space around it."""
    text = segment.text
    before, after = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    last = len(text) - after
    elements = [
        replace(
            e, start=min(max(e.start, before), last) - before, stop=min(max(e.stop, before), last) - before
        )
        for e in segment.elements
    ]
    spans = [replace(s, start=s.start - before, stop=s.stop - before) for s in segment.spans]
    stripped = Segment(text[before:last], segment.mark, spans, in_order(elements))
    return [each for each in (" " * before, stripped, " " * after) if each]


def in_order(elements: list[Element]) -> list[Element]:
    """From outside in; elements were noted where they close, so of two alike the later is the outer."""

    def key(numbered: tuple[int, Element]) -> tuple[int, int, int]:
        i, element = numbered
        return element.start, -element.stop, i if element.is_point else -i

    return [element for _, element in sorted(enumerate(elements), key=key)]


def escape(text: str) -> str:
    """Text as HTML."""
    return html.escape(text, quote=False).replace("\xa0", "&nbsp;")


# How much of the attention of target characters [start, stop) goes to source characters [start, stop).
Share = Callable[[tuple[int, int], tuple[int, int]], float]


_WORD = re.compile(r"\w")


def find_units(text: str) -> list[tuple[int, int]]:
    """Words, and runs of other signs: what a tag can stand around."""
    return [match.span() for match in _UNIT.finditer(text)]


def place_elements(
    elements: Sequence[Element], units: Sequence[tuple[int, int]], share: Share, source: str, text: str
) -> list[tuple[Element, int, int]]:
    """For each element the units [first, last) of the translation that it goes around, within its parent's.

    An element gets the run of units that looked at its words more than at others, the one that looked at them
    most at least; where no unit is left it goes around nothing. Units stand in the translation, `text`,
    elements in its `source`: one that goes around a word there goes around more than a full stop here.
    """
    is_word = [_WORD.search(text, *unit) is not None for unit in units]
    placed: list[tuple[Element, int, int]] = []
    waiting = [([e for e in elements if not e.is_point], 0, len(units))]
    while waiting:
        inner, first, last = waiting.pop()
        taken = [False] * (last - first)
        for element, children in _families(inner):
            gains = [share(unit, (element.start, element.stop)) - 0.5 for unit in units[first:last]]
            low, high = _best_run(gains, taken)
            if not any(is_word[first:last][low:high]) and _WORD.search(source, element.start, element.stop):
                of_words = [took or not word for took, word in zip(taken, is_word[first:last], strict=True)]
                found = _best_run(gains, of_words)
                low, high = found if found[0] < found[1] else (low, high)
            taken[low:high] = [True] * (high - low)
            placed.append((element, first + low, first + high))
            waiting.append((children, first + low, first + high))
    return placed  # from outside in


def _families(elements: Sequence[Element]) -> list[tuple[Element, list[Element]]]:
    """Each outermost element with what is within it; they come in the order of `in_order`."""
    families: list[tuple[Element, list[Element]]] = []
    for element in elements:
        if families and element.start < families[-1][0].stop:
            families[-1][1].append(element)
        else:
            families.append((element, []))
    return families


def _best_run(gains: list[float], taken: list[bool]) -> tuple[int, int]:
    """The untaken run [low, high) of the greatest sum (Kadane); it has one member where no sum is above 0."""
    best, low, high = -1.0, len(gains), len(gains)
    total, start = 0.0, 0
    for i, gain in enumerate(gains):
        if taken[i]:
            total, start = 0.0, i + 1
            continue
        if total <= 0.0:
            total, start = 0.0, i
        total += gain
        if total > best:
            best, low, high = total, start, i + 1
    return low, high


def place_point(units: Sequence[tuple[int, int]], before: tuple[int, int] | None, share: Share) -> int:
    """After how many units a single tag goes: after the one that looked most at the word `before` it."""
    if before is None or not units:
        return 0
    return 1 + max(range(len(units)), key=lambda i: share(units[i], before))


def set_tags(
    runs: Sequence[tuple[int, str]],
    units: Sequence[tuple[int, int]],
    placed: Sequence[tuple[Element, int, int]],
    points: Sequence[tuple[Element, int]],
    length: int,
) -> str:
    """The translation with its tags. `runs` are (start, HTML) of its parts, each of one unit or of none."""
    inserted: dict[int, tuple[list[str], list[str], list[str]]] = {}

    def at(position: int) -> tuple[list[str], list[str], list[str]]:
        return inserted.setdefault(position, ([], [], []))

    for element, first, last in placed:  # from outside in
        if first == last:
            at(units[first][0] if first < len(units) else length)[1].append(element.open + element.close)
            continue
        at(units[first][0])[2].append(element.open)
        at(units[last - 1][1])[0].insert(0, element.close)
    for element, n_before in points:
        at(units[n_before - 1][1] if n_before else 0)[1].append(element.open)
    pieces: list[str] = []
    for start, text in runs:
        closes, alone, opens = inserted.pop(start, ([], [], []))
        pieces += [*closes, *alone, *opens, text]
    for position in sorted(inserted):
        closes, alone, opens = inserted[position]
        pieces += [*closes, *alone, *opens]
    return "".join(pieces)


def tag_in_place(
    cuts: Iterable[int], elements: Sequence[Element], length: int, show: Callable[[int, int], str]
) -> str:
    """A text that stays as it is, with its tags; `show` gives its runs between cuts as HTML."""
    bounds = sorted({0, length, *cuts, *(place for e in elements for place in (e.start, e.stop))})
    units = list(pairwise(bounds))
    index = {place: i for i, place in enumerate(bounds)}
    placed = [(e, index[e.start], index[e.stop]) for e in elements if not e.is_point]
    points = [(e, index[e.start]) for e in elements if e.is_point]
    return set_tags([(start, show(start, stop)) for start, stop in units], units, placed, points, length)


class Around:
    """The elements of a segment by their sentences; one that goes around several stands between these.

    `bounds` are the (start, stop) of the segment's parts, `is_sentence` tells sentences from white space.
    """

    def __init__(
        self, elements: Sequence[Element], bounds: Sequence[tuple[int, int]], is_sentence: Sequence[bool]
    ) -> None:
        self._within: dict[int, list[Element]] = {}
        self._opens: dict[int, list[str]] = {}
        self._closes: dict[int, list[str]] = {}
        crossing: list[list[Any]] = []  # element, first part, last part
        open_now: list[list[Any]] = []
        starts = [start for start, _ in bounds]
        for element in elements:
            first = max(bisect_right(starts, element.start) - 1, 0)
            if element.is_point:
                self._within.setdefault(first, []).append(element)
                continue
            last = max(bisect_left(starts, element.stop) - 1, 0)
            first += not is_sentence[first] and first < last
            last -= not is_sentence[last] and last > first
            if first == last:
                start, stop = bounds[first]
                clipped = replace(element, start=max(element.start, start), stop=min(element.stop, stop))
                self._within.setdefault(first, []).append(clipped)
                continue
            # It goes around whole sentences; one that ended within the first of them ends before it.
            while open_now and open_now[-1][0].stop <= element.start:
                ended = open_now.pop()
                ended[2] = min(ended[2], first - 1)
            open_now.append([element, first, last])
            crossing.append(open_now[-1])
        for element, first, last in crossing:
            self._opens.setdefault(first, []).append(element.open)
            self._closes.setdefault(last, []).insert(0, element.close)

    def before(self, part: int) -> str:
        return "".join(self._opens.get(part, ()))

    def after(self, part: int) -> str:
        return "".join(self._closes.get(part, ()))

    def within(self, part: int) -> list[Element]:
        return self._within.get(part, [])
