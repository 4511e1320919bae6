"""A run that starts from existing weights: of a run, an export or a Hugging Face folder."""

import json
import shutil
from importlib.util import find_spec

import pytest
from small_runs import checkpoint_bytes, refusal, run_of, stopped
from torch.testing import assert_close

from seqmix import SeqmixError, load_run
from seqmix.models import train_bpe
from seqmix.training import export_run, load_config
from seqmix.training.monitoring.events import Noted, Saved, Stepped

SMALL = ("model.d_model=8", "model.blocks.ret.mixer.n_heads=2", "training.ema=0.5")
STILL = ("training.learning_rate=1e-12",)
"""Parameters stay where they start."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text, its vocabulary, and runs of bytes and of subwords."""
    folder = tmp_path_factory.mktemp("start")
    text = ("the text of a small run, over and over again. " * 60).encode()
    (folder / "text.txt").write_bytes(text)
    train_bpe([("text", text)], 270, folder / "words.json")
    run_of(config(folder), folder / "bytes")
    words = f"data.tokenizer={folder}/words.json"
    run_of(config(folder, words, "model.vocab_size=270"), folder / "words")
    return folder


def config(folder, *changes):
    sizes = ("training.batch_size=4", "training.evaluation_batches=1", "training.final_evaluation_batches=1")
    few = (
        "model.n_layers=2",
        "training.evaluate_every=9",
        "training.warmup_steps=0",
        "training.steps=2",
        "training.checkpoint_every=1",
    )
    data = ("data.sequence_length=8", f"data.paths=[{folder}/text.txt]")
    return load_config("retnet-tiny", [*few, *sizes, *data, *SMALL, *changes])


def taken(source, folder, *changes):
    """A configuration without a model of its own."""
    rest = [f"training.{name}=1" for name in ("steps", "batch_size", "final_evaluation_batches", "warmup_steps")]
    changes = [*rest, f"data.paths=[{folder}/text.txt]", "data.sequence_length=8", *STILL, *changes]
    return load_config("retnet-tiny", ["model=null", f"training.start_from={source}", *changes])


def parameters(run, **options):
    return dict(load_run(run, **options).named_parameters())


def require_same_parameters(run, other, **options):
    assert_close(parameters(run, **options), parameters(other), rtol=0, atol=1e-9)


def test_training_starts_from_the_weights_of_a_run_including_ema(folder, tmp_path):
    config_ = config(folder, f"training.start_from={folder}/bytes", *STILL, "seed=5")
    events = run_of(config_, tmp_path / "run")
    (note,) = [event.text for event in events if isinstance(event, Noted)]
    assert note == f"started from the weights of {folder}/bytes"
    for options in ({}, {"ema": True}):
        require_same_parameters(tmp_path / "run", folder / "bytes", **options)
    (session,) = map(json.loads, (tmp_path / "run/sessions.jsonl").read_text().splitlines())
    assert session["start_from"]["folder"] == f"{folder}/bytes"
    assert len(session["start_from"]["sha256"]) == 64


def test_resume_rereads_start_weights_only_without_a_checkpoint(folder, tmp_path):
    shutil.copytree(folder / "bytes", tmp_path / "first")
    config_ = config(folder, f"training.start_from={tmp_path}/first")
    run_of(config_, tmp_path / "whole")
    stopped(config_, tmp_path / "run", 1, Saved)
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed/checkpoints")
    again = [event for event in run_of(config_, tmp_path / "killed", resume=True) if isinstance(event, Stepped)]
    assert again[0].step == 1
    assert checkpoint_bytes(tmp_path / "killed") == checkpoint_bytes(tmp_path / "whole")
    shutil.rmtree(tmp_path / "first")
    run_of(config_, tmp_path / "run", resume=True)
    assert checkpoint_bytes(tmp_path / "run") == checkpoint_bytes(tmp_path / "whole")
    sessions = [json.loads(line) for line in (tmp_path / "run/sessions.jsonl").read_text().splitlines()]
    assert ["start_from" in session for session in sessions] == [True, False]


@pytest.mark.parametrize("source", ["bytes", "words.safetensors", "hf"])
def test_model_and_tokenizer_can_come_from_the_source(folder, tmp_path, source):
    file = folder / source
    if source == "hf" and find_spec("transformers") is None:
        pytest.skip("needs pip install transformers")
    if source == "hf":
        from seqmix.interop.hf import export_hf

        file = tmp_path / "hf"
        export_hf(folder / "words", file)
    elif file.suffix:
        file = tmp_path / source
        export_run(folder / "words", file)
    config_ = taken(file, folder)
    like = folder / ("bytes" if source == "bytes" else "words")
    run_of(config_, tmp_path / "run")
    require_same_parameters(tmp_path / "run", like)
    ours, theirs = load_run(tmp_path / "run").tokenizer, load_run(like).tokenizer
    assert ours.begin == theirs.begin
    assert ours.encode("the run").equal(theirs.encode("the run"))
    # the original vocabulary is the same, however the folder writes it
    if source != "bytes":
        named = [f"data.tokenizer={folder}/words.json", f"training.start_from={file}", "model.vocab_size=270"]
        run_of(config(folder, *named), tmp_path / "named")


def test_hugging_face_folder_with_one_flipped_bit_is_refused(folder, tmp_path):
    pytest.importorskip("transformers")
    from seqmix.interop.hf import export_hf

    export_hf(folder / "words", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 64]) + whole[-8:])
    message = refusal(lambda: run_of(taken(tmp_path / "hf", folder), tmp_path / "run"))
    assert f"{file} is damaged: its checksum does not match" in message


def test_differing_model_fields_are_noted(folder, tmp_path):
    changes = (f"training.start_from={folder}/bytes", "model.blocks.ret.norm.eps=0.01", "model.dropout=0.1")
    events = run_of(config(folder, *changes), tmp_path / "run")
    (note,) = [event.text for event in events if isinstance(event, Noted)]
    assert note.endswith(": model.blocks.ret.norm.eps was 1e-05 for these weights and is 0.01 here")


@pytest.mark.parametrize(
    ("source", "changes", "words"),
    [
        ("bytes", ("model.n_layers=3",), "they lack blocks.2.ffn.down_proj.weight (and "),
        ("bytes", ("model.n_layers=1",), "they have an additional blocks.1."),
        ("bytes", ("model.d_model=16",), "has shape [257, 8] instead of [257, 16] (and "),
        ("words", ("data.tokenizer=bytes", "model.vocab_size=270"), "was trained with another tokenizer"),
        ("nowhere", (), "does not exist: expected a run directory, a file of"),
        ("byte", (), 'or a folder of `seqmix export --to hf`; did you mean "bytes"?'),
        ("text.txt", (), "cannot be read: expected a run directory"),
        (".", (), "or a folder of `seqmix export --to hf` (it has no config.json)"),
        ("theirs", (), "its config.json is of another library: convert it to a run directory with `seqmix convert`"),
        ("named", (), "would import code that it names: strange"),
    ],
)
def test_mismatched_model_or_tokenizer_is_refused_before_writing(folder, tmp_path, source, changes, words):
    for name, fields in (("theirs", {"model_type": "llama"}), ("named", {"model": {"kind": "strange:Config"}})):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(fields))
    action = lambda: run_of(config(folder, f"training.start_from={folder / source}", *changes), tmp_path / "run")  # noqa: E731
    assert words in refusal(action, SeqmixError)
    assert not (tmp_path / "run").exists()
