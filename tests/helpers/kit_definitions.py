"""The kit's definitions of recurrences, token by token, for formulas of mixers that contain one."""

import torch

from seqmix.testing.vectors.families import FAMILIES


def defined(op, *, scale=1.0, predict=None, **inputs):
    """Output and final state of a matrix recurrence from an empty state, [B T H V] and [B H K V], by its definition.

    `predict` is that of `DeltaCase.delta_rule`, for tokens that read a state otherwise than the op.
    """
    batch, length, n_heads, key_width = inputs["q"].shape
    sizes = {"n_heads": n_heads, "key_width": key_width, "value_width": inputs["v"].shape[-1]}
    sizes |= {"steps": inputs["k"].shape[1] // length} if op == "delta_product" else {}
    case = FAMILIES[op].case(lengths=(length,) * batch, scale=scale, final_state=True, **sizes)
    return tuple((case.delta_rule(inputs, predict) if predict else case.define(inputs)).values())


def states(op, **inputs):
    """States after every token, [B T H K V], by the op's definition: their rows, as unit vectors read them."""
    rows = [unit.expand_as(inputs["k"]) for unit in torch.eye(inputs["k"].shape[-1]).to(inputs["k"])]
    return torch.stack([defined(op, q=row, **inputs)[0] for row in rows], -2)


def undecayed(_, key, decay, state):
    """Return the value that a key reads from the state before its decay, and that state."""
    del decay
    return torch.einsum("bhk,bhkv->bhv", key, state), state


def defined_scan(op, *, d_state=1, **inputs):
    """Output and final state of a scan of x [B T C] from an empty state, [B T C] and [B ... C], by its definition."""
    batch, length, channels = inputs["x"].shape
    sizes = {"n_heads": 1, "key_width": d_state, "value_width": channels}
    kind = FAMILIES[op].case
    case = kind(lengths=(length,) * batch, log_decay=kind.decays[0], final_state=True, **sizes)
    if op == "scan":  # has heads
        inputs = {name: x[:, :, None] for name, x in inputs.items()}
    output, state = case.define(inputs).values()
    return (output[:, :, 0], state[:, 0]) if op == "scan" else (output, state)
