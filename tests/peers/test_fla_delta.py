"""The delta family against flash-linear-attention's plain references, and the Gated DeltaNet layer against
Qwen3-Next in transformers.
"""

import math
from importlib.util import find_spec
from inspect import unwrap
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from fla_oracles import agree, loaded, needs_fla, with_gradients
from transformer_models import mixer_weights

from seqmix.interop.convert.hybrids import Qwen3Next
from seqmix.mixers import Paradigm
from seqmix.mixers.gated_delta_net import GatedDeltaNetConfig
from seqmix.ops.delta import delta

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="needs pip install transformers")

PARADIGMS = [Paradigm.RECURRENT, Paradigm.CHUNKWISE]
B, T, H, K, V = 2, 64, 3, 8, 6
CHUNK = 24
"""Ours; it does not divide T."""
# their functions, and whether they decay
ORACLES = {
    "delta_rule_recurrence": False,
    "delta_rule_chunkwise": False,
    "delta_rule_parallel": False,
    "naive_recurrent_gated_delta_rule": True,
    "naive_chunk_gated_delta_rule": True,
}
every_paradigm = pytest.mark.parametrize("paradigm", PARADIGMS)


def theirs(oracle):
    """One of their functions with the arguments of ours: it gives output and final state, or None."""
    function = getattr(loaded("gated_delta_rule" if ORACLES[oracle] else "delta_rule"), oracle)

    def heads_first(*arguments):
        output, state = function(*arguments)
        return output.transpose(1, 2), state

    def swapped(*xs):
        return [x.transpose(1, 2) for x in xs]

    return {
        "delta_rule_recurrence": lambda q, k, v, b, a, s: heads_first(*swapped(q, k, v, b), s),
        "delta_rule_chunkwise": lambda q, k, v, b, a, s: heads_first(*swapped(q, k, v, b), 16),
        # what it calls the second is not a state
        "delta_rule_parallel": lambda q, k, v, b, a, s: (heads_first(*swapped(q, k, v, b), 32, 16)[0], None),
        "naive_recurrent_gated_delta_rule": lambda q, k, v, b, a, s: function(q, k, v, b, a, None, s, True),
        "naive_chunk_gated_delta_rule": lambda q, k, v, b, a, s: function(q, k, v, a, b, CHUNK, None, s, True),
    }[oracle]


def inputs(decays, batch=B):
    """q, k, v, beta, log-decay and initial state; not all of theirs take what is not float32."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, batch, T, H, K, generator=generator)
    v, beta = torch.randn(batch, T, H, V, generator=generator), torch.rand(batch, T, H, generator=generator)
    a = -torch.rand(batch, T, H, generator=generator) if decays else None
    return q, F.normalize(k, dim=-1), v, 2 * beta, a, torch.randn(batch, H, K, V, generator=generator)


def ours(paradigm, *arguments, **options):
    *segment, state = arguments
    how = {"paradigm": paradigm, "chunk_size": CHUNK}
    return delta(*segment, initial_state=state, output_final_state=True, **how, **options)


@needs_fla
@pytest.mark.parametrize("oracle", ORACLES)
@every_paradigm
def test_outputs_states_and_gradients_match_fla_references(oracle, paradigm):
    arguments = inputs(ORACLES[oracle])
    has_state = "recurr" in oracle or "gated" in oracle
    has_final = oracle != "delta_rule_parallel"
    if not has_state:
        arguments = (*arguments[:-1], None)

    def function(*arguments):
        output, state = ours(paradigm, *arguments)
        return output, state if has_final else None

    their_results, their_gradients = with_gradients(theirs(oracle), arguments)
    results, gradients = with_gradients(function, arguments)
    agree(results, their_results)
    agree(gradients, their_gradients)


@needs_fla
@every_paradigm
@pytest.mark.parametrize("oracle", ["delta_rule_recurrence", "naive_recurrent_gated_delta_rule"])
def test_packed_documents_match_fla_reference_run_per_document(oracle, paradigm):
    boundaries = [0, 5, 6, 40, T]
    *segment, _ = inputs(ORACLES[oracle], batch=1)
    states = torch.randn(4, H, K, V, generator=torch.Generator().manual_seed(2))
    output, final = ours(paradigm, *segment, states, cu_seqlens=torch.tensor(boundaries))
    for n, (start, end) in enumerate(pairwise(boundaries)):
        document = (None if x is None else x[:, start:end] for x in segment)
        agree([output[:, start:end], final[n : n + 1]], list(theirs(oracle)(*document, states[n : n + 1])))


@needs_fla
@every_paradigm
def test_zero_decay_resets_the_state_as_in_fla_recurrence_but_not_chunks(paradigm):
    *segment, a, state = inputs(True)
    a[:, [0, 20, 21]] = -math.inf
    output, final = ours(paradigm, *segment, a, state)
    agree([output, final], list(theirs("naive_recurrent_gated_delta_rule")(*segment, a, state)))
    # theirs takes differences of running sums
    assert theirs("naive_chunk_gated_delta_rule")(*segment, a, state)[0].isnan().any()


@needs_transformers
@every_paradigm
def test_gated_delta_net_layer_matches_qwen3_next(paradigm, monkeypatch):
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

    # beside fla it calls fla's Triton kernels, which need a GPU
    monkeypatch.setattr(qwen3_next, name := "torch_chunk_gated_delta_rule", unwrap(getattr(qwen3_next, name)))
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        hidden_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=12,
        linear_value_head_dim=24,
        linear_conv_kernel_dim=4,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        rms_norm_eps=1e-5,
    )
    layer = qwen3_next.Qwen3NextGatedDeltaNet(config, 0)
    torch.nn.init.uniform_(layer.norm.weight, 0.5, 1.5)
    mixer = GatedDeltaNetConfig(n_heads=2, expand_k=0.75, expand_v=1.5, chunk_size=24).build(
        32, layer_idx=0, n_layers=1
    )
    ours = mixer_weights(Qwen3Next().delta(mixer), mixer, layer.state_dict(), "linear_attn")
    mixer.load_state_dict(ours)
    x = torch.randn(2, 70, 32)
    results = []
    for function in (layer, lambda x: mixer(x, paradigm=paradigm)[0]):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaf)))
    agree(*results)
