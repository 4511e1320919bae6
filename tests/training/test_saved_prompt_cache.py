"""A prompt cache on disk: whole or not at all, of one model, and good in another process."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seqmix import SeqmixError, build_model, load_config
from seqmix.mixers.state import to_dict
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


def refusal(file, model) -> str:
    with pytest.raises(CheckpointError) as raised:
        load_prompt_cache(file, model)
    assert isinstance(raised.value, SeqmixError)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def rewritten(file, change):
    """The file with other contents, by `change(tensors, metadata)`, and no new checksum."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)
    return file


def test_a_cache_comes_back_to_the_bit(model, file):
    cache, loaded = cache_text(model, ["the text", "another"]), load_prompt_cache(file, model)
    assert torch.equal(loaded.recent, cache.recent)
    assert torch.equal(loaded.lengths, cache.lengths)
    expected = to_dict(cache.resized_state(model, None))
    assert expected.keys() == to_dict(loaded.state).keys()
    assert all(torch.equal(leaf, expected[name]) for name, leaf in to_dict(loaded.state).items())


def test_another_model_is_refused(file):
    config = load_config("hybrid-tiny", SMALL).model
    others = {
        "seed": build_model(config, seed=1),
        "dtype": build_model(config, dtype=torch.float64),
        "option": build_model(load_config("hybrid-tiny", [*SMALL, "model.blocks.attn.mixer.rope_base=5e4"]).model),
    }
    for other in others.values():
        assert refusal(file, other) == (
            f"{file} is of another model: a state means something only to the weights and the configuration of its own"
        )


def test_damage_is_one_sentence(model, file, tmp_path):
    whole = file.read_bytes()
    missing = tmp_path / "missing"
    assert refusal(missing, model) == f"{missing} is missing"
    for at in (0, 7, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert refusal(file, model).startswith(f"{file} is damaged")
    file.write_bytes(whole[:-1])
    assert refusal(file, model).startswith(f"{file} is damaged")
    file.write_bytes(whole)
    rewritten(file, lambda tensors, _: tensors.pop("lengths"))
    assert refusal(file, model) == f"{file} is damaged: its checksum is not the one it was written with"


def test_another_file_is_one_sentence(model, file, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    assert "holds no state of a text: it needs a file of `seqmix generate --save-state`" in refusal(
        tmp_path / "weights.safetensors", model
    )
    rewritten(file, lambda _, metadata: metadata.update({"seqmix.prompt_cache": "2"}))
    assert refusal(file, model) == f"{file} is of format 2, and this version of seqmix reads format 1"


def test_a_file_that_cannot_be_written_is_one_sentence(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere/a\.state cannot be written: "):
        save_prompt_cache(cache_text(model, ["a"]), model, tmp_path / "nowhere" / "a.state")
    assert not list(tmp_path.iterdir())


# ---- the command

TRAINED = ("training.steps=4", "training.batch_size=4", "training.warmup_steps=1", "training.learning_rate=0.03")
DATA = ("data.sequence_length=16", "data.paths=[text.txt]", "training.final_evaluation_batches=4")
GREEDY = ("--temperature", "0")


@pytest.fixture
def run(seqmix) -> str:
    assert seqmix("train", "hybrid-tiny", *SMALL, *TRAINED, *DATA, "--out", "run").status == 0
    return "run"


def test_text_goes_on_in_another_process(seqmix, run):
    whole = seqmix("generate", run, "--prompt", "the ", "--max-new-tokens", "30", *GREEDY).out
    first = seqmix("generate", run, "--prompt", "the ", "--max-new-tokens", "12", *GREEDY, "--save-state", "a.state")
    assert first.status == 0
    assert "a.state has the state after 17 tokens" in first.err
    command = [sys.executable, "-c", "from seqmix.cli import main; main()", "generate", run, "--state", "a.state"]
    second = subprocess.run([*command, "--max-new-tokens", "18", *GREEDY], capture_output=True, text=True, check=True)
    assert first.out.removesuffix("\n") + second.stdout == whole


def test_a_prefix_is_read_once(seqmix, run):
    done = seqmix("generate", run, "--prompt", "the text", "--max-new-tokens", "0", "--save-state", "a.state")
    assert (done.status, done.out) == (0, "")
    expected = seqmix("generate", run, "--prompt", "the text of", "--prompt", "the text is", *GREEDY)
    both = seqmix("generate", run, "--state", "a.state", "--prompt", " of", "--prompt", " is", *GREEDY)
    assert ["the text" + text for text in both.out.split("─\n")[:2]] == expected.out.split("─\n")[:2]
    on = seqmix("generate", run, "--state", "a.state", "--save-state", "a.state", "--max-new-tokens", "2")
    assert (on.status, "after 11 tokens" in on.err) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "generate needs a --prompt TEXT to continue, or a --state FILE to go on from"),
        (["--state", "missing"], "missing is missing"),
        (["--state", "missing", "--save-state", "text.txt"], "text.txt exists already: give --save-state another name"),
        (["--prompt", "a", "--save-state", "a" * 300], f"{'a' * 300} cannot be used: File name too long"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0 reads a --prompt for --save-state FILE, and"),
        (["--prompt", "a", "--save-state", "text.txt"], "text.txt exists already: give --save-state another name"),
        (["--prompt", "a", "--save-state", "no/a"], "no/a cannot be written: there is no folder "),
        (["--prompt", "a", "--state", "text.txt"], "text.txt is damaged or no safetensors file"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(seqmix, run, arguments, message):
    done = seqmix("generate", run, *arguments)
    assert done.status == 2
    assert done.err.startswith(f"error: {message}")
    assert done.err.count("\n") == 1


def test_a_folder_that_may_not_be_written_is_told_before_anything_is_generated(seqmix, run, monkeypatch):
    monkeypatch.setattr(os, "access", lambda folder, mode: mode != os.W_OK)  # root may write anywhere
    done = seqmix("generate", run, "--prompt", "a", "--save-state", "a.state")
    assert (done.status, done.out) == (2, "")
    assert done.err == "error: a.state cannot be written: permission denied\n"
