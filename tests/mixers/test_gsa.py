"""Gated slot attention: special cases of its slots and gates."""

import pytest
import torch
from mixer_formulas import build, exactly, tokens

every_paradigm = pytest.mark.parametrize("paradigm", ["parallel", "recurrent", "chunkwise"])
PLAIN = {"head_norm": "none", "short_conv": None}


@every_paradigm
def test_single_slot_is_a_moving_average_of_values(paradigm):
    mixer, x = build("gsa", n_slots=1, **PLAIN), tokens(11)
    y, state = mixer(x, paradigm=paradigm, return_state=True)
    _, _, v, forget = mixer.in_proj(x).split([*mixer.widths.values()], dim=-1)
    v, forget = torch.nn.functional.silu(v).unflatten(-1, (3, -1)), forget.sigmoid()[..., None] ** (1 / 8)
    mean, means = torch.zeros_like(v[:, 0]), []
    for t in range(11):
        mean = forget[:, t] * mean + (1 - forget[:, t]) * v[:, t]
        means.append(mean)
    exactly(y, mixer.out_proj(torch.nn.functional.silu(torch.stack(means, 1)).flatten(2)))
    exactly(state.memory[:, :, 0], mean)


@every_paradigm
def test_slot_order_does_not_change_the_output(paradigm):
    mixer, x, order = build("gsa", n_slots=4), tokens(11), torch.tensor([2, 0, 3, 1])
    y, state = mixer(x, paradigm=paradigm, return_state=True)
    rows = mixer.in_proj.weight.data[-12:].view(3, 4, -1)
    rows.copy_(rows[:, order])
    permuted, after = mixer(x, paradigm=paradigm, return_state=True)
    exactly((permuted, after.keys, after.memory), (y, state.keys[:, :, order], state.memory[:, :, order]))


@every_paradigm
def test_open_forget_gate_writes_nothing(paradigm):
    mixer, x = build("gsa"), tokens(11).abs()
    with torch.no_grad():
        mixer.in_proj.weight[-mixer.widths["forget"] :] = 1e3
    y, state = mixer(x, paradigm=paradigm, return_state=True)
    exactly((y, state.keys, state.memory), tuple(map(torch.zeros_like, (y, state.keys, state.memory))))
