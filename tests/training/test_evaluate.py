"""What `evaluate` measures, by hand on models whose answers are known, and what it writes."""

import argparse
import lzma
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.decoding import Decoded
from model.examples import Examples
from model.models import CausalLM, MaskedLM, Translator, build_model
from model.round_trip import return_logprobs
from model.sampling import BeamParams
from model.tokenizer import Tokenizer
from model.training.evaluate import (
    START,
    STOP,
    _examples,
    add_evaluate_arguments,
    corpora,
    evaluate_command,
    read_parallel,
    sample,
    write_card,
)
from model.training.scores import (
    Corpus,
    Translation,
    bleu_tokenizer,
    has_loop,
    look_back,
    markdown_table,
    score_causal,
    score_corpus,
    score_masked,
    translate_all,
    wrong_script,
)
from model.training.shards import held_out
from tests.tiny import PAIRS, TinyFolders, fitting_config

EN, KO = [en for en, _ in PAIRS], [ko for _, ko in PAIRS]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small folder in the layout of the packs, with something held out; beside it one of our own."""
    monkeypatch.setattr("model.training.evaluate.OWN_PACKS", ("phrases.en-ko.tsv.xz",))
    folder = tmp_path / "data"
    (folder / "dev").mkdir(parents=True)
    lines = [f"written-daily\tI have {i} apples.\t나는 사과가 {i}개 있다.\n" for i in range(200)]
    (folder / "written.en-ko.tsv.xz").write_bytes(lzma.compress("".join(lines).encode()))
    for side, suffix in enumerate(("eng", "kor")):
        (folder / f"dev/small.{suffix}").write_text(
            "".join(f"{pair[side]}\n" for pair in PAIRS), encoding="utf-8"
        )
    paragraph = "This is sentence one of a long paragraph. Here is its second sentence."
    documents = "\n\n".join(f"Document {i}. {paragraph}" for i in range(200))
    (folder / "mono.en.txt.xz").write_bytes(lzma.compress(documents.encode()))
    return folder


def parse(*arguments: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_evaluate_arguments(parser)
    return parser.parse_args([str(a) for a in arguments])


@pytest.mark.parametrize(
    ("text", "reference", "language", "wrong"),
    [
        ("I go home.", "나는 집에 간다.", "ko", True),
        ("나는 집에 간다.", "나는 집에 간다.", "ko", False),
        ("NASA", "NASA", "ko", False),
        ("123", "백이십삼", "ko", False),
        ("I go 집.", "I go home.", "en", True),
        ("김치 is kimchi.", "김치 is kimchi.", "en", False),
    ],
)
def test_wrong_script(text: str, reference: str, language: str, wrong: bool) -> None:
    assert wrong_script(text, reference, language) == wrong


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("the law, the law, the law, the law, and", True),
        ("생물학학학학학학학학학", True),
        ("lylylylyly", True),
        ("Hmm... no, no, no!", False),
        ("I go home.", False),
        ("", False),
    ],
)
def test_loops(text: str, loop: bool) -> None:
    assert has_loop(text) == loop


def test_a_perfect_translation() -> None:
    corpus = Corpus("x", "en-ko", [en for en, _ in PAIRS], [ko for _, ko in PAIRS])
    row = score_corpus(corpus, [Translation(ko, True, False) for _, ko in PAIRS])
    assert (row["BLEU"], row["chrF"], row["n"]) == ("100.0", "100.0", "12")
    assert {row[key] for key in ("empty", "wrong script", "loops", "no end", "source cut")} == {"0"}
    bad = [Translation("", False, True), *[Translation("no", True, False)] * 11]
    row = score_corpus(corpus, bad)
    assert [row[key] for key in ("empty", "wrong script", "no end", "source cut")] == ["1", "11", "1", "1"]
    assert float(row["chrF"]) < 1


def test_bleu_knows_its_tokenizer() -> None:
    assert bleu_tokenizer("en") == "13a"
    assert bleu_tokenizer("ko") in ("ko-mecab", "char")


def test_known_sentences_are_translated_as_they_are_known(tokenizer: Tokenizer) -> None:
    torch.manual_seed(19)
    model = build_model(fitting_config("translator", tokenizer)).eval()
    assert isinstance(model, Translator)
    examples = Examples.build({("en", "ko"): PAIRS})
    params = BeamParams(2, max_new_tokens=60, example_weight=0.95)
    for language, sources, targets in (("ko", EN, KO), ("en", KO, EN)):
        found = translate_all(model, tokenizer, sources, language, params, examples=examples)
        assert [each.text for each in found] == targets
    without = translate_all(
        model, tokenizer, EN, "ko", replace(params, example_weight=0.0), examples=examples
    )
    assert [each.text for each in without] != KO


def test_what_is_measured_is_no_example(tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(300)]
    held = [text for text in texts if held_out(text)]
    assert held
    pack = tmp_path / "a.en-ko.tsv"
    pack.write_text("".join(f"{text}\t글\n" for text in texts))
    examples = _examples(argparse.Namespace(examples=[tmp_path]))
    assert examples is not None
    assert len(examples) == len(texts) - len(held)
    assert _examples(argparse.Namespace(examples=[])) is None


def test_translations_keep_their_order_and_do_not_depend_on_the_batch(tokenizer: Tokenizer) -> None:
    torch.manual_seed(19)
    model = build_model(fitting_config("translator", tokenizer)).eval()
    assert isinstance(model, Translator)
    texts = [en for en, _ in PAIRS] + ["a" * 200]
    params = BeamParams(2, max_new_tokens=8, round_trip=0.5)
    together = translate_all(model, tokenizer, texts, "ko", params)
    alone = [translate_all(model, tokenizer, [text], "ko", params, 1)[0] for text in texts]
    for one, other in zip(alone, together, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-4)  # products of other shapes round apart
        assert replace(one, score=0.0) == replace(other, score=0.0)
    assert [t.cut for t in together] == [False] * 12 + [True]


def test_bits_per_byte_of_a_model_that_knows_nothing(tokenizer: Tokenizer) -> None:
    """Every token costs log2 V bits, whatever the windows."""
    model = build_model(fitting_config("causal_lm", tokenizer, max_len=16)).eval()
    assert isinstance(model, CausalLM)
    with torch.no_grad():
        model.embeddings.tokens.weight.zero_()
    text = " ".join(ko for _, ko in PAIRS)
    row = score_causal(model, tokenizer, "x", [("x", [text[:20], text[20:]]), ("x", ["집"])], rows=3)
    n_tokens, n_bytes = len(tokenizer.encode(text)) + len(tokenizer.encode("집")), len((text + "집").encode())
    assert float(row["bits per byte"]) == pytest.approx(n_tokens * math.log2(420) / n_bytes, abs=1e-3)
    assert float(row["perplexity per token"]) == pytest.approx(420, rel=1e-3)
    assert row["bytes"] == str(n_bytes)


def test_accuracy_of_a_model_that_says_one_thing(tokenizer: Tokenizer) -> None:
    model = build_model(fitting_config("masked_lm", tokenizer)).eval()
    assert isinstance(model, MaskedLM)
    with torch.no_grad():
        for parameter in (*model.embeddings.tokens.parameters(), *model.nsp_head.classify.parameters()):
            parameter.zero_()
        for rank, digit in enumerate("12345"):
            model.mlm_head.bias[tokenizer.encode(digit)[0]] = 9.0 - rank
        model.nsp_head.classify.bias[1] = 1.0
    for digit, at_1, at_5 in (("1", "100.0", "100.0"), ("5", "0.0", "100.0"), ("7", "0.0", "0.0")):
        row = score_masked(model, tokenizer, "x", [("x", [digit * 40])])
        assert (row["accuracy at 1"], row["accuracy at 5"]) == (at_1, at_5)
        assert (row["masked tokens"], row["next sentence"]) == ("6", "-")
    pairs = [("x", [f"{i} one.", f" {i} two."]) for i in range(50)]
    row = score_masked(model, tokenizer, "x", pairs)
    assert row["sentence pairs"] == "50"
    assert 30 < float(row["next sentence"]) < 70  # it always says yes


def test_a_translator_from_end_to_end(
    tiny_folders: TinyFolders, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_folders.translate, tmp_path / "m"))
    (folder / "README.md").write_text(f"# Card\n\n{START}\nold\n{STOP}\n\nEnd.\n", encoding="utf-8")
    arguments = parse("--model", folder, "--data", data, "--limit", "3", "--max-new-tokens", "6", "--card")
    assert evaluate_command(arguments) == 0
    printed = capsys.readouterr().out
    for name in ("small", "held-out written-daily", "held-out, all of these"):
        for direction in ("en-ko", "ko-en"):
            assert f"| {name} " in printed
            assert direction in printed
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# Card\n")
    assert card.endswith("\n\nEnd.\n")
    assert "old" not in card
    assert printed.strip() in card


def test_the_search_can_be_tuned_and_the_note_says_how(
    tiny_folders: TinyFolders, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--model", tiny_folders.translate, "--data", data, "--limit", "3", "--max-new-tokens", "24")
    guards = ("--beams", "2", "--no-repeat-ngram-size", "1", "--repetition-penalty", "1.5")
    assert evaluate_command(parse(*common, *guards)) == 0
    said = capsys.readouterr().out
    assert "2 beams, length penalty 1, no 1-gram twice, repetition penalty 1.5, at most 24 tokens." in said
    assert evaluate_command(parse(*common)) == 0
    assert "4 beams, length penalty 1, at most 24 tokens." in capsys.readouterr().out
    assert evaluate_command(parse(*common, "--no-repeat-ngram-size", "-1")) == 1


@pytest.mark.parametrize("task", ["fill_mask", "generate"])
def test_the_other_models_from_end_to_end(
    task: str, tiny_folders: TinyFolders, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        evaluate_command(parse("--model", getattr(tiny_folders, task), "--data", data, "--limit", "4")) == 0
    )
    printed = capsys.readouterr().out
    assert "| mono.en " in printed
    assert "| sentences.ko " in printed


def test_pairs_of_files(data: Path, tmp_path: Path) -> None:
    english, korean = data / "dev/small.eng", data / "dev/small.kor"
    for first, second in ((english, korean), (korean, english)):
        both = list(corpora(parse("--model", "m", "--pairs", first, second)))
        assert [c.direction for c in both] == ["en-ko", "ko-en"]
        assert both[0].sources == both[1].references == [en for en, _ in PAIRS]
    (one,) = corpora(
        parse("--model", "m", "--pairs", korean, english, "--direction", "ko-en", "--limit", "5")
    )
    assert len(one.sources) == 5
    assert one.references[0] == "I go home."
    with pytest.raises(ValueError, match="2 --pairs but 1 --direction"):
        list(corpora(parse("--model", "m", *("--pairs", english, korean) * 2, "--direction", "en-ko")))
    (tmp_path / "short").write_text("one\n")
    with pytest.raises(ValueError, match=r"small\.eng has 12 lines, .*short has 1"):
        read_parallel(english, tmp_path / "short")


def test_what_cannot_be_measured_is_said(
    tiny_folders: TinyFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_command(parse("--model", tiny_folders.generate)) == 1
    assert "nothing to measure" in capsys.readouterr().out
    assert evaluate_command(parse("--model", tmp_path)) == 1
    assert "config.json: no such file" in capsys.readouterr().out


def test_sample() -> None:
    assert sample([1, 2, 3], 0) == [1, 2, 3]
    assert sample(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert sample([1], 5) == [1]


def test_cards(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    write_card(path, "one\n")
    assert path.read_text() == f"{START}\none\n{STOP}\n"
    write_card(path, r"two \1")
    assert path.read_text() == f"{START}\ntwo \\1\n{STOP}\n"
    path.write_text("# Card\n")
    write_card(path, "three")
    assert path.read_text() == f"# Card\n\n{START}\nthree\n{STOP}\n"


def test_table() -> None:
    assert markdown_table([{"text": "a", "n": "12"}, {"text": "long", "n": "-"}]).splitlines() == [
        "| text |   n |",
        "| ---- | --: |",
        "| a    |  12 |",
        "| long |   - |",
    ]


def test_what_has_ended_is_ordered_by_the_way_back(tokenizer: Tokenizer) -> None:
    torch.manual_seed(4)
    model = build_model(fitting_config("translator", tokenizer)).eval()
    assert isinstance(model, Translator)
    sources = [tokenizer.source_ids(tokenizer.encode(en), "ko") for en, _ in PAIRS[:2]]
    said = [tokenizer.encode(ko) for _, ko in PAIRS[:4]]
    results = [
        [Decoded(said[0], -0.5, True), Decoded(said[1], -0.5, True), Decoded(said[2], -0.1, False)],
        [Decoded(said[3], -0.5, True)],
    ]
    back = return_logprobs(model, [(sources[0], said[0]), (sources[0], said[1])])
    params = BeamParams(3, num_return_sequences=3, length_penalty=0.0, round_trip=100.0)
    ordered = look_back(model, sources, [list(found) for found in results], params)
    first = 0 if back[0] > back[1] else 1
    assert [each.token_ids for each in ordered[0]] == [said[first], said[1 - first]]
    assert ordered[1] == results[1]
    open_ended = [[Decoded(said[0], -0.5, False), Decoded(said[1], -0.6, False)]]
    assert look_back(model, sources[:1], list(open_ended), params) == open_ended
