"""Attention to chosen keys (MoBA, NSA, DSA): exact scores, the choice of keys, and properties of each method."""

import math
from itertools import pairwise

import pytest
import torch
from fla_oracles import agree, loaded, needs_fla

from seqmix.mixers import Paradigm
from seqmix.ops.attention import GrowingCache, empty_cache, softmax_attention
from seqmix.ops.sparse_attention import Index, block_attention, index_attention, native_sparse_attention
from seqmix.ops.sparse_attention.scores import exact_products, exact_softmax, select_topk, tree_sum
from seqmix.registry import SeqmixError

every_paradigm = pytest.mark.parametrize("paradigm", list(Paradigm))
H, G, K, L = 4, 2, 6, 4


def inputs(length, batch=2, seed=0, dtype=torch.float64, kv_heads=G):
    """Queries, keys and values whose output is the weights: the value of token m is the m-th unit vector."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, length, heads, K, generator=generator).to(dtype) for heads in (H, kv_heads))
    v = torch.eye(length, dtype=dtype)[None, :, None].expand(batch, -1, kv_heads, -1)
    return q, k, v


def exactly(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def moba_by_hand(q, k, v, topk, block=L):
    """Equations 2 to 6 of the paper, for each token and head, with the choice by sorting."""
    output = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            for h in range(q.shape[2]):
                g = h * k.shape[2] // q.shape[2]
                own = t // block
                score = [float(q[b, t, h] @ k[b, j * block : (j + 1) * block, g].mean(0)) for j in range(own)]
                best = sorted(range(own), key=lambda j: (-score[j], j))[: topk - 1]
                seen = [m for m in range(t + 1) if m // block in (*best, own)]
                weights = (k[b, seen, g] @ q[b, t, h] / math.sqrt(K)).softmax(0)
                output[b, t, h] = weights @ v[b, seen, g]
    return output


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 6, 64, 200])
def test_scores_are_bitwise_equal_for_every_shape_and_order(width, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(3, n, width, generator=generator).to(dtype) for n in (33, 41))
    scores = exact_products(q, k)
    for t in (0, 17, 32):
        assert torch.equal(exact_products(q[:, t : t + 1], k), scores[:, t : t + 1])
    assert torch.equal(exact_products(q[1:2, :5], k[1:2, 7:20]), scores[1:2, :5, 7:20])
    order = torch.randperm(width, generator=generator)  # no order of summation, so no blocking, changes a bit
    assert torch.equal(exact_products(q[..., order], k[..., order]), scores)
    assert torch.equal(exact_products(1024 * q, k / 8), 128 * scores)
    error = (scores - q.double() @ k.double().mT).abs()
    assert (error <= 2e-6 * (q.double().norm(dim=-1)[..., None] * k.double().norm(dim=-1)[:, None])).all()


def test_lower_index_wins_among_equal_scores():
    scores = torch.tensor([[2.0, -0.0, 5.0, 0.0, 5.0, -1.0, -torch.inf, 5.0]])
    allowed = torch.tensor([[True, True, True, True, True, True, True, False]])
    index, exists = select_topk(scores, allowed, 8)
    assert index[0, :7].tolist() == [2, 4, 0, 1, 3, 5, 6]
    assert exists.tolist() == [[True] * 7 + [False]]
    assert select_topk(scores, allowed, 2)[0].tolist() == [[2, 4]]


def test_padding_leaves_sum_and_softmax_bitwise_unchanged():
    x = torch.randn(7, 61, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    visible = torch.ones_like(x, dtype=torch.bool)
    assert torch.equal(tree_sum(x.T, dim=0), tree_sum(x))
    for zeros in (1, 3, 64, 700):
        padded = torch.cat((x, torch.zeros(7, zeros, dtype=x.dtype)), dim=-1)
        assert torch.equal(tree_sum(padded), tree_sum(x))
        longer = torch.cat((visible, torch.zeros(7, zeros, dtype=torch.bool)), dim=-1)
        assert torch.equal(exact_softmax(padded, longer)[:, :61], exact_softmax(x, visible))
    exactly(exact_softmax(x, visible), x.softmax(-1))
    assert not exact_softmax(x, ~visible).any()


@every_paradigm
@pytest.mark.parametrize("topk", [1, 2, 3, 9])
def test_moba_matches_the_equations_of_its_paper(topk, paradigm):
    q, k, v = inputs(23)
    output, _ = block_attention(q, k, v, block_size=L, topk=topk, paradigm=paradigm, chunk_size=5)
    exactly(output, moba_by_hand(q, k, v, topk))


@every_paradigm
def test_choosing_all_blocks_matches_softmax_attention(paradigm):
    q, k, v = inputs(23)
    options = {"paradigm": paradigm, "chunk_size": 7}
    expected, _ = softmax_attention(q, k, v)
    exactly(block_attention(q, k, v, block_size=L, topk=6, **options)[0], expected)
    exactly(block_attention(q, k, v, block_size=23, topk=1, **options)[0], expected)
    # up to topk * L tokens, nothing is left out
    exactly(block_attention(q, k, v, block_size=L, topk=3, **options)[0][:, : 3 * L], expected[:, : 3 * L])


@every_paradigm
def test_topk_of_one_chooses_only_the_querys_own_block(paradigm):
    q, k, v = inputs(22)
    weights, _ = block_attention(q, k, v, block_size=L, topk=1, paradigm=paradigm, chunk_size=5)
    token = torch.arange(22)
    seen = (token[:, None] // L == token // L) & (token <= token[:, None])
    assert torch.equal(weights[0, :, 0] > 0, seen)


@every_paradigm
def test_larger_topk_chooses_a_superset_of_blocks(paradigm):
    q, k, v = inputs(40, seed=3)
    chosen = [
        block_attention(q, k, v, block_size=L, topk=topk, paradigm=paradigm, chunk_size=16)[0] > 0
        for topk in range(1, 11)
    ]
    for fewer, more in pairwise(chosen):
        assert (more | ~fewer).all()
        assert more.sum() > fewer.sum()


@every_paradigm
def test_keys_not_chosen_receive_no_gradient(paradigm):
    q, k, v = (x.requires_grad_() for x in inputs(30, batch=1, kv_heads=H))
    output, _ = block_attention(q, k, v, block_size=L, topk=2, paradigm=paradigm, chunk_size=30)
    chosen = output[0, 29] > 0  # by head
    gradients = torch.autograd.grad(output[0, 29].square().sum(), (k, v))
    for gradient in gradients:
        assert torch.equal(gradient[0].abs().sum(-1).T > 0, chosen)


@every_paradigm
def test_later_tokens_do_not_change_earlier_outputs(paradigm):
    q, k, v = inputs(30)
    options = {"block_size": L, "topk": 2, "paradigm": paradigm, "chunk_size": 8}
    before, _ = block_attention(q, k, v, **options)
    for cut in (1, 7, 8, 21):
        changed = [torch.cat((x[:, :cut], 1e3 * x.flip(1)[:, cut:]), dim=1) for x in (q, k, v)]
        assert torch.equal(block_attention(*changed, **options)[0][:, :cut], before[:, :cut])


@every_paradigm
def test_blocks_start_at_document_boundaries(paradigm):
    q, k, v = inputs(37, batch=1)
    boundaries = [0, 3, 3, 16, 37]  # none of the starts is a multiple of L
    options = {"block_size": L, "topk": 2, "paradigm": paradigm, "chunk_size": 8}
    packed, _ = block_attention(q, k, v, cu_seqlens=torch.tensor(boundaries), **options)
    for start, stop in pairwise(boundaries):
        if start < stop:
            alone, _ = block_attention(*(x[:, start:stop] for x in (q, k, v)), **options)
            assert torch.equal(packed[:, start:stop], alone)


@every_paradigm
def test_blocks_are_counted_from_the_first_token_even_if_not_cached(paradigm):
    q, k, v = inputs(21)
    state = empty_cache(GrowingCache, 2, 0, (G, K, 21), q)._replace(length=torch.tensor([6, 9]))
    options = {"block_size": L, "topk": 1, "paradigm": paradigm, "chunk_size": 5}
    weights, _ = block_attention(q, k, v, initial_state=state, output_final_state=True, **options)
    token = torch.arange(21)
    for row, read in enumerate((6, 9)):
        block = (token + read) // L
        seen = (block[:, None] == block) & (token <= token[:, None])
        assert torch.equal(weights[row, :, 0] > 0, seen)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_paradigm_and_segmentation_chooses_the_same_keys(dtype):
    """Blocks of equal tokens tie; a single rounding error would break the ties differently in each paradigm."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = inputs(48, batch=1, dtype=dtype)
    k = k[:, torch.randint(3, (12,), generator=generator).repeat_interleave(L)]  # 12 blocks, of three kinds
    options = {"block_size": L, "topk": 4, "chunk_size": 7}
    chosen = block_attention(q, k, v, **options)[0] > 0
    assert 0 < chosen[0, -1].sum() < 4 * H * L + 1
    for cuts in ([0, 48], [0, 1, 13, 48], list(range(49))):
        for paradigm in Paradigm:
            state, outputs = None, []
            for start, stop in pairwise(cuts):
                part = (x[:, start:stop] for x in (q, k, v))
                y, state = block_attention(
                    *part, **options, paradigm=paradigm, initial_state=state, output_final_state=True
                )
                outputs.append(y)
            assert torch.equal(torch.cat(outputs, dim=1) > 0, chosen)


