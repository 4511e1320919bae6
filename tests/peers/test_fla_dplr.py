"""The delta family with a decay per key dimension, with separate keys for reading, or with several steps per token,
against flash-linear-attention's plain references.
"""

import pytest
import torch
import torch.nn.functional as F
from fla_oracles import agree, loaded, needs_fla, with_gradients

from seqmix.mixers import Paradigm
from seqmix.ops.delta import delta, delta_product
from seqmix.ops.dplr import dplr
from seqmix.ops.runtime.call import Call

pytestmark = needs_fla

B, T, H, K, V, N = 2, 64, 3, 8, 6, 2
CHUNK = 24
"""Ours; it does not divide T."""


def kda(function):
    return lambda q, k, v, g, beta, s: function(q, k, v, g, beta, None, s, True)


def gdn2(function):
    return lambda q, k, v, g, e, w, s: function(q, k, v, g, e, w, None, s, True)


def theirs_dplr(function):
    """Theirs reads the state before it decays."""

    def heads_first(q, k, v, g, a, b, s):
        output, state = function(*(x.transpose(1, 2) for x in (q, k, v, a * g.exp(), b, g)), s)
        return output.transpose(1, 2), state

    return heads_first


def product(function):
    return lambda q, k, v, g, beta, s: function(q, k, v, g, beta, K**-0.5, None, s, True, N)


def our_product(q, k, v, g, beta, s, *, paradigm, **options):
    return delta_product(q, k, v, beta, g, Call.of(paradigm, T, s, True, chunk_size=CHUNK))


OURS = {
    kda: lambda q, k, v, g, beta, s, **options: delta(q, k, v, beta, g, initial_state=s, **options),
    gdn2: lambda q, k, v, g, e, w, s, **options: dplr(q, k, w * v, e * k, None, g, initial_state=s, **options),
    theirs_dplr: lambda q, k, v, g, a, b, s, **options: dplr(q, k, v, a, b, g, initial_state=s, **options),
    product: our_product,
}
ORACLES = {
    "naive_recurrent_kda": ("kda", kda),
    "naive_chunk_kda": ("kda", kda),
    "naive_recurrent_gdn2": ("gdn2", gdn2),
    "naive_chunk_gdn2": ("gdn2", gdn2),
    "dplr_recurrence": ("generalized_delta_rule/dplr", theirs_dplr),
    "naive_recurrent_gated_delta_product": ("gated_delta_product", product),
}


def inputs(kind):
    generator = torch.Generator().manual_seed(0)
    steps = N * T if kind is product else T

    def rand(*sizes):
        return torch.rand(B, *sizes, generator=generator)

    q, k = rand(T, H, K) - 0.5, F.normalize(rand(steps, H, K) - 0.5, dim=-1)
    g = -rand(T, H) if kind is product else -rand(T, H, K) * torch.rand(1, 1, H, 1, generator=generator)
    more = {
        kda: lambda: [2 * rand(T, H)],
        gdn2: lambda: [rand(T, H, K), rand(T, H, V)],
        theirs_dplr: lambda: [k, -k * rand(T, H, K)],
        product: lambda: [2 * rand(steps, H)],
    }[kind]()
    return [q, k, rand(steps, H, V), g, *more, rand(H, K, V)]


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("paradigm", [Paradigm.RECURRENT, Paradigm.CHUNKWISE])
def test_outputs_states_and_gradients_match_fla_references(oracle, paradigm):
    file, kind = ORACLES[oracle]
    options = {"paradigm": paradigm, "chunk_size": CHUNK, "output_final_state": True}
    arguments = inputs(kind)
    theirs = with_gradients(kind(getattr(loaded(file), oracle)), arguments)
    ours = with_gradients(lambda *given: OURS[kind](*given, **options), arguments)
    agree(*ours[:1], *theirs[:1])
    agree(ours[1], theirs[1])
