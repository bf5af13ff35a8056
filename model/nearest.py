"""Nearest-neighbour translation: what the decoder did in translations that are known helps it in this one.

Khandelwal et al. 2021, "Nearest Neighbor Machine Translation": the decoder is led through examples, and each
of its states there is kept with the token that followed. While it translates, the states nearest to its own
say which token may come next, and their word is mixed with the model's. As in Dai et al. 2023, "Simple and
Scalable Nearest Neighbor Machine Translation", only a few examples that are like the sentence are read, for
each sentence anew, and what they count falls with their distance: far from all the model speaks alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.block import WeightsTap
from model.examples import Example, Examples, numbers_of
from model.languages import iso_code
from model.models import Translator
from model.tokenizer import Tokenizer
from model.transfer import padded

_MOST_NEAR = 8  # states that have a say
_THE_SAME = 0.999  # likeness of a text that is known
# Of examples that are read for a sentence: how many, and how much like it at least.
_MOST_EXAMPLES, _LEAST_LIKENESS = 4, 0.5


class ExampleIds(NamedTuple):
    """An example in tokens: the encoder's input, and the decoder's, from its first token to the end token.

    `likeness`, 0 to 1, is how much it is like the sentence that is translated. One with other numbers than
    this has no say where a digit is to come.
    """

    source: list[int]
    target: list[int]
    likeness: float = 1.0
    has_other_numbers: bool = False


class Datastore(NamedTuple):
    """States of the decoder, keys (N, D), what followed each, values (N,), and how much they count.

    offsets (N,) are added to the distances: whatever its states, an example that is little like the sentence
    is far away. Where speaks (N,) is False the model has the say of a state, rather than one farther off.
    """

    keys: Tensor
    values: Tensor
    offsets: Tensor
    speaks: Tensor
    weight: float
    reach: float
    temperature: float

    def mix(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """logits (R, V) of the states hidden (R, D) -> log-probabilities (R, V), of which examples are part.

        What is impossible stays so. A distance is the mean of the squared differences of two states.
        """
        # Row by row, so that no product's rounding hangs on the number of rows.
        distances = (hidden.float()[:, None] - self.keys).pow(2).mean(-1) + self.offsets
        near, places = distances.topk(min(_MOST_NEAR, len(self.keys)), largest=False)
        share = self.weight * (1 - near[:, :1] / self.reach).clamp(min=0.0)
        tokens = self.values[places]
        votes = (-near / self.temperature).softmax(-1) * self.speaks[places]
        # What all states say for a token stands at each of those that say it.
        said = ((tokens[:, :, None] == tokens[:, None]) * votes[:, None]).sum(-1)
        mixed = logits.log_softmax(-1).add_((1 - share * votes.sum(-1, keepdim=True)).log())
        own = mixed.gather(1, tokens)
        both = (own.exp() + share * said).log().masked_fill(own == -torch.inf, -torch.inf)
        return mixed.scatter_(1, tokens, both)


def find_examples(examples: Examples, text: str, src: str, tgt: str) -> list[Example]:
    """Those that are read for a text between two languages of the model's names for them."""
    return examples.find(text, iso_code(src), iso_code(tgt), _MOST_EXAMPLES, _LEAST_LIKENESS)


def example_ids(
    found: Iterable[Example], text: str, tokenizer: Tokenizer, src: str, tgt: str, max_len: int
) -> list[tuple[Example, ExampleIds]]:
    """Examples that were found for a text, with their tokens, but for those of more than max_len a side."""
    begin, numbers = tokenizer.target_ids(tgt), numbers_of(text)
    pairs = []
    for example in found:
        source = tokenizer.source_ids(tokenizer.encode(example.source), tgt, src_lang=src)
        target = [*begin, *tokenizer.encode(example.target), tokenizer.eos_id]
        if max(len(source), len(target)) <= max_len:
            given, made = numbers_of(example.source), numbers_of(example.target)
            # "at six" becomes digits, too: they are its own unless the text is the same.
            wary = given != numbers or (given != made and example.likeness < _THE_SAME)
            pairs.append((example, ExampleIds(source, target, example.likeness, wary)))
    return pairs


@torch.no_grad()
def read_examples(
    model: Translator,
    source: Sequence[int],
    examples: Sequence[ExampleIds],
    weight: float,
    digit_ids: Iterable[int] = (),
) -> Datastore | None:
    """Lead the decoder through a sentence's examples; None where there are none. `source` is what the encoder
    reads of the sentence.

    Without a say are states that look most at a token which the sentence has not (the last layer's attention,
    the mean over its heads), and those before digits in examples with other numbers.
    """
    if not examples or not weight:
        return None
    config, device = model.config, model.embeddings.tokens.weight.device
    # Several translations of one text are usual: it is encoded once.
    place = {text: n for n, text in enumerate(dict.fromkeys(tuple(e.source) for e in examples))}
    rows = torch.tensor([place[tuple(example.source)] for example in examples], device=device)
    sources = padded([*place], config.pad_id, device)
    targets = padded([example.target for example in examples], config.pad_id, device)
    memory, mask = model.encode(sources)
    with WeightsTap(model.decoder) as tap:
        hidden = model.decode(targets[:, :-1], memory[rows], mask[rows])
    *_, last = (name for name in tap.weights if name.endswith("cross_attention"))
    looked_at = sources[rows].gather(1, tap.weights[last][0].mean(1).argmax(-1))
    values = targets[:, 1:]
    counted = (values != config.pad_id) & hidden.isfinite().all(-1)
    speaks = torch.isin(looked_at, torch.tensor([*source], device=device))
    wary = torch.tensor([example.has_other_numbers for example in examples], device=device)
    speaks &= ~(wary[:, None] & torch.isin(values, torch.tensor([*digit_ids], device=device)))
    if not bool((counted & speaks).any()):
        return None
    unlike = torch.tensor([1 - example.likeness for example in examples], device=device)
    offsets = (config.example_offset * unlike)[:, None].expand(counted.shape)
    return Datastore(
        hidden[counted].float(),
        values[counted],
        offsets[counted],
        speaks[counted],
        weight,
        config.example_reach,
        config.example_temperature,
    )
