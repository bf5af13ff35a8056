"""What is measured: models of given shapes, and the same inputs for whoever takes part."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from model import checkpoint
from model.config import TransformerConfig
from model.models import build_model
from model.tokenizer import SPECIAL_TOKENS, Tokenizer

_LOUDER = 64.0

# Sizes with which a command can be tried out in seconds.
TINY: dict[str, object] = {"vocab_size": 400, "d_model": 32, "n_heads": 4, "d_ff": 64}

SHIPPED = {"generate": Path("weights/generate"), "translate": Path("weights/translate")}

_SENTENCES = (
    "The woman at the station asked me where the bus to the museum stops.",
    "My brother bought two apples and a loaf of bread on his way home.",
    "After the rain the children went out to play in the yard again.",
    "Our teacher said that the meeting would begin at nine in the morning.",
    "The old man sat by the window and read a letter from his daughter.",
    "We took the last train because the road over the mountain was closed.",
    "She opened the box, looked inside and put it back under the bed.",
    "Nobody knew why the shop had been dark since the end of summer.",
)


@dataclass(frozen=True)
class Case:
    """One measurement: prompts of equal length, and how many tokens follow each of them, no fewer."""

    task: str  # generate: greedy; translate: beam search
    prompts: list[list[int]]
    n_new: int
    num_beams: int = 1

    @property
    def n_tokens(self) -> int:
        """Tokens that come out."""
        return len(self.prompts) * self.n_new


def decoder_config(**changes: object) -> TransformerConfig:
    """GPT-2's sizes at 8 layers, 512 wide, 32k pieces, in this project's parts (rotary, pre-norm, GELU)."""
    values: dict[str, object] = {
        "architecture": "causal_lm",
        "vocab_size": 32_000,
        "d_model": 512,
        "n_heads": 8,
        "d_ff": 2048,
        "n_decoder_layers": 8,
        "max_len": 512,
        "dropout": 0.0,
        "positions": "rotary",
    }
    return TransformerConfig.from_dict(values | changes)


def translator_config(**changes: object) -> TransformerConfig:
    """Marian's shape: 6 + 6 layers, 512 wide, post-norm, SiLU, sinusoids, 16k pieces."""
    values: dict[str, object] = {
        "architecture": "translator",
        "vocab_size": 16_000,
        "d_model": 512,
        "n_heads": 8,
        "d_ff": 2048,
        "n_encoder_layers": 6,
        "n_decoder_layers": 6,
        "max_len": 256,
        "dropout": 0.0,
        "norm_first": False,
        "activation": "silu",
    }
    return TransformerConfig.from_dict(values | changes)


def filler_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly so many pieces: the special ones, the bytes, and pairs of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*SPECIAL_TOKENS, *alphabet]
    n_pairs = vocab_size - len(names)
    if not 0 <= n_pairs <= len(alphabet) ** 2:
        raise ValueError(f"vocab_size {vocab_size} is not in {len(names)}..{len(names) + len(alphabet) ** 2}")
    pairs = [(left, right) for left in alphabet for right in alphabet][:n_pairs]
    vocabulary = {name: i for i, name in enumerate([*names, *(a + b for a, b in pairs)])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=pairs))
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def make_folder(folder: Path, config: TransformerConfig, seed: int = 0) -> Path:
    """A loadable folder of random weights in which no special token is ever the likeliest."""
    torch.manual_seed(seed)
    tokenizer = filler_tokenizer(config.vocab_size)
    model = build_model(config)
    with torch.no_grad():
        # The service never generates a special token, its peers would have to be told: a zero row has the
        # logit 0, which no maximum over thousands of random ones is.
        model.embeddings.tokens.weight[sorted(tokenizer.special_ids)] = 0.0
        for name, weight in model.named_parameters():
            # Else the last token's embedding, which is also the output's, outweighs what the blocks add, and
            # every model says the last token again for ever.
            if name.endswith("down.weight"):
                weight.mul_(_LOUDER)
    checkpoint.save(folder, model, tokenizer, dtype=torch.float32)
    return folder


def make_endless(source: Path, folder: Path) -> Path:
    """A copy of a folder in which no generation ends before its length: the end token's row is zero."""
    folder.mkdir(parents=True)
    for name in (checkpoint.CONFIG, checkpoint.TOKENIZER):
        shutil.copyfile(source / name, folder / name)
    tensors = load_file(source / checkpoint.WEIGHTS)
    tensors["embeddings.tokens.weight"][checkpoint.load_config(source).eos_id] = 0.0
    save_file(tensors, folder / checkpoint.WEIGHTS, metadata={"format": "pt"})
    return folder


def random_prompts(vocab_size: int, n: int, length: int, seed: int = 1) -> list[list[int]]:
    """Ordinary pieces, each prompt different."""
    rng = random.Random(seed)
    return [[rng.randrange(len(SPECIAL_TOKENS), vocab_size) for _ in range(length)] for _ in range(n)]


def text_prompts(tokenizer: Tokenizer, n: int, length: int, seed: int = 1) -> list[list[int]]:
    """Running English text, each prompt from another order of the sentences."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(n):
        ids: list[int] = []
        while len(ids) < length:
            ids += tokenizer.encode(" ".join(rng.sample(_SENTENCES, len(_SENTENCES))))
        prompts.append(ids[:length])
    return prompts


def make_case(task: str, folder: Path, n: int, length: int, n_new: int, *, text: bool) -> Case:
    """`n` inputs of `length` tokens for the model in a folder; beam 4 for translation."""
    tokenizer = Tokenizer.load(folder)
    n_ends = 0 if task == "generate" else 3  # tag, language, end
    if text:
        prompts = text_prompts(tokenizer, n, length - n_ends)
    else:
        prompts = random_prompts(tokenizer.vocab_size, n, length - n_ends)
    if task == "generate":
        return Case(task, prompts, n_new)
    return Case(task, [tokenizer.source_ids(ids, "ko") for ids in prompts], n_new, num_beams=4)
