"""HTML: segments, and tags that are put back."""

import random
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from app.markup import Around, Element, Segment, find_units, place_elements, place_point, read_html, set_tags


def texts(source: str) -> list[str]:
    return [chunk.text for chunk in read_html(source) if isinstance(chunk, Segment)]


@pytest.mark.parametrize(
    ("source", "segments"),
    [
        ("<p>Good\n  <b>day</b>.</p><p>Bye</p>", ["Good day.", "Bye"]),
        ("a &amp; b<br>c &lt; d &nbsp;e", ["a & b", "c < d \xa0e"]),
        ("<script>x</script><style>y</style><pre>z</pre>", []),
        ("<p translate='no'>x</p><div class='notranslate'>y</div>z", ["z"]),
        ("<span>one <p>two</p></span><b>three", ["one", "two", "three"]),
        ("</i>x</b>", ["x"]),
        ("x <b> y</b> <img> <i>z</i>", ["x y  z"]),
        ("12 <b>34</b>", []),
        ("", []),
        ("a < b > c & d &#x110000; &nosuch;", ["a < b > c & d \ufffd &nosuch;"]),
        ("<p>a</p>b < c <i", ["a", "b < c <i"]),
    ],
)
def test_segments(source: str, segments: list[str]) -> None:
    assert texts(source) == segments


def test_elements_of_a_segment() -> None:
    source = " <i>a <b>bc</b></i> <code>x</code> <a><img src=y></a><u> </u>d<!-- e -->"
    before, segment = read_html(source)
    assert before == " "
    assert isinstance(segment, Segment)
    assert segment.text == f"a bc {segment.mark} d"
    assert [span.output for span in segment.spans] == ["<code>x</code>"]
    assert [(e.open, e.close, segment.text[e.start : e.stop]) for e in segment.elements] == [
        ("<i>", "</i>", "a bc"),
        ("<b>", "</b>", "bc"),
        ("<a><img src=y></a>", "", ""),
        ("<u> </u>", "", ""),
        ("<!-- e -->", "", ""),
    ]


def test_no_tag_without_words_is_lost() -> None:
    *_, segment = read_html("<i></i><b></b><b></b><b><i></i></b>a")
    assert isinstance(segment, Segment)
    assert [e.open for e in segment.elements] == ["<i></i>", "<b></b>", "<b></b>", "<b><i></i></b>"]


def test_elements_go_around_the_words_that_looked_at_theirs() -> None:
    """The translation says the source's words backwards: unit i looked at word 3 - i alone."""
    units = find_units("w3 w2 w1 w0")
    words = [(0, 1), (2, 3), (4, 5), (6, 7)]

    def share(unit: tuple[int, int], source: tuple[int, int]) -> float:
        start, stop = words[3 - units.index(unit)]
        return float(source[0] <= start and stop <= source[1])

    outer, inner, other = (
        Element(f"<{t}>", f"</{t}>", *place) for t, place in (("b", (0, 5)), ("i", (2, 3)), ("u", (6, 7)))
    )
    placed = place_elements([outer, inner, other], units, share, "a b c d", "w3 w2 w1 w0")
    assert sorted((e.open, first, last) for e, first, last in placed) == [
        ("<b>", 1, 4),
        ("<i>", 2, 3),
        ("<u>", 0, 1),
    ]
    assert place_point(units, words[3], share) == 1
    assert place_point(units, None, share) == 0


def test_each_element_has_a_word_while_there_are_any() -> None:
    units = find_units("a b")
    three = [Element(f"<{i}>", f"</{i}>", i, i + 1) for i in range(3)]
    placed = place_elements(three, units, lambda unit, source: 0.0, "abc", "a b")
    assert [(first, last) for _, first, last in placed] == [(0, 1), (1, 2), (2, 2)]


def test_what_goes_around_a_word_goes_around_no_full_stop() -> None:
    units = find_units("a b.")
    word, stop = Element("<b>", "</b>", 0, 1), Element("<i>", "</i>", 3, 4)

    def share(unit: tuple[int, int], source: tuple[int, int]) -> float:
        return {0: 0.2, 2: 0.3, 3: 0.9}[unit[0]]

    assert place_elements([word], units, share, "c d!", "a b.") == [(word, 1, 2)]
    assert place_elements([stop], units, share, "c d!", "a b.") == [(stop, 2, 3)]
    assert place_elements([word], units[2:], share, "c d!", "a b.") == [(word, 0, 1)]  # there is no word


class Outline(HTMLParser):
    """The tags of a text, and whether each closes what was opened last."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.is_nested = True
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(f"{tag} {attrs}")
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.is_nested &= bool(self.open) and self.open.pop() == tag


def random_html(rng: random.Random, depth: int = 0) -> str:
    pieces = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.random()
        if kind < 0.5 or depth > 4:
            pieces.append(
                " ".join(rng.choices(["one", "Two.", "three", "&lt;4", "Five!"], k=rng.randint(0, 3)))
            )
        elif kind < 0.6:
            pieces.append(f"<img id={rng.random()}>")
        else:
            tag = rng.choice(["b", "i", "a", "span", "p", "div"])
            pieces.append(f"<{tag} id={rng.random()}>{random_html(rng, depth + 1)}</{tag}>")
    return rng.choice(["", " "]).join(pieces)


@pytest.mark.parametrize("seed", range(200))
def test_no_tag_is_lost_and_nesting_stays(seed: int) -> None:
    """Whatever the units and wherever the alignment sends them; sentences end at full stops."""
    rng = random.Random(seed)
    source = random_html(rng)
    out = []
    for chunk in read_html(source):
        if isinstance(chunk, str):
            out.append(chunk)
            continue
        bounds = [m.span() for m in re.finditer(r"[^.!]+[.!]?\s*|[.!]", chunk.text)]
        around = Around(chunk.elements, bounds, [True] * len(bounds))
        for i in range(len(bounds)):
            text = " ".join(rng.choices(["가", "나다", "라."], k=rng.randint(0, 5)))
            units = find_units(text)
            placed = place_elements(
                around.within(i), units, lambda unit, place: rng.random(), chunk.text, text
            )
            points = [(e, rng.randint(0, len(units))) for e in around.within(i) if e.is_point]
            runs = [(a, text[a:b]) for a, b in pieces(text, units)]
            out += [around.before(i), set_tags(runs, units, placed, points, len(text)), around.after(i)]
    before, after = Outline(source), Outline("".join(out))
    assert sorted(before.tags) == sorted(after.tags)
    assert after.is_nested
    assert not after.open


def pieces(text: str, units: list[tuple[int, int]]) -> list[tuple[int, int]]:
    cuts = sorted({0, len(text), *(place for unit in units for place in unit)})
    return list(pairwise(cuts))