def test_topk_of_zero_raises():
    with pytest.raises(SeqmixError, match="topk must be at least 1, got 0"):
        block_attention(*inputs(5), block_size=L, topk=0)


def nsa_by_hand(q, k, v, gates, topk, window, block=L):
    """Equations 5 to 12 of the paper for means as the pooled keys, for each token and group of heads."""
    output = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    per_group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            for g in range(k.shape[2]):
                queries = q[b, t, g * per_group : (g + 1) * per_group] / math.sqrt(K)
                keys, values = k[b, :, g], v[b, :, g]
                complete, own = (t + 1) // block, t // block
                pooled = [x[: complete * block].unflatten(0, (-1, block)).mean(1) for x in (keys, values)]
                weights = (queries @ pooled[0].T).softmax(-1)
                first = weights @ pooled[1]
                score = {j: float(weights[:, j].sum()) for j in range(complete)}
                score |= {j: 2.0 for j in (own - 1,) if j >= 0} | {0: 3.0} | {own: 4.0}
                best = sorted(score, key=lambda j: (-score[j], j))[:topk]
                seen = [m for m in range(t + 1) if m // block in best]
                second = (queries @ keys[seen].T).softmax(-1) @ values[seen]
                near = slice(max(0, t + 1 - window), t + 1)
                third = (queries @ keys[near].T).softmax(-1) @ values[near]
                branches = torch.stack((first, second, third), dim=1)
                heads = slice(g * per_group, (g + 1) * per_group)
                output[b, t, heads] = (gates[b, t, heads, :, None] * branches).sum(1)
    return output


def nsa(q, k, v, gates, **options):
    defaults = {"block_size": L, "topk": 4, "window": 5, "chunk_size": 7}
    return native_sparse_attention(q, k, v, gates, **defaults | options)[0]


def branch(number, q):
    """Gates that let one branch through."""
    return torch.eye(3, dtype=q.dtype)[number].expand(*q.shape[:3], 3)


@every_paradigm
@pytest.mark.parametrize("topk", [1, 2, 4, 9])
def test_nsa_matches_the_equations_of_its_paper(topk, paradigm):
    q, k, v = inputs(27)
    gates = torch.rand(*q.shape[:3], 3, generator=torch.Generator().manual_seed(1)).double()
    expected = nsa_by_hand(q, k, v, gates, topk, 5)
    exactly(nsa(q, k, v, gates, topk=topk, paradigm=paradigm), expected)


@every_paradigm
def test_single_nsa_branch_matches_its_formula(paradigm):
    q, k, v = inputs(26)
    exactly(nsa(q, k, v, branch(2, q), paradigm=paradigm), softmax_attention(q, k, v, window=5)[0])
    # all blocks are chosen
    exactly(nsa(q, k, v, branch(1, q), topk=7, paradigm=paradigm), softmax_attention(q, k, v)[0])
    exactly(nsa(q, k, v, branch(1, q), paradigm=paradigm)[:, : 4 * L], softmax_attention(q, k, v)[0][:, : 4 * L])
    pooled = nsa(q, k, v, branch(0, q), paradigm=paradigm)
    assert not pooled[:, : L - 1].any()  # no block is complete
    exactly(pooled[:, L - 1], v[:, :L].mean(1).repeat_interleave(H // G, dim=1))  # the first is, at its last token


@every_paradigm
def test_nsa_heads_of_a_group_share_chosen_tokens(paradigm):
    q, k, v = inputs(40)
    chosen = nsa(q, k, v, branch(1, q), paradigm=paradigm).unflatten(2, (G, H // G)) > 0
    assert torch.equal(chosen[:, :, :, 0], chosen[:, :, :, 1])
    assert not torch.equal(chosen[:, :, 0], chosen[:, :, 1])
    token = torch.arange(40)
    own = token // L
    for forced in (own * 0, own, (own - 1).clamp(min=0)):  # every token of these blocks up to the query is read
        read = (forced[:, None] == token // L) & (token <= token[:, None])
        assert chosen[0, :, :, 0][read[:, None].expand(-1, G, -1)].all()


@every_paradigm
def test_larger_topk_of_nsa_chooses_a_superset_of_blocks(paradigm):
    q, k, v = inputs(40, seed=3)
    options = {"paradigm": paradigm}
    chosen = [nsa(q, k, v, branch(1, q), topk=topk, **options) > 0 for topk in range(1, 11)]
    for fewer, more in pairwise(chosen):
        assert (more | ~fewer).all()


@every_paradigm
def test_nsa_restarts_at_each_document_and_sees_no_later_token(paradigm):
    q, k, v = inputs(37, batch=1)
    gates = torch.full((1, 37, H, 3), 0.5, dtype=q.dtype)
    boundaries = [0, 3, 3, 16, 37]
    packed = nsa(q, k, v, gates, paradigm=paradigm, cu_seqlens=torch.tensor(boundaries))
    for start, stop in pairwise(boundaries):
        if start < stop:
            part = [x[:, start:stop] for x in (q, k, v, gates)]
            alone = nsa(*part, paradigm=paradigm)
            exactly(packed[:, start:stop], alone)
            cut = [x[:, : (stop - start + 1) // 2] for x in part]
            exactly(nsa(*cut, paradigm=paradigm), alone[:, : cut[0].shape[1]])


def index_of(length, heads=3, width=4, batch=2, seed=7):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, heads, width), (batch, length, width), (batch, length, heads)]
    return Index(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))


def dsa(q, k, v, index, **options):
    return index_attention(q, k, v, index, **{"topk": 5, "chunk_size": 7} | options)[0]


def dsa_by_hand(q, k, v, index, topk):
    output = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            products = (index.q[b, t] @ index.k[b, : t + 1].T).relu()
            score = (index.weights[b, t, :, None] * products).sum(0).tolist()
            seen = sorted(range(t + 1), key=lambda s: (-score[s], s))[:topk]
            for h in range(q.shape[2]):
                g = h * k.shape[2] // q.shape[2]
                output[b, t, h] = (k[b, seen, g] @ q[b, t, h] / math.sqrt(K)).softmax(0) @ v[b, seen, g]
    return output


@every_paradigm
@pytest.mark.parametrize("topk", [1, 5, 40])
def test_dsa_matches_the_equations_of_its_paper(topk, paradigm):
    q, k, v = inputs(29)
    index = index_of(29)
    exactly(dsa(q, k, v, index, topk=topk, paradigm=paradigm), dsa_by_hand(q, k, v, index, topk))


@every_paradigm
def test_dsa_with_all_tokens_matches_softmax_attention(paradigm):
    q, k, v = inputs(29)
    expected, _ = softmax_attention(q, k, v)
    exactly(dsa(q, k, v, index_of(29), topk=29, paradigm=paradigm), expected)
    exactly(dsa(q, k, v, index_of(29), topk=9, paradigm=paradigm)[:, :9], expected[:, :9])


@every_paradigm
def test_scaling_or_permuting_index_heads_keeps_the_choice(paradigm):
    q, k, v = inputs(29)
    index = index_of(29)
    expected = dsa(q, k, v, index, paradigm=paradigm)
    order = torch.tensor([2, 0, 1])
    others = [
        index._replace(k=3.7 * index.k),
        index._replace(weights=0.01 * index.weights),
        index._replace(q=index.q[:, :, order], weights=index.weights[:, :, order]),
    ]
    for other in others:
        assert torch.equal(dsa(q, k, v, other, paradigm=paradigm), expected)
    assert not torch.equal(dsa(q, k, v, index._replace(k=-index.k), paradigm=paradigm), expected)


@every_paradigm
def test_larger_topk_of_dsa_chooses_a_superset_of_tokens(paradigm):
    q, k, v = inputs(29)
    chosen = [dsa(q, k, v, index_of(29), topk=topk, paradigm=paradigm) > 0 for topk in (1, 2, 7, 8, 29)]
    assert torch.equal(chosen[0].sum(-1), torch.ones(2, 29, H, dtype=torch.int64))
    for fewer, more in pairwise(chosen):
        assert (more | ~fewer).all()


@every_paradigm
def test_moba_with_one_token_blocks_agrees_with_dsa(paradigm):
    """MoBA with blocks of one token and DSA indexed by the attention's own queries and keys rank the same products."""
    q, k, v = (x[:, :, :1] for x in inputs(29))
    index = Index(torch.cat((q, -q), dim=2), k[:, :, 0], torch.tensor([1.0, -1.0]).double().expand(2, 29, 2))
    by_index = dsa(q, k, v, index, topk=4, paradigm=paradigm) > 0
    by_block, _ = block_attention(q, k, v, block_size=1, topk=4, paradigm=paradigm, chunk_size=7)
    by_block = by_block > 0
    own = torch.eye(29, dtype=torch.bool)[:, None]  # which MoBA always reads, as one of its four
    assert not (by_index & ~own & ~by_block).sum(-1).gt(1).any()
    assert (by_block & ~own & ~by_index).sum() == 0


@pytest.mark.slow
@needs_fla
def test_nsa_and_dsa_match_fla():
    """The inputs avoid ties, whose order fla does not define: more blocks than the forced ones, and enough index heads
    that relu leaves a nonzero score."""
    theirs = loaded("nsa")
    q, k, v = inputs(70, dtype=torch.float32)
    options = {"block_size": L, "scale": K**-0.5}
    pooled = [x.unflatten(1, (-1, L)).mean(2) for x in (k[:, :68], v[:, :68])]
    means, _ = theirs.naive_nsa_compression(q, *pooled, **options)
    agree(nsa(q, k, v, branch(0, q)), means)
    indices = theirs.naive_nsa_topk(q, torch.nn.functional.pad(pooled[0], (0, 0, 0, 0, 0, 1)), 5, **options)
    agree(nsa(q, k, v, branch(1, q), topk=5), theirs.naive_nsa_selection(q, k, v, indices, **options))
    index = Index(*(x.float() for x in index_of(70, heads=32)))
    agree(dsa(q, k, v, index), loaded("dsa").naive_dsa(q, k, v, *index, topk=5))
