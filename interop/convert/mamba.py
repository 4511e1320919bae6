"""Mamba and Mamba-2 of transformers, and Mamba-2 of fla: one mixer per layer, no feed-forward network."""

import math
from typing import Any

from ...blocks import Block
from .architecture import Architecture, Layout
from .fields import Table, Values, only, same, width
from .layout import part
from .llama import BASE

STEPS = "time_step_rank time_step_min time_step_max time_step_floor residual_in_fp32 rescale_prenorm_residual "
"""Names of ignored fields, space-separated: those of initialisation, and of the residual stream's dtype."""
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


def integer_or_float(expand: float, _: Values) -> Any:
    """Return a number as an integer if it is whole; otherwise unchanged, which the library refuses."""
    return round(expand) if expand == round(expand) else expand


class Mamba(Architecture):
    """Mamba (S6) of transformers."""

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
    ignored_fields = STEPS + "expand time_step_init_scheme time_step_scale use_mambapy use_associative_scan"
    embedding = "backbone.embeddings.weight"
    norm = "backbone.norm_f.weight"
    layers = "backbone.layers"
    unchanged = "D in_proj.weight x_proj.weight dt_proj.weight dt_proj.bias out_proj.weight"
    """Tensors of the mixer with the same name and shape in seqmix."""

    def block(self, block: Block) -> Layout:
        mixer: Any = block.mixer
        layout: Layout = {f"mixer.{name}": f"mixer.{name}" for name in self.unchanged.split()}
        layout |= {"mixer_norm.weight": "norm.weight"} | convolution(mixer, "mixer.conv1d")
        return layout | self.extra_tensors(mixer)

    def extra_tensors(self, mixer: Any) -> Layout:
        """Return the layout of the mixer's tensors with another name or shape in seqmix."""
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
        "expand": same("mixer.expand", default=2, write=integer_or_float),
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
    """Mamba-2 (SSD) of transformers."""

    name = "mamba2"
    model_type = "mamba2"
    class_name = "Mamba2ForCausalLM"
    common = SSD | Table({}, {"layer_norm_epsilon": EPS, "time_step_limit": LIMIT})
    ignored_fields = STEPS + "chunk_size rms_norm norm_before_gate"  # transformers never reads the last two
    unchanged = "D in_proj.weight out_proj.weight"

    def extra_tensors(self, mixer: Any) -> Layout:
        names = {"decay.A_log": "A_log", "decay.dt_bias": "dt_bias", "norm_weight": "norm.weight"}
        return {f"mixer.{ours}": f"mixer.{theirs}" for ours, theirs in names.items()}


class FlaMamba2(Mamba2):
    """Mamba-2 as fla writes it: the same tensors, but other names of the fields."""

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
    ignored_fields = (
        "chunk_size fuse_norm fuse_cross_entropy fuse_linear_cross_entropy use_l2warp A_init_range conv_init "
    )
    ignored_fields += "dt_min dt_max dt_init_floor rescale_prenorm_residual residual_in_fp32"


def convolution(mixer: Any, prefix: str) -> Layout:
    """Return the layout of a short convolution in one tensor; the library's has an additional dimension of size 1."""
    weight = mixer.convolution.weight
    bias = mixer.convolution.bias
    layout: Layout = {} if bias is None else {"mixer.convolution.bias": f"{prefix}.bias"}
    shape = (weight.shape[0], 1, weight.shape[1])
    return layout | {"mixer.convolution.weight": part(f"{prefix}.weight", *shape, pattern="c 1 w -> c w")}
