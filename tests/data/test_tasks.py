"""Tasks: what they make is what they say, their answers are right, and no two parts of a run see the same examples."""

import json
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from seqmix import (
    ConfigError,
    SeqmixError,
    build_model,
    generate_text,
    load_config,
    load_run,
    train,
)
from seqmix.data import DATA, Corpus
from seqmix.data.kinds.mqar import MqarConfig
from seqmix.data.source import share
from seqmix.data.task import EVALUATION, TOGETHER, Task, TaskConfig
from seqmix.models import IGNORED
from seqmix.registry import read_mapping
from seqmix.training import PRESETS
from seqmix.training.events import Evaluated, Stepped
from seqmix.training.metrics import Score
from seqmix.training.trainer import Trainer

TASKS = sorted(kind for kind in DATA.kinds() if kind != "text")
HARDER = {
    "copying": {"sequence_length": 40, "lengths": (3, 20), "evaluate_at": (5, 40)},
    "induction_heads": {"sequence_length": 32, "lengths": (3, 32), "evaluate_at": (16, 100)},
    "mqar": {"sequence_length": 65, "pairs": (1, 16), "vocab_size": 300, "noise": False, "evaluate_at": (16, 149)},
    "parity": {"sequence_length": 24, "lengths": (1, 7, 24), "ask": "last", "evaluate_at": (24, 50)},
    "passkey": {"sequence_length": 200, "digits": 7, "depths": (0, 33, 100), "evaluate_at": (50,)},
    "permutation": {"sequence_length": 24, "lengths": (1, 24), "ask": "last", "n": 4, "evaluate_at": (24, 50)},
    "selective_copying": {"sequence_length": 32, "symbols": (1, 16), "alphabet": 40, "evaluate_at": (8, 20)},
}
"""Other fields than the defaults, of every task."""


@pytest.fixture(scope="module")
def opened():
    """A task with its text, where it reads one; each is opened once."""
    made: dict[TaskConfig, Task] = {}

    def call(kind: str, **fields) -> Task:
        config = DATA.resolve(kind)(**fields)
        if config not in made:
            made[config] = config.open(2**20)
        return made[config]

    return call


both = pytest.mark.parametrize("fields", [{}, HARDER], ids=["defaults", "others"])


def of(kind: str, fields: dict) -> dict:
    return fields.get(kind, {})


def test_every_task_is_tried():
    assert set(HARDER) == set(TASKS)
    assert len(TASKS) == 7


# ---- what is made


@both
@pytest.mark.parametrize("kind", TASKS)
def test_every_answer_is_what_a_plain_program_finds(opened, kind, fields):
    task = opened(kind, **of(kind, fields))
    sides = [task.training_batch(step, 12, seed=0) for step in range(2)]
    sides += [batch for batch, _ in task.evaluation_batches(12, 2)]
    for inputs, targets in sides:
        for tokens, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
            asked = {place: target for place, target in enumerate(wanted) if target != IGNORED}
            found = task.config.solve(tokens)
            assert {place: found.get(place) for place in asked} == asked


@both
@pytest.mark.parametrize("kind", TASKS)
def test_tokens_are_those_that_a_model_is_to_have(opened, kind, fields):
    task = opened(kind, **of(kind, fields))
    inputs, targets = task.training_batch(0, 64, seed=0)
    assert inputs.shape == targets.shape == (64, task.config.sequence_length)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.min() >= 0
    assert inputs.max() < task.vocab_size == task.config.n_tokens
    asked = targets[targets != IGNORED]
    assert asked.min() >= 0
    assert asked.max() < task.vocab_size
    assert (targets != IGNORED).any(1).all(), "a row asks nothing"
    names = {task.config.name_of(token) for token in range(min(task.vocab_size, 100))}
    assert all(names)


@pytest.mark.parametrize("kind", TASKS)
def test_a_batch_is_a_function_of_seed_and_step(opened, kind):
    task = opened(kind)
    first = task.training_batch(3, 12, seed=7)
    task.training_batch(4, 12, seed=7)
    again = task.training_batch(3, 12, seed=7)
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets, again.targets)
    for step, seed in ((4, 7), (3, 8)):
        assert not torch.equal(task.training_batch(step, 12, seed).inputs, first.inputs)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("kind", TASKS)
def test_ranks_share_a_batch_whatever_their_number(opened, kind, world_size):
    task = opened(kind)
    whole = task.training_batch(2, 8, seed=0)
    parts = [task.training_batch(2, 8, 0, rank, world_size) for rank in range(world_size)]
    assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)


