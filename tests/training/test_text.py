"""Packs, what is kept of them, what is held out, and shards."""

import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from model.tokenizer import Tokenizer
from model.training.packs import (
    TEXTS,
    PackError,
    Pair,
    clean_pair,
    clean_paragraph,
    figures,
    find_pack,
    pairs_and_ends,
    read_documents,
    read_pairs,
    read_stories,
    reading_grade,
    split_sentences,
)
from model.training.prepare import noisy_english, noisy_korean, pair_documents, passages, single_sentences
from model.training.shards import Document, Shard, held_out, write_shard


def write_pack(path: Path, text: str) -> Path:
    if path.suffix == ".xz":
        path.write_bytes(lzma.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["pairs.tsv", "pairs.tsv.xz"])
def test_pairs(tmp_path: Path, name: str) -> None:
    path = write_pack(tmp_path / name, "written\tI go.\u2028On.\t나는 간다.\nwiki\ta\t가\n")
    assert list(read_pairs(path)) == [
        Pair("written", "I go.\u2028On.", "나는 간다."),
        Pair("wiki", "a", "가"),
    ]


def test_files_of_windows(tmp_path: Path) -> None:
    """Their line ends and the mark at their beginning are no text."""
    path = tmp_path / "pairs.tsv"
    path.write_bytes("\ufeffmine\ta\t가\r\n\r\nmine\tb\t나\r\n".encode())
    assert list(pairs_and_ends(path)) == [Pair("mine", "a", "가"), None, Pair("mine", "b", "나")]


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = write_pack(tmp_path / "pairs.tsv", "written\ta\t가\nwritten\tonly two\n")
    with pytest.raises(PackError, match=r"pairs\.tsv:2: 2 columns, not 3"):
        list(read_pairs(path))


STORIES = (
    "tale\tI slept.\t나는 잤다.\ntale\tI woke.\t나는 깼다.\n\n\n"
    "tale\tA cat sat.\t고양이가 앉았다.\ntale\tIt ran.\t뛰었다.\n\ntale\tAlone.\t혼자.\n"
)


def test_stories_are_documents_of_pairs(tmp_path: Path) -> None:
    path = write_pack(tmp_path / "stories.en-ko.tsv.xz", STORIES)
    slept, woke, sat, ran, alone = list(read_pairs(path))
    assert list(read_stories(path)) == [[slept, woke], [sat, ran], [alone]]


def test_a_story_is_a_passage_in_each_language(tmp_path: Path) -> None:
    path = write_pack(tmp_path / "stories.en-ko.tsv", STORIES)
    mono = write_pack(tmp_path / "mono.en.txt", "Long ago there was a very old house on the hill.\n")
    trained, held = (list(passages([path, mono], held=held)) for held in (False, True))
    assert ("stories.en", ["I slept.", " I woke."]) in trained
    assert ("stories.ko", ["고양이가 앉았다.", " 뛰었다."]) in trained
    assert not held
    assert len([label for label, _ in trained if label.startswith("stories")]) == 4  # a single pair is none
    everything = write_pack(
        tmp_path / "many.tsv", "\n".join(f"tale\tStory {i}.\t{i}번.\ntale\tOn.\t또.\n" for i in range(300))
    )
    told = [{units[0] for _, units in passages([everything], held=h)} for h in (False, True)]
    assert told[1]
    assert not told[0] & told[1]
    assert sum(map(len, told)) == 600


def test_packs_that_come_with_the_code_are_found(tmp_path: Path) -> None:
    assert find_pack(tmp_path, "copying.tsv") == TEXTS / "copying.tsv"
    assert find_pack(tmp_path, "other.tsv") == tmp_path / "other.tsv"
    (tmp_path / "other.tsv.xz").touch()
    assert find_pack(tmp_path, "other.tsv") == tmp_path / "other.tsv.xz"
    (tmp_path / "other.tsv").touch()
    assert find_pack(tmp_path, "other.tsv") == tmp_path / "other.tsv"
    own = write_pack(tmp_path / "copying.tsv", "")
    assert find_pack(tmp_path, "copying.tsv") == own  # the folder of the data comes first


def test_documents(tmp_path: Path) -> None:
    path = write_pack(tmp_path / "mono.txt.xz", "\n\none\ntwo\n\n\n three \n")
    assert list(read_documents(path)) == [["one", "two"], ["three"]]


