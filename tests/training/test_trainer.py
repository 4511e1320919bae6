"""One training step and one evaluation: loss, gradients, state and precision."""

import math
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import small_runs
import torch
from small_runs import DROPOUT
from torch.testing import assert_close

from seqmix.mixers.base.state import to_dict
from seqmix.models import IGNORED
from seqmix.training.distributed.process_groups import ProcessGroups
from seqmix.training.nonfinite import NotFiniteError, Place
from seqmix.training.schedule import learning_rate

FROZEN = "training.learning_rate=1.0e-30"
CARRY = ("training.carry_state=true", FROZEN)


@pytest.fixture
def trainer_of(config_of):
    return lambda *overrides: small_runs.trainer_of(config_of(*overrides))


def test_training_loss_is_the_mean_over_unmasked_targets(trainer_of, tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(40):  # short documents, by which every sequence has a boundary
        (tmp_path / "texts" / f"{number}").write_text("a short text, nothing more. " * 2)
    trainer = trainer_of(f"data.paths=[{tmp_path / 'texts'}]", "data.split=tail", "training.batch_size=16")
    batch = trainer.source.training_batch(0, 16, seed=0)
    counted = batch.targets != IGNORED
    assert 0 < (~counted).sum() < counted.sum()
    with torch.no_grad():
        log_probabilities = trainer.model(batch.inputs).logits.log_softmax(-1)
    expected = -log_probabilities[counted].gather(1, batch.targets[counted][:, None]).mean()
    assert trainer.train_step(0).loss == pytest.approx(expected.item(), rel=1e-5)


def test_validation_loss_is_the_mean_over_the_split(trainer_of):
    trainer, graphs = trainer_of("model.blocks.ret.dropout=0.5"), []
    tokens = torch.from_numpy(trainer.source.corpus.validation.astype("int64"))
    rows = (len(tokens) - 1) // 16
    assert rows % 4, "the last batch is to be padded"
    inputs, targets = (tokens[at : at + rows * 16].view(rows, 16) for at in (0, 1))
    with torch.no_grad():
        log_probabilities = trainer.model.eval()(inputs).logits.log_softmax(-1)
    expected = -log_probabilities.gather(2, targets[..., None]).mean().item()
    trainer.model.train()
    trainer.model.norm.register_forward_hook(lambda module, args, out: graphs.append(out.requires_grad))
    assert trainer.evaluate(final=True).loss == pytest.approx(expected, rel=1e-5)
    assert not any(graphs)


def test_evaluation_keeps_its_token_count_across_lengths(trainer_of):
    trainer, shapes = trainer_of("training.evaluation_batches=2", "training.final_evaluation_batches=3"), []
    trainer.model.embedding.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[:2])))
    for options in ({}, {"final": True}, {"length": 8}, {"length": 64}):
        trainer.evaluate(**options)
    assert shapes == [(4, 16)] * 2 + [(4, 16)] * 3 + [(8, 8)] * 2 + [(1, 64)] * 2


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches_match_the_whole_batch(trainer_of, parts):
    def after_a_step(parts):
        trainer, calls = trainer_of("training.batch_size=8", f"training.grad_accum_steps={parts}"), []
        evaluated = [trainer.evaluate(final=final).loss for final in (False, True)]
        trainer.model.embedding.register_forward_hook(lambda *_: calls.append(1))
        before = {name: p.clone() for name, p in trainer.model.named_parameters()}
        loss, norm, rate, *_ = trainer.train_step(0)
        assert len(calls) == parts
        gradients = {name: (before[name] - p.detach()) / rate for name, p in trainer.model.named_parameters()}
        return loss, norm, gradients, evaluated

    loss, norm, gradients, evaluated = after_a_step(1)
    loss_in_parts, norm_in_parts, gradients_in_parts, evaluated_in_parts = after_a_step(parts)
    assert loss_in_parts == pytest.approx(loss, rel=1e-6)
    assert norm_in_parts == pytest.approx(norm, rel=1e-5)
    assert evaluated_in_parts == pytest.approx(evaluated, rel=1e-6)
    assert_close(gradients_in_parts, gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("packing", [(), ("data.packing=true",)], ids=["", "packed"])
def test_micro_batches_are_weighted_by_targets_and_share_dropout(trainer_of, tmp_path, packing):
    # one part holds begin tokens and the other none: a mean of the parts' means would differ
    (tmp_path / "one").write_text("abcdefgh" * 40)
    for number in range(60):
        (tmp_path / f"short{number}").write_text("ab")
    paths = ", ".join(str(tmp_path / name) for name in ("one", *(f"short{n}" for n in range(60))))

    def loss(parts):
        changes = (*DROPOUT, *packing, f"training.grad_accum_steps={parts}")
        trainer = trainer_of(f"data.paths=[{paths}]", "data.split=tail", *changes)
        counts = (trainer.source.training_batch(1, 4, seed=0).targets != IGNORED).sum(1)
        assert counts.max() != counts.min()
        return trainer.train_step(1).loss

    assert loss(4) == pytest.approx(loss(1), rel=1e-6)


def test_auxiliary_loss_is_trained_per_token_but_not_reported(trainer_of):
    """The DSA indexer learns from its mixer's auxiliary loss; the reported loss is still the cross-entropy."""
    dsa = "model.blocks.ret.mixer={kind: dsa, n_heads: 2, topk: 4, index_heads: 2, index_dim: 4}"
    options = (dsa, "training.clip_norm=null")
    trainer, in_parts = trainer_of(*options), trainer_of(*options, "training.grad_accum_steps=4")
    batch = trainer.source.training_batch(0, trainer.rows, seed=0)
    losses = []
    output = trainer.model(batch.inputs, targets=batch.targets, losses=losses)
    expected = torch.autograd.grad(
        sum(losses) / batch.inputs.numel(), trainer.model.blocks[0].mixer.indexer.proj.weight
    )
    for each in (trainer, in_parts):
        gradients = []
        weight = each.model.blocks[0].mixer.indexer.proj.weight
        each.optimizer.register_step_pre_hook(lambda *_, w=weight, g=gradients: g.append(w.grad.clone()))
        before = weight.detach().clone()
        assert each.train_step(0).loss == pytest.approx(output.loss.item(), rel=1e-5)
        torch.testing.assert_close(gradients[0], expected[0], rtol=1e-4, atol=1e-8)
        assert not torch.equal(weight, before)


def test_dropout_masks_differ_between_calls_after_a_step(trainer_of):
    trainer = trainer_of("model.dropout=0.5")
    trainer.train_step(0)
    one, other = (trainer.model.dropout.train()(torch.ones(2, 4, 8)) for _ in range(2))
    assert not torch.equal(one, other)


def test_dropout_mask_depends_on_the_step(trainer_of):
    # only dropout and data differ between steps, and the data are made the same
    trainer, masks = trainer_of("model.dropout=0.5", FROZEN), []
    trainer.model.blocks[0].register_forward_pre_hook(lambda module, args: masks.append(args[0] == 0))
    for step in (0, 1, 0):
        trainer.train_step(step)
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])


