"""The fast beam search of `evaluate` equals the oracle."""

import pytest
import torch

from model.decoding import beam_search, translator_scorer
from model.models import Translator, build_model
from model.sampling import BeamParams
from model.training.translate_batch import BeamTranslator, by_length
from tests.tiny import tiny_config

SOURCES = [[6 + n % 2, *range(8 + n, 9 + n + n % 5), 2] for n in range(12)]
PROMPTS = [6 + n % 2 for n in range(12)]
PARAMS = {
    "greedy": BeamParams(1, max_new_tokens=12),
    "beams": BeamParams(4, 4, max_new_tokens=12),
    "long": BeamParams(3, 2, max_new_tokens=20, length_penalty=2.0, min_new_tokens=5),
    "short": BeamParams(3, 3, max_new_tokens=5, length_penalty=0.0),
    "guarded": BeamParams(3, 3, max_new_tokens=14, no_repeat_ngram_size=2, repetition_penalty=1.4),
    "more beams than tokens": BeamParams(30, 30, max_new_tokens=4),
}


def make_model(positions: str) -> Translator:
    torch.manual_seed(18)
    model = build_model(tiny_config("translator", positions=positions, n_kv_heads=2)).eval()
    assert isinstance(model, Translator)
    with torch.no_grad():
        for parameter in model.decoder.blocks.parameters():
            parameter.mul_(3.0)  # or the tied output says its input again and again, and nothing ends
        model.embeddings.tokens.weight[2] *= 2.0
    return model


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary"])
@pytest.mark.parametrize("kind", PARAMS)
def test_equals_the_oracle(kind: str, positions: str) -> None:
    model, params, suppress = make_model(positions), PARAMS[kind], [0, 1, 3, 4, 5]
    expected = beam_search(
        translator_scorer(model, SOURCES), [[p] for p in PROMPTS], 2, params, suppress=suppress
    )
    found = BeamTranslator(model, params, suppress).search(SOURCES, PROMPTS)
    assert kind != "beams" or len({len(best.token_ids) for best, *_ in expected if best.finished}) > 2
    for ours, theirs in zip(found, expected, strict=True):
        assert [(d.token_ids, d.finished) for d in ours] == [(d.token_ids, d.finished) for d in theirs]
        assert [d.score for d in ours] == pytest.approx([d.score for d in theirs], abs=1e-4)


def test_by_length() -> None:
    batches = list(by_length([[1] * n for n in (5, 1, 9, 3, 7)], 2))
    assert batches == [[1, 3], [0, 4], [2]]