def test_ranks_that_do_not_divide_a_batch_are_refused():
    with pytest.raises(SeqmixError, match=r"3 ranks do not divide training.batch_size = 8 into equal shares"):
        share(8, 0, 3)


@pytest.mark.parametrize("kind", TASKS)
def test_examples_of_an_evaluation_are_no_examples_of_training(opened, kind):
    task = opened(kind)
    learned = {row.tobytes() for step in range(20) for row in task.training_batch(step, 32, seed=0).inputs.numpy()}
    held_out = {row.tobytes() for batch, _ in task.evaluation_batches(32, 8) for row in batch.inputs.numpy()}
    assert len(learned) > 600
    assert not learned & held_out


def test_the_generators_of_both_sides_differ_for_every_seed():
    # numpy pads the words of a seed with zeros: the first one tells the sides apart
    words = np.random.SeedSequence([EVALUATION, 0, 0]).generate_state(4)
    for seed in range(3):
        assert not np.array_equal(np.random.SeedSequence([1, seed, 0]).generate_state(4), words)


@both
@pytest.mark.parametrize("kind", TASKS)
def test_difficulties_take_turns(opened, kind, fields):
    task = opened(kind, **of(kind, fields))
    difficulties = task.config.difficulties
    rows = 3 * len(difficulties) + 1  # batches that the difficulties do not divide
    counts = []
    filled = task.fill
    task.fill = lambda rng, inputs, targets, difficulty, *, validation: (
        counts.append((difficulty, len(inputs))) or filled(rng, inputs, targets, difficulty, validation=validation)
    )
    try:
        for step in range(len(difficulties)):
            task.training_batch(step, rows, seed=0)
    finally:
        del task.fill
    for difficulty in difficulties:
        assert sum(count for at, count in counts if at == difficulty) == rows


# ---- evaluations


@both
@pytest.mark.parametrize("kind", TASKS)
def test_an_evaluation_has_as_many_examples_of_each_difficulty(opened, kind, fields):
    task = opened(kind, **of(kind, fields))
    wanted = task.config.evaluate_at or task.config.difficulties
    counts = dict.fromkeys(map(str, wanted), 0)
    for batch, slices in task.evaluation_batches(16, 4):
        asked = (batch.targets != IGNORED).any(1).tolist()
        assert slices.keys() == {task.config.axis}
        for value, there in zip(slices[task.config.axis], asked, strict=True):
            counts[value] += there
    assert set(counts.values()) == {math.ceil(64 / len(wanted))}


@pytest.mark.parametrize("kind", TASKS)
def test_an_evaluation_is_the_same_in_batches_of_any_size(opened, kind):
    task = opened(kind, **of(kind, HARDER))

    def rows(size: int, limit: int) -> list[bytes]:
        return [
            row[row != IGNORED].numpy().tobytes()
            for batch, _ in task.evaluation_batches(size, limit)
            for row in batch.targets
            if (row != IGNORED).any()
        ]

    assert rows(32, 2) == rows(16, 4)
    assert set(rows(16, 1)) <= set(rows(16, 4))


def test_a_whole_evaluation_has_the_examples_that_are_configured(opened):
    task = opened("parity", evaluation_examples=2 * TOGETHER + 5)
    assert sum(int((batch.targets != IGNORED).any(1).sum()) for batch, _ in task.evaluation_batches(50, None)) == 133
    assert sum(int((batch.targets != IGNORED).any(1).sum()) for batch, _ in task.evaluation_batches(50, 100)) == 133


def test_harder_examples_are_as_long_as_they_need(opened):
    task = opened("parity", sequence_length=16, evaluate_at=(8, 64))
    shapes = {slices["length"][0]: tuple(batch.inputs.shape) for batch, slices in task.evaluation_batches(8, 2)}
    assert shapes == {"8": (8, 16), "64": (2, 64)}  # a batch has as many tokens


# ---- each task


