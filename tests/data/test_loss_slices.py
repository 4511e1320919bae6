"""Loss slices of a text: positions and recall hits, checked against a plain program."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from small_runs import run_of

from seqmix import load_config
from seqmix.data.loss_slices import Slices, SlicesConfig, bins
from seqmix.data.source import Batch
from seqmix.data.tasks.text import TextConfig
from seqmix.models import IGNORED
from seqmix.training.monitoring.metrics import Score


def plain_hits(row: list[int], counts: Counter, n: int, most: int, documents: list[int] | None) -> list[bool]:
    """Of a sequence with its last target, whether each target is the end of an n-gram that came before and is rare."""
    seen, found = set(), []
    for end in range(1, len(row)):
        gram = (*row[max(end - n + 1, 0) : end + 1], *(() if documents is None else ("of", documents[end - 1])))
        whole = end - n + 1 >= 0
        found.append(whole and gram in seen and counts[gram[:n]] <= most)
        seen |= {gram} if whole else set()
    return found


@pytest.mark.parametrize(("n", "most"), [(2, 120), (4, 4)])
@pytest.mark.parametrize("packed", [False, True])
def test_recall_hits_of_a_thousand_sequences_match_a_plain_program(n, most, packed):
    rng = np.random.default_rng(n)
    train, rows = rng.integers(5, size=3000), rng.integers(5, size=(1000, 33))
    counts = Counter(tuple(train[i : i + n].tolist()) for i in range(3001 - n))
    documents = (rows[:, :-1] == 4).cumsum(1) if packed else None
    batch = Batch(torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:]))
    found = Slices(SlicesConfig(ngram=n, most=most), train, 16).of(batch, documents)
    assert found["recall"].names == ["other", "hit"]
    hits = found["recall"].indices.bool().tolist()
    wanted = [plain_hits(row, counts, n, most, None if documents is None else documents[i].tolist())
              for i, row in enumerate(rows.tolist())]  # fmt: skip
    assert hits == wanted
    assert 0.0003 < np.mean(hits) < 0.9
    assert found["position"].names == ["4", "8", "16", "32"]
    assert found["position"].indices[7].tolist() == [0] * 4 + [1] * 4 + [2] * 8 + [3] * 16


def test_position_bins_double_up_to_the_length():
    assert bins(1000, 64) == [(0, 16), (16, 32), (32, 64), (64, 128), (128, 256), (256, 512), (512, 1000)]
    text = TextConfig(sequence_length=8, slices=SlicesConfig()).open(257)
    short = next(iter(text.evaluation_batches(2, 1, 1)))
    assert text.loss_slices(short.batch)["recall"].indices.tolist() == [[0], [0]]


def test_evaluation_measures_every_slice_consistently_with_the_total(tmp_path):
    changes = ["model.d_model=16", "model.n_layers=1", "data.sequence_length=32", "data.slices={ngram: 3, most: 100}"]
    training = "{steps: 1, batch_size: 4, warmup_steps: 0, evaluation_batches: 2, final_evaluation_batches: 2}"
    lengths = "training.evaluation_lengths=[64,128]"
    run_of(load_config("retnet-tiny", [*changes, f"training={training}", lengths]), tmp_path / "run")
    (line,) = (json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "final" in x)
    loss_by = line["validation_loss_by"]
    assert list(loss_by["recall"]) == ["other", "hit"]
    assert min(loss_by["recall"].values()) < line["validation_loss"] < max(loss_by["recall"].values())
    # positions are those of the longest sequences, whose targets are as many in each: none is a begin token here
    assert list(loss_by["position"]) == ["8", "16", "32", "64", "128"]
    mean = np.average(list(loss_by["position"].values()), weights=[8, 8, 16, 32, 64])
    assert mean == pytest.approx(line["validation_loss_by_length"]["128"], rel=1e-3)


def test_score_accumulates_losses_by_slice_and_skips_ignored_targets():
    text = TextConfig(sequence_length=4, slices=SlicesConfig()).open(257)
    targets = torch.tensor([[1, 2, IGNORED, 4], [IGNORED] * 4])
    parts, losses = (
        text.loss_slices(Batch(torch.ones(2, 4, dtype=torch.int64), targets)),
        torch.tensor([[1.0, 2, 0, 4]] * 2),
    )
    one, two = Score(), Score()
    for axis, of in parts.items():
        one.add_partition(losses, targets, axis, of)
    two.merge(json.loads(json.dumps(vars(one))))
    two.merge(json.loads(json.dumps(vars(one))))
    assert one.measured.loss_by == two.measured.loss_by == {
        "position": {"1": 1.0, "2": 2.0, "4": 4.0},
        "recall": {"other": 2.5, "hit": 2.0},
    }  # fmt: skip
    assert math.isfinite(two.measured.loss)
