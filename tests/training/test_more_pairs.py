"""Pairs out of text by a translator, pairs that one finds absurd, and what a translator must copy."""

import argparse
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch

from model import checkpoint
from model.models import Translator
from model.tokenizer import Tokenizer
from model.training.__main__ import main
from model.training.back_translate import Output, sentences, sound_pairs, surest
from model.training.evaluate import OWN_PACKS, add_evaluate_arguments, evaluate_command
from model.training.failures import (
    EVERYDAY,
    Copying,
    copying_rows,
    everyday_rows,
    failure_rows,
    held_sentences,
    read_copying,
)
from model.training.packs import TEXTS, PackError, Pair, clean_pair, read_pairs, read_stories
from model.training.score_pairs import pair_scores
from model.training.scores import Translation
from model.training.shards import held_out, write_shard
from model.training.translate import TranslateTask
from tests.tiny import PAIRS, TinyFolders


def pack_of_documents(path: Path, count: int = 30) -> Path:
    paragraphs = [
        f"Story {i} begins on a cold morning. The old dog sleeps under the table." for i in range(count)
    ]
    path.write_bytes(lzma.compress("\n\n".join(paragraphs).encode()))
    return path


# --- back-translation -------------------------------------------------------------------------


def test_only_sound_pairs_stay() -> None:
    def made(text: str, *, ended: bool = True, cut: bool = False) -> list[Pair]:
        found = sound_pairs(["The dog sleeps."], [Translation(text, ended, cut)], "en")
        return [pair for pair, _ in found]

    assert made("개가  잔다.") == [Pair("back-en", "The dog sleeps.", "개가 잔다.")]
    assert not made("")
    assert not made("The dog sleeps.")
    assert not made("개가 잔다.", ended=False)
    assert not made("개가 잔다.", cut=True)
    assert not made("개가 개가 개가 개가 잔다.")
    assert list(sound_pairs(["개가 잔다."], [Translation("A dog.", True, False, -0.5)], "ko")) == [
        (Pair("back-ko", "A dog.", "개가 잔다."), -0.5)
    ]


def test_the_surest_pairs_stay_in_their_order() -> None:
    scored = [
        (Pair("back-ko", f"{n} dogs", f"개 {n}마리"), score) for n, score in enumerate((-3.0, -1, -2, -0.5))
    ]
    assert [pair.en for pair in surest(scored, 0.5)] == ["1 dogs", "3 dogs"]
    assert surest(scored, 1.0) == [pair for pair, _ in scored]
    assert surest([], 0.5) == []


def test_what_is_held_out_is_not_read(tmp_path: Path) -> None:
    pack = pack_of_documents(tmp_path / "mono.en.txt.xz", 200)
    read = set(sentences(pack, 1.0, 10, 200))
    texts = [f"Story {i} begins on a cold morning. The old dog sleeps under the table." for i in range(200)]
    held = {i for i, text in enumerate(texts) if held_out(text)}
    assert held
    assert read == {f"Story {i} begins on a cold morning." for i in range(200) if i not in held} | {
        "The old dog sleeps under the table."
    }
    assert not set(sentences(pack, 1.0, 10, 20))


def test_a_killed_run_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "back.tsv"
    first, second = Pair("back-en", "One.", "하나."), Pair("back-en", "Two.", "둘.")
    Output(path).add([first], 3)
    with path.open("ab") as file:
        file.write(b"back-en\tHalf a li")  # written, not saved
    output = Output(path)
    assert (output.read, output.kept) == (3, 1)
    output.add([second], 2)
    assert list(read_pairs(path)) == [first, second]
    assert json.loads(output.progress.read_text())["read"] == 5
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="shorter than"):
        Output(path)
    output.progress.unlink()
    with pytest.raises(ValueError, match="nothing overwritten"):
        Output(path)


