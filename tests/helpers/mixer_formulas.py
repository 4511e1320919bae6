"""Mixers with queries, keys and values per head, token by token from their papers' equations, in plain operations."""

import math

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from seqmix.mixers import MIXERS

D_MODEL = 12


def build(kind, dtype=torch.float64, d_model=D_MODEL, layer_idx=1, n_layers=3, **fields):
    """A small mixer in which no parameter is all ones or zeros, which would hide that it is there."""
    torch.manual_seed(0)
    small = {"n_heads": 3, "chunk_size": 4} | ({"gate_rank": 3} if kind == "gla" else {})
    mixer = MIXERS.resolve(kind)(**small | fields).build(d_model, layer_idx=layer_idx, n_layers=n_layers)
    torch.nn.init.normal_(mixer.in_proj.weight, std=0.5)
    if mixer.norm.weight is not None:
        torch.nn.init.uniform_(mixer.norm.weight, 0.5, 1.5)
    if kind == "gla":
        torch.nn.init.normal_(mixer.decay_proj.up.bias)
    if kind == "mesa_net":
        torch.nn.init.normal_(mixer.ridge)
        torch.nn.init.normal_(mixer.gate_bias)
    return mixer.to(dtype)


def tokens(length, batch_size=2, dtype=torch.float64, d_model=D_MODEL):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, length, d_model, dtype=torch.float64, generator=generator).to(dtype)


def exactly(actual, expected, tolerance=1e-9):
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_follows(mixer, formula, x):
    """Output, state and all gradients in every paradigm are those of formula(mixer, x): the output, and the memory."""
    leaves = [x.requires_grad_(), *mixer.parameters()]
    expected = formula(mixer, x)
    upstream = [torch.randn_like(y) for y in expected]
    gradients = torch.autograd.grad(expected, leaves, upstream)
    for paradigm in sorted(mixer.traits.paradigms):
        y, state = mixer(x, paradigm=paradigm, return_state=True)
        found = (y, state.memory) if len(expected) > 1 else (y,)
        exactly(found, tuple(expected))
        exactly(torch.autograd.grad(found, leaves, upstream), gradients)


def projections(mixer):
    """The rows of the fused projection, by name."""
    return dict(zip(mixer.widths, mixer.in_proj.weight.split([*mixer.widths.values()]), strict=True))


def convolved(x, weight):
    """sum_{i<W} weight_{W-1-i} * x_{t-i} per channel."""
    return sum(weight[:, -1 - i] * F.pad(x, (0, 0, i, 0))[:, : x.shape[1]] for i in range(weight.shape[1]))


