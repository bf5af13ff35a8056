"""The reference library, imported here and nowhere else, and tiny random checkpoints made by it."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder must fail, not look for a network

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

N_CONTEXT = 64
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
ENDS = {"bos_token_id": 0, "eos_token_id": 2}
GPT = ENDS | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": N_CONTEXT}
ROPE = ENDS | {"max_position_embeddings": N_CONTEXT}


@dataclass(frozen=True)
class Case:
    """A class of the library, and the configuration of a tiny model of it."""

    model: str
    config: str
    values: dict[str, Any] = field(default_factory=dict)

    def make(self, vocab_size: int, **changes: Any) -> Any:
        """A model with random weights, large enough that what it says hangs on all that stands before."""
        torch.manual_seed(5)
        config = getattr(transformers, self.config)(**{**self.values, "vocab_size": vocab_size, **changes})
        model = getattr(transformers, self.model)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and "embed_positions" not in name:
                    parameter.mul_(20.0 if parameter.shape[0] != vocab_size else 10.0)
                elif parameter.dim() == 1:  # norms and biases, which begin as ones and zeros
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model


DECODERS = {
    "gpt2": Case("GPT2LMHeadModel", "GPT2Config", GPT),
    "gpt2-relu": Case(
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT | {"n_inner": 40, "activation_function": "relu"},
    ),
    "llama": Case("LlamaForCausalLM", "LlamaConfig", SMALL | ROPE),
    "llama-biased-tied": Case(
        "LlamaForCausalLM",
        "LlamaConfig",
        SMALL
        | ROPE
        | {
            "num_key_value_heads": 2,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "head_dim": 6,
        },
    ),
    "llama-llama3": Case(
        "LlamaForCausalLM",
        "LlamaConfig",
        SMALL
        | ROPE
        | {
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama-linear": Case(
        "LlamaForCausalLM",
        "LlamaConfig",
        SMALL | ROPE | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama-yarn": Case(
        "LlamaForCausalLM",
        "LlamaConfig",
        SMALL
        | ROPE
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4.0,
            }
        },
    ),
    "mistral": Case(
        "MistralForCausalLM", "MistralConfig", SMALL | ROPE | {"num_key_value_heads": 2, "sliding_window": 9}
    ),
    "mistral-full": Case(
        "MistralForCausalLM",
        "MistralConfig",
        SMALL | ROPE | {"num_key_value_heads": 2, "sliding_window": None},
    ),
    "qwen2": Case(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        SMALL | ROPE | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "qwen2-window": Case(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        SMALL
        | ROPE
        | {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": Case(
        "Qwen3ForCausalLM", "Qwen3Config", SMALL | ROPE | {"num_key_value_heads": 2, "head_dim": 12}
    ),
}


def save(model: Any, folder: Path, **options: Any) -> None:
    """As the library lays a checkpoint out."""
    model.save_pretrained(folder, **options)


def read_exported(name: str, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """A model of the library's class of this name, its tokenizer, and what its loading found amiss."""
    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    amiss = {key: value for key, value in report.items() if value}
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder), amiss


def read_tokenizer(name: str, folder: Path) -> Any:
    """A tokenizer of the library's class of this name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a package that it would like to have
        return getattr(transformers, name).from_pretrained(folder)


ENCODER = SMALL | {"max_position_embeddings": N_CONTEXT}
ROBERTA = SMALL | {"max_position_embeddings": N_CONTEXT + 2, "type_vocab_size": 1, "pad_token_id": 1}
DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": N_CONTEXT}
MASKED = {
    "bert": Case("BertForMaskedLM", "BertConfig", ENCODER),
    "bert-both": Case("BertForPreTraining", "BertConfig", ENCODER | {"hidden_act": "gelu_new"}),
    "roberta": Case("RobertaForMaskedLM", "RobertaConfig", ROBERTA),
    "xlm-roberta": Case("XLMRobertaForMaskedLM", "XLMRobertaConfig", ROBERTA),
    "distilbert": Case("DistilBertForMaskedLM", "DistilBertConfig", DISTIL),
}
BART = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": N_CONTEXT,
    "scale_embedding": True,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "bos_token_id": 0,
    "decoder_start_token_id": 2,
}
TRANSLATORS = {
    "marian": Case(
        "MarianMTModel", "MarianConfig", BART | {"activation_function": "swish", "decoder_start_token_id": 1}
    ),
    "m2m100": Case("M2M100ForConditionalGeneration", "M2M100Config", BART | {"activation_function": "relu"}),
    "mbart": Case("MBartForConditionalGeneration", "MBartConfig", BART),
}

LABELS = {"id2label": {0: "bad", 1: "so-so", 2: "good"}, "label2id": {"bad": 0, "so-so": 1, "good": 2}}
CLASSIFIERS = {
    "bert-classes": Case("BertForSequenceClassification", "BertConfig", ENCODER | LABELS),
    "roberta-classes": Case("RobertaForSequenceClassification", "RobertaConfig", ROBERTA | LABELS),
    "xlm-roberta-classes": Case("XLMRobertaForSequenceClassification", "XLMRobertaConfig", ROBERTA | LABELS),
    "distilbert-classes": Case("DistilBertForSequenceClassification", "DistilBertConfig", DISTIL | LABELS),
}
PAIRS = {"bert-next": Case("BertForNextSentencePrediction", "BertConfig", ENCODER)}
CASES = DECODERS | MASKED | TRANSLATORS | CLASSIFIERS | PAIRS
