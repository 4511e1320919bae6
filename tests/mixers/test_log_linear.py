"""Log-linear attention: its token-by-token definition, how its states join, and its length limit."""

import pytest
import torch
import torch.nn.functional as F
from mixer_formulas import exactly

from seqmix import ContractError
from seqmix.mixers.log_linear import LogLinearConfig
from seqmix.mixers.mamba2 import Mamba2Config
from seqmix.ops.decay import decay
from seqmix.ops.fenwick import log_linear
from seqmix.ops.runtime.call import Call
from seqmix.ops.runtime.paradigm import Paradigm

B, T, H, K, V, L = 2, 37, 2, 3, 4, 7
every_paradigm = pytest.mark.parametrize("paradigm", list(Paradigm))


def inputs(length=T):
    """q, k, v, log-decay and the levels' factors."""
    torch.manual_seed(0)
    q, k = torch.randn(2, B, length, H, K, dtype=torch.float64)
    v, a = torch.randn(B, length, H, V).double(), -torch.rand(B, length, H).double()
    return [q, k, v, a, torch.rand(B, length, H, L).double()]


def written_out(q, k, v, a, scales):
    """Output, and the states of every level after every token, as dictionaries: a Fenwick tree, token by token."""
    levels, outputs, states = {}, [], []
    for t in range(q.shape[1]):
        levels = {level: a[:, t].exp()[..., None, None] * state for level, state in levels.items()}
        if t > 0:  # level 0 and all below the lowest bit of t join into the level of this bit
            lowest = (t & -t).bit_length()
            levels[lowest] = sum(levels.pop(level) for level in range(lowest) if level in levels)
        levels[0] = k[:, t, ..., None] * v[:, t, :, None]
        read = {level: (q[:, t, :, None] @ state)[:, :, 0] for level, state in levels.items()}
        outputs.append(sum(scales[:, t, :, level, None] * o for level, o in read.items()))
        states.append(dict(levels))
    return torch.stack(outputs, 1), states


def run(arguments, paradigm, state=None, position=None, chunk_size=8):
    call = Call.of(paradigm, arguments[0].shape[1], state, True, chunk_size=chunk_size)
    return log_linear(*arguments, position, call)


@every_paradigm
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33])
def test_output_and_gradients_match_the_fenwick_tree(paradigm, length):
    leaves = [x.requires_grad_() for x in inputs(length)]
    expected, _ = written_out(*leaves)
    upstream = torch.randn_like(expected)
    output, _ = run(leaves, paradigm)
    exactly(output, expected)
    options = {"allow_unused": True, "materialize_grads": True}  # one token has no decay
    exactly(*(torch.autograd.grad(y, leaves, upstream, **options) for y in (output, expected)))


def test_one_state_is_live_per_set_bit_of_the_position():
    arguments = inputs()
    _, states = written_out(*arguments)
    for t in range(T):
        assert len(states[t]) == t.bit_count() + 1  # and the token itself
    for n in range(1, T):
        _, memory = run([x[:, :n] for x in arguments], Paradigm.CHUNKWISE)
        # the definition joins before it adds token n, and decays then
        joined = {level: state for level, state in states[n].items() if level}
        assert set(joined) == {bit + 1 for bit in range(L) if n >> bit & 1}
        for level in range(1, L + 1):
            expected = joined.get(level, torch.zeros(B, H, K, V).double())
            exactly(arguments[3][:, n].exp()[..., None, None] * memory[:, :, level - 1], expected)


@every_paradigm
def test_sequence_split_at_any_position_matches_the_whole(paradigm):
    arguments = inputs()
    whole, final = run(arguments, paradigm)
    for cut in range(1, T):
        first, state = run([x[:, :cut] for x in arguments], paradigm)
        position = torch.full((B,), cut)
        second, after = run([x[:, cut:] for x in arguments], paradigm, state, position)
        exactly(torch.cat((first, second), 1), whole)
        exactly(after, final)


@every_paradigm
def test_unit_factors_match_linear_attention_with_decays(paradigm):
    q, k, v, a, scales = inputs()
    output, states = run([q, k, v, a, torch.ones_like(scales)], paradigm)
    expected = decay(q, k, v, a, scale=1.0, output_final_state=True)
    exactly((output, states.sum(2)), tuple(expected))


