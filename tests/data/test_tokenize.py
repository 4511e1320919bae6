"""`seqmix tokenize`, and runs on what it wrote."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from seqmix import Sampling, generate_text, load_run, train
from seqmix.data import TokenFile
from seqmix.models import ByteTokenizer
from seqmix.training.events import Evaluated, Stepped

SMALL = (
    "model.d_model=16",
    "model.n_layers=1",
    "data.sequence_length=16",
    "training.steps=4",
    "training.batch_size=4",
    "training.warmup_steps=1",
    "training.checkpoint_every=2",
    "training.final_evaluation_batches=4",
)
BPE = ("data.paths=[text.tokens]", "data.tokenizer=text.json", "model.vocab_size=280")


def tokenize(seqmix, *arguments: str) -> TokenFile:
    done = seqmix("tokenize", *arguments, "--out", "text.tokens")
    assert (done.status, done.err) == (0, "")
    return TokenFile(Path("text.tokens"), ByteTokenizer())


@pytest.fixture
def bpe(seqmix):
    """A token file and its vocabulary."""
    pytest.importorskip("tokenizers")
    done = seqmix("tokenize", "text.txt", "--out", "text.tokens", "--train-bpe", "280")
    assert (done.status, done.err) == (0, "")
    return done


# ---- the command


def test_a_token_file_is_written_and_said_how_to_train_on(seqmix):
    done = seqmix("tokenize", "text.txt", "--out", "text.tokens")
    assert (done.status, done.err) == (0, "")
    size = len(Path("text.txt").read_bytes())
    assert f"text.tokens: 1 documents, {size + 1:,} tokens, {size:,} bytes of text" in done.out
    assert 'data.paths="[text.tokens]" data.tokenizer=bytes model.vocab_size=257' in done.out
    assert not Path("text.json").exists()


def test_sources_are_paths_and_fields_of_data(seqmix):
    Path("more").mkdir()
    Path("more/a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    Path("more/b.txt").write_text("not this")
    Path("c.txt").write_text("three")
    file = tokenize(seqmix, "more", "c.txt", "text_field=body", 'glob="*.jsonl"')
    assert file.ends.tolist() == [4, 8, 14]
    assert bytes(file.read(9, 14).astype("uint8")) == b"three"


def test_a_data_set_is_tokenized(seqmix, monkeypatch):
    class Library:
        @staticmethod
        def load_dataset(path, name, *, split, streaming):
            return iter([{"text": path}, {"text": split}])

    monkeypatch.setitem(__import__("sys").modules, "datasets", Library)
    file = tokenize(seqmix, "dataset={path: wiki, split: test, streaming: true}")
    assert file.ends.tolist() == [5, 10]


def test_a_vocabulary_is_learned_and_lies_beside_the_file(bpe):
    assert json.loads(Path("text.json").read_text())["model"]["type"] == "BPE"
    assert re.search(r"data\.tokenizer=text\.json model\.vocab_size=\d+", bpe.out)


def test_a_vocabulary_that_is_there_is_used(seqmix, bpe):
    assert seqmix("tokenize", "text.txt", "--out", "again.tokens", "--tokenizer", "text.json").status == 0
    assert Path("again.tokens").read_bytes() == Path("text.tokens").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["text.txt", "--out", "a.bin"], "a token file is called FILE.tokens, .* and --out is a.bin"),
        (["text.txt", "--out", "taken.tokens"], "taken.tokens exists already: remove it, or write elsewhere"),
        (["text.txt", "--out", "taken.tokens2/a.tokens"], "the folder taken.tokens2 does not exist"),
        (["no.txt", "--out", "a.tokens"], "the corpus no.txt does not exist"),
        (['glob="*.md"', "--out", "a.tokens"], "tokenize needs a SOURCE"),
        (["text.txt", "text_field=[", "--out", "a.tokens"], "is no YAML"),
        (["text.txt", "packing=maybe", "--out", "a.tokens"], "packing: needs true or false"),
        (["empty", "--out", "a.tokens"], "there is no text to tokenize"),
    ],
    ids=str,
)
def test_what_cannot_be_tokenized_is_one_sentence(refused, arguments, sentence):
    Path("taken.tokens").touch()
    Path("empty").mkdir()
    assert re.search(sentence, refused("tokenize", *arguments))
    assert not Path("a.tokens").exists()


def test_a_vocabulary_is_not_overwritten(refused):
    Path("text.json").write_text("mine")
    sentence = refused("tokenize", "text.txt", "--out", "text.tokens", "--train-bpe", "300")
    assert sentence.startswith("text.json exists already: use it, with --tokenizer text.json")
    assert Path("text.json").read_text() == "mine"


# ---- runs


def test_a_run_on_mapped_bytes_is_the_run_on_text(config_of, text, tmp_path, seqmix):
    file = tokenize(seqmix, str(text)).path
    changes = ("data.order=epochs", "data.packing=true")
    runs = (config_of(*changes), config_of(*changes, f"data.paths=[{file}]"))
    losses = [
        [event.loss for event in train(config, tmp_path / f"run{n}") if isinstance(event, Stepped | Evaluated)]
        for n, config in enumerate(runs)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 9


def test_a_run_keeps_its_vocabulary_and_generates_with_it(seqmix, bpe):
    done = seqmix("train", "retnet-tiny", *SMALL, *BPE, "--out", "run")
    assert (done.status, done.err) == (0, "")
    assert re.search(r"step 4: validation \d\.\d+ nats/token, \d+\.\d+ bits/byte; token frequencies alone: ", done.out)
    assert Path("run/tokenizer.json").read_bytes() == Path("text.json").read_bytes()
    Path("text.json").unlink()
    model, read = load_run("run"), []
    assert (model.config.vocab_size, model.tokenizer.vocab_size) == (280, 280)
    model.embedding.register_forward_pre_hook(lambda module, args: read.append(args[0].flatten().tolist()))
    (text,) = generate_text(model, ["the text"], max_new_tokens=5)
    assert read[0] == model.tokenizer.encode("the text").tolist()
    assert max(read[0][1:]) > 256  # no byte
    greedy = ("--max-new-tokens", "9", "--temperature", "0")
    done = seqmix("generate", "run", "--prompt", "the text", *greedy)
    assert (done.status, done.err) == (0, "")
    (text,) = generate_text(model, ["the text"], max_new_tokens=9, sampling=Sampling(temperature=0))
    assert done.out == f"the text{text}\n"


def test_a_resumed_run_reads_its_own_vocabulary(seqmix, bpe):
    for run in ("whole", "half"):
        assert seqmix("train", "retnet-tiny", *SMALL, *BPE, "training.log_every=1", "--out", run).status == 0
    shutil.rmtree("half/checkpoints/step-000004")
    Path("text.json").write_text("another one now")
    assert seqmix("train", "--resume", "half").status == 0
    whole, half = (load_file(f"{run}/checkpoints/step-000004/model.safetensors") for run in ("whole", "half"))
    assert whole.keys() == half.keys()
    assert all(torch.equal(whole[name], half[name]) for name in whole)


@pytest.mark.parametrize("command", [("train",), ("train", "--dry-run")], ids=" ".join)
def test_a_model_with_fewer_tokens_than_its_text_is_refused(refused, bpe, command):
    sentence = refused(*command, "retnet-tiny", *SMALL, *BPE, "model.vocab_size=279")
    assert sentence == (
        "the tokenizer text.json has 280 tokens, the begin token among them, and model.vocab_size is 279"
    )
    assert not Path("runs").exists()


def test_a_file_of_another_tokenizer_is_refused(refused, bpe):
    sentence = refused("train", "retnet-tiny", *SMALL, "data.paths=[text.tokens]", "model.vocab_size=280")
    assert re.fullmatch(
        "text.tokens was tokenized with the vocabulary sha256:.*, and data.tokenizer is bytes", sentence
    )
    assert not Path("runs").exists()