def test_mqar_is_that_of_the_paper(opened):
    config = MqarConfig(sequence_length=64, pairs=(8,), vocab_size=64, noise=False)
    inputs, targets = Task(config).training_batch(0, 500, seed=0)
    keys, values = inputs[:, 0:16:2], inputs[:, 1:16:2]
    assert 1 <= keys.min() <= keys.max() < 32 <= values.min() <= values.max() < 64
    for tokens in (keys, values):  # none twice in a sequence
        assert (tokens.sort(1).values.diff(dim=1) > 0).all()
    assert (targets[:, :16] == IGNORED).all()
    assert ((targets != IGNORED).sum(1) == 8).all()
    places = (targets != IGNORED).nonzero()[:, 1] - 16
    assert (places % 2 == 0).all()
    # the places between hold nothing, and every key is used as often as another
    assert (inputs[:, 16:][targets[:, 16:] == IGNORED] == 0).all()
    assert torch.bincount(keys.flatten(), minlength=32)[1:].float().std() < 15
    # first pair: g^(0.01 - 1), normalised over the 24 places
    first = (inputs[:, 16::2] == keys[:, :1]).float().argmax(1)
    shares = np.arange(1, 25) ** -0.99
    shares /= shares.sum()
    assert (first == 0).float().mean().item() == pytest.approx(shares[0], abs=0.06)
    assert (first < 4).float().mean().item() == pytest.approx(shares[:4].sum(), abs=0.06)


def test_mqar_at_power_1_takes_every_place_alike():
    config = MqarConfig(sequence_length=64, pairs=(8,), vocab_size=64, power_a=1.0)
    _, targets = Task(config).training_batch(0, 3000, seed=0)
    shares = (targets[:, 16::2] != IGNORED).float().mean(0)
    assert shares.min() > 0.29
    assert shares.max() < 0.38  # 8 of 24


def test_mqar_with_noise_fills_the_other_places():
    inputs, targets = Task(MqarConfig(sequence_length=64, pairs=(4,))).training_batch(0, 200, seed=0)
    others = inputs[:, 8:][targets[:, 8:] == IGNORED]
    assert set(others.unique().tolist()) == set(range(64))


def test_selective_copying_draws_its_places_anew(opened):
    inputs, _ = opened("selective_copying", symbols=(4,)).training_batch(0, 500, seed=0)
    shares = ((inputs != 0) & (inputs != 15)).float().mean(0)[:60]
    assert shares.min() > 0
    assert shares.max() < 0.15  # 4 of 60


def test_the_special_token_of_an_induction_head_has_a_symbol_behind_it(opened):
    task = opened("induction_heads", lengths=(3, 4))
    inputs, targets = task.training_batch(0, 64, seed=0)
    assert (inputs == task.config.symbols).sum(1).tolist() == [2] * 64
    assert targets.max() < task.config.symbols


def test_permutations_compose_as_they_are_told(opened):
    config = opened("permutation", n=3).config
    # tokens 1 and 2 of S_3 exchange the last two and the first two things: 0, 2, 1 and 1, 0, 2
    assert [config.name_of(token) for token in (0, 1, 2)] == ["123", "132", "213"]
    # 1 after 2: 0 goes to 1, then to 2; 1 to 0; 2 to 2, then to 1
    assert config.solve([2, 1]) == {0: 2, 1: 4}
    assert config.name_of(4) == "312"


def test_a_passkey_lies_where_its_depth_says(opened):
    task = opened("passkey", sequence_length=300, depths=(0, 50, 100))
    inputs, targets = task.training_batch(0, 3, seed=0)
    texts = [bytes(min(token, 255) for token in row) for row in inputs.tolist()]
    free = 300 - task.config.length_of(0) + 1
    assert [text.index(b"\nThe pass key is ") for text in texts] == [0, round(free / 2), free]
    for text, row in zip(texts, targets.tolist(), strict=True):
        digits = bytes(token for token in row if token != IGNORED)
        assert b"The pass key is " + digits + b". Remember it." in text
        assert text.endswith(b"What is the pass key? The pass key is " + digits[:-1])


def test_a_passkey_of_an_evaluation_is_hidden_in_text_held_out():
    learned, held_out = (np.full(1000, ord(letter), dtype=np.uint16) for letter in "xy")
    task = Task(DATA.resolve("passkey")(sequence_length=200), Corpus("letters", 2, "tail", learned, held_out))
    (examples,) = task.evaluation_batches(5, 1)
    for batch, letter in ((task.training_batch(0, 5, seed=0), "x"), (examples.batch, "y")):
        for row in batch.inputs.tolist():
            text = bytes(row).decode().replace("key", "")
            assert text.count(letter) == 200 - task.config.length_of(0) + 1
            assert ("x" if letter == "y" else "y") not in text


# ---- what cannot be


