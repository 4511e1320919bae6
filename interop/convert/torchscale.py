"""RetNet of its authors' package torchscale: a decoder's state dict as safetensors, and its arguments as JSON."""

from typing import Any

import torch
from torch import Tensor

from ...blocks import Block
from ...models import LanguageModel
from .architecture import Architecture, Layout
from .fields import Table, choice, only, same, width
from .layout import part
from .llama import norms, swiglu

ACTIVATIONS = {"gelu": "gelu", "swish": "silu", "silu": "silu", "relu": "relu"}
D_MODEL = "decoder_embed_dim"


class TorchscaleRetNet(Architecture):
    """RetNet: RMS norms, retention with head norms without weights, and a gated network."""

    name = "torchscale-retnet"
    library = "torchscale"
    model_type = None
    class_name = "RetNetDecoder"
    marker = "decoder_retention_heads"
    common = Table(
        {"mixer.kind": "retention", "mixer.head_norm": "rms", "ffn.kind": "swiglu", "norm.kind": "rmsnorm"},
        {
            D_MODEL: same("d_model", default=768),
            "decoder_layers": same("n_layers", default=12),
            "vocab_size": "vocab_size",
            "share_decoder_input_output_embed": same("tie_embeddings", default=False),
            "decoder_retention_heads": "mixer.n_heads",
            "decoder_value_embed_dim": width("mixer.expand_v", default=1280, over=D_MODEL),
            "decoder_ffn_embed_dim": width("ffn.expansion", default=1280, over=D_MODEL),
            "activation_fn": choice("ffn.activation", ACTIVATIONS, default="gelu"),
            "layernorm_eps": same("norm.eps", "mixer.norm_eps", default=1e-6),
            **{name: only(False) for name in ("use_xmoe", "deepnorm", "multiway", "layernorm_embedding")},
            "no_output_layer": only(False),
            "xpos_rel_pos": only(False),
            "moe_freq": only(0),
            "no_scale_embedding": only(True),
        },
    )
    ignored_fields = "dropout drop_path_rate activation_dropout subln max_target_positions chunkwise_recurrent "
    ignored_fields += (
        "recurrent_chunk_size checkpoint_activations fsdp ddp_rank decoder_normalize_before moe_top1_expert "
    )
    ignored_fields += "moe_expert_count moe_gating_use_fp32 moe_eval_capacity_token_fraction moe_second_expert_policy "
    ignored_fields += "moe_normalize_gate_prob_before_dropping rel_pos_buckets max_rel_pos xpos_scale_base"
    embedding = "embed_tokens.weight"
    norm = "layer_norm.weight"
    head = "output_projection.weight"
    layers = "layers"
    ignored_tensors = r"retnet_rel_pos\.(angle|decay)"

    def block(self, block: Block) -> Layout:
        mixer: Any = block.mixer
        d_model = mixer.in_proj.in_features
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "gate": "g_proj"}
        projections = (part(f"retention.{names[name]}.weight", rows, d_model) for name, rows in mixer.widths.items())
        return {
            "mixer.in_proj.weight": tuple(projections),
            "mixer.out_proj.weight": "retention.out_proj.weight",
            **norms("retention_layer_norm", "final_layer_norm"),
            **swiglu("ffn", names=("fc1", "gate", "fc2")),
        }

    def computed_tensors(self, model: LanguageModel) -> dict[str, Tensor]:
        mixer: Any = model.blocks[0].mixer
        angle = (1 / 10000 ** torch.linspace(0, 1, mixer.key_dim // 2)).repeat_interleave(2)
        decay = (1 - 2 ** (-5 - torch.arange(mixer.n_heads, dtype=torch.float))).log()
        return {"retnet_rel_pos.angle": angle, "retnet_rel_pos.decay": decay}
