"""`seqmix tokenize`, and runs on the files it writes."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from small_runs import checkpoint_bytes, small_disk

from seqmix import Sampling, generate_text, load_run
from seqmix.data import TokenFile
from seqmix.models import ByteTokenizer, load_tokenizer

SMALL = (
    *("model.d_model=16", "model.n_layers=1", "data.sequence_length=16", "training.steps=4", "training.batch_size=4"),
    *("training.warmup_steps=1", "training.checkpoint_every=2", "training.final_evaluation_batches=4"),
)
BPE = ("data.paths=[text.tokens]", "data.tokenizer=text.json", "model.vocab_size=280")


def tokenize(seqmix, *arguments: str, out: str = "text.tokens") -> TokenFile:
    done = seqmix("tokenize", *arguments, "--out", out)
    assert (done.status, done.err) == (0, "")
    return TokenFile(Path(out), ByteTokenizer())


@pytest.fixture
def bpe(seqmix):
    """A token file and its vocabulary."""
    pytest.importorskip("tokenizers")
    done = seqmix("tokenize", "text.txt", "--out", "text.tokens", "--train-bpe", "280")
    assert (done.status, done.err) == (0, "")
    return done


def test_tokenize_writes_a_file_and_shows_the_training_options(seqmix):
    done = seqmix("tokenize", "text.txt", "--out", "text.tokens")
    assert (done.status, done.err) == (0, "")
    size = len(Path("text.txt").read_bytes())
    assert re.search(rf"text\.tokens: 1 .*{size + 1:,} .*{size:,} ", done.out)
    assert 'data.paths="[text.tokens]" data.tokenizer=bytes model.vocab_size=257' in done.out
    assert not Path("text.json").exists()


def test_tokenize_accepts_paths_datasets_and_data_fields(seqmix, monkeypatch):
    class Library:
        @staticmethod
        def load_dataset(path, name, *, split, streaming):
            return iter([{"text": path}, {"text": split}])

    Path("more").mkdir()
    Path("more/a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    Path("more/b.txt").write_text("not this")
    Path("c.txt").write_text("three")
    file = tokenize(seqmix, "more", "c.txt", "text_field=body", 'glob="*.jsonl"')
    assert file.ends.tolist() == [4, 8, 14]
    assert bytes(file.read(9, 14).astype("uint8")) == b"three"
    Path("text.tokens").unlink()
    monkeypatch.setitem(sys.modules, "datasets", Library)
    file = tokenize(seqmix, "dataset={path: wiki, split: test, streaming: true}")
    assert file.ends.tolist() == [5, 10]


def test_learned_vocabulary_is_saved_next_to_the_file_and_reusable(seqmix, bpe):
    assert json.loads(Path("text.json").read_text())["model"]["type"] == "BPE"
    assert re.search(r"data\.tokenizer=text\.json model\.vocab_size=\d+", bpe.out)
    assert seqmix("tokenize", "text.txt", "--out", "again.tokens", "--tokenizer", "text.json").status == 0
    assert Path("again.tokens").read_bytes() == Path("text.tokens").read_bytes()


def test_tokenize_honours_data_fields(seqmix, bpe):
    Path("a=b.txt").write_bytes("Straße".encode("latin-1"))
    file = tokenize(seqmix, "a=b.txt", "encoding=latin-1", out="first.tokens")
    assert bytes(file.read(1, 8).astype("uint8")) == "Straße".encode()
    # a folder with a tokenizer.json, by the field as by the option; and its begin token
    Path("hf").mkdir()
    shutil.copy("text.json", "hf/tokenizer.json")
    for number, arguments in enumerate((["tokenizer=hf"], ["--tokenizer", "hf"], ["tokenizer=text.json"])):
        done = seqmix("tokenize", "text.txt", *arguments, "--out", f"{number}.tokens")
        assert (done.status, done.err) == (0, "")
        assert Path(f"{number}.tokens").read_bytes() == Path("text.tokens").read_bytes()
    done = seqmix("tokenize", "text.txt", "tokenizer=hf", "begin_token=t", "--out", "begin.tokens")
    assert 'data.tokenizer=hf data.begin_token="t" model.vocab_size=' in done.out
    tokenizer = load_tokenizer("hf", "t")
    assert TokenFile(Path("begin.tokens"), tokenizer).read(0, 1).tolist() == [tokenizer.begin]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["text.txt", "--out", "a.bin"], "FILE.tokens.* a.bin"),
        (["text.txt", "--out", "taken.tokens"], "taken.tokens"),
        (["text.txt", "--out", "taken.tokens2/a.tokens"], "taken.tokens2"),
        (["no.txt", "--out", "a.tokens"], "no.txt"),
        (['glob="*.md"', "--out", "a.tokens"], "SOURCE"),
        (["text.txt", "text_field=[", "--out", "a.tokens"], "YAML"),
        (["text.txt", "packing=true", "--out", "a.tokens"], r"data\.packing is for training.* text_field"),
        (["text.txt", "validation.paths=[a]", "--out", "a.tokens"], r"data\.validation is for training"),
        (["text.txt", "encodnig=latin-1", "--out", "a.tokens"], "encodnig.*encoding"),
        (["text.txt", "glob=/", "--out", "a.tokens"], "glob"),
        (["empty.tokens", "--out", "a.tokens"], "empty.tokens .*a token file"),
        (
            ["text.txt", "tokenizer=b.json", "--tokenizer", "c.json", "--out", "a.tokens"],
            "two tokenizers .*c.json .*b.json",
        ),
        (["text.txt", "begin_token=<s>", "--out", "a.tokens"], "begin_token=<s>"),
        (["text.txt", "tokenizer=empty", "--out", "a.tokens"], "empty is a folder without tokenizer.json"),
        (["empty", "--out", "a.tokens"], "no text"),
        (["text.txt", "--out", "text.tokens", "--train-bpe", "300"], "text.json .*--tokenizer text.json"),
    ],
    ids=str,
)
def test_invalid_tokenize_arguments_are_named_and_write_nothing(refused, arguments, named):
    pytest.importorskip("tokenizers")
    for name in ("taken.tokens", "empty.tokens"):
        Path(name).touch()
    Path("empty").mkdir()
    Path("text.json").write_text("mine")
    of_files = ("taken.tokens2", "no.txt", "no text", "empty is a folder without tokenizer.json")
    status = 3 if named in of_files else 2  # a file or folder is missing or empty
    assert re.search(named, refused("tokenize", *arguments, status=status))
    assert not Path("a.tokens").exists()
    assert Path("text.json").read_text() == "mine"


def test_run_copies_its_vocabulary_and_generates_with_it(seqmix, bpe):
    done = seqmix("train", "retnet-tiny", *SMALL, *BPE, "--out", "run")
    assert (done.status, done.err) == (0, "")
    assert re.search(r"step 4: .* \d\.\d+ nats/token, \d+\.\d+ bits/byte", done.out)
    assert Path("run/tokenizer.json").read_bytes() == Path("text.json").read_bytes()
    Path("text.json").unlink()
    model, read = load_run("run"), []
    assert (model.config.vocab_size, model.tokenizer.vocab_size) == (280, 280)
    model.embedding.register_forward_pre_hook(lambda module, args: read.append(args[0].flatten().tolist()))
    (text,) = generate_text(model, ["the text"], max_new_tokens=9, sampling=Sampling(temperature=0))
    assert read[0] == model.tokenizer.encode("the text").tolist()
    assert max(read[0][1:]) > 256  # more than a byte
    done = seqmix("generate", "run", "--prompt", "the text", "--max-new-tokens", "9", "--temperature", "0")
    assert (done.status, done.err) == (0, "")
    assert done.out == f"the text{text}\n"
    # and is resumed with it
    expected = checkpoint_bytes(Path("run"))
    shutil.rmtree("run/checkpoints/step-000004")
    Path("text.json").write_text("another one now")
    assert seqmix("train", "--resume", "run").status == 0
    assert checkpoint_bytes(Path("run")) == expected


@pytest.mark.parametrize("command", [("train",), ("train", "--dry-run")], ids=" ".join)
def test_model_with_another_vocabulary_size_is_refused(refused, bpe, command):
    message = refused(*command, "retnet-tiny", *SMALL, *BPE, "model.vocab_size=279")
    assert re.search(r"text\.json .*model\.vocab_size .*280, .*got 279", message)
    message = refused("train", "retnet-tiny", *SMALL, "data.paths=[text.tokens]", "model.vocab_size=280")
    assert re.search(r"text\.tokens .*sha256:.*data\.tokenizer is bytes", message)
    assert not Path("runs").exists()


def test_full_disk_leaves_neither_vocabulary_nor_token_file(seqmix, tmp_path):
    numbers = np.random.default_rng(0).integers(10**9, size=20_000)
    Path("numbers.txt").write_text(" ".join(map(str, numbers)))
    arguments = ("tokenize", "numbers.txt", "--train-bpe", "300", "--out", "new.tokens")
    before = sorted(tmp_path.iterdir())
    with small_disk(40_000):
        done = seqmix(*arguments)
    assert (done.status, len(done.err.splitlines())) == (3, 1), done.err
    assert sorted(tmp_path.iterdir()) == before
    assert seqmix(*arguments).status == 0
    assert Path("new.json").stat().st_size < 40_000 < Path("new.tokens").stat().st_size


def test_existing_vocabulary_file_is_not_overwritten(refused, tmp_path):
    Path("new.json").write_text("mine")
    arguments = ("tokenize", "text.txt", "--train-bpe", "270", "--out", "new.tokens")
    assert "new.json exists already" in refused(*arguments)
    Path(".new.tokens.partial").write_text("what was left")
    assert "new.json exists already" in refused(*arguments)
    assert Path("new.json").read_text() == "mine"
