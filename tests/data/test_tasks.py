"""Tasks: generated examples, correct answers, and splits that share no examples."""

import json
import math
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from small_runs import refusal, run_of, trainer_of

from seqmix import ConfigError, generate_text, load_config, load_run
from seqmix.data import DATA, Corpus
from seqmix.data.task import BLOCK, EVALUATION, TRAINING, Task, TaskConfig
from seqmix.data.tasks.mqar import MqarConfig
from seqmix.models import IGNORED
from seqmix.registry import read_mapping
from seqmix.training import PRESETS
from seqmix.training.monitoring.events import Evaluated
from seqmix.training.monitoring.metrics import Score

TASKS = sorted(kind for kind in DATA.kinds() if kind != "text")
HARDER = {
    "compression": {"sequence_length": 20, "vocab_size": 40, "lengths": (2, 20)},
    "compositional_mqar": {
        "sequence_length": 100,
        "pairs": (1, 16),
        "vocab_size": 301,
        "noise": False,
        "evaluate_at": (16, 49),
    },
    "copying": {"sequence_length": 40, "lengths": (3, 20), "evaluate_at": (5, 40)},
    "forgetting_mqar": {
        "sequence_length": 80,
        "pairs": (3, 16),
        "updates": 3,
        "vocab_size": 300,
        "noise": False,
        "evaluate_at": (16, 40),
    },
    "fuzzy_recall": {"sequence_length": 60, "vocab_size": 11, "key_lengths": (1, 4), "evaluate_at": (2, 4)},
    "in_context_recall": {"sequence_length": 65, "vocab_size": 32, "keys": (1, 16), "noise_tokens": 9, "noise": 0.5},
    "induction_heads": {"sequence_length": 32, "lengths": (3, 32), "evaluate_at": (16, 100)},
    "listops": {"sequence_length": 60, "depth": 4, "arguments": 3, "lengths": (8, 60)},
    "memorization": {"sequence_length": 31, "vocab_size": 24, "facts": (1, 11), "map_seed": 3},
    "modular_arithmetic": {"sequence_length": 31, "brackets": True, "lengths": (1, 4, 30), "evaluate_at": (5, 60)},
    "mqar": {"sequence_length": 65, "pairs": (1, 16), "vocab_size": 300, "noise": False, "evaluate_at": (16, 149)},
    "parity": {"sequence_length": 24, "lengths": (1, 7, 24), "ask": "last", "evaluate_at": (24, 50)},
    "passkey": {"sequence_length": 200, "digits": 7, "depths": (0, 33, 100), "evaluate_at": (50,)},
    "permutation": {
        "sequence_length": 24,
        "lengths": (1, 24),
        "ask": "last",
        "group": "A4xZ5",
        "evaluate_at": (24, 50),
    },
    "ruler": {"sequence_length": 1100, "task": "cwe", "evaluate_at": (1024, 1500)},
    "selective_copying": {
        "sequence_length": 32,
        "symbols": (1, 15),
        "alphabet": 40,
        "evaluate_at": (8, 20),
        "layout": "mad",
    },
}
"""Other fields than the defaults, of every task."""


@pytest.fixture(scope="module")
def opened():
    """A task with its text, if it reads one; each is opened once."""
    made: dict[TaskConfig, Task] = {}

    def call(kind: str, **fields) -> Task:
        config = DATA.resolve(kind)(**fields)
        if config not in made:
            made[config] = config.open(2**20)
        return made[config]

    return call


@pytest.fixture(params=[{kind: {} for kind in TASKS}, HARDER], ids=["defaults", "others"])
def fields(request):
    return request.param


every = pytest.mark.parametrize("kind", TASKS)


def test_every_task_has_a_harder_variant():
    assert set(HARDER) == set(TASKS)


@every
def test_every_answer_matches_the_task_solver(opened, kind, fields):
    task = opened(kind, **fields[kind])
    batches = [task.training_batch(step, 12, seed=0) for step in range(2)]
    batches += [batch for batch, _ in task.evaluation_batches(12, 2)]
    for inputs, targets in batches:
        for tokens, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
            asked = {place: target for place, target in enumerate(wanted) if target != IGNORED}
            found = task.config.solve(tokens)
            assert {place: found.get(place) for place in asked} == asked


