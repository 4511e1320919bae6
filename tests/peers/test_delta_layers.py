"""The KDA layer against Kimi Linear in transformers. Comba, preconditioned delta rules, Gated DeltaNet-2, DeltaProduct,
RWKV-6, RWKV-7 and GSA against flash-linear-attention's recurrences, placed between our projections and a written-out
norm.
"""

from importlib.util import find_spec
from inspect import unwrap
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from fla_oracles import agree, loaded, needs_fla
from transformer_models import mixer_weights

from seqmix.interop.convert.kimi_linear import KimiLinear
from seqmix.mixers import MIXERS, Paradigm
from seqmix.mixers.comba import CombaConfig
from seqmix.mixers.delta_product import DeltaProductConfig
from seqmix.mixers.gated_delta_net2 import GatedDeltaNet2Config
from seqmix.mixers.gsa import GSAConfig
from seqmix.mixers.kda import KDAConfig
from seqmix.mixers.rwkv6 import RWKV6Config
from seqmix.mixers.rwkv7 import RWKV7Config

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="needs pip install transformers")
every_paradigm = pytest.mark.parametrize("paradigm", [Paradigm.RECURRENT, Paradigm.CHUNKWISE])


@needs_transformers
@every_paradigm
def test_kda_layer_matches_kimi_linear(paradigm, monkeypatch):
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear import modeling_kimi_linear as kimi

    # beside fla it calls fla's Triton kernels, which need a GPU
    for name in ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"):
        monkeypatch.setattr(kimi, name, unwrap(getattr(kimi, name)))
    torch.manual_seed(0)
    config = KimiLinearConfig(
        hidden_size=32,
        linear_num_heads=2,
        linear_head_dim=16,
        linear_conv_kernel_dim=4,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        rms_norm_eps=1e-5,
    )
    layer = kimi.KimiLinearDeltaAttention(config, 0)
    torch.nn.init.uniform_(layer.o_norm.weight, 0.5, 1.5)
    torch.nn.init.uniform_(layer.forget_gate.A_log, -2, 1)
    torch.nn.init.normal_(layer.forget_gate.dt_bias)
    mixer = KDAConfig(n_heads=2, chunk_size=24).build(32, layer_idx=0, n_layers=1)
    # their files have a convolution each for queries, keys and values, and other names
    theirs = {name.removeprefix("forget_gate."): x for name, x in layer.state_dict().items()}
    convolutions = theirs.pop("conv1d.weight").chunk(3)
    theirs |= {f"{name}_conv1d.weight": x for name, x in zip("qkv", convolutions, strict=True)}
    mixer.load_state_dict(mixer_weights(KimiLinear().kda(mixer), mixer, theirs, "self_attn"))
    x = torch.randn(2, 70, 32)
    results = []
    for function in (layer, lambda x: mixer(x, paradigm=paradigm)[0]):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaf)))
    agree(*results)


@needs_transformers
def test_bounded_decays_match_glm():
    glm = pytest.importorskip("transformers.models.glm5_next.modeling_glm5_next")
    torch.manual_seed(0)
    sizes = SimpleNamespace(linear_head_dim=16, linear_num_heads=2, hidden_size=32, linear_lower_bound=-5.0)
    theirs, x = glm.Glm5NextTextForgetGate(sizes), torch.randn(2, 7, 32)
    ours = KDAConfig(n_heads=2, decay_lower_bound=-5.0).build(32, layer_idx=0, n_layers=1)
    assert ours.decay.A_log.eq(0).all()
    torch.nn.init.uniform_(ours.decay.A_log, -2, 1)
    names = {"f_a_proj.weight": ours.decay_proj.down.weight, "f_b_proj.weight": ours.decay_proj.up.weight}
    names |= {"A_log": ours.decay.A_log, "dt_bias": ours.decay.dt_bias.flatten()}
    theirs.load_state_dict({name: x.detach() for name, x in names.items()})
    torch.testing.assert_close(ours.log_decay(x), theirs(x))


class Pair(NamedTuple):
    """State of a preconditioned delta rule in fla."""

    memory: torch.Tensor
    curvature: torch.Tensor


def heads(x):
    return x.unflatten(-1, (2, -1))


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def normed(mixer, o):
    return o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight


def agree_in_pieces(config, paradigm, around):
    """Output, state and gradients of all parameters; `around` makes a mixer a function of a piece and a state."""
    torch.manual_seed(0)
    mixer = config.build(32, layer_idx=0, n_layers=1).double()
    torch.nn.init.uniform_(mixer.norm.weight, 0.5, 1.5)
    x, parameters, results = torch.randn(2, 40, 32).double().requires_grad_(), list(mixer.parameters()), []
    for function in (lambda y, s: mixer(y, s, paradigm=paradigm, return_state=True), around(mixer)):
        first, state = function(x[:, :17], None)
        second, state = function(x[:, 17:], state)
        y = torch.cat((first, second), 1)
        gradients = torch.autograd.grad((y * x.detach().cos()).sum(), [x, *parameters])
        memory = state.memory if hasattr(state, "memory") else state[-1] if isinstance(state, tuple) else state
        results.append((y, memory, *gradients))
    agree(*results)


