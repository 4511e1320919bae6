"""Conversion without the other library: unsupported fields are rejected by name, and a converted model generates."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from seqmix import SeqmixError, generate_text
from seqmix.cli.app import import_command
from seqmix.interop.convert import ARCHITECTURES, export_to, import_from
from seqmix.interop.convert.layout import Rule, part, plan, to_ours, to_theirs
from seqmix.models import ModelConfig, build_model, train_bpe
from seqmix.training import load_run

FIELDS = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 300, "rms_norm_eps": 1e-6}
FIELDS |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "eos_token_id": 7}


def test_qwen3_next_layers_can_be_given_by_an_interval():
    sizes = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    fields = {"model_type": "qwen3_next", "head_dim": 8, "full_attention_interval": 2, "num_experts": 0}
    config = ARCHITECTURES["qwen3-next"].config(FIELDS | fields | {f"linear_{name}": 4 for name in sizes}, "here")
    kinds = [config.blocks[name].mixer.kind for name in config.layers]
    assert kinds == ["gated_delta_net", "attention"]
    assert config.blocks[config.layers[1]].mixer.partial_rotary_factor == 0.25


@pytest.mark.parametrize(
    "fields",
    [{"rope_theta": 500}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 1.0}],
)
def test_rope_base_is_read_from_old_and_new_fields(fields):
    llama = ARCHITECTURES["llama"]
    config = llama.config(FIELDS | fields, "here")
    assert config.blocks["layer"].mixer.rope_base == 500
    written = llama.fields(config)
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 500


@pytest.fixture
def theirs(tmp_path):
    """A folder as transformers writes it."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    llama = ARCHITECTURES["llama"]
    model = build_model(llama.config(FIELDS, "here"))
    save_file(to_theirs(llama.rules(model), model.state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(FIELDS))
    train_bpe([("a text", b"def f(x): return x\n" * 50)], 290, folder / "tokenizer.json")
    return folder


def change(folder, **fields):
    (folder / "config.json").write_text(json.dumps({**FIELDS, **fields}))


def test_converted_model_generates_and_exports_back(theirs, tmp_path):
    tokenizer = json.loads((theirs / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [{"id": 7, "content": "(", "special": True} | dict.fromkeys(FLAGS, False)]
    (theirs / "tokenizer.json").write_text(json.dumps(tokenizer))
    import_from(theirs, tmp_path / "ours")
    model = load_run(tmp_path / "ours")
    assert model.tokenizer.begin == 7
    assert generate_text(model, ["def "], max_new_tokens=4)
    export_to(tmp_path / "ours", tmp_path / "back", "llama", on_note=print)
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", theirs))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (theirs / "tokenizer.json").read_bytes()


def test_sharded_weights_and_duplicate_tied_weights_are_accepted(theirs, tmp_path):
    change(theirs, tie_word_embeddings=True)
    weights = load_file(theirs / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    (theirs / "model.safetensors").unlink()
    for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
        save_file({name: weights[name] for name in names}, theirs / f"model-{number}.safetensors")
    import_from(theirs, tmp_path / "ours")
    model = load_run(tmp_path / "ours")
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.embedding.weight, weights["lm_head.weight"])


FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "lama"}, 'unknown model_type .lama.; did you mean "llama".*Supported architectures: llama'),
        ({"attention_bias": True}, r"lacks the tensor model.layers.0.self_attn.q_proj.bias"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_parameters must be .*default, linear or llama3.*yarn"),
        ({"rope_scaling": {"type": "linear", "beta": 2}}, "rope_parameters must be .*fields of that type.*beta"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'.* to have a counterpart in seqmix, got 'gelu'"),
        ({"clip_qkv": 8}, "unknown field, clip_qkv = 8"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
        ({"intermediate_size": 32}, r"mlp.gate_proj.weight must have shape \[32, 16\] according to config.json, got"),
        ({"num_hidden_layers": 1}, r"a tensor without a counterpart in seqmix: model.layers.1"),
        ({"num_hidden_layers": 3}, r"lacks the tensor model.layers.2"),
        ({"tie_word_embeddings": True}, "a tensor without a counterpart in seqmix: lm_head.weight"),
    ],
)
def test_unsupported_fields_are_rejected_by_name(theirs, tmp_path, fields, words):
    change(theirs, **fields)
    with pytest.raises(SeqmixError, match=words) as found:
        import_from(theirs, tmp_path / "ours")
    assert "\n" not in str(found.value)
    assert not (tmp_path / "ours").exists()


def test_pickled_or_missing_weights_are_rejected(theirs, tmp_path):
    (theirs / "model.safetensors").rename(theirs / "pytorch_model.bin")
    with pytest.raises(SeqmixError, match=r"is a pickle, which may run any code.*save_file"):
        import_from(theirs, tmp_path / "ours")
    with pytest.raises(SeqmixError, match="does not exist"):
        import_from(tmp_path / "nowhere", tmp_path / "ours")
    (theirs / "pytorch_model.bin").unlink()
    with pytest.raises(SeqmixError, match=r"has no .*safetensors"):
        import_from(theirs, tmp_path / "ours")
    (theirs / "tokenizer.json").unlink()
    with pytest.raises(SeqmixError, match="--tokenizer bytes if its tokens are bytes"):
        import_from(theirs, tmp_path / "ours")


ATTENTION = {"kind": "attention", "n_heads": 4}
FFN, NORM = {"kind": "swiglu", "expansion": 2.0, "multiple_of": 5}, {"kind": "rmsnorm"}


def test_vocabulary_smaller_than_bytes_needs_a_tokenizer(theirs, tmp_path):
    change(theirs, vocab_size=100)
    weights = load_file(theirs / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[name] = weights[name][:100].clone()
    save_file(weights, theirs / "model.safetensors")
    with pytest.raises(SeqmixError, match="cannot be a run: text as bytes has 257 tokens"):
        import_from(theirs, tmp_path / "ours", "bytes")


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"mixer": ATTENTION | {"softcap": 2.0}}, "llama cannot represent .*mixer.softcap = 2.0: .* gives null"),
        ({"mixer": {"kind": "retention", "n_heads": 2}}, "llama models consist of attention layers, but .* retention"),
        ({"norm": {"kind": "layernorm"}}, "llama cannot represent .*norm.kind = 'layernorm': .* gives 'rmsnorm'"),
        ({"ffn": None}, "cannot be written as llama"),
        ({"parallel": True}, "llama cannot represent .*parallel = true: .* gives false"),
        ({"layer_scale": 0.1}, "llama cannot represent .*layer_scale = 0.1: .* gives null"),
        ({"norm_placement": "both"}, "llama cannot represent .*norm_placement = 'both': .* gives 'input'"),
        ({}, None),
    ],
)
def test_export_rejects_unsupported_block_fields_by_name(block, words):
    block = {"mixer": ATTENTION, "ffn": FFN, "norm": NORM} | block
    model = ModelConfig(d_model=16, n_layers=2, vocab_size=300, blocks={"a": block}, norm=NORM)
    if words is None:
        assert ARCHITECTURES["llama"].fields(model)["intermediate_size"] == 35
        return
    with pytest.raises(SeqmixError, match=words):
        ARCHITECTURES["llama"].fields(model)


