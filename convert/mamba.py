"""Mamba and Mamba-2 of transformers, Mamba-2 of fla: one mixer per layer, no network."""

import math
from typing import Any

from ..blocks import Block
from .architecture import Architecture, Layout
from .fields import Table, Values, only, same, width
from .layout import part
from .llama import BASE

STEPS = "time_step_rank time_step_min time_step_max time_step_floor residual_in_fp32 rescale_prenorm_residual "
"""How training starts, and the dtype of the residual stream."""
SHARED = BASE | Table(
    {"ffn": None},
    {
        "state_size": "mixer.d_state",
        "conv_kernel": same("mixer.short_conv", default=4),
        "use_bias": only(False),
        "use_conv_bias": only(True),
        "hidden_act": only("silu"),
    },
)


def whole(expand: float, _: Values) -> Any:
    """What theirs has as a whole number; else the number, which theirs refuses."""
    return round(expand) if expand == round(expand) else expand


class Mamba(Architecture):
    """Mamba (S6)."""

    name = "mamba"
    model_type = "mamba"
    class_name = "MambaForCausalLM"
    common = SHARED | Table(
        {"mixer.kind": "mamba"},
        {
            "layer_norm_epsilon": same("norm.eps", default=1e-5),
            "tie_word_embeddings": same("tie_embeddings", default=True),
            "intermediate_size": width(
                "mixer.expand", lambda theirs: int(theirs.get("expand", 2) * theirs["hidden_size"])
            ),
            "time_step_rank": same(
                "mixer.dt_rank",
                default="auto",
                read=lambda rank, theirs: math.ceil(theirs["hidden_size"] / 16) if rank == "auto" else rank,
                write=lambda rank, ours: rank or math.ceil(ours["d_model"] / 16),
            ),
        },
    )
    harmless = STEPS + "expand time_step_init_scheme time_step_scale use_mambapy use_associative_scan"
    embedding = "backbone.embeddings.weight"
    norm = "backbone.norm_f.weight"
    layers = "backbone.layers"
    copied = "D in_proj.weight x_proj.weight dt_proj.weight dt_proj.bias out_proj.weight"

    def block(self, block: Block) -> Layout:
        mixer: Any = block.mixer
        own: Layout = {f"mixer.{name}": f"mixer.{name}" for name in self.copied.split()}
        return own | {"mixer_norm.weight": "norm.weight"} | convolution(mixer, "mixer.conv1d") | self.further(mixer)

    def further(self, mixer: Any) -> Layout:
        """Tensors of the mixer that have another name or layout."""
        return {"mixer.A_log": part("mixer.A_log", *mixer.A_log.shape[::-1], pattern="c n -> n c")}


LIMIT = same(
    "mixer.time_step_limit",
    default=(0.0, math.inf),
    read=lambda limit, _: None if tuple(limit) == (0.0, math.inf) else tuple(limit),
    write=lambda limit, _: [math.inf if bound is None else bound for bound in limit or (0.0, None)],
)
SSD = SHARED | Table(
    {"mixer.kind": "mamba2"},
    {
        "expand": same("mixer.expand", default=2, write=whole),
        "head_dim": same("mixer.head_dim", default=64),
        "num_heads": same(
            "mixer.expand",
            read=lambda heads, theirs: heads * theirs.get("head_dim", 64) / theirs["hidden_size"],
            write=lambda expand, ours: round(expand * ours["d_model"]) // ours["mixer.head_dim"],
        ),
        "n_groups": "mixer.n_groups",
    },
)
EPS = same("norm.eps", "mixer.norm_eps", default=1e-5)


class Mamba2(Mamba):
    """Mamba-2 (SSD)."""

    name = "mamba2"
    model_type = "mamba2"
    class_name = "Mamba2ForCausalLM"
    common = SSD | Table({}, {"layer_norm_epsilon": EPS, "time_step_limit": LIMIT})
    harmless = STEPS + "chunk_size rms_norm norm_before_gate"  # the last two are read by no version
    copied = "D in_proj.weight out_proj.weight"

    def further(self, mixer: Any) -> Layout:
        names = {"decay.A_log": "A_log", "decay.dt_bias": "dt_bias", "norm_weight": "norm.weight"}
        return {f"mixer.{ours}": f"mixer.{theirs}" for ours, theirs in names.items()}


class FlaMamba2(Mamba2):
    """Mamba-2 as fla writes it: the same tensors under other fields."""

    name = "fla-mamba2"
    library = "fla"
    marker = "dt_limit"
    common = SSD | Table(
        {},
        {
            "norm_eps": EPS,
            "dt_limit": LIMIT,
            "rmsnorm": only(True),
            "norm_before_gate": only(False),
            "D_has_hdim": only(False),
        },
    )
    harmless = "chunk_size fuse_norm fuse_cross_entropy fuse_linear_cross_entropy use_l2warp A_init_range conv_init "
    harmless += "dt_min dt_max dt_init_floor rescale_prenorm_residual residual_in_fp32"


def convolution(mixer: Any, at: str) -> Layout:
    """A short convolution of one tensor: theirs has a dimension of size 1 more."""
    weight = mixer.convolution.weight
    bias = mixer.convolution.bias
    layout: Layout = {} if bias is None else {"mixer.convolution.bias": f"{at}.bias"}
    shape = (weight.shape[0], 1, weight.shape[1])
    return layout | {"mixer.convolution.weight": part(f"{at}.weight", *shape, pattern="c 1 w -> c w")}
