"""Peers have models of equal size and compute what they are timed for."""

import pytest
import torch
from torch.testing import assert_close

from seqmix import load_config
from seqmix.lab.bench.models import model_to_measure
from seqmix.lab.bench.peers import PEERS, Seqmix, Size
from seqmix.lab.bench.peers.gpt import GptEager, GptSdpa
from seqmix.lab.bench.peers.ours import Int8
from seqmix.lab.bench.peers.peer import install_hint
from seqmix.lab.bench.peers.torchscale import TorchscaleChunkwise
from seqmix.models import quantization

CPU, META = torch.device("cpu"), torch.device("meta")
ON_CPU = [kind for kind in PEERS if kind.name != "fla"]
DECODING = [kind for kind in ON_CPU if "decode" in kind.roles]


def built(kind, config, device=CPU):
    if reason := kind.unavailable_reason(Size(config), device):
        pytest.skip(reason)
    return kind(Size(config), device, torch.float32)


def names(kinds):
    return [kind.name for kind in kinds]


@pytest.mark.parametrize("kind", ON_CPU, ids=names(ON_CPU))
def test_peers_have_equal_parameter_counts(kind):
    config = model_to_measure(None, ["model.d_model=128", "model.n_layers=2"])
    assert built(kind, config).parameters == pytest.approx(Size(config).parameters, rel=0.01)


@pytest.mark.parametrize("preset", ["retnet-200m", "retnet-1.3b", "hybrid-tiny", "attention-tiny"])
def test_gpt_peer_matches_parameters_of_each_preset(preset):
    config = load_config(preset).model
    assert built(GptSdpa, config, META).parameters == pytest.approx(Size(config).parameters, rel=0.01)


@pytest.mark.parametrize("kind", DECODING, ids=names(DECODING))
@torch.no_grad()
def test_step_after_reading_a_prompt_matches_full_forward(kind, model, monkeypatch):
    monkeypatch.setattr(quantization, "MIN_WEIGHTS", 1)
    peer = built(kind, model)
    peer.module.eval()
    tokens = torch.randint(7, (2, 9))
    logits, _ = peer.step(tokens[:, 8], peer.read(tokens[:, :8]))
    # inputs of quantised products are rounded to 16 bits: over 150 seeds, logits then differ by up to 2e-4
    assert_close(logits, peer.logits(tokens)[:, -1], rtol=1e-3, atol=1e-3 if issubclass(kind, Int8) else 1e-4)
    state, token = peer.state_after(8, 2, 3), torch.ones(2, dtype=torch.int64)
    first, after = peer.step(token, state)
    peer.step(token, after)
    again, _ = peer.step(token, peer.renew(state, 8))
    assert again.shape == first.shape
    if not peer.writes_state:
        assert_close(again, first)
    weights = 4 * (peer.parameters - 32 * model.vocab_size)
    held = sum(x.nbytes for x in peer.tensors(state))
    moved = weights + (2 if peer.writes_state else 1) * held
    assert peer.moved_bytes(state) < moved if issubclass(kind, Int8) else peer.moved_bytes(state) == moved


def test_hybrid_step_counts_cache_reads_and_state_writes():
    peer = Seqmix(Size(load_config("hybrid-tiny").model), CPU, torch.float32)
    state = peer.state_after(100, 1, 3)
    held = sum(x.nbytes for x in peer.tensors(state))
    weights = 4 * (peer.parameters - 257 * 128)
    assert weights + held < peer.moved_bytes(state) < weights + 2 * held


def test_eager_attention_matches_fused_attention(model):
    torch.manual_seed(0)
    eager, fused = (kind(Size(model), CPU, torch.float32) for kind in (GptEager, GptSdpa))
    eager.module.load_state_dict(fused.module.state_dict())
    tokens = torch.randint(7, (2, 33))
    assert_close(eager.logits(tokens), fused.logits(tokens))


def test_torchscale_chunkwise_peer_enables_chunkwise_mode(model):
    chunkwise = built(TorchscaleChunkwise, model)
    assert chunkwise.module.chunkwise_recurrent
    assert chunkwise.logits(torch.ones(1, 9, dtype=torch.int64)).shape == (1, 9, model.vocab_size)


@pytest.mark.parametrize("kind", [Seqmix, GptSdpa], ids=["seqmix", "gpt-sdpa"])
def test_recomputed_activations_give_the_same_gradients(kind, model):
    torch.manual_seed(0)
    plain = kind(Size(model), CPU, torch.float32)
    anew = kind(Size(model), CPU, torch.float32)
    anew.module.load_state_dict(plain.module.state_dict())
    anew.recompute_activations()
    tokens = torch.randint(7, (2, 20))
    for peer in (plain, anew):
        peer.module.train()
        peer.loss(tokens, tokens).backward()
    for mine, theirs in zip(plain.module.parameters(), anew.module.parameters(), strict=True):
        assert_close(mine.grad, theirs.grad)


def test_unavailable_peer_explains_why():
    assert install_hint("torch", "torch") is None
    assert install_hint("nowhere.models", "nowhere-models") == (
        "nowhere-models is not installed: pip install nowhere-models"
    )
    (fla,) = (kind for kind in PEERS if kind.name == "fla")
    assert fla.unavailable_reason(Size(load_config("retnet-tiny").model), CPU) == "its kernels run on a GPU only"
