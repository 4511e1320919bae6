"""A prompt cache on disk: complete or absent, tied to one model, and usable in another process."""

import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import refusal

from seqmix import build_model, load_config
from seqmix.mixers.base.state import to_dict
from seqmix.models import cache_text
from seqmix.training import CheckpointError, load_prompt_cache, save_prompt_cache

SMALL = ["model.d_model=16", "model.n_layers=4"]


@pytest.fixture
def model():
    return build_model(load_config("hybrid-tiny", SMALL).model).eval()


@pytest.fixture
def file(model, tmp_path):
    save_prompt_cache(cache_text(model, ["the text", "another"]), model, tmp_path / "a.state")
    return tmp_path / "a.state"


def refused(file, model) -> str:
    message = refusal(lambda: load_prompt_cache(file, model), CheckpointError)
    assert message.startswith(f"{file} ")
    return message


def rewrite(file, change) -> None:
    """Give the file other contents, by `change(tensors, metadata)`, without a new checksum."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def test_cache_round_trip_is_bitwise_exact(model, file):
    cache, loaded = cache_text(model, ["the text", "another"]), load_prompt_cache(file, model)
    assert torch.equal(loaded.recent, cache.recent)
    assert torch.equal(loaded.lengths, cache.lengths)
    expected = to_dict(cache.resized_state(model, None))
    assert expected.keys() == to_dict(loaded.state).keys()
    assert all(torch.equal(leaf, expected[name]) for name, leaf in to_dict(loaded.state).items())


def test_cache_of_another_model_is_refused(file):
    config = load_config("hybrid-tiny", SMALL).model
    option = load_config("hybrid-tiny", [*SMALL, "model.blocks.attn.mixer.rope_base=5e4"]).model
    for other in (build_model(config, seed=1), build_model(config, dtype=torch.float64), build_model(option)):
        assert "another model" in refused(file, other)


def test_damaged_missing_or_unrelated_cache_file_is_refused(model, file, tmp_path):
    assert "missing" in refused(tmp_path / "missing", model)
    content = file.read_bytes()
    for at in (0, 7, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert "is damaged" in refused(file, model)
    file.write_bytes(content[:-1])
    assert "is damaged" in refused(file, model)
    file.write_bytes(content)
    rewrite(file, lambda tensors, _: tensors.pop("lengths"))
    assert "is damaged" in refused(file, model)
    # or another file
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    assert "--save-state" in refused(tmp_path / "weights.safetensors", model)
    rewrite(file, lambda _, metadata: metadata.update({"seqmix.prompt_cache": "2"}))
    assert re.search(r"\b2\b.*\b1\b", refused(file, model))


def test_unwritable_cache_file_is_named(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere/a\.state"):
        save_prompt_cache(cache_text(model, ["a"]), model, tmp_path / "nowhere" / "a.state")
    assert not list(tmp_path.iterdir())


TRAINING = "training={steps: 4, batch_size: 4, warmup_steps: 1, learning_rate: 0.03, final_evaluation_batches: 4}"
DATA = ("data.sequence_length=16", "data.paths=[text.txt]")
GREEDY = ("--temperature", "0")


@pytest.fixture
def generate(seqmix):
    """The command on a trained run."""
    assert seqmix("train", "hybrid-tiny", *SMALL, TRAINING, *DATA, "--out", "run").status == 0
    return lambda *arguments: seqmix("generate", "run", *arguments)


@pytest.mark.slow
def test_saved_state_continues_in_another_process_and_serves_as_prefix(generate):
    expected = generate("--prompt", "the ", "--max-new-tokens", "30", *GREEDY).out
    first = generate("--prompt", "the ", "--max-new-tokens", "12", *GREEDY, "--save-state", "a.state")
    assert first.status == 0
    assert re.search(r"a\.state .* 17 tokens", first.err)
    command = [sys.executable, "-c", "from seqmix.cli.app import main; main()", "generate", "run", "--state", "a.state"]
    second = subprocess.run([*command, "--max-new-tokens", "18", *GREEDY], capture_output=True, text=True, check=True)
    assert first.out.removesuffix("\n") + second.stdout == expected
    # a prefix
    done = generate("--prompt", "the text", "--max-new-tokens", "0", "--save-state", "b.state")
    assert (done.status, done.out) == (0, "")
    expected = generate("--prompt", "the text of", "--prompt", "the text is", *GREEDY)
    both = generate("--state", "b.state", "--prompt", " of", "--prompt", " is", *GREEDY)
    assert ["the text" + text for text in both.out.split("─\n")[:2]] == expected.out.split("─\n")[:2]
    on = generate("--state", "b.state", "--save-state", "b.state", "--max-new-tokens", "2")
    assert (on.status, " 11 tokens" in on.err) == (0, True)


def test_invalid_state_options_are_reported_before_generation(generate, monkeypatch):
    cases = [
        (2, [], "--prompt.*--state"),
        (3, ["--state", "missing"], "missing"),
        (2, ["--state", "missing", "--save-state", "text.txt"], "text.txt .*--save-state"),
        (3, ["--prompt", "a", "--save-state", "a" * 300], f"{'a' * 300} .*File name too long"),
        (2, ["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0 .*--save-state"),
        (2, ["--prompt", "a", "--save-state", "text.txt"], "text.txt .*--save-state"),
        (3, ["--prompt", "a", "--save-state", "no/a"], "no/a "),
        (3, ["--prompt", "a", "--state", "text.txt"], "text.txt "),
        (3, ["--prompt", "a", "--save-state", "a.state"], "a.state "),
    ]
    for status, arguments, named in cases:
        if arguments[-1:] == ["a.state"]:
            monkeypatch.setattr(os, "access", lambda folder, mode: mode != os.W_OK)  # root may write anywhere
        done = generate(*arguments)
        assert (done.status, done.out) == (status, "")
        assert re.search(f"^error: .*{named}", done.err)
        assert done.err.count("\n") == 1


def test_speculation_changes_no_text_and_reports_its_statistics(generate):
    for options in (GREEDY, ("--temperature", "0.9", "--seed", "3")):
        prompts = ("--prompt", "the text of the text of ", "--prompt", "a", "--max-new-tokens", "40", *options)
        expected = generate(*prompts).out
        for draft in ("ngram", "run"):
            done = generate(*prompts, "--speculate", draft)
            assert done.out == expected
            assert "note: speculation: " in done.err
    assert "100 %" in done.err  # a model guesses its own text
    wrong = generate("--prompt", "a", "--speculate", "ngrma")
    assert "expects ngram or a run directory, got 'ngrma'; did you mean \"ngram\"?" in wrong.err
