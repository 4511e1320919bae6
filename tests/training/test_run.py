"""The loop: the same seed is the same run, however often it was stopped."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from seqmix import RunConfig, SeqmixError, account, build_model, load_run, train
from seqmix.data import TextConfig
from seqmix.mixers.state import to_dict
from seqmix.models import IGNORED
from seqmix.training import TrainingError, read_config
from seqmix.training.checkpoint import Best, checkpoints, find, read_manifest, step_of
from seqmix.training.events import Evaluated, Noted, Saved, Started, Stepped, StoppedEarly
from seqmix.training.metrics import Measured
from seqmix.training.nonfinite import NotFiniteError
from seqmix.training.optim import learning_rate
from seqmix.training.run import Course
from seqmix.training.trainer import Trainer

DROPOUT = ("model.dropout=0.1", "model.blocks.ret.dropout=0.1")


def run_of(config: RunConfig, run: Path, **options) -> list:
    """All events of a run."""
    return list(train(config, run, **options))


def stopped(config: RunConfig, run: Path, kind: type, step: int, **options) -> list:
    """All events of a run that is asked to stop with an event of this kind and step."""
    events: list = []
    for event in train(
        config, run, stop=lambda: any(isinstance(e, kind) and e.step == step for e in events), **options
    ):
        events.append(event)
    return events


def metrics(run: Path) -> list[dict]:
    """The lines of a run, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = {"tokens_per_second", "mfu", "memory_bytes"}
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]


def checkpoint_bytes(run: Path) -> dict[str, bytes]:
    """Step, parameters and moments of the newest checkpoint, to the bit."""
    folder = checkpoints(run)[-1]
    tensors = {
        f"{file.name}: {name}": tensor.numpy().tobytes()
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    return {"folder": folder.name.encode(), **tensors}


def trainer_of(config: RunConfig, optimizer=lambda model: torch.optim.SGD(model.parameters())) -> Trainer:
    model = build_model(config.model, seed=config.seed)
    return Trainer(config, config.open_data(), model, optimizer(model))


# ---- a run


def test_a_run_is_told_in_events(config_of, tmp_path):
    first, *events = run_of(config_of(), tmp_path / "run")
    assert isinstance(first, Started)
    assert (first.step, first.device.type, first.precision) == (0, "cpu", torch.float32)
    assert first.parameters == sum(p.numel() for p in build_model(config_of().model).parameters())
    kinds = [Stepped, Stepped, Evaluated, Saved]
    assert [type(event) for event in events] == kinds * 3
    assert [event.step for event in events] == [1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6, 6]
    assert [event.final for event in events if isinstance(event, Evaluated)] == [False, False, True]
    assert all(event.tokens_per_second > 0 for event in events if isinstance(event, Stepped))


def test_a_run_learns(config_of, tmp_path):
    config = config_of("training.steps=60", "training.learning_rate=1.0e-2", "training.evaluate_every=60")
    events = run_of(config, tmp_path / "run")
    losses = [event.loss for event in events if isinstance(event, Stepped)]
    assert losses[0] > 5
    assert losses[-1] < 3
    (evaluated,) = (event for event in events if isinstance(event, Evaluated))
    assert evaluated.loss < 3


def test_metrics_are_one_line_a_measurement(config_of, tmp_path):
    events = run_of(config_of("training.log_every=2"), tmp_path / "run")
    stepped = {event.step: event for event in events if isinstance(event, Stepped)}
    evaluated = {event.step: event for event in events if isinstance(event, Evaluated)}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 2, 4, 4, 6, 6]
    for step, line in zip((2, 4, 6), lines[::2], strict=True):
        assert line == stepped[step].__dict__
    for step, line in zip((2, 4, 6), lines[1::2], strict=True):
        assert line == {"step": step, "validation_loss": evaluated[step].loss, "final": step == 6}


def test_the_last_step_is_logged_evaluated_and_saved_wherever_it_falls(config_of, tmp_path):
    every = (f"training.{name}=4" for name in ("log_every", "evaluate_every", "checkpoint_every"))
    events = run_of(config_of(*every, "training.steps=5"), tmp_path / "run")
    assert [event.step for event in events if isinstance(event, Evaluated)] == [4, 5]
    assert [event.step for event in events if isinstance(event, Saved)] == [4, 5]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [4, 4, 5, 5]