def test_the_command_in_two_parts_equals_one(
    tiny_folders: TinyFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = pack_of_documents(tmp_path / "mono.en.txt.xz")

    def run(name: str, limit: int) -> Path:
        arguments = ["--model", tiny_folders.translate, "--text", pack, "--out", tmp_path / name]
        more = ["--language", "en", "--limit", limit, "--chunk", 4, "--max-new-tokens", 6]
        assert main(["back-translate", *map(str, [*arguments, *more])]) == 0
        return tmp_path / name

    run("parts.tsv", 6)
    assert run("parts.tsv", 12).read_bytes() == run("whole.tsv", 12).read_bytes()
    assert "of 12 sentences" in capsys.readouterr().out
    bad = ["--model", tiny_folders.generate, "--text", pack, "--out", tmp_path / "x.tsv", "--language", "en"]
    assert main(["back-translate", *map(str, bad)]) == 1
    assert "not a translator" in capsys.readouterr().out


def test_machine_words_and_mixtures_are_no_target(tokenizer: Tokenizer, tmp_path: Path) -> None:
    labels = ("back-ko", "back-en", "written-daily", "mixed-ko", "mixed-en")
    shard = write_shard(tmp_path, tokenizer, [(label, list(PAIRS[i])) for i, label in enumerate(labels)])
    task = TranslateTask(shard, tokenizer, weights={"": 1.0}, budget=400)
    examples = sorted(np.concatenate(task.batches(0)).tolist())
    assert examples == [0, 5, 8, 9, 12, 17]  # to Korean; to English; both; and again one each
    source = task.collate(np.array([0]), np.random.default_rng(0))["src"][0, 0]
    assert source == tokenizer.tags["back"]


# --- absurd pairs -----------------------------------------------------------------------------


def test_scores_are_the_dual_cross_entropy(tiny_folders: TinyFolders, tokenizer: Tokenizer) -> None:
    model = checkpoint.load(tiny_folders.translate).model
    assert isinstance(model, Translator)
    pairs = [Pair("written-daily", en, ko) for en, ko in PAIRS[:5]]
    scores = pair_scores(model, tokenizer, [*pairs, Pair("written-daily", "", "빈")], max_rows=3)
    assert scores[5] == float("inf")

    def cost(pair: Pair, language: str) -> float:
        source, target = (pair.en, pair.ko) if language == "ko" else (pair.ko, pair.en)
        src = torch.tensor([tokenizer.source_ids(tokenizer.encode(source), language)])
        ids = tokenizer.encode(target)
        logits = model(src, torch.tensor([[tokenizer.languages[language], *ids]]))[0]
        wanted = torch.tensor([*ids, tokenizer.eos_id])
        return float(torch.nn.functional.cross_entropy(logits, wanted))

    for pair, score in zip(pairs, scores, strict=False):
        a, b = cost(pair, "ko"), cost(pair, "en")
        assert score == pytest.approx((a + b) / 2 + abs(a - b), rel=1e-4)


def test_pairs_over_the_limit_go(
    tiny_folders: TinyFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoint.load(tiny_folders.translate)
    pairs = [Pair("a", en, ko) for en, ko in PAIRS[:6]] + [Pair("b", "", "빈")]
    assert isinstance(model.model, Translator)
    scores = pair_scores(model.model, model.tokenizer, pairs)
    limit = sorted(scores)[3]
    (tmp_path / "in.tsv").write_text("".join("\t".join(p) + "\n" for p in pairs), encoding="utf-8")
    arguments = [
        "--model",
        tiny_folders.translate,
        "--pairs",
        tmp_path / "in.tsv",
        "--max-score",
        limit + 1e-6,
    ]
    assert (
        main(["score-pairs", *map(str, [*arguments, "--out", tmp_path / "out.tsv.xz", "--show", "1"])]) == 0
    )
    kept = [pair for pair, score in zip(pairs, scores, strict=True) if score <= limit + 1e-6]
    assert len(kept) == 4
    assert list(read_pairs(tmp_path / "out.tsv.xz")) == kept
    assert "| b      |     1 |    0 |  0.0 |" in capsys.readouterr().out


def test_documents_stay_documents(tiny_folders: TinyFolders, tmp_path: Path) -> None:
    stories = [["a\tOne.\t하나.", "a\tTwo.\t둘."], ["b\tThree.\t셋."], ["c\tFour.\t넷.", "c\tFive.\t다섯."]]
    (tmp_path / "in.tsv").write_text(
        "\n\n\n".join("\n".join(each) for each in stories) + "\n", encoding="utf-8"
    )
    arguments = [
        "--model",
        tiny_folders.translate,
        "--pairs",
        tmp_path / "in.tsv",
        "--out",
        tmp_path / "out.tsv",
    ]
    assert main(["score-pairs", *map(str, arguments), "--max-score", "1e9", "--chunk", "2"]) == 0
    assert list(read_stories(tmp_path / "out.tsv")) == [
        [Pair(*line.split("\t")) for line in story] for story in stories
    ]


# --- copying, and plain failures ----------------------------------------------------------------


def test_the_packs_beside_the_code() -> None:
    everyday = [line.split("\t") for line in EVERYDAY.read_text(encoding="utf-8").splitlines()]
    assert [language for language, _ in everyday] == ["en"] * 50 + ["ko"] * 50
    read = {_bare(text) for _, text in everyday}
    assert len(read) == 100
    packs = {path.name: list(read_pairs(path)) for path in TEXTS.glob("*.tsv.xz")}
    assert set(OWN_PACKS) < set(packs)
    more = [pair for name in OWN_PACKS[:2] for pair in packs[name]]
    stories = [name for name in packs if name.startswith("tales")]
    assert {pair.source for name in stories for pair in packs[name]} == {"written-tales"}
    for pair in (pair for pairs in packs.values() for pair in pairs):
        assert clean_pair(pair)
        assert pair.source.startswith(("written-", "mixed-", "wikipedia-"))
        assert not {_bare(pair.en), _bare(pair.ko)} & read
    assert len({(pair.en, pair.ko) for pair in more}) == len(more) > 120_000
    assert all(len(story) > 3 for name in stories for story in read_stories(TEXTS / name))


def _bare(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


def test_everyday_sentences_are_shown_with_their_translations() -> None:
    rows = everyday_rows(lambda texts, language: [Translation(f"{language} {t}", True, False) for t in texts])
    assert rows[0] == {"everyday": "I am going home by bus.", "translation": "ko I am going home by bus."}
    assert rows[-1]["translation"].startswith("en 산 위에")
    assert len(rows) == 100


def test_our_sentences_for_copying() -> None:
    found = read_copying()
    assert 60 <= len(found) <= 100
    assert {(s.kind, s.language) for s in found} == {
        (kind, language) for kind in ("name", "number", "address", "code") for language in ("en", "ko")
    }


def test_a_stretch_that_is_not_in_its_sentence(tmp_path: Path) -> None:
    path = tmp_path / "copying.tsv"
    path.write_text("name\ten\tI know Ilke.\tIlka\n", encoding="utf-8")
    with pytest.raises(PackError, match=r"copying\.tsv:1"):
        read_copying(path)


def test_copied_exactly_or_not() -> None:
    sentences = [
        Copying("number", "en", "From 12 to 13.", ("12", "13")),
        Copying("name", "en", "Ilke.", ("Ilke",)),
        Copying("number", "ko", "7개", ("7",)),
    ]
    rows = copying_rows(
        lambda texts, _: [Translation(t.replace("3", "8"), True, False) for t in texts], sentences
    )
    assert [row["number copied"] for row in rows] == ["50.0 of 2", "100.0 of 1"]
    assert [row["name copied"] for row in rows] == ["100.0 of 1", "- of 0"]
    assert [row["all"] for row in rows] == ["66.7 of 3", "100.0 of 1"]


def test_failures_over_held_out_sentences_of_every_source(tmp_path: Path) -> None:
    lines = [f"many\tI have {i} apples.\t나는 사과가 {i}개 있다.\n" for i in range(1500)]
    lines += [f"few\tWe saw {i} birds.\t우리는 새 {i}마리를 보았다.\n" for i in range(300)]
    pack = tmp_path / "x.en-ko.tsv"
    pack.write_text("".join(lines), encoding="utf-8")
    found = held_sentences([pack], 12)
    assert len(found) == 12
    assert all(held_out(en) for en, _ in found)
    assert sum("birds" in en for en, _ in found) >= 3
    rows = failure_rows(lambda texts, _: [Translation("", True, False) for _ in texts], [pack], 12)
    assert [(row["n"], row["empty"], row["direction"]) for row in rows] == [
        ("6", "6", "en-ko"),
        ("6", "6", "ko-en"),
    ]


def test_evaluate_counts_both(
    tiny_folders: TinyFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix, side in (("eng", 0), ("kor", 1)):
        (tmp_path / f"dev.{suffix}").write_text(PAIRS[0][side] + "\n", encoding="utf-8")
    parser = argparse.ArgumentParser()
    add_evaluate_arguments(parser)
    command = ["--model", tiny_folders.translate, "--pairs", tmp_path / "dev.eng", tmp_path / "dev.kor"]
    options = parser.parse_args([*map(str, command), "--copying", "--beams", "1", "--max-new-tokens", "4"])
    assert evaluate_command(options) == 0
    assert "address copied" in capsys.readouterr().out
    options.failures = 5
    assert evaluate_command(options) == 1
    assert "--failures needs --data" in capsys.readouterr().out
