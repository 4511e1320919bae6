"""Layers that read keys and values of an earlier layer match the explicit formula in every use of a model."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from seqmix import ContractError, ModelConfig, Paradigm, SeqmixError, build_model, generate_text
from seqmix.blocks.ffn.swiglu import SwigluConfig
from seqmix.interop.convert.conversion import architecture_of
from seqmix.lab.inspect.views import look
from seqmix.lab.linearize.plan import student_of
from seqmix.mixers import LayerCall
from seqmix.mixers.attention import AttentionConfig
from seqmix.mixers.base.roles import roles_of
from seqmix.mixers.base.state import detach, nbytes, select
from seqmix.mixers.parts import ReaderState
from seqmix.models import Decoder, Speculation, account, compile_blocks, generate_tokens, prefill
from seqmix.models.prompt_cache import cache_tokens
from seqmix.models.sampling import Sampling

ATTENTION = {"kind": "attention", "n_heads": 4, "n_kv_heads": 2, "chunk_size": 3}
BLOCKS = {
    "local": {"window": 4},
    "full": {},
    "plain": {"positions": "none"},
    "other": {"kind": "retention", "n_heads": 2, "chunk_size": 4},
}
LAST = {"kind": "last", "layers": 2}
CASES = {
    "gemma": (("local", "full", "local", "full"), LAST),
    "yoco": (("other", "full", "full", "full"), LAST),
    "cla": (("full", "local", "full", "local", "local"), {"kind": "groups", "size": 2}),
    "window": (("local", "local", "local"), LAST),
}


def config_of(pattern, kv_sharing, **fields):
    blocks = {}
    for name in dict.fromkeys(pattern):
        mixer = BLOCKS[name] if "kind" in BLOCKS[name] else ATTENTION | BLOCKS[name] | fields
        blocks[name] = {"mixer": mixer, "ffn": None, "norm": {"kind": "rmsnorm"}}
    return ModelConfig.model_validate(
        {
            "d_model": 16,
            "n_layers": len(pattern),
            "vocab_size": 257,
            "blocks": blocks,
            "pattern": list(pattern),
            "norm": {"kind": "rmsnorm"},
            "kv_sharing": kv_sharing,
        }
    )


def model_of(pattern, kv_sharing, dtype=torch.float64, **fields):
    model = build_model(config_of(pattern, kv_sharing, **fields), dtype=dtype).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(length=11, batch_size=2):
    return torch.randint(0, 257, (batch_size, length), generator=torch.Generator().manual_seed(0))


def exactly(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def rotated(x, base):
    pairs = torch.arange(0, x.shape[-1], 2, dtype=x.dtype)
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * base ** -(pairs / x.shape[-1])
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)


def attention_written_out(mixer, x, source, source_x):
    """Queries of one layer over the keys and values that another has of its own input."""
    width = mixer.head_dim
    q = (x @ mixer.in_proj.weight[: 4 * width].T).unflatten(-1, (4, width))
    k, v = (source_x @ source.in_proj.weight[4 * width : 8 * width].T).unflatten(-1, (4, width)).split(2, dim=2)
    if mixer.config.positions == "rope":
        q, k = rotated(q, mixer.config.rope_base), rotated(k, mixer.config.rope_base)
    k, v = (y.repeat_interleave(2, dim=2) for y in (k, v))
    place = torch.arange(x.shape[1])
    distance = place[:, None] - place
    visible = (distance >= 0) & (distance < (mixer.config.window or math.inf))
    scores = torch.einsum("bnhk,bmhk->bhnm", q, k) / math.sqrt(width)
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("bhnm,bmhv->bnhv", weights, v).flatten(2) @ mixer.out_proj.weight.T


def by_hand(model, x):
    """Logits, without states."""
    hidden = model.embedding.weight[x]
    inputs = []
    for block, source in zip(model.blocks, model.config.kv_sources, strict=True):
        inputs.append(block.mixer_norm(hidden))
        if block.mixer.kind == "retention":
            y = block.mixer(inputs[-1])[0]
        else:
            own = len(inputs) - 1 if source is None else source
            y = attention_written_out(block.mixer, inputs[-1], model.blocks[own].mixer, inputs[own])
        hidden = hidden + y
    return model.norm(hidden) @ model.head.weight.T


def all_of(model, paradigm):
    return model.prefer(Paradigm(paradigm), from_state=True)


each_case = pytest.mark.parametrize(("pattern", "sharing"), CASES.values(), ids=CASES)


def test_kv_sources_follow_sharing_scheme():
    assert config_of(*CASES["gemma"]).kv_sources == (None, None, 0, 1)
    assert config_of(*CASES["yoco"]).kv_sources == (None, None, 1, 1)
    assert config_of(*CASES["cla"]).kv_sources == (None, None, 0, 1, None)
    pattern = ("local", "local", "full", "local", "full", "other", "local")
    assert config_of(pattern, {"kind": "last", "layers": 3}).kv_sources == (None, None, None, None, 2, None, 3)


@each_case
@pytest.mark.parametrize("paradigm", list(Paradigm))
def test_model_matches_explicit_formula(pattern, sharing, paradigm):
    model, x = model_of(pattern, sharing), tokens()
    exactly(model(x, paradigm=all_of(model, paradigm)).logits, by_hand(model, x))


@each_case
def test_gradients_match_formula_with_and_without_checkpointing(pattern, sharing):
    model, x = model_of(pattern, sharing), tokens()
    above = torch.randn(2, 11, 257, dtype=torch.float64)
    expected = torch.autograd.grad(by_hand(model, x), list(model.parameters()), above)
    assert all(gradient.any() for gradient in expected)
    for model.activation_checkpointing in (False, True, "matmuls"):
        exactly(torch.autograd.grad(model(x).logits, list(model.parameters()), above), expected)


@settings(max_examples=25, deadline=None)
@given(
    case=st.sampled_from(sorted(CASES)),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    paradigms=st.lists(st.sampled_from(list(Paradigm)), min_size=5, max_size=5),
    max_length=st.sampled_from([None, 40]),
    options=st.sampled_from([{}, {"donate_state": True}]),
    grad=st.booleans(),
)
def test_segments_match_whole_sequence_for_any_cache_layout(case, lengths, paradigms, max_length, options, grad):
    model, x = model_of(*CASES[case]), tokens(sum(lengths))
    whole = by_hand(model, x)
    state = model.init_state(2, max_length=max_length)
    outputs = []
    with torch.set_grad_enabled(grad):
        for part, paradigm in zip(x.split(lengths, dim=1), paradigms, strict=False):
            output = model(part, state, paradigm=all_of(model, paradigm), return_state=True, **options)
            state = output.state
            outputs.append(output.logits)
    exactly(torch.cat(outputs, dim=1), whole)


@each_case
@pytest.mark.parametrize("paradigm", list(Paradigm))
def test_packed_documents_match_separate_documents(pattern, sharing, paradigm):
    model, x = model_of(pattern, sharing), tokens(14, 1)
    boundaries = [0, 5, 5, 6, 14]
    documents = [x[:, start:stop] for start, stop in pairwise(boundaries)]
    packed = model(x, cu_seqlens=torch.tensor(boundaries), paradigm=all_of(model, paradigm), return_state=True)
    exactly(packed.logits, torch.cat([by_hand(model, part) for part in documents if part.numel()], dim=1))
    again = model(x, packed.state, cu_seqlens=torch.tensor(boundaries), paradigm=all_of(model, paradigm)).logits
    exactly(again[:, 6:], by_hand(model, torch.cat((documents[3], documents[3]), dim=1))[:, 8:])


@each_case
def test_gradients_flow_through_previous_state(pattern, sharing):
    model, x = model_of(pattern, sharing), tokens()
    parameters = list(model.parameters())
    above = torch.randn(2, 6, 257, dtype=torch.float64)
    expected = torch.autograd.grad(by_hand(model, x)[:, 5:], parameters, above)
    for model.activation_checkpointing in (False, True):
        before = model(x[:, :5], return_state=True).state
        exactly(torch.autograd.grad(model(x[:, 5:], before).logits, parameters, above), expected)


@each_case
def test_reader_layer_has_no_key_weights_and_adds_no_state_bytes(pattern, sharing):
    config = config_of(pattern, sharing)
    plain = config.model_copy(update={"kv_sharing": None})
    shared, own = (account(each, length=32) for each in (config, plain))
    model = build_model(config)
    for i, source in enumerate(config.kv_sources):
        mixer, layers = model.blocks[i].mixer, (shared.layers[i], own.layers[i])
        if source is None:
            assert layers[0].state_bytes == layers[1].state_bytes
            assert layers[0].parameters == layers[1].parameters
            continue
        assert mixer.takes_shared_kv
        assert (layers[0].state_elements, layers[0].state_bytes) == (0, 8)
        keys_and_values = 2 * 2 * mixer.head_dim * 16
        assert layers[1].parameters - layers[0].parameters == keys_and_values
        assert layers[1].flops_per_token - layers[0].flops_per_token == 2 * keys_and_values
        assert layers[0].activation_bytes < layers[1].activation_bytes
        assert {block.name for block in roles_of(mixer)["in_proj.weight"].blocks} == {"q"}
    assert shared.parameters == sum(parameter.numel() for parameter in model.parameters())
    state = model(tokens(32), return_state=True).state
    # accounting allocates for 32 tokens, and positions are 8 bytes per layer
    assert nbytes(select(state, torch.tensor([0]))) == shared.state_bytes


@pytest.mark.parametrize("positions", ["rope", "none"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("qk_norm", ["none", "rms", "rms_all_heads"])
def test_reader_with_source_weights_matches_its_source(window, positions, qk_norm):
    fields = {"window": window, "positions": positions, "qk_norm": qk_norm, "differential": True, "gate": "sigmoid"}
    config = AttentionConfig(**ATTENTION | fields | {"exclusive": "full", "sinks": True})
    source, reader = (config.build(16, layer_idx=i, n_layers=2).double() for i in range(2))
    reader.accept_shared_kv()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(torch.randn_like(parameter))
        rows = dict(zip(source.widths, source.in_proj.weight.split(list(source.widths.values())), strict=True))
        reader.in_proj.weight.copy_(torch.cat([rows[name] for name in reader.widths]))
        for name, parameter in reader.named_parameters():
            if name != "in_proj.weight":
                parameter.copy_(source.get_parameter(name))
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    states = [None, None]
    for part in x.split([4, 1, 1, 3], dim=1):
        y, states[0], _, kv, _ = source(part, call=LayerCall(states[0], return_state=True, return_kv=True))
        z, states[1], *_ = reader(part, call=LayerCall(states[1], return_state=True, shared_kv=kv))
        exactly(z, y)
        assert torch.equal(states[0].length, states[1].length)


def test_rollback_matches_state_without_removed_tokens():
    model, x = model_of(*CASES["gemma"]), tokens()
    before = model(x[:, :4], return_state=True).state
    back = torch.tensor([2, 3])
    with torch.no_grad():
        middle = model.embed(x[:, 4:8])
        after = []
        shared = {}
        for i, (block, state) in enumerate(zip(model.blocks, before, strict=True)):
            source = model.kv_sources[i]
            kv = None if source is None else shared[source]
            call = LayerCall(state, return_state=True, shared_kv=kv, return_kv=i in model.kv_donors)
            y, final, _, shared[i], _ = block.mixer(block.mixer_norm(middle), call=call)
            after.append(block.mixer.rollback(block.mixer_norm(middle), state, final, back))
            middle = middle + y
    for row, kept in enumerate([6, 5]):
        state = select(tuple(after), torch.tensor([row]))
        output = model(x[row : row + 1, kept:], state).logits
        exactly(output, by_hand(model, x[row : row + 1])[:, kept:])
    with pytest.raises(ContractError, match="0 to 4 tokens"):
        model.blocks[2].mixer.rollback(middle, before[2], after[2], 5)


def test_decoding_continues_from_a_resized_and_detached_state():
    model, x = model_of(*CASES["gemma"]), tokens()
    state = model.resize_state(detach(model(x[:, :7], return_state=True).state), 20)
    assert isinstance(state[2], ReaderState)
    exactly(model(x[:, 7:], state, return_state=True).logits, by_hand(model, x)[:, 7:])
    with pytest.raises(ContractError, match="max_length >= 7"):
        model.blocks[2].mixer.resize_state(state[2], 6)


@each_case
def test_prefill_decoding_and_speculation_agree(pattern, sharing):
    model = model_of(pattern, sharing)
    prompts = [tokens(n, 1)[0] for n in (3, 7, 1)]
    logits, state = prefill(model, prompts, max_length=30)
    rows = [prompt.tolist() for prompt in prompts]
    decoder = Decoder(model, state)
    for _ in range(8):
        for row, text in enumerate(rows):
            exactly(logits[row], by_hand(model, torch.tensor([text]))[0, -1])
            text.append(int(logits[row].argmax()))
        logits = decoder.step(torch.tensor([text[-1] for text in rows]))
    greedy = Sampling(temperature=0)
    for speculation in (None, Speculation(block=4)):
        steps = generate_tokens(model, prompts, max_new_tokens=8, sampling=greedy, speculation=speculation)
        expected = [text[len(prompt) :] for text, prompt in zip(rows, prompts, strict=True)]
        assert torch.stack(list(steps), dim=1).tolist() == expected


def test_prompt_cache_continuations_match_full_pass():
    model, x = model_of(*CASES["gemma"]), tokens(9, 1)[0]
    cache = cache_tokens(model, [x[:6]])
    for _ in range(2):  # continuations do not change it
        matched, texts = cache.broadcast([x[6:], x[6:8]])
        logits, _ = matched.prefill(model, texts, more=3)
        exactly(logits, torch.cat([by_hand(model, x[None, :n])[:, -1] for n in (9, 8)]))


def test_autocast_output_stays_close_to_formula():
    model, x = model_of(*CASES["gemma"], dtype=torch.float32), tokens()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(x, return_state=True)
        parts = model(x[:, :6], return_state=True)
        step = model(x[:, 6:7], parts.state, paradigm=Paradigm.RECURRENT)
    torch.testing.assert_close(step.logits[:, 0], whole.logits[:, 6], rtol=0.05, atol=0.1)
    torch.testing.assert_close(whole.logits, by_hand(model.double(), x).bfloat16(), rtol=0.05, atol=0.15)


@pytest.mark.slow
def test_compiled_blocks_and_decoding_match_eager():
    model, x = model_of(*CASES["gemma"], dtype=torch.float32), tokens()
    expected = model(x).logits
    _, state = prefill(model, list(x), max_length=20)
    decoders = [Decoder(model, tuple(map(detach, state)), compiled=compiled) for compiled in (True, False)]
    decoders[1].state = tuple(select(each, torch.arange(2)) for each in state)
    for n in range(4):
        logits = [decoder.step(x[:, n]) for decoder in decoders]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert compile_blocks(model) == 4  # each block, with and without keys
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-4, atol=1e-4)


def test_look_shows_maps_of_all_layers_and_states_of_sources():
    model = model_of(*CASES["gemma"])
    views = look(model, tokens(9, 1))
    assert [len(view.reach) for view in views] == [4] * 4
    assert [bool(view.states) for view in views] == [True, True, False, False]
    torch.testing.assert_close(views[2].maps.sum(-1), torch.ones_like(views[2].maps[..., 0]))


def test_swapping_or_converting_sharing_mixers_raises():
    config = config_of(("full", "full"), {"kind": "last", "layers": 1})
    with pytest.raises(SeqmixError, match="kv_sharing cannot be swapped"):
        student_of(config, {0: AttentionConfig(n_heads=2)})
    blocks = {"full": config.blocks["full"].model_copy(update={"ffn": SwigluConfig(expansion=2.0)})}
    with pytest.raises(SeqmixError, match="kv_sharing"):
        architecture_of("llama").fields(config.model_copy(update={"blocks": blocks}))


def test_mup_scales_widths_of_reader_layers():
    scaled = config_of(("full", "full"), {"kind": "last", "layers": 1}).model_dump()
    scaled |= {"parametrization": {"kind": "mup", "base_width": 8}, "d_model": 16}
    model = build_model(ModelConfig.model_validate(scaled))
    assert model.base_shapes["blocks.1.mixer.in_proj.weight"] == (8, 8)
    assert [block.mixer.score_factor for block in model.blocks] == [0.5**0.5] * 2


def test_model_generates_text():
    assert len(generate_text(model_of(*CASES["yoco"], dtype=torch.float32), ["ab", "c"], max_new_tokens=5)) == 2


@pytest.mark.parametrize(
    ("pattern", "sharing", "fields", "named"),
    [
        (("full", "local"), LAST, {}, "block full .* more layers"),
        (("full", "local", "full", "full"), {"kind": "last", "layers": 3}, {}, "block local .* at most 2"),
        (("full", "full"), {"kind": "last", "layers": 1}, {"forget_gate": True}, "without forget_gate"),
        (("full", "full"), {"kind": "last", "layers": 1}, {"value_residual": True}, "value_residual"),
        (("full", "full"), {"kind": "last", "layers": 1}, {"short_conv": 4}, "and short_conv"),
        (("full", "local"), {"kind": "groups", "size": 2}, {}, "no layer"),
        (("full", "full"), {"kind": "groups", "size": 1}, {}, "greater than or equal to 2"),
        (("full", "full"), {"kind": "first", "layers": 1}, {}, "kind"),
    ],
)
def test_invalid_sharing_settings_raise(pattern, sharing, fields, named):
    with pytest.raises((SeqmixError, ValidationError), match=named):
        config_of(pattern, sharing, **fields)


def test_sharing_with_shared_blocks_raises():
    config = config_of(("full", "full"), None).model_dump()
    config["blocks"]["full"]["shared"] = True
    with pytest.raises(ValidationError, match="shared = true with block full"):
        ModelConfig.model_validate(config | {"kv_sharing": {"kind": "last", "layers": 1}})


def test_value_embeddings_in_reader_layers_raise():
    config = config_of(("full", "full"), {"kind": "last", "layers": 1}).model_dump()
    with pytest.raises(ValidationError, match="layer 1, which by kv_sharing has no values"):
        ModelConfig.model_validate(config | {"value_embeddings": {"every": 1, "gate_channels": 4}})


def test_shared_kv_without_declaration_raises():
    alone = AttentionConfig(n_heads=2).build(16, layer_idx=0, n_layers=1)
    x = torch.randn(1, 3, 16)
    kv = alone(x, call=LayerCall(return_kv=True)).kv
    with pytest.raises(ContractError, match="accept_shared_kv"):
        alone(x, call=LayerCall(shared_kv=kv))
    alone.accept_shared_kv()
    with pytest.raises(ContractError, match="needs shared_kv"):
        alone(x)
    with pytest.raises(ContractError, match="of its own"):
        alone(x, call=LayerCall(shared_kv=kv, return_kv=True))
    other = model_of(("other",), None).blocks[0].mixer
    with pytest.raises(ContractError, match="kv_sharing"):
        other(x.double(), call=LayerCall(return_kv=True))
    with pytest.raises(ContractError, match="kv_sharing"):
        other.accept_shared_kv()
    with pytest.raises(ContractError, match="kv_sharing"):
        AttentionConfig(n_heads=2, forget_gate=True).build(16, layer_idx=0, n_layers=1).accept_shared_kv()
