"""Mixtures of sources by weight, and a validation split of its own."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import refusal, require_same_run, run_of, stopped

from seqmix.data import TextConfig, read_corpus
from seqmix.data.files import Document
from seqmix.data.order import CYCLE, mixture
from seqmix.data.token_file import write_token_file
from seqmix.data.token_store import tokenized
from seqmix.models import IGNORED, ByteTokenizer

WEIGHTS = (0.5, 0.3, 0.2)


@pytest.fixture
def sources(tmp_path) -> list[Path]:
    """Three files of unequal sizes, whose bytes tell which file they are of."""
    files = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.txt")]
    random = np.random.default_rng(0)
    for number, (file, size) in enumerate(zip(files, (4000, 300, 900), strict=True)):
        text = "".join(map(chr, random.integers(97 + 8 * number, 105 + 8 * number, size)))
        rows = "".join(f'{{"body": "{text[at : at + 30]}"}}\n' for at in range(0, size, 30))
        file.write_text(rows if file.suffix == ".jsonl" else text)
    return files


def mixed(sources, weights=WEIGHTS, **fields) -> TextConfig:
    parts = [
        {"paths": [str(file)], "weight": weight, "text_field": "body"}
        for file, weight in zip(sources, weights, strict=True)
    ]
    return TextConfig(**{"sources": parts, "sequence_length": 16, "validation_fraction": 0.3} | fields)


def sources_of(inputs: torch.Tensor) -> list[int]:
    """The source of each sequence, which must be one."""
    found = []
    for row in inputs.tolist():
        (source,) = {(token - 97) // 8 for token in row if token not in (0, 256)}  # padding, begin tokens
        found.append(source)
    return found


@pytest.mark.parametrize("order", ["random_windows", "epochs"])
@pytest.mark.parametrize("weights", [WEIGHTS, (5, 3, 2)])
def test_sequences_are_of_one_source_each_in_the_shares_of_the_weights(sources, order, weights):
    text = mixed(sources, weights, order=order).open(257)
    counts = np.zeros(3)
    for step in range(200):
        batch = text.training_batch(step, 8, seed=0)
        found = sources_of(batch.inputs)
        counts += np.bincount(found, minlength=3)
        # any run of sequences has about the shares, too
        assert np.abs(counts - counts.sum() * np.array(WEIGHTS)).max() < 3
    assert np.abs(counts / counts.sum() - WEIGHTS).max() < 0.01


def test_the_shares_are_exact_in_every_cycle_and_weights_may_be_anything():
    for weights in (WEIGHTS, (1, 1e-9), (1e-3, 7.5, 3, 3)):
        expected = np.maximum(np.round(np.array(weights) / sum(weights) * CYCLE), 1)
        found = mixture(weights, 3 * CYCLE, seed=5, step=0)[0].reshape(3, CYCLE)
        for cycle in found:
            assert np.abs(np.bincount(cycle, minlength=len(weights)) - expected).max() <= len(weights)
        assert not (found[0] == found[1]).all()
    assert not (mixture(WEIGHTS, 64, seed=0, step=0)[0] == mixture(WEIGHTS, 64, seed=1, step=0)[0]).all()


@pytest.mark.parametrize("batch_size", [1, 7, 4096])
def test_every_source_is_numbered_without_a_gap_whatever_the_batches(batch_size):
    steps = -(-10_000 // batch_size)
    pairs = [mixture(WEIGHTS, batch_size, seed=3, step=step) for step in range(steps)]
    sources, numbers = (np.concatenate(parts)[:10_000] for parts in zip(*pairs, strict=True))
    for source in range(3):
        assert numbers[sources == source].tolist() == list(range((sources == source).sum()))
    whole = mixture(WEIGHTS, 10_000, seed=3, step=0)
    assert (whole[0] == sources).all()


def test_epochs_of_a_source_read_each_of_its_sequences_once(sources):
    text = mixed(sources, order="epochs").open(257)
    size = text.corpus.sizes[1]
    samples = -(-(size - 1) // 16)
    rows = torch.cat([text.training_batch(step, 8, seed=0).inputs for step in range(60)])
    of_b = [bytes(row.clamp(max=255).to(torch.uint8).tolist()) for row in rows if sources_of(row[None]) == [1]]
    assert len(set(of_b[:samples])) == len(set(of_b[samples : 2 * samples])) == samples
    assert of_b[:samples] != of_b[samples : 2 * samples]


@pytest.mark.parametrize("order", ["random_windows", "epochs"])
def test_a_step_is_a_function_of_the_seed_for_any_number_of_processes(sources, order):
    text = mixed(sources, order=order).open(257)
    for step in (0, 3, 700):
        whole = text.training_batch(step, 12, seed=1)
        for size in (2, 4, 12):
            parts = [text.training_batch(step, 12, 1, rank, size) for rank in range(size)]
            assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
            assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
    assert not torch.equal(text.training_batch(0, 12, seed=2).inputs, text.training_batch(0, 12, seed=1).inputs)


def test_the_validation_split_is_that_of_all_sources_and_documents_keep_boundaries(sources):
    text = mixed(sources, packing=True).open(257)
    found = bytes(text.corpus.validation[:][text.corpus.validation[:] < 256].astype(np.uint8))
    assert {(byte - 97) // 8 for byte in found} == {0, 1, 2}
    assert "3 sources, 0.5 : 0.3 : 0.2" in text.summary
    assert text.corpus.split == "tail, by_document"
    batch = text.training_batch(0, 8, seed=0)
    rows = [row for row in batch.inputs if sources_of(row[None]) == [1]]
    assert any((row == 256).any() for row in rows)  # rows of 30 bytes, each after a begin token
    assert (batch.targets[:, :-1][batch.inputs[:, 1:] == 256] == IGNORED).all()
    packed = text.packed(batch)
    assert {int(at) for at in packed.cu_seqlens} >= set(range(0, 128, 16))


def test_token_files_and_texts_are_mixed(sources, tmp_path):
    mapped = tmp_path / "a.tokens"
    tokenizer = ByteTokenizer()
    write_token_file(mapped, tokenized([Document("", "", sources[0].read_bytes())], tokenizer), tokenizer)
    text, other = mixed(sources).open(257), mixed([mapped, *sources[1:]], split="tail").open(257)
    assert not isinstance(other.corpus.train, np.ndarray)
    text = mixed(sources, split="tail").open(257)
    assert torch.equal(text.training_batch(4, 8, seed=0).inputs, other.training_batch(4, 8, seed=0).inputs)


def test_one_source_is_the_text_itself(sources):
    alone = TextConfig(paths=(str(sources[0]),), sequence_length=16).open(257)
    text = mixed(sources[:1], [3.0], validation_fraction=0.1).open(257)
    for step in range(3):
        assert torch.equal(alone.training_batch(step, 8, seed=0).inputs, text.training_batch(step, 8, seed=0).inputs)
    assert alone.digest == text.digest


def test_a_run_on_a_mixture_is_resumed_to_the_bit(config_of, sources, tmp_path):
    parts = ", ".join(
        f"{{paths: ['{file}'], weight: {weight}, text_field: body}}"
        for file, weight in zip(sources, WEIGHTS, strict=True)
    )
    config = config_of(
        "data.paths=null", f"data.sources=[{parts}]", "data.order=epochs", "data.validation_fraction=0.3"
    )
    run_of(config, tmp_path / "whole")
    stopped(config, tmp_path / "run", 3)
    run_of(config, tmp_path / "run", resume=True)
    require_same_run(tmp_path / "run", tmp_path / "whole")


def test_the_validation_split_may_be_other_documents(sources, tmp_path):
    held = tmp_path / "held"
    held.mkdir()
    (held / "1.md").write_text("first " * 9)
    (held / "2.md").write_text("second " * 9)
    (held / "3.txt").write_text("third " * 9)
    fields = {"paths": (str(sources[0]),), "sequence_length": 16}
    validation = {"paths": [str(held)], "glob": "*.md"}
    corpus = read_corpus(TextConfig(**fields, validation=validation))
    assert bytes(corpus.validation[corpus.validation < 256].astype(np.uint8)) == b"first " * 9 + b"second " * 9
    assert (len(corpus.train), corpus.split, corpus.documents) == (4001, "data.validation", 3)
    # the same for a mixture; and other documents are other data
    text = mixed(sources, validation=validation, validation_fraction=0.1).open(257)
    assert (text.corpus.validation == corpus.validation).all()
    assert sum(text.corpus.sizes) == 4000 + 1 + 300 + 10 + 900 + 1
    (held / "1.md").write_text("another " * 9)
    assert read_corpus(TextConfig(**fields, validation=validation)).digest != corpus.digest
    short = TextConfig(**fields | {"sequence_length": 500}, validation=validation)
    assert re.match("the validation split of .* needs at least 501 tokens", refusal(lambda: read_corpus(short)))


A = {"paths": ["a"]}
ONE = {"sources": [A | {"weight": 1}]}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (ONE | {"paths": ["b"]}, "set paths in each of the sources"),
        (ONE | {"text_field": "body"}, "set text_field in each of the sources"),
        ({"sources": [A]}, "weight"),
        ({"sources": [A | {"weight": 0}]}, "weight"),
        ({"sources": [{"weight": 1}]}, "needs paths or a dataset"),
        ({"sources": []}, "at least 1"),
        ({"validation": {}}, "needs paths or a dataset"),
        ({"validation": A | {"weight": 1}}, "weight"),
        ({"validation": A, "split": "tail"}, "leave out data.split"),
        ({"validation": A, "validation_fraction": 0.2}, "leave out data.validation_fraction"),
        ({"validation": A, "test_fraction": 0.2}, "leave out data.test_fraction"),
        ({"test_fraction": 0.5, "validation_fraction": 0.5}, "leave no text for training"),
        ({"dataset": {"path": "w", "streaming": True}}, "data.validation="),
    ],
    ids=str,
)
def test_fields_that_do_not_fit_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        TextConfig(**fields)


def test_a_mixture_is_not_carried(config_of, sources):
    parts = f"data.sources=[{{paths: ['{sources[0]}'], weight: 1}}]"
    config = config_of("data.paths=null", parts, "training.carry_state=true")
    assert "leave out data.sources" in refusal(config.open_data)


@pytest.mark.parametrize(
    ("how", "split"), [("epochs", "tail"), ("epochs", "by_document"), ("carried", "by_document"), ("mapped", "tail")]
)
def test_a_token_of_a_batch_is_found_in_its_document(sources, tmp_path, how, split):
    begin, size = ByteTokenizer().begin, 6
    lines = [json.loads(line)["body"] for line in sources[1].read_text().splitlines()]
    texts = {f"{sources[1]}:{number}, ": line for number, line in enumerate(lines, 1)}
    texts |= {f"{file}, ": file.read_text() for file in (sources[0], sources[2])}
    if how == "mapped":
        sources[1] = tmp_path / "b.tokens"
        documents = [Document("", "", line.encode()) for line in lines]
        write_token_file(sources[1], tokenized(documents, ByteTokenizer()), ByteTokenizer())
        texts |= {f"{sources[1]}, document {number}, ": line for number, line in enumerate(lines)}
    if how == "carried":
        text = TextConfig(paths=(str(sources[1]),), text_field="body", split=split, sequence_length=16).open(257)
        text = text.contiguous(size)
    else:
        order = "epochs" if how == "epochs" else "random_windows"
        some = slice(3) if split == "tail" else slice(1, 2)  # single documents are split at their tails alone
        text = mixed(sources[some], WEIGHTS[some], split=split, order=order).open(257)
    found = 0
    for step in range(8):
        inputs = text.training_batch(step, size, seed=1).inputs
        for row, token in torch.randint(16, (20, 2)).tolist():
            if (value := inputs[row % size, token]) not in (0, begin):
                document, _, place = text.origin(step, size, 1, row % size, token).partition("token ")
                assert value == ord(texts[document][int(place.replace(",", ""))])
                found += 1
    assert found > 80