@every
def test_tokens_are_within_the_vocabulary(opened, kind, fields):
    task = opened(kind, **fields[kind])
    inputs, targets = task.training_batch(0, 64, seed=0)
    assert inputs.shape == targets.shape == (64, task.config.sequence_length)
    assert inputs.dtype == targets.dtype == torch.int64
    assert task.vocab_size == task.config.n_tokens
    for tokens in (inputs, targets[targets != IGNORED]):
        assert 0 <= tokens.min() <= tokens.max() < task.vocab_size
    assert (targets != IGNORED).any(1).all(), "a row asks nothing"
    assert all(task.config.name_of(token) for token in range(min(task.vocab_size, 100)))


@every
def test_batch_depends_on_seed_and_step_but_not_world_size(opened, kind):
    task = opened(kind)
    first = task.training_batch(3, 12, seed=7)
    for step, seed in ((4, 7), (3, 8)):
        assert not torch.equal(task.training_batch(step, 12, seed).inputs, first.inputs)
    for world_size in (1, 2, 4):
        parts = [task.training_batch(3, 12, 7, rank, world_size) for rank in range(world_size)]
        both = zip(zip(*parts, strict=True), first, strict=True)
        assert all(torch.equal(torch.cat(part), whole) for part, whole in both)


@every
def test_evaluation_examples_do_not_overlap_training_examples(opened, kind):
    task = opened(kind)
    learned = {row.tobytes() for step in range(20) for row in task.training_batch(step, 32, seed=0).inputs.numpy()}
    held_out = {row.tobytes() for batch, _ in task.evaluation_batches(32, 8) for row in batch.inputs.numpy()}
    assert len(learned) > 600
    assert not learned & held_out
    # numpy pads the words of a seed with zeros: the first one distinguishes the splits
    words = np.random.SeedSequence([EVALUATION, 0, 0]).generate_state(4)
    for seed in range(3):
        assert not np.array_equal(np.random.SeedSequence([TRAINING, seed, 0]).generate_state(4), words)


@every
def test_rows_cycle_through_the_difficulties(opened, kind, fields, monkeypatch):
    task = opened(kind, **fields[kind])
    difficulties, filled = task.config.difficulties, task.fill
    counts = dict.fromkeys(difficulties, 0)

    def fill(rng, inputs, targets, difficulty, **options):
        counts[difficulty] += len(inputs)
        filled(rng, inputs, targets, difficulty, **options)

    monkeypatch.setattr(task, "fill", fill)
    rows = 3 * len(difficulties) + 1  # batches that the difficulties do not divide
    for step in range(len(difficulties)):
        task.training_batch(step, rows, seed=0)
    assert set(counts.values()) == {rows}


@every
def test_evaluation_has_equally_many_examples_of_each_difficulty(opened, kind, fields):
    task = opened(kind, **fields[kind])
    wanted = task.config.evaluate_at or task.config.difficulties
    counts = dict.fromkeys(map(str, wanted), 0)
    for batch, slices in task.evaluation_batches(16, 4):
        assert slices.keys() == {task.config.axis}
        for value, asked in zip(slices[task.config.axis], (batch.targets != IGNORED).any(1).tolist(), strict=True):
            counts[value] += asked
    assert set(counts.values()) == {math.ceil(64 / len(wanted))}


@every
def test_evaluation_examples_do_not_depend_on_batch_size(opened, kind):
    task = opened(kind, **HARDER[kind])

    def rows(size: int, limit: int) -> list[bytes]:
        found = (row[row != IGNORED] for batch, _ in task.evaluation_batches(size, limit) for row in batch.targets)
        return [row.numpy().tobytes() for row in found if len(row)]

    assert rows(32, 2) == rows(16, 4)
    assert set(rows(16, 1)) <= set(rows(16, 4))


def test_full_evaluation_has_the_configured_number_of_examples(opened):
    task = opened("parity", evaluation_examples=2 * BLOCK + 5)
    for limit in (None, 100):
        batches = (batch for batch, _ in task.evaluation_batches(50, limit))
        assert sum(int((batch.targets != IGNORED).any(1).sum()) for batch in batches) == 133
    # harder examples are as long as they need, and a batch has as many tokens
    task = opened("parity", sequence_length=16, evaluate_at=(8, 64))
    shapes = {slices["length"][0]: tuple(batch.inputs.shape) for batch, slices in task.evaluation_batches(8, 2)}
    assert shapes == {"8": (8, 16), "64": (2, 64)}


