"""Converted models of fla (flash-linear-attention 0.6.0): names and shapes are those of its modules. Its kernels need a
GPU, so the logits come from its plain recurrences between written-out layers.
"""

import json
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from fla_oracles import loaded, needs_fla
from peers.converted import VOCAB, compare, computing_in, moved
from safetensors.torch import save_file

pytestmark = [
    needs_fla,
    pytest.mark.skipif(not find_spec("fla") or not find_spec("fla.models"), reason="needs flash-linear-attention"),
]

D_MODEL, H = 24, 2
COMMON = {
    "hidden_size": D_MODEL,
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "num_heads": H,
} | {"norm_eps": 1e-3}
RANKS = {"decay_low_rank_dim": 5, "a_low_rank_dim": 5, "v_low_rank_dim": 3, "gate_low_rank_dim": 4, "num_heads": None}
CASES = {
    "fla-retnet": ("RetNet", {}),
    "fla-retnet, no gate": ("RetNet", {"use_output_gate": False, "expand_k": 0.5}),
    "gla": ("GLA", {"elementwise_affine": False}),
    "gla, convolved": ("GLA", {"use_short_conv": True, "conv_size": 3}),
    "delta-net": ("DeltaNet", {"use_gate": True, "allow_neg_eigval": True}),
    "delta-net, plain": ("DeltaNet", {"use_short_conv": False, "tie_word_embeddings": True}),
    "gated-deltanet": ("GatedDeltaNet", {"head_dim": 10, "output_gate_activation": "sigmoid"}),
    "gated-deltanet, no gate": ("GatedDeltaNet", {"head_dim": 8, "expand_v": 1.5, "use_gate": False}),
    "gated-deltanet, grouped": ("GatedDeltaNet", {"head_dim": 8, "num_v_heads": 4, "expand_v": 1.0}),
    "kda, grouped": ("KDA", {"head_dim": 8, "num_v_heads": 4}),
    "kda": ("KDA", {"head_dim": 12, "allow_neg_eigval": True}),
    "rwkv7": ("RWKV7", RANKS | {"head_dim": 8}),
    "rwkv7, not fused": ("RWKV7", RANKS | {"head_dim": 12, "fuse_norm": False, "tie_word_embeddings": True}),
    "fla-mamba2": ("Mamba2", {"head_dim": 12, "num_heads": 4, "state_size": 6, "n_groups": 2, "chunk_size": 8}),
}


def model_of(case):
    """Their configuration and their tensors, moved; no module of theirs can be called here."""
    from fla import models

    kind, fields = CASES[case]
    common = COMMON if kind != "Mamba2" else {k: v for k, v in COMMON.items() if k != "intermediate_size"}
    config = getattr(models, f"{kind}Config")(**common | fields)
    model = moved(getattr(models, f"{kind}ForCausalLM")(config).float())
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return config, {name: x for name, x in model.state_dict().items() if name not in tied}


def rms(x, eps, weight=None):
    y = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return y if weight is None else y * weight


