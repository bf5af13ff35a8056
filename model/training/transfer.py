"""Transfer: a model that has been pre-trained gives another one its beginning."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from model.models import CausalLM, Classifier, Translator

TOKENS = "embeddings.tokens.weight"


def start_from_encoder(model: Translator | CausalLM, tensors: Mapping[str, Tensor]) -> int:
    """Copy a masked model's embeddings and layers into a translator's encoder, or a causal model's decoder.

    Without encoder-decoder attention a decoder layer has the very tensors of an encoder layer; that it may
    not look ahead is the mask's business (Rothe et al. 2020). Returns how many tensors were copied; raises
    ValueError when the embeddings do not fit.
    """
    own = dict(model.named_parameters())
    if TOKENS not in tensors or tensors[TOKENS].shape != own[TOKENS].shape:
        raise ValueError("that model's embeddings do not fit: are d_model and the vocabulary equal?")
    target = "encoder." if isinstance(model, Translator) else "decoder."
    copied = 0
    with torch.no_grad():
        for name, tensor in tensors.items():
            renamed = target + name.removeprefix("encoder.") if name.startswith("encoder.") else name
            parameter = own.get(renamed)
            if parameter is not None and parameter.shape == tensor.shape:
                parameter.copy_(tensor)
                copied += 1
    return copied


def take_encoder(model: Classifier, tensors: Mapping[str, Tensor]) -> None:
    """Copy a masked model's embeddings and layers into a classifier; its head stays as it is.

    Raises ValueError on a tensor that is missing or of another shape.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("head."):
                continue
            if name not in tensors or tensors[name].shape != parameter.shape:
                raise ValueError(f"that model has no {name} of shape {tuple(parameter.shape)}")
            parameter.copy_(tensors[name])
