"""Sequences that go on where those of the step before ended."""

import numpy as np
import pytest
from streams import text_of

from seqmix import SeqmixError
from seqmix.data.order import contiguous_starts


@pytest.mark.parametrize(("n_tokens", "length", "batch_size"), [(1000, 16, 4), (81, 16, 4), (80, 16, 4), (33, 16, 1)])
def test_rows_go_on_where_they_ended_and_every_token_is_there(n_tokens, length, batch_size):
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


def test_readings_begin_in_other_places_which_are_a_function_of_the_seed():
    def begins(seed):
        per_reading = (1000 - 16) // (16 * 4)
        return [contiguous_starts(1000, 16, 4, seed=seed, step=k * per_reading)[0] for k in range(20)]

    assert begins(0) == begins(0)
    assert begins(0) != begins(1)
    assert len(set(begins(0))) > 10


def test_a_text_without_a_sequence_a_row_is_refused():
    with pytest.raises(SeqmixError, match=r"reads 4 lanes .* takes 80 tokens, and it has 79"):
        contiguous_starts(79, 16, 4, seed=0, step=0)
    with pytest.raises(SeqmixError, match="and it has 79"):
        text_of(np.zeros(79, dtype=np.uint16), 16).contiguous(4)
