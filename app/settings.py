"""Every setting, with its bound: environment (TRANSFORMER_*), `.env`, or the command line."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "TRANSFORMER_"

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


# The first of each pair must not be above the second.
_ORDER = (
    ("default_new_tokens", "max_new_tokens"),
    ("default_beams", "max_beams"),
    ("max_beams", "translate_slots"),
)


def _as_text(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _check_folders(value: str) -> str:
    named_folders(value)
    return value


ENV_FILE = ".env"

# A folder, or several with the names that requests choose by; `named_folders` reads it.
Folders = Annotated[str, BeforeValidator(_as_text), AfterValidator(_check_folders)]


def named_folders(value: str) -> list[tuple[str | None, Path]]:
    """name=folder,... in its order; a plain folder has no name but its own, and nothing is none.

    Raises ValueError.
    """
    if not value.strip():
        return []
    if "=" not in value:
        return [(None, Path(value))]
    pairs: list[tuple[str | None, Path]] = []
    for part in value.split(","):
        name, equals, folder = (text.strip() for text in part.partition("="))
        if not (equals and folder):
            raise ValueError(f"{part.strip()!r} is not name=folder")
        check_name(name)
        if name in dict(pairs):
            raise ValueError(f"the name {name!r} stands twice")
        pairs.append((name, Path(folder)))
    return pairs


def check_name(name: str) -> None:
    """Raises ValueError for what could not stand in a path or a label."""
    if not _MODEL_NAME.fullmatch(name):
        raise ValueError(
            f"the name {name[:80]!r} must be 1 to 64 letters, digits, dots, dashes or underscores, "
            "the first a letter or a digit"
        )


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


class Settings(BaseSettings):
    """Serve the models over HTTP: translation, fill-mask, generation.

    Each setting is read from the command line, else from the environment (TRANSFORMER_PORT for --port), else
    from the file .env. A value out of bounds ends the start with a message that names it.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=ENV_FILE,
        env_file_encoding="utf-8",
        extra="ignore",
        frozen=True,
        allow_inf_nan=False,
        cli_prog_name="python -m app",
        cli_kebab_case=True,
        cli_hide_none_type=True,
    )

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    max_connections: int = Field(
        1000, ge=1, le=100_000, description="open connections; above it only probes are answered"
    )
    cors_origins: str = Field(
        "", description="origins whose pages may call, parted by spaces, or *; empty: none"
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = Field(
        "info", description="least level of the log"
    )

    api_keys_file: Path | None = Field(
        None, description="file of API keys, a line each; see docs/operations.md"
    )
    api_keys: str | None = Field(None, description="API keys as in the file, lines parted by semicolons")
    open_metrics: bool = Field(False, description="/metrics needs no key, where the others do")
    open_docs: bool = Field(True, description="/docs and /openapi.json need no key, where the others do")
    key_requests: int = Field(
        0, ge=0, le=1_000_000, description="requests a minute of one key; 0: as many as it likes"
    )
    key_characters: int = Field(
        0, ge=0, le=1_000_000_000, description="characters a minute of one key; 0: as many as it likes"
    )

    translate_model: Folders = Field(
        "weights/translate",
        description="folder of the translation model; or several, name=folder,name=folder, the first the "
        "default (as for the others)",
    )
    fill_mask_model: Folders = Field(
        "weights/fill-mask", description="folder of the masked model (fill-mask, next-sentence)"
    )
    generate_model: Folders = Field("weights/generate", description="folder of the generation model")
    classify_model: Folders = Field("weights/classify", description="folder of the classifier")
    model_roots: str = Field(
        "weights", description="folders under which the admin route may load models, with commas between"
    )
    max_models: int = Field(8, ge=1, le=1000, description="models of one endpoint at a time")
    max_model_bytes: int = Field(
        0,
        ge=0,
        le=2**50,
        description="device memory of all models with their caches; 0: what is free when one is loaded",
    )

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the models run; auto: cuda if there"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="number format of the weights; auto: float32 on cpu, bfloat16 on cuda"
    )
    quantization: Literal["auto", "none", "int8"] = Field(
        "auto",
        description="weights in 8 bits, on the CPU alone; auto: int8 on cpu in float32 for models trained "
        "here, none for those that others made",
    )
    compile_kernels: bool = Field(
        True, description="kernels in C for the CPU, compiled at the start where a compiler is; else torch's"
    )
    use_round_trip: bool = Field(
        True,
        description="order a translation's hypotheses by how likely they make its source, too, where its "
        "model wants it and no request says otherwise; with many clients throughput falls to less than half",
    )
    examples: str = Field(
        "model/training/texts",
        description="known translations: files NAME.en-ko.tsv (or .tsv.xz; a line holds a text, a tab, its "
        "translation), or folders of such, with commas between; a sentence that is like some of them is "
        "translated after their example, a mask filled after what stands there in them; empty: none",
    )
    cache_dir: Path = Field(
        Path("~/.cache/transformer-server"),
        description="folder where the index of the examples is kept between starts",
    )
    use_shortlist: bool = Field(
        True,
        description="in 8 bits on the CPU, with kernels, choose a translation's tokens among those that the "
        "model's shortlist names for its source, where it has one; else among all",
    )
    n_threads: int = Field(
        0, ge=0, le=1024, description="threads of one model step on the CPU; 0: all cores but one"
    )

    translate_slots: int = Field(
        128,
        ge=1,
        le=4096,
        description="rows (beams) that translate at once; unless given, down to a quarter where memory is "
        "short, and on cuda as many more as it holds",
    )
    generate_slots: int = Field(
        32,
        ge=1,
        le=4096,
        description="rows that generate at once; unless given, down to half where memory is short, "
        "on cuda as translate_slots",
    )
    max_slots: int = Field(
        256, ge=1, le=4096, description="rows of a model at most, where memory says how many"
    )
    gpu_memory_utilization: float = Field(
        0.9, ge=0.1, le=1.0, description="share of a GPU's memory that rows may fill up, weights included"
    )
    max_context: int = Field(
        4096,
        ge=0,
        le=10_000_000,
        description="tokens that a row holds, prompt and output; 0: what a model can",
    )
    prefill_tokens: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="prompt tokens taken in by one step; 0: 512 on cpu, 2048 on cuda",
    )
    chunk_tokens: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="tokens of a prompt taken in by a step while others generate; 0: 64 on cpu, 512 on cuda",
    )
    launch_ahead: Literal["auto", "on", "off"] = Field(
        "auto",
        description="a generation step is launched before the tokens of the last are read; auto: on cuda",
    )
    prefix_tokens: int = Field(
        4096,
        ge=0,
        le=100_000_000,
        description="tokens of prompts that are kept for prompts that begin with the same; 0: none",
    )
    max_batch_tokens: int = Field(
        0,
        ge=0,
        le=10_000_000,
        description="padded tokens of one fill-mask batch; 0: 512 on cpu, 8192 on cuda",
    )
    max_queue_items: int = Field(512, ge=1, le=1_000_000, description="items that may wait, each model")
    max_queue_tokens: int = Field(65536, ge=1, le=100_000_000, description="tokens that may wait, each model")

    max_wait_seconds: PositiveFloat = Field(
        30.0, le=3600.0, description="estimated time in the queue; above it a request is refused, too"
    )

    max_body_bytes: int = Field(4_194_304, ge=1024, le=1_073_741_824, description="bytes of a request's body")
    max_json_depth: int = Field(32, ge=4, le=200, description="lists and objects within each other in a body")
    max_json_items: int = Field(
        200_000, ge=100, le=100_000_000, description="commas and brackets of a JSON body"
    )
    max_texts: int = Field(64, ge=1, le=100_000, description="texts in one request")
    max_text_chars: int = Field(20_000, ge=1, le=10_000_000, description="characters of one text")
    max_tokenize_chars: int = Field(
        20_000, ge=1, le=10_000_000, description="characters of all texts of one tokenize request"
    )
    default_new_tokens: PositiveInt = Field(
        20, le=100_000, description="tokens generated when none are asked for"
    )
    max_new_tokens: PositiveInt = Field(1024, le=100_000, description="new tokens that may be asked for")
    default_beams: int = Field(4, ge=1, le=64, description="beams of a translation when none are asked for")
    max_beams: int = Field(8, ge=1, le=64, description="beams that may be asked for")
    max_length_penalty: PositiveFloat = Field(5.0, le=100.0, description="length penalty, either sign")
    max_ngram_size: int = Field(16, ge=0, le=1000, description="no_repeat_ngram_size")
    max_repetition_penalty: float = Field(
        10.0, ge=1.0, le=1000.0, description="repetition penalty; the least is one over it"
    )
    max_frequency_penalty: float = Field(
        2.0, ge=0.0, le=1000.0, description="frequency and presence penalty, either sign"
    )
    min_temperature: PositiveFloat = Field(
        0.01, le=1.0, description="least temperature above 0 (0 is greedy)"
    )
    max_temperature: float = Field(100.0, ge=1.0, le=10_000.0, description="greatest temperature")
    max_top_k: int = Field(1000, ge=1, le=1_000_000, description="top_k, in generation and fill-mask")
    max_top_n_tokens: int = Field(5, ge=0, le=100, description="top_n_tokens")
    max_best_of: int = Field(4, ge=1, le=64, description="best_of, and n of completions")
    max_logit_biases: int = Field(300, ge=0, le=100_000, description="tokens of a logit_bias")
    max_seed: int = Field(2**63 - 1, ge=0, le=2**63 - 1, description="seed")
    max_stops: int = Field(16, ge=0, le=1000, description="stop strings of one request")
    max_stop_chars: int = Field(256, ge=1, le=100_000, description="characters of one stop string")
    max_terms: int = Field(64, ge=0, le=10_000, description="terms of a glossary, and of do_not_translate")
    max_term_chars: int = Field(100, ge=1, le=10_000, description="characters of a term or its translation")
    max_targets: int = Field(256, ge=1, le=100_000, description="targets of a fill-mask request")
    max_masks: int = Field(64, ge=1, le=10_000, description="masks in one text")
    max_fillings: int = Field(
        4096, ge=1, le=10_000_000, description="fillings in one answer: of all masks of all texts"
    )

    timeout_seconds: PositiveFloat = Field(120.0, le=86_400.0, description="a request's time; then 504")
    receive_seconds: PositiveFloat = Field(
        20.0,
        le=3600.0,
        description="time for a request's head to arrive (then the connection ends), and for its body (408)",
    )
    read_seconds: PositiveFloat = Field(
        30.0, le=3600.0, description="time that a client may let an answer wait unread; then it is cut off"
    )
    stall_seconds: float = Field(
        60.0, ge=1.0, le=3600.0, description="a model step that takes longer means that the device hangs"
    )
    shutdown_seconds: float = Field(30.0, ge=0.0, le=3600.0, description="grace period for accepted work")

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        for low, high in _ORDER:
            value, limit = getattr(self, low), getattr(self, high)
            if value > limit:
                raise ValueError(f"{low} is {value}, it must not be above {high}, which is {limit}")
        if self.api_keys_file is None and self.api_keys is None:
            for name in ("key_requests", "key_characters"):
                if getattr(self, name):
                    raise ValueError(f"{name} is {getattr(self, name)}, but there are no keys to limit")
        return self


def is_given(settings: Settings, name: str) -> bool:
    """Was the setting given, rather than left at its default?"""
    return name in settings.model_fields_set


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """Names with our prefix that are no setting: misspelled, as a rule."""
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    return sorted(name for name in environment if name.startswith(PREFIX) and name.upper() not in known)


def settings_table() -> str:
    """All settings as a markdown table, for the README."""
    lines = ["| variable | command line | default | what |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        default = field.default
        lines.append(f"| `{PREFIX}{name.upper()}` | `{flag}` | `{default}` | {field.description} |")
    return "\n".join(lines) + "\n"
