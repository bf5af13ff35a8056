"""Tiny configurations and a few sentences, for tests that need a model of their own."""

from dataclasses import dataclass
from pathlib import Path

from model.config import TransformerConfig
from model.tokenizer import Tokenizer

PAIRS = [
    ("I go home.", "나는 집에 간다."),
    ("The children play in the yard after school.", "아이들은 방과 후에 마당에서 논다."),
    ("She reads a book by the window every evening.", "그녀는 매일 저녁 창가에서 책을 읽는다."),
    ("It rained all day, so we stayed at home.", "하루 종일 비가 와서 우리는 집에 있었다."),
    ("My brother cooks soup when he is tired.", "형은 피곤할 때 국을 끓인다."),
    ("Please close the door quietly.", "문을 조용히 닫아 주세요."),
    ("We bought 3 apples and 12 eggs at the market.", "우리는 시장에서 사과 3개와 달걀 12개를 샀다."),
    ("The old dog sleeps under the table.", "늙은 개가 식탁 밑에서 잔다."),
    ("Where did you put my keys?", "내 열쇠를 어디에 두었니?"),
    ("The train to the sea leaves at seven.", "바다로 가는 기차는 일곱 시에 떠난다."),
    ("He doesn't drink coffee in the afternoon.", "그는 오후에 커피를 마시지 않는다."),
    ("Snow covered the mountain last night.", "어젯밤 눈이 산을 덮었다."),
]


@dataclass(frozen=True)
class TinyFolders:
    """Checkpoint folders of untrained models with one tokenizer."""

    translate: Path
    fill_mask: Path
    generate: Path


def tiny_config(architecture: str, **changes: object) -> TransformerConfig:
    """Two layers, 32 wide, 4 heads, 40 tokens; `changes` override."""
    values: dict[str, object] = {
        "architecture": architecture,
        "vocab_size": 40,
        "d_model": 32,
        "n_heads": 4,
        "d_ff": 48,
        "n_encoder_layers": 0 if architecture == "causal_lm" else 2,
        "n_decoder_layers": 0 if architecture == "masked_lm" else 2,
        "max_len": 64,
        "dropout": 0.0,
        "n_segments": 2 if architecture == "masked_lm" else 0,
    }
    return TransformerConfig.from_dict(values | changes)


def fitting_config(architecture: str, tokenizer: Tokenizer, **changes: object) -> TransformerConfig:
    """`tiny_config` with a tokenizer's vocabulary and special tokens."""
    names = ("vocab_size", "pad_id", "bos_id", "eos_id", "mask_id", "cls_id", "sep_id")
    ids = {name: getattr(tokenizer, name) for name in names}
    languages = tokenizer.languages if architecture == "translator" else {}
    return tiny_config(architecture, languages=languages, **ids, **changes)