def test_export_rejects_unsupported_residual_connections():
    block = {"mixer": ATTENTION, "ffn": FFN, "norm": NORM}
    model = ModelConfig(
        d_model=16, n_layers=2, vocab_size=300, blocks={"a": block}, norm=NORM, residual={"kind": "hyper"}
    )
    with pytest.raises(SeqmixError, match=r"llama cannot represent model.residual.kind = 'hyper': .* gives 'plain'"):
        ARCHITECTURES["llama"].fields(model)


def test_convert_command_prints_the_plan_and_writes_the_model(theirs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # xdist sets 80
    command = import_command("convert")
    command([str(theirs), "--dry-run"], standalone_mode=False)
    plan = capsys.readouterr().out
    assert "blocks.{0,1}.mixer.in_proj.weight" in plan
    assert "(h pair k) d -> (h k pair) d (pair = 2, k = 2)" in plan
    command([str(theirs), str(tmp_path / "ours")], standalone_mode=False)
    assert "has 17 tensors" in capsys.readouterr().out
    for arguments, words in (
        ([theirs], "needs an output: --out DIR"),
        ([tmp_path / "ours", "--out", tmp_path / "x"], "choose the architecture to write with --as"),
        ([tmp_path / "ours", "--out", tmp_path / "x", "--as", "lama"], 'did you mean "llama"'),
    ):
        with pytest.raises(SeqmixError, match=words):
            command([str(a) for a in arguments], standalone_mode=False)


def test_layout_rules_convert_in_both_directions():
    parts = part("fused", 4, 3, pattern="(h two) d -> two d h", index=1, two=2), part("b", 3, 2)
    rules = [
        Rule("x", (6, 2), parts),
        Rule("y", (3, 2), (part("fused", 4, 3, pattern="(h two) d -> two d h", index=0, two=2),)),
    ]
    theirs = {"fused": torch.arange(12).view(4, 3), "b": torch.arange(20, 26).view(3, 2)}
    ours = to_ours(rules, theirs, "here", "", {})
    assert ours["x"].tolist() == [[3, 9], [4, 10], [5, 11], [20, 21], [22, 23], [24, 25]]
    back = to_theirs(rules, ours)
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    assert plan(rules)[0] == ("x", "[6 2]", "fused [4 3]", "part 1 of 2: (h two) d -> two d h (two = 2), entry 1")
    experts = [Rule("blocks.0.w", (4, 1), tuple(part(f"layers.0.experts.{e}.w", 4, index=(3, 0, 1)) for e in range(2)))]
    assert plan(experts) == [("blocks.0.w", "[4 1]", "layers.N.experts.E.w [4]", "part 1 to 2 of 2: rows 3, 0-1")]
    repeated = [Rule("z", (4,), (part("g", 2, pattern="h -> (h n)", n=2),))]
    assert to_theirs(repeated, {"z": torch.tensor([5, 5, 6, 6])})["g"].tolist() == [5, 6]
    with pytest.raises(SeqmixError, match="z has different values for heads"):
        to_theirs(repeated, {"z": torch.tensor([5, 5, 6, 7])})
    with pytest.raises(AssertionError, match="leaves a part"):
        to_theirs(rules[:1], ours)


def test_fuse_norm_only_changes_tensor_names():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 300, "num_heads": 2, "head_dim": 8}
    plain = ARCHITECTURES["gated-deltanet"].config({**sizes, "fuse_norm": False}, "here")
    assert plain == ARCHITECTURES["gated-deltanet"].config({**sizes, "fuse_norm": True}, "here")
    gla = {name: x for name, x in sizes.items() if name != "head_dim"} | {"fuse_norm": False}
    assert ARCHITECTURES["gla"].config(gla, "here") == ARCHITECTURES["gla"].config({**gla, "fuse_norm": True}, "here")
    assert ARCHITECTURES["gla"].tensor_aliases(gla) == {".attn.g_norm.": ".attn.g_norm_swish_gate."}
    assert ARCHITECTURES["gla"].tensor_aliases({**gla, "use_output_gate": False}) == {}
