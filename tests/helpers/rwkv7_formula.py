"""RWKV-7's equations in plain operations, with the kit's definition of their recurrence."""

import torch.nn.functional as F
from kit_definitions import defined, undecayed


def rwkv7_written_out(mixer, x, first=None):
    """Output and memory, and values where those of the first layer are given."""
    heads, before = mixer.n_heads, F.pad(x, (0, 0, 1, 0))[:, :-1]
    xr, xw, xk, xv, xa, xg = (x + mu * (before - x) for mu in mixer.convolution.weight)
    low_w, low_a, low_g = mixer.decay_proj, mixer.rate_proj, mixer.gate_proj
    r, k, v = (y @ weight.T for y, weight in zip((xr, xk, xv), mixer.in_proj.weight.chunk(3), strict=True))
    w = (xw @ low_w.down.weight.T).tanh() @ low_w.up.weight.T + low_w.up.bias
    log_w = -0.6065306597126334 / (1 + (-w).exp())
    eta = (xa @ low_a.down.weight.T @ low_a.up.weight.T + low_a.up.bias).sigmoid()
    own = v
    if getattr(mixer, "value_proj", None) is not None:
        low = mixer.value_proj
        share = 1 / (1 + (-(xv @ low.down.weight.T @ low.up.weight.T + low.up.bias)).exp())
        v = (1 - share) * v + share * first
    r, k, v, log_w, eta = (y.unflatten(-1, (heads, -1)) for y in (r, k, v, log_w, eta))
    kappa = k * mixer.removed
    kappa = kappa / (kappa.square().sum(-1, keepdim=True) + mixer.config.key_eps).sqrt()
    k = k * (1 + (eta - 1) * mixer.replaced)
    o, state = defined("dplr", q=r, k=k, v=v, a=kappa, b=-eta * kappa, log_decay=log_w, predict=undecayed)
    o = o - o.mean(-1, keepdim=True)
    o = o / (o.square().mean(-1, keepdim=True) + mixer.config.norm_eps * k.shape[-1]).sqrt()
    o = o * mixer.norm.weight + mixer.norm.bias + (mixer.norm.bonus * r * k).sum(-1, keepdim=True) * v
    gate = (xg @ low_g.down.weight.T).sigmoid() @ low_g.up.weight.T
    y = (o.flatten(2) * gate) @ mixer.out_proj.weight.T
    return y, state, own
