"""Mamba and Mamba-2 of transformers, Mamba-2 of fla: one mixer per layer, no network."""

import math
from typing import Any

from ..blocks import Block
from ..models import ModelConfig
from ..registry import SeqmixError
from .architecture import Architecture, Fields, Layout
from .layout import part
from .llama import model_fields, written_fields

STEPS = "time_step_rank time_step_min time_step_max time_step_floor residual_in_fp32 rescale_prenorm_residual "
"""How training starts, and the dtype of the residual stream."""


class Mamba(Architecture):
    """Mamba (S6)."""

    name, library, model_type, class_name = "mamba", "transformers", "mamba", "MambaForCausalLM"
    mixers = ("mamba",)
    harmless = STEPS + "time_step_init_scheme time_step_scale use_mambapy use_associative_scan intermediate_size"
    embedding, norm, layers = "backbone.embeddings.weight", "backbone.norm_f.weight", "backbone.layers"
    tied = True
    eps = "layer_norm_epsilon"
    copied = ("D", "in_proj.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "out_proj.weight")

    def read(self, c: Fields) -> dict[str, Any]:
        c.only(use_bias=False, use_conv_bias=True, hidden_act="silu")
        norm = {"kind": "rmsnorm", "eps": c.take(self.eps, 1e-5)}
        block = {"mixer": self.mixer_fields(c), "ffn": None, "norm": norm}
        return model_fields(c, tied=self.tied) | {"blocks": {"mamba": block}, "norm": norm}

    def mixer_fields(self, c: Fields) -> dict[str, Any]:
        """The mixer's fields."""
        d_model, expand = c.values["hidden_size"], c.take("expand", 2)
        rank = c.take("time_step_rank", "auto")
        return {
            "kind": "mamba",
            "expand": c.take("intermediate_size", int(expand * d_model)) / d_model,
            "d_state": c.take("state_size", 16),
            "dt_rank": math.ceil(d_model / 16) if rank == "auto" else rank,
            "short_conv": c.take("conv_kernel", 4),
        }

    def write(self, m: ModelConfig) -> dict[str, Any]:
        mixer: Any = m.blocks[m.layers[0]].mixer
        fields = written_fields(m)
        return fields | {self.eps: fields.pop("rms_norm_eps")} | self.written_mixer(mixer, m.d_model)

    def written_mixer(self, mixer: Any, d_model: int) -> dict[str, Any]:
        """Their fields of the mixer."""
        return {
            "expand": whole(mixer.expand),
            "intermediate_size": round(mixer.expand * d_model),
            "state_size": mixer.d_state,
            "time_step_rank": mixer.dt_rank or math.ceil(d_model / 16),
            "conv_kernel": mixer.short_conv,
        }

    def block(self, block: Block) -> Layout:
        mixer: Any = block.mixer
        own: Layout = {f"mixer.{name}": f"mixer.{name}" for name in self.copied}
        return own | self.renamed(mixer) | {"mixer_norm.weight": "norm.weight"} | convolution(mixer, "mixer.conv1d")

    def renamed(self, mixer: Any) -> Layout:
        """Tensors of the mixer that have another name or layout."""
        return {"mixer.A_log": part("mixer.A_log", *mixer.A_log.shape[::-1], pattern="c n -> n c")}


class Mamba2(Mamba):
    """Mamba-2 (SSD)."""

    name, model_type, class_name = "mamba2", "mamba2", "Mamba2ForCausalLM"
    mixers = ("mamba2",)
    harmless = STEPS + "chunk_size expand"
    tied = False
    limit = "time_step_limit"
    copied = ("D", "in_proj.weight", "out_proj.weight")

    def mixer_fields(self, c: Fields) -> dict[str, Any]:
        low, high = c.take(self.limit, (0.0, math.inf))
        heads, width = c.take("num_heads"), c.take("head_dim", 64)
        return {
            "kind": "mamba2",
            "expand": heads * width / c.values["hidden_size"],
            "head_dim": width,
            "d_state": c.take("state_size", 128),
            "n_groups": c.take("n_groups"),
            "short_conv": c.take("conv_kernel", 4),
            "time_step_limit": None if low == 0 and high == math.inf else (low, high),
            "norm_eps": c.take(self.eps, 1e-5),
        }

    def written_mixer(self, mixer: Any, d_model: int) -> dict[str, Any]:
        low, high = mixer.time_step_limit or (0.0, None)
        return {
            "expand": whole(mixer.expand),
            "num_heads": round(mixer.expand * d_model) // mixer.head_dim,
            "head_dim": mixer.head_dim,
            "state_size": mixer.d_state,
            "n_groups": mixer.n_groups,
            "conv_kernel": mixer.short_conv,
            self.limit: [low, math.inf if high is None else high],
        }

    def renamed(self, mixer: Any) -> Layout:
        names = {"decay.A_log": "A_log", "decay.dt_bias": "dt_bias", "norm_weight": "norm.weight"}
        return {f"mixer.{ours}": f"mixer.{theirs}" for ours, theirs in names.items()}


class FlaMamba2(Mamba2):
    """Mamba-2 as fla writes it: the same tensors under other fields."""

    name, library, marker = "fla-mamba2", "fla", "norm_before_gate"
    harmless = "chunk_size expand fuse_norm fuse_cross_entropy fuse_linear_cross_entropy use_l2warp A_init_range "
    harmless += "conv_init dt_min dt_max dt_init_floor rescale_prenorm_residual residual_in_fp32"
    eps, limit = "norm_eps", "dt_limit"

    def read(self, c: Fields) -> dict[str, Any]:
        c.only(rmsnorm=True, norm_before_gate=False, D_has_hdim=False)
        return super().read(c)

    def write(self, m: ModelConfig) -> dict[str, Any]:
        return super().write(m) | {"norm_before_gate": False}


def whole(expand: float) -> int:
    """What theirs has as a whole number."""
    if expand != round(expand):
        raise SeqmixError(f"expand is {expand:g}, and theirs is a whole number")
    return round(expand)


def convolution(mixer: Any, at: str) -> Layout:
    """A short convolution of one tensor: theirs has a dimension of size 1 more."""
    weight, bias = mixer.convolution.weight, mixer.convolution.bias
    channels, width = weight.shape
    layout: Layout = {} if bias is None else {"mixer.convolution.bias": f"{at}.bias"}
    return layout | {"mixer.convolution.weight": part(f"{at}.weight", channels, 1, width, pattern="c 1 w -> c w")}