def rms(x, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def turned(x, rotation, base):
    """Every interleaved pair of [B T H K] as a complex number, turned by its angle."""
    pairs = x.shape[-1] // 2
    steps = {"rope": pairs, "retnet": max(pairs - 1, 1)}[rotation]
    theta = torch.tensor([base ** (-j / steps) for j in range(pairs)], dtype=torch.float64)
    turn = torch.polar(torch.ones(()).double(), torch.arange(x.shape[1])[:, None, None] * theta)
    return torch.view_as_real(torch.complex(x[..., ::2], x[..., 1::2]) * turn).flatten(-2)


def retention_gammas(config):
    """Each head's decay, as the RetNet paper's text has it."""
    heads = range(config.n_heads)
    if config.decay == "geometric":
        return [1 - 2.0 ** (-5 - h) for h in heads]
    if config.decay == "log_uniform":
        last = max(config.n_heads - 1, 1)
        return [1 - math.exp((1 - h / last) * math.log(1 / 32) + h / last * math.log(1 / 512)) for h in heads]
    return [1.0 if config.decay == "none" else config.gamma] * config.n_heads


def lightning_lambdas(schedule, n_heads, layer, n_layers):
    """Each head's decay, in the papers' words; MiniMax-01's slopes are those of ALiBi."""
    if schedule == "transnormer":
        return [math.exp(-8 * h / n_heads * (1 - layer / n_layers)) for h in range(n_heads)]
    depth = layer / (n_layers - 1) if n_layers > 1 else 0
    return [math.exp(-((2 ** (-8 / n_heads)) ** (h + 1)) * (1 - depth + 1e-5)) for h in range(n_heads)]


def decays(mixer, x, projected):
    """What is left of the state at each token, [B T H K] or what broadcasts to it."""
    config = mixer.config
    if config.kind == "retention" and config.learnable_decay:
        return mixer.decay.logit.sigmoid()[:, None]
    if config.kind == "retention":
        return x.new_tensor(retention_gammas(config))[:, None]
    if config.kind == "lightning":
        return x.new_tensor(lightning_lambdas(config.schedule, config.n_heads, mixer.layer_idx, mixer.n_layers))[
            :, None
        ]
    if config.kind == "gated_retention":
        return (projected["gamma"].sigmoid() ** (1 / config.gate_logit_normalizer))[..., None]
    if config.kind == "gla":
        up = mixer.decay_proj.up
        logits = x @ mixer.decay_proj.down.weight.T @ up.weight.T + up.bias
        return (1 / (1 + (-logits).exp())).unflatten(-1, (config.n_heads, -1)) ** (1 / config.gate_logit_normalizer)
    if config.kind == "hgrn2":
        forget, bound = 1 / (1 + (-projected["k"]).exp()), mixer.forget.bound.sigmoid().flatten()
        return (bound + (1 - bound) * forget).unflatten(-1, (config.n_heads, -1))
    if config.kind in ("kda", "gated_delta_net2"):
        low = mixer.decay_proj
        logits = (x @ low.down.weight.T @ low.up.weight.T).unflatten(-1, (config.n_heads, -1))
        rate, logits = mixer.decay.A_log.exp()[:, None], logits + mixer.decay.dt_bias
        if config.decay_lower_bound is not None:
            return (config.decay_lower_bound / (1 + (-rate * logits).exp())).exp()
        return (-rate * torch.log1p(logits.exp())).exp()
    if config.kind == "mesa_net":
        return (projected["decay"] + mixer.gate_bias[1]).sigmoid()[..., None]
    if config.kind == "gsa":  # of each slot
        forget = 1 / (1 + (-projected["forget"]).exp())
        return forget.unflatten(-1, (config.n_heads, -1)) ** (1 / config.gate_logit_normalizer)
    if config.kind == "mlstm":
        return (1 / (1 + (-capped(mixer, projected["f"] + mixer.gate_bias[1])).exp()))[..., None]
    if config.kind in ("gated_delta_net", "comba") or getattr(config, "forget_gate", False):
        step = torch.log1p((projected["dt"] + mixer.decay.dt_bias).exp())
        return (-mixer.decay.A_log.exp() * step).exp()[..., None]
    return x.new_ones(())


def capped(mixer, y):
    """The logits of mLSTM's gates."""
    cap = mixer.config.gate_soft_cap
    return y if cap is None else cap * (y / cap).tanh()


def features(mixer, y):
    """phi of queries or keys: their norm, linear attention's feature map, and their rotation."""
    config = mixer.config
    if config.qk_norm == "l2" and getattr(config, "update", "euler") == "euler":
        y = y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    elif config.qk_norm == "rms":
        y = rms(y, config.norm_eps)
    feature_map = getattr(config, "feature_map", "identity")
    if feature_map == "elu":
        y = torch.where(y > 0, y + 1, y.clamp(max=0).exp())
    elif feature_map == "relu":
        y = y.clamp(min=0)
    elif feature_map == "softmax":
        y = y.exp() / y.exp().sum(-1, keepdim=True)
    return y if config.rotation == "none" else turned(y, config.rotation, config.rotation_base)


def preconditioned(mixer, projected, k, group):
    """The factors of the keys that write, [B T H K]."""
    scaled, x = mixer.preconditioner, mixer.config.precondition
    step = torch.log1p((projected["curvature_dt"] + scaled.decay.dt_bias).exp())
    a = (-scaled.decay.A_log.exp() * step).exp().repeat_interleave(group, 2)
    b, curvature, factors = projected["curvature_rate"].sigmoid().repeat_interleave(group, 2), 0, []
    for t in range(k.shape[1]):
        curvature = a[:, t, :, None] * curvature + b[:, t, :, None] * k[:, t] ** 2
        r = torch.log(curvature + 1e-6) - scaled.center.repeat_interleave(group)[:, None]
        factors.append(x ** (-r / (1 + r.abs())))
    return torch.stack(factors, 1)


def written_out(mixer, x):
    """The layer from the first token: its output, and the state after the last token."""
    config, heads = mixer.config, mixer.n_heads
    projected = {name: x @ weight.T for name, weight in projections(mixer).items()}
    qkv = torch.cat([projected[name] for name in ("qkv" if mixer.convolves_values else "qk")], -1)
    if mixer.convolution is not None:
        qkv = convolved(qkv, mixer.convolution.weight)
    convolved_too = mixer.convolution is not None and config.kind != "hgrn2"
    if convolved_too or config.kind in ("lightning", "mesa_net", "gsa") or config.family.name != "decay":
        qkv = qkv * qkv.sigmoid()
    q, projected["k"], *v = qkv.split([*mixer.widths.values()][: 3 if mixer.convolves_values else 2], dim=-1)
    v = v[0] if v else projected["v"]
    shared = getattr(config, "n_qk_heads", None) or heads
    steps, group = getattr(config, "n_steps", 1), heads // shared
    q, read = q.unflatten(-1, (shared, -1)), x.new_ones(heads, 1, 1)
    if config.kind == "comba":
        share = mixer.feedback.sigmoid()[:, None]
        read = share.repeat_interleave(group, 0)[..., None]
        if mixer.output_feedback is not None:
            q = q - mixer.output_feedback[:, None] * share * projected["k"].unflatten(-1, (shared, -1))
    q = features(mixer, q).repeat_interleave(group, 2)
    ks = [part.unflatten(-1, (shared, -1)) for part in projected["k"].chunk(steps, dim=-1)]
    vs = [part.unflatten(-1, (heads, -1)) for part in v.chunk(steps, dim=-1)]
    ks = [features(mixer, k).repeat_interleave(group, 2) for k in ks]
    k, v = ks[0], vs[0]
    a = decays(mixer, x, projected)
    a = a if config.kind == "gsa" else a.expand(*k.shape)
    if config.kind == "hgrn2":
        q, k = q * q.sigmoid(), 1 - a
    total, i = x.new_zeros(len(x), heads), None
    if config.kind == "mesa_net":
        v = torch.cat((k, v), -1)
    if config.kind == "mlstm":
        i = capped(mixer, projected["i"] + mixer.gate_bias[0]).exp()
        k = i[..., None] * k
    most = 2 if getattr(config, "allow_neg_eigval", False) else 1
    beta = most * projected.get("beta", x.new_zeros(())).sigmoid()
    if (update := getattr(config, "update", "euler")) != "euler":
        square = k.square().sum(-1) + 1e-6
        beta = (1 - (-beta * square).exp()) / square if update == "exact" else beta / (1 + beta * square)
    factors = preconditioned(mixer, projected, k, group) if getattr(config, "precondition", None) else None
    divided = getattr(config, "denominator", False)
    scale = 1.0 if divided or config.kind == "lightning" else mixer.key_dim**-0.5
    state, weights, outputs = x.new_zeros(len(x), heads, a.shape[-1], v.shape[-1]), x.new_zeros(()), []
    for t in range(x.shape[1]):
        key, value, before, state = k[:, t, ..., None], v[:, t, :, None], state, a[:, t, ..., None] * state
        if config.kind == "comba":
            state = state + beta[:, t, :, None, None] * key * (value - read * (key.mT @ before))
        elif config.kind == "mesa_net":
            state = state + (projected["beta"] + mixer.gate_bias[0])[:, t, :, None, None].sigmoid() * key * value
        elif config.kind == "gsa":
            forget = a[:, t, ..., None]
            weights, state = forget * weights + (1 - forget) * key.mT, state + (1 - forget) * value
        elif "beta" in projected:
            for k, v, rate in zip(ks, vs, beta[:, t].chunk(steps, dim=-1), strict=True):
                key, value, b = k[:, t, ..., None], v[:, t, :, None], rate[..., None, None]
                if factors is not None:
                    b = b * factors[:, t, ..., None]
                state = state - b * key @ (key.mT @ state) + b * key * value
        elif "erase" in projected:
            written = projected["write"].sigmoid().unflatten(-1, (heads, -1))[:, t, :, None] * value
            erased = most * projected["erase"].sigmoid().unflatten(-1, (heads, -1))[:, t, ..., None] * key
            state = state - key @ (erased.mT @ state) + key * written
        else:
            state = state + key * value
        reads, memory = q[:, t, :, None], state
        if config.kind == "mesa_net":
            gram, memory = state.split([mixer.key_dim, v.shape[-1] - mixer.key_dim], dim=-1)
            ridge = (config.min_ridge + torch.log1p(mixer.ridge.exp())).diag_embed()
            reads, scale = torch.linalg.solve(gram + ridge, q[:, t])[:, :, None], 1.0
        elif config.kind == "gsa":
            scores, scale = (reads @ weights.mT).exp(), 1.0
            reads = scores / scores.sum(-1, keepdim=True)
        o = (reads @ memory)[:, :, 0] * scale
        if i is not None:
            weights, total = a[:, t] * weights + k[:, t], a[:, t, :, 0] * total + i[:, t]
            o = o / (scale * (q[:, t] * weights).sum(-1, keepdim=True)).abs().clamp(min=1)
        if divided:
            weights = weights + k[:, t]
            o = o / ((q[:, t] * weights).sum(-1, keepdim=True) + config.eps)
        elif getattr(config, "row_norm", False):  # the sum of the decays so far
            weights = a[:, t, :, :1] * weights + 1
            o = o / weights.sqrt()
        outputs.append(o)
    o = torch.stack(outputs, 1)
    o = o * o.sigmoid() if config.kind == "gsa" else o
    o = o.flatten(2) if config.kind in ("lightning", "hgrn2", "gsa") else o  # its norm is over all heads together
    if config.head_norm == "group":
        o = o - o.mean(-1, keepdim=True)
    if config.head_norm != "none":
        o = rms(o, config.norm_eps) * (1 if mixer.norm.weight is None else mixer.norm.weight)
    o = o.reshape(*x.shape[:2], -1)
    if config.gate != "none":
        low = getattr(mixer, "gate_proj", None)
        gate = projected["gate"] if low is None else x @ low.down.weight.T @ low.up.weight.T
        gate = gate if low is None or low.up.bias is None else gate + low.up.bias
        o = o * gate.sigmoid() * (gate if config.gate == "swish" else 1)
    if divided or i is not None:
        state = torch.cat((state, weights[..., None]), -1)
    return o @ mixer.out_proj.weight.T, state if i is None else state / total[..., None, None]
