"""Value residuals and value embeddings match their explicit formula in every use of a model."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from nightly import NIGHTLY
from torch.testing import assert_close

from seqmix import ContractError, ModelConfig, Paradigm, Sampling, SeqmixError, account, build_model, load_config
from seqmix.mixers import LayerCall
from seqmix.mixers.base.roles import Role, roles_of
from seqmix.models import Speculation, compile_blocks, generate_tokens
from seqmix.models.decoding import Decoder
from seqmix.testing.counting import count_flops

D, VOCABULARY = 16, 31
MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"kind": "attention", "n_heads": 4, "n_kv_heads": 2, "value_residual": True},
    "retention": {"kind": "retention", "n_heads": 2, "chunk_size": 4, "short_conv": 3, "value_residual": True},
    "delta_product": {"kind": "delta_product", "n_heads": 2, "chunk_size": 4, "value_residual": True},
    "mlstm": {"kind": "mlstm", "n_heads": 2, "chunk_size": 4, "value_residual": True},
    "rwkv7": {"kind": "rwkv7", "n_heads": 2, "rank": 3, "chunk_size": 4},
}
every_mixer = pytest.mark.parametrize("names", [[name] for name in MIXERS] + [["attention", "retention"]], ids="-".join)
EMBEDDINGS = {"every": 2, "scale": 3.0, "gate_channels": 5}


def config_of(*names: str, embeddings: dict[str, Any] | None = None, shared: bool = False, **fields) -> ModelConfig:
    norm = {"kind": "rmsnorm"}
    blocks = {name: {"mixer": MIXERS[name] | fields, "ffn": None, "norm": norm, "shared": shared} for name in names}
    model = {"d_model": D, "n_layers": 4, "vocab_size": VOCABULARY, "blocks": blocks, "pattern": names, "norm": norm}
    return ModelConfig.model_validate(model | {"value_embeddings": embeddings})


def build(*names: str, spread: float = 0.3, **options):
    """A float64 model; `spread` moves its parameters away from their initial values."""
    model = build_model(config_of(*names, **options), dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def tokens(length: int = 9, rows: int = 2) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))


def gradients(model):
    model.zero_grad()
    model(tokens(), targets=tokens().roll(-1, 1)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def attend(mixer, x, first, token):
    """Attention with values from outside, written out: the output and the layer's own values."""
    q, k, own = mixer.in_proj(x).split(list(mixer.widths.values()), dim=-1)
    v = own
    if first is not None:
        v = mixer.first_mix.weight[0] * first + mixer.first_mix.weight[1] * own
    if token is not None:
        gate = 3.0 / (1 + (-x[..., :5] @ mixer.token_gate.weight.T).exp())
        v = v + gate.repeat_interleave(mixer.head_dim, dim=-1) * token
    q, k, v = (y.unflatten(-1, (-1, mixer.head_dim)) for y in (q, k, v))
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 10000 ** -(torch.arange(0, 4, 2, dtype=x.dtype) / 4)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    q, k = (
        torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
        for y in (q, k)
    )
    k, v = (y.repeat_interleave(2, dim=2) for y in (k, v))
    scores = torch.einsum("bnhk,bmhk->bhnm", q, k) / 2
    weights = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf).softmax(-1)
    return mixer.out_proj(torch.einsum("bhnm,bmhv->bnhv", weights, v).flatten(2)), own


def test_attention_with_value_residual_and_embeddings_matches_formula():
    model = build("attention", embeddings=EMBEDDINGS)
    hidden, first = model.embedding.weight[tokens()], None
    for layer, block in enumerate(model.blocks):
        table = model.value_embeddings[str(layer)].weight[tokens()] if layer in (1, 3) else None
        y, own = attend(block.mixer, block.mixer_norm(hidden), first, table)
        first = own if first is None else first
        hidden = hidden + y
    assert_close(model(tokens()).logits, model.norm(hidden) @ model.head.weight.T, rtol=1e-9, atol=1e-9)
    assert [block.mixer.takes_first_values for block in model.blocks] == [False, True, True, True]
    assert [block.mixer.takes_token_values for block in model.blocks] == [False, True, False, True]


def test_first_layer_of_each_mixer_kind_takes_no_first_values():
    model = build("attention", "retention")
    assert [block.mixer.takes_first_values for block in model.blocks] == [False, False, True, True]
    widths = [block.mixer.value_width for block in model.blocks]
    assert widths == [8, 32, 8, 32]
    model(tokens())


@every_mixer
def test_zero_scaled_value_embeddings_change_nothing(names):
    plain = build(*names, spread=0)
    model = build(*names, spread=0, embeddings={"scale": 0.0})
    named = dict(model.named_parameters())
    assert all(torch.equal(named[name], parameter) for name, parameter in plain.named_parameters())
    assert torch.equal(model(tokens()).logits, plain(tokens()).logits)
    assert not torch.equal(build(*names, spread=0, embeddings={}).eval()(tokens()).logits, plain(tokens()).logits)


