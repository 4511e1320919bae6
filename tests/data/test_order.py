"""The order of samples: each once an epoch, and a function of the step for any number of ranks."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streams import training_batch

from seqmix import SeqmixError
from seqmix.data.order import permuted
from seqmix.models import IGNORED

STREAM = np.arange(1000, 1000 + 33 * 8 + 3, dtype=np.uint32)  # 34 samples of 8, the last of 2 targets
SAMPLES = 34


def batch(step, batch_size=5, seed=0, **options):
    return training_batch(STREAM, 8, batch_size, seed=seed, step=step, order="epochs", **options)


def samples(steps, **options) -> list[bytes]:
    """The sequences of steps in order, each as its bytes."""
    return [row.numpy().tobytes() for step in steps for row in batch(step, **options).inputs]


@pytest.mark.parametrize("batch_size", [1, 2, 17, 34])
def test_every_sample_is_taken_once_an_epoch(batch_size):
    steps = SAMPLES // batch_size
    epochs = [Counter(samples(range(n * steps, (n + 1) * steps), batch_size=batch_size)) for n in range(3)]
    assert len(epochs[0]) == SAMPLES
    assert epochs[0] == epochs[1] == epochs[2]
    assert set(epochs[0].values()) == {1}


@pytest.mark.parametrize("batch_size", [5, 40])
def test_a_batch_may_hold_the_end_of_an_epoch_and_the_start_of_the_next(batch_size):
    taken = samples(range(34), batch_size=batch_size)
    assert len(taken) == 34 * batch_size
    for epoch in range(batch_size):
        assert len(set(taken[epoch * SAMPLES : (epoch + 1) * SAMPLES])) == SAMPLES


def test_every_target_of_the_text_is_learned_once_an_epoch():
    targets = torch.cat([batch(step, batch_size=17).targets for step in range(2)]).flatten()
    assert sorted(targets[targets != IGNORED].tolist()) == STREAM[1:].tolist()


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    orders = [tuple(samples([n], batch_size=SAMPLES)) for n in range(4)]
    orders += [tuple(samples([n], batch_size=SAMPLES, seed=1)) for n in range(4)]
    assert len(set(orders)) == 8
    assert tuple(sorted(orders[0])) not in orders
    assert orders[0] == tuple(samples([0], batch_size=SAMPLES))


@pytest.mark.parametrize("order", ["epochs", "random_windows"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_the_samples_of_a_step_do_not_depend_on_the_number_of_ranks(order, world_size):
    for step in (0, 2, 3, 100):
        options = {"seed": 7, "step": step, "order": order}
        parts = [
            training_batch(STREAM, 8, 12, **options, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        whole = training_batch(STREAM, 8, 12, **options)
        assert {len(part.inputs) for part in parts} == {12 // world_size}
        for name in ("inputs", "targets"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(SeqmixError, match=r"5 ranks do not divide training\.batch_size = 12 into equal shares"):
        training_batch(STREAM, 8, 12, seed=0, step=0, rank=0, world_size=5)


@given(st.integers(1, 3000), st.integers(0, 2**31 - 1), st.integers(0, 2**40))
def test_an_order_is_a_permutation(n, seed, epoch):
    found = permuted(np.arange(n), np.full(n, epoch), n, seed)
    assert np.array_equal(np.sort(found), np.arange(n))


def test_samples_are_far_apart_and_evenly_spread():
    n = 100_000
    found = permuted(np.arange(n), np.zeros(n, dtype=np.int64), n, 0)
    assert abs(np.corrcoef(np.arange(n), found)[0, 1]) < 0.02
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02
    counts = np.histogram(found[: n // 10], bins=20, range=(0, n))[0]
    assert counts.min() > 400  # of 500


def test_a_place_in_a_text_of_any_size_costs_the_same():
    n = 2**50
    found = permuted(np.array([0, 1, n - 1]), np.zeros(3, dtype=np.int64), n, 0)
    assert len(set(found.tolist())) == 3
    assert found.min() >= 0
    assert found.max() < n


def test_the_order_is_fixed():
    # no other numpy, machine or year may have another one: a resumed run would see samples twice
    assert permuted(np.arange(10), np.full(10, 3), 10, 42).tolist() == [6, 1, 4, 7, 0, 5, 3, 8, 2, 9]
