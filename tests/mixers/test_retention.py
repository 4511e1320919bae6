"""The retention layer against the paper's formulas written out, its schedules of decays, and its options."""

import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from seqmix.mixers import ContractError, Paradigm
from seqmix.mixers.parts import GatedNorm, head_width
from seqmix.mixers.retention import Retention, RetentionConfig, row_scale
from seqmix.ops.decay import decay_flops

PARADIGMS = list(Paradigm)
D_MODEL = 12
CPU = torch.device("cpu")


def build(dtype=torch.float64, d_model=D_MODEL, **fields):
    torch.manual_seed(0)
    config = RetentionConfig(**{"n_heads": 3, "chunk_size": 4} | fields)
    return config.build(d_model, layer_idx=0, n_layers=1).to(dtype)


def tokens(length, batch_size=2, dtype=torch.float64, d_model=D_MODEL):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, length, d_model, dtype=torch.float64, generator=generator).to(dtype)


def exactly(actual, expected, tolerance=1e-9):
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gammas(config):
    """Each head's decay as the paper's text has it."""
    heads = range(config.n_heads)
    if config.decay == "geometric":
        return [1 - 2.0 ** (-5 - h) for h in heads]
    if config.decay == "log_uniform":
        last = max(config.n_heads - 1, 1)
        return [1 - math.exp((1 - h / last) * math.log(1 / 32) + h / last * math.log(1 / 512)) for h in heads]
    return [1.0 if config.decay == "none" else config.gamma] * config.n_heads