def test_mqar_examples_follow_the_paper():
    config = MqarConfig(sequence_length=64, pairs=(8,), vocab_size=64, noise=False)
    inputs, targets = Task(config).training_batch(0, 500, seed=0)
    keys, values = inputs[:, 0:16:2], inputs[:, 1:16:2]
    assert 1 <= keys.min() <= keys.max() < 32 <= values.min() <= values.max() < 64
    for tokens in (keys, values):  # no duplicates in a sequence
        assert (tokens.sort(1).values.diff(dim=1) > 0).all()
    assert (targets[:, :16] == IGNORED).all()
    assert ((targets != IGNORED).sum(1) == 8).all()
    assert ((targets != IGNORED).nonzero()[:, 1] % 2 == 0).all()
    # other positions hold nothing, and every key is used as often as another
    assert (inputs[:, 16:][targets[:, 16:] == IGNORED] == 0).all()
    assert torch.bincount(keys.flatten(), minlength=32)[1:].float().std() < 15
    # first pair: g^(0.01 - 1), normalised over the 24 positions
    first = (inputs[:, 16::2] == keys[:, :1]).float().argmax(1)
    shares = np.arange(1, 25) ** -0.99
    shares /= shares.sum()
    assert (first == 0).float().mean().item() == pytest.approx(shares[0], abs=0.06)
    assert (first < 4).float().mean().item() == pytest.approx(shares[:4].sum(), abs=0.06)
    # at power 1 every position is as likely: 8 of 24
    config = MqarConfig(sequence_length=64, pairs=(8,), vocab_size=64, power_a=1.0)
    shares = (Task(config).training_batch(0, 3000, seed=0).targets[:, 16::2] != IGNORED).float().mean(0)
    assert 0.29 < shares.min() <= shares.max() < 0.38
    # noise fills the other positions
    inputs, targets = Task(MqarConfig(sequence_length=64, pairs=(4,))).training_batch(0, 200, seed=0)
    assert set(inputs[:, 8:][targets[:, 8:] == IGNORED].unique().tolist()) == set(range(64))


def test_symbols_are_placed_as_in_the_papers(opened):
    inputs, _ = opened("selective_copying", symbols=(4,)).training_batch(0, 500, seed=0)
    shares = ((inputs != 0) & (inputs != 15)).float().mean(0)[:60]
    assert 0 < shares.min() <= shares.max() < 0.15  # 4 of 60
    # the special token of an induction head has a symbol after it
    task = opened("induction_heads", lengths=(3, 4))
    inputs, targets = task.training_batch(0, 64, seed=0)
    assert (inputs == task.config.symbols).sum(1).tolist() == [2] * 64
    assert targets.max() < task.config.symbols


def test_permutations_compose_from_right_to_left(opened):
    config = opened("permutation", n=3).config
    # tokens 1 and 2 of S_3 exchange the last two and the first two items: 0, 2, 1 and 1, 0, 2
    assert [config.name_of(token) for token in (0, 1, 2, 4)] == ["123", "132", "213", "312"]
    # 1 after 2: 0 goes to 1, then to 2; 1 to 0; 2 to 2, then to 1
    assert config.solve([2, 1]) == {0: 2, 1: 4}


