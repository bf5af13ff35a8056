"""What a translation keeps: finding it, hiding it, putting it back."""

import random
import re

import pytest

from app.protection import (
    MAX_HIDDEN,
    Edited,
    Glossary,
    _after,
    agree,
    find_spans,
    replace_runs,
    shield,
    unused_mark,
)
from tests.app.fakes import byte_tokenizer


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Visit https://example.com/a(b)?c=d&e#f. Then go.", ["https://example.com/a(b)?c=d&e#f"]),
        ("(see www.example.org)", ["www.example.org"]),
        ("자세한 것은 https://example.com/에서 보세요", ["https://example.com/"]),
        ("https://ko.example.org/위키/한국어 참고", ["https://ko.example.org/위키/한국어"]),
        ("Write to a.b+c@x.co.kr, please", ["a.b+c@x.co.kr"]),
        ("Run `make -j 2 all`!", ["`make -j 2 all`"]),
        ("at 14:35:20 on 2024-05-17, 02-987-6543", ["14:35:20", "2024-05-17", "02-987-6543"]),
        ("from 9:00 to 14:35, 6:05; 3:2", ["3:2"]),
        ("version 2.11.3 of 3.5, 12,000 and 1953", ["2.11.3"]),
        ("+82-10-1234-5678", ["+82-10-1234-5678"]),
        (
            "Hello {name}, {{a.b}}: %d and %1$s, %(n)s, ${x}; 5% if, 100%d",
            ["{name}", "{{a.b}}", "%d", "%1$s", "%(n)s", "${x}"],
        ),
        ("use --out=a.txt. or --b-c, the -v flag; --too late -I x", ["--out=a.txt", "--b-c", "-v"]),
        (
            "see ./a/b.sh, /usr/lib/x and C:\\a\\b.txt, he/she km/h </b></i>",
            ["./a/b.sh", "/usr/lib/x", "C:\\a\\b.txt"],
        ),
        ("보고서_최종.pdf를 report_v2.docx. Yes.So", ["보고서_최종.pdf", "report_v2.docx"]),
        ("call get_it() in snake_case, T_T", ["get_it()", "snake_case"]),
        ("in /usr/lib. Then @john. And @5pm {see below}", ["/usr/lib", "@john"]),
        ("@민수가 @유나", ["@민수", "@유나"]),
        ("9:00-18:00, 10:30/14:30, 3:16-17, 98:95", ["9:00-18:00", "10:30/14:30", "3:16-17", "98:95"]),
        ("@minsu and @민수, a@b.com", ["@minsu", "@민수", "a@b.com"]),
        ("off by ±3.5%, see §5.2 and №7; ± and §", ["±3.5%", "§5.2", "№7"]),
        ("and/or, e.g. this; a@b; 3 - 4; https://", []),
    ],
)
def test_addresses_code_and_figures(text: str, kept: list[str]) -> None:
    assert [span.source for span in find_spans(text, None)] == kept
    assert all(text[span.start : span.stop] == span.output for span in find_spans(text, None))


def test_terms_are_whole_words_and_korean_nouns_with_their_particles() -> None:
    glossary = Glossary.of(
        {"역": "terminal", "station": "정거장", "train station": "기차역", "API": "에이피아이"}, ["C++"]
    )

    def found(text: str) -> list[tuple[str, str]]:
        return [(span.source, span.output) for span in find_spans(text, glossary)]

    assert found("역사는 길다. 역에서 역까지는 역입니다") == [("역", "terminal")] * 3
    assert found("A Train Station, a station and stations") == [
        ("Train Station", "기차역"),
        ("station", "정거장"),
    ]
    assert found("API는 c++ 아니라 xAPI") == [("API", "에이피아이"), ("c++", "c++")]
    assert found("https://station.org") == [("https://station.org", "https://station.org")]
    assert Glossary.of({}) is None


