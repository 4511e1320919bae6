"""Weighted mixtures of sources, and separate validation data."""

import json
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from small_runs import refusal, require_same_run, run_of, stopped

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
def test_each_sequence_has_one_source_and_shares_follow_the_weights(sources, order, weights):
    text = mixed(sources, weights, order=order).open(257)
    counts = np.zeros(3)
    for step in range(200):
        batch = text.training_batch(step, 8, seed=0)
        found = sources_of(batch.inputs)
        counts += np.bincount(found, minlength=3)
        # any run of sequences has about the shares, too
        assert np.abs(counts - counts.sum() * np.array(WEIGHTS)).max() < 3
    assert np.abs(counts / counts.sum() - WEIGHTS).max() < 0.01


@given(
    st.lists(st.floats(0, exclude_min=True, allow_infinity=False), min_size=1, max_size=20),
    st.integers(1, 500),
    st.integers(0, 2**36),
)
@example([1.0], 96, 0)
@example([1.0], 10_000, 3)
@example([0.5, 0.3, 0.2], 1, 2**36)
@example([1.0, 1e-9], 1, 2**36)
@example([1.7e308, 1.7e308, 5e-324], 1, 0)
def test_source_counts_in_a_cycle_differ_from_their_shares_by_at_most_one_sequence(some_weights, repeats, cycle):
    weights = some_weights * repeats
    total = sum(map(Fraction, weights))
    expected = [float(CYCLE * Fraction(weight) / total) for weight in some_weights] * repeats
    counts = np.bincount(mixture(weights, CYCLE, seed=5, step=cycle)[0], minlength=len(weights))
    assert np.abs(counts - expected).max() < 1 + 1e-9


@pytest.mark.parametrize("weights", [[1.0] * 10_000, [1.0, 1e-4, 3e-5], [1.0] * 96, [300.0] + [1.0] * 200])
def test_source_shares_do_not_drift_over_many_cycles(weights):
    step = 10**6
    sources, numbers = mixture(weights, 16 * CYCLE, seed=5, step=step)
    assert set(sources.tolist()) == set(range(len(weights)))
    expected = step * 16 * CYCLE * np.array(weights) / sum(weights)
    # a source's first number is the count of its sequences before
    _, firsts = np.unique(sources, return_index=True)
    assert np.abs(numbers[firsts] - expected).max() < 16


def test_order_of_few_sources_is_stable_across_versions():
    # that of all versions: a resumed run would read some sequences twice, and others never
    found = [mixture(weights, 12, seed=3, step=1000) for weights in ((0.5, 0.3, 0.2), (1, 1, 1), (9, 1))]
    assert [sources.tolist() for sources, _ in found] == [
        [0, 1, 0, 2, 0, 1, 1, 0, 0, 0, 1, 2],
        [1, 2, 0, 2, 1, 0, 2, 0, 1, 2, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0],
    ]
    assert [numbers.tolist() for _, numbers in found] == [
        [6000, 3600, 6001, 2400, 6002, 3601, 3602, 6003, 6004, 6005, 3603, 2401],
        [3999, 3999, 4002, 4000, 4000, 4003, 4001, 4004, 4001, 4002, 4002, 4005],
        [10799, 10800, 10801, 10802, 10803, 10804, 10805, 1201, 10806, 10807, 10808, 10809],
    ]
    cycles = [mixture(WEIGHTS, CYCLE, seed=seed, step=step)[0] for seed, step in ((5, 0), (5, 1), (6, 0))]
    assert not any((cycles[0] == other).all() for other in cycles[1:])