def test_passkey_is_at_the_configured_depth_and_filler_text_comes_from_its_split(opened):
    task = opened("passkey", sequence_length=300, depths=(0, 50, 100))
    inputs, targets = task.training_batch(0, 3, seed=0)
    texts = [bytes(min(token, 255) for token in row) for row in inputs.tolist()]
    free = 300 - task.config.length_of(0) + 1
    assert [text.index(b"\nThe pass key is ") for text in texts] == [0, round(free / 2), free]
    for text, row in zip(texts, targets.tolist(), strict=True):
        digits = bytes(token for token in row if token != IGNORED)
        assert b"The pass key is " + digits + b". Remember it." in text
        assert text.endswith(b"What is the pass key? The pass key is " + digits[:-1])
    splits = (np.full(1000, ord(letter), dtype=np.uint16) for letter in "xy")
    task = Task(DATA.resolve("passkey")(sequence_length=200), Corpus("letters", 2, "tail", *splits))
    (examples,) = task.evaluation_batches(5, 1)
    for batch, letter, other in ((task.training_batch(0, 5, seed=0), *"xy"), (examples.batch, *"yx")):
        for row in batch.inputs.tolist():
            text = bytes(row).decode().replace("key", "")
            assert (text.count(letter), text.count(other)) == (200 - task.config.length_of(0) + 1, 0)


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("mqar", {"pairs": (4, 17)}, "mqar .*pairs 17 .*68 .*sequence_length .*64.*pairs 16"),
        ("mqar", {"pairs": (32,)}, "vocab_size 64 .* 31 pairs, got 32: raise vocab_size to 66"),
        ("forgetting_mqar", {"pairs": (3,)}, "pairs must be at least 4, the number of updates, got 3"),
        ("compositional_mqar", {"pairs": (8,)}, "pairs must be a square, got 8: choose 4 or 9"),
        (
            "compositional_mqar",
            {"pairs": (9,), "vocab_size": 12},
            "vocab_size 12 .* 4 pairs, got 9: raise vocab_size to 30",
        ),
        ("mqar", {"pairs": (4, 4)}, r"pairs .*\[4, 4\]"),
        ("mqar", {"evaluate_at": (40,)}, "pairs, got 40"),
        ("mqar", {"sequence_length": 3, "pairs": None}, "sequence_length 3 .*mqar"),
        ("copying", {"lengths": (33,)}, "66 .*sequence_length .*64.*length 32"),
        ("selective_copying", {"symbols": (40,)}, "selective_copying .*symbols 40 .*80"),
        ("induction_heads", {"lengths": (2,)}, "length .*3.* 2"),
        ("parity", {"lengths": (65,)}, "parity .*length 65 .*65"),
        ("listops", {"lengths": (7,)}, "length .*8.* 7"),
        ("ruler", {"task": "cwe", "lengths": (900,)}, "cwe .*1024.* 900"),
        ("passkey", {"depths": (101,)}, "depth .*101"),
        ("passkey", {"sequence_length": 60}, "passkey .*depth 0 .*81"),
    ],
    ids=str,
)
def test_impossible_task_config_is_refused(kind, fields, named):
    with pytest.raises(ConfigError, match=named):
        DATA.resolve(kind)(**fields)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model.vocab_size=63", r"mqar .*64 .*model\.vocab_size .*63"),
        ("training.carry_state=true", r"training\.carry_state .*mqar"),
        ("training.evaluation_lengths=[8]", r"training\.evaluation_lengths .*mqar"),
        ("data.packing=true", "'packing'; allowed: kind, sequence_length"),
        ("data.order=epochs", "'order'"),
        ("data.kind=mqr", "'mqr'; did you mean \"mqar\"[?] Allowed: compositional_mqar, "),
    ],
    ids=str,
)
def test_settings_incompatible_with_a_task_are_refused(change, named):
    assert re.search(named, refusal(lambda: load_config("mqar-tiny", [change]), ConfigError))


def test_changing_the_data_kind_drops_inherited_text_fields(tmp_path):
    without = read_mapping("retnet-tiny", PRESETS)
    del without["data"]
    (tmp_path / "root.yaml").write_text(json.dumps(without))

    def data(name, text, *changes):
        (tmp_path / name).write_text(text)
        return load_config(tmp_path / name, changes).data

    parity = DATA.resolve("parity")()
    for root in ("retnet-tiny", "root.yaml"):  # also where the first of the files has no data
        base = f"extends: {root}\ndata: {{paths: [text.txt], split: tail}}\n"
        assert data("base.yaml", base, "data={kind: parity}") == parity
        assert data("run.yaml", "extends: base.yaml\ndata: {kind: parity}\n") == parity
    # the same kind changes it, and no kind is a text
    again = data("base.yaml", base, "data={kind: text, sequence_length: 8}")
    assert (again.paths, again.sequence_length) == (("text.txt",), 8)
    again = load_config("retnet-tiny", ["data={sequence_length: 32}"]).data
    assert (again.kind, again.sequence_length) == ("text", 32)