def written_out(mixer: Retention, x):
    """The layer from position 0: Eq. 5 with complex rotations, the two score normalisers, Eq. 8."""
    config, length = mixer.config, x.shape[1]
    parts = iter(mixer.in_proj.weight.split([*mixer.widths.values()]))
    q, k, v = ((x @ next(parts).T).unflatten(-1, (config.n_heads, -1)) for _ in range(3))
    width = mixer.key_dim
    if config.rotation != "none":
        steps = {"retnet": max(width // 2 - 1, 1), "rope": width // 2}[config.rotation]
        theta = config.rotation_base ** -(torch.arange(width // 2).double() / steps)
        turn = torch.polar(torch.ones(()).double(), torch.arange(length)[:, None] * theta)[:, None]
        pairs = (torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) for y in (q, k))
        q, k = (torch.view_as_real(y * turn).flatten(-2) for y in pairs)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    gamma = torch.tensor(gammas(config), dtype=torch.float64)[:, None, None]
    decays = torch.where(distance >= 0, gamma ** distance.clamp(min=0), 0.0)  # [H T T]
    scores = torch.einsum("bnhk,bmhk->bhnm", q, k) / math.sqrt(width) * decays
    if config.row_norm:
        scores = scores / decays.sum(-1, keepdim=True).sqrt()
    output = torch.einsum("bhnm,bmhv->bnhv", scores, v)
    if config.head_norm == "group":
        output = output - output.mean(-1, keepdim=True)
    if config.head_norm != "none":
        output = output / (output.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    output = output.flatten(2)
    if config.gate == "swish":
        gate = x @ next(parts).T
        output = gate * gate.sigmoid() * output
    return output @ mixer.out_proj.weight.T


OPTIONS = {
    "defaults": {},
    "log uniform": {"decay": "log_uniform"},
    "constant": {"decay": "constant", "gamma": 0.9},
    "no decay": {"decay": "none"},
    "learnable": {"learnable_decay": True},
    "rope": {"rotation": "rope", "rotation_base": 100.0},
    "no rotation": {"rotation": "none"},
    "no gate": {"gate": "none"},
    "rms": {"head_norm": "rms", "norm_eps": 0.01},
    "no norm": {"head_norm": "none"},
    "no row norm": {"row_norm": False, "norm_eps": 0.1},
    "plain": {"rotation": "none", "gate": "none", "head_norm": "none", "row_norm": False, "decay": "none"},
    "widths": {"expand_k": 0.5, "expand_v": 3.0},
    "odd keys": {"expand_k": 0.25, "rotation": "none"},
    "one head": {"n_heads": 1, "decay": "log_uniform"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_output_and_gradients_are_the_formulas(name):
    mixer = build(**OPTIONS[name])
    x = tokens(11).requires_grad_()
    leaves = [x, mixer.in_proj.weight, mixer.out_proj.weight]
    expected = written_out(mixer, x)
    upstream = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, leaves, upstream)
    for paradigm in PARADIGMS:
        y, state = mixer(x, paradigm=paradigm)
        assert state is None
        # a learnable decay starts at its schedule as exactly as float32 has it
        exactly(y, expected, 1e-6 if name == "learnable" else 1e-9)
        for gradient, reference in zip(torch.autograd.grad(y, leaves, upstream), expected_gradients, strict=True):
            exactly(gradient, reference, 1e-6 if name == "learnable" else 1e-9)


def test_the_state_is_the_decayed_sum():
    mixer = build(rotation="none", decay="constant", gamma=0.9)
    x = tokens(7)
    k, v = ((x @ w.T).unflatten(-1, (3, -1)) for w in mixer.in_proj.weight.split([*mixer.widths.values()])[1:3])
    decays = 0.9 ** torch.arange(6, -1, -1).double()
    for paradigm in PARADIGMS:
        _, state = mixer(x, paradigm=paradigm, return_state=True)
        exactly(state.memory, torch.einsum("t,bthk,bthv->bhkv", decays, k, v))
        assert_close(state.position, torch.tensor([7, 7]), rtol=0, atol=0)


def test_the_papers_decays():
    # §3.1: what the paper's runs had with 8 heads
    decays = build(d_model=16, n_heads=8, decay="log_uniform").decay(CPU).exp()
    paper = [0.96875, 0.97897, 0.98585, 0.99048, 0.99359, 0.99569, 0.99710, 0.99805]
    assert_close(decays, torch.tensor(paper, dtype=torch.float64), rtol=0, atol=5e-6)
    # Eq. 8
    decays = build(d_model=16, n_heads=8).decay(CPU).exp()
    exactly(decays, torch.tensor([1 - 2.0**-n for n in range(5, 13)], dtype=torch.float64), 1e-15)
    assert_close(decays[[0, 7]], torch.tensor([0.96875, 0.999756], dtype=torch.float64), rtol=0, atol=5e-7)


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_log_uniform_decays_span_the_same_range_for_any_number_of_heads(heads):
    leaks = 1 - build(d_model=20, n_heads=heads, decay="log_uniform").decay(CPU).exp()
    exactly(leaks[0].item(), 1 / 32)
    if heads > 1:
        exactly(leaks[-1].item(), 1 / 512)
        ratios = leaks[1:] / leaks[:-1]
        exactly(ratios, ratios[:1].expand_as(ratios))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_slowest_decay_is_not_rounded_to_one(dtype):
    mixer = build(dtype, d_model=42, n_heads=21)
    assert mixer.decay(CPU).dtype == torch.float64
    assert_close(mixer.decay(CPU)[-1].item(), -(2.0**-25) - 2.0**-51, rtol=1e-12, atol=0)
    # and a chunk of 2^10 tokens leaves exp(-2^-15) of a state
    mixer = build(dtype, d_model=42, n_heads=21, chunk_size=2**10)
    state = mixer.init_state(1)
    x = torch.zeros(1, 2**10, 42, dtype=dtype)
    _, after = mixer(x, state._replace(memory=state.memory + 1), return_state=True)
    kept = after.memory[0, -1].double()
    assert_close(kept, torch.full_like(kept, math.exp(-(2.0**-15))), rtol=1e-7, atol=0)


@pytest.mark.parametrize("fields", [{}, {"decay": "log_uniform"}, {"decay": "constant", "gamma": 0.9}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learnable_decay_starts_at_its_schedule_and_learns(fields, dtype):
    mixer = build(torch.float32, n_heads=6, learnable_decay=True, **fields).to(dtype)
    mixer.reset_parameters()
    fixed = build(torch.float64, n_heads=6, **fields).decay(CPU)
    assert_close(mixer.decay(CPU), fixed, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)
    assert_close(mixer.decay.logit.sigmoid().log().double(), fixed, rtol=1e-2, atol=0)
    y, state = mixer(tokens(9, dtype=dtype), return_state=True)
    (y.square().sum() + state.memory.square().sum()).backward()
    assert mixer.decay.logit.grad.isfinite().all()
    assert (mixer.decay.logit.grad != 0).all()
    with torch.no_grad():
        mixer.decay.logit -= 5
    assert (mixer.decay(CPU) < fixed).all()
    assert (mixer.decay(CPU) < 0).all()


def test_a_fixed_decay_is_no_parameter():
    assert build().decay.logit is None
    assert {name for name, _ in build().named_parameters()} == {"in_proj.weight", "out_proj.weight"}
    assert build(decay="none").decay(CPU) is None


@pytest.mark.parametrize("positions", [[0, 1, 2, 3, 4, 5], [0, 7, 100, 1000]])
def test_the_row_normaliser_is_one_over_the_root_of_the_sum(positions):
    log_decay = torch.log1p(-(2.0 ** -torch.tensor([1.0, 5.0, 12.0, 25.0, 40.0], dtype=torch.float64)))
    sums = [[sum(math.exp(a * i) for i in range(n + 1)) for a in log_decay.tolist()] for n in positions]
    expected = torch.tensor(sums, dtype=torch.float64).rsqrt()
    exactly(row_scale(torch.tensor([positions]), log_decay)[0, :, :, 0], expected, 1e-12)
    expected = (torch.tensor(positions).double() + 1).rsqrt()
    exactly(row_scale(torch.tensor([positions]), None).flatten(), expected, 1e-15)


def test_the_row_normaliser_far_out_is_its_limit():
    log_decay = torch.log1p(-(2.0 ** -torch.tensor([5.0, 12.0], dtype=torch.float64)))
    scale = row_scale(torch.tensor([[10**9]]), log_decay).flatten()
    exactly(scale, (2.0 ** -torch.tensor([5.0, 12.0], dtype=torch.float64)).sqrt(), 1e-12)


def test_gradients_of_the_row_normaliser_are_numerical_ones():
    log_decay = torch.tensor([-0.7, -1e-3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: row_scale(torch.tensor([[0, 1, 50]]), a), [log_decay], eps=1e-7)


@pytest.mark.parametrize("fields", [{"decay": "geometric"}, {"decay": "none"}], ids=str)
def test_without_eps_the_head_norm_cancels_the_row_normaliser(fields):
    x = tokens(9)
    with_it, without = (build(row_norm=on, norm_eps=0.0, **fields)(x)[0] for on in (True, False))
    exactly(with_it, without)
    far, near = (build(row_norm=on, **fields)(x)[0] for on in (True, False))
    assert (far - near).abs().max() > 1e-6


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.3])
def test_statistics_of_the_head_norm_are_a_tokens_and_a_heads_own(eps):
    x = tokens(5, batch_size=3).unflatten(-1, (3, 4))
    # nn.GroupNorm pools over all positions behind the channels, so every token becomes a row
    group = nn.GroupNorm(3, 12, eps=eps, affine=False, dtype=torch.float64)(x.flatten(0, 1).flatten(1)).view_as(x)
    by_norm = {norm: GatedNorm(4, norm, "none", affine=False, eps=eps) for norm in ("group", "rms", "none")}
    exactly(by_norm["group"](x, None), group, 1e-12)
    exactly(by_norm["rms"](x, None), x / (x.square().mean(-1, keepdim=True) + eps).sqrt(), 1e-12)
    assert by_norm["none"](x, None) is x


def test_head_width():
    assert head_width(12, 1.0, 3, "expand_v") == 4
    assert head_width(30, 0.1, 3, "expand_v") == 1  # 0.1 * 30 is 3.0000000000000004
    with pytest.raises(ContractError, match=r"5 heads do not divide expand_k \* d_model = 1 \* 12 = 12 evenly"):
        head_width(12, 1.0, 5, "expand_k")
    with pytest.raises(ContractError, match=r"2 heads do not divide expand_v \* d_model = 1.05 \* 10 = 10.5 evenly"):
        head_width(10, 1.05, 2, "expand_v")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"gamma": 0.9}, "gamma goes with decay: constant alone; decay is geometric"),
        ({"gamma": 0.9, "decay": "none"}, "gamma .* decay is none"),
        ({"decay": "constant"}, "decay: constant needs gamma"),
        ({"decay": "none", "learnable_decay": True}, "learnable_decay needs a decay to start from; decay is none"),
        ({"decay": "constant", "gamma": 1.0}, "less than 1"),
        ({"decay": "constant", "gamma": 0.0}, "greater than 0"),
        ({"norm_eps": -1e-6}, "greater than or equal to 0"),
        ({"n_heads": 0}, "greater than 0"),
        ({"chunk_size": 0}, "greater than 0"),
        ({"paradigm": "sequential"}, "'parallel', 'recurrent' or 'chunkwise'"),
        ({"decai": "none"}, "decai"),
    ],
)
def test_wrong_fields_are_refused(fields, sentence):
    with pytest.raises(ValidationError, match=sentence):
        RetentionConfig(**{"n_heads": 2} | fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"n_heads": 5}, r"5 heads do not divide expand_k \* d_model = 1 \* 12 = 12 evenly"),
        ({"n_heads": 4, "expand_k": 2.0, "expand_v": 0.5}, r"4 heads do not divide expand_v \* d_model = 0.5 \* 12"),
        ({"n_heads": 6, "expand_k": 0.5}, "a head's keys are 1 wide: make that even"),
        ({"n_heads": 4}, "a head's keys are 3 wide: make that even"),
    ],
)
def test_heads_that_do_not_fit_the_model_are_refused(fields, sentence):
    with pytest.raises(ContractError, match=sentence):
        RetentionConfig(**fields).build(12, layer_idx=0, n_layers=1)


