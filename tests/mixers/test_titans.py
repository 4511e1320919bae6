"""Titans' memory against its token-by-token definition by autograd, and what it equals in special cases."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from mixer_formulas import D_MODEL, convolved, exactly, rms, tokens

from seqmix.mixers.parts.fast_weights import LinearMemory
from seqmix.mixers.titans import TitansConfig
from seqmix.ops.delta import delta
from seqmix.ops.runtime.call import Call
from seqmix.ops.ttt import FastLayer, MomentumLayer, Norm, titans, ttt
from seqmix.registry import SeqmixError

B, T, H, D = 2, 11, 2, 4
every_paradigm = pytest.mark.parametrize("paradigm", ["chunkwise", "recurrent"])
every_inner = pytest.mark.parametrize("inner", ["linear", "mlp"])


def build(**fields):
    """A small mixer in which no parameter is all ones or zeros, which would hide that it is there."""
    torch.manual_seed(0)
    fields = {"n_heads": 3, "mini_batch": 4, "base_rate": 2.0} | fields
    mixer = TitansConfig(**fields).build(D_MODEL, layer_idx=1, n_layers=3).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        mixer.rate_bias[2] += 4  # a forget gate around 0.3
    return mixer


def network(mixer, weights, head, x):
    """M(x) with the weights of one head."""
    if mixer.config.inner == "linear":
        return x @ weights[0]
    hidden = F.gelu(x @ weights[0][:-1] + weights[0][-1], approximate="tanh")
    y = F.layer_norm(hidden @ weights[1][:-1] + weights[1][-1], x.shape, eps=mixer.config.norm_eps)
    return x + y * mixer.inner_norm[0, head] + mixer.inner_norm[1, head]


def definition(mixer, x):
    """Outputs, and final M and U; the gradients of the inner loss are torch's, one row and one head after another."""
    config, heads = mixer.config, mixer.config.n_heads
    projected = x @ mixer.in_proj.weight.T
    qkv, gate, rates = projected.split([3 * D_MODEL, projected.shape[-1] - 3 * D_MODEL - 3 * heads, 3 * heads], -1)
    qkv = F.silu(qkv if mixer.convolution is None else convolved(qkv, mixer.convolution.weight))
    q, k, v = (y.unflatten(-1, (heads, -1)) for y in qkv.chunk(3, -1))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    rates, eta, alpha = (rates + mixer.rate_bias.flatten()).sigmoid().chunk(3, -1)
    theta = config.base_rate / config.mini_batch * (1 - eta) * rates
    outputs, memories, momenta = [], [], []
    for row in range(len(x)):
        for head in range(heads):
            weights = [w[head] for w in mixer.initial_weights]
            momentum = [torch.zeros_like(w) for w in weights]
            results = []
            for t in range(x.shape[1]):
                if t % config.mini_batch == 0:
                    start = weights
                error = network(mixer, start, head, k[row, t, head]) - v[row, t, head]
                grads = torch.autograd.grad(error.square().sum(), start, create_graph=True)
                at = row, t, head
                pairs = zip(momentum, grads, strict=True)
                momentum = [eta[at] * u - theta[at] * g for u, g in pairs]
                weights = [(1 - alpha[at]) * w + u for w, u in zip(weights, momentum, strict=True)]
                results.append(network(mixer, weights, head, q[at]))
            outputs.append(torch.stack(results))
            memories.append(weights[-1])
            momenta.append(momentum[0])
    o = torch.stack(outputs).unflatten(0, (len(x), heads)).transpose(1, 2)
    o = rms(o, config.norm_eps) * mixer.norm.weight
    if config.gate != "none":
        activation = F.silu if config.gate == "swish" else torch.sigmoid
        o = o * activation(gate.unflatten(-1, (heads, -1)))
    return o.flatten(2) @ mixer.out_proj.weight.T, torch.stack(memories), torch.stack(momenta)


@every_inner
@pytest.mark.parametrize(
    "fields", [{"mini_batch": 1, "gate": "sigmoid"}, {"mini_batch": 4}, {"mini_batch": 16, "short_conv": None}]
)
def test_output_state_and_gradients_match_the_definition(inner, fields):
    mixer, x = build(inner=inner, **fields), tokens(10).requires_grad_()
    leaves = [x, *mixer.parameters()]
    expected = definition(mixer, x)
    upstream = [torch.randn_like(y) for y in expected]
    gradients = torch.autograd.grad(expected, leaves, upstream)
    for paradigm in ("chunkwise", "recurrent"):
        y, state = mixer(x, paradigm=paradigm, return_state=True)
        found = (y, state.memory[-1].weight.flatten(0, 1), state.memory[0].momentum.flatten(0, 1))
        exactly(found, expected, 1e-8)
        exactly(torch.autograd.grad(found, leaves, upstream), gradients, 1e-7)


