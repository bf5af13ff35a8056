"""Text as segments of running text, with elements where it has inline Markdown.

`**bold**`, `*stress*`, `~~struck~~`, `[a link](address)` and pictures go the way of HTML's tags: no model
sees the signs, and they are set around the words that theirs became. What is between fences stays as it is.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from app.markup import Element, Segment, in_order
from app.protection import is_translatable, replace_runs, unused_mark

_MAY_HAVE = re.compile(r"\*|_|~~|\]\(|```")
_FENCED = re.compile(
    r"^ {0,3}(?P<fence>`{3,}|~{3,})[^\n]*\n(?:[^\n]*\n)*? {0,3}(?P=fence)[ \t]*$", re.MULTILINE
)
_CODE = re.compile(r"`[^`\n]+`")
_MOST = 300  # characters between two signs, so that signs without partners cost little
_PAIRED = re.compile(
    rf"(?P<open>(?<![\\*])\*{{2,3}})(?=[^\s*])(?P<bold>[^\n]{{1,{_MOST}}}?)(?<=[^\s\\*])(?P=open)(?!\*)"
    rf"|(?<![\\~])~~(?=[^\s~])(?P<old>[^\n]{{1,{_MOST}}}?)(?<=[^\s\\~])~~(?!~)"
    rf"|(?<![\\*\w])\*(?=[^\s*])(?P<stress>[^*\n]{{1,{_MOST}}}?)(?<=[^\s\\])\*(?![*A-Za-z0-9])"
    # One word between low lines may be a name in a program.
    rf"|(?<![\\\w])_(?=[^\s_])(?P<low>[^_\n]{{1,{_MOST}}} [^_\n]{{1,{_MOST}}})(?<=[^\s\\])_(?!\w)"
    rf"|(?<!\\)!?\[(?P<link>[^\[\]\n]{{1,{_MOST}}})\]"
    r"""\((?:[^\s()]|\([^\s()]{0,99}\)){1,2000}(?: "[^"\n]{0,200}")?\)"""
)


def read_markdown(source: str) -> list[str | Segment]:
    """Verbatim runs and segments, in order: with their elements' signs they are the source."""
    if not _MAY_HAVE.search(source):
        return [Segment(source, unused_mark(source))]
    chunks: list[str | Segment] = []
    at = 0
    for match in _FENCED.finditer(source):
        chunks += [*_segments(source[at : match.start()]), match.group()]
        at = match.end()
    return [*chunks, *_segments(source[at:])]


def _segments(text: str) -> Iterator[Segment]:
    """A line that has elements is a segment; lines without any are one together."""
    mark, plain = unused_mark(text), ""
    for line in text.splitlines(keepends=True):
        content = line.rstrip()
        pairs = list(_pairs(content, 0, len(content)))
        if not pairs:
            plain += line
            continue
        if plain:
            yield Segment(plain, mark)
        signs = sorted(run for outer, inner in pairs for run in ((outer[0], inner[0]), (inner[1], outer[1])))
        starts = [start for start, _ in signs]
        lengths = [0, *accumulate(stop - start for start, stop in signs)]
        elements = []
        for (opens, closes), inner in pairs:
            start, stop = (at - lengths[bisect_left(starts, at)] for at in inner)
            elements.append(Element(content[opens : inner[0]], content[inner[1] : closes], start, stop))
        bare = replace_runs(content, [(*sign, "") for sign in signs]).text
        yield Segment(bare, mark, [], in_order(elements))
        plain = line[len(content) :]
    if plain:
        yield Segment(plain, mark)


def _pairs(line: str, start: int, stop: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where signs begin and end, and where what they go around does; of nested ones the inner first."""
    code = [match.span() for match in _CODE.finditer(line, start, stop)]
    for match in _PAIRED.finditer(line, start, stop):
        inner = next(match.span(name) for name in ("bold", "old", "stress", "low", "link") if match[name])
        if not is_translatable(line[inner[0] : inner[1]]):
            continue
        if any(first < inner[0] < last or first < inner[1] < last for first, last in code):
            continue
        yield from _pairs(line, *inner)
        yield match.span(), inner