@pytest.mark.parametrize("weights", [WEIGHTS, (1.0, 1e-3, 1e-4)])
@pytest.mark.parametrize("batch_size", [1, 7, 4096])
def test_source_numbering_has_no_gaps_for_any_batch_size(weights, batch_size):
    steps = -(-10_000 // batch_size)
    pairs = [mixture(weights, batch_size, seed=3, step=step) for step in range(steps)]
    sources, numbers = (np.concatenate(parts)[:10_000] for parts in zip(*pairs, strict=True))
    for source in range(3):
        assert numbers[sources == source].tolist() == list(range((sources == source).sum()))
    whole = mixture(weights, 10_000, seed=3, step=0)
    assert (whole[0] == sources).all()


@pytest.mark.parametrize(
    ("weights", "earlier", "same"), [(WEIGHTS, "25e21d90976e", True), ((1, 1, 1e-4), "1125c3d44baf", False)]
)
def test_digest_changes_only_when_the_order_differs_from_earlier_versions(sources, weights, earlier, same):
    # a run that an earlier version wrote then gets a note when it is resumed
    assert (mixed(sources, weights).open(257).digest[:12] == earlier) == same


def test_each_epoch_of_a_source_reads_every_sequence_once(sources):
    text = mixed(sources, order="epochs").open(257)
    size = text.corpus.sizes[1]
    samples = -(-(size - 1) // 16)
    rows = torch.cat([text.training_batch(step, 8, seed=0).inputs for step in range(60)])
    of_b = [bytes(row.clamp(max=255).to(torch.uint8).tolist()) for row in rows if sources_of(row[None]) == [1]]
    assert len(set(of_b[:samples])) == len(set(of_b[samples : 2 * samples])) == samples
    assert of_b[:samples] != of_b[samples : 2 * samples]


@pytest.mark.parametrize("order", ["random_windows", "epochs"])
def test_step_depends_on_the_seed_and_not_on_process_count(sources, order):
    text = mixed(sources, order=order).open(257)
    for step in (0, 3, 700):
        whole = text.training_batch(step, 12, seed=1)
        for size in (2, 4, 12):
            parts = [text.training_batch(step, 12, 1, rank, size) for rank in range(size)]
            assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
            assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
    assert not torch.equal(text.training_batch(0, 12, seed=2).inputs, text.training_batch(0, 12, seed=1).inputs)


def test_validation_covers_all_sources_and_documents_keep_their_boundaries(sources):
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


def test_token_files_and_texts_can_be_mixed(sources, tmp_path):
    mapped = tmp_path / "a.tokens"
    tokenizer = ByteTokenizer()
    write_token_file(mapped, tokenized([Document("", "", sources[0].read_bytes())], tokenizer), tokenizer)
    text, other = mixed(sources).open(257), mixed([mapped, *sources[1:]], split="tail").open(257)
    assert not isinstance(other.corpus.train, np.ndarray)
    text = mixed(sources, split="tail").open(257)
    assert torch.equal(text.training_batch(4, 8, seed=0).inputs, other.training_batch(4, 8, seed=0).inputs)


def test_mixture_of_one_source_equals_the_plain_text(sources):
    alone = TextConfig(paths=(str(sources[0]),), sequence_length=16).open(257)
    text = mixed(sources[:1], [3.0], validation_fraction=0.1).open(257)
    for step in range(3):
        assert torch.equal(alone.training_batch(step, 8, seed=0).inputs, text.training_batch(step, 8, seed=0).inputs)
    assert alone.digest == text.digest


def test_stopped_run_on_a_mixture_resumes_bitwise(config_of, sources, tmp_path):
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


def test_validation_split_can_come_from_other_documents(sources, tmp_path):
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
        ({"sources": []}, "sources: expected a length >= 1"),
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
def test_conflicting_mixture_fields_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        TextConfig(**fields)


def test_carried_state_with_a_mixture_is_refused(config_of, sources):
    parts = f"data.sources=[{{paths: ['{sources[0]}'], weight: 1}}]"
    config = config_of("data.paths=null", parts, "training.carry_state=true")
    assert "leave out data.sources" in refusal(config.open_data)


@pytest.mark.parametrize(
    ("how", "split"), [("epochs", "tail"), ("epochs", "by_document"), ("carried", "by_document"), ("mapped", "tail")]
)
def test_batch_token_is_traced_to_its_document(sources, tmp_path, how, split):
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