@needs_fla
@every_paradigm
def test_gated_delta_net2_matches_fla_reference(paradigm):
    recurrence = loaded("gdn2").naive_recurrent_gdn2

    def around(mixer):
        def theirs(x, state):
            q, k, v, erase, write = (heads(y) for y in mixer.in_proj(x).split([*mixer.widths.values()], dim=-1))
            g = -mixer.decay.A_log.exp()[:, None] * F.softplus(heads(mixer.decay_proj(x)) + mixer.decay.dt_bias)
            q, k, v, erase, write = unit(F.silu(q)), unit(F.silu(k)), F.silu(v), erase.sigmoid(), write.sigmoid()
            o, state = recurrence(q, k, v, g, erase, write, None, state, True)
            return mixer.out_proj((normed(mixer, o) * heads(mixer.gate_proj(x)).sigmoid()).flatten(2)), state

        return theirs

    agree_in_pieces(GatedDeltaNet2Config(n_heads=2, short_conv=None, chunk_size=16), paradigm, around)


@needs_fla
@every_paradigm
def test_comba_matches_fla_chunk_reference(paradigm):
    recurrence = loaded("comba").naive_chunk_comba  # their recurrent reference reads the decayed state

    def around(mixer):
        def theirs(x, state):
            q, k, v, gate, beta, dt = mixer.in_proj(x).split([*mixer.widths.values()], dim=-1)
            q, k, v = F.silu(heads(q)), F.silu(heads(k)), F.silu(heads(v))
            share = mixer.feedback.sigmoid()[:, None]
            q, k = unit(q - mixer.output_feedback[:, None] * share * k), unit(k)
            g = -mixer.decay.A_log.exp() * F.softplus(dt + mixer.decay.dt_bias)
            o, state = recurrence(q, k, v, share * k, g, beta.sigmoid(), 8, None, state, True)
            return mixer.out_proj((normed(mixer, o) * heads(gate).sigmoid()).flatten(2)), state

        return theirs

    agree_in_pieces(CombaConfig(n_heads=2, short_conv=None, chunk_size=16), paradigm, around)


@needs_fla
@every_paradigm
@pytest.mark.parametrize("kind", ["gated_delta_net", "kda"])
def test_preconditioned_delta_rules_match_fla_reference(kind, paradigm):
    gated = kind == "gated_delta_net"
    name = "precond_gated_delta_rule" if gated else "precond_kda"
    recurrence = getattr(loaded(name), f"naive_recurrent_{name}")

    def around(mixer):
        def theirs(x, state):
            projected = dict(zip(mixer.widths, mixer.in_proj(x).split([*mixer.widths.values()], dim=-1), strict=True))
            q, k, v = (F.silu(heads(projected[name])) for name in "qkv")
            scaled, memory, curvature = mixer.preconditioner, *(state or (None, None))
            a = -scaled.decay.A_log.exp() * F.softplus(projected["curvature_dt"] + scaled.decay.dt_bias)
            rate, beta = projected["curvature_rate"].sigmoid(), projected["beta"].sigmoid()
            more = {"initial_state": memory, "initial_A_state": curvature, "output_final_state": True}
            more["log_atk_scale"] = scaled.center
            if gated:  # it norms by itself, without the constant
                g = -mixer.decay.A_log.exp() * F.softplus(projected["dt"] + mixer.decay.dt_bias)
                o, *state = recurrence(unit(q), unit(k), v, a, g, rate, beta, **more)
                gate = F.silu(heads(projected["gate"]))
            else:
                o, *state = recurrence(unit(q), unit(k), v, mixer.log_decay(x), a, rate, beta, **more)
                gate = heads(mixer.gate_proj(x)).sigmoid()
            return mixer.out_proj((normed(mixer, o) * gate).flatten(2)), Pair(*state)

        return theirs

    config = MIXERS.resolve(kind)(n_heads=2, short_conv=None, chunk_size=16, precondition=1.5)
    agree_in_pieces(config, paradigm, around)


