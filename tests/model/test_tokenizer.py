"""The tokenizer loses nothing, and its stream never emits half a character."""

import random
from pathlib import Path

import pytest

from model.tokenizer import SPECIAL_TOKENS, TextError, TextStream, Tokenizer, text_pieces

TEXTS = [
    "",
    " ",
    "I go home.",
    "나는 집에 간다.",
    "  two  spaces, a\ttab,\r\n\r\n a line and its end \n",
    "한글ᄒᆞᆫᄀᆞᆯ 한자 漢字 ひらがな العربية עברית हिन्दी",
    "👩‍👩‍👧 🇰🇷 e\u0301 \u200b\ufeff\u2028\x00\x7f\x85",
    "naïve café 3.14 1,234,567 don't 'tis",
    "\ud7a3\uac00\U0010ffff\ufffd",
    "<pad></s>[MASK]<2ko><tag:docs>",
]


def random_texts(n: int) -> list[str]:
    """Characters from all planes, in runs; surrogates left out, as no text has them."""
    rng = random.Random(11)
    ranges = [
        (0, 0x7F),
        (0x80, 0x7FF),
        (0xAC00, 0xD7A3),
        (0x800, 0xD7FF),
        (0xE000, 0xFFFF),
        (0x10000, 0x10FFFF),
    ]
    return [
        "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 40))) for _ in range(n)
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_any_text_comes_back(tokenizer: Tokenizer) -> None:
    texts = random_texts(300)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
        assert "".join(text_pieces(tokenizer, ids)) == text


def test_every_character_of_the_first_plane_comes_back(tokenizer: Tokenizer) -> None:
    text = "".join(chr(i) for i in range(0x10000) if not 0xD800 <= i <= 0xDFFF)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    for encode in (tokenizer.encode, tokenizer.encode_with_offsets, tokenizer.encode_masked):
        with pytest.raises(TextError, match="lone surrogate at character 2"):
            encode("ab\ud800")


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_literal_special_tokens_are_plain_text(tokenizer: Tokenizer, token: str) -> None:
    ids = tokenizer.encode(f"a {token} b")
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids) == f"a {token} b"


def test_special_ids(tokenizer: Tokenizer) -> None:
    t = tokenizer
    named = [t.pad_id, t.bos_id, t.eos_id, t.mask_id, t.cls_id, t.sep_id]
    assert named == [0, 1, 2, 3, 4, 5]
    assert t.special_ids == {*named, *t.languages.values(), *t.tags.values()}
    assert [t.token_text(i) for i in sorted(t.special_ids)] == list(SPECIAL_TOKENS)
    assert t.decode([t.bos_id, *t.encode("집"), t.eos_id, t.pad_id]) == "집"
    assert set(t.languages) == {"en", "ko"}


def test_source_ids(tokenizer: Tokenizer) -> None:
    t = tokenizer
    ids = t.encode("집")
    assert t.source_ids(ids, "ko") == [t.tags["everyday"], t.languages["ko"], *ids, t.eos_id]
    assert t.source_ids(ids, "en", "docs")[:2] == [t.tags["docs"], t.languages["en"]]


@pytest.mark.parametrize("text", TEXTS)
def test_offsets(tokenizer: Tokenizer, text: str) -> None:
    pieces = tokenizer.encode_with_offsets(text)
    assert [p.id for p in pieces] == tokenizer.encode(text)
    end = 0
    for piece in pieces:
        assert piece.text == text[piece.start : piece.stop]
        assert piece.start <= end <= piece.stop or piece.start == end
        end = max(end, piece.stop)
    assert end == len(text)


def test_pieces_of_one_character_share_its_offsets(tokenizer: Tokenizer) -> None:
    pieces = tokenizer.encode_with_offsets("a👩b")
    assert len(pieces) > 3
    assert [p.text for p in pieces] == ["a", *["👩"] * (len(pieces) - 2), "b"]
    assert {(p.start, p.stop) for p in pieces[1:-1]} == {(1, 2)}
    assert all(tokenizer.token_text(p.id) == "\ufffd" for p in pieces[1:-1])


def test_digits_stand_alone_and_particles_part_from_latin_names(tokenizer: Tokenizer) -> None:
    texts = [tokenizer.token_text(i) for i in tokenizer.encode("2024")]
    assert texts == ["2", "0", "2", "4"]
    starts = {p.start for p in tokenizer.encode_with_offsets("Python은")}
    assert len("Python") in starts


@pytest.mark.parametrize(
    ("text", "parts", "spaced"),
    [
        ("I [MASK] home.", ["I", " home."], [True]),
        ("[MASK] go home.", ["", " go home."], [False]),
        ("나는 [MASK]에 간다.", ["나는", "에 간다."], [True]),
        ("[MASK][MASK]", ["", "", ""], [False, False]),
        ("a  [MASK] [MASK]", ["a ", "", ""], [True, True]),
        ("no mask", ["no mask"], []),
        ("[MASK", ["[MASK"], []),
    ],
)
def test_encode_masked(tokenizer: Tokenizer, text: str, parts: list[str], spaced: list[bool]) -> None:
    ids: list[int] = tokenizer.encode(parts[0])
    for part in parts[1:]:
        ids += [tokenizer.mask_id, *tokenizer.encode(part)]
    assert tokenizer.encode_masked(text) == (ids, spaced)


@pytest.mark.parametrize("text", TEXTS)
def test_stream_emits_whole_characters_only(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    stream, out = TextStream(tokenizer), ""
    for token_id in ids:
        out += stream.push(token_id)
        assert text.startswith(out)
    assert out + stream.finish() == text


def test_stream_equals_decode_on_any_ids(tokenizer: Tokenizer) -> None:
    """A model may say anything: broken characters give nothing, in both."""
    rng = random.Random(12)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(0, 30))]
        stream = TextStream(tokenizer)
        streamed = "".join(stream.push(i) for i in ids) + stream.finish()
        assert streamed == tokenizer.decode(ids)
        assert "\ufffd" not in streamed


def test_a_broken_end_is_dropped(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a👩")
    stream = TextStream(tokenizer)
    assert "".join(stream.push(i) for i in ids[:-1]) == "a"
    assert stream.finish() == ""
    assert tokenizer.decode(ids[:-1]) == "a"


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = Tokenizer.load(path)
        assert again.special_ids == tokenizer.special_ids
        for text in TEXTS:
            assert again.encode(text) == tokenizer.encode(text)


def test_load_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(tmp_path)