@pytest.mark.parametrize(
    ("paragraph", "sentences"),
    [
        ("He left. She stayed! Why?", ["He left.", "She stayed!", "Why?"]),
        ('"Go." He went.', ['"Go."', "He went."]),
        ("나는 간다. 너는 온다.", ["나는 간다.", "너는 온다."]),
        ("Pi is 3.14 today. Yes.", ["Pi is 3.14 today.", "Yes."]),
        ("no end", ["no end"]),
        ("", []),
    ],
)
def test_sentences(paragraph: str, sentences: list[str]) -> None:
    assert split_sentences(paragraph) == sentences


@pytest.mark.parametrize(
    ("en", "ko", "clean"),
    [
        ("I go home.", "나는 집에 간다.", True),
        ("", "나는 집에 간다.", False),
        ("I go home.", "I go home.", False),
        ("나는 집에 간다.", "나는 집에 간다.", False),
        ("Yes.", "나는 집에 가고 싶지만 아직 할 일이 남아 있어서 갈 수가 없다고 말했다.", False),
        ("x" * 401, "가" * 200, False),
        ("123", "백이십삼", False),
    ],
)
def test_clean_pairs(en: str, ko: str, clean: bool) -> None:
    assert clean_pair(Pair("written", en, ko)) == clean


def test_clean_paragraphs() -> None:
    assert clean_paragraph("This is a paragraph of ordinary prose, as one finds it in books.")
    assert not clean_paragraph("Too short.")
    assert not clean_paragraph("The speed of light (, ) is the same for all who measure it.")
    assert not clean_paragraph("그 마을의 이름은 두 강(兩江, 二水)이 만나는 곳(合流地)이라는 뜻에서 왔다.")
    assert clean_paragraph("그 마을의 이름은 두 강이 만나는 곳이라는 뜻에서 왔다고 지금도 전해진다.")
    assert not clean_paragraph("| a | b | c | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10 | 11 |.")


def test_held_out_is_stable() -> None:
    """By the text alone: these answers may never change, or training text leaks into old scores."""
    texts = [f"sentence number {i}" for i in range(4000)]
    held = [i for i, text in enumerate(texts) if held_out(text)]
    assert held[:4] == [4, 55, 98, 137]
    assert 40 < len(held) < 130
    assert all(held_out(texts[i].upper() + " !") for i in held)  # case, space and marks do not matter
    assert set(held) <= {i for i, text in enumerate(texts) if held_out(text, 0.1)}
    assert not held_out("any", 0.0)
    assert held_out("any", 1.0)


@pytest.fixture
def pairs_pack(tmp_path: Path) -> Path:
    lines = [f"written-daily\tI have {i} apples.\t나는 사과가 {i}개 있다.\n" for i in range(400)]
    lines += [f"msdocs\tI have {i} apples.\t사과 {i}개가 있습니다.\n" for i in range(400)]
    return write_pack(tmp_path / "pairs.tsv", "".join([*lines, lines[0]]))


def test_held_out_pairs_never_train(pairs_pack: Path) -> None:
    held, train = (list(pair_documents([pairs_pack], held=h)) for h in (True, False))
    assert held
    assert {label for label, _ in held} == {"written-daily"}
    unseen = {units[0] for _, units in held}
    assert all(held_out(text) for text in unseen)
    assert not unseen & {units[0] for _, units in train}  # from no other source either
    assert len(train) == 2 * (400 - len(held))
    by_label = {label: len(units) for label, units in train}
    assert by_label == {"written-daily": 4, "msdocs": 2}


def test_single_sentences(pairs_pack: Path) -> None:
    found = list(single_sentences([pairs_pack], held=False, shares={"written": 1.0}))
    assert {label for label, _ in found} == {"sentences.en", "sentences.ko"}
    assert all(len(units) == 1 for _, units in found)
    assert not any(held_out(units[0]) for label, units in found if label == "sentences.en")


def test_a_sample_of_the_sentences_of_a_source(pairs_pack: Path) -> None:
    def count(**shares: float) -> int:
        return len(list(single_sentences([pairs_pack], held=False, shares=shares)))

    assert 0 < count(written=0.5) < count(written=1.0)
    assert count(written=0.0) == count() == 0
    assert count(written=0.5, msdocs=1.0) == count(written=0.5) + count(msdocs=1.0)


