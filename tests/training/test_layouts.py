"""The cost of a step on many GPUs, checked against formulas, and the order of layouts."""

import pytest
import torch

from seqmix import account, load_config
from seqmix.registry import SeqmixError
from seqmix.training.distributed.layouts import GPUS, PEAK_FRACTION, Planner, received


@pytest.fixture
def config():
    return load_config("retnet-1.3b", ["training.activation_checkpointing=true"])


def test_layout_costs_match_their_formulas(config):
    found = Planner(config, "h100").layout(data=2, shard=4, context_parallel=2, sequences=4)
    model, batch, length = config.model, config.training.batch_size, config.data.sequence_length
    cost, narrow = account(model, length=length), account(model, length=length, dtype=torch.bfloat16)
    block, inside = cost.layers[0].parameters, narrow.layers[0].activation_bytes
    inputs, logits = 4 * model.d_model * length * len(cost.layers), 12 * min(2 * length * model.vocab_size, 2**28)
    gathered = 4 * (2 * block + 2 * cost.embedding_parameters)
    assert found.memory == 16 * cost.parameters / 8 + gathered + 2 * inputs + max(2 * inside, logits)
    assert found.copied == 8 * cost.parameters / 8 / 2
    # of retention, one state a layer and sequence each way, and again where the block is recomputed
    state = 4 * 8 * 256 * 512
    outside = cost.parameters - len(cost.layers) * block
    between = found.received - (12 * cost.parameters - 4 * outside) * 7 / 8
    assert between == pytest.approx(4 * len(cost.layers) * 2 * 2 * state, rel=0.01)
    assert found.grad_accum_steps == batch // (2 * 4 * 4)
    assert found.computing == 4 * cost.flops_per_token * batch * length / (16 * PEAK_FRACTION * 989e12)
    rates = GPUS["h100"]
    sending = found.grad_accum_steps * (
        found.received / rates.rate_within_machine + found.copied / rates.rate_between_machines
    )
    assert found.sending == pytest.approx(sending)


def test_without_checkpointing_all_activations_are_kept(config):
    again = Planner(config).layout(data=1, shard=8, sequences=1)
    plain = config.training.model_copy(update={"activation_checkpointing": False})
    kept = Planner(config.model_copy(update={"training": plain})).layout(data=1, shard=8, sequences=1)
    assert kept.memory > 1.2 * again.memory
    assert kept.computing == pytest.approx(again.computing * 3 / 4)


def test_gathering_once_trades_memory_for_traffic(config):
    once = config.model_copy(update={"distributed": config.distributed.model_copy(update={"gather_once": True})})
    again, kept = (Planner(each).layout(data=1, shard=8, sequences=1) for each in (config, once))
    cost = account(config.model, length=config.data.sequence_length)
    assert kept.received == pytest.approx(8 * cost.parameters * 7 / 8 / kept.grad_accum_steps)
    largest = cost.layers[0].parameters + cost.embedding_parameters
    assert kept.memory - again.memory == pytest.approx(8 * (cost.parameters - largest))


def test_layouts_that_fit_come_first_sorted_by_time(config):
    layouts = Planner(config, "a100").layouts(16)
    assert [layout.fits for layout in layouts] == sorted((layout.fits for layout in layouts), reverse=True)
    times = [layout.seconds[1] for layout in layouts if layout.fits]
    assert times == sorted(times)
    assert all(layout.data * layout.shard * layout.context_parallel == 16 for layout in layouts)
    best = layouts[0]
    # a copy in a machine: between machines go the gradients alone
    assert (best.data, best.shard) == (2, 8)
    tuned = load_config("retnet-1.3b", best.overrides)
    assert tuned.distributed.data == 2
    assert tuned.training.grad_accum_steps == best.grad_accum_steps


@pytest.mark.slow
def test_plan_reports_when_no_layout_fits(config, seqmix, refused):
    assert not any(layout.fits for layout in Planner(load_config("retnet-6.7b"), "h100").layouts(1))
    shown = seqmix("plan", "retnet-6.7b", "--gpus", "1")
    assert shown.status == 0
    assert "No layout fits into" in shown.out
    shown = seqmix("plan", "retnet-1.3b", "--gpus", "8")
    best, *_ = Planner(load_config("retnet-1.3b")).layouts(8)
    assert f"To use the first layout: retnet-1.3b {' '.join(best.overrides)}" in " ".join(shown.out.split())
    # what it names holds whatever was given
    given = ("distributed.context_parallel=2", "model.norm={kind: rmsnorm}")
    shown = seqmix("plan", "retnet-1.3b", *given, "--gpus", "8")
    assert (
        f"To use the first layout: retnet-1.3b 'model.norm={{kind: rmsnorm}}' {' '.join(best.overrides)}" in shown.out
    )
    assert f"distributed.context_parallel={best.context_parallel}" in best.overrides
    assert "did you mean" in refused("plan", "retnet-1.3b", "--gpu", "h10")
    with pytest.raises(SeqmixError, match=r"no layout of 7 GPUs divides training\.batch_size"):
        Planner(config).layouts(7)


def test_received_bytes_of_attention_grow_with_length():
    attention = load_config("attention-tiny").model
    assert received(attention, 2**14, ranks=2) == 4 * received(attention, 2**12, ranks=2)
