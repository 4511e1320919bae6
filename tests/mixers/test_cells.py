"""The sequential cells sLSTM and M2RNN against their papers' equations, token by token, and in special cases."""

import pytest
import torch
import torch.nn.functional as F
from mixer_formulas import D_MODEL, assert_follows, convolved, exactly, tokens

from seqmix import ContractError
from seqmix.mixers import MIXERS
from seqmix.ops.cell import m2rnn, slstm
from seqmix.ops.decay import decay
from seqmix.ops.scan import log_scan, scan
from seqmix.registry import SeqmixError

H, D, K, V = 2, 3, 4, 3


def build(kind, dtype=torch.float64, **fields):
    """A small mixer in which no parameter is all ones or zeros, which would hide that it is there."""
    torch.manual_seed(0)
    small = {"slstm": {"n_heads": 3}, "m2rnn": {"head_dim": 6, "d_state": 5, "chunk_size": 4}}
    mixer = MIXERS.resolve(kind)(**small[kind] | fields).build(D_MODEL, layer_idx=1, n_layers=3).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slstm_formula(mixer, x):
    """With the paper's cell and normaliser, and its running maximum."""
    config, width = mixer.config, mixer.width
    heads, u = config.n_heads, x
    if config.short_conv:
        u = convolved(x, mixer.convolution.weight) + mixer.convolution.bias
        u = u * u.sigmoid()
    c = n = h = x.new_zeros(len(x), heads, width)
    m, outputs = torch.full_like(c, -torch.inf), []
    for t in range(x.shape[1]):
        logits = []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            weights, biases = mixer.gate_weight[head].split(width, -1), mixer.gate_bias[head].split(width)
            recurrent = mixer.recurrent_weight[head].split(width, -1)
            inputs = (u[:, t, own], u[:, t, own], x[:, t, own], x[:, t, own])
            parts = zip(inputs, weights, recurrent, biases, strict=True)
            logits.append([y @ w + h[:, head] @ r + b for y, w, r, b in parts])
        i, f, z, o = (torch.stack(gate, 1) for gate in zip(*logits, strict=True))
        log_f = f if config.forget_gate == "exp" else f.sigmoid().log()
        largest = torch.maximum(log_f + m, i).detach()
        c = (log_f + m - largest).exp() * c + (i - largest).exp() * z.tanh()
        n = (log_f + m - largest).exp() * n + (i - largest).exp()
        h, m = o.sigmoid() * c / n, largest
        outputs.append(h)
    y = torch.stack(outputs, 1)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + config.norm_eps).sqrt()
    y = y if mixer.norm.weight is None else y * mixer.norm.weight
    return y.flatten(2), torch.stack((h, c / n), 2)


def m2rnn_formula(mixer, x):
    heads, keys, values = mixer.n_heads, mixer.key_dim, mixer.value_dim
    groups, inner = mixer.n_groups, heads * values
    z, mixed, dt = (x @ mixer.in_proj.weight.T).split([inner, inner + 2 * groups * keys, heads], -1)
    mixed = convolved(mixed, mixer.convolution.weight) + mixer.convolution.bias
    u, k, q = (mixed * mixed.sigmoid()).split([inner, groups * keys, groups * keys], -1)
    f = (-(1 + (dt + mixer.decay.dt_bias).exp()).log() * mixer.decay.A_log.exp()).exp()
    state, outputs = x.new_zeros(len(x), heads, keys, values), []
    for t in range(x.shape[1]):
        o = []
        states = []
        for head in range(heads):
            group = head * groups // heads
            value = u[:, t, head * values : (head + 1) * values]
            key, query = (y[:, t, group * keys : (group + 1) * keys] for y in (k, q))
            kept = f[:, t, head, None, None]
            new = (state[:, head] @ mixer.state_weight[head] + key[:, :, None] * value[:, None]).tanh()
            states.append(kept * state[:, head] + (1 - kept) * new)
            o.append((query[:, None] @ states[-1])[:, 0] + mixer.D[head] * value)
        state = torch.stack(states, 1)
        outputs.append(torch.cat(o, -1))
    y = (torch.stack(outputs, 1) * z * z.sigmoid()).unflatten(-1, (groups, -1))
    y = (y / (y.square().mean(-1, keepdim=True) + mixer.config.norm_eps).sqrt()).flatten(2) * mixer.norm_weight
    return y @ mixer.out_proj.weight.T, state


FORMULAS = {"slstm": slstm_formula, "m2rnn": m2rnn_formula}
CASES = [
    ("slstm", {}),
    ("slstm", {"forget_gate": "exp", "short_conv": None}),
    ("slstm", {"n_heads": 1, "norm_affine": False, "norm_eps": 0.1, "short_conv": 2}),
    ("m2rnn", {}),
    ("m2rnn", {"n_groups": 2, "expand": 1.0, "head_dim": 3}),
]


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_output_state_and_gradients_match_written_out_formulas(kind, fields):
    assert_follows(build(kind, **fields), FORMULAS[kind], tokens(11))


@pytest.mark.parametrize("exponential", [False, True])
def test_slstm_without_recurrent_weights_matches_a_scan(exponential):
    gates = randn(2, 9, H, 4 * D)
    i, f, z, o = gates.split(D, -1)
    log_f = f.clamp(max=0) if exponential else F.logsigmoid(f)  # scans take decays up to 1
    gates = torch.cat((i, log_f if exponential else f, z, o), -1)
    output, _, weight = slstm(
        gates, torch.zeros(H, D, 4 * D).double(), exponential=exponential, output_final_state=True
    )
    log_n, final = log_scan(i, log_f, output_final_state=True)
    c, _ = scan(i.exp() * z.tanh(), log_f)
    exactly(output, o.sigmoid() * c / log_n.exp())
    exactly(weight, final)