SMALL = (
    *("model.d_model=16", "data.sequence_length=16", "data.pairs=[2,4]", "data.evaluation_examples=48"),
    "training={steps: 6, batch_size: 8, warmup_steps: 1, evaluate_every: 3, evaluation_batches: 2, log_every: 1, "
    "checkpoint_every: 2}",
)


def test_task_run_measures_accuracy_and_has_no_tokenizer(tmp_path):
    config, run = load_config("mqar-tiny", SMALL), tmp_path / "run"
    events = run_of(config, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    assert [(event.step, event.final) for event in evaluated] == [(3, False), (6, True)]
    for event, line in zip(evaluated, (line for line in lines if "validation_loss" in line), strict=True):
        measured = {"validation_tokens": event.tokens, "accuracy": event.accuracy, "accuracy_by": event.accuracy_by}
        assert line == {"step": event.step, "validation_loss": event.loss, "final": event.final, **measured}
        assert list(line["accuracy_by"]["pairs"]) == ["2", "4"]
        two, four = line["accuracy_by"]["pairs"].values()
        assert line["accuracy"] == pytest.approx((2 * two + 4 * four) / 6)
    model = load_run(run)
    assert model.tokenizer is None
    assert "text" in refusal(lambda: generate_text(model, ["def "]))


def test_score_counts_answers_by_the_difficulty_of_their_row():
    x = IGNORED
    targets = torch.tensor([[x, 3, 4], [5, x, x], [x, x, x]])
    slices = {"pairs": ["2", "4", "4"], "depth": ["0", "0", "9"]}
    parts, merged = [Score(), Score()], Score()
    parts[0].add(3.0, targets, torch.tensor([3, 0, 5]), slices)
    parts[1].add(1.0, torch.tensor([[7, x, x]]), torch.tensor([6]), {"pairs": ["4"], "depth": ["9"]})
    for part in parts:  # of two processes
        merged.merge(json.loads(json.dumps(asdict(part))))
    parts[0].add(1.0, torch.tensor([[7, x, x]]), torch.tensor([6]), {"pairs": ["4"], "depth": ["9"]})
    found = merged.measured
    assert found == parts[0].measured
    assert (found.loss, found.accuracy) == (1.0, 0.5)
    assert found.accuracy_by == {"pairs": {"2": 0.5, "4": 0.5}, "depth": {"0": 2 / 3, "9": 0.0}}


def test_accuracy_counts_the_most_probable_token():
    config = load_config("mqar-tiny", [*SMALL, "seed=1"])
    trainer = trainer_of(config)
    found = trainer.evaluate(final=True)
    right, losses_of_answers = {"2": [], "4": []}, []
    for batch, slices in trainer.source.evaluation_batches(8, None):
        with torch.no_grad():
            log_probabilities = trainer.model(batch.inputs).logits.log_softmax(-1)
        for row, value in enumerate(slices["pairs"]):
            asked = batch.targets[row] != IGNORED
            found_, wanted = log_probabilities[row, asked], batch.targets[row, asked]
            right[value] += (found_.argmax(-1) == wanted).tolist()
            losses_of_answers += (-found_.gather(1, wanted[:, None])).flatten().tolist()
    assert {value: len(answers) for value, answers in right.items()} == {"2": 48, "4": 96}
    assert found.accuracy == np.mean(right["2"] + right["4"]) > 0
    assert found.accuracy_by == {"pairs": {value: np.mean(answers) for value, answers in right.items()}}
    assert found.loss == pytest.approx(np.mean(losses_of_answers), rel=1e-5)


def test_train_command_shows_accuracy_only_for_tasks(seqmix, config_of, tmp_path):
    done = seqmix("train", "mqar-tiny", *SMALL, "--out", "run")
    assert done.status == 0
    assert re.search("mqar: .*2, 4 .*2, 4", done.out)
    assert "% right; pairs 2: " in done.out
    assert "bits/byte" not in done.out
    assert "seqmix generate" not in done.out
    events = run_of(config_of("training.steps=2", "training.warmup_steps=1"), tmp_path / "text")
    assert {event.accuracy for event in events if isinstance(event, Evaluated)} == {None}
    assert "accuracy" not in (tmp_path / "text" / "metrics.jsonl").read_text()
