"""Test-time training against its token-by-token definition by autograd, and what it equals in special cases."""

import pytest
import torch
import torch.nn.functional as F
from mixer_formulas import D_MODEL, exactly, tokens, turned

from seqmix.mixers.parts.fast_weights import LinearMemory
from seqmix.mixers.ttt import TTTConfig
from seqmix.ops.decay import decay
from seqmix.ops.delta import delta
from seqmix.ops.runtime.call import Call
from seqmix.ops.ttt import FastLayer, Norm, ttt
from seqmix.registry import SeqmixError

B, T, H, D = 2, 11, 2, 4
every_paradigm = pytest.mark.parametrize("paradigm", ["chunkwise", "recurrent"])
every_inner = pytest.mark.parametrize("inner", ["linear", "mlp"])


def build(**fields):
    """A small mixer in which no parameter is all ones or zeros, which would hide that it is there."""
    torch.manual_seed(0)
    mixer = TTTConfig(**{"n_heads": 3, "mini_batch": 4} | fields).build(D_MODEL, layer_idx=1, n_layers=3).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def memory(mixer, weights, head, x):
    """f(x) with the weights of one head, [w, b] per layer."""
    y = x
    for number, (w, b) in enumerate(weights):
        y = F.gelu(y, approximate="tanh") if number else y
        y = y @ w + b
    y = F.layer_norm(y, y.shape[-1:], eps=mixer.config.norm_eps)
    return x + y * mixer.inner_norm_weight[head] + mixer.inner_norm_bias[head]


def definition(mixer, x):
    """Outputs and final weights; the gradients of the inner loss are torch's, one row and one head after another."""
    config, heads = mixer.config, mixer.config.n_heads
    width, batch = D_MODEL // heads, config.mini_batch
    projected = x @ mixer.in_proj.weight.T
    q, k, v = (y.unflatten(-1, (heads, -1)) for y in projected[..., : 3 * D_MODEL].chunk(3, -1))
    rates = mixer.base_rate / width * (projected[..., 3 * D_MODEL :] + mixer.rate_bias).sigmoid()
    q, k = (torch.cat([turned(part, "rope", 10000.0) for part in y.split(batch, 1)], 1) for y in (q, k))
    outputs, final = [], []
    for row in range(len(x)):
        for head in range(heads):
            start = [(w[head], b[head, 0]) for w, b in zip(mixer.initial_weights, mixer.initial_biases, strict=True)]
            sums, results = [(torch.zeros_like(w), torch.zeros_like(b)) for w, b in start], []
            now = start
            for t in range(x.shape[1]):
                place = t % batch
                error = memory(mixer, start, head, k[row, t, head]) - v[row, t, head]
                leaves = [leaf for layer in start for leaf in layer]
                grads = torch.autograd.grad(error.square().sum() / 2, leaves, create_graph=True)
                rate = rates[row, t, head]
                pairs = zip(sums, grads[::2], grads[1::2], strict=True)
                sums = [(sw + rate * gw, sb + rate * gb) for (sw, sb), gw, gb in pairs]
                c = (1 / (place + 1) + mixer.step_factor[place]).clamp(min=0)
                now = [(w - c * sw, b - c * sb) for (w, b), (sw, sb) in zip(start, sums, strict=True)]
                results.append(memory(mixer, now, head, q[row, t, head]))
                if place == batch - 1:
                    start, sums = now, [(torch.zeros_like(w), torch.zeros_like(b)) for w, b in start]
            outputs.append(torch.stack(results))
            final += [start[0][0], sums[-1][1]]
    o = torch.stack(outputs).unflatten(0, (len(x), heads)).transpose(1, 2).flatten(2)
    o = F.layer_norm(o, (D_MODEL,), mixer.norm.weight, mixer.norm.bias, mixer.config.norm_eps)
    return o @ mixer.out_proj.weight.T, torch.stack(final[::2]), torch.stack(final[1::2])


@every_inner
@pytest.mark.parametrize("mini_batch", [1, 4, 16])
def test_output_state_and_gradients_match_the_definition(inner, mini_batch):
    mixer, x = build(inner=inner, mini_batch=mini_batch), tokens(10).requires_grad_()
    leaves = [x, *mixer.parameters()]
    expected = definition(mixer, x)
    varied = [n for n, y in enumerate(expected) if y.requires_grad]  # the sums of an empty batch are constants
    upstream = [torch.randn_like(expected[n]) for n in varied]
    gradients = torch.autograd.grad([expected[n] for n in varied], leaves, upstream, materialize_grads=True)
    for paradigm in ("chunkwise", "recurrent"):
        y, state = mixer(x, paradigm=paradigm, return_state=True)
        found = (y, state.memory[0].weight.flatten(0, 1), state.memory[-1].bias_sum[:, :, 0].flatten(0, 1))
        exactly(found, expected, 1e-8)
        found = [found[n] for n in varied]
        exactly(torch.autograd.grad(found, leaves, upstream, materialize_grads=True), gradients, 1e-7)