def test_step_uses_the_scheduled_learning_rate(trainer_of):
    trainer = trainer_of("training.schedule=linear", "training.final_lr_ratio=0.1")
    rates = []
    for step in range(6):
        rates.append(trainer.train_step(step).learning_rate)
        assert [group["lr"] for group in trainer.optimizer.param_groups] == rates[-1:]
    assert rates == [learning_rate(step, trainer.config.training) for step in range(6)]
    assert len(set(rates)) == 5  # the warm-up's last is the decay's first


@pytest.mark.parametrize(("limit", "clipped"), [("1.0e-3", True), ("null", False), ("1.0e+6", False)])
def test_gradient_is_clipped_to_the_norm_limit(trainer_of, limit, clipped):
    trainer = trainer_of(f"training.clip_norm={limit}")
    before = [p.clone() for p in trainer.model.parameters()]
    _, norm, rate, *_ = trainer.train_step(0)
    moved = sum((a - b).square().sum() for a, b in zip(before, trainer.model.parameters(), strict=True)).sqrt() / rate
    assert norm > 1e-2  # as it was
    assert moved.item() == pytest.approx(1e-3 if clipped else norm, rel=2e-2)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32), ("auto", torch.float32)]
)
def test_autocast_follows_the_precision_setting(trainer_of, monkeypatch, precision, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    trainer, seen = trainer_of(f"training.precision={precision}"), []
    assert trainer.precision is dtype
    trainer.model.blocks[0].mixer.in_proj.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    loss = trainer.train_step(0).loss
    assert math.isfinite(trainer.evaluate().loss)
    assert set(seen) == {dtype}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    exact = trainer_of("training.precision=float32").train_step(0).loss
    assert loss == pytest.approx(exact, rel=1e-6 if dtype is torch.float32 else 1e-2)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_carried_state_continues_from_the_preceding_text(trainer_of, accumulate):
    """The loss of a step equals the loss of reading its lane from the start, as parameters are frozen."""
    trainer = trainer_of(*CARRY, f"training.grad_accum_steps={accumulate}")
    batches = [trainer.batch(step) for step in range(4)]
    for one, two in pairwise(batches):
        assert torch.equal(one.targets[:, -1], two.inputs[:, 0])
    with torch.no_grad():
        lanes = torch.cat([batch.inputs for batch in batches], dim=1)
        log_probabilities = trainer.model(lanes).logits.log_softmax(-1).chunk(4, dim=1)
    for step, (batch, expected) in enumerate(zip(batches, log_probabilities, strict=True)):
        loss = trainer.train_step(step).loss
        assert loss == pytest.approx(-expected.gather(2, batch.targets[..., None]).mean().item(), rel=1e-5)
        # gradients end at the boundary of a step
        assert not any(leaf.requires_grad for leaf in to_dict(trainer.state).values())
    assert trainer_of(*CARRY).train_step(3).loss != pytest.approx(loss, rel=1e-4)


def test_carried_state_is_reset_when_the_text_restarts(trainer_of):
    trainer, per_reading = trainer_of(*CARRY, "training.batch_size=16"), (2701 - 16) // (16 * 16)
    losses = [trainer.train_step(step).loss for step in range(per_reading + 1)]
    fresh = trainer_of(*CARRY, "training.batch_size=16")
    assert losses[-1] == pytest.approx(fresh.train_step(per_reading).loss, rel=1e-6)


def test_nonfinite_gradient_changes_no_parameter(trainer_of):
    trainer = trainer_of()
    trainer.model.head.weight.register_hook(lambda gradient: gradient * math.nan)
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(NotFiniteError, match=r"nan.* gradient .*head\.weight"):
        trainer.train_step(0)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_nonfinite_loss_names_its_module(trainer_of):
    trainer = trainer_of(*DROPOUT, "training.grad_accum_steps=2")
    trainer.model.blocks[1].mixer.out_proj.weight.data[3, 3] = math.inf
    with pytest.raises(NotFiniteError, match=r"nan.* blocks\.1\.mixer\.out_proj, .*weight"):
        trainer.train_step(0)


WAYS = [[], ["training.grad_accum_steps=4"], ["data.packing=true"], ["data.order=epochs"]]


@pytest.fixture
def letters(tmp_path):
    """Forty files by the letter that each has alone."""
    (tmp_path / "texts").mkdir()
    found = {chr(ord("0") + number): tmp_path / "texts" / f"{number:02}" for number in range(40)}
    for letter, file in found.items():
        file.write_text(f"a short text, {letter}. " * 2)
    return found


@pytest.fixture
def lettered(trainer_of, tmp_path, letters):
    """Trainers of them."""
    return partial(trainer_of, f"data.paths=[{tmp_path / 'texts'}]", "model.blocks.ret.dropout=0.0")


def in_one(inputs, letters):
    """A letter of one sequence [T] of [N T] alone, the sequence's number, and the first and last token."""
    for letter in letters:
        rows, tokens = (inputs == ord(letter)).nonzero(as_tuple=True)
        if len(set(rows.tolist())) == 1:
            found = letter, rows[0].item(), tokens.min().item(), tokens.max().item()
    return found  # of the last sequences


def require_document(error, file, letter, where):
    """The message names a sequence, its token, the file and the place of such a letter in it."""
    said, _, token = str(error.value).rpartition(", token ")
    assert said.endswith(f", in sequence {where} ({file}"), said
    assert file.read_text()[int(token.rstrip(")"))] == letter


@pytest.mark.parametrize("changes", WAYS)
def test_nonfinite_loss_names_the_document(lettered, letters, changes):
    trainer = lettered(*changes)
    letter, row, at, _ = in_one(trainer.batch(0).inputs, letters)
    trainer.model.embedding.weight.data[ord(letter)] = math.nan
    with pytest.raises(NotFiniteError, match=r"nan.* embedding, whose weight is not finite") as refused:
        trainer.train_step(0)
    require_document(refused, letters[letter], letter, f"{row} of the batch from token {at} on")
    letters[letter].unlink()  # no other file is named in its place
    with pytest.raises(NotFiniteError, match=r"texts, token \d+\)$"):
        trainer.train_step(0)


@pytest.mark.parametrize("changes", WAYS)
def test_nonfinite_gradient_names_the_document(lettered, letters, changes):
    trainer = lettered(*changes)
    letter, row, _, at = in_one(trainer.batch(0).inputs, letters)  # backward goes from the last token to the first

    def spoil(module, arguments, output):
        output = output + 0
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient.where((arguments[0] != ord(letter))[..., None], math.nan))
        return output

    trainer.model.embedding.register_forward_hook(spoil)
    with pytest.raises(NotFiniteError, match=r"norm is nan.* gradient of embedding\.weight") as refused:
        trainer.train_step(0)
    require_document(refused, letters[letter], letter, f"{row} of the batch up to token {at}")


