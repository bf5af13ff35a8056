"""A shortlist: what is in it, what is refused, how it is made."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model.checkpoint import CheckpointError, load
from model.shortlist import SHORTLIST_FILE, Shortlist, Table
from model.tokenizer import TOKENIZER_FILE, Tokenizer
from model.training.shortlist import fit_lexicon, make_table, most_common
from tests.tiny import TinyFolders, tiny_config

EOS = 2
CONFIG = tiny_config("translator", vocab_size=10, languages={"en": 8, "ko": 9})


def table(vocab_size: int = 10) -> Table:
    """Token 3 may become 7 and 8, token 4 nothing more than what may always stand there."""
    starts = np.array([0] * 4 + [2] * (vocab_size - 3))
    return Table(np.array([EOS, 5]), np.array([8, 7]), starts)


def test_what_a_source_may_become() -> None:
    shortlist = Shortlist({"ko": table()}, CONFIG)
    assert shortlist.ids([4, 4, 5], "ko").tolist() == [4]
    assert shortlist.ids([4, 3], "ko").tolist() == [3, 4, 7, 8]
    assert shortlist.ids([4, 3], "ko", suppressed=[4, 8]).tolist() == [3, 7]
    assert shortlist.common("ko").tolist() == [EOS, 5]
    assert shortlist.common("ko", suppressed=[5, 6]).tolist() == [EOS]


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / TOKENIZER_FILE).write_text("one")
    assert Shortlist.load(tmp_path, CONFIG) is None
    Shortlist({"ko": table()}, CONFIG).save(tmp_path)
    found = Shortlist.load(tmp_path, CONFIG)
    assert found is not None
    assert found.tables.keys() == {"ko"}
    assert found.ids([3], "ko").tolist() == [3, 7, 8]
    assert found.common("ko").tolist() == [EOS, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ko.starts": [0, 0]}, "does not fit a vocabulary of 10"),
        ({"ko.starts": [0, 0, 0, 0, 3, 2, 2, 2, 2, 2, 2]}, "no beginnings"),
        ({"ko.starts": [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]}, "no beginnings"),
        ({"ko.starts": [0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 3]}, "no beginnings"),
        ({"ko.common": [5]}, "lacks the end token, 2"),
        ({"ko.common": [2, 10]}, "not in 0..9"),
        ({"ko.likely": [-1, 7]}, "not in 0..9"),
        ({"ko.likely": None}, "no tensor 'ko.likely'"),
        ({"fr.common": [2], "fr.likely": [3], "fr.starts": [0] * 10 + [1]}, "no language fr"),
        ({"ko.common": [[2]]}, "does not fit"),
        ({"ko.starts": [0, 0, 0, 2**63 - 1, -(2**63), -1, 2, 2, 2, 2, 2]}, "no beginnings"),
        ({"ko.common": [2.5]}, "no whole numbers"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    changes: dict[str, list[float] | None], message: str, tmp_path: Path
) -> None:
    (tmp_path / TOKENIZER_FILE).write_text("one")
    Shortlist({}, CONFIG).save(tmp_path)
    with safe_open(tmp_path / SHORTLIST_FILE, framework="pt") as file:
        made_for = file.metadata()
    parts = {f"ko.{name}": part.tolist() for name, part in table()._asdict().items()} | changes
    tensors = {name: torch.tensor(part) for name, part in parts.items() if part is not None}
    save_file(tensors, tmp_path / SHORTLIST_FILE, metadata=made_for)
    with pytest.raises(ValueError, match=message) as caught:
        Shortlist.load(tmp_path, CONFIG)
    assert str(tmp_path / SHORTLIST_FILE) in str(caught.value)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"tokenizer_sha256": "0" * 64}])
def test_it_must_have_been_made_for_the_tokenizer_beside_it(
    metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    """Ids of another vocabulary of the same size would spoil every translation without a word."""
    (tmp_path / TOKENIZER_FILE).write_text("one")
    Shortlist({"ko": table()}, CONFIG).save(tmp_path)
    assert Shortlist.load(tmp_path, CONFIG) is not None
    if metadata is None:
        (tmp_path / TOKENIZER_FILE).write_text("another")
    else:
        save_file({"ko.common": torch.tensor([EOS])}, tmp_path / SHORTLIST_FILE, metadata=metadata)
    with pytest.raises(ValueError, match="made for another tokenizer"):
        Shortlist.load(tmp_path, CONFIG)


def test_half_a_file_is_refused_with_the_folder(tiny_folders: TinyFolders, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in tiny_folders.translate.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert load(folder).shortlist is None
    (folder / SHORTLIST_FILE).write_bytes(b"\x20\0\0\0\0\0\0\0{")
    with pytest.raises(CheckpointError, match=SHORTLIST_FILE):
        load(folder)
    (folder / SHORTLIST_FILE).replace(tiny_folders.generate / SHORTLIST_FILE)
    try:
        assert load(tiny_folders.generate).shortlist is None  # it is nobody's there
    finally:
        (tiny_folders.generate / SHORTLIST_FILE).unlink()


def test_ids_that_16_bits_do_not_hold_are_not_written(tmp_path: Path) -> None:
    size = 2**16 + 1
    large = Table(np.array([EOS]), np.array([size - 1]), np.array([0] * size + [1]))
    with pytest.raises(ValueError, match="65537 tokens do not fit"):
        Shortlist({"ko": large}, replace(CONFIG, vocab_size=size)).save(tmp_path)


def test_a_lexicon_finds_what_goes_with_what() -> None:
    """Two words a sentence, which always come together with their translations, in any order and company."""
    rng = np.random.default_rng(0)
    words = [rng.choice(20, size=5, replace=False) for _ in range(400)]
    pairs = [(own, rng.permutation(np.append(own + 20, 45))) for own in words]
    lexicon = fit_lexicon(pairs, 50)
    for source in range(20):
        own = lexicon.source == source
        assert lexicon.target[own][lexicon.probability[own].argmax()] == source + 20
    assert np.bincount(lexicon.source, weights=lexicon.probability)[:20] == pytest.approx(np.ones(20))
    made = make_table(lexicon, np.array([45, EOS]), 50, likely=0.5, seen=1.0)
    assert made.common.tolist() == [EOS, 45]
    assert made.likely.tolist() == [source + 20 for source in range(20)]
    assert made.starts.tolist() == [min(i, 20) for i in range(51)]


def test_the_most_common_have_every_byte_and_the_end(tokenizer: Tokenizer) -> None:
    frequent = [i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) > 1][:3]
    chosen = most_common([np.array(frequent * 5), np.array([tokenizer.pad_id] * 9)], tokenizer, 4)
    texts = {tokenizer.token_bytes(int(i)) for i in chosen}
    assert {bytes([b]) for b in range(256)} <= texts
    assert {*frequent, tokenizer.eos_id} <= set(chosen.tolist())
    assert tokenizer.pad_id not in chosen
