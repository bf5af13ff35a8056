"""Known translations: which are found for a text, how files are read, how the index is kept."""

import lzma
import math
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors import SafetensorError

from model.examples import MAX_CHARS, Example, Examples, ExamplesError, find_files, load_examples
from tests.tiny import PAIRS

EN_KO = ("en", "ko")
GOOD_NIGHT = Example("Good night.", "잘 자.", pytest.approx(1.0), is_same=True)  # type: ignore[arg-type]


def made(*pairs: tuple[str, str]) -> Examples:
    return Examples.build({EN_KO: pairs})


def sources(found: list[Example]) -> list[str]:
    return [each.source for each in found]


def test_the_likest_come_first() -> None:
    examples = made(
        *PAIRS,
        ("The dog sleeps.", "개가 잔다."),
        ("The old dog sleeps under the bed.", "늙은 개가 침대 밑에서 잔다."),
    )
    found = examples.find("The old dog sleeps under the chair.", "en", "ko", 3, 0.2)
    assert sources(found)[2] == "The dog sleeps."
    assert set(sources(found)[:2]) == {
        "The old dog sleeps under the table.",
        "The old dog sleeps under the bed.",
    }
    assert [each.likeness for each in found] == sorted((each.likeness for each in found), reverse=True)
    assert all(0.2 <= each.likeness < 1 for each in found)
    assert examples.find("The old dog sleeps under the chair.", "en", "ko", 3, 0.99) == []
    assert len(examples.find("The old dog sleeps under the chair.", "en", "ko", 1, 0.2)) == 1


def test_from_either_side() -> None:
    examples = made(*PAIRS)
    (there,) = examples.find("Please close the door.", "en", "ko", 1, 0.4)
    (back,) = examples.find("문을 조용히 닫아라.", "ko", "en", 1, 0.4)
    assert (there.source, there.target) == (back.target, back.source) == PAIRS[5]
    assert examples.find("Please close the door.", "en", "de", 1, 0.1) == []
    assert examples.knows("ko", "en")
    assert not examples.knows("en", "de")
    assert len(examples) == len(PAIRS)


def test_words_in_korean_need_not_have_the_same_endings() -> None:
    examples = made(*PAIRS)
    assert sources(examples.find("눈이 산을 덮었어요", "ko", "en", 1, 0.3)) == ["어젯밤 눈이 산을 덮었다."]


def test_translations_of_the_very_text_stand_alone() -> None:
    examples = made(
        ("Go home.", "집에 가."),
        ("Go home.", "집에 가세요."),
        ("go home", "홈으로"),
        ("Go home now.", "당장 집에 가."),
    )
    assert {each.target for each in examples.find("Go home.", "en", "ko", 6, 0.1)} == {
        "집에 가.",
        "집에 가세요.",
    }
    assert [each.target for each in examples.find(" go home ", "en", "ko", 6, 0.1)] == ["홈으로"]
    # By its words alone, where nobody wrote it so; what is written most alike is preferred.
    assert {each.target for each in examples.find("Go home!", "en", "ko", 6, 0.1)} == {
        "집에 가.",
        "집에 가세요.",
    }


def test_how_it_is_written_counts() -> None:
    examples = made(("i miss u", "보고 싶어"), ("I miss you.", "보고 싶어."), ("a bad habit", "나쁜 습관"))
    assert sources(examples.find("보고 싶어!", "ko", "en", 6, 0.1)) == ["보고 싶어."]
    (habit,) = examples.find("It is a bad habit.", "en", "ko", 6, 0.1)
    (same_kind,) = examples.find("It is a bad habit", "en", "ko", 6, 0.1)
    assert habit.likeness < same_kind.likeness


def by_all(text: str, pairs: list[tuple[str, str]]) -> dict[str, float]:
    """The likeness of every text, by the words and pairs of words that it shares."""

    def features(text: str) -> set[str]:
        words = text.split()
        return {*words, *(f"{a} {b}" for a, b in pairwise(words))}

    counts = Counter(feature for source, _ in pairs for feature in features(source))

    def weight(found: set[str]) -> float:
        return sum(math.log1p(len(pairs) / max(counts[feature], 1)) for feature in found)

    own = features(text)
    return {
        source: 2 * weight(own & features(source)) / (weight(own) + weight(features(source)))
        for source, _ in pairs
    }


