"""Every family's step updates a donated state in place and leaves any other state unchanged."""

import pytest
import torch
from torch.testing import assert_close

from seqmix.ops.decay import decay
from seqmix.ops.delta import delta
from seqmix.ops.dplr import dplr

Q, K, A, B = torch.randn(4, 3, 1, 2, 4)
V, RATE = torch.randn(3, 1, 2, 5), torch.rand(3, 1, 2)
DECAY = -torch.rand(3, 1, 2, 4)
STEPS = {
    "decay": lambda **o: decay(Q, K, V, DECAY, **o),
    "decay, none": lambda **o: decay(Q, K, V, None, **o),
    "delta": lambda **o: delta(Q, K, V, RATE, DECAY, **o),
    "dplr": lambda **o: dplr(Q, K, V, A, B, DECAY, **o),
}


@torch.no_grad()
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_step_updates_a_donated_state_in_place(step):
    state = torch.randn(3, 2, 4, 5)
    before, options = state.clone(), {"paradigm": "recurrent", "output_final_state": True}
    expected = step(initial_state=state, **options)
    assert torch.equal(state, before)
    options["donate_state"] = True
    spread = before[:1].expand(3, 2, 4, 5)
    step(initial_state=spread, **options)
    step(initial_state=state, paradigm="recurrent", donate_state=True)
    with torch.enable_grad():
        step(initial_state=state, **options)
    assert torch.equal(state, before)
    assert torch.equal(spread[2], before[0])
    output, final = step(initial_state=state, **options)
    assert final.data_ptr() == state.data_ptr()
    assert_close((output, final), tuple(expected))


@torch.no_grad()
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_compiled_step_updates_the_state_in_place_only_if_donated(step):
    def decoded(state, donate_state=False):
        return step(initial_state=state, paradigm="recurrent", output_final_state=True, donate_state=donate_state)

    states = torch.randn(2, 3, 2, 4, 5)
    expected = [decoded(state.clone()).final_state for state in states]
    torch._dynamo.reset()
    for state, final, permitted in zip(states, expected, (False, True), strict=True):
        _, found = torch.compile(decoded, backend="eager", fullgraph=True)(state, permitted)
        assert_close(found, final)
        assert (found.data_ptr() == state.data_ptr()) is permitted