def unit(x):
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def turned(x):
    """As RoFormer's code: pairs (j, j + half)."""
    half = x.shape[-1] // 2
    theta = 10000.0 ** -(torch.arange(half).to(x) / half)
    angles = (torch.arange(x.shape[1]).to(x)[:, None] * theta)[:, None]
    first, second = x.split(half, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Layer:
    """One of their layers, by its tensors."""

    def __init__(self, config, tensors, i):
        self.config, self.eps, self.n = config, config.norm_eps, getattr(config, "num_v_heads", None) or H
        self.tensors = {name.removeprefix(f"model.layers.{i}."): x for name, x in tensors.items()}

    def map(self, name, x):
        """A linear map."""
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def projected(self, name, x):
        """Queries, keys or values by head, convolved if they are."""
        y, conv = self.map(f"attn.{name}_proj", x), self.tensors.get(f"attn.{name}_conv1d.weight")
        if conv is not None:
            y = F.conv1d(F.pad(y.mT, (conv.shape[-1] - 1, 0)), conv, groups=len(conv)).mT
        if conv is not None or self.config.model_type not in ("retnet", "gla"):
            y = F.silu(y)
        if name == "v":
            return self.heads(y)
        return y.unflatten(-1, (H, -1)).repeat_interleave(self.n // H, 2)

    def heads(self, x):
        return x.unflatten(-1, (self.n, -1))

    def __call__(self, x):
        y = self.mixer(rms(x, self.eps, self.tensors["attn_norm.weight"]))
        x = x + self.map("attn.o_proj", y.flatten(2))
        y = rms(x, self.eps, self.tensors["mlp_norm.weight"])
        return x + self.map("mlp.down_proj", F.silu(self.map("mlp.gate_proj", y)) * self.map("mlp.up_proj", y))

    def mixer(self, x):
        q, k, v = (self.projected(name, x) for name in "qkv")
        o = getattr(self, self.config.model_type)(x, q, k, v)
        norms = ("o_norm", "g_norm", "g_norm_swish_gate")
        weight = next((w for name in norms if (w := self.tensors.get(f"attn.{name}.weight")) is not None), None)
        o = rms(o, self.eps, weight)
        if self.config.model_type == "kda":
            return o * self.heads(self.map("attn.g_proj.1", self.map("attn.g_proj.0", x))).sigmoid()
        if "attn.g_proj.weight" not in self.tensors:
            return o
        gate = self.heads(self.map("attn.g_proj", x))
        sigmoid = getattr(self.config, "output_gate_activation", None) == "sigmoid"
        return o * (gate.sigmoid() if sigmoid else F.silu(gate))

    def retnet(self, x, q, k, v):
        first = (y.transpose(1, 2) for y in (turned(q), turned(k), v))
        return loaded("retention").naive_retention(*first).transpose(1, 2)

    def gla(self, x, q, k, v):
        gk = self.heads(F.logsigmoid(self.map("attn.gk_proj.1", self.map("attn.gk_proj.0", x))) / 16)
        return loaded("gla").naive_recurrent_gla(q, k, v, gk, None, True)[0]

    def beta(self, x):
        return self.map("attn.b_proj", x).sigmoid() * (2 if self.config.allow_neg_eigval else 1)

    def delta_net(self, x, q, k, v):
        first = (y.transpose(1, 2) for y in (unit(q), unit(k), v, self.beta(x)))
        return loaded("delta_rule").delta_rule_recurrence(*first)[0].transpose(1, 2)

    def gated_deltanet(self, x, q, k, v):
        g = -self.tensors["attn.A_log"].exp() * F.softplus(self.map("attn.a_proj", x) + self.tensors["attn.dt_bias"])
        rule = loaded("gated_delta_rule").naive_recurrent_gated_delta_rule
        return rule(unit(q), unit(k), v, self.beta(x), g)[0]

    def kda(self, x, q, k, v):
        logits = self.map("attn.f_proj.1", self.map("attn.f_proj.0", x)) + self.tensors["attn.dt_bias"]
        g = -self.tensors["attn.A_log"].exp()[:, None] * self.heads(F.softplus(logits))
        return loaded("kda").naive_recurrent_kda(unit(q), unit(k), v, g, self.beta(x))[0]


def logits(config, tensors, tokens):
    """Of the whole model."""
    x = tensors["model.embeddings.weight"][tokens]
    for i in range(config.num_hidden_layers):
        x = Layer(config, tensors, i)(x)
    head = tensors.get("lm_head.weight", tensors["model.embeddings.weight"])
    return F.linear(rms(x, config.norm_eps, tensors["model.norm.weight"]), head)


def rwkv7_logits(config, tensors, tokens):
    """Their layers written out around their plain recurrence."""
    heads, first = D_MODEL // config.head_dim, None

    def normed(x, name, shape=(D_MODEL,), eps=config.norm_eps):
        y = F.layer_norm(x, shape[-1:], eps=eps)
        return y * tensors[f"{name}.weight"].view(shape) + tensors[f"{name}.bias"].view(shape)

    x = normed(tensors["model.embeddings.weight"][tokens], "model.layers.0.pre_norm")
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        own = {name.removeprefix(f"{at}.attn."): t for name, t in tensors.items() if name.startswith(f"{at}.attn.")}
        y = normed(x, f"{at}.attn_norm")
        delta = F.pad(y, (0, 0, 1, 0))[:, :-1] - y
        xs = {name: y + delta * own[f"x_{name}"] for name in "rwkvag"}

        def low_rank(name, act=lambda z: z, own=own, xs=xs):
            y = act(F.linear(xs[name], own[f"{name}_lora.lora.0.weight"]))
            return F.linear(y, own[f"{name}_lora.lora.2.weight"], own.get(f"{name}_lora.lora.2.bias"))

        r, k, v = (F.linear(xs[name], own[f"{name}_proj.weight"]) for name in "rkv")
        w, a = -0.6065306597126334 * low_rank("w", torch.tanh).sigmoid(), low_rank("a").sigmoid()
        first = v if first is None else first
        v = v if i == 0 else torch.lerp(v, first, low_rank("v").sigmoid())
        kk = (k * own["k_k"]).unflatten(-1, (heads, -1))
        kk = unit(kk) if config.fuse_norm else F.normalize(kk, dim=-1)
        k = k * (1 + (a - 1) * own["k_a"])
        r, w, k, v, a = (z.unflatten(-1, (heads, -1)) for z in (r, w, k, v, a))
        asked = (r * config.head_dim**0.5, k, v, -kk, kk * a, w)
        o = (
            loaded("generalized_delta_rule/dplr")
            .dplr_recurrence(*(z.transpose(1, 2) for z in asked))[0]
            .transpose(1, 2)
        )
        o = normed(o, f"{at}.attn.g_norm", (heads, config.head_dim), config.head_dim * config.norm_eps)
        o = o + (r * k * own["r_k"]).sum(-1, keepdim=True) * v
        x = x + F.linear(o.flatten(2) * low_rank("g", torch.sigmoid), own["o_proj.weight"])
        y = normed(x, f"{at}.ffn_norm")
        y = y + (F.pad(y, (0, 0, 1, 0))[:, :-1] - y) * tensors[f"{at}.ffn.x_k"]
        x = x + F.linear(F.linear(y, tensors[f"{at}.ffn.key.weight"]).relu() ** 2, tensors[f"{at}.ffn.value.weight"])
    return F.linear(normed(x, "model.norm"), tensors.get("lm_head.weight", tensors["model.embeddings.weight"]))


def mamba2_logits(config, tensors, tokens):
    """transformers has the same tensors, and computes on a CPU."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    own = {"layer_norm_epsilon": config.norm_eps}
    own |= {name: getattr(config, name) for name in ("head_dim", "num_heads", "state_size", "n_groups", "chunk_size")}
    common = {name: COMMON[name] for name in ("hidden_size", "vocab_size", "num_hidden_layers")}
    model = Mamba2ForCausalLM(Mamba2Config(**common | own)).to(tensors["lm_head.weight"].dtype)
    model.load_state_dict(tensors)
    return model(tokens).logits


def measured(case, dtype, folder):
    """What `compare` finds, and their configuration."""
    config, tensors = model_of(case)
    config.save_pretrained(folder / "theirs")
    save_file(tensors, folder / "theirs/model.safetensors")

    @torch.no_grad()
    def reference(tokens):
        wide = {name: x.to(dtype) for name, x in tensors.items()}
        with computing_in(dtype):
            return {"mamba2": mamba2_logits, "rwkv7": rwkv7_logits}.get(config.model_type, logits)(config, wide, tokens)

    return compare(folder / "theirs", folder, case.partition(",")[0], reference, dtype), config


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_logits_match_in_every_paradigm_and_export_restores_the_weights(case, dtype, tmp_path):
    result, config = measured(case, dtype, tmp_path)
    assert max(result.worst.values()) < (1e-4 if dtype == torch.float32 else 1e-9)
    assert result.changed == []
    back = json.loads((tmp_path / "back/config.json").read_text())
    wanted = json.loads(json.dumps(config.to_dict()))
    assert {name: value for name, value in back.items() if name != "dtype" and wanted.get(name) != value} == {
        "architectures": [f"{CASES[case][0]}ForCausalLM"]
    }
