"""Folders of other libraries' models of anyone's making: config.json and tokenizer.json with other values; links."""

import json
import random
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from abuse.tally import Case
from safetensors.torch import save_file

from seqmix.interop.convert import ARCHITECTURES, import_from
from seqmix.interop.convert.layout import to_theirs
from seqmix.models import build_model, train_bpe

BASE = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 300, "intermediate_size": 24}
LLAMA = BASE | {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rope_theta": 1e4,
    "hidden_act": "silu",
}
LLAMA |= {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": [2, 3]}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
LAYERS = {"layer_types": ["full_attention", "linear_attention"]}
DELTA = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
DELTA |= {"linear_conv_kernel_dim": 4}
FLA = BASE | {"num_heads": 2, "norm_eps": 1e-6, "hidden_act": "swish", "hidden_ratio": 4, "conv_size": 4}
SSD = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 300, "state_size": 4, "conv_kernel": 4, "expand": 2}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
WHOLE: dict[str, dict[str, Any]] = {
    "llama": LLAMA
    | {"attention_bias": False, "mlp_bias": False, "rope_parameters": LLAMA3, "max_position_embeddings": 64},
    "mistral": LLAMA | {"sliding_window": 8},
    "qwen2": LLAMA | {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
    "qwen3": LLAMA | {"attention_bias": False, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "fla-mamba2": SSD | {"head_dim": 8, "num_heads": 4, "n_groups": 1, "norm_eps": 1e-5, "dt_limit": [0.0, 1.0]},
    "mamba2": SSD
    | {"head_dim": 8, "num_heads": 4, "n_groups": 1, "layer_norm_epsilon": 1e-5, "time_step_limit": [0.0, 1.0]},
    "mamba": SSD | {"time_step_rank": 1, "layer_norm_epsilon": 1e-5, "intermediate_size": 32, "use_bias": False},
    "jamba": BASE
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0}
    | {"num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_dt_rank": 1, "mamba_d_conv": 4}
    | {"mamba_expand": 2},
    "fla-retnet": FLA | {"expand_k": 1.0, "expand_v": 2.0, "use_output_gate": True, "elementwise_affine": True},
    "gla": FLA | {"expand_k": 0.5, "expand_v": 1.0, "use_output_gate": True, "use_short_conv": True},
    "delta-net": FLA | {"expand_k": 1.0, "expand_v": 1.0, "use_gate": True, "allow_neg_eigval": False},
    "gated-deltanet": FLA | {"head_dim": 8, "expand_v": 2.0, "num_v_heads": 2, "use_gate": True},
    "kda": FLA | {"head_dim": 8, "expand_v": 1.0, "num_v_heads": 2, "allow_neg_eigval": True},
    "qwen3-next": LLAMA
    | LAYERS
    | DELTA
    | EXPERTS
    | {"shared_expert_intermediate_size": 8, "partial_rotary_factor": 0.5, "decoder_sparse_step": 1}
    | {"mlp_only_layers": [0], "full_attention_interval": 2},
    "minimax": LLAMA | LAYERS | {"num_local_experts": 2, "num_experts_per_tok": 1, "full_attn_alpha_factor": 1},
    "olmo-hybrid": LLAMA | LAYERS | DELTA | {"linear_allow_neg_eigval": True},
    "kimi-linear": {name: value for name, value in LLAMA.items() if name != "rope_theta"}
    | LAYERS
    | {"mlp_layer_types": ["dense", "sparse"], "linear_num_heads": 2, "linear_head_dim": 8, "q_lora_rank": 4}
    | {"linear_conv_kernel_dim": 4, "num_key_value_heads": 2, "kv_lora_rank": 4, "qk_nope_head_dim": 4}
    | {"qk_rope_head_dim": 2, "v_head_dim": 4, "num_experts": 2, "num_experts_per_token": 1}
    | {"moe_intermediate_size": 8, "num_shared_experts": 1, "routed_scaling_factor": 1.0},
    "recurrent-gemma": BASE
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "lru_width": 16, "conv1d_width": 4, "rms_norm_eps": 1e-6}
    | {"block_types": ["recurrent", "attention"], "attention_window_size": 8, "partial_rotary_factor": 0.5}
    | {"logits_soft_cap": 30.0, "rope_theta": 1e4, "attention_bias": False},
    "rwkv4": {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 300, "attention_hidden_size": 16}
    | {"intermediate_size": 64, "layer_norm_epsilon": 1e-5},
    "rwkv7": {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 300, "head_dim": 8, "intermediate_size": 64}
    | {"hidden_ratio": 4.0, "norm_eps": 1e-5, "decay_low_rank_dim": 4, "a_low_rank_dim": 4, "v_low_rank_dim": 4}
    | {"gate_low_rank_dim": 4, "fuse_norm": True, "value_dim": [16, 16], "hidden_act": "sqrelu"},
    "torchscale-retnet": {"decoder_embed_dim": 16, "decoder_layers": 2, "vocab_size": 300, "decoder_retention_heads": 2}
    | {"decoder_value_embed_dim": 32, "decoder_ffn_embed_dim": 32, "activation_fn": "gelu", "layernorm_eps": 1e-6},
}
"""A configuration of each architecture, with most of the fields that are read."""
DEEP: Any = 1
for _ in range(300):
    DEEP = [DEEP]
