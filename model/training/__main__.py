"""`python -m model.training COMMAND`: tokenizer, translate, masked, causal, rnn, classify, evaluate,
average, back-translate, score-pairs, shortlist.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import tomllib
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from model import checkpoint
from model.config import TransformerConfig
from model.models import CausalLM, Translator, build_model
from model.tokenizer import Tokenizer
from model.training import prepare
from model.training.average import add_average_arguments, average_command
from model.training.back_translate import add_back_translate_arguments, back_translate_command
from model.training.batches import WIDTH_STEP, weight_of
from model.training.causal import CausalTask
from model.training.classify import add_classify_arguments, classify_command
from model.training.evaluate import add_evaluate_arguments, evaluate_command
from model.training.extend import add_extend_arguments, extend_command
from model.training.loop import Options, Trainer
from model.training.masked import MaskedTask
from model.training.packs import PackError, find_pack
from model.training.rnn_race import add_rnn_arguments, rnn_command
from model.training.score_pairs import add_score_pairs_arguments, score_pairs_command
from model.training.shards import Shard, write_shard
from model.training.shortlist import add_shortlist_arguments, shortlist_command
from model.training.transfer import start_from_encoder
from model.training.translate import TranslateTask

COMMANDS = {
    "average": average_command,
    "back-translate": back_translate_command,
    "classify": classify_command,
    "evaluate": evaluate_command,
    "extend": extend_command,
    "score-pairs": score_pairs_command,
}
ARCHITECTURES = {
    "translate": "translator",
    "masked": "masked_lm",
    "causal": "causal_lm",
    "rnn": "translator",
    "shortlist": "translator",
}

HELP = {
    "rnn": "train a recurrent translator beside a Transformer, and compare",
    "shortlist": "write beside a translator what its tokens may become",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    if arguments.command in COMMANDS:
        return COMMANDS[arguments.command](arguments)
    try:
        return _tokenizer(arguments) if arguments.command == "tokenizer" else _train(arguments)
    except PackError as error:
        print(f"{arguments.command}: {error}")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m model.training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    tokenizer = commands.add_parser("tokenizer", help="learn the shared tokenizer")
    tokenizer.add_argument("--pairs", type=Path, nargs="*", default=[])
    tokenizer.add_argument("--documents", type=Path, nargs="*", default=[])
    tokenizer.add_argument("--vocab-size", type=int, default=16_000)
    tokenizer.add_argument("--megabytes", type=float, default=40, help="of each document pack")
    tokenizer.add_argument("--out", type=Path, required=True, help="folder for tokenizer.json")
    for command in ARCHITECTURES:
        train = commands.add_parser(command, help=HELP.get(command, f"train a {ARCHITECTURES[command]}"))
        train.add_argument("--recipe", type=Path, required=True, help="TOML with [model], [data], [train]")
        train.add_argument("--tokenizer", type=Path, required=True)
        train.add_argument("--data", type=Path, required=True, help="folder that holds the packs")
        train.add_argument("--run", type=Path, required=True, help="folder for shards, checkpoint, model")
        train.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="override the recipe, in TOML: steps=100 or data.batch_tokens=1024",
        )
        train.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
        if command == "rnn":
            add_rnn_arguments(train)
            continue
        if command == "shortlist":
            add_shortlist_arguments(train)
            continue
        train.add_argument("--continue-from", type=Path, help="begin with this model folder's weights")
        if command != "masked":
            train.add_argument("--start-from", type=Path, help="a masked model's folder: take its encoder")
    add_classify_arguments(commands.add_parser("classify", help="teach a masked model's encoder labels"))
    add_average_arguments(commands.add_parser("average", help="one model out of several"))
    add_extend_arguments(commands.add_parser("extend", help="whole words for a mask to be filled with"))
    add_back_translate_arguments(commands.add_parser("back-translate", help="pairs out of text"))
    add_score_pairs_arguments(
        commands.add_parser("score-pairs", help="drop the pairs that a model finds absurd")
    )
    add_evaluate_arguments(commands.add_parser("evaluate", help="measure a model and write its card"))
    return parser


def _tokenizer(arguments: argparse.Namespace) -> int:
    if not arguments.pairs and not arguments.documents:
        print("tokenizer: no packs: --pairs and --documents name them; make takes DATA/*.tsv and DATA/*.txt,")
        print("with .xz behind them or not, where the path of DATA holds no space")
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = prepare.train_tokenizer(
        arguments.pairs, arguments.documents, arguments.vocab_size, arguments.megabytes
    )
    tokenizer.save(arguments.out)
    print(f"{tokenizer.vocab_size} pieces -> {arguments.out / 'tokenizer.json'}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for path in (arguments.recipe, arguments.tokenizer):
        if not path.exists():
            raise SystemExit(f"not there: {path} (tokenizers come from `make train-tokenizer`)")
    recipe = read_recipe(arguments.recipe, arguments.set)
    tokenizer = Tokenizer.load(arguments.tokenizer)
    if arguments.command == "shortlist":
        task = make_task(arguments, recipe["data"], tokenizer, 0, held=False)
        assert isinstance(task, TranslateTask)
        print(shortlist_command(arguments, task, tokenizer))
        return 0
    options = _options(recipe["train"])
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("[train] device: the recipe wants CUDA, which is not here (--set 'device=\"cpu\"')")
    config = model_config(arguments.command, recipe["model"], tokenizer)
    task, held = (
        make_task(arguments, recipe["data"], tokenizer, options.seed, held=h) for h in (False, True)
    )
    if isinstance(task, TranslateTask) and isinstance(held, TranslateTask) and arguments.command == "rnn":
        print(rnn_command(arguments, recipe, tokenizer, config, (task, held), options))
        return 0
    if not (n_batches := len(task.batches(0))):
        raise SystemExit(
            f"{arguments.data}: what {arguments.recipe} takes of its packs does not fill one batch "
            f"(--set data.batch_tokens={recipe['data']['batch_tokens'] // 4})"
        )
    if not len(held.shard):
        print("nothing is held out to measure by: one document in fifty would be, and there are few")
    torch.manual_seed(options.seed)
    model = build_model(config)
    if arguments.continue_from:
        model.load_state_dict(checkpoint.load(arguments.continue_from).model.state_dict())
        print(f"begins with the weights of {arguments.continue_from}")
    if getattr(arguments, "start_from", None) and isinstance(model, CausalLM | Translator):
        copied = start_from_encoder(model, load_file(arguments.start_from / "model.safetensors"))
        print(f"{copied} tensors taken from {arguments.start_from}")
    total = sum(p.numel() for p in model.parameters())
    print(f"{total / 1e6:.1f} M parameters, {n_batches} batches in the first epoch")
    try:
        trainer = Trainer(model, tokenizer, task, held if len(held.shard) else None, options, arguments.run)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    try:
        trainer.run()
    except KeyboardInterrupt:
        print(f"\nstopped: the same command goes on from the last checkpoint in {arguments.run}, if any")
        return 130
    return 0


def read_recipe(path: Path, overrides: list[str]) -> dict[str, Any]:
    """A recipe with overrides applied: `section.key=value`, where the section is "train" when left out."""
    recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    for override in overrides:
        name, _, text = override.partition("=")
        section, _, key = name.rpartition(".")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise SystemExit(f"--set {override}: the value is not TOML ({error})") from None
        if (section or "train") not in recipe:
            raise SystemExit(f"--set {override}: the recipe has no [{section}]")
        recipe[section or "train"][key] = value
    return recipe


def _options(values: dict[str, Any]) -> Options:
    if unknown := set(values) - {f.name for f in fields(Options)}:
        raise SystemExit(f"unknown key in [train]: {', '.join(sorted(unknown))}")
    frozen = values.get("frozen", [])
    if not (isinstance(frozen, list) and all(isinstance(name, str) for name in frozen)):
        raise SystemExit(f"[train] frozen: a list of beginnings of parameters' names, not {frozen!r}")
    return Options(**values)


def model_config(command: str, values: dict[str, Any], tokenizer: Tokenizer) -> TransformerConfig:
    """The configuration of a recipe's [model] with the tokenizer's own ids."""
    t = tokenizer
    ids = {
        "pad_id": t.pad_id,
        "bos_id": t.bos_id,
        "eos_id": t.eos_id,
        "mask_id": t.mask_id,
        "cls_id": t.cls_id,
        "sep_id": t.sep_id,
    }
    languages = t.languages if ARCHITECTURES[command] == "translator" else {}
    fixed = {"architecture": ARCHITECTURES[command], "vocab_size": t.vocab_size, "languages": languages}
    return TransformerConfig.from_dict(values | ids | fixed)


def make_task(
    arguments: argparse.Namespace, data: dict[str, Any], tokenizer: Tokenizer, seed: int, *, held: bool
) -> MaskedTask | CausalTask | TranslateTask:
    """The task over its shard, which is written when it is not there yet."""
    shard = _shard(arguments, data, tokenizer, held=held)
    common: dict[str, Any] = {"budget": data["batch_tokens"], "max_len": data["max_len"], "seed": seed}
    width = {"width_step": data.get("width_step", WIDTH_STEP)}
    if ARCHITECTURES[arguments.command] == "translator":
        weights = {"": 1.0} if held else data["weights"]
        noise = 0.0 if held else data.get("noise", 0.15)
        return TranslateTask(shard, tokenizer, weights=weights, noise=noise, **common, **width)
    common["weights"] = None if held else data.get("weights")
    if arguments.command == "masked":
        keys = ("mask_ratio", "split_particles", "stems", *(() if held else ("sightings",)))
        chosen = {key: data[key] for key in keys if key in data}
        return MaskedTask(shard, tokenizer, **chosen, **common, **width)
    return CausalTask(shard, tokenizer, **common)


def _shard(arguments: argparse.Namespace, data: dict[str, Any], tokenizer: Tokenizer, *, held: bool) -> Shard:
    folder = arguments.run / ("held" if held else "train")
    used = {"": 1.0} if held else data.get("weights", {"": 1.0})
    pairs = [find_pack(arguments.data, name) for name in data.get("pairs", [])]
    texts = [find_pack(arguments.data, name) for name in data.get("documents", [])]
    # By name and size, so that a shard may be carried to where its packs are not.
    made_of = {path.name: path.stat().st_size for path in (*pairs, *texts) if path.exists()}
    made_of["tokenizer"] = zlib.crc32(tokenizer.backend.to_str().encode())
    while int(os.environ.get("LOCAL_RANK", 0)) and not (folder / "meta.json").exists():
        time.sleep(1)  # of several processes the first writes
    if (folder / "meta.json").exists():
        shard = Shard(folder)
        if shard.made_of and not made_of.items() <= shard.made_of.items():
            raise SystemExit(
                f"{folder} was written with another tokenizer or from packs that have changed since: remove "
                f"{arguments.run}, or name another"
            )
        if missing := [label for label in shard.left_out if weight_of(label, used)]:
            raise SystemExit(f"{folder} was written when {', '.join(missing)} had no weight: remove it")
        return shard
    if missing := [str(path) for path in (*pairs, *texts) if not path.exists()]:
        raise SystemExit(f"not there: {', '.join(missing)}; docs/data.md says what a recipe's packs are")
    measured = data.get("measured", prepare.PRECIOUS)

    def documents() -> Any:
        if ARCHITECTURES[arguments.command] == "translator":
            yield from prepare.pair_documents(pairs, held=held, measured=measured)
            return
        chosen = {key: data[key] for key in ("share", "max_grade", "max_figures") if key in data}
        yield from prepare.passages(texts, held=held, **chosen)
        sources = data.get("sentences", {})  # a list, or a table that says which share of each
        shares = sources if isinstance(sources, dict) else dict.fromkeys(sources, 1.0)
        if shares:
            yield from prepare.single_sentences(pairs, held=held, shares=shares, measured=measured)

    if ARCHITECTURES[arguments.command] == "translator":
        # An epoch never holds what has no weight; most of the pairs that there are may be such.
        return write_shard(
            folder, tokenizer, documents(), lambda label: weight_of(label, used) > 0, made_of=made_of
        )
    return write_shard(folder, tokenizer, documents(), made_of=made_of)


if __name__ == "__main__":
    sys.exit(main())