def test_noise() -> None:
    typed = [noisy_english(f"I go Home with {n} bags.") for n in range(40)]
    assert all(text == text.lower() or text == text.upper() for text in typed)
    assert 0 < sum(text == text.upper() for text in typed) < 20
    assert not any(text.endswith(".") for text in typed)
    assert noisy_korean("나는 집에 간다.") in ("나는 집에 간다", "나는집에간다")
    assert noisy_korean("나는 집에 간다.") == noisy_korean("나는 집에 간다.")


def test_easy_text_is_what_schools_call_easy() -> None:
    easy = ["The dog ran to the old tree. It sat down and it looked up."]
    hard = ["Constitutional interpretation necessarily presupposes methodological commitments."]
    # 46 letters in 14 words and 2 sentences: 4.71 * 46 / 14 + 0.5 * 14 / 2 - 21.43
    letters = sum(c.isalpha() for c in easy[0])
    assert reading_grade(easy) == pytest.approx(4.71 * letters / 14 + 3.5 - 21.43)
    assert reading_grade(easy) < 3 < 12 < reading_grade(hard)
    assert figures("It was so: “no”, he said!") == 0.0
    assert figures("(1902)") == 1.0


def test_training_may_keep_to_easy_documents_and_what_is_held_out_may_not(tmp_path: Path) -> None:
    easy = "The dog of farm {} ran to the old tree. Then it sat down and it looked up at the cat."
    hard = "Constitutional interpretation {} necessarily presupposes methodological commitments."
    dated = "The old man {} came home (1902–1903) and then he sat down at (9:30)."
    texts = [text.format(word) for text in (easy, hard, dated) for word in map(str, range(300))]
    path = write_pack(tmp_path / "mono.en.txt", "\n\n".join(texts))
    kept = list(passages([path], held=False, max_grade=6, max_figures=0.05))
    assert kept
    assert all(units[0].startswith("The dog") for _, units in kept)
    held = [units[0] for _, units in passages([path], held=True, max_grade=6, max_figures=0.05)]
    assert held == [units[0] for _, units in passages([path], held=True)]
    assert any(not first.startswith("The dog") for first in held)


def test_passages_keep_the_white_space_before_each_sentence(tmp_path: Path) -> None:
    one = "The first sentence is here to be long enough. The second one follows it closely."
    two = "Another paragraph begins with this sentence, which is also long enough."
    path = write_pack(tmp_path / "mono.en.txt", f"{one}\n{two}\n\n" * 1)
    found = [doc for held in (True, False) for doc in passages([path], held=held)]
    (document,) = found
    label, units = document
    assert label == "mono.en"
    assert "".join(units) == f"{one}\n{two}"
    assert [unit[0] for unit in units[1:]] == [" ", "\n"]


def test_a_shard_holds_what_was_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = [("a", ["I go home.", "나는 집에 간다."]), ("b", [""]), ("a", ["x" * i for i in range(1, 9)])]
    write_shard(tmp_path / "shard", tokenizer, documents)
    shard = Shard(tmp_path / "shard")
    assert len(shard) == 3
    assert [shard.label_names[i] for i in shard.labels] == ["a", "b", "a"]
    for i, (_, texts) in enumerate(documents):
        assert [unit.tolist() for unit in shard.document(i)] == [tokenizer.encode(text) for text in texts]
    assert isinstance(shard.tokens, np.memmap)
    assert shard.tokens.itemsize == 2


def test_a_damaged_shard_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_shard(tmp_path / "shard", tokenizer, [("a", ["I go home."])])
    with (tmp_path / "shard/tokens.bin").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(ValueError, match=r"shard: tokens\.bin and its offsets do not fit"):
        Shard(tmp_path / "shard")


def test_a_shard_half_written_is_none(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_shard(tmp_path / "shard", tokenizer, [("a", ["I go home."])])

    def breaks() -> Iterator[Document]:
        yield "a", ["one"]
        raise RuntimeError("in the midst")

    with pytest.raises(RuntimeError, match="in the midst"):
        write_shard(tmp_path / "shard", tokenizer, breaks())
    assert not (tmp_path / "shard/meta.json").exists()
