"""The recurrent baseline: what it computes, that padding changes nothing, the race with a Transformer."""

from pathlib import Path

import pytest
import torch

from model.models import build_model
from model.tokenizer import Tokenizer
from model.training.__main__ import main
from model.training.loop import Options
from model.training.rnn import AdditiveAttention, RNNConfig, RNNTranslator, greedy
from model.training.rnn_race import decode, race, spans, translate
from model.training.shards import write_shard
from model.training.translate import TranslateTask
from tests.tiny import PAIRS, fitting_config
from tests.training.tiny_run import pair_texts


def tiny_rnn(tokenizer: Tokenizer) -> RNNTranslator:
    torch.manual_seed(2)
    config = RNNConfig(tokenizer.vocab_size, 16, 24, 12, languages=tokenizer.languages)
    return RNNTranslator(config).eval()


def test_attention_by_hand() -> None:
    attention = AdditiveAttention(RNNConfig(10, 4, 3, 5))
    state, memory = torch.randn(2, 3), torch.randn(2, 4, 6)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    context = attention(state, attention.key(memory), memory, mask)
    for b, length in enumerate((4, 2)):
        scores = [
            attention.score(torch.tanh(attention.query(state[b]) + attention.key(memory[b, s])))
            for s in range(length)
        ]
        expected = torch.cat(scores).softmax(0) @ memory[b, :length]
        torch.testing.assert_close(context[b], expected)


def test_padding_and_neighbours_change_nothing(tokenizer: Tokenizer) -> None:
    model = tiny_rnn(tokenizer)
    tgt = torch.tensor([[7, 30, 31], [7, 40, 41]])
    together = model(torch.tensor([[20, 21, 22, 23, 2], [25, 26, 2, 0, 0]]), tgt)
    torch.testing.assert_close(together[1:], model(torch.tensor([[25, 26, 2]]), tgt[1:]))


def test_a_word_is_said_before_it_is_known(tokenizer: Tokenizer) -> None:
    model, src = tiny_rnn(tokenizer), torch.tensor([[20, 21, 22, 2]])
    first, second = (model(src, torch.tensor([[7, 30, last]])) for last in (31, 99))
    assert torch.equal(first[:, :2], second[:, :2])
    assert not torch.equal(first[:, 2], second[:, 2])


def test_greedy_repeats_the_teacher_forced_model(tokenizer: Tokenizer) -> None:
    model = tiny_rnn(tokenizer)
    sources = [[20, 21, 22, 23, 2], [25, 26, 2]]
    found = greedy(model, sources, [7, 8], 6, [0, 1])
    for source, prompt, written in zip(sources, (7, 8), found, strict=True):
        tgt = [prompt]
        for token in written:
            logits = model(torch.tensor([source]), torch.tensor([tgt]))[0, -1]
            logits[[0, 1]] = -torch.inf
            assert int(logits.argmax()) == token
            tgt.append(token)


def test_both_learn_for_the_same_time_and_go_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "shard", tokenizer, pair_texts())
    tasks = tuple(TranslateTask(shard, tokenizer, weights={"": 1.0}, budget=800, noise=0.0) for _ in "12")
    config = fitting_config("translator", tokenizer, max_len=96)
    models = {"RNN": tiny_rnn(tokenizer), "Transformer": build_model(config)}
    options = Options(steps=1, lr=3e-3, warmup=10, decay=0.4)
    trainers = race(models, tokenizer, (tasks[0], tasks[1]), options, 0.004, tmp_path)  # type: ignore[arg-type]
    assert all(t.seconds >= 0.24 for t in trainers.values())
    steps = {kind: trainer.step for kind, trainer in trainers.items()}
    assert all(step > 0 for step in steps.values())
    again = {"RNN": tiny_rnn(tokenizer), "Transformer": build_model(config)}
    resumed = race(again, tokenizer, (tasks[0], tasks[1]), options, 0.0, tmp_path)  # type: ignore[arg-type]
    assert {kind: trainer.step for kind, trainer in resumed.items()} == steps
    for kind, model in again.items():
        texts = translate(model, tokenizer, [en for en, _ in PAIRS[:3]], "ko")  # type: ignore[arg-type]
        assert len(texts) == 3
        ids = decode(model, tokenizer, [[20, 2]], "en", 5, at_least=5)  # type: ignore[arg-type]
        assert [len(row) for row in ids] == [5], kind


def test_spans_cover_every_length() -> None:
    assert spans((5, 10)) == [(0, 5), (5, 10), (10, float("inf"))]


def test_the_command(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"written-daily\tNumber {i} goes home.\t{i}번이 집에 간다.\n" for i in range(150)]
    (tmp_path / "pairs.tsv").write_text("".join(lines), encoding="utf-8")
    for suffix, side in (("eng", 0), ("kor", 1)):
        text = "".join(pair[side] + "\n" for pair in PAIRS[:4])
        (tmp_path / f"dev.{suffix}").write_text(text, encoding="utf-8")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[model]\nd_model = 16\nn_heads = 2\nd_ff = 16\nn_encoder_layers = 1\nn_decoder_layers = 1\n"
        "max_len = 96\ndropout = 0.0\n[rnn]\nd_embedding = 8\nd_state = 8\nd_attention = 8\n"
        "[race]\nminutes = 0.002\nlengths = [4]\n"
        '[data]\npairs = ["pairs.tsv"]\nbatch_tokens = 512\nmax_len = 64\nnoise = 0.0\n'
        "weights = { written = 1.0 }\n[train]\nsteps = 1\n"
    )
    tokenizer.save(tmp_path)
    report = tmp_path / "report.md"
    paths = [
        "--tokenizer",
        tmp_path,
        "--data",
        tmp_path,
        "--run",
        tmp_path / "run",
        "--dev",
        tmp_path / "dev",
    ]
    assert main(["rnn", "--recipe", str(recipe), *map(str, paths), "--report", str(report)]) == 0
    for column in ("RNN: loss", "Transformer: chrF", "RNN: decoding", "processor seconds"):
        assert column in capsys.readouterr().out or column in report.read_text(encoding="utf-8")