@every_inner
@pytest.mark.parametrize("cut", range(1, 11))
def test_sequence_split_inside_a_mini_batch_matches_the_whole(inner, cut):
    mixer, x = build(inner=inner), tokens(11)
    whole, final = mixer(x, return_state=True)
    first, state = mixer(x[:, :cut], return_state=True)
    second, state = mixer(x[:, cut:], state, return_state=True)
    exactly(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(state, final)


def test_rows_may_be_at_different_positions():
    mixer, x = build(), tokens(10)
    states = [mixer(x[:1, :n], return_state=True)[1] for n in (7, 2)]
    layer = FastLayer(*(torch.cat(leaf) for leaf in zip(*(state.memory[0] for state in states), strict=True)))
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


def test_each_document_starts_a_new_mini_batch():
    mixer, x = build(), tokens(11, batch_size=1)
    y, state = mixer(x, cu_seqlens=torch.tensor([0, 3, 3, 11]), return_state=True)
    exactly(y, torch.cat((mixer(x[:, :3])[0], mixer(x[:, 3:])[0]), 1))
    assert state.position.tolist() == [3, 0, 8]
    exactly(state.memory[0].weight[1], mixer.initial_weights[0])


def inputs(heads=H, length=T):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = (randn(B, length, heads, D) for _ in range(3))
    rate = 0.2 * randn(B, length, heads).sigmoid()
    zeros = torch.zeros(B, heads, D, D).double(), torch.zeros(B, heads, 1, D).double()
    layer = FastLayer(0.3 * randn(B, heads, D, D), 0.3 * randn(B, heads, 1, D), *zeros)
    return q, k, v, rate, layer


def with_one(x):
    """Keys and queries with a last dimension of 1, which reads and writes the bias."""
    return F.pad(x, (0, 1), value=1.0)


def read(x, factor, paradigm, norm=None):
    q, k, v, rate, layer = x
    start = torch.zeros(B, dtype=torch.int64)
    return ttt(q, k, v, rate, factor, [layer], start, Call.of(paradigm, T, output_final_state=True), norm)


@every_paradigm
def test_single_token_batches_without_norm_match_delta_rule(paradigm):
    q, k, v, rate, layer = inputs()
    y, layers = read(inputs(), torch.ones(1).double(), paradigm)
    initial = torch.cat((layer.weight, layer.bias), 2)
    o, state = delta(with_one(q), with_one(k), v - k, rate, scale=1.0, initial_state=initial, output_final_state=True)
    exactly(y, q + o)
    exactly(torch.cat((layers[0].weight, layers[0].bias), 2), state)


@every_paradigm
def test_one_batch_without_norm_matches_linear_attention_around_initial_weights(paradigm):
    q, k, v, rate, layer = inputs()
    factor = 1 / torch.arange(1, T + 6, dtype=torch.float64)
    y, _ = read(inputs(), factor, paradigm)
    start = torch.cat((layer.weight, layer.bias), 2)
    written = -rate[..., None] * (torch.einsum("bthk,bhkv->bthv", with_one(k), start) - (v - k))
    o, _ = decay(with_one(q), with_one(k), written, scale=1.0)
    exactly(y, q + torch.einsum("bthk,bhkv->bthv", with_one(q), start) + factor[:T, None, None] * o)


@every_paradigm
def test_memory_without_learning_is_unchanged(paradigm):
    q, k, v, rate, layer = inputs()
    weight, bias = torch.randn(2, H, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    norm = Norm(weight, bias, 1e-6)
    y, layers = read((q, k, v, 0 * rate, layer), torch.ones(4).double(), paradigm, norm)
    net = torch.einsum("bthk,bhkv->bthv", with_one(q), torch.cat((layer.weight, layer.bias), 2))
    exactly(y, q + F.layer_norm(net, (D,), eps=1e-6) * weight + bias)
    assert torch.equal(layers[0].weight, layer.weight)


def test_mismatched_arguments_raise():
    with pytest.raises(SeqmixError, match="ttt has the paradigms chunkwise and recurrent, got parallel"):
        read(inputs(), torch.ones(4).double(), "parallel")
    q, k, v, rate, layer = inputs()
    with pytest.raises(SeqmixError, match=r"rate \[B T H\] and factor \[b\], got .*\[2, 11\]"):
        read((q, k, v, rate[..., 0], layer), torch.ones(4).double(), "chunkwise")
    with pytest.raises(SeqmixError, match=r"layers from D to D with N = 2, H = 2, D = 4, got \[2, 3, 4, 4\]"):
        read((q, k, v, rate, inputs(heads=3)[-1]), torch.ones(4).double(), "chunkwise")
    with pytest.raises(SeqmixError, match="needs heads of even width, got 3"):
        TTTConfig(n_heads=4).build(12, layer_idx=0, n_layers=1)
