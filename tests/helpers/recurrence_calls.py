"""Calls of the recurrences that the kit's cases describe, through the ops' own functions, with gradients."""

import torch

from seqmix.ops.decay import decay
from seqmix.ops.delta import delta
from seqmix.ops.dplr import dplr
from seqmix.testing import DecayCase
from seqmix.testing.kernel.families import DeltaCase, DplrCase

INPUTS = ["q", "k", "v", "beta", "a", "b", "log_decay", "state"]
OPS = {DecayCase: decay, DeltaCase: delta, DplrCase: dplr}
CPU = torch.device("cpu")


def case_of(log_decay, lengths, *, kind=DecayCase, **fields):
    """A call from a state to a state, of which all gradients are taken."""
    sizes = {"n_heads": 2, "key_width": 3, "value_width": 2, "initial_state": True, "final_state": True}
    names = (*"qkv", *kind.extras, *(["log_decay"] if log_decay else []), "state")
    return kind(log_decay=log_decay, lengths=tuple(lengths), **{**sizes, "grad": names, **fields})


def run(case, paradigm, inputs, function=None, **options):
    """Output, and the final state if the case wants one."""
    function = function or OPS[type(case)]
    arguments = [inputs.get(name) for name in (*"qkv", *case.extras, "log_decay")]
    options |= {"cu_seqlens": case.cu_seqlens(inputs), "chunk_size": case.chunk_size, "scale": case.scale}
    options |= {"initial_state": inputs.get("state"), "output_final_state": case.final_state}
    options |= {"wide_output": True} if case.wide_output else {}
    return tuple(function(*arguments, paradigm=paradigm, **options))


def differentiate(
    case, paradigm, inputs=None, *, names=INPUTS, wide=False, absolute=False, device=CPU, function=None, **options
):
    """Output, final state and the gradients of the inputs named, by name.

    `wide` computes in float64, `absolute` with the absolute values of all but log-decays.
    """
    given = case.inputs(CPU) if inputs is None else inputs
    given = {name: x.abs() if absolute and name != "log_decay" else x for name, x in given.items()}
    given = {name: x.detach().to(device, torch.float64 if wide else x.dtype) for name, x in given.items()}
    leaves = {name: x.requires_grad_(name in names) for name, x in given.items()}
    results = zip(("output", "final state"), run(case, paradigm, leaves, function, **options), strict=True)
    found = {name: x for name, x in results if x is not None}
    # rounded to the case's dtypes, so that they are the same numbers in float64
    above = [case.cotangent(name, x, CPU) for name, x in zip(("output", "state"), found.values(), strict=False)]
    above = [(a.abs() if absolute else a).to(x) for a, x in zip(above, found.values(), strict=True)]
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    gradients = torch.autograd.grad(list(found.values()), list(wanted.values()), above, materialize_grads=True)
    return {name: x.detach() for name, x in found.items()} | dict(zip(wanted, gradients, strict=True))