@pytest.mark.parametrize("mini_batch", [1, 16])
@pytest.mark.parametrize("momentum", [-20.0, -1.0, 1.0, 20.0])
def test_repeated_token_does_not_blow_up_linear_memory(mini_batch, momentum):
    torch.manual_seed(0)
    mixer = TitansConfig(n_heads=3, mini_batch=mini_batch, short_conv=None).build(D_MODEL, layer_idx=0, n_layers=1)
    with torch.no_grad():
        for row, bias in zip(mixer.rate_bias, (20.0, momentum, -20.0), strict=True):  # full steps, nothing forgotten
            row.fill_(bias)
        x = tokens(1).float()
        _, state = mixer(x.expand(-1, 1000, -1), return_state=True)
        # a memory swings about the value, and no further than that from it
        v = F.silu(x[:, 0] @ mixer.in_proj.weight[2 * D_MODEL : 3 * D_MODEL].T)
    assert (state.memory.output.weight - mixer.initial_weights[0]).abs().max() < 4 * v.abs().max() + 0.2


@every_inner
@pytest.mark.parametrize("cut", range(1, 11))
def test_sequence_split_inside_a_mini_batch_matches_the_whole(inner, cut):
    mixer, x = build(inner=inner), tokens(11)
    whole, final = mixer(x, return_state=True)
    first, state = mixer(x[:, :cut], return_state=True)
    second, after = mixer(x[:, cut:], state, return_state=True)
    exactly(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(after, final)
    # the momentum is a part of the state
    memory = [layer._replace(momentum=0 * layer.momentum) for layer in state.memory]
    other, _ = mixer(x[:, cut:], state._replace(memory=state.memory._make(memory)))
    assert (other - second).abs().max() > 1e-3


def test_rows_may_be_at_different_positions():
    mixer, x = build(short_conv=None), tokens(10)
    states = [mixer(x[:1, :n], return_state=True)[1] for n in (7, 2)]
    layer = MomentumLayer(*(torch.cat(leaf) for leaf in zip(*(state.memory[0] for state in states), strict=True)))
    both = states[0]._replace(memory=LinearMemory(layer), position=torch.tensor([7, 2]), recent=x.new_zeros(2, 0, 0))
    for paradigm in ("chunkwise", "recurrent"):
        y, _ = mixer(x, both, paradigm=paradigm)
        for row, state in enumerate(states):
            exactly(y[row : row + 1], mixer(x[row : row + 1], state)[0])
        # the same, packed into one row
        packed, after = mixer(
            x.reshape(1, 20, -1), both, paradigm=paradigm, cu_seqlens=torch.tensor([0, 10, 20]), return_state=True
        )
        exactly(packed[0].view_as(y), y)
        assert after.position.tolist() == [17, 12]


@every_inner
def test_each_document_starts_a_new_mini_batch_and_momentum(inner):
    mixer, x = build(inner=inner), tokens(11, batch_size=1)
    y, state = mixer(x, cu_seqlens=torch.tensor([0, 3, 3, 11]), return_state=True)
    exactly(y, torch.cat((mixer(x[:, :3])[0], mixer(x[:, 3:])[0]), 1))
    assert state.position.tolist() == [3, 0, 8]
    exactly(state.memory[0].weight[1], mixer.initial_weights[0])
    assert not state.memory[0].momentum[1].any()


def inputs(widths=(D, D), bias=0):
    """q, k, v, three gates, and the layers."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = (randn(B, T, H, D) for _ in range(3))
    gates = [randn(B, T, H).sigmoid() for _ in range(3)]
    weights = [0.3 * randn(B, H, n + bias, m) for n, m in pairwise(widths)]
    layers = [MomentumLayer(w, w, 0.1 * randn(*w.shape)) for w in weights]
    return q, k, v, [0.2 * gates[0], *gates[1:]], layers


def read(q, k, v, gates, layers, batch, paradigm, norm=None):
    call = Call.of(paradigm, T, output_final_state=True)
    return titans(q, k, v, *gates, batch, layers, torch.zeros(B, dtype=torch.int64), call, norm)


def resting(layers):
    return [layer._replace(momentum=torch.zeros_like(layer.weight)) for layer in layers]


@every_paradigm
def test_single_token_batches_without_momentum_or_forgetting_match_delta_rule(paradigm):
    q, k, v, (rate, momentum, forget), (layer,) = inputs()
    y, layers = read(q, k, v, (rate, 0 * momentum, 0 * forget), [layer], 1, paradigm)
    o, state = delta(q, k, v, 2 * rate, scale=1.0, initial_state=layer.weight, output_final_state=True)
    exactly(y, o)
    exactly(layers[0].weight, state)


@every_paradigm
@pytest.mark.parametrize("widths", [(D, D), (D, 7, D)])
@pytest.mark.parametrize("normed", [True, False])
def test_titans_without_momentum_or_forgetting_matches_ttt(paradigm, widths, normed):
    q, k, v, (rate, momentum, forget), layers = inputs(widths, bias=1)
    norm = Norm(
        torch.linspace(0.5, 1.5, H * D).double().view(H, D), torch.linspace(-1, 1, H * D).double().view(H, D), 1e-6
    )
    norm = norm if normed else None
    y, after = read(q, k, v, (rate, 0 * momentum, 0 * forget), layers, 4, paradigm, norm)
    plain = [layer.weight.split([layer.weight.shape[2] - 1, 1], 2) for layer in layers]
    plain = [FastLayer(w, b, torch.zeros_like(w), torch.zeros_like(b)) for w, b in plain]
    # its steps are 1/2 as long, it takes all in full with factors of 1, and it adds keys and queries in any case
    call, ones = Call.of(paradigm, T, output_final_state=True), torch.ones(4).double()
    target = v if normed else v + k
    o, steps = ttt(q, k, target, 2 * rate, ones, plain, torch.zeros(B, dtype=torch.int64), call, norm)
    exactly(y, o if normed else o - q)
    for layer, fast in zip(after, steps, strict=True):
        exactly(layer.start, torch.cat((fast.weight, fast.bias), 2))
        exactly(layer.weight, torch.cat((fast.weight - fast.weight_sum, fast.bias - fast.bias_sum), 2))


@every_paradigm
def test_memory_without_learning_stays_constant_or_fades(paradigm):
    q, k, v, (rate, momentum, forget), layers = inputs()
    layers = resting(layers)
    y, after = read(q, k, v, (0 * rate, momentum, 0 * forget), layers, 4, paradigm)
    exactly(y, torch.einsum("bthk,bhkv->bthv", q, layers[0].weight))
    exactly(after[0].weight, layers[0].weight)
    y, _ = read(q, k, v, (0 * rate, momentum, forget), layers, 4, paradigm)
    exactly(y, (1 - forget).cumprod(1)[..., None] * torch.einsum("bthk,bhkv->bthv", q, layers[0].weight))


@every_paradigm
def test_full_momentum_repeats_the_first_step(paradigm):
    q, k, v, (rate, momentum, forget), layers = inputs()
    rate = torch.cat((rate[:, :1], 0 * rate[:, 1:]), 1)
    _, after = read(q, k, v, (rate, momentum**0, 0 * forget), resting(layers), 4, paradigm)
    exactly(after[0].weight, layers[0].weight + T * after[0].momentum)


@pytest.mark.parametrize("widths", [(D, D), (D, 7, D)])
def test_closed_and_open_gates_agree_across_paradigms(widths):
    q, k, v, (rate, momentum, forget), layers = inputs(widths, bias=len(widths) - 2)
    momentum, forget = ((3 * x).floor() / 2 for x in (momentum, forget))  # 0, 1/2 or 1
    assert all({0.0, 1.0} <= set(x.flatten().tolist()) for x in (momentum, forget))
    leaves = [x.requires_grad_() for x in (q, k, v, rate, momentum, forget)]
    chunkwise = read(q, k, v, (rate, momentum, forget), layers, 4, "chunkwise")
    recurrent = read(q, k, v, (rate, momentum, forget), layers, 4, "recurrent")
    exactly(chunkwise, recurrent)
    gradients = [torch.autograd.grad(result.output.square().sum(), leaves) for result in (chunkwise, recurrent)]
    exactly(gradients[0], gradients[1])


def test_mismatched_arguments_raise():
    q, k, v, gates, layers = inputs()
    with pytest.raises(SeqmixError, match="titans has the paradigms chunkwise and recurrent, got parallel"):
        read(q, k, v, gates, layers, 4, "parallel")
    with pytest.raises(SeqmixError, match=r"rate, momentum and forget \[B T H\], got .*\[2, 11\]"):
        read(q, k, v, [gates[0][..., 0], *gates[1:]], layers, 4, "chunkwise")
    with pytest.raises(SeqmixError, match=r"layers from D to D with N = 2, H = 2, D = 4, got \[2, 2, 6, 4\]"):
        read(q, k, v, gates, inputs((6, D))[-1], 4, "chunkwise")