def test_terms_are_found_with_any_apostrophe_and_width() -> None:
    glossary = Glossary.of({"don’t know": "몰라요", "ＫＢＳ": "케이비에스"}, ["Wendy's"])
    assert glossary is not None
    found = [(span.source, span.output) for span in glossary.spans("I don't know KBS, Wendy‘s or Wendys.")]
    assert found == [("don't know", "몰라요"), ("KBS", "케이비에스"), ("Wendy‘s", "Wendy‘s")]


@pytest.mark.parametrize("seed", range(20))
def test_terms_are_found_as_if_tried_one_after_the_other_the_longest_first(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        drawn = ("".join(rng.choices("aAb가 -는", k=rng.randint(1, 4))) for _ in range(8))
        terms = {term for term in drawn if re.search("[abA가는]", term)}
        text = "".join(rng.choices("aAb가 -는", k=40))
        patterns = (
            (r"(?<![^\W_])" if term[0].isalnum() else "") + re.escape(term) + _after(term)
            for term in sorted(terms, key=len, reverse=True)
        )
        glossary = Glossary.of({}, terms)
        assert glossary is not None
        found = re.finditer("|".join(patterns), text, re.IGNORECASE)
        assert [span.source for span in glossary.spans(text)] == [match.group() for match in found]


def test_terms_that_begin_alike_however_many() -> None:
    glossary = Glossary.of({}, ["a" * n for n in range(1, 300)])
    assert glossary is not None
    assert [span.source for span in glossary.spans(f"{'a' * 299} {'a' * 300} {'a' * 7}")] == [
        "a" * 299,
        "a" * 7,
    ]


def test_places_after_an_edit() -> None:
    edited = replace_runs("ab cd ef", [(0, 2, "x"), (3, 5, "long")])
    assert edited == Edited("x long ef", ((0, 2, 1), (3, 5, 4)))
    assert [edited.place(i) for i in range(9)] == [0, 0, 1, 2, 2, 6, 7, 8, 9]
    assert [edited.place(i, end=True) for i in (1, 4)] == [1, 6]


def test_hidden_and_restored() -> None:
    text = "Firefox: www.a.org, 1,250 books from the shop"
    spans = find_spans(text, Glossary.of({"shop": "가게"}))
    mark = unused_mark(text)
    marked = replace_runs(text, [(s.start, s.stop, mark) for s in spans]).text
    hidden, _ = shield(marked, mark, spans, byte_tokenizer())
    # The text has a Firefox of its own.
    assert hidden.text == "Firefox: CPU, 1,250 books from the DNA"
    assert [phrase.once for phrase in hidden.phrases] == [True, True, False]
    assert hidden.restore("CPU는 DNA을 1,250") == "www.a.org는 가게를 1,250"
    assert hidden.unmet("CPU는 DNA을 1,250") == []
    assert hidden.restore("xDNACPU CPUs") == "x가게www.a.org www.a.orgs"
    assert hidden.unmet("XCPU는 DNAS 11,250 Firefox") == ["www.a.org", "shop", "1,250"]


def test_numbers_are_none_within_others() -> None:
    spans = find_spans("2026-11-26 10:30:15", None)
    hidden, _ = shield("12 \U000f0000 \U000f0000 3.5", "\U000f0000", spans, byte_tokenizer())
    assert hidden.numbers == ("12", "3.5")
    for wrong in ("12,000 3.5", "0.12 3.5", "112 3.5"):
        assert hidden.unmet(f"Firefox CPU {wrong}") == ["12"], wrong
    for wrong in ("1,3.5", "3.5.1", "3.55"):
        assert hidden.unmet(f"Firefox CPU 12 {wrong}") == ["3.5"], wrong
    assert hidden.unmet("Firefox CPU 12, 3.5.") == []
    assert hidden.restore("FirefoxCPU") == "2026-11-26 10:30:15"


def test_months_are_no_numbers() -> None:
    hidden, _ = shield("12월 25일, 1,250원, 10,20", "\U000f0000", [], byte_tokenizer())
    assert hidden.numbers == ("25", "1,250")


def test_so_many_can_be_hidden_whatever_the_text_says() -> None:
    words = "cpu DNA pdf BBC Firefox FIFA gps EU QX2"
    text = " ".join((words, *["\U000f0000"] * MAX_HIDDEN))
    spans = find_spans(" ".join(["a@b.cd"] * MAX_HIDDEN), None)
    hidden, _ = shield(text, "\U000f0000", spans, byte_tokenizer())
    assert list(hidden.hidden) == ["QX1", "QX3", "QX4", "QX5"]
    assert unused_mark("\U000f0000\U000f0001") == "\U000f0002"


def test_a_term_with_its_article_replaces_the_article() -> None:
    text = "한강에서"
    spans = find_spans(text, Glossary.of({"한강": "the Han River"}))
    hidden, _ = shield("\U000f0000에서", "\U000f0000", spans, byte_tokenizer())
    assert hidden.restore("at the CPU") == "at the Han River"
    assert hidden.restore("The CPU and bathe CPU") == "the Han River and bathe the Han River"


@pytest.mark.parametrize(
    ("word", "after", "agreed"),
    [
        ("정거장", "를 샀다", "을 샀다"),
        ("학교", "은 크다", "는 크다"),
        ("서울", "으로 간다", "로 간다"),
        ("정거장", "로부터", "으로부터"),
        ("정거장", "였다", "이었다"),
        ("정거장", "가게", "가게"),
        ("정거장", "에서", "에서"),
        ("버스 3", "는", "은"),
        ("버스 2", "은", "는"),
        ("a@b.cd", "는", "는"),
        ("책", "", ""),
    ],
)
def test_particles_agree(word: str, after: str, agreed: str) -> None:
    assert agree(word, after) == agreed


@pytest.mark.parametrize(
    ("text", "target", "amounts"),
    [
        ("월급이 300만 원이다.", "en", [("300만", "3 million")]),
        ("15만 명이 1조 2,500억 원을", "en", [("15만", "150,000"), ("1조 2,500억", "1.25 trillion")]),
        (
            "1만 2천 명과 5천만 원, 1.5억 달러",
            "en",
            [("1만 2천", "12,000"), ("5천만", "50 million"), ("1.5억", "150 million")],
        ),
        ("3,456만 7,890원", "en", [("3,456만 7,890", "34,567,890")]),
        ("제1조 2항, 형법 250조 1항, 1조는 왼쪽, 3만큼, 만 3세, 2024년", "en", []),
        ("1만 2천년, 19만9천9백원", "en", [("1만 2천", "12,000"), ("19만9천9백", "199,900")]),
        ("3천 5백만, 1천 200억", "en", [("3천 5백만", "35 million"), ("1천 200억", "120 billion")]),
        ("1억 5천 만원, 40만5000명", "en", [("1억 5천 만", "150 million"), ("40만5000", "405,000")]),
        (
            "1000만 2주, 10만 3개월, 3만 50%",
            "en",
            [("1000만", "10 million"), ("10만", "100,000"), ("3만", "30,000")],
        ),
        ("100만 200만 원", "en", [("100만", "1 million"), ("200만", "2 million")]),
        ("그림 3만 보라, 딱 3만, 3~ 5 만큼", "en", []),
        (
            "3~5만 원, 10-20억, 1.5∼2조 원",
            "en",
            [
                ("3~5만", "30,000 to 50,000"),
                ("10-20억", "1 billion to 2 billion"),
                ("1.5∼2조", "1.5 trillion to 2 trillion"),
            ],
        ),
        ("3만~5만 원", "en", [("3만", "30,000"), ("5만", "50,000")]),
        ("3만에서 5만 명 정도", "en", [("3만에서 5만", "30,000 to 50,000")]),
        ("3만에서 5만 명으로", "en", [("3만", "30,000"), ("5만", "50,000")]),
        ("5~3만, 제3~5만, 3~5만 2천 원", "en", []),
        (
            "2 to 3 million, 1.5-2 billion, 10 thousand million",
            "ko",
            [("2 to 3 million", "200만~300만"), ("1.5-2 billion", "15억~20억")],
        ),
        (
            "from 2 to 3 million, between 10 and 20 billion won, 5 or 6 million people",
            "ko",
            [
                ("2", "200만"),
                ("3 million", "300만"),
                ("10", "100억"),
                ("20 billion", "200억"),
                ("5", "500만"),
                ("6 million", "600만"),
            ],
        ),
        (
            "500,000 to 1 million, from 100,000 to 2 million, from $1 to $2 billion",
            "ko",
            [
                ("500,000 to 1 million", "50만~100만"),
                ("100,000", "10만"),
                ("2 million", "200만"),
                ("1", "10억"),
                ("2 billion", "20억"),
            ],
        ),
        ("5 to 3 million, in 2 and 3 million", "ko", [("3 million", "300만")]),
        (
            "₩30,000, ₩2-3 million, £ 20, $500K or €1.2bn",
            "ko",
            [
                ("₩30,000", "30,000"),
                ("₩2-3 million", "200만~300만"),
                ("£ 20", "20"),
                ("500K", "50만"),
                ("€1.2bn", "12억"),
            ],
        ),
        ("₩3만~5만, $300만", "en", [("₩3만", "30,000"), ("5만", "50,000"), ("$300만", "3 million")]),
        (
            "3,4만 원, 3, 4천 명, 2~3천 명, 300여만 명",
            "en",
            [
                ("3,4만", "30,000 to 40,000"),
                ("3, 4천", "3,000 to 4,000"),
                ("2~3천", "2,000 to 3,000"),
                ("300여만", "more than 3 million"),
            ],
        ),
        (
            "1억 2천여만 원, 5백여만 명, 2 천 여 만 톤, 3억 500여만 명",
            "en",
            [
                ("1억 2천여만", "more than 120 million"),
                ("5백여만", "more than 5 million"),
                ("2 천 여 만", "more than 20 million"),
                ("3억 500여만", "more than 305 million"),
            ],
        ),
        ("2억 3천5백여만 원", "en", [("2억 3천5백여만", "more than 235 million")]),
        (
            "삼천만 원, 이십오만 원, 일억 이천만 원, 만 오천 원",
            "en",
            [
                ("삼천만", "30 million"),
                ("이십오만", "250,000"),
                ("일억 이천만", "120 million"),
                ("만 오천", "15,000"),
            ],
        ),
        ("이 원칙, 백 명, 오만 원칙, 이만 가자, 구만리, 만 사람, 3,5만", "en", []),
        ("이만 원하는 대로, 이만 명백히, 백만 명품, 이천 원주민, 사천 명예시민, 이천 명물", "en", []),
        ("몇 만 명, 수 천만 원, 수백 만 명, 여러 만 명, 이 백만 명이, 억만 원", "en", []),
        ("헌법 1, 2조는 민법 1조부터 3조까지, 1~2조로 나누어, 제 3,4조", "en", []),
        ("10여 만남, 20여 만화책, 2~3조각, 1~2만두, 3, 4백화점, 1~2천막, 그림 2~3만", "en", []),
        ("2020-21만 번", "en", [("2020-21", "2020-21")]),
        (
            "1000~2000만 원, 1,000∼1,500억, 5000~1만 명",
            "en",
            [
                ("1000~2000만", "10 million to 20 million"),
                ("1,000∼1,500억", "100 billion to 150 billion"),
                ("5000~1만", "5,000 to 10,000"),
            ],
        ),
        ("1,000 to 2,000 million", "ko", [("1,000 to 2,000 million", "10억~20억")]),
        ("5-10 people, 20–30%, 2-3 hours", "ko", [("5-10", "5~10"), ("20–30", "20~30"), ("2-3", "2~3")]),
        (
            "5~10명, 3~5일, 10~20%, 2-3명",
            "en",
            [("5~10", "5 to 10"), ("10~20", "10 to 20"), ("2-3", "2 to 3")],
        ),
        (
            "%d items, {user.count} left, {name} {account}",
            "ko",
            [
                ("%d", "%d"),
                ("{user.count}", "{user.count}"),
                ("{name}", "{name}"),
                ("{account}", "{account}"),
            ],
        ),
        ("€1.000, £5k, $5 m tall, $6 M&M, $" + "9" * 4500 + "M", "ko", []),
        ("US$5만", "en", [("5만", "50,000")]),
        ("3만 명이 $1", "en", [("3만", "30,000")]),
        ("3만 명이 $", "en", [("3만", "30,000")]),
        ("9" * 4500 + "만에서 " + "9" * 4501 + "만 명", "en", []),
        ("5 MILLION and 3 millions", "ko", [("5 MILLION", "500만"), ("3 millions", "300만")]),
        ("9" * 4400 + " million", "ko", []),
        ("3만 명 2024년 3만 2024년", "en", [("3만", "30,000"), ("3만", "30,000")]),
        (
            "It lost $1.5 billion and 51.7 million won.",
            "ko",
            [("1.5 billion", "15억"), ("51.7 million", "5,170만")],
        ),
        (
            "120 million, 1.2345 million, 15 thousand",
            "ko",
            [("120 million", "1억 2,000만"), ("1.2345 million", "123만 4,500"), ("15 thousand", "1만 5,000")],
        ),
        ("a million, 3 millionaires, 1.00000001 million", "ko", []),
        ("It costs 3억 won, not 5천만.", "ko", [("3억", "3억"), ("5천만", "5천만")]),  # as the target has it
        (
            "집은 $3 million이고 5 billion 원이다.",
            "en",
            [("$3 million", "3 million"), ("5 billion", "5 billion")],
        ),
        (
            "Three hundred million won, a hundred and fifty thousand people, twenty-five billion.",
            "ko",
            [
                ("Three hundred million", "3억"),
                ("a hundred and fifty thousand", "15만"),
                ("twenty-five billion", "250억"),
            ],
        ),
        ("A million, five thousand, two million and one, six hundred, ten thousandth", "ko", []),
        ("Two or three million, one to two hundred million, three point five million", "ko", []),
        ("one two three million, chapter ten\n\nThousand Islands", "ko", []),
        ("월급이 300만 원이다.", "fr", []),
        ("300만 and 3 million", "", []),
    ],
)
def test_amounts_change_their_powers(text: str, target: str, amounts: list[tuple[str, str]]) -> None:
    spans = find_spans(text, None, target)
    assert [(span.source, span.output) for span in spans] == amounts
    assert [text[span.start : span.stop] for span in spans] == [source for source, _ in amounts]


def test_an_amount_stands_behind_a_small_number_that_the_text_has_not() -> None:
    text = "37 books for 3 million won and 1,250"
    mark = unused_mark(text)
    spans = find_spans(text, None, "ko")
    marked = replace_runs(text, [(s.start, s.stop, mark) for s in spans]).text
    hidden, _ = shield(marked, mark, spans, byte_tokenizer())
    assert hidden.text == "37 books for 48 won and 1,250"
    assert hidden.numbers == ("37", "1,250")
    assert [phrase.once for phrase in hidden.phrases] == [True, False, False]
    assert hidden.restore("책 37권을 48원과 1,250에") == "책 37권을 300만 원과 1,250에"
    assert hidden.restore("48을, 48까지, 48 원, 48") == "300만을, 300만까지, 300만 원, 300만"
    assert hidden.unmet("37권, 148원, 1,250") == ["3 million"]
    assert hidden.unmet("37권, 48,000원, 3.48, 1,250") == ["3 million"]
    assert hidden.restore("48여 명") == "300만여 명"
    full = "37 48 26 59 64 73 85 92 \U000f0000"
    assert list(shield(full, "\U000f0000", spans, byte_tokenizer())[0].hidden) == ["101"]


@pytest.mark.parametrize(
    "text",
    [
        "the 9-11 attacks, the 7-11 store, a 737-800 plane, Figure 2-3 shows, we won 3-4 games, 05-12",
        "그림 2-3을 보라, 3-12호, 역삼동 123-456 빌딩, 12-34번지, 1-3으로 졌다, 1-2로 이겼다",
    ],
)
def test_two_numbers_with_a_hyphen_are_a_range_only_where_something_is_counted(text: str) -> None:
    for target in ("en", "ko"):
        assert all(span.output == span.source for span in find_spans(text, None, target))