@pytest.mark.parametrize("seed", range(5))
def test_all_that_are_like_enough_are_found(seed: int) -> None:
    """Though frequent words are looked up last."""
    rng = random.Random(seed)
    words = ["a", "the", "the", "the", "is", "is", *("w" + chr(97 + n) for n in range(25))]
    texts = {" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(400)}
    pairs = [(text, f"번역 {n}") for n, text in enumerate(sorted(texts))]
    examples = made(*pairs)
    for _ in range(50):
        text = " ".join(rng.choices(words, k=rng.randint(1, 6)))
        found = {e.source: e.likeness for e in examples.find(text, "en", "ko", len(pairs), 0.4)}
        likeness = by_all(text, pairs)
        wanted = {source: like for source, like in likeness.items() if like >= 0.401}
        if text in texts:
            assert found.keys() == {text}
        else:
            assert wanted.keys() <= found.keys()
            assert found == pytest.approx({source: likeness[source] for source in found}, abs=1e-4)


def test_a_question_is_no_statement() -> None:
    examples = made(("Did you take your medicine?", "약 드셨어요?"), ("I cleaned my room.", "방 치웠어."))
    (asked,) = examples.find("약 드셨어요.", "ko", "en", 6, 0.1)
    assert asked.likeness < 0.8
    (asked,) = examples.find("약 드셨어요? ", "ko", "en", 6, 0.1)
    assert asked.likeness > 0.999


def test_signs_of_words_are_part_of_them() -> None:
    examples = made(("C++ is old", "C++는 오래되었다"), ("C is old", "C는 오래되었다"))
    assert sources(examples.find("C is old!", "en", "ko", 6, 0.1)) == ["C is old"]


def test_the_last_place_that_knows_a_text_says_how_it_is_translated() -> None:
    ours = [("Close", word) for word in ("닫기", "가까운", "가깝다", "폐쇄")]
    mine = [("마감", "Close"), ("열기", "Open")]
    examples = Examples.build({EN_KO: ours}, {("ko", "en"): mine})
    assert [each.target for each in examples.find("Close", "en", "ko", 6, 0.1)] == ["마감"]
    assert [each.target for each in examples.find("열기", "ko", "en", 6, 0.1)] == ["Open"]
    assert {each.target for each in Examples.build({EN_KO: ours}).find("close", "en", "ko", 6, 0.1)} == {
        word for _, word in ours
    }


def test_among_many_that_are_alike_the_text_itself_is_found() -> None:
    examples = made(*((f"Invoice {n} is due.", f"청구서 {n}의 기한입니다.") for n in range(1000, 3000)))
    assert sources(examples.find("Invoice 2999 is due.", "en", "ko", 6, 0.5)) == ["Invoice 2999 is due."]
    assert len(examples.find("Invoice 7 is due.", "en", "ko", 6, 0.5)) == 6


def test_numbers_are_all_alike() -> None:
    examples = made(("Buy 3 apples.", "사과 3개를 사라."), ("Buy 12 apples.", "사과 12개를 사라."))
    found = examples.find("Buy 7 apples.", "en", "ko", 6, 0.9)
    assert {each.source for each in found} == {"Buy 3 apples.", "Buy 12 apples."}
    assert sources(examples.find("Buy 12 apples.", "en", "ko", 6, 0.9)) == ["Buy 12 apples."]


@pytest.mark.parametrize("text", ["", " ", "...", "🙂", "zzz", "x" * (MAX_CHARS + 1), "a\nb\0c", "\ud800"])
def test_nothing_is_like_some_texts(text: str) -> None:
    assert made(*PAIRS).find(text, "en", "ko", 6, 0.5) == []
    assert made().find(text, "en", "ko", 6, 0.5) == []


def test_what_is_left_out() -> None:
    assert len(made(("a", "가"), ("a", "가"), ("", "나"), ("b", ""), ("x" * (MAX_CHARS + 1), "다"))) == 1


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    data = text.encode()
    path.write_bytes(lzma.compress(data) if name.endswith(".xz") else data)
    return path


def test_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own, cache = tmp_path / "own", tmp_path / "cache"
    own.mkdir()
    write(own, "a.en-ko.tsv", "\ufeffGo home.\t집에 가.\r\n\nmine\tGood night.\t잘 자.\n")
    write(own, "b.de-ko.tsv.xz", "Gute Nacht.\t잘 자.\n")
    write(own, "notes.tsv", "no\tlanguages\tin\tits\tname\n")
    examples = load_examples([own], cache)
    assert sorted(examples.languages) == [("de", "ko"), ("en", "ko")]
    assert examples.find("Good night.", "en", "ko", 1, 0.5) == [GOOD_NIGHT]
    assert [each.target for each in examples.find("잘 자.", "ko", "de", 1, 0.5)] == ["Gute Nacht."]
    (kept,) = cache.iterdir()
    # Kept, and read as it was written.
    again = load_examples([own], cache)
    assert sources(again.find("Go home.", "en", "ko", 1, 0.5)) == ["Go home."]
    assert sorted(again.languages) == sorted(examples.languages)
    assert list(cache.iterdir()) == [kept]
    # Other examples have an index of their own; a broken one is made anew.
    write(own, "a.en-ko.tsv", "Go home.\t집에 가라.\n")
    assert [e.target for e in load_examples([own], cache).find("Go home.", "en", "ko", 1, 0.5)] == [
        "집에 가라."
    ]
    for path in cache.iterdir():
        path.write_bytes(b"nothing")
    assert len(load_examples([own], cache)) == 2
    # No more than a few are kept.
    for n in range(5):
        write(own, "a.en-ko.tsv", f"Go home.\t집에 {n}.\n")
        assert len(load_examples([own], cache)) == 2
    assert len(list(cache.iterdir())) == 3
    # Where nothing can be kept it does without.
    assert len(load_examples([own], None)) == 2
    blocked = write(tmp_path, "file", "")
    assert len(load_examples([own], blocked / "cache")) == 2
    assert "not kept" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.en-ko.tsv", b"one column\n", r"a\.en-ko\.tsv:1: 1 columns, not 2"),
        ("a.en-ko.tsv", b"a\tb\n\tc\td\te\n", r"a\.en-ko\.tsv:2: 4 columns"),
        ("a.en-ko.tsv", b"a\tb\t\n", r"a\.en-ko\.tsv:1: a text is empty"),
        ("a.en-ko.tsv", b"\xff\tb\n", r"a\.en-ko\.tsv: .*utf-8"),
        ("a.en-ko.tsv.xz", b"a\tb\n", r"a\.en-ko\.tsv\.xz: .*format"),
        ("pairs.tsv", b"a\tb\n", r"pairs\.tsv: a file of examples is called NAME\.en-ko\.tsv"),
        (None, b"", r"missing\.en-ko\.tsv: no such file"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str | None, content: bytes, message: str) -> None:
    path = tmp_path / (name or "missing.en-ko.tsv")
    if name:
        path.write_bytes(content)
    with pytest.raises(ExamplesError, match=message):
        load_examples([path], tmp_path / "cache")


def test_files_of_a_folder_are_those_of_the_right_form(tmp_path: Path) -> None:
    for name in ("b.en-ko.tsv", "a.ko-en.tsv.xz", "c.tsv", "d.en-ko.txt", "e.en-ko.tsv.bak"):
        (tmp_path / name).touch()
    assert [path.name for (own,) in [find_files([tmp_path])] for path in own] == [
        "a.ko-en.tsv.xz",
        "b.en-ko.tsv",
    ]


def test_a_folder_without_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExamplesError, match="holds no file of examples"):
        load_examples([tmp_path], None)


