"""What the three tasks feed to their models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.masks import document_mask
from model.models import CausalLM, MaskedLM, Translator, build_model
from model.tokenizer import Tokenizer
from model.training.causal import CausalTask
from model.training.masked import IGNORE, MaskedTask, particle_splits, word_starts
from model.training.shards import Shard, write_shard
from model.training.transfer import start_from_encoder
from model.training.translate import TranslateTask, source_tag
from tests.tiny import PAIRS, fitting_config


def rng(seed: int = 17) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- masked -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def passages_shard(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Shard:
    """30 documents; every sentence names its document and its place, so that order can be read back."""
    documents = []
    for d in range(30):
        n = 1 + d % 6
        sentences = [f"Document {d} sentence {s} of the children." for s in range(n)]
        documents.append((f"kind {d % 2}", [(" " if s else "") + text for s, text in enumerate(sentences)]))
    return write_shard(tmp_path_factory.mktemp("shard"), tokenizer, documents)


@pytest.fixture
def masked(passages_shard: Shard, tokenizer: Tokenizer) -> MaskedTask:
    return MaskedTask(passages_shard, tokenizer, budget=1024, max_len=96, mask_ratio=0.0, split_particles=0.0)


def places(text: str) -> list[tuple[int, int]]:
    """(document, sentence) of every sentence that a text shows whole."""
    words = text.split()
    return [(int(words[i + 1]), int(words[i + 3])) for i in range(len(words) - 3) if words[i] == "Document"]


def rows_of(task: MaskedTask, epochs: int = 4) -> list[tuple[str, str, int]]:
    """(A, B, does it follow) of every passage, unmasked but for the one slot that always is."""
    t, found = task.tokenizer, []
    for epoch in range(epochs):
        for batch in task.batches(epoch):
            arrays = task.collate(batch, rng())
            ids, segments = arrays["token_ids"].clone(), arrays["segment_ids"]
            slots, labels = arrays["slots"], arrays["labels"]
            chosen = labels != IGNORE
            ids[chosen.nonzero()[:, 0], slots[chosen]] = labels[chosen]
            for row, segment, follows in zip(ids, segments, arrays["follows"], strict=True):
                assert row[0] == t.cls_id
                ends = (row == t.sep_id).nonzero().flatten().tolist()
                assert len(ends) == (1 if follows == IGNORE else 2)
                assert segment.sum() == (0 if follows == IGNORE else ends[1] - ends[0])
                b = t.decode(row[ends[0] + 1 :].tolist())
                found.append((t.decode(row[1 : ends[0]].tolist()), b, int(follows)))
    return found


def test_b_follows_a_or_comes_from_another_document(masked: MaskedTask) -> None:
    rows = rows_of(masked)
    assert {follows for _, _, follows in rows} == {0, 1, IGNORE}
    for a, b, follows in rows:
        if follows == IGNORE:
            assert b == ""
            continue
        before, after = places(a), places(b)
        assert all(d == after[0][0] for d, _ in after)
        if follows:
            both = before + after
            assert both == [(both[0][0], both[0][1] + i) for i in range(len(both))]
        else:
            assert after[0][0] != before[-1][0]
            assert after[0][0] % 2 == before[-1][0] % 2  # another document of the same kind
    known = [follows for _, _, follows in rows if follows != IGNORE]
    assert 0.4 < np.mean(known) < 0.65


def test_the_length_of_b_does_not_tell(masked: MaskedTask) -> None:
    rows = [(len(places(b)), follows) for _, b, follows in rows_of(masked, 20) if follows != IGNORE]
    means = [np.mean([n for n, follows in rows if follows == wanted]) for wanted in (0, 1)]
    assert abs(means[0] - means[1]) < 0.35
    assert max(n for n, follows in rows if not follows) > 1


def test_a_passage_occurs_once_an_epoch_within_the_budget(masked: MaskedTask) -> None:
    batches = masked.batches(3)
    passages = np.concatenate(batches)
    units = [u for first, _, last, *_ in passages.tolist() for u in range(first, last)]
    assert sorted(units) == list(range(len(masked.sizes)))
    for batch in batches:
        token_ids = masked.collate(batch, rng())["token_ids"]
        assert token_ids.numel() <= 1024
        assert token_ids.size(1) <= 96
    assert not np.array_equal(np.concatenate(masked.batches(4)), passages)
    assert np.array_equal(np.concatenate(masked.batches(3)), passages)


def test_long_sentences_are_cut_to_the_length(passages_shard: Shard, tokenizer: Tokenizer) -> None:
    task = MaskedTask(passages_shard, tokenizer, budget=256, max_len=16)
    for batch in task.batches(0):
        assert task.collate(batch, rng())["token_ids"].size(1) <= 16


def test_masking_statistics(passages_shard: Shard, tokenizer: Tokenizer) -> None:
    task = MaskedTask(passages_shard, tokenizer, budget=1024, whole_word=0.0)
    t, generator = tokenizer, rng()
    text = generator.integers(11, t.vocab_size, (400, 62))
    original = np.concatenate([np.full((400, 1), t.cls_id), text, np.full((400, 1), t.sep_id)], axis=1)
    original[:, -5:] = t.pad_id
    original[:, -6] = t.sep_id
    token_ids = original.copy()
    slots, labels = task.mask(token_ids, generator)
    chosen = labels != IGNORE
    assert (chosen.sum(1) == round(58 * 0.15)).all()
    before, after = (np.take_along_axis(ids, slots, 1)[chosen] for ids in (original, token_ids))
    assert np.array_equal(labels[chosen], before)
    assert before.min() > t.sep_id  # never a special token
    masked, kept = after == t.mask_id, after == before
    assert 0.77 < masked.mean() < 0.83
    assert 0.08 < kept.mean() < 0.12
    assert 0.08 < (~masked & ~kept).mean() < 0.12
    assert not np.isin(after[~masked], list(t.special_ids)).any()
    untouched = np.ones_like(original, dtype=bool)
    np.put_along_axis(untouched, slots, ~chosen, 1)
    assert np.array_equal(token_ids[untouched], original[untouched])


def words_of(row: Sequence[int], starts: Any, special: set[int]) -> list[int]:
    """Per position the number of its word; special tokens are words of their own."""
    numbers, word = [], 0
    for i, token in enumerate(row):
        if token in special or starts[token] or row[i - 1] in special:
            word += 1
        numbers.append(word)
    return numbers


def test_whole_words_are_chosen_together(passages_shard: Shard, tokenizer: Tokenizer) -> None:
    task = MaskedTask(passages_shard, tokenizer, budget=1024, whole_word=1.0, mask_ratio=0.3)
    special, starts = {tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id}, word_starts(tokenizer)
    row = [tokenizer.cls_id, *tokenizer.encode(" ".join(en for en, _ in PAIRS)), tokenizer.sep_id]
    words = np.array(words_of(row, starts, special))
    first_word = set(np.flatnonzero(words == words[1]).tolist())
    hit_first = 0
    for seed in range(60):
        slots, labels = task.mask(np.array([row]), rng(seed))
        chosen = set(slots[labels != IGNORE].tolist())
        partly = 0
        for word in {int(words[i]) for i in chosen}:
            partly += not set(np.flatnonzero(words == word).tolist()) <= chosen
        assert partly <= 1  # the count may end within a word
        hit_first += bool(first_word & chosen)
    assert hit_first > 5  # also the word without a space before it


def test_particles_part() -> None:
    korean = ["나는 집에 간다", "집을 본다", "집 앞", "나 를", "나를 본다 에 을 는"] * 50
    small = Tokenizer.train(korean, 320)
    for token_id, (stem, particle) in particle_splits(small).items():
        assert small.token_text(token_id) == small.token_text(stem) + small.token_text(particle)
    assert particle_splits(small)


def test_stems_before_particles_are_masked_more_often(passages_shard: Shard) -> None:
    korean = ["나는 집에 간다", "집을 본다", "집 앞", "나 를", "나를 본다 에 을 는"] * 50
    small = Tokenizer.train(korean, 320).extended([" 우산", "엄마", "아기"])
    never, always = (
        MaskedTask(passages_shard, small, budget=1024, whole_word=0.0, stems=stems) for stems in (0.0, 1.0)
    )
    row = [small.cls_id, *small.encode("엄마을 우산을 본다. (아기을 집 앞 간다 우산 본다"), small.sep_id]
    stem = always._stems(np.array([row]))[0]
    assert [small.token_text(i) for i, is_stem in zip(row, stem, strict=True) if is_stem] == [
        "엄마",
        " 우산",
        "아기",
    ]

    def hits(task: MaskedTask) -> int:
        chosen = (task.mask(np.array([row]), rng(seed)) for seed in range(200))
        return sum(int(stem[slots[labels != IGNORE]].sum()) for slots, labels in chosen)

    assert hits(always) > 1.3 * hits(never)


def test_added_words_are_seen_often_enough(tmp_path: Path) -> None:
    korean = ["나는 집에 간다", "집을 본다", "집 앞", "나 를", "나를 본다 에 을 는"] * 50
    small = Tokenizer.train(korean, 320).extended([" 우산", " 찌개"])
    often, seldom, both, neither = "집 앞 우산", "집 앞 찌개", "집 우산 찌개 간다", "나는 집에 간다"
    texts = [*[often] * 40, *[seldom] * 4, both, *[neither] * 40]
    documents = [("sentences", [text]) for text in texts]
    shard = write_shard(tmp_path, small, [*documents, ("mono", [often, often])])
    task = MaskedTask(shard, small, budget=256, sightings=10, weights={"": 0.1})
    assert task.weights.round(3).tolist() == [*[round(10 / 41, 3)] * 40, *[1.0] * 5, *[0.1] * 41]
    row = np.array([[small.cls_id, *small.encode("나는 집에 우산 앞에 간다"), small.sep_id]])

    def hits(stems: float) -> int:
        task = MaskedTask(shard, small, budget=256, sightings=10, stems=stems, whole_word=0.0)
        chosen = (task.mask(row.copy(), rng(seed)) for seed in range(200))
        return sum(int(np.isin(labels, sorted(small.added_ids)).sum()) for _, labels in chosen)

    assert hits(1.0) > 1.3 * hits(0.0)
    with pytest.raises(ValueError, match="the tokenizer has none"):
        MaskedTask(shard, Tokenizer.train(korean, 320), budget=256, sightings=10)


def test_masked_loss_is_finite_where_no_next_sentence_is_known(
    masked: MaskedTask, tokenizer: Tokenizer
) -> None:
    model = build_model(fitting_config("masked_lm", tokenizer, max_len=96))
    assert isinstance(model, MaskedLM)
    alone = np.array([[0, 1, 1, -1, -1]])
    arrays = masked.collate(alone, rng())
    assert arrays["follows"].tolist() == [IGNORE]
    loss, tokens = masked.loss(model, arrays)
    assert torch.isfinite(loss)
    assert tokens == int((arrays["token_ids"] != tokenizer.pad_id).sum())


# --- causal -----------------------------------------------------------------------------------


@pytest.fixture
def causal(passages_shard: Shard, tokenizer: Tokenizer) -> CausalTask:
    return CausalTask(passages_shard, tokenizer, budget=128, max_len=32)


def test_windows_are_the_stream_from_the_next_sentence_on(causal: CausalTask) -> None:
    t, epoch = causal.tokenizer, 2
    windows = {
        int(offset): causal._window(int(offset), epoch) for b in causal.batches(epoch) for offset, _ in b
    }
    stream: list[int] = []
    begins: set[int] = set()  # of documents
    sentences: set[int] = set()  # of the others
    order, _ = causal._stream(epoch)
    for document in order:
        begins.add(len(stream))
        stream.append(t.bos_id)
        for unit in causal.shard.document(int(document)):
            sentences.add(len(stream))
            stream += unit.tolist()
        stream.append(t.eos_id)
    assert sorted(order.tolist()) == list(range(30))
    n_windows, inside = (len(stream) - 1) // 32, 0
    stream += stream  # the last window may go on at the beginning
    for offset, window in windows.items():
        place = min(p for p in begins | sentences | {n_windows * 32 + 64} if p >= offset)
        if place in begins:
            assert window.tolist() == stream[place : place + 33]
        else:
            inside += 1
            assert window.tolist() == [t.bos_id, *stream[place : place + 32]]
    assert inside > 5
    assert set(windows) <= {i * 32 for i in range(n_windows)}
    assert len(windows) >= n_windows - 3  # the last partial batch is left out
    assert not np.array_equal(causal._stream(3)[0], order)


def test_labels_are_the_next_tokens_within_a_document(causal: CausalTask) -> None:
    t = causal.tokenizer
    for batch in causal.batches(0):
        arrays = causal.collate(batch, rng())
        ids, labels, documents = arrays["token_ids"], arrays["labels"], arrays["documents"]
        assert ids.shape == labels.shape == documents.shape
        ends = ids == t.eos_id
        assert (labels[ends] == t.pad_id).all()
        inside = ~ends[:, :-1]
        assert torch.equal(labels[:, :-1][inside], ids[:, 1:][inside])
        attends = document_mask(documents)[:, 0]
        begins = (ids == t.bos_id).nonzero().tolist()
        for row, column in begins:
            assert not attends[row, column:, :column].any()


def test_documents_occur_by_the_weight_of_their_label(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [
        (label, [f"{label} {i}, I go home."]) for label in ("story.en", "story.ko", "mono") for i in range(20)
    ]
    shard = write_shard(tmp_path, tokenizer, texts)
    weights = {"story": 3.0, "story.ko": 1.5}
    causal = CausalTask(shard, tokenizer, budget=128, max_len=32, weights=weights)
    counts = np.bincount(causal._stream(0)[0], minlength=60)
    assert (counts[:20] == 3).all()
    assert set(counts[20:40]) == {1, 2}
    assert not counts[40:].any()
    tokens = int(((causal.sizes + 2) * counts).sum())
    assert abs(sum(map(len, causal.batches(0))) - tokens // 32) <= causal.rows
    masked = MaskedTask(shard, tokenizer, budget=128, max_len=32, weights=weights)
    counts = np.bincount(np.concatenate(masked.batches(0))[:, 0], minlength=60)  # a sentence is a passage
    assert (counts[:20] == 3).all()
    assert set(counts[20:40]) == {1, 2}
    assert not counts[40:].any()


@pytest.mark.parametrize("weights", [{"other": 2.0}, {"": 0.0}])
def test_documents_that_weigh_nothing_hold_no_batch(
    tokenizer: Tokenizer, tmp_path: Path, weights: dict[str, float]
) -> None:
    shard = write_shard(tmp_path, tokenizer, [("a", ["I go home.", "You stay."])] * 20)
    for task in (CausalTask, MaskedTask):
        assert task(shard, tokenizer, budget=128, max_len=32, weights=weights).batches(0) == []


def test_a_shard_shorter_than_a_window_holds_no_batch(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shard = write_shard(tmp_path, tokenizer, [("a", ["I go home."])])
    assert CausalTask(shard, tokenizer, budget=128, max_len=64).batches(0) == []


# --- translate --------------------------------------------------------------------------------


@pytest.fixture
def translate(tokenizer: Tokenizer, tmp_path: Path) -> TranslateTask:
    documents = [("written-daily", [en, ko, en.lower(), ko.removesuffix(".")]) for en, ko in PAIRS[:8]]
    documents += [("msdocs-ht", [en, ko]) for en, ko in PAIRS[8:]]
    shard = write_shard(tmp_path, tokenizer, documents)
    return TranslateTask(shard, tokenizer, weights={"written": 2.0, "": 1.0}, budget=512, noise=0.5)


def test_both_directions_by_weight(translate: TranslateTask) -> None:
    batches = translate.batches(0)
    examples = np.concatenate(batches)
    counts = np.bincount(examples // 4 * 2 + examples % 2, minlength=24)
    assert counts.tolist() == [2] * 16 + [1] * 8
    noisy = examples[examples % 4 >= 2] // 4
    assert 0 < len(noisy) < 32
    assert max(noisy) < 8
    for batch in batches:
        arrays = translate.collate(batch, rng())
        assert all(a.numel() <= 512 for a in arrays.values())


def test_collate_tags_and_shifts(translate: TranslateTask) -> None:
    t = translate.tokenizer
    examples = np.sort(np.concatenate(translate.batches(0)))
    arrays = translate.collate(examples, rng())
    rows = zip(arrays["src"].tolist(), arrays["tgt"].tolist(), arrays["labels"].tolist(), strict=True)
    for example, (src, tgt, labels) in zip(examples.tolist(), rows, strict=True):
        document, noisy, direction = example // 4, example // 2 % 2, example % 2
        en, ko = PAIRS[document]
        source, target = (en, ko) if direction == 0 else (ko, en)
        language = t.languages["ko" if direction == 0 else "en"]
        assert src[:2] == [t.tags["everyday" if document < 8 else "docs"], language]
        assert tgt[0] == language
        n = labels.index(t.eos_id)
        assert labels[:n] == tgt[1 : n + 1]
        assert t.decode(labels) == target
        assert set(labels[n + 1 :]) | set(tgt[n + 1 :]) <= {t.pad_id}
        twin = source.lower() if direction == 0 else source.removesuffix(".")
        assert t.decode(src) == (twin if noisy else source)
        assert src[src.index(t.pad_id) - 1 if t.pad_id in src else -1] == t.eos_id


def test_a_noisy_source_widens_no_batch(tokenizer: Tokenizer, tmp_path: Path) -> None:
    en, ko = PAIRS[0]
    shard = write_shard(tmp_path, tokenizer, [("written", [en, ko, en * 9, ko])] * 40)
    task = TranslateTask(shard, tokenizer, weights={"": 1.0}, budget=512, noise=0.5)
    assert all(a.numel() <= 512 for b in task.batches(0) for a in task.collate(b, rng()).values())
    narrow = TranslateTask(shard, tokenizer, weights={"": 1.0}, budget=512, noise=1.0, max_len=30)
    noisy = np.concatenate(narrow.batches(0))
    assert set(noisy % 4) == {0, 3}  # English nine times over is longer than the limit


def test_longer_pairs_than_the_limit_are_left_out(translate: TranslateTask) -> None:
    short = TranslateTask(translate.shard, translate.tokenizer, weights={"": 1.0}, budget=512, max_len=30)
    kept = {int(e) // 4 for batch in short.batches(0) for e in batch}
    assert kept == set(np.flatnonzero(short.lengths <= 30).tolist())
    assert 0 < len(kept) < 12


def test_smoothing_is_for_training_alone(translate: TranslateTask, tokenizer: Tokenizer) -> None:
    model = build_model(fitting_config("translator", tokenizer))
    assert isinstance(model, Translator)
    arrays = translate.collate(np.array([0, 1, 4, 5]), rng())
    (smooth, tokens), (plain, _) = (translate.loss(model.train(mode), arrays) for mode in (True, False))
    assert smooth.item() != plain.item()
    assert tokens == int((arrays["labels"] != tokenizer.pad_id).sum())


def test_tags() -> None:
    names = ("written-daily", "wiki-en-ko", "grammar", "mixed-ko", "msdocs-ht", "back-books")
    assert [source_tag(name) for name in names] == [*["everyday"] * 4, "docs", "back"]


def test_start_from_a_trained_encoder(tokenizer: Tokenizer) -> None:
    masked_model = build_model(fitting_config("masked_lm", tokenizer, n_segments=0))
    translator = build_model(fitting_config("translator", tokenizer))
    assert isinstance(translator, Translator)
    untouched = {n: p.clone() for n, p in translator.named_parameters() if n.startswith("decoder.")}
    tensors = dict(masked_model.named_parameters())
    copied = start_from_encoder(translator, tensors)
    shared = [n for n in dict(translator.named_parameters()) if n.startswith(("embeddings.", "encoder."))]
    assert copied == len(shared)
    own = dict(translator.named_parameters())
    assert all(torch.equal(own[name], tensors[name]) for name in shared)
    assert all(torch.equal(own[name], p) for name, p in untouched.items())
    ids = torch.tensor([tokenizer.source_ids(tokenizer.encode("I go home."), "ko")])
    assert isinstance(masked_model, MaskedLM)
    torch.testing.assert_close(translator.encode(ids)[0], masked_model.encode(ids))


def test_an_encoder_that_does_not_fit_is_refused(tokenizer: Tokenizer) -> None:
    translator = build_model(fitting_config("translator", tokenizer))
    assert isinstance(translator, Translator)
    wide = build_model(fitting_config("masked_lm", tokenizer, d_model=64))
    with pytest.raises(ValueError, match="embeddings do not fit"):
        start_from_encoder(translator, dict(wide.named_parameters()))


def test_a_causal_model_starts_from_an_encoder_too(tokenizer: Tokenizer) -> None:
    masked_model = build_model(fitting_config("masked_lm", tokenizer))
    causal = build_model(fitting_config("causal_lm", tokenizer))
    assert isinstance(causal, CausalLM)
    tensors = dict(masked_model.named_parameters())
    start_from_encoder(causal, tensors)
    own = dict(causal.named_parameters())
    blocks = [name for name in tensors if name.startswith("encoder.blocks.")]
    assert blocks
    assert all(torch.equal(own[name.replace("encoder.", "decoder.")], tensors[name]) for name in blocks)


def test_widths_of_another_step(translate: TranslateTask, tokenizer: Tokenizer) -> None:
    """A GPU's attention likes multiples of eight; nothing but padding changes."""
    wide = TranslateTask(translate.shard, tokenizer, weights={"": 1.0}, budget=400, width_step=8)
    for batch in wide.batches(0):
        made, narrow = wide.collate(batch, rng()), translate.collate(batch, rng())
        for name, ids in made.items():
            assert ids.size(1) % 8 == 0
            assert torch.equal(ids[:, : narrow[name].size(1)], narrow[name])
            assert (ids[:, narrow[name].size(1) :] == tokenizer.pad_id).all()
            assert ids.numel() <= 400 or len(ids) == 1
