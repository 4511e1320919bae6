"""Mixers with queries, keys and values per head from their papers' equations, in plain operations.

The recurrences are the kit's definitions, token by token; projections, gates and norms are written out here.
"""

import math

import torch
import torch.nn.functional as F
from kit_definitions import defined, defined_scan, states, undecayed
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


def log_decays(mixer, x, projected):
    """Logarithms of the state's decays at each token, [B T H K] or what broadcasts to it."""
    config = mixer.config
    if config.kind == "retention" and config.learnable_decay:
        return mixer.decay.logit.sigmoid().log()[:, None]
    if config.kind == "retention":
        return x.new_tensor(retention_gammas(config)).log()[:, None]
    if config.kind == "lightning":
        lambdas = lightning_lambdas(config.schedule, config.n_heads, mixer.layer_idx, mixer.n_layers)
        return x.new_tensor(lambdas).log()[:, None]
    if config.kind == "gated_retention":
        return (projected["gamma"].sigmoid().log() / config.gate_logit_normalizer)[..., None]
    if config.kind == "gla":
        up = mixer.decay_proj.up
        logits = x @ mixer.decay_proj.down.weight.T @ up.weight.T + up.bias
        return -(1 + (-logits).exp()).log().unflatten(-1, (config.n_heads, -1)) / config.gate_logit_normalizer
    if config.kind == "hgrn2":
        forget, bound = 1 / (1 + (-projected["k"]).exp()), mixer.forget.bound.sigmoid().flatten()
        return (bound + (1 - bound) * forget).log().unflatten(-1, (config.n_heads, -1))
    if config.kind in ("kda", "gated_delta_net2"):
        low = mixer.decay_proj
        logits = (x @ low.down.weight.T @ low.up.weight.T).unflatten(-1, (config.n_heads, -1))
        rate, logits = mixer.decay.A_log.exp()[:, None], logits + mixer.decay.dt_bias
        if config.decay_lower_bound is not None:
            return config.decay_lower_bound / (1 + (-rate * logits).exp())
        return -rate * torch.log1p(logits.exp())
    if config.kind == "mesa_net":
        return (projected["decay"] + mixer.gate_bias[1]).sigmoid().log()[..., None]
    if config.kind == "gsa":  # of each slot
        log_forget = -(1 + (-projected["forget"]).exp()).log()
        return log_forget.unflatten(-1, (config.n_heads, -1)) / config.gate_logit_normalizer
    if config.kind == "mlstm":
        return -(1 + (-capped(mixer, projected["f"] + mixer.gate_bias[1])).exp()).log()[..., None]
    if config.kind in ("gated_delta_net", "comba") or getattr(config, "forget_gate", False):
        step = torch.log1p((projected["dt"] + mixer.decay.dt_bias).exp())
        return (-mixer.decay.A_log.exp() * step)[..., None]
    return x.new_zeros(())


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
    q = q.unflatten(-1, (shared, -1))
    if config.kind == "comba":
        share = mixer.feedback.sigmoid()[:, None]
        if mixer.output_feedback is not None:
            q = q - mixer.output_feedback[:, None] * share * projected["k"].unflatten(-1, (shared, -1))
    q = features(mixer, q).repeat_interleave(group, 2)
    ks = [part.unflatten(-1, (shared, -1)) for part in projected["k"].chunk(steps, dim=-1)]
    vs = [part.unflatten(-1, (heads, -1)) for part in v.chunk(steps, dim=-1)]
    ks = [features(mixer, k).repeat_interleave(group, 2) for k in ks]
    k, v = ks[0], vs[0]
    log_a = log_decays(mixer, x, projected)
    log_a = log_a if config.kind == "gsa" else log_a.expand(*k.shape)
    if config.kind == "hgrn2":
        q, k = q * q.sigmoid(), 1 - log_a.exp()
    i = None
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
    if config.kind == "comba":
        read = share.repeat_interleave(group, 0)

        def predict(*token):
            predicted, state = undecayed(*token)
            return -read * predicted, state

        o, state = defined("delta", q=q, k=k, v=v, beta=beta, log_decay=log_a, scale=scale, predict=predict)
    elif config.kind == "mesa_net":
        k = (projected["beta"] + mixer.gate_bias[0]).sigmoid()[..., None] * k
        ridge = (config.min_ridge + torch.log1p(mixer.ridge.exp())).diag_embed()
        gram = states("decay", k=k, v=v[..., : mixer.key_dim], log_decay=log_a)
        o, state = defined("decay", q=torch.linalg.solve(gram + ridge, q), k=k, v=v, log_decay=log_a)
        o = o[..., mixer.key_dim :]
    elif config.kind == "gsa":
        slots = states("decay", k=1 - log_a.exp(), v=k, log_decay=log_a)
        scores = (slots @ q[..., None])[..., 0].exp()
        reads = scores / scores.sum(-1, keepdim=True)
        o, state = defined("decay", q=reads, k=1 - log_a.exp(), v=v, log_decay=log_a)
    elif "beta" in projected and steps > 1:
        ks, vs, beta = (torch.stack([*y], 2).flatten(1, 2) for y in (ks, vs, beta.chunk(steps, dim=-1)))
        o, state = defined("delta_product", q=q, k=ks, v=vs, beta=beta, log_decay=log_a[..., 0], scale=scale)
    elif factors is not None:
        writes = beta[..., None] * factors * k
        o, state = defined("dplr", q=q, k=writes, v=v, a=k, b=-writes, log_decay=log_a, scale=scale)
    elif "beta" in projected:
        o, state = defined("delta", q=q, k=k, v=v, beta=beta, log_decay=log_a, scale=scale)
    elif "erase" in projected:
        written = projected["write"].sigmoid().unflatten(-1, (heads, -1)) * v
        erased = most * projected["erase"].sigmoid().unflatten(-1, (heads, -1)) * k
        o, state = defined("dplr", q=q, k=k, v=written, a=erased, b=-k, log_decay=log_a, scale=scale)
    else:
        o, state = defined("decay", q=q, k=k, v=v, log_decay=log_a, scale=scale)
    if divided or i is not None:  # a normaliser, which is a state with values of 1
        size, weights = defined("decay", q=q, k=k, v=torch.ones_like(v[..., :1]), log_decay=log_a, scale=scale)
        o = o / (size + config.eps if divided else size.abs().clamp(min=1))
        state = torch.cat((state, weights), -1)
    elif getattr(config, "row_norm", False):  # the sum of the decays so far
        o = o / defined_scan("scan", x=torch.ones_like(log_a[..., 0]), log_decay=log_a[..., 0])[0][..., None].sqrt()
    if i is not None:
        state = state / defined_scan("scan", x=i, log_decay=log_a[..., 0])[1][..., None, None]
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
    return o @ mixer.out_proj.weight.T, state