VALUES = ("x", {}, [], None, -1, 0, 2**63, 1e308, True, 0.5, 10**400, 2**31, ["x"], [None], {"x": "x"}, DEEP)
"""One of each class of values that no field, or not every field, can have."""
TREES = (
    [],
    None,
    {},
    ["x"],
    "x",
    5,
    {"added_tokens": 5},
    {"added_tokens": None},
    {"added_tokens": [5]},
    {"model": DEEP},
)
TREES += (
    {"added_tokens": {"a": 1}},
    {"added_tokens": [{"id": {}, "content": "a"}]},
    {"added_tokens": [{}]},
    {"model": 5},
)


def whole(name: str) -> dict[str, Any]:
    """The fields of config.json of an architecture."""
    fields = dict(WHOLE[name])
    kind = ARCHITECTURES[name].model_type
    return fields if kind is None else fields | {"model_type": kind}


def keys(name: str) -> list[str]:
    """All fields that its converter reads by a table, and those of the whole configuration."""
    architecture = ARCHITECTURES[name]
    tables = [architecture.common, *(table for tables in architecture.kinds.values() for table in tables.values())]
    return sorted({*whole(name), *architecture.kinds, *(field for table in tables for field in table.theirs)})


def changed(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The configuration with each value in the place of each field, and of each field of its rotation."""
    base = whole(name)
    for key in keys(name):
        for value in VALUES:
            yield f"{key} = {value!r:.20}", base | {key: value}
        for inner in base[key] if isinstance(base.get(key), dict) else ():
            for value in VALUES:
                yield f"{key}.{inner} = {value!r:.20}", base | {key: base[key] | {inner: value}}


def make(folder: Path, name: str) -> None:
    """A folder of an architecture, once, with random weights of a small model, and a tokenizer."""
    if folder.exists():
        return
    folder.mkdir()
    architecture = ARCHITECTURES[name]
    model = build_model(architecture.config(whole(name), "here"))
    save_file(to_theirs(architecture.rules(model), model.state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(whole(name)))
    train_bpe([("a", b"the text of a small run")], 290, folder / "tokenizer.json")


def folders(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Every field of every architecture with every class of values, documents that are none, tokenizers, links."""
    number = count()
    for name in ARCHITECTURES:
        own = folder / name
        yield Case(f"{name} whole", partial(_convert, own, folder / f"{next(number)}", whole(name)), refused=False)
        for what, fields in changed(name):
            yield Case(f"{name} {what}", partial(_convert, own, folder / f"{next(number)}", fields), refused=False)
    own = folder / "llama"
    for text in (b"[" * 10**5, b'{"a":' * 10**5, b"", b"null", b"[]", b"\xff", b'"x"', b"5", b"NaN"):
        yield Case(f"config.json {text[:12]!r}", partial(_convert, own, folder / f"{next(number)}", text))
    for tree in TREES:
        yield Case(f"tokenizer {tree!r:.40}", partial(_tokenizer, own, folder / f"{next(number)}", tree))
    for target in ("config.json", "model.safetensors", "nowhere", "/dev/zero", "/etc/passwd", "."):
        yield Case(f"tokenizer linked to {target}", partial(_tokenizer, own, folder / f"{next(number)}", Path(target)))
        yield Case(f"config linked to {target}", partial(_link, own, Path(target)), refused=target != "config.json")


def _convert(own: Path, out: Path, fields: dict[str, Any] | bytes) -> None:
    """Convert it, all of it if what it says of itself fits its tensors."""
    make(own, own.name)
    (own / "config.json").write_bytes(fields if isinstance(fields, bytes) else json.dumps(fields).encode())
    import_from(own, None)
    import_from(own, out)


def _tokenizer(own: Path, out: Path, content: Any) -> None:
    """Convert a folder with this tokenizer.json, or with a link in its place."""
    make(own, "llama")
    (own / "config.json").write_text(json.dumps(whole("llama")))
    file = own / "tokenizer.json"
    file.unlink(missing_ok=True)
    if isinstance(content, Path):
        file.symlink_to(content)
    else:
        file.write_text(json.dumps(content))
    import_from(own, out)


def _link(own: Path, target: Path) -> None:
    """Read a folder whose config.json is a link."""
    make(own, "llama")
    file, content = own / "config.json", json.dumps(whole("llama"))
    (own / "linked").mkdir(exist_ok=True)
    link = own / "linked" / "config.json"
    link.unlink(missing_ok=True)
    file.write_text(content)
    link.symlink_to(Path("..") / target if not target.is_absolute() else target)
    import_from(own / "linked", None)
