"""Markdown in a text: segments, and signs that are put back."""

import httpx
import pytest

from app.markdown import read_markdown
from app.markup import Segment
from tests.app.fakes import FakeDecodeLane


def read(source: str) -> list[str | tuple[str, list[tuple[str, str, str]]]]:
    """Verbatim runs; of segments the text, and what each element goes around with its signs."""
    return [
        (chunk.text, [(e.open, chunk.text[e.start : e.stop], e.close) for e in chunk.elements])
        if isinstance(chunk, Segment)
        else chunk
        for chunk in read_markdown(source)
    ]


def test_signs_become_elements_line_by_line() -> None:
    assert read('One\ntwo\n- **Note:** see [this (a)](https://x.org/a_(b) "t")!\n\nthree') == [
        ("One\ntwo\n", []),
        ("- Note: see this (a)!", [("**", "Note:", "**"), ("[", "this (a)", '](https://x.org/a_(b) "t")')]),
        ("\n\nthree", []),
    ]
    assert read("**[a](b) c** ***d*** ![e](f.png) _go home_ ~~i~~") == [
        (
            "a c d e go home i",
            [
                ("**", "a c", "**"),
                ("[", "a", "](b)"),
                ("***", "d", "***"),
                ("![", "e", "](f.png)"),
                ("_", "go home", "_"),
                ("~~", "i", "~~"),
            ],
        )
    ]


@pytest.mark.parametrize(
    "text",
    [
        "x**2 + y**2, f**k and s**t, src/*.py and tests/*.py, COUNT(*) or COUNT(*)>1, (*.jpg;*.png)",
        "https://x.org/*/a and https://y.org/*/b, https://x.org/*a* b, (*^o^*) (*≧ω≦*), *a*",
        "2*3*4, 2 * 3 * 4, __init__, a_b_c, *^^*",
        "f*ck and sh*t",
        "\\*no\\* `**code**` `a` **b`",
        "a ** b ** c",
        "[1] (2) [a]: b",
        "**",
        "**one\ntwo**",
        "",
    ],
)
def test_what_only_looks_like_markdown_is_text(text: str) -> None:
    assert read(text) == [(text, [])]


def test_bold_figures_and_pictures_are_elements() -> None:
    assert read("**중요**한 **3** and **😀**, ~~$9~~") == [
        (
            "중요한 3 and 😀, $9",
            [("**", "중요", "**"), ("**", "3", "**"), ("**", "😀", "**"), ("~~", "$9", "~~")],
        )
    ]


def test_what_stands_between_fences_stays() -> None:
    assert read("Run:\n```sh\nls *a*\n```\nDone *now*.") == [
        ("Run:\n", []),
        "```sh\nls *a*\n```\n",
        ("Done now.", [("*", "now", "*")]),
    ]
    assert read("```\r\na\r\n```\r\nb") == ["```\r\na\r\n```\r\n", ("b", [])]
    assert read("- ```\n  a\n  ```\nb") == ["- ```\n  a\n  ```\n", ("b", [])]
    assert read("Good ```\na\n``` more here\nb") == [("Good ```\na\n``` more here\nb", [])]
    assert read("a\n> ````\n```\nb") == [("a\n", []), "> ````\n```\nb"]  # to the end


@pytest.mark.parametrize(
    ("text", "read", "answer"),
    [
        ("**Good** day\n*Night*", ["Good day", "Night"], "**GOOD** DAY\n*NIGHT*"),
        ("```\nls\n```", [], "```\nls\n```"),
        ("Go → **Home** → [Out](x.y)", ["Go", "Home", "Out"], "GO → **HOME** → [OUT](x.y)"),
        ("Click [Home → Out](x.y) now", ["Click Home → Out now"], None),
        ("**Home → Out**", ["Home", "Out"], "**HOME → OUT**"),
        ("**Good day. Bye.** See", ["Good day.", "Bye.", "See"], "**GOOD DAY. BYE.** SEE"),
        ("*12* &", [], "*12* &"),
    ],
)
async def test_signs_go_where_their_words_went(
    client: httpx.AsyncClient, translate_lane: FakeDecodeLane, text: str, read: list[str], answer: str | None
) -> None:
    given = await client.post("/translate", json={"inputs": text, "parameters": {"src_lang": "en"}})
    sources = [translate_lane.tokenizer.decode(each.prompt_ids).strip() for each in translate_lane.submitted]
    assert sources == read
    assert answer is None or given.json() == [{"translation_text": answer}]