@every_mixer
def test_stepwise_and_packed_passes_match_whole_passes(names):
    model = build(*names, embeddings=EMBEDDINGS)
    whole = model(tokens()).logits
    output = model(tokens()[:, :4], return_state=True)
    logits = [output.logits]
    for i in range(4, 9):
        paradigms = model.prefer(Paradigm.RECURRENT, from_state=True)
        output = model(tokens()[:, i : i + 1], output.state, paradigm=paradigms, return_state=True)
        logits.append(output.logits)
    assert_close(torch.cat(logits, 1), whole, rtol=1e-9, atol=1e-9)
    x = tokens(9, 1)
    packed = model(x, cu_seqlens=torch.tensor([0, 4, 4, 9])).logits
    alone = torch.cat((model(x[:, :4]).logits, model(x[:, 4:]).logits), dim=1)
    assert_close(packed, alone, rtol=1e-9, atol=1e-9)


@every_mixer
def test_rollback_restores_earlier_state(names):
    model = build(*names, embeddings=EMBEDDINGS)
    x = model.embed(tokens())
    x, *tables = x.split([D, *(table.embedding_dim for table in model.value_embeddings.values())], -1)
    mixer = model.blocks[-1].mixer
    values = {"token_values": tables[-1], "first_values": tables[-1].cos()}

    def state_after(start, end, state=None):
        segment = {name: each[:, start:end] for name, each in values.items()}
        return mixer(x[:, start:end], call=LayerCall(state, return_state=True, **segment)).state

    before = state_after(0, 3)
    segment = {name: each[:, 3:] for name, each in values.items()}
    after = state_after(3, 9, before)
    one = mixer.rollback(x[:, 3:], before, after, 4, **segment)
    after = state_after(3, 9, before)  # a cache that has gone back is not valid any more
    back = mixer.rollback(x[:, 3:], before, after, torch.tensor([2, 5]), **segment)
    for row, end, state in ((0, 7, back), (1, 4, back), (0, 5, one), (1, 5, one)):
        following = {name: each[:, :1] for name, each in values.items()}
        calls = (LayerCall(each, "recurrent", **following) for each in (state, state_after(0, end)))
        ours, theirs = (mixer(x[:, :1], call=call).y for call in calls)
        assert_close(ours[row], theirs[row], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("saved", [True, "matmuls"])
def test_checkpointing_keeps_gradients_bitwise_equal(saved):
    model = build("attention", "retention", embeddings=EMBEDDINGS)
    expected = gradients(model)
    assert all(gradient.any() for gradient in expected.values())
    model.activation_checkpointing = saved
    assert_close(gradients(model), expected, rtol=0, atol=0)


@every_mixer
def test_accounting_and_roles_cover_value_embeddings(names):
    with_them, plain = (build(*names, spread=0, embeddings=each) for each in (EMBEDDINGS, None))
    costs = [account(model.config, length=16) for model in (with_them, plain)]
    tables = sum(table.weight.numel() for table in with_them.value_embeddings.values())
    assert costs[0].parameters == sum(parameter.numel() for parameter in with_them.parameters())
    assert costs[0].embedding_parameters == costs[1].embedding_parameters + tables
    gates = [
        layer.mixer_parameters - other.mixer_parameters for layer, other in zip(*[c.layers for c in costs], strict=True)
    ]
    assert [bool(more) for more in gates] == [False, True, False, True]
    assert costs[0].flops_per_token == costs[1].flops_per_token + 2 * sum(gates)
    if names != ["mlstm"]:  # torch does not count the products of its normaliser
        counted = [count_flops(lambda m=model: m(tokens(16, 1))) for model in (with_them, plain)]
        assert (costs[0].flops_per_token - costs[1].flops_per_token) * 16 == counted[0] - counted[1]
    roles = {name: role.role for name, role in roles_of(with_them).items()}
    assert {roles[f"value_embeddings.{layer}.weight"] for layer in (1, 3)} == {Role.EMBEDDING}
    assert roles["blocks.3.mixer.token_gate.weight"] is Role.GATE
    assert roles.get("blocks.3.mixer.first_mix.weight", Role.VECTOR) is Role.VECTOR


def test_activation_estimate_matches_what_model_saves():
    config = config_of("attention", embeddings={"every": 1}, value_residual=False)
    cost = account(config, length=16, dtype=torch.float64)
    model = build_model(config, dtype=torch.float64)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    x = torch.randn(1, 16, D, dtype=torch.float64, requires_grad=True)
    values = [torch.randn(1, 16, 8, dtype=torch.float64, requires_grad=True) for _ in model.blocks]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        for block, token in zip(model.blocks, values, strict=True):
            x = block(x, LayerCall(token_values=token)).y
    assert sum(layer.activation_bytes for layer in cost.layers) == sum(storages.values())
    assert all(layer.input_bytes == 8 * 16 * (D + 8) for layer in cost.layers)


@pytest.mark.slow
def test_compiled_blocks_and_steps_match_eager_model():
    model = build("attention", "retention", embeddings=EMBEDDINGS)
    expected, gradient = model(tokens()).logits, gradients(model)
    with torch.no_grad():
        state = model(tokens()[:, :8], model.init_state(2, max_length=10), return_state=True).state
        assert_close(Decoder(model, state, compiled=True).step(tokens()[:, 8]), expected[:, 8])
    compile_blocks(model)
    assert_close(model(tokens()).logits, expected)
    assert_close(gradients(model), gradient)


def text_of(model, **options) -> torch.Tensor:
    prompts = [tokens(5, 1)[0], tokens(8, 1)[0]]
    sampling = Sampling(temperature=0)
    return torch.stack(list(generate_tokens(model, prompts, max_new_tokens=12, sampling=sampling, **options)), 1)


@every_mixer
def test_batched_and_speculative_generation_match_full_passes(names):
    model = build(*names, embeddings=EMBEDDINGS)
    text = text_of(model, vocab_size=VOCABULARY)
    for prompt, row in zip([tokens(5, 1)[0], tokens(8, 1)[0]], text, strict=True):
        whole = torch.cat((prompt, row))
        assert torch.equal(model(whole[None]).logits[0, len(prompt) - 1 : -1].argmax(-1), row)
    guessed = text_of(model, vocab_size=VOCABULARY, speculation=Speculation(block=3))
    assert torch.equal(guessed, text)


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs pip install transformers")
def test_transformers_wrapper_supports_padding_and_caching():
    from seqmix.interop.hf import SeqmixForCausalLM

    model = build("attention", "retention", embeddings=EMBEDDINGS)
    wrapped = SeqmixForCausalLM.wrap(model)
    x = tokens(8)
    padded = torch.cat((torch.zeros(2, 3, dtype=x.dtype), x), 1)
    mask = (torch.arange(11) >= 3).long().expand(2, -1)
    assert_close(wrapped(padded, attention_mask=mask).logits[:, 3:], model(x).logits)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(wrapped.generate(padded, **options), wrapped.generate(padded, use_cache=False, **options))
    with pytest.raises(SeqmixError, match="needs tokens, not their embeddings"):
        wrapped(inputs_embeds=torch.randn(1, 4, D, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("onnx") is None, reason="needs pip install 'seqmix[onnx]'")
@pytest.mark.parametrize("names", [["attention", "retention"], pytest.param(["rwkv7"], marks=NIGHTLY)], ids="-".join)
def test_onnx_export_matches_model_with_value_residual_and_embeddings(names):
    from onnx_models import check_segments, exported

    model = build(*names, spread=0, embeddings=EMBEDDINGS).float()
    check_segments(exported(model), model)


def test_shared_block_needs_value_embeddings_in_all_layers():
    model = build("attention", shared=True, embeddings={"every": 1})
    assert len(model.value_embeddings) == 4
    assert model.blocks[0] is model.blocks[3]
    gradients(model)
    assert all(table.weight.grad.any() for table in model.value_embeddings.values())
    with pytest.raises(ContractError, match=r"shared by layers with and without.*every = 1"):
        build("attention", shared=True, embeddings={"every": 2})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.blocks.mamba.mixer={kind: mamba}", "blocks.*layer.*mamba takes no values from outside"),
        ("model.value_embeddings.gate_channels=500", "gate_channels must be at most d_model = 128, got 500"),
    ],
)
def test_invalid_value_embedding_settings_raise(override, message):
    with pytest.raises(SeqmixError, match=message):
        build_model(load_config("mamba-tiny", ["model.value_embeddings={}", override]).model)


def test_unsupported_value_residual_layouts_raise():
    blocks = {
        str(n): {"mixer": MIXERS["attention"] | {"n_kv_heads": n}, "ffn": None, "norm": {"kind": "rmsnorm"}}
        for n in (1, 2)
    }
    config = config_of("attention").model_dump() | {"blocks": blocks, "pattern": ("1", "2")}
    with pytest.raises(ContractError, match="values of one width, got 4 in the first and 8 here"):
        build_model(ModelConfig.model_validate(config))
    mixers = "[{kind: attention, n_heads: 2, value_residual: true}, {kind: retention, n_heads: 2}]"
    with pytest.raises(SeqmixError, match="value_residual of attention needs a layer for the mixer alone"):
        load_config("parallel-hybrid-tiny", [f"model.blocks.both.mixer.mixers={mixers}"])