def test_weights_start_as_the_authors_code_does():
    mixer = build(d_model=240, n_heads=4)
    for weight in mixer.in_proj.weight.split([*mixer.widths.values()]):
        bound = 2**-2.5 * math.sqrt(6 / sum(weight.shape))
        assert_close(weight.abs().max().item(), bound, rtol=1e-2, atol=0)
    bound = 0.5 * math.sqrt(6 / sum(mixer.out_proj.weight.shape))
    assert_close(mixer.out_proj.weight.abs().max().item(), bound, rtol=1e-2, atol=0)
    assert mixer.in_proj.bias is None
    assert mixer.out_proj.bias is None


def test_values_are_twice_as_wide_as_keys_and_the_gate_as_wide_as_values():
    mixer = build()
    assert (mixer.key_dim, mixer.value_dim) == (4, 8)
    assert mixer.widths == {"q": 12, "k": 12, "v": 24, "gate": 24}
    assert build(gate="none").widths == {"q": 12, "k": 12, "v": 24}
    # 8 d^2, as much as the paper counts
    assert sum(p.numel() for p in mixer.parameters()) == 8 * D_MODEL**2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_state_is_as_declared(dtype):
    mixer = build(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for state in (mixer.init_state(5), mixer(tokens(3, 5, dtype), return_state=True)[1]):
        assert state.memory.shape == (5, 3, 4, 8)
        assert state.memory.dtype == wide
        assert state.position.shape == (5,)
        assert state.position.dtype == torch.int64


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("length", [1, 9])
def test_autocast_keeps_the_state_wide(paradigm, length):
    mixer = build(torch.float32)
    x = tokens(length + 4, dtype=torch.float32)
    exact = written_out(mixer.double(), x.double())
    mixer.float()
    with torch.autocast("cpu", torch.bfloat16):
        _, state = mixer(x[:, :4], paradigm=paradigm, return_state=True)
        y, state = mixer(x[:, 4:], state, paradigm=paradigm, return_state=True)
    assert state.memory.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    assert_close(y.double(), exact[:, 4:], rtol=5e-2, atol=1e-2)


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize(("length", "context"), [(1, 0), (1, 5), (9, 0), (9, 5)])
def test_flops_are_what_a_counter_counts(paradigm, length, context):
    mixer = build()
    state = mixer(tokens(context, 1), return_state=True)[1] if context else None
    with FlopCounterMode(display=False) as counter:
        mixer(tokens(length, 1), state, paradigm=Paradigm.PARALLEL)
    declared = {p: mixer.flops(length, p, context) for p in PARADIGMS}
    assert counter.get_total_flops() == declared[Paradigm.PARALLEL]
    # what the other two do between the projections is checked with the op
    inner = {p: 3 * decay_flops(p, length, 4, 8, chunk_size=4, context=context) for p in PARADIGMS}
    assert declared[paradigm] - inner[paradigm] == declared[Paradigm.PARALLEL] - inner[Paradigm.PARALLEL]


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_training_compiles_into_one_graph(paradigm):
    torch._dynamo.reset()
    mixer = build(learnable_decay=True)
    results = []
    for function in (mixer, torch.compile(mixer, fullgraph=True, backend="aot_eager")):
        y, state = function(tokens(9), mixer.init_state(2), paradigm=paradigm, return_state=True)
        loss = y.square().sum() + state.memory.sum()
        results.append((y, state.memory, *torch.autograd.grad(loss, list(mixer.parameters()))))
    for eager, graph in zip(*results, strict=True):
        exactly(graph, eager)


def test_it_can_be_built_without_memory():
    with torch.device("meta"):
        mixer = RetentionConfig(n_heads=3, learnable_decay=True).build(D_MODEL, layer_idx=0, n_layers=1)
    assert all(p.is_meta for p in mixer.parameters())
    mixer.to_empty(device="cpu").reset_parameters()
    exactly(mixer.decay(CPU), build().decay(CPU), 1e-6)


def test_a_packed_row_restarts_positions_and_decays():
    mixer = build()
    x = tokens(12, batch_size=1)
    borders = torch.tensor([0, 5, 5, 12])
    for paradigm in PARADIGMS:
        y, state = mixer(x, paradigm=paradigm, cu_seqlens=borders, return_state=True)
        for a, b in itertools.pairwise(borders.tolist()):
            if a < b:
                exactly(y[:, a:b], written_out(mixer, x[:, a:b]))
        assert_close(state.position, torch.tensor([5, 0, 7]), rtol=0, atol=0)
        assert not state.memory[1].any()
