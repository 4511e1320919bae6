"""Mixers that select keys: they match softmax attention when they select all keys. Also DSA's indexer loss."""

import math

import pytest
import torch

from seqmix import build_model, load_config
from seqmix.mixers import LayerCall, Paradigm
from seqmix.mixers.attention import AttentionConfig
from seqmix.mixers.base.traits import ContractError
from seqmix.mixers.dsa import DsaConfig
from seqmix.mixers.latent_attention import LatentAttentionConfig
from seqmix.mixers.latent_dsa import LatentDsaConfig
from seqmix.mixers.moba import MobaConfig

every_paradigm = pytest.mark.parametrize("paradigm", list(Paradigm))
D_MODEL, T = 24, 21
HEADS = {"n_heads": 4, "n_kv_heads": 2, "qk_norm": "rms", "gate": "sigmoid"}
DSA = {"topk": 6, "index_heads": 3, "index_dim": 8, "chunk_size": 8}


def build(config):
    torch.manual_seed(0)
    return config.build(D_MODEL, layer_idx=0, n_layers=1).double()


def tokens(length=T):
    return torch.randn(2, length, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@every_paradigm
@pytest.mark.parametrize(
    ("config", "of"),
    [
        (MobaConfig(**HEADS, block_size=4, topk=6), AttentionConfig(**HEADS)),
        (DsaConfig(**HEADS, topk=T, index_heads=2, index_dim=4), AttentionConfig(**HEADS)),
        (LatentDsaConfig(n_heads=3, topk=T, index_heads=2, index_dim=4), LatentAttentionConfig(n_heads=3)),
    ],
    ids=["moba", "dsa", "latent_dsa"],
)
def test_sparse_attention_matches_softmax_attention_when_all_keys_are_selected(config, of, paradigm):
    """Parameters have the same names as in attention, so the two can be swapped in a trained model."""
    mixer, attention = build(config), build(of)
    missing = attention.load_state_dict(mixer.state_dict(), strict=False).missing_keys
    assert not missing
    x = tokens()
    torch.testing.assert_close(mixer(x, paradigm=paradigm)[0], attention(x)[0], rtol=1e-10, atol=1e-10)


def test_incompatible_fields_raise():
    with pytest.raises(ValueError, match="n_kv_heads must divide n_heads = 4, got 3: choose one of"):
        MobaConfig(n_heads=4, n_kv_heads=3)
    with pytest.raises(ValueError, match="latent_dsa chooses among all tokens, got a window"):
        LatentDsaConfig(n_heads=2, window=4)
    with pytest.raises(ContractError, match="even head_dim, got 3: set head_dim, or positions = none"):
        MobaConfig(n_heads=8).build(D_MODEL, layer_idx=0, n_layers=1)


def loss_by_hand(mixer, x):
    """The divergence of the paper, token by token, from the mixer's projections."""
    q, k, _ = mixer.in_proj(x).split([block.rows for block in mixer.row_blocks], dim=-1)
    q, k = (y.unflatten(-1, (-1, mixer.head_dim)) for y in (q, k))
    index = mixer.indexer.proj(x).split([block.rows for block in mixer.indexer.row_blocks], dim=-1)
    index_q = index[0].unflatten(-1, (mixer.indexer.n_heads, -1))
    index_k = mixer.indexer.key_norm(index[1])
    scale = (mixer.indexer.n_heads * mixer.indexer.width) ** -0.5
    total = 0.0
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            scores = (index[2][b, t, :, None] * (index_q[b, t] @ index_k[b, : t + 1].T).relu()).sum(0) * scale
            seen = sorted(range(t + 1), key=lambda s: (-scores[s].item(), s))[: mixer.config.topk]
            weights = [(k[b, seen, h] @ q[b, t, h] / math.sqrt(mixer.head_dim)).softmax(0) for h in range(q.shape[2])]
            p = torch.stack(weights).mean(0).detach()
            total = total + (p * (p.log() - scores[seen].log_softmax(0))).sum()
    return total


@every_paradigm
def test_indexer_loss_and_gradients_match_the_paper(paradigm):
    mixer = build(DsaConfig(n_heads=2, positions="none", **DSA))
    x = tokens()
    expected = loss_by_hand(mixer, x)
    learned = list(mixer.indexer.parameters())
    gradients = torch.autograd.grad(expected, learned)
    call = LayerCall(paradigm=paradigm, return_loss=True)
    whole = mixer(x, call=call).loss
    first = mixer(x[:, :9], call=call._replace(return_state=True))
    pieces = first.loss + mixer(x[:, 9:], call=call._replace(state=first.state)).loss
    boundaries = torch.tensor([0, T, 2 * T])
    packed = mixer(x.flatten(0, 1)[None], call=call._replace(cu_seqlens=boundaries)).loss
    for loss in (whole, pieces, packed):
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, learned), gradients)


@every_paradigm
@pytest.mark.parametrize("config", [DsaConfig(**HEADS, **DSA), LatentDsaConfig(n_heads=3, q_lora_rank=7, **DSA)])
def test_indexer_loss_trains_only_the_indexer(config, paradigm):
    mixer = build(config)
    x = tokens().requires_grad_()
    result = mixer(x, call=LayerCall(paradigm=paradigm, return_loss=True))
    names, parameters = zip(("x", x), *mixer.named_parameters(), strict=True)
    of_output = torch.autograd.grad(result.y.square().sum(), parameters, retain_graph=True, allow_unused=True)
    of_loss = torch.autograd.grad(result.loss, parameters, allow_unused=True)
    for name, first, second in zip(names, of_output, of_loss, strict=True):
        of_indexer = name.startswith("indexer.")
        assert (first is not None and bool(first.any())) != of_indexer, name
        assert (second is not None and bool(second.any())) == of_indexer, name


def small_model():
    return build_model(load_config("dsa-tiny", ["model.d_model=32", "model.n_layers=2"]).model, seed=0)


@pytest.mark.parametrize("checkpointing", [True, "matmuls"])
def test_activation_checkpointing_keeps_gradients_of_the_indexer_loss(checkpointing):
    inputs = torch.randint(257, (2, 100), generator=torch.Generator().manual_seed(0))
    gradients = []
    for setting in (False, checkpointing):
        model = small_model()
        model.activation_checkpointing = setting
        losses = []
        loss = model(inputs, targets=inputs, losses=losses).loss
        assert len(losses) == 2
        (loss + sum(losses)).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])
    assert all(gradient is not None for gradient in gradients[0].values())