@pytest.mark.parametrize(
    ("kind", "fields", "sentence"),
    [
        ("mqar", {"pairs": (4, 17)}, "an example of mqar with pairs 17 takes 68 tokens, and sequence_length is 64: "
         "raise it, or take pairs 16 at most"),
        ("mqar", {"pairs": (32,)}, "pairs 32 takes as many keys, and vocab_size 64 has 31: 66 would have enough"),
        ("mqar", {"pairs": (0,)}, "pairs must be 1 or more, and is 0"),
        ("mqar", {"pairs": (4, 4)}, "pairs has a difficulty twice: [4, 4]"),
        ("mqar", {"evaluate_at": (40,)}, "pairs 40 takes as many keys"),
        ("mqar", {"pairs": ()}, "pairs"),
        ("mqar", {"power_a": 0.0}, "power_a"),
        ("mqar", {"sequence_length": 3, "pairs": None}, "sequence_length 3 is too short for an example of mqar"),
        ("copying", {"lengths": (33,)}, "takes 66 tokens, and sequence_length is 64: raise it, or take length 32"),
        ("copying", {"symbols": 1}, "symbols"),
        ("selective_copying", {"symbols": (40,)}, "an example of selective_copying with symbols 40 takes 80 tokens"),
        ("induction_heads", {"lengths": (2,)}, "length must be 3 or more, and is 2"),
        ("induction_heads", {"sequence_length": 2}, "sequence_length 2 is too short"),
        ("parity", {"lengths": (65,)}, "an example of parity with length 65 takes 65 tokens"),
        ("parity", {"ask": "none"}, "ask"),
        ("permutation", {"n": 7}, "n"),
        ("passkey", {"depths": (101,)}, "depth is a percentage, from 0 to 100, and is 101"),
        ("passkey", {"sequence_length": 60}, "an example of passkey with depth 0 takes 81 tokens"),
    ],
    ids=str,
)  # fmt: skip
def test_a_task_that_cannot_be_is_refused(kind, fields, sentence):
    with pytest.raises(ValidationError) as raised:
        DATA.resolve(kind)(**fields)
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("model.vocab_size=63", "data.kind mqar has 64 tokens as it is configured, and model.vocab_size is 63"),
        ("training.carry_state=true", "training.carry_state goes on in a text, and data.kind is mqar"),
        ("training.evaluation_lengths=[8]", "training.evaluation_lengths are those of a text, and data.kind is mqar"),
        ("data.packing=true", "data.packing: unknown key 'packing'; allowed: kind, sequence_length"),
        ("data.order=epochs", "unknown key 'order'"),
        ("data.kind=mqr", "unknown data kind 'mqr'; allowed: copying, "),
        ("data.kind=mqr", 'did you mean "mqar"?'),
    ],
    ids=str,
)
def test_a_run_that_cannot_have_a_task_is_refused(change, sentence):
    with pytest.raises(ConfigError) as raised:
        load_config("mqar-tiny", [change])
    assert sentence in str(raised.value)


# ---- kinds


def test_data_that_says_no_kind_is_a_text():
    config = load_config("retnet-tiny", ["data={sequence_length: 32}"])
    assert (config.data.kind, config.data.sequence_length) == ("text", 32)


def test_another_kind_replaces_what_a_text_has(tmp_path):
    (tmp_path / "base.yaml").write_text("extends: retnet-tiny\ndata: {paths: [text.txt], split: tail}\n")
    (tmp_path / "run.yaml").write_text("extends: base.yaml\ndata: {kind: parity}\n")
    assert load_config(tmp_path / "run.yaml").data == DATA.resolve("parity")()
    assert load_config(tmp_path / "base.yaml", ["data={kind: parity}"]).data == DATA.resolve("parity")()
    # also where the first of the files has no data
    whole = read_mapping("retnet-tiny", PRESETS)
    del whole["data"]
    (tmp_path / "root.yaml").write_text(json.dumps(whole))
    (tmp_path / "base2.yaml").write_text("extends: root.yaml\ndata: {paths: [text.txt]}\n")
    (tmp_path / "run2.yaml").write_text("extends: base2.yaml\ndata: {kind: parity}\n")
    assert load_config(tmp_path / "run2.yaml").data == DATA.resolve("parity")()
    # and the same kind changes it
    again = load_config(tmp_path / "base.yaml", ["data={kind: text, sequence_length: 8}"]).data
    assert (again.paths, again.sequence_length) == (("text.txt",), 8)


def test_what_is_wrong_with_a_text_is_told_where_it_stands(tmp_path):
    (tmp_path / "run.yaml").write_text("extends: retnet-tiny\ndata:\n  split: random\n")
    with pytest.raises(ConfigError, match=r"run.yaml:3: data.split: needs 'auto', 'by_document', 'by_file' or 'tail'"):
        load_config(tmp_path / "run.yaml")


# ---- runs

