"""The kit's definitions of recurrences, token by token, for formulas of mixers that contain one."""

import torch

from seqmix.testing.kernel.families import FAMILIES


def defined(op, *, scale=1.0, predict=None, **inputs):
    """Output and final state of a matrix recurrence from an empty state, [B T H V] and [B H K V], by its definition.

    `predict` is that of `DeltaCase.delta_rule`, for tokens that read a state otherwise than the op.
    """
    batch, length, n_heads, key_width = inputs["k"].shape
    sizes = {"n_heads": n_heads, "key_width": key_width, "value_width": inputs["v"].shape[-1]}
    case = FAMILIES[op](lengths=(length,) * batch, scale=scale, final_state=True, **sizes)
    return tuple((case.delta_rule(inputs, predict) if predict else case.define(inputs)).values())


def undecayed(_, key, decay, state):
    """What a key reads from the state before its decay, and that state."""
    del decay
    return torch.einsum("bhk,bhkv->bhv", key, state), state


def defined_scan(op, *, d_state=1, **inputs):
    """Output and final state of a scan of x [B T C] from an empty state, [B T C] and [B ... C], by its definition."""
    batch, length, channels = inputs["x"].shape
    sizes = {"n_heads": 1, "key_width": d_state, "value_width": channels}
    case = FAMILIES[op](lengths=(length,) * batch, log_decay=FAMILIES[op].decays[0], final_state=True, **sizes)
    if op == "scan":  # has heads
        inputs = {name: x[:, :, None] for name, x in inputs.items()}
    output, state = case.define(inputs).values()
    return (output[:, :, 0], state[:, 0]) if op == "scan" else (output, state)