@pytest.mark.parametrize("changes", WAYS)
def test_nonfinite_validation_loss_names_the_document(lettered, letters, changes):
    trainer = lettered("data.validation_fraction=0.4", *changes)
    rows = trainer.rows // trainer.config.training.grad_accum_steps
    batches = trainer.source.evaluation_batches(rows, 8 // rows)
    letter, row, at, _ = in_one(torch.cat([batch.inputs for batch, _ in batches]), letters)
    trainer.model.embedding.weight.data[ord(letter)] = math.nan
    with pytest.raises(NotFiniteError, match=r"validation loss is nan.* embedding, whose weight") as refused:
        trainer.evaluate()
    require_document(refused, letters[letter], letter, f"{row} of the evaluation from token {at} on")


@pytest.mark.parametrize("packed", [False, True])
def test_nonfinite_report_numbers_sequences_within_the_whole_batch(trainer_of, packed):
    trainer = trainer_of("training.batch_size=8", "training.grad_accum_steps=2", "data.sequence_length=16")
    trainer.source = SimpleNamespace(origin=lambda *place: f"{place[3:]}")
    for rank in range(4):
        trainer.groups = ProcessGroups(rank, 4, data=2, context_parallel=2)
        trainer.rows = 4  # of this process, two in a micro-batch
        tokens = torch.zeros((1, 16) if packed else (2, 8), dtype=torch.bool)
        tokens[0 if packed else 1, 5] = True
        # each half of the packed row is a sequence
        half = rank % 2
        row, token = (half, 5) if packed else (1, half * 8 + 5)
        row += 2 + rank // 2 * 4  # the second micro-batch, of the second half of the batch
        said = f", in sequence {row} of the batch from token {token} on (({row}, {token}))"
        assert trainer._describe_in_batch(0)(Place("x", 1, tokens)) == said
        assert trainer._describe_in_batch(0)(Place("x", 1, tokens[:, 1:])) == ""
        assert trainer._describe_in_batch(0)(Place("x", 1)) == ""
