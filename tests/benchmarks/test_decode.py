"""The side-by-side command, on tiny models; the peers only where they are installed."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import decode
from benchmarks.contestants import ContestantFailed, Engine
from benchmarks.convert import CannotConvert, ctranslate2_folder, start_id, vocabulary_map
from benchmarks.table import percentile, spread
from benchmarks.workload import decoder_config, filler_tokenizer, make_case, make_folder, translator_config
from model import checkpoint
from model.config import TransformerConfig
from model.decoding import beam_search, causal_scorer, greedy, translator_scorer
from model.models import CausalLM, Translator
from model.sampling import BeamParams
from model.shortlist import Shortlist, Table
from tests.tiny import tiny_config

TINY = {"vocab_size": 400, "d_model": 32, "n_heads": 4, "d_ff": 64}


def shape(task: str) -> TransformerConfig:
    if task == "generate":
        return decoder_config(**TINY, n_decoder_layers=2)
    return translator_config(**TINY, n_encoder_layers=2, n_decoder_layers=2)


@pytest.fixture(scope="module", params=["generate", "translate"])
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(task: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("bench") / task, shape(task))


def expected(task: str, folder: Path, prompt: list[int], n_new: int) -> list[int]:
    """What the slow decoders say, with no token forbidden but the end."""
    found = checkpoint.load(folder)
    if isinstance(found.model, CausalLM):
        return greedy(causal_scorer(found.model), prompt, 10**9, n_new, [found.config.eos_id])
    assert isinstance(found.model, Translator)
    params = BeamParams(num_beams=4, max_new_tokens=n_new, min_new_tokens=n_new)
    score = translator_scorer(found.model, [prompt])
    (found_best,) = beam_search(score, [[start_id(found.config)]], found.config.eos_id, params)
    return found_best[0].token_ids


def test_everybody_says_what_the_slow_decoder_says(task: str, folder: Path) -> None:
    case = make_case(task, folder, 3, 12, 6, text=False)
    wanted = [expected(task, folder, prompt, 6) for prompt in case.prompts]
    engine = Engine(folder, task, {"n_threads": 1, "device": "cpu"})
    try:
        engine.prepare(case)
        assert engine.run(case)[0] == wanted
    finally:
        engine.close()


@pytest.mark.parametrize("peer", ["transformers", "ctranslate2"])
def test_peers_compute_the_same_function(task: str, folder: Path, peer: str) -> None:
    pytest.importorskip(peer)
    from benchmarks.contestants import CTranslate2, Transformers

    case = make_case(task, folder, 3, 12, 6, text=False)
    found = (
        Transformers(folder, "cpu", "float32", 1, compile_too=False)
        if peer == "transformers"
        else CTranslate2(folder, "cpu", "float32", 1)
    )
    assert found.run(case)[0] == [expected(task, folder, prompt, 6) for prompt in case.prompts]


def test_a_translator_with_rotary_positions_as_the_one_that_ships(tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    from benchmarks.contestants import CTranslate2

    sizes = TINY | {"n_encoder_layers": 3, "n_decoder_layers": 2}
    config = translator_config(**sizes, positions="rotary", norm_first=True, activation="relu")
    folder = make_folder(tmp_path / "rotary", config)
    case = make_case("translate", folder, 3, 12, 6, text=False)
    found = CTranslate2(folder, "cpu", "float32", 1)
    assert found.run(case)[0] == [expected("translate", folder, prompt, 6) for prompt in case.prompts]


def test_a_peer_is_told_of_a_shortlist(tmp_path: Path) -> None:
    config = tiny_config("translator", vocab_size=6, languages={"ko": 4})
    table = Table(np.array([2, 3]), np.array([5, 0, 1]), np.array([0, 0, 2, 2, 2, 3, 3]))
    written = vocabulary_map(Shortlist({"ko": table}, config), tmp_path / "map.txt").read_text()
    assert written.splitlines() == ["\t2 3", "0\t0", "1\t0 1 5", "2\t2", "3\t3", "4\t1 4", "5\t5"]


def test_what_a_peer_cannot_express_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    folder = make_folder(tmp_path / "gated", decoder_config(**TINY, n_decoder_layers=1, gated=True))
    with pytest.raises(CannotConvert, match="gated is True"):
        ctranslate2_folder(folder, tmp_path / "out")


def test_a_peer_that_cannot_hold_the_weights_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    folder = make_folder(tmp_path / "gated", decoder_config(**TINY, n_decoder_layers=1, gated=True))
    entry = decode.Entry("a peer", "transformers", {"device": "cpu", "dtype": "float32", "n_threads": 1})
    entry.options["compile_too"] = False
    with decode.started(folder, [entry]) as running:
        assert running == []
    assert "left out: a peer: " in (said := capsys.readouterr().err)
    assert "gated is True" in said
    entry.options["nonsense"] = 1
    with pytest.raises(ContestantFailed, match="nonsense"), decode.started(folder, [entry]):
        pass


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tiny", "--device", "cpu", "--threads", "1", "--weights", "shapes", "--tasks", "generate"]
    threads = torch.get_num_threads()
    decode.main(
        [*words, "--sequences", "2", "--rounds", "2", "--new", "4", "--peers", "--engines", "a", "b:"]
    )
    assert torch.get_num_threads() == threads
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("`python -m benchmarks.decode --tiny")
    rows = [line.split(" | ") for line in lines if line.startswith("| generate")]
    assert [row[3] for row in rows] == ["a", "b"]
    assert rows[1][6] == "2 of 2, 100.0%"  # the same engine twice


def test_settings_of_an_engine_are_checked() -> None:
    assert decode.engine_argument("x:dtype=float32,n_threads=2") == (
        "x",
        {"dtype": "float32", "n_threads": "2"},
    )
    for text in ("x:no_such=1", ":dtype=float32", "x:dtype"):
        with pytest.raises(SystemExit):
            decode.parse(["--engines", text])


def test_agreement_counts_what_comes_before_the_first_difference() -> None:
    assert decode.agreement([[1, 2, 3], [1, 9, 3]], [[1, 2, 3], [1, 2, 3]]) == (1, 4 / 6)


def test_a_vocabulary_of_any_size() -> None:
    for size in (267, 268, 4000):
        tokenizer = filler_tokenizer(size)
        assert tokenizer.vocab_size == size
        assert tokenizer.decode(tokenizer.encode("나는 home")) == "나는 home"
    with pytest.raises(ValueError, match="vocab_size 266"):
        filler_tokenizer(266)


def test_numbers_with_their_spread() -> None:
    assert spread([3.0, 1.0, 2.0], 0) == "2 (1 to 3)"
    assert spread([1.5]) == "1.50"
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.99) == 4.0


def test_peers_are_found_where_they_are_installed() -> None:
    assert ("transformers" in decode.parse([]).peers) == (find_spec("transformers") is not None)