@every_paradigm
def test_level_zero_reads_only_the_current_token(paradigm):
    q, k, v, a, scales = inputs()
    scales[..., 1:] = 0
    output, _ = run([q, k, v, a, scales], paradigm)
    exactly(output, scales[..., :1] * (q * k).sum(-1, keepdim=True) * v)


def test_layer_with_equal_factors_matches_mamba2():
    fields = {"head_dim": 6, "d_state": 5, "chunk_size": 8, "norm_eps": 0}
    mixer = LogLinearConfig(**fields).build(12, layer_idx=0, n_layers=1).double()
    plain = Mamba2Config(**fields).build(12, layer_idx=0, n_layers=1).double()
    rows = plain.in_proj.out_features
    with torch.no_grad():
        mixer.in_proj.weight[rows:] = 0  # all factors are softplus(0)
        mixer.D.zero_()  # so that the norm cancels this factor
    weights = {name: weight for name, weight in mixer.state_dict().items() if name != "level_rate"}
    plain.load_state_dict(weights | {"in_proj.weight": weights["in_proj.weight"][:rows]})
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    exactly(mixer(x)[0], plain(x)[0])


def test_layer_with_varied_level_rates_matches_written_out_formula():
    mixer = LogLinearConfig(head_dim=6, d_state=5).build(12, layer_idx=0, n_layers=1).double()
    torch.nn.init.normal_(mixer.level_rate)
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    gate, mixed, dt, logits = mixer.in_proj(x).split(mixer.in_widths, -1)
    u, k, q = mixer.convolution(mixed, Call.of(Paradigm.PARALLEL, 20))[0].split(mixer.widths, -1)
    u = u.unflatten(-1, (mixer.n_heads, -1))
    step = F.softplus(dt + mixer.decay.dt_bias)
    scales = F.softplus(logits.unflatten(-1, (mixer.n_heads, -1)) * mixer.level_rate)
    q, k = (y[:, :, None].expand(-1, -1, mixer.n_heads, -1) for y in (q, k))
    o, _ = written_out(q, k, step[..., None] * u, -step * mixer.decay.A_log.exp(), scales)
    o = (o + mixer.D[:, None] * u).flatten(2) * F.silu(gate)
    y = F.rms_norm(o, o.shape[-1:], mixer.norm_weight, 1e-5) @ mixer.out_proj.weight.T
    for paradigm in Paradigm:
        exactly(mixer(x, paradigm=paradigm)[0], y)


@pytest.mark.parametrize("paradigm", [Paradigm.RECURRENT, Paradigm.CHUNKWISE])
@torch.no_grad()
def test_sequence_too_long_for_its_levels_raises(paradigm):
    mixer = LogLinearConfig(head_dim=6, d_state=5, levels=12).build(12, layer_idx=0, n_layers=1)
    state = mixer.init_state(2)._replace(position=torch.tensor([5, 2047]))
    x = torch.randn(2, 2, 12)
    y, state = mixer(x[:, :1], state, paradigm=paradigm, return_state=True)
    assert y.isfinite().all()
    message = r"log_linear with levels = 12 reads at most 2048 tokens, got 2049: set levels = 13$"
    with pytest.raises(ContractError, match=message):
        mixer(x[:, 1:], state, paradigm=paradigm)


@pytest.mark.parametrize("continued", [False, True])
def test_documents_match_with_and_without_known_boundaries(continued):
    arguments = [x[:1] for x in inputs()]
    state = torch.randn(4, H, L, K, V, dtype=torch.float64) if continued else None
    position = torch.tensor([3, 0, 8, 1]) if continued else None
    call = Call.of(Paradigm.CHUNKWISE, T, state, True, torch.tensor([0, 5, 5, 30, T]), chunk_size=8)
    unknown = call._replace(documents=call.documents._replace(boundaries=None))  # as on a GPU, or in compiled code
    exactly(tuple(log_linear(*arguments, position, unknown)), tuple(log_linear(*arguments, position, call)))


def test_level_rates_start_at_one():
    assert (LogLinearConfig(head_dim=6, d_state=5).build(12, layer_idx=0, n_layers=1).level_rate == 1).all()