def test_each_step_has_the_learning_rate_of_the_schedule(config_of, tmp_path):
    config = config_of("training.schedule=linear", "training.final_lr_ratio=0.1")
    rates = [event.learning_rate for event in run_of(config, tmp_path / "run") if isinstance(event, Stepped)]
    assert rates == [learning_rate(step, config.training) for step in range(6)]
    assert len(set(rates)) == 5  # the warm-up's last is the fall's first


def test_the_optimizer_steps_with_that_rate(config_of):
    trainer = trainer_of(config_of())
    for step in range(3):
        _, _, rate = trainer.train_step(step)
        assert [group["lr"] for group in trainer.optimizer.param_groups] == [rate]


def test_the_configuration_is_written_resolved(config_of, tmp_path):
    config = config_of()
    run_of(config, tmp_path / "run")
    assert read_config(tmp_path / "run") == config


def test_the_trained_model_is_read_back(config_of, tmp_path):
    run_of(config_of("training.learning_rate=0.1"), tmp_path / "run")
    model = load_run(tmp_path / "run")
    assert not model.training
    assert model.config == config_of().model
    started = build_model(config_of().model)
    assert not torch.equal(model.embedding.weight, started.embedding.weight)
    again = load_run(str(tmp_path / "run"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_global_generator_is_left_as_it_was(config_of, tmp_path):
    before = torch.get_rng_state()
    run_of(config_of(*DROPOUT), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


# ---- loss


def test_the_loss_is_the_mean_over_the_targets_that_count(config_of, tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(40):  # short documents: every sequence has a border
        (tmp_path / "texts" / f"{number}").write_text("a short text, nothing more. " * 2)
    config = config_of(f"data.paths=[{tmp_path / 'texts'}]", "data.split=tail", "training.batch_size=16")
    trainer = trainer_of(config)
    batch = trainer.source.training_batch(0, 16, seed=0)
    counted = batch.targets != IGNORED
    assert 0 < (~counted).sum() < counted.sum()
    with torch.no_grad():
        log_probabilities = trainer.model(batch.inputs).logits.log_softmax(-1)
    expected = -log_probabilities[counted].gather(1, batch.targets[counted][:, None]).mean()
    assert trainer.train_step(0)[0] == pytest.approx(expected.item(), rel=1e-5)


def test_the_validation_loss_is_the_mean_over_every_byte_held_out(config_of):
    trainer = trainer_of(config_of("model.blocks.ret.dropout=0.5"))
    tokens = torch.from_numpy(trainer.source.corpus.validation.astype("int64"))
    rows = (len(tokens) - 1) // 16
    assert rows % 4, "the last batch is to be padded"
    inputs, targets = (tokens[at : at + rows * 16].view(rows, 16) for at in (0, 1))
    with torch.no_grad():
        log_probabilities = trainer.model.eval()(inputs).logits.log_softmax(-1)
    expected = -log_probabilities.gather(2, targets[..., None]).mean().item()
    trainer.model.train()
    assert trainer.evaluate(final=True).loss == pytest.approx(expected, rel=1e-5)


def test_only_the_final_evaluation_may_be_longer(config_of):
    config = config_of("training.evaluation_batches=2", "training.final_evaluation_batches=3")
    trainer, batches = trainer_of(config), []
    trainer.model.embedding.register_forward_hook(lambda *_: batches.append(1))
    trainer.evaluate()
    assert len(batches) == 2
    trainer.evaluate(final=True)
    assert len(batches) == 2 + 3


def test_an_evaluation_keeps_no_graph(config_of):
    trainer = trainer_of(config_of())
    seen = []
    trainer.model.norm.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    trainer.evaluate()
    assert not any(seen)


# ---- accumulation


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_a_batch_in_parts_is_the_batch(config_of, accumulate):
    def after_a_step(parts):
        # plain gradient descent: a difference of the gradients shows in proportion
        trainer = trainer_of(config_of("training.batch_size=8", f"training.grad_accum_steps={parts}"))
        calls = []
        trainer.model.embedding.register_forward_hook(lambda *_: calls.append(1))
        before = {name: p.clone() for name, p in trainer.model.named_parameters()}
        loss, norm, rate = trainer.train_step(0)
        assert len(calls) == parts
        gradients = {name: (before[name] - p.detach()) / rate for name, p in trainer.model.named_parameters()}
        return loss, norm, gradients

    loss, norm, gradients = after_a_step(1)
    loss_in_parts, norm_in_parts, gradients_in_parts = after_a_step(accumulate)
    assert loss_in_parts == pytest.approx(loss, rel=1e-6)
    assert norm_in_parts == pytest.approx(norm, rel=1e-5)
    for name, gradient in gradients.items():
        assert_close(gradients_in_parts[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_parts_of_unequal_numbers_of_targets_weigh_by_them(config_of, tmp_path):
    # one part holds begin tokens and the other none: a mean of the parts' means would differ
    (tmp_path / "one").write_text("abcdefgh" * 40)
    for number in range(60):
        (tmp_path / f"short{number}").write_text("ab")
    paths = ", ".join(str(tmp_path / name) for name in ("one", *(f"short{n}" for n in range(60))))

    def loss(parts):
        config = config_of(f"data.paths=[{paths}]", "data.split=tail", f"training.grad_accum_steps={parts}")
        trainer = trainer_of(config)
        batch = trainer.source.training_batch(1, 4, seed=0)
        counts = (batch.targets != IGNORED).sum(1)
        assert counts.max() != counts.min()
        return trainer.train_step(1)[0]

    assert loss(4) == pytest.approx(loss(1), rel=1e-6)


@pytest.mark.parametrize("final", [False, True])
def test_parts_do_not_change_what_is_evaluated(config_of, final):
    changes = ("training.batch_size=4", "training.evaluation_batches=1", "training.final_evaluation_batches=1")
    whole, parts = (trainer_of(config_of(*changes, f"training.grad_accum_steps={n}")) for n in (1, 4))
    assert parts.evaluate(final=final).loss == pytest.approx(whole.evaluate(final=final).loss, rel=1e-6)


# ---- the same run


def test_the_same_seed_is_the_same_run(config_of, tmp_path):
    config = config_of(*DROPOUT)
    for name in ("a", "b"):
        torch.manual_seed(len(name))
        run_of(config, tmp_path / name)
    torch.manual_seed(99)
    run_of(config_of(*DROPOUT, "seed=1"), tmp_path / "c")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert checkpoint_bytes(tmp_path / "a") == checkpoint_bytes(tmp_path / "b")
    assert metrics(tmp_path / "a") != metrics(tmp_path / "c")


def test_dropout_is_drawn_anew_in_every_step(config_of):
    # a rate of 0 in effect: only dropout and data differ between steps, and the data are made the same
    trainer = trainer_of(config_of("model.dropout=0.5", "training.learning_rate=1.0e-30"))
    masks = []
    trainer.model.blocks[0].register_forward_pre_hook(lambda module, args: masks.append(args[0] == 0))
    for step in (0, 1, 0):
        trainer.train_step(step)
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])


# ---- stopping and resuming


@pytest.mark.parametrize(("kind", "step"), [(Stepped, 1), (Evaluated, 2), (Stepped, 3), (Evaluated, 4), (Stepped, 5)])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(config_of, tmp_path, kind, step):
    config = config_of(*DROPOUT)
    run_of(config, tmp_path / "whole")
    events = stopped(config, tmp_path / "run", kind, step)
    assert isinstance(events[-1], Saved)
    assert events[-1].step == step
    started, *rest = run_of(read_config(tmp_path / "run"), tmp_path / "run", resume=True)
    assert started.step == step
    assert [event.step for event in rest if isinstance(event, Stepped)] == list(range(step + 1, 7))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert checkpoint_bytes(tmp_path / "run") == checkpoint_bytes(tmp_path / "whole")


def test_a_run_stopped_again_and_again_is_the_unbroken_one(config_of, tmp_path):
    config = config_of(*DROPOUT, "model.pattern=[ret, attn]", preset="hybrid-tiny")
    run_of(config, tmp_path / "whole")
    stopped(config, tmp_path / "run", Stepped, 1)
    for step in range(2, 7):
        stopped(config, tmp_path / "run", Stepped if step % 2 else Evaluated, step, resume=True)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert checkpoint_bytes(tmp_path / "run") == checkpoint_bytes(tmp_path / "whole")


@pytest.mark.parametrize("torn", ["", '{"step": 5, "lo', "no line of ours\n", "[5]\n", '{"loss": 1}\n', "\0\0\n"])
def test_a_killed_run_goes_on_from_its_last_checkpoint(config_of, tmp_path, torn):
    config = config_of(*DROPOUT)
    run_of(config, tmp_path / "whole")
    for event in train(config, tmp_path / "run"):
        if isinstance(event, Stepped) and event.step == 5:
            break
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(torn)
    started, *_ = run_of(config, tmp_path / "run", resume=True)
    assert started.step == 4
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert checkpoint_bytes(tmp_path / "run") == checkpoint_bytes(tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_starts_again(config_of, tmp_path):
    config = config_of(*DROPOUT)
    run_of(config, tmp_path / "whole")
    for event in train(config, tmp_path / "run"):
        if isinstance(event, Stepped):
            break
    started, *_ = run_of(config, tmp_path / "run", resume=True)
    assert started.step == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert checkpoint_bytes(tmp_path / "run") == checkpoint_bytes(tmp_path / "whole")


def test_a_finished_run_has_nothing_left_to_do(config_of, tmp_path):
    run_of(config_of(), tmp_path / "run")
    before = metrics(tmp_path / "run"), checkpoint_bytes(tmp_path / "run")
    (event,) = run_of(config_of(), tmp_path / "run", resume=True)
    assert event.step == 6
    assert (metrics(tmp_path / "run"), checkpoint_bytes(tmp_path / "run")) == before


def test_a_stop_at_the_last_step_saves_once(config_of, tmp_path):
    events = stopped(config_of(), tmp_path / "run", Evaluated, 6)
    assert [event.step for event in events if isinstance(event, Saved)] == [2, 4, 6]


# ---- what goes wrong


def refusal(config: RunConfig, run: Path, **options) -> str:
    with pytest.raises(SeqmixError) as raised:
        run_of(config, run, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_folder_that_holds_a_run_is_left_alone(config_of, tmp_path):
    run_of(config_of(), tmp_path / "run")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    message = refusal(config_of("seed=1"), tmp_path / "run")
    assert "already holds a run" in message
    assert f"--resume {tmp_path / 'run'}" in message
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_a_folder_that_holds_something_else_is_left_alone(config_of, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert "is not an empty folder" in refusal(config_of(), tmp_path / "run")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_file_is_no_folder(config_of, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert "is not an empty folder" in refusal(config_of(), tmp_path / "run")


def test_of_two_runs_that_start_at_once_one_gets_the_folder(config_of, tmp_path, monkeypatch):
    opened = TextConfig.open

    def slow(data, vocab_size, run):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text("the other's")
        return opened(data, vocab_size, run)

    monkeypatch.setattr(TextConfig, "open", slow)
    assert "already holds a run" in refusal(config_of(), tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").read_text() == "the other's"
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_run_is_trained_by_one_at_a_time(config_of, tmp_path):
    first = train(config_of(), tmp_path / "run")
    assert [next(first).step for _ in range(5)][-1] == 2
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").glob("*.*")}
    message = refusal(config_of(), tmp_path / "run", resume=True)
    assert message == f"another process trains {tmp_path / 'run'}: stop it first, or wait until it ends"
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").glob("*.*")} == before
    first.close()
    started, *_ = run_of(config_of(), tmp_path / "run", resume=True)
    assert started.step == 2


def test_an_empty_folder_is_taken(config_of, tmp_path):
    (tmp_path / "run").mkdir()
    assert run_of(config_of("training.steps=2"), tmp_path / "run")


@pytest.mark.parametrize("override", ["data.paths=[nowhere]", "model.blocks.ret.mixer.n_heads=3"])
def test_a_run_that_cannot_start_leaves_no_folder(config_of, tmp_path, override):
    refusal(config_of(override), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("every", "seen"), [(1, 4), (3, 5), (100, 5)])
def test_a_loss_that_is_not_finite_stops_the_run(config_of, tmp_path, monkeypatch, every, seen):
    # the fourth step ruins the parameters
    monkeypatch.setattr("seqmix.training.trainer.learning_rate", lambda step, config: 1e30 if step == 3 else 1e-3)
    config = config_of(
        "training.evaluate_every=100", "training.keep_checkpoints=9", f"training.checkpoint_every={every}"
    )
    with pytest.raises(TrainingError) as raised:
        run_of(config, tmp_path / "run")
    message = str(raised.value)
    assert "\n" not in message
    assert re.match(rf"step {seen}: the loss.* is (nan|inf)", message)
    assert "training.learning_rate" in message
    assert "first in the output of " in message
    written = checkpoints(tmp_path / "run")
    assert (f"the newest checkpoint is {written[-1]}" if written else "no checkpoint was written yet") in message
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4]
    # what it ruined was not kept
    assert len(checkpoints(tmp_path / "run")) == 3 // every
    for folder in checkpoints(tmp_path / "run"):
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())


def test_a_validation_loss_that_is_not_finite_stops_the_run(config_of, tmp_path):
    trainer = trainer_of(config_of())
    trainer.model.norm.register_forward_hook(lambda norm, args, out: out if trainer.model.training else out * math.nan)
    with pytest.raises(TrainingError, match=r"^step 2: the validation loss is nan"):
        list(Course(trainer, tmp_path).steps(0, lambda: False))
    assert not checkpoints(tmp_path)


def test_a_gradient_that_is_not_finite_changes_no_parameter(config_of, tmp_path):
    trainer = trainer_of(config_of())
    trainer.model.head.weight.register_hook(lambda gradient: gradient * math.nan)
    before = [p.clone() for p in trainer.model.parameters()]
    fault = r"the gradient's norm is nan, first in the gradient of head\.weight"
    with pytest.raises(NotFiniteError, match=f"^{fault}$"):
        trainer.train_step(0)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    with pytest.raises(TrainingError, match=f"^step 1: {fault}; "):
        list(Course(trainer, tmp_path).steps(0, lambda: False))


def test_a_value_that_is_not_finite_is_named_by_its_module(config_of):
    trainer = trainer_of(config_of(*DROPOUT, "training.grad_accum_steps=2"))
    with torch.no_grad():
        trainer.model.blocks[1].mixer.out_proj.weight[3, 3] = math.inf
    fault = r"^the loss is nan, first in the output of blocks\.1\.mixer\.out_proj, whose weight is not finite$"
    with pytest.raises(NotFiniteError, match=fault):
        trainer.train_step(0)


# ---- evaluations


def test_further_lengths_are_evaluated_too(config_of, tmp_path):
    config = config_of("training.evaluation_lengths=[8, 64]", "training.final_evaluation_batches=3")
    events = run_of(config, tmp_path / "run")
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    assert all(list(event.by_length) == [8, 64] for event in evaluated)
    assert all(len({event.loss, *event.by_length.values()}) == 3 for event in evaluated)
    lines = [line for line in metrics(tmp_path / "run") if "final" in line]
    assert [line["validation_loss_by_length"] for line in lines] == [
        {str(length): loss for length, loss in event.by_length.items()} for event in evaluated
    ]
    # and nothing else is changed by it
    plain = run_of(config_of("training.final_evaluation_batches=3"), tmp_path / "plain")
    assert [event.loss for event in evaluated] == [event.loss for event in plain if isinstance(event, Evaluated)]
    assert checkpoint_bytes(tmp_path / "run") == checkpoint_bytes(tmp_path / "plain")


def test_an_evaluation_reads_as_many_tokens_at_any_length(config_of):
    trainer, shapes = trainer_of(config_of()), []
    trainer.model.embedding.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[:2])))
    for length in (None, 8, 64):
        trainer.evaluate(length=length)
    assert shapes == [(4, 16)] * 2 + [(8, 8)] * 2 + [(1, 64)] * 2


def test_a_length_beyond_the_text_is_refused_before_anything_is_written(config_of, tmp_path):
    message = refusal(config_of("training.evaluation_lengths=[16, 3000]"), tmp_path / "run")
    assert message.startswith("training.evaluation_lengths has 3000, which takes 3001 tokens of validation text")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def losses_are(monkeypatch):
    """Make evaluations give these losses, one after another, and the final one 9."""

    def give(*losses: float) -> None:
        rest = iter(losses)
        monkeypatch.setattr(
            Trainer, "evaluate", lambda self, *, final, length=None: Measured(9.0 if final else next(rest))
        )

    return give


EARLY = ("training.patience=2", "training.evaluate_every=1", "training.checkpoint_every=100", "training.steps=9")


def test_a_run_that_gets_no_better_stops(config_of, tmp_path, losses_are):
    losses_are(4, 3, 3.5, 2, 2, 2.5)
    events = run_of(config_of(*EARLY), tmp_path / "run")
    assert events[-1] == StoppedEarly(6, best_step=4, best_loss=2)
    assert [(event.step, event.loss) for event in events if isinstance(event, Evaluated) and event.final] == [(6, 9.0)]
    # its last step and its best one are there
    assert [step_of(folder) for folder in checkpoints(tmp_path / "run")] == [4, 6]
    # and it does not go on
    losses_are()
    started, end = run_of(config_of(*EARLY), tmp_path / "run", resume=True)
    assert (started.step, end) == (6, events[-1])


def test_patience_outlasts_a_stop(config_of, tmp_path, losses_are):
    losses_are(4, 3, 3.5, 3.5)
    whole = run_of(config_of(*EARLY), tmp_path / "whole")
    losses_are(4, 3, 3.5)
    stopped(config_of(*EARLY), tmp_path / "run", Stepped, 3)
    losses_are(3.5)
    assert run_of(config_of(*EARLY), tmp_path / "run", resume=True)[-1] == whole[-1] == StoppedEarly(4, 2, 3)


def test_the_best_step_is_kept_and_found(config_of, tmp_path, losses_are):
    losses_are(3, 2, 2.5, 2.7)
    every = ("training.evaluate_every=1", "training.checkpoint_every=1", "training.keep_checkpoints=1")
    config = config_of(*every, "training.steps=4")
    run_of(config, tmp_path / "run")
    assert [step_of(folder) for folder in checkpoints(tmp_path / "run")] == [2, 4]
    assert find(tmp_path / "run", "best").manifest.step == 2
    assert find(tmp_path / "run").manifest.best == Best(loss=2, step=2, evaluations_since=2)
    losses_are(3, 2, 2.5, 2.7)
    run_of(config_of(*every, "training.steps=4", "training.keep_best=false"), tmp_path / "plain")
    assert [step_of(folder) for folder in checkpoints(tmp_path / "plain")] == [4]


# ---- carried state

CARRY = ("training.carry_state=true", "training.evaluate_every=100", "training.keep_best=false")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_carried_state_is_that_of_the_text_before(config_of, accumulate):
    """The loss of a step is that of reading the lane from its start, in which the steps before are without effect."""
    config = config_of(*CARRY, "training.learning_rate=1.0e-30", f"training.grad_accum_steps={accumulate}")
    trainer = trainer_of(config)
    batches = [trainer.batch(step) for step in range(4)]
    for one, two in pairwise(batches):
        assert torch.equal(one.targets[:, -1], two.inputs[:, 0])
    with torch.no_grad():
        whole = torch.cat([batch.inputs for batch in batches], dim=1)
        log_probabilities = trainer.model(whole).logits.log_softmax(-1).chunk(4, dim=1)
    for step, (batch, expected) in enumerate(zip(batches, log_probabilities, strict=True)):
        loss = trainer.train_step(step).loss
        assert loss == pytest.approx(-expected.gather(2, batch.targets[..., None]).mean().item(), rel=1e-5)
    cold = trainer_of(config)
    assert cold.train_step(3).loss != pytest.approx(loss, rel=1e-4)


def test_gradients_end_at_the_border_of_a_step(config_of):
    trainer = trainer_of(config_of(*CARRY))
    trainer.train_step(0)
    assert trainer.state is not None
    assert not any(leaf.requires_grad for leaf in to_dict(trainer.state).values())


def test_a_new_reading_of_the_text_starts_from_nothing(config_of):
    config = config_of(*CARRY, "training.learning_rate=1.0e-30")
    trainer = trainer_of(config)
    per_reading = (2701 - 16) // (4 * 16)
    for step in range(per_reading + 1):
        loss = trainer.train_step(step).loss
    cold = trainer_of(config)
    assert loss == pytest.approx(cold.train_step(per_reading).loss, rel=1e-6)


@pytest.mark.parametrize("preset", ["retnet-tiny", "hybrid-tiny"])
def test_a_resumed_run_with_carried_state_is_the_unbroken_one(config_of, tmp_path, preset):
    window = ["model.blocks.attn.mixer.window=8"] if preset == "hybrid-tiny" else []
    config = config_of(*CARRY, *DROPOUT, "training.grad_accum_steps=2", *window, "model.n_layers=4", preset=preset)
    run_of(config, tmp_path / "whole")
    stopped(config, tmp_path / "run", Stepped, 3)
    run_of(config, tmp_path / "run", resume=True)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert checkpoint_bytes(tmp_path / "run") == checkpoint_bytes(tmp_path / "whole")
    assert any(name.startswith("state.safetensors") for name in checkpoint_bytes(tmp_path / "run"))


def test_a_growing_state_is_not_carried(config_of):
    with pytest.raises(SeqmixError) as raised:
        config_of("training.carry_state=true", "model.n_layers=4", preset="hybrid-tiny")
    assert "model.blocks.attn.mixer (attention) grows with the text" in str(raised.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.packing=true", "data.packing starts every document from nothing, and training.carry_state does not"),
        ("data.order=epochs", "carry_state reads text in its own order, and data.order epochs is another"),
    ],
)
def test_what_a_carried_state_is_not_for_is_refused(config_of, override, sentence):
    with pytest.raises(SeqmixError, match=sentence):
        config_of("training.carry_state=true", override)


def test_documents_are_packed_at_every_length(config_of, tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}").write_text("a short text, nothing more. " * (1 + number % 3))
    data = (f"data.paths=[{tmp_path / 'texts'}]", "data.packing=true", "data.split=tail")
    trainer = trainer_of(config_of(*data, "training.evaluation_lengths=[64]"))
    assert trainer.source.most_documents(64) > trainer.source.most_documents(16) > 1
    losses = [trainer.evaluate(final=True, length=length).loss for length in (16, 64)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)
    assert all(map(math.isfinite, losses))


def test_a_text_too_short_for_lanes_is_refused_before_anything_is_written(config_of, tmp_path):
    message = refusal(config_of(*CARRY, "training.batch_size=200"), tmp_path / "run")
    assert "reads 200 lanes of the training text side by side, which takes 3216 tokens, and it has 2701" in message
    assert not (tmp_path / "run").exists()


# ---- what is told


def test_a_resumed_run_says_what_else_computed_it(config_of, tmp_path):
    stopped(config_of(), tmp_path / "run", Stepped, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        _, note, *_ = run_of(config_of(), tmp_path / "run", resume=True)
    finally:
        torch.set_num_threads(threads)
    expected = f"threads {threads} before and {threads + 1} from here on: results may differ in the last bits from an "
    expected += "uninterrupted run"
    assert note == Noted(1, expected)
    sessions = [json.loads(line) for line in (tmp_path / "run" / "sessions.jsonl").read_text().splitlines()]
    assert [(session["step"], session["threads"]) for session in sessions] == [(0, threads), (1, threads + 1)]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(config_of, tmp_path):
    config = config_of(*DROPOUT)
    run_of(config, tmp_path / "whole")
    run_of(config_of(*DROPOUT, "training.keep_checkpoints=3"), tmp_path / "run")
    damaged = checkpoints(tmp_path / "run")[-1] / "optimizer.safetensors"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    started, note, *_ = run_of(config, tmp_path / "run", resume=True)
    assert started.step == 4
    assert note == Noted(4, f"{damaged} is damaged: its checksum is not the one it was written with; passed over")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert checkpoint_bytes(tmp_path / "run") == checkpoint_bytes(tmp_path / "whole")


def test_utilisation_is_of_the_mixers_own_operations(config_of, tmp_path, monkeypatch):
    monkeypatch.setattr("seqmix.training.run.peak_flops", lambda device, precision: 1e9)
    events = run_of(config_of(), tmp_path / "run")
    cost = account(config_of().model, length=16)
    for event in events:
        if isinstance(event, Stepped):
            assert event.mfu == pytest.approx(3 * cost.flops_per_token * event.tokens_per_second / 1e9)
            assert event.memory_bytes > 2**20


# ---- clipping and precision


@pytest.mark.parametrize(("limit", "clipped"), [("1.0e-3", True), ("null", False), ("1.0e+6", False)])
def test_the_gradient_is_clipped_to_its_norm(config_of, limit, clipped):
    trainer = trainer_of(config_of(f"training.clip_norm={limit}"))
    before = [p.clone() for p in trainer.model.parameters()]
    _, norm, rate = trainer.train_step(0)
    moved = sum((a - b).square().sum() for a, b in zip(before, trainer.model.parameters(), strict=True)).sqrt() / rate
    assert norm > 1e-2  # as it was
    assert moved.item() == pytest.approx(1e-3 if clipped else norm, rel=2e-2)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32), ("auto", torch.float32)]
)
def test_bfloat16_is_autocast_where_asked_for(config_of, tmp_path, monkeypatch, precision, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    started, *events = run_of(config_of(f"training.precision={precision}"), tmp_path / "run")
    assert started.precision is dtype
    trainer = trainer_of(config_of(f"training.precision={precision}"))
    seen = []
    trainer.model.blocks[0].mixer.in_proj.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    loss, _, _ = trainer.train_step(0)
    trainer.evaluate()
    assert set(seen) == {dtype}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    exact, _, _ = trainer_of(config_of("training.precision=float32")).train_step(0)
    assert loss == pytest.approx(exact, rel=1e-6 if dtype is torch.float32 else 1e-2)
    assert all(math.isfinite(event.loss) for event in events if isinstance(event, Stepped | Evaluated))


def test_tokens_a_second_are_of_the_step_alone(config_of, tmp_path, monkeypatch):
    # a clock that ticks once a reading: a step is one tick long, whatever else happens between steps
    ticks = iter(range(10**6))
    monkeypatch.setattr("seqmix.training.run.time.perf_counter", lambda: float(next(ticks)))
    events = run_of(config_of(), tmp_path / "run")
    assert {event.tokens_per_second for event in events if isinstance(event, Stepped)} == {4 * 16.0}


# ---- what makes a resumed run another one


def notes(config: RunConfig, run: Path) -> list[str]:
    """What is noted where a run goes on."""
    return [event.text for event in run_of(config, run, resume=True) if isinstance(event, Noted)]


def test_how_a_mixer_is_computed_may_change_and_is_noted(config_of, tmp_path):
    run_of(config_of("training.steps=2"), tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    text = file.read_text().replace("chunk_size: 64", "chunk_size: 32").replace("steps: 2\n", "steps: 4\n", 1)
    file.write_text(text.replace("paradigm: chunkwise", "paradigm: parallel"))
    mixer = "model.blocks.ret.mixer"
    assert notes(read_config(tmp_path / "run"), tmp_path / "run") == [
        f"{mixer}.paradigm chunkwise before and parallel from here on, {mixer}.chunk_size 64 before and 32 from here "
        "on: results may differ in the last bits from an uninterrupted run"
    ]
    assert load_run(tmp_path / "run").blocks[0].mixer.config.chunk_size == 32


def test_what_a_mixer_computes_may_not_change(config_of, tmp_path):
    run_of(config_of(), tmp_path / "run", stop=lambda: True)
    other = config_of("model.blocks.ret.mixer.gate=none", "model.blocks.ret.mixer.chunk_size=32")
    with pytest.raises(SeqmixError, match=r"under `model`, other than paradigm, chunk_size, backend of mixers$"):
        run_of(other, tmp_path / "run", resume=True)


@pytest.mark.parametrize("change", ["longer", "as long", "the same again", "split otherwise"])
def test_a_text_that_has_changed_is_noted(config_of, tmp_path, text, change):
    run_of(config_of(), tmp_path / "run", stop=lambda: True)
    content, changes = text.read_text(), ()
    if change == "longer":
        text.write_text(content + " and more")
    elif change == "as long":
        text.write_text(content[:1000] + "?" + content[1001:])
    elif change == "the same again":
        text.write_text(content)
    else:
        changes = ("data.validation_fraction=0.2",)
    sentence = f"{text} is not the text that was learned up to step 1: from here on another run"
    assert notes(config_of(*changes), tmp_path / "run") == ([] if change == "the same again" else [sentence])


def test_a_checkpoint_of_a_time_before_says_nothing_of_the_text(config_of, tmp_path, text):
    run_of(config_of(), tmp_path / "run", stop=lambda: True)
    file = checkpoints(tmp_path / "run")[-1] / "manifest.json"
    manifest = read_manifest(file.parent).model_copy(update={"data": None})
    file.write_text(manifest.model_copy(update={"sha256": manifest.checksum}).model_dump_json(exclude={"data"}))
    text.write_text(text.read_text() + " and more")
    assert notes(config_of(), tmp_path / "run") == []
