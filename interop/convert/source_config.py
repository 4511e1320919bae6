"""Types and ranges of the fields of another library's config.json, which may come from anyone.

Converters compute with validated values only. A field has the same type in all architectures that read it. Fields of
`fields.only` and `fields.choice` need no type, because they are compared with a few allowed values.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from ...registry import Config, validated

Width = Annotated[int, Field(ge=1, le=2**20)]
Long = Annotated[int, Field(ge=1, le=2**31)]
Heads = Annotated[int, Field(ge=1, le=2**16)]
Layers = Annotated[int, Field(ge=1, le=10_000)]
Count = Annotated[int, Field(ge=0, le=2**16)]
Kernel = Annotated[int, Field(ge=1, le=2**10)]
Ratio = Annotated[float, Field(gt=0, le=2**20)]
Number = Annotated[float, Field(ge=-(2.0**64), le=2.0**64)]
Bound = Annotated[float, Field(allow_inf_nan=True)]
Bounds = tuple[Bound, Bound] | None
Tokens = int | tuple[int, ...]


class Theirs(Config):
    """Fields of config.json; any of them may be missing."""

    # the model
    hidden_size: Width | None = None
    decoder_embed_dim: Width | None = None
    num_hidden_layers: Layers | None = None
    decoder_layers: Layers | None = None
    vocab_size: Long | None = None
    max_position_embeddings: Long | None = None
    tie_word_embeddings: bool | None = None
    share_decoder_input_output_embed: bool | None = None
    logits_soft_cap: Number | None = None
    bos_token_id: Tokens | None = None
    eos_token_id: Tokens | None = None
    # its layers
    layer_types: tuple[str, ...] | None = None
    mlp_layer_types: tuple[str, ...] | None = None
    block_types: tuple[str, ...] | None = None
    mlp_only_layers: tuple[int, ...] | None = None
    full_attention_interval: Long | None = None
    decoder_sparse_step: Long | None = None
    attn_layer_period: Long | None = None
    attn_layer_offset: Count | None = None
    expert_layer_period: Long | None = None
    expert_layer_offset: Count | None = None
    # norms
    rms_norm_eps: Number | None = None
    norm_eps: Number | None = None
    layer_norm_epsilon: Number | None = None
    layernorm_eps: Number | None = None
    elementwise_affine: bool | None = None
    fuse_norm: bool | None = None
    # heads
    num_attention_heads: Heads | None = None
    num_key_value_heads: Heads | None = None
    num_heads: Heads | None = None
    num_v_heads: Heads | None = None
    decoder_retention_heads: Heads | None = None
    linear_num_heads: Heads | None = None
    linear_num_key_heads: Heads | None = None
    linear_num_value_heads: Heads | None = None
    head_dim: Width | None = None
    v_head_dim: Width | None = None
    qk_nope_head_dim: Width | None = None
    qk_rope_head_dim: Width | None = None
    linear_head_dim: Width | None = None
    linear_key_head_dim: Width | None = None
    linear_value_head_dim: Width | None = None
    # attention
    rope_theta: Number | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: Number | None = None
    sliding_window: Long | None = None
    attention_window_size: Long | None = None
    # other mixers
    attention_hidden_size: Width | None = None
    decoder_value_embed_dim: Width | None = None
    lru_width: Width | None = None
    state_size: Width | None = None
    mamba_d_state: Width | None = None
    mamba_d_conv: Kernel | None = None
    mamba_expand: Ratio | None = None
    mamba_dt_rank: Width | Literal["auto"] | None = None
    n_groups: Heads | None = None
    expand: Ratio | None = None
    expand_k: Ratio | None = None
    expand_v: Ratio | None = None
    value_dim: Width | tuple[Width | None, ...] | None = None
    use_gate: bool | None = None
    use_output_gate: bool | None = None
    use_short_conv: bool | None = None
    conv_size: Kernel | None = None
    conv_kernel: Kernel | None = None
    conv1d_width: Kernel | None = None
    linear_conv_kernel_dim: Kernel | None = None
    time_step_rank: Width | Literal["auto"] | None = None
    time_step_limit: Bounds = None
    dt_limit: Bounds = None
    q_lora_rank: Width | None = None
    kv_lora_rank: Width | None = None
    a_low_rank_dim: Width | None = None
    decay_low_rank_dim: Width | None = None
    gate_low_rank_dim: Width | None = None
    v_low_rank_dim: Width | None = None
    allow_neg_eigval: bool | None = None
    linear_allow_neg_eigval: bool | None = None
    # networks
    intermediate_size: Long | None = None
    decoder_ffn_embed_dim: Long | None = None
    moe_intermediate_size: Long | None = None
    shared_expert_intermediate_size: Annotated[int, Field(ge=0, le=2**31)] | None = None
    hidden_ratio: Ratio | None = None
    mlp_bias: bool | None = None
    num_experts: Count | None = None
    num_local_experts: Count | None = None
    num_experts_per_tok: Count | None = None
    num_experts_per_token: Count | None = None
    num_shared_experts: Count | None = None
    routed_scaling_factor: Number | None = None


class Rotation(Config):
    """Fields of `rope_parameters`, or of `rope_scaling` before version 5 of transformers."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Number | None = None
    partial_rotary_factor: Number | None = None
    factor: Number | None = None
    low_freq_factor: Number | None = None
    high_freq_factor: Number | None = None
    original_max_position_embeddings: Long | None = None


def validate_types(values: Mapping[str, Any], where: object, types: type[Config] = Theirs) -> dict[str, Any]:
    """Return the fields unchanged after checking their types, without those that are null.

    Args:
        values: the fields.
        where: name of the file in messages.
        types: the types of the fields; fields that it does not have are not checked.

    Raises:
        SeqmixError: a field has the wrong type or is out of range; the message names the first ones.
    """
    present = {name: value for name, value in values.items() if value is not None}
    validated(types, {name: value for name, value in present.items() if name in types.model_fields}, str(where))
    return present