def test_a_full_disk_does_not_end_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of which safetensors speaks in an error of its own."""

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("model.examples.save_file", full)
    write(tmp_path, "a.eng-kor.tsv", "Go home.\t집에 가.\n")
    examples = load_examples([tmp_path], tmp_path / "cache")
    assert sources(examples.find("Go home.", "en", "ko", 1, 0.5)) == ["Go home."]
    assert "No space left" in caplog.text


@pytest.mark.parametrize(
    ("name", "line", "told"),
    [
        ("a.en-ko.tsv", "Go home.\t집에 가.\n", False),
        ("a.ko-en.tsv", "집에 가.\tGo home.\n", False),
        ("a.en-de.tsv", "집에 가.\tGo home.\n", False),
        ("a.en-ko.tsv", "집에 가.\tGo home.\n", True),
        ("a.en-ko.tsv", "Go home.\t집에 가.\tseen by Kim\n", True),
        ("a.ko-en.tsv", "Go home.\tGeh heim.\n", True),
    ],
)
def test_lines_in_other_languages_than_the_name_says_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, line: str, told: bool
) -> None:
    (tmp_path / name).write_text(line, encoding="utf-8")
    load_examples([tmp_path / name], None)
    assert ("1 of 1 lines do not look like" in caplog.text) is told
