"""RetNet as its authors' package torchscale has it: a decoder's state dict as safetensors, its arguments as JSON."""

from typing import Any

import torch
from torch import Tensor

from ..blocks import Block
from ..models import LanguageModel, ModelConfig
from .architecture import Architecture, Fields, Layout
from .layout import part

ACTIVATIONS = {"gelu": "gelu", "swish": "silu", "silu": "silu", "relu": "relu"}


class TorchscaleRetNet(Architecture):
    """RetNet: RMS norms, retention without head weights, a gated network."""

    name, library, model_type, class_name = "torchscale-retnet", "torchscale", None, "RetNetDecoder"
    marker = "decoder_retention_heads"
    mixers = ("retention",)
    harmless = "dropout drop_path_rate activation_dropout subln max_target_positions chunkwise_recurrent "
    harmless += "recurrent_chunk_size checkpoint_activations fsdp ddp_rank decoder_normalize_before moe_top1_expert "
    harmless += "moe_expert_count moe_gating_use_fp32 moe_eval_capacity_token_fraction moe_second_expert_policy "
    harmless += "moe_normalize_gate_prob_before_dropping rel_pos_buckets max_rel_pos xpos_scale_base"
    embedding, norm, head, layers = "embed_tokens.weight", "layer_norm.weight", "output_projection.weight", "layers"
    unread = r"retnet_rel_pos\.(angle|decay)"

    def read(self, c: Fields) -> dict[str, Any]:
        c.only(moe_freq=0, use_xmoe=False, deepnorm=False, multiway=False, no_scale_embedding=True)
        c.only(layernorm_embedding=False, no_output_layer=False, xpos_rel_pos=False)
        d_model, eps = c.take("decoder_embed_dim", 768), c.take("layernorm_eps", 1e-6)
        if (activation := c.take("activation_fn", "gelu")) not in ACTIVATIONS:
            raise c.refusal("activation_fn", activation, ", ".join(ACTIVATIONS))
        norm = {"kind": "rmsnorm", "eps": eps}
        mixer = {
            "kind": "retention",
            "n_heads": c.take("decoder_retention_heads"),
            "expand_v": c.take("decoder_value_embed_dim", 1280) / d_model,
            "head_norm": "rms",
            "norm_eps": eps,
        }
        width = c.take("decoder_ffn_embed_dim", 1280)
        ffn = {"kind": "swiglu", "expansion": width / d_model, "activation": ACTIVATIONS[activation]}
        return {
            "d_model": d_model,
            "n_layers": c.take("decoder_layers", 12),
            "vocab_size": c.take("vocab_size"),
            "tie_embeddings": c.take("share_decoder_input_output_embed", False),
            "blocks": {"retention": {"mixer": mixer, "ffn": ffn, "norm": norm}},
            "norm": norm,
        }

    def write(self, m: ModelConfig) -> dict[str, Any]:
        block = m.blocks[m.layers[0]]
        mixer: Any = block.mixer
        ffn: Any = block.ffn
        return {
            "decoder_embed_dim": m.d_model,
            "decoder_layers": m.n_layers,
            "vocab_size": m.vocab_size,
            "share_decoder_input_output_embed": m.tie_embeddings,
            "decoder_retention_heads": mixer.n_heads,
            "decoder_value_embed_dim": round(mixer.expand_v * m.d_model),
            "decoder_ffn_embed_dim": ffn.hidden_width(m.d_model),
            "activation_fn": "swish" if ffn.activation == "silu" else ffn.activation,
            "layernorm_eps": m.norm.eps,
        }

    def block(self, block: Block) -> Layout:
        mixer: Any = block.mixer
        d_model = mixer.in_proj.in_features
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "gate": "g_proj"}
        projections = (part(f"retention.{names[each]}.weight", w, d_model) for each, w in mixer.widths.items())
        return {
            "mixer.in_proj.weight": tuple(projections),
            "mixer.out_proj.weight": "retention.out_proj.weight",
            "mixer_norm.weight": "retention_layer_norm.weight",
            "ffn_norm.weight": "final_layer_norm.weight",
            "ffn.gate_proj.weight": "ffn.fc1.weight",
            "ffn.up_proj.weight": "ffn.gate.weight",
            "ffn.down_proj.weight": "ffn.fc2.weight",
        }

    def derived(self, model: LanguageModel) -> dict[str, Tensor]:
        mixer: Any = model.blocks[0].mixer
        angle = (1 / 10000 ** torch.linspace(0, 1, mixer.key_dim // 2)).repeat_interleave(2)
        decay = (1 - 2 ** (-5 - torch.arange(mixer.n_heads, dtype=torch.float))).log()
        return {"retnet_rel_pos.angle": angle, "retnet_rel_pos.decay": decay}
