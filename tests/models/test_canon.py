"""Canon layers of blocks match their explicit formula in every use of a model."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nightly import NIGHTLY
from pydantic import ValidationError

from seqmix import ContractError, ModelConfig, Paradigm, SeqmixError, build_model
from seqmix.blocks.canon import CanonState
from seqmix.mixers.base.roles import Role, roles_of
from seqmix.mixers.base.state import nbytes, select
from seqmix.models import Decoder, Speculation, account, compile_blocks, generate_tokens, prefill
from seqmix.models.prompt_cache import cache_tokens
from seqmix.models.sampling import Sampling

MIXERS = {
    "attention": {"kind": "attention", "n_heads": 2, "chunk_size": 3},
    "window": {"kind": "attention", "n_heads": 2, "window": 4},
    "own": {"kind": "attention", "n_heads": 2, "window": 1},
    "retention": {"kind": "retention", "n_heads": 2, "chunk_size": 4},
}
FFNS = {
    "mlp": {"kind": "mlp", "expansion": 2.0},
    "swiglu": {"kind": "swiglu", "expansion": 2.0},
    "none": None,
}


def config_of(canon, *mixers, ffn="swiglu", blocks=None, **fields):
    norm = {"kind": "rmsnorm"}
    each = {"ffn": FFNS[ffn], "norm": norm, "canon": list(canon)} | (blocks or {})
    return ModelConfig.model_validate(
        {
            "d_model": 16,
            "n_layers": len(mixers),
            "vocab_size": 257,
            "blocks": {name: {"mixer": MIXERS[name]} | each for name in mixers},
            "pattern": list(mixers),
            "norm": norm,
        }
        | fields
    )


def model_of(canon, *mixers, dtype=torch.float64, **options):
    model = build_model(config_of(canon, *mixers, **options), dtype=dtype).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(length=11, batch_size=2):
    return torch.randint(0, 257, (batch_size, length), generator=torch.Generator().manual_seed(0))


def exactly(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def convolved(block, place, x):
    if block.canon is None or place not in block.canon.layers:
        return x
    w = block.canon.layers[place].weight
    padded = F.pad(x, (0, 0, 3, 0))
    return x + sum(w[:, 3 - i] * padded[:, 3 - i : 3 - i + x.shape[1]] for i in range(4))


def network(block, x):
    x = convolved(block, "c", x)
    ffn = block.ffn
    if hasattr(ffn, "gate_proj"):
        gate, up = convolved(block, "d", torch.cat((ffn.gate_proj(x), ffn.up_proj(x)), -1)).chunk(2, -1)
        return ffn.down_proj(gate * torch.sigmoid(gate) * up)
    h = convolved(block, "d", ffn.up_proj(x))
    return ffn.down_proj(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))


def by_hand(model, x):
    """Logits, without states; mixers as they are."""
    hidden = model.embedding.weight[x]
    for block in model.blocks:
        normed = block.mixer_norm(hidden)
        y = block.mixer(convolved(block, "a", normed))[0]
        if block.ffn is not None and block.ffn_norm is None:  # side by side
            y = y + network(block, normed)
        hidden = hidden + y
        if block.ffn_norm is not None:
            hidden = hidden + network(block, block.ffn_norm(hidden))
    return model.norm(hidden) @ model.head.weight.T


CASES = {
    "all, gated": (("a", "c", "d"), ("attention", "retention"), {}),
    "all, plain": (("d", "c", "a"), ("window",), {"ffn": "mlp"}),
    "before the mixer": (("a",), ("retention", "attention"), {"ffn": "none"}),
    "side by side": (("a", "c"), ("attention",), {"blocks": {"parallel": True}}),
    "hidden": (("d",), ("retention",), {}),
}
each_case = pytest.mark.parametrize(("canon", "mixers", "options"), CASES.values(), ids=CASES)


@each_case
@pytest.mark.parametrize("paradigm", list(Paradigm))
def test_model_matches_explicit_formula(canon, mixers, options, paradigm):
    model, x = model_of(canon, *mixers, **options), tokens()
    exactly(model(x, paradigm=paradigm).logits, by_hand(model, x))


@each_case
def test_gradients_match_formula_with_and_without_checkpointing(canon, mixers, options):
    model, x = model_of(canon, *mixers, **options), tokens()
    above = torch.randn(2, 11, 257, dtype=torch.float64)
    expected = torch.autograd.grad(by_hand(model, x), list(model.parameters()), above)
    assert all(gradient.any() for gradient in expected)
    for model.activation_checkpointing in (False, True, "matmuls"):
        exactly(torch.autograd.grad(model(x).logits, list(model.parameters()), above), expected)


@each_case
def test_zero_filters_are_identity_and_last_tap_scales_projections(canon, mixers, options):
    model, x = model_of(canon, *mixers, **options), tokens()
    plain = model_of((), *mixers, **options)
    plain.load_state_dict({name: p for name, p in model.state_dict().items() if ".canon." not in name})
    with torch.no_grad():
        for block in model.blocks:
            for layer in block.canon.convolutions.values():
                layer.weight.zero_()
    assert torch.equal(model(x).logits, plain(x).logits)
    with torch.no_grad():
        for block, other in zip(model.blocks, plain.blocks, strict=True):
            for place, layer in block.canon.convolutions.items():
                factor = layer.weight[:, -1].normal_()
                if place == "d":
                    up = [other.ffn.gate_proj] if hasattr(other.ffn, "gate_proj") else []
                    factors = (1 + factor).split(other.ffn.up_proj.out_features)
                    for projection, each in zip([*up, other.ffn.up_proj], factors, strict=True):
                        projection.weight.mul_(each[:, None])
                elif place == "a":
                    other.mixer.in_proj.weight.mul_(1 + factor)
                else:
                    other.ffn.gate_proj.weight.mul_(1 + factor) if hasattr(other.ffn, "gate_proj") else None
                    other.ffn.up_proj.weight.mul_(1 + factor)
    exactly(model(x).logits, plain(x).logits)


@pytest.mark.parametrize("place", ["a", "c", "d"])
def test_canon_layer_reaches_back_three_tokens(place):
    model = model_of((place,), "own")  # attention of a token to itself
    x = model.embed(tokens(9, 1)).detach().requires_grad_()
    y, _ = model.run_blocks(x)
    for t in range(9):
        (gradient,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
        assert gradient[0].any(-1).nonzero()[:, 0].tolist() == list(range(max(t - 3, 0), t + 1))


@settings(max_examples=20, deadline=None)
@given(
    case=st.sampled_from(sorted(CASES)),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    paradigms=st.lists(st.sampled_from(list(Paradigm)), min_size=5, max_size=5),
    max_length=st.sampled_from([None, 40]),
    options=st.sampled_from([{}, {"donate_state": True}]),
    grad=st.booleans(),
)
def test_segments_match_formula_on_whole_sequence(case, lengths, paradigms, max_length, options, grad):
    canon, mixers, fields = CASES[case]
    model, x = model_of(canon, *mixers, **fields), tokens(sum(lengths))
    state = model.init_state(2, max_length=max_length)
    outputs = []
    with torch.set_grad_enabled(grad):
        for part, paradigm in zip(x.split(lengths, dim=1), paradigms, strict=False):
            output = model(part, state, paradigm=paradigm, return_state=True, **options)
            state = output.state
            outputs.append(output.logits)
    exactly(torch.cat(outputs, dim=1), by_hand(model, x))


@each_case
def test_packed_documents_match_separate_documents(canon, mixers, options):
    model, x = model_of(canon, *mixers, **options), tokens(14, 1)
    boundaries = torch.tensor([0, 5, 5, 6, 14])
    documents = [x[:, start:stop] for start, stop in pairwise(boundaries.tolist())]
    packed = model(x, cu_seqlens=boundaries, return_state=True)
    exactly(packed.logits, torch.cat([by_hand(model, part) for part in documents if part.numel()], dim=1))
    again = model(x, packed.state, cu_seqlens=boundaries, paradigm=Paradigm.CHUNKWISE).logits
    exactly(again[:, 5:6], by_hand(model, torch.cat((documents[2], documents[2]), dim=1))[:, 1:])


@pytest.mark.parametrize("case", ["all, gated", "all, plain"])
def test_prefill_decoding_and_speculation_agree(case):
    canon, mixers, options = CASES[case]
    model = model_of(canon, *mixers, **options)
    prompts = [tokens(n, 1)[0] for n in (3, 7, 1)]
    logits, state = prefill(model, prompts, max_length=30)
    rows = [prompt.tolist() for prompt in prompts]
    decoder = Decoder(model, state)
    for _ in range(8):
        for row, text in enumerate(rows):
            exactly(logits[row], by_hand(model, torch.tensor([text]))[0, -1])
            text.append(int(logits[row].argmax()))
        logits = decoder.step(torch.tensor([text[-1] for text in rows]))
    expected = [text[len(prompt) :] for text, prompt in zip(rows, prompts, strict=True)]
    for speculation in (None, Speculation(block=4)):
        greedy = Sampling(temperature=0)
        steps = generate_tokens(model, prompts, max_new_tokens=8, sampling=greedy, speculation=speculation)
        assert torch.stack(list(steps), dim=1).tolist() == expected


def test_prompt_cache_continuations_match_full_pass():
    model, x = model_of(("a", "c", "d"), "attention", "retention"), tokens(9, 1)[0]
    cache = cache_tokens(model, [x[:6]])
    for _ in range(2):  # continuations do not change it
        matched, texts = cache.broadcast([x[6:], x[6:8]])
        logits, _ = matched.prefill(model, texts, more=3)
        exactly(logits, torch.cat([by_hand(model, x[None, :n])[:, -1] for n in (9, 8)]))


def test_filters_have_convolution_role_and_are_counted_in_costs():
    config = config_of(("a", "c", "d"), "attention", "retention")
    plain = config_of((), "attention", "retention")
    model = build_model(config)
    assert roles_of(model)["blocks.0.canon.layers.a.weight"].role is Role.CONVOLUTION
    widths = (16, 16, 2 * 32)
    for with_canon, without in zip(account(config, length=8).layers, account(plain, length=8).layers, strict=True):
        assert with_canon.parameters - without.parameters == 4 * sum(widths)
        assert with_canon.state_elements - without.state_elements == 3 * sum(widths)
        assert with_canon.flops_per_token == without.flops_per_token  # matrix products
        assert with_canon.activation_bytes > without.activation_bytes
    state = model(tokens(8), return_state=True).state
    assert isinstance(state[0], CanonState)
    assert nbytes(select(state, torch.tensor([1]))) == account(config, length=8).state_bytes
    weight = model.blocks[1].canon.layers["d"].weight
    assert weight.abs().max() <= 0.5
    assert weight.std() > 0.2


def test_canon_layers_work_with_hyper_connections():
    model, x = model_of(("a", "c"), "retention", residual={"kind": "hyper", "n_streams": 2}), tokens()
    whole = model(x, return_state=True)
    first = model(x[:, :4], return_state=True)
    exactly(model(x[:, 4:], first.state).logits, whole.logits[:, 4:])
    assert (model(x).logits - model_of((), "retention", residual={"kind": "hyper", "n_streams": 2})(x).logits).any()


@NIGHTLY
@pytest.mark.slow
def test_compiled_blocks_and_decoding_match_eager():
    model, x = model_of(("a", "c", "d"), "attention", dtype=torch.float32), tokens()
    expected = model(x).logits
    _, state = prefill(model, list(x), max_length=20)
    copies = [tuple(select(each, torch.arange(2)) for each in state) for _ in range(2)]
    decoders = [Decoder(model, copy, compiled=n == 0) for n, copy in enumerate(copies)]
    for n in range(3):
        torch.testing.assert_close(*[decoder.step(x[:, n]) for decoder in decoders], rtol=1e-4, atol=1e-4)
    compile_blocks(model)
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("canon", "blocks", "named"),
    [
        (("a", "a"), {}, "each place once"),
        (("c",), {"ffn": None}, "canon = c needs a feed-forward network"),
        (("b",), {}, "canon"),
        (("d",), {"ffn": {"kind": "moe", "expansion": 1.0, "n_experts": 2, "top_k": 1}}, "mlp or swiglu, got moe"),
    ],
)
def test_invalid_canon_places_raise(canon, blocks, named):
    with pytest.raises((SeqmixError, ValidationError), match=named):
        build_model(config_of(canon, "retention", blocks=blocks))


def test_canon_layer_may_precede_experts():
    blocks = {"ffn": {"kind": "moe", "expansion": 1.0, "n_experts": 2, "top_k": 1}}
    assert build_model(config_of(("c",), "retention", blocks=blocks))(tokens()).logits.isfinite().all()


def test_state_from_model_without_canon_raises():
    other = model_of((), "retention")(tokens(), return_state=True).state
    with pytest.raises(ContractError, match=r"expects a CanonState, got a .*State"):
        model_of(("a",), "retention")(tokens(), other)