def test_m2rnn_with_small_values_matches_a_linear_recurrence():
    q, k, v = randn(2, 9, H, K), randn(2, 9, H, K, seed=1), 1e-5 * randn(2, 9, H, V, seed=2)
    log_decay = -randn(2, 9, H, seed=3).abs()
    k_of_decay = -torch.expm1(log_decay)[..., None] * k
    # tanh(x) is x but for x^3: without W the decay op, and with the identity a state that does not decay
    for weight, decays in ((torch.zeros(H, V, V), log_decay), (torch.eye(V).expand(H, V, V), None)):
        output, state = m2rnn(q, k, v, log_decay, weight.double(), output_final_state=True)
        expected, final = decay(q, k_of_decay, v, decays, scale=1.0, output_final_state=True)
        exactly(output / 1e-5, expected / 1e-5, 1e-7)
        exactly(state / 1e-5, final / 1e-5, 1e-7)


def test_m2rnn_with_closed_gate_keeps_its_state():
    q, k, v = randn(2, 5, H, K), randn(2, 5, H, K), randn(2, 5, H, V)
    before = randn(2, H, K, V)
    options = {"initial_state": before, "output_final_state": True}
    _, after = m2rnn(q, k, v, torch.zeros(2, 5, H).double(), randn(H, V, V), **options)
    assert torch.equal(before, after)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_slstm_fresh_row_is_unaffected_by_continuing_row_in_batch(backend):
    # the input gate of the fresh row is so small that nothing is left of it beside the forget gate of a state of 0
    gates = randn(1, 4, H, 4 * D).float()
    gates[..., :D] -= 300
    recurrent = torch.zeros(H, D, 4 * D)
    alone = slstm(gates, recurrent, backend=backend)
    memory = torch.cat((torch.zeros(1, H, 2, D), torch.ones(1, H, 2, D)))
    weight = torch.cat((torch.full((1, H, D), -torch.inf), torch.ones(1, H, D))).double()
    both = slstm(gates.expand(2, -1, -1, -1), recurrent, backend=backend, initial_state=(memory, weight))
    assert alone.output.isfinite().all()
    torch.testing.assert_close(both.output[:1], alone.output)
    assert (both.output[1:] - alone.output).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["slstm", "m2rnn"])
def test_paradigms_other_than_recurrent_raise(kind):
    mixer = build(kind)
    with pytest.raises(ContractError, match=f"{kind} has no paradigm 'parallel'; it declares recurrent"):
        mixer(tokens(3), paradigm="parallel")
    with pytest.raises(ValueError, match=f"{kind} has no paradigm 'chunkwise'"):
        MIXERS.resolve(kind)(**({"n_heads": 1} if kind == "slstm" else {}), paradigm="chunkwise")


def test_mismatched_arguments_raise():
    gates, recurrent = torch.zeros(2, 3, H, 4 * D), torch.zeros(H, D, 4 * D)
    with pytest.raises(SeqmixError, match=r"slstm expects gates \[B T H 4D\] .*got \[2, 3, 2, 11\]"):
        slstm(gates[..., :-1], recurrent)
    with pytest.raises(SeqmixError, match=r"slstm expects recurrent \[H D 4D\], got \[2, 3, 13\]"):
        slstm(gates, F.pad(recurrent, (0, 1)))
    with pytest.raises(SeqmixError, match=r"initial memory \[2, 2, 2, 3\] and weight \[2, 2, 3\]"):
        slstm(gates, recurrent, initial_state=(torch.zeros(1, H, 2, D), torch.zeros(1, H, D)))
    with pytest.raises(SeqmixError, match="a cell has only the recurrent paradigm, got chunkwise"):
        slstm(gates, recurrent, paradigm="chunkwise")
    with pytest.raises(SeqmixError, match="a cell expects floating-point inputs, got int64"):
        slstm(gates.long(), recurrent)
    q, v = torch.zeros(2, 3, H, K), torch.zeros(2, 3, H, V)
    with pytest.raises(SeqmixError, match=r"weight \[H V V\], got .*\[2, 3, 4\]"):
        m2rnn(q, q, v, torch.zeros(2, 3, H), torch.zeros(H, V, V + 1))
    with pytest.raises(SeqmixError, match=r"m2rnn expects an initial state \[2, 2, 4, 3\], got \[1, 2, 4, 3\]"):
        m2rnn(q, q, v, torch.zeros(2, 3, H), torch.zeros(H, V, V), initial_state=torch.zeros(1, H, K, V))


@pytest.mark.slow
def test_slstm_learns_parity_and_mlstm_does_not():
    """One layer of width 32 reads 32 bits; accuracy is measured on the parities of the second half of 64 bits."""
    accuracies = {}
    for kind in ("slstm", "mlstm"):
        torch.manual_seed(0)
        mixer = MIXERS.resolve(kind)(n_heads=4).build(32, layer_idx=0, n_layers=1)
        mixer.resolve_backend(torch.float32)
        model = torch.nn.ModuleList([torch.nn.Embedding(2, 32), mixer, torch.nn.Linear(32, 2)])

        def logits(bits, model=model):
            x = model[0](bits)
            return model[2](x + model[1](x)[0])

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
        for _ in range(300):
            bits = torch.randint(2, (64, 32))
            loss = F.cross_entropy(logits(bits).flatten(0, 1), (bits.cumsum(1) % 2).flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            bits = torch.randint(2, (256, 64))
            right = logits(bits).argmax(-1) == bits.cumsum(1) % 2
        accuracies[kind] = float(right[:, 32:].float().mean())
    assert accuracies["slstm"] > 0.99
    assert accuracies["mlstm"] < 0.6
