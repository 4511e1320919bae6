"""The learning benchmark: small models trained on equal budgets."""

import json
import re
from pathlib import Path

import pytest
import torch

from seqmix.lab.bench.learn import NAMES, Learning

CHANGES = ("data.paths=[text.txt]", "training.steps=8")


@pytest.mark.slow
def test_all_models_learn_the_text(seqmix):
    done = seqmix("bench", "learn", *CHANGES, "--json", "out.json")
    assert done.status == 0, done.err
    rows = json.loads(Path("out.json").read_text())["rows"]
    assert [row["name"] for row in rows] == list(NAMES)
    assert [row["tokens"] // (12 * 64) for row in rows] == [8, 8, 5, 8, 5]
    assert {row["parameters"] for row in rows} == {828_672, 853_376}
    losses = {row["name"]: row["loss"] for row in rows}
    assert max(losses.values()) < 5.5  # of 257 tokens
    assert losses["retention"] < losses["retention-5/8"]
    assert re.search("nats/token", done.out)


def test_benchmark_training_matches_seqmix_train(seqmix):
    found = Learning("retention", CHANGES)
    for _ in range(2):
        found.train_next_steps()
    file = "run.yaml"
    Path(file).write_text(found.config.model_dump_json())
    assert seqmix("train", file, "--out", "run").status == 0
    from seqmix import load_run

    trained = load_run(Path("run"))
    for mine, theirs in zip(found.model.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["retnet-tiny"], "bench learn has its own models: expected only KEY=VALUE changes, got 'retnet-tiny'"),
        ([*CHANGES, "--only", "retenton"], "there is no implementation 'retenton'; .*did you mean \"retention"),
        (["data.paths=[no.txt]"], "the corpus no.txt does not exist"),
    ],
)
def test_invalid_learning_benchmarks_are_rejected(refused, arguments, sentence):
    assert re.search(sentence, refused("bench", "learn", *arguments, status=3 if "no.txt" in sentence else 2))
