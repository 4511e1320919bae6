"""The order of samples, by epochs and contiguous: it depends on the step but not on the number of ranks."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import refusal
from token_streams import text_of, training_batch

from seqmix.data.order import contiguous_starts, permuted

STREAM = np.arange(1000, 1000 + 33 * 8 + 3, dtype=np.uint32)  # 34 samples of 8, the last of 2 targets
SAMPLES = 34
SEEDS_AND_STEPS = ((1, 2), (1, 2), (1, 3), (2, 2), (2, 1), (12, 0), (0, 12))


def batch(step, batch_size=5, seed=0):
    return training_batch(STREAM, 8, batch_size, seed=seed, step=step, order="epochs")


def samples(steps, **options) -> list[bytes]:
    """The sequences of steps in order, each as its bytes."""
    return [row.numpy().tobytes() for step in steps for row in batch(step, **options).inputs]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 17, 34, 40])
def test_every_sample_is_taken_once_per_epoch(batch_size):
    # a batch may hold the end of an epoch and the start of the next
    taken = samples(range(34), batch_size=batch_size)
    epochs = [Counter(taken[at : at + SAMPLES]) for at in range(0, 34 * batch_size, SAMPLES)]
    assert len(epochs) == batch_size
    assert all(epoch == epochs[0] for epoch in epochs)
    assert (len(epochs[0]), set(epochs[0].values())) == (SAMPLES, {1})


def test_windows_depend_only_on_seed_and_step():
    drawn = [training_batch(STREAM, 8, 16, seed=seed, step=step).inputs for seed, step in SEEDS_AND_STEPS]
    assert torch.equal(drawn[0], drawn[1])
    assert not any(torch.equal(drawn[0], other) for other in drawn[2:])


def test_each_epoch_and_seed_has_a_different_order():
    orders = [tuple(samples([n], batch_size=SAMPLES, seed=seed)) for n in range(4) for seed in (0, 1)]
    assert len(set(orders)) == 8
    assert tuple(sorted(orders[0])) not in orders
    assert orders[0] == tuple(samples([0], batch_size=SAMPLES))


@pytest.mark.parametrize("order", ["epochs", "random_windows"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_samples_of_a_step_do_not_depend_on_world_size(order, world_size):
    for step in (0, 2, 3, 100):
        options = {"seed": 7, "step": step, "order": order}
        parts = [
            training_batch(STREAM, 8, 12, **options, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        assert {len(part.inputs) for part in parts} == {12 // world_size}
        for whole, part in zip(training_batch(STREAM, 8, 12, **options), zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat(part), whole)
    message = refusal(lambda: training_batch(STREAM, 8, 12, seed=0, step=0, rank=0, world_size=5))
    assert "training.batch_size = 12" in message
    assert " 5 " in message


@given(st.integers(1, 3000), st.integers(0, 2**31 - 1), st.integers(0, 2**40))
def test_permuted_indices_form_a_permutation(n, seed, epoch):
    found = permuted(np.arange(n), np.full(n, epoch), n, seed)
    assert np.array_equal(np.sort(found), np.arange(n))


def test_permuted_samples_are_uncorrelated_and_evenly_spread():
    n = 100_000
    found = permuted(np.arange(n), np.zeros(n, dtype=np.int64), n, 0)
    assert abs(np.corrcoef(np.arange(n), found)[0, 1]) < 0.02
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02
    counts = np.histogram(found[: n // 10], bins=20, range=(0, n))[0]
    assert counts.min() > 400  # of 500


def test_order_is_fixed_and_works_for_huge_texts():
    # no other numpy, machine or year may have another one: a resumed run would see samples twice
    assert permuted(np.arange(10), np.full(10, 3), 10, 42).tolist() == [6, 1, 4, 7, 0, 5, 3, 8, 2, 9]
    n = 2**50
    found = permuted(np.array([0, 1, n - 1]), np.zeros(3, dtype=np.int64), n, 0)
    assert len(set(found.tolist())) == 3
    assert 0 <= found.min() <= found.max() < n


@pytest.mark.parametrize(("n_tokens", "length", "batch_size"), [(1000, 16, 4), (81, 16, 4), (80, 16, 4), (33, 16, 1)])
def test_contiguous_rows_continue_across_steps_and_cover_the_text(n_tokens, length, batch_size):
    steps = [contiguous_starts(n_tokens, length, batch_size, seed=0, step=step) for step in range(200)]
    text = text_of(np.zeros(n_tokens, dtype=np.uint16), length).contiguous(batch_size)
    firsts = [step for step in range(200) if not text.goes_on(step, batch_size, seed=0)]
    per_reading = (n_tokens - length) // (length * batch_size)
    assert firsts == list(range(0, 200, per_reading))
    for step, starts in enumerate(steps):
        assert starts.shape == (batch_size,)
        assert starts.min() >= 0
        assert starts.max() + length < n_tokens  # the last target is a token too
        if step not in firsts:
            assert (starts == steps[step - 1] + length).all()
    # no token is read twice in a reading, and few are left out
    read = np.concatenate(steps[:per_reading])
    assert len(set(read)) == per_reading * batch_size
    assert (np.diff(np.sort(read)) == length).all()


def test_contiguous_readings_start_at_seeded_offsets():
    def begins(seed):
        per_reading = (1000 - 16) // (16 * 4)
        return [contiguous_starts(1000, 16, 4, seed=seed, step=k * per_reading)[0] for k in range(20)]

    assert begins(0) == begins(0)
    assert begins(0) != begins(1)
    assert len(set(begins(0))) > 10


def test_text_too_short_for_contiguous_rows_is_refused():
    for action in (
        lambda: contiguous_starts(79, 16, 4, seed=0, step=0),
        lambda: text_of(np.zeros(79, dtype=np.uint16), 16).contiguous(4),
    ):
        message = refusal(action)
        assert all(part in message for part in (" 4 ", " 80 ", " 79", "training.batch_size"))
