"""GLA, HGRN2, gated retention and lightning attention against flash-linear-attention's recurrences.

fla-core has no layers, so its recurrences are placed between our projections and a written-out norm.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fla_oracles import agree, loaded, needs_fla

from seqmix.mixers import Paradigm
from seqmix.mixers.gated_retention import GatedRetentionConfig
from seqmix.mixers.gla import GLAConfig
from seqmix.mixers.hgrn2 import HGRN2Config
from seqmix.mixers.lightning import LightningConfig

pytestmark = needs_fla

B, T, D_MODEL, N_HEADS = 2, 40, 48, 3
every_paradigm = pytest.mark.parametrize("paradigm", list(Paradigm))


def layer(config, **place):
    torch.manual_seed(0)
    ours = config.build(D_MODEL, **{"layer_idx": 0, "n_layers": 1} | place).double()
    if ours.norm.weight is not None:
        torch.nn.init.uniform_(ours.norm.weight, 0.5, 1.5)
    return ours, torch.randn(B, T, D_MODEL, dtype=torch.float64)


def heads(ours, x):
    return (y.unflatten(-1, (N_HEADS, -1)) for y in ours.in_proj(x).split([*ours.widths.values()], dim=-1))


def rms(x, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def agree_in_pieces(ours, paradigm, x, theirs):
    """Output, state and gradients of all parameters, where `theirs` is a function of a piece and a state."""
    x, parameters = x.requires_grad_(), [p for _, p in sorted(ours.named_parameters())]
    results = []
    for function in (lambda y, s: ours(y, s, paradigm=paradigm, return_state=True), theirs):
        first, state = function(x[:, :17], None)
        second, state = function(x[:, 17:], state)
        y, memory = torch.cat((first, second), 1), getattr(state, "memory", state)
        results.append((y, memory, *torch.autograd.grad((y * x.detach().cos()).sum(), [x, *parameters])))
    agree(*results)


@every_paradigm
def test_gla_matches_fla_reference(paradigm):
    ours, x = layer(GLAConfig(n_heads=N_HEADS, gate_logit_normalizer=2.0, chunk_size=16))
    recurrence = loaded("gla").naive_recurrent_gla

    def theirs(x, state):
        q, k, v, gate = heads(ours, x)
        up = ours.decay_proj.up
        gk = F.logsigmoid(x @ ours.decay_proj.down.weight.T @ up.weight.T + up.bias).unflatten(-1, (N_HEADS, -1)) / 2
        output, state = recurrence(q, k, v, gk, state, True)
        return ours.out_proj((rms(output) * ours.norm.weight * F.silu(gate)).flatten(2)), state

    agree_in_pieces(ours, paradigm, x, theirs)


@every_paradigm
def test_hgrn2_matches_fla_reference_with_keys_from_decays(paradigm):
    ours, x = layer(HGRN2Config(n_heads=N_HEADS, chunk_size=16), layer_idx=1, n_layers=3)
    recurrence = loaded("gla").naive_recurrent_gla

    def theirs(x, state):
        q, forget, v = heads(ours, x)
        bound = torch.sigmoid(ours.forget.bound)
        forget = bound + (1 - bound) * torch.sigmoid(forget)
        output, state = recurrence(F.silu(q), 1 - forget, v, forget.log(), state, True)
        return ours.out_proj(rms(output.flatten(2)) * ours.norm.weight), state

    agree_in_pieces(ours, paradigm, x, theirs)


@every_paradigm
def test_gated_retention_matches_fla_simple_gla(paradigm):
    config = GatedRetentionConfig(n_heads=N_HEADS, gate_logit_normalizer=2.0, rotation="none", chunk_size=16)
    ours, x = layer(config)
    recurrence = loaded("simple_gla").naive_recurrent_simple_gla

    def theirs(x, state):
        q, k, v, gate, logits = heads(ours, x)
        output, state = recurrence(q, k, v, F.logsigmoid(logits[..., 0]) / 2, None, state, True)
        return ours.out_proj((rms(output) * F.silu(gate)).flatten(2)), state

    agree_in_pieces(ours, paradigm, x, theirs)


@every_paradigm
@pytest.mark.parametrize("layer_idx", [0, 3])
def test_lightning_with_transnormer_decays_matches_fla_reference(paradigm, layer_idx, monkeypatch):
    recurrence = loaded("simple_gla").naive_recurrent_simple_gla

    def chunk_simple_gla(q, k, v, scale, g_gamma, initial_state, output_final_state, **options):
        return recurrence(q, k, v, g_gamma.expand(q.shape[:3]), scale, initial_state, output_final_state)

    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla.chunk", SimpleNamespace(chunk_simple_gla=chunk_simple_gla))
    attention = loaded("lightning_attn", "chunk").chunk_lightning_attn
    place = {"layer_idx": layer_idx, "n_layers": 4}
    ours, x = layer(LightningConfig(n_heads=N_HEADS, schedule="transnormer", chunk_size=16), **place)

    def theirs(x, state):
        *qkv, gate = heads(ours, x)
        options = {"scale": 1.0, "initial_state": state, "output_final_state": True}
        output, state = attention(*map(F.silu, qkv), layer_idx, 4, **options)
        return ours.out_proj(rms(output.flatten(2)) * ours.norm.weight * torch.sigmoid(gate.flatten(2))), state

    agree_in_pieces(ours, paradigm, x, theirs)
