"""Sentences with one mask, by a model whose answers are known."""

from pathlib import Path

import pytest
import torch

from model.examples import Examples
from model.models import MaskedLM, build_model
from model.tokenizer import Tokenizer
from model.training.cloze import Cloze, cloze_rows, read_cloze
from model.training.packs import PackError
from tests.tiny import fitting_config


def test_the_sentences_that_come_with_the_code() -> None:
    sentences = read_cloze()
    assert {language for language, _, _ in sentences} == {"en", "ko"}
    assert len({text for _, text, _ in sentences}) == len(sentences) > 250
    assert all(word == word.strip() for *_, answers in sentences for word in answers)


@pytest.mark.parametrize("line", ["en\ta [MASK] b", "en\ta b\tc", "fr\ta [MASK]\tb", "en\t[MASK] [MASK]\tb"])
def test_other_lines_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "cloze.tsv").write_text(f"en\tI [MASK] home.\tgo|Went\n{line}\n")
    with pytest.raises(PackError, match=r"cloze\.tsv:2"):
        read_cloze(tmp_path / "cloze.tsv")


def test_shares(tokenizer: Tokenizer) -> None:
    torch.manual_seed(2)
    model = build_model(fitting_config("masked_lm", tokenizer)).eval()
    assert isinstance(model, MaskedLM)
    (spaced,) = tokenizer.encode(" home")[:1]
    with torch.no_grad():  # it says one thing, whatever it reads
        model.mlm_head.bias[spaced] = 100.0
    word = tokenizer.token_text(spaced).strip()
    yes, no = frozenset({word.casefold()}), frozenset({"none of these"})
    sentences = [
        Cloze("en", "I go [MASK].", yes),
        Cloze("en", "I go [MASK].", no),
        Cloze("ko", "집[MASK]", yes),
    ]
    english, korean = cloze_rows(model, tokenizer, sentences)
    assert (english["n"], english["best makes sense"], english["one of five does"]) == ("2", "50.0", "50.0")
    assert korean["best makes sense"] == "0.0"  # what begins with a space does not go there


def test_with_examples(tokenizer: Tokenizer) -> None:
    torch.manual_seed(2)
    model = build_model(fitting_config("masked_lm", tokenizer, example_weight=0.95)).eval()
    assert isinstance(model, MaskedLM)
    (spaced,) = tokenizer.encode(" home")[:1]
    word = tokenizer.token_text(spaced).strip()
    sentences = [Cloze("en", f"I go [MASK] {tail}.", frozenset({word})) for tail in ("now", "then")]
    examples = Examples.build({("en", "ko"): [(f"I go {word} now.", "나는 간다.")]})
    alone, with_examples = cloze_rows(model, tokenizer, sentences, examples)
    assert (alone["sentences with one mask"], alone["best makes sense"]) == ("en", "0.0")
    assert with_examples["sentences with one mask"] == "en, with examples"
    assert (with_examples["n"], with_examples["best makes sense"]) == ("2", "100.0")
