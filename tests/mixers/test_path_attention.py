"""PaTH attention against its token-by-token definition, and special cases: attention and generalized delta rule."""

import pytest
import torch
from mixer_formulas import D_MODEL, assert_follows, exactly, tokens

from seqmix.mixers.path_attention import PathAttentionConfig
from seqmix.ops.attention import softmax_attention
from seqmix.ops.attention.path import path_attention
from seqmix.ops.delta import unit_norm
from seqmix.ops.dplr import dplr
from seqmix.ops.runtime.call import Call

every_paradigm = pytest.mark.parametrize("paradigm", ["parallel", "recurrent", "chunkwise"])


def build(**fields):
    """A small mixer in which no parameter is all ones or zeros, which would hide that it is there."""
    torch.manual_seed(0)
    config = PathAttentionConfig(**{"n_heads": 3, "path_rank": 3, "chunk_size": 4} | fields)
    mixer = config.build(D_MODEL, layer_idx=1, n_layers=3).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return mixer


def written_out(mixer, x):
    """The output, with every key multiplied by the matrices H of all tokens after it."""
    config, width, group = mixer.config, mixer.head_dim, mixer.n_heads // mixer.n_kv_heads
    rows = mixer.in_proj.weight.split(list(mixer.widths.values()))
    q, k, v, beta, *forget = (x @ weight.T for weight in rows)
    w = x @ mixer.path_proj.down.weight.T @ mixer.path_proj.up.weight.T if config.path_rank else mixer.path_proj(x)
    if mixer.convolution is not None:
        taps = mixer.convolution.weight
        padded = torch.nn.functional.pad(w, (0, 0, taps.shape[1] - 1, 0))
        w = sum(taps[:, i] * padded[:, i : i + x.shape[1]] for i in range(taps.shape[1]))
        w = w * w.sigmoid()
    q, k, v, w = (y.unflatten(-1, (-1, width)) for y in (q, k, v, w))
    w = w / (w.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    beta = 2 / (1 + (-beta - mixer.beta_bias).exp())
    k, v, w, beta = (y.repeat_interleave(group, 2) for y in (k, v, w, beta))
    gates = torch.log(1 / (1 + (-forget[0] - mixer.forget_bias).exp())) if forget else x.new_zeros(*q.shape[:3])
    keys, sums, outputs = [], [], []
    for t in range(x.shape[1]):
        matrix = torch.eye(width) - beta[:, t, :, None, None] * w[:, t, :, :, None] * w[:, t, :, None]
        keys = [*((matrix @ key[..., None])[..., 0] for key in keys), k[:, t]]
        sums = [*(total + gates[:, t] for total in sums), x.new_zeros(gates[:, t].shape)]
        pairs = zip(keys, sums, strict=True)
        scores = torch.stack([(q[:, t] * key).sum(-1) / width**0.5 + total for key, total in pairs]).exp()
        weights = scores / scores.sum(0)
        outputs.append(sum(p[..., None] * v[:, s] for s, p in enumerate(weights)))
    return (torch.stack(outputs, 1).flatten(2) @ mixer.out_proj.weight.T,)


@pytest.mark.parametrize(
    "fields",
    [{}, {"forget_gate": True, "n_kv_heads": 1}, {"path_rank": None, "short_conv": None}, {"n_heads": 1}],
    ids=str,
)
def test_output_and_gradients_match_written_out_formulas(fields):
    assert_follows(build(**fields), written_out, tokens(11))


def inputs(length, groups=2):
    generator = torch.Generator().manual_seed(1)
    q, k, v, w = torch.randn(4, 2, length, 2, 5, generator=generator, dtype=torch.float64)
    beta = 2 * torch.rand(2, length, 2, generator=generator, dtype=torch.float64)
    k, v, w, beta = (y[:, :, :groups] for y in (k, v, w, beta))
    return q, k, v, unit_norm(w, 0), beta, -torch.rand(2, length, 2, generator=generator, dtype=torch.float64)


@every_paradigm
@pytest.mark.parametrize("groups", [1, 2])
def test_zero_beta_matches_attention_without_positions(paradigm, groups):
    q, k, v, w, beta, log_forget = inputs(11, groups)
    for gates in (None, log_forget):
        options = {"paradigm": paradigm, "log_forget": gates, "output_final_state": True, "chunk_size": 4}
        exactly(path_attention(q, k, v, w, 0 * beta, **options), softmax_attention(q, k, v, **options))


@every_paradigm
def test_scores_match_the_generalized_delta_rule(paradigm):
    q, k, v, w, beta, _ = inputs(11)
    one_hot = torch.eye(11, dtype=torch.float64)[None, :, None].expand(2, 11, 2, 11)
    scores, state = dplr(q, k, one_hot, w, -beta[..., None] * w, paradigm="recurrent", output_final_state=True)
    weights = scores.transpose(1, 2).masked_fill(~torch.ones(11, 11).tril().bool(), -torch.inf).softmax(-1)
    options = {"paradigm": paradigm, "output_final_state": True, "chunk_size": 4}
    output, cache = path_attention(q, k, v, w, beta, **options)
    exactly(output, torch.einsum("bhts,bshv->bthv", weights, v))
    exactly(cache.keys, state.permute(0, 3, 1, 2))


@every_paradigm
@pytest.mark.parametrize("max_length", [None, 20])
def test_earlier_state_is_not_modified(paradigm, max_length):
    mixer, x = build(forget_gate=True), tokens(11)
    with torch.no_grad():
        _, before = mixer(x[:, :6], mixer.init_state(2, max_length=max_length), return_state=True)
        keys = before.cache.cache.keys.clone()
        y, after = mixer(x[:, 6:], before, paradigm=paradigm, return_state=True)
        again, _ = mixer(x[:, 6:], before, paradigm=paradigm, return_state=True)
        back = mixer.rollback(x[:, 6:], before, after, 2)
        exactly(mixer(x[:, 9:], back)[0], y[:, 3:])
    exactly((before.cache.cache.keys, again), (keys, y))
    slots = slice(0, 6) if max_length else slice(-11, -5)
    assert (after.cache.cache.keys[:, slots] - keys[:, :6]).abs().amin(dim=(0, 2, 3)).gt(0).all()


@every_paradigm
@pytest.mark.parametrize("cached", [False, True])
def test_documents_match_with_and_without_known_boundaries(paradigm, cached):
    q, k, v, w, beta, log_forget = (y[:1] for y in inputs(11))
    state = None
    if cached:
        first = [y.expand(3, -1, -1, -1) for y in (q, k, v, w)]
        more = {"log_forget": log_forget.expand(3, -1, -1), "output_final_state": True}
        _, state = path_attention(*first, beta.expand(3, -1, -1), **more)
    call = Call.of(paradigm, 11, state, True, torch.tensor([0, 5, 5, 11]), 4)
    results = []
    for boundaries in (call.documents.boundaries, None):
        documents = call.documents._replace(boundaries=boundaries)
        output, cache = path_attention(q, k, v, w, beta, call._replace(documents=documents), log_forget=log_forget)
        results.append((output, *cache.cache, cache.log_forget))
    assert call.documents.boundaries == (0, 5, 5, 11)
    exactly(*results)


def test_mismatched_arguments_raise():
    q, k, v, w, beta, _ = inputs(3)
    with pytest.raises(ValueError, match=r"expected w of the shape of k, \[2, 3, 2, 5\], and beta of \[2, 3, 2\], got"):
        path_attention(q, k, v, w[:, :2], beta)
    with pytest.raises(ValueError, match="n_kv_heads must divide n_heads = 6, got 4: choose one of"):
        PathAttentionConfig(n_heads=6, n_kv_heads=4)