@needs_fla
@every_paradigm
def test_delta_product_matches_fla_reference(paradigm):
    recurrence, n = loaded("gated_delta_product").naive_recurrent_gated_delta_product, 3

    def around(mixer):
        def theirs(x, state):
            q, k, v, gate, beta, dt = mixer.in_proj(x).split([*mixer.widths.values()], dim=-1)
            k, v, beta = (y.unflatten(-1, (n, -1)).flatten(1, 2) for y in (k, v, beta))
            q, k, v = unit(F.silu(heads(q))), unit(F.silu(heads(k))), F.silu(heads(v))
            g = -mixer.decay.A_log.exp() * F.softplus(dt + mixer.decay.dt_bias)
            o, state = recurrence(q, k, v, g, 2 * beta.sigmoid(), 16**-0.5, None, state, True, n)
            return mixer.out_proj((normed(mixer, o) * F.silu(heads(gate))).flatten(2)), state

        return theirs

    agree_in_pieces(DeltaProductConfig(n_heads=2, n_steps=n, short_conv=None, chunk_size=16), paradigm, around)


@needs_fla
@every_paradigm
def test_rwkv7_matches_fla_reference(paradigm):
    recurrence = loaded("generalized_delta_rule/dplr").dplr_recurrence

    def around(mixer):
        def theirs(x, state):
            before, memory = (torch.zeros(2, 1, 32).double(), None) if state is None else state
            shifted = torch.cat((before, x[:, :-1]), dim=1)
            xr, xw, xk, xv, xa, xg = (x + mu * (shifted - x) for mu in mixer.convolution.weight)
            wr, wk, wv = mixer.in_proj.weight.chunk(3)
            r, k, v, g = (heads(y) for y in (xr @ wr.T, xk @ wk.T, xv @ wv.T, mixer.decay_proj(xw)))
            g, eta, kappa = -0.6065306597126334 * g.sigmoid(), heads(mixer.rate_proj(xa)).sigmoid(), k * mixer.removed
            kappa, k = unit(kappa), k * (1 + (eta - 1) * mixer.replaced)
            # it scales by 1/sqrt(K), and theirs reads the state before it decays
            given = (y.transpose(1, 2).float() for y in (4 * r, k, v, -kappa, kappa * eta, g))
            o, memory = recurrence(*given, memory)
            o = F.group_norm(o.double().transpose(1, 2).flatten(0, 1).flatten(1), 2, eps=16e-5).view_as(r)
            o = o * mixer.norm.weight + mixer.norm.bias + (r * k * mixer.norm.bonus).sum(-1, keepdim=True) * v
            return mixer.out_proj(o.flatten(2) * mixer.gate_proj(xg)), (x[:, -1:], memory)

        return theirs

    agree_in_pieces(RWKV7Config(n_heads=2, rank=4, chunk_size=16), paradigm, around)


@needs_fla
@pytest.mark.parametrize("paradigm", list(Paradigm))
def test_rwkv6_matches_fla_reference(paradigm):
    recurrence = loaded("rwkv6", "recurrent_naive").naive_recurrent_rwkv6

    def around(mixer):
        def theirs(x, state):
            before, memory = (torch.zeros(2, 1, 32).double(), None) if state is None else state
            shifted = torch.cat((before, x[:, :-1]), dim=1)
            xw, xk, xv, xr, xg = mixer.token_mix(x, shifted)
            weights = mixer.in_proj.weight.chunk(4)
            r, k, v, g = (heads(y @ w.T) for y, w in zip((xr, xk, xv, xg), weights, strict=True))
            given = (y.transpose(1, 2) for y in (r, k, v, -heads(mixer.decay_proj(xw)).exp()))
            o, memory = recurrence(*given, mixer.bonus, 1.0, memory, True)
            o = F.group_norm(o.double().transpose(1, 2).flatten(0, 1).flatten(1), 2, eps=16e-5).view_as(r)
            o = (o * mixer.norm.weight + mixer.norm.bias) * F.silu(g)
            return mixer.out_proj(o.flatten(2)), (x[:, -1:], memory)

        return theirs

    agree_in_pieces(RWKV6Config(n_heads=2, mix_rank=4, decay_rank=4, chunk_size=16), paradigm, around)


@needs_fla
@pytest.mark.parametrize("paradigm", list(Paradigm))
def test_gsa_matches_fla_reference(paradigm):
    recurrence = loaded("gsa").naive_recurrent_gsa

    def around(mixer):
        def theirs(x, state):
            q, k, v, f = (heads(y) for y in mixer.in_proj(x).split([*mixer.widths.values()], dim=-1))
            f = F.logsigmoid(f) / 8
            o, state = recurrence(F.silu(q), F.silu(k), F.silu(v), 1 - f.exp(), f, 1.0, state, True)
            return mixer.out_proj(normed(mixer, F.silu(o.flatten(2)))), state

        return theirs

    agree_in_pieces(GSAConfig(n_heads=2, n_slots=6, chunk_size=16), paradigm, around)
