"""Sequences that go on where those of the step before ended."""

import numpy as np
import pytest

from seqmix import SeqmixError
from seqmix.data.order import contiguous_windows


@pytest.mark.parametrize(("n_tokens", "length", "batch_size"), [(1000, 16, 4), (81, 16, 4), (80, 16, 4), (33, 16, 1)])
def test_rows_go_on_where_they_ended_and_every_token_is_there(n_tokens, length, batch_size):
    steps = [contiguous_windows(n_tokens, length, batch_size, seed=0, step=step) for step in range(200)]
    firsts = [step for step, windows in enumerate(steps) if windows.first]
    per_reading = (n_tokens - length) // (length * batch_size)
    assert firsts == list(range(0, 200, per_reading))
    for step, windows in enumerate(steps):
        assert windows.starts.shape == (batch_size,)
        assert windows.starts.min() >= 0
        assert windows.starts.max() + length < n_tokens  # the last target is a token too
        if not windows.first:
            assert (windows.starts == steps[step - 1].starts + length).all()
    # no token is read twice in a reading, and few are left out
    read = np.concatenate([windows.starts for windows in steps[:per_reading]])
    assert len(set(read)) == per_reading * batch_size
    assert (np.diff(np.sort(read)) == length).all()


def test_readings_begin_in_other_places_which_are_a_function_of_the_seed():
    def begins(seed):
        per_reading = (1000 - 16) // (16 * 4)
        return [contiguous_windows(1000, 16, 4, seed=seed, step=k * per_reading).starts[0] for k in range(20)]

    assert begins(0) == begins(0)
    assert begins(0) != begins(1)
    assert len(set(begins(0))) > 10


def test_a_text_without_a_sequence_a_row_is_refused():
    with pytest.raises(SeqmixError, match=r"reads 4 lanes .* takes 80 tokens, and it has 79"):
        contiguous_windows(79, 16, 4, seed=0, step=0)
