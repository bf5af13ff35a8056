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
from app.protection import replace_runs, unused_mark

_MAY_HAVE = re.compile(r"\*|_|~~|\]\(|```")
_FENCE = re.compile(
    r"(?:[ \t>]|[-*+] |\d{1,3}[.)] ){0,20}(`{3,})"
    r"(?P<info>(?:[ \t]*[^\s`{]+)?(?:[ \t]*\{[^}`\r\n]*\})?)[ \t]*[\r\n]*$"
)
_OPAQUE = re.compile(r"`[^`\n]+`|https?://[^\s)]+")  # signs within code and addresses are their own
_MOST = 300  # characters between two signs, so that signs without partners cost little
_PAIRED = re.compile(
    # Behind a letter or a figure two stars are a power, or stand for what is not said.
    rf"(?P<open>(?<![\\*A-Za-z0-9])\*{{2,3}})(?=[^\s*])(?P<bold>[^\n]{{1,{_MOST}}}?)(?<=[^\s\\*])(?P=open)(?![*A-Za-z0-9])"
    rf"|(?<![\\~])~~(?=[^\s~])(?P<old>[^\n]{{1,{_MOST}}}?)(?<=[^\s\\~])~~(?!~)"
    # No patterns of files, no smileys.
    rf"""|(?<![\\*\w/;|.])\*(?=[\w"'“‘(\[`])(?P<stress>[^*\n]{{1,{_MOST}}}?)(?<=[\w.,!?…"'”’)\]`:%])\*(?![*A-Za-z0-9])"""
    # One word between low lines may be a name in a program.
    rf"|(?<![\\\w/])_(?=[^\s_])(?P<low>[^_\n]{{1,{_MOST}}} [^_\n]{{1,{_MOST}}})(?<=[^\s\\])_(?!\w)"
    rf"|(?<!\\)!?\[(?P<link>[^\[\]\n]{{1,{_MOST}}})\]"
    r"""\((?:[^\s()]|\([^\s()]{0,99}\)){1,2000}(?: "[^"\n]{0,200}")?\)"""
)
_WORDS = re.compile(r"[^\W\d_]{2}|[가-힣]")
_ANYTHING = re.compile("\\w|[\u2600-\u27bf\U0001f000-\U0001faff]")


def read_markdown(source: str) -> list[str | Segment]:
    """Verbatim runs and segments, in order: with their elements' signs they are the source."""
    if not _MAY_HAVE.search(source):
        return [Segment(source, unused_mark(source))]
    chunks: list[str | Segment] = []
    text, code, fence = "", "", ""
    for line in source.splitlines(keepends=True):
        found = _FENCE.match(line)
        if fence:  # one that nothing closes goes on to the end
            code += line
            closes = found and found[1].startswith(fence) and not found["info"].strip()
            if closes:
                chunks.append(code)
                code = fence = ""
        elif found:
            chunks += _segments(text)
            text, code, fence = "", line, found[1]
        else:
            text += line
    return [*chunks, *_segments(text), *([code] if code else [])]


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
    opaque = [match.span() for match in _OPAQUE.finditer(line, start, stop)]
    starts = [first for first, _ in opaque]

    def is_within(place: int) -> bool:
        i = bisect_left(starts, place) - 1
        return i >= 0 and place < opaque[i][1]

    for match in _PAIRED.finditer(line, start, stop):
        kind = next(name for name in ("bold", "old", "stress", "low", "link") if match[name])
        inner = match.span(kind)
        what = _WORDS if kind in ("stress", "low") else _ANYTHING
        if (
            not what.search(line, *inner)
            or is_within(match.start())
            or (kind != "link" and is_within(inner[1]))
        ):
            continue
        yield from _pairs(line, *inner)
        yield match.span(), inner