SMALL = (
    "model.d_model=16", "data.sequence_length=16", "data.pairs=[2,4]", "data.evaluation_examples=48",
    "training={steps: 6, batch_size: 8, warmup_steps: 1, evaluate_every: 3, evaluation_batches: 2, log_every: 1, "
    "checkpoint_every: 2}",
)  # fmt: skip


def test_a_run_tells_how_much_is_right(tmp_path):
    config = load_config("mqar-tiny", SMALL)
    events = list(train(config, tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    assert [(event.step, event.final) for event in evaluated] == [(3, False), (6, True)]
    for event, line in zip(evaluated, (line for line in lines if "validation_loss" in line), strict=True):
        assert line == {
            "step": event.step,
            "validation_loss": event.loss,
            "final": event.final,
            "accuracy": event.accuracy,
            "accuracy_by": event.accuracy_by,
        }
        assert list(line["accuracy_by"]["pairs"]) == ["2", "4"]
        two, four = line["accuracy_by"]["pairs"].values()
        assert line["accuracy"] == pytest.approx((2 * two + 4 * four) / 6)


def test_a_score_counts_every_answer_by_what_its_row_is():
    x = IGNORED
    score = Score()
    targets = torch.tensor([[x, 3, 4], [5, x, x], [x, x, x]])
    slices = {"pairs": ["2", "4", "4"], "depth": ["0", "0", "9"]}
    score.add(3.0, targets, torch.tensor([3, 0, 5]), slices)
    score.add(1.0, torch.tensor([[7, x, x]]), torch.tensor([6]), {"pairs": ["4"], "depth": ["9"]})
    found = score.measured
    assert (found.loss, found.accuracy) == (1.0, 0.5)
    assert found.accuracy_by == {"pairs": {"2": 0.5, "4": 0.5}, "depth": {"0": 2 / 3, "9": 0.0}}


def test_accuracy_is_that_of_the_most_probable_token():
    config = load_config("mqar-tiny", SMALL)
    model = build_model(config.model, seed=1)
    trainer = Trainer(config, config.open_data(), model, torch.optim.SGD(model.parameters()))
    found = trainer.evaluate(final=True)
    right, asked, loss = {"2": 0, "4": 0}, {"2": 0, "4": 0}, 0.0
    for batch, slices in trainer.source.evaluation_batches(8, None):
        with torch.no_grad():
            logits = model(batch.inputs).logits
        for row, value in enumerate(slices["pairs"]):
            for place in (batch.targets[row] != IGNORED).nonzero()[:, 0].tolist():
                target = batch.targets[row, place]
                right[value] += int(logits[row, place].argmax() == target)
                asked[value] += 1
                loss -= logits[row, place].log_softmax(-1)[target].item()
    assert asked == {"2": 48, "4": 96}
    assert sum(right.values()) > 0
    assert found.accuracy == sum(right.values()) / 144
    assert found.accuracy_by == {"pairs": {value: right[value] / asked[value] for value in ("2", "4")}}
    assert found.loss == pytest.approx(loss / 144, rel=1e-5)


def test_a_resumed_run_is_the_undisturbed_one(tmp_path):
    config = load_config("mqar-tiny", SMALL)
    whole = [event.loss for event in train(config, tmp_path / "whole") if isinstance(event, Stepped | Evaluated)]
    events: list = []
    for event in train(config, tmp_path / "parts", stop=lambda: events[-1].step == 3):
        events.append(event)
    assert events[-1].step == 3
    events += train(config, tmp_path / "parts", resume=True)
    assert [event.loss for event in events if isinstance(event, Stepped | Evaluated)] == whole


def test_a_model_of_a_task_has_no_text(tmp_path):
    for _ in train(load_config("mqar-tiny", SMALL), tmp_path / "run"):
        pass
    model = load_run(tmp_path / "run")
    assert model.tokenizer is None
    with pytest.raises(SeqmixError, match="the tokens of this model stand for no text"):
        generate_text(model, ["def "])


def test_the_command_shows_accuracy_and_no_prompt(seqmix):
    done = seqmix("train", "mqar-tiny", *SMALL, "--out", "run")
    assert done.status == 0
    assert "the task mqar: pairs 2, 4 in 16 tokens, measured at 2, 4" in done.out
    assert "% right; pairs 2: " in done.out
    assert "bits/byte" not in done.out
    assert "seqmix generate" not in done.out


def test_a_text_has_no_accuracy(config_of, tmp_path):
    for event in train(config_of("training.steps=2", "training.warmup_steps=1"), tmp_path / "run"):
        if isinstance(event, Evaluated):
            assert event.accuracy is None
    assert "accuracy" not in (tmp_path / "run" / "metrics.jsonl").read_text()
