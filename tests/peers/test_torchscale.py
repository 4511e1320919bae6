"""Retention against its authors' code (torchscale 0.3.0): a layer in each of its modes, and where the modes differ.

Its rotations, decays and head norm are rounded to float32, so the tolerance is 1e-5.
"""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from peers.torchscale_modules import torchscale_classes
from torch import nn
from torch.testing import assert_close
from transformer_models import mixer_weights

from seqmix.interop.convert.torchscale import TorchscaleRetNet
from seqmix.mixers import Paradigm
from seqmix.mixers.parts.rotary import frequencies
from seqmix.mixers.retention import RetentionConfig, row_scale

# not importorskip: it would also skip where torchscale is installed and its import fails
pytestmark = pytest.mark.skipif(find_spec("torchscale") is None, reason="needs pip install --no-deps torchscale")

PARADIGMS = list(Paradigm)
MODES = ["parallel", "recurrent", "chunk"]
D_MODEL, N_HEADS, LENGTH, CHUNK = 64, 4, 48, 16

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def torchscale():
    return torchscale_classes()


class Pair:
    """Their layer and ours with the same weights, and an input with an upstream gradient.

    The gain is on their initial weights: without it no sum of scores reaches 1, where the third normaliser begins.
    """

    def __init__(self, torchscale, *, eps=0.0, gain=4.0, normed=True, n_heads=N_HEADS):
        torch.manual_seed(0)
        names = {"decoder_embed_dim": D_MODEL, "decoder_retention_heads": n_heads, "recurrent_chunk_size": CHUNK}
        args = torchscale.Config(**names, layernorm_eps=eps)
        self.rel_pos = torchscale.RelPos(args).double()
        self.theirs = torchscale.Retention(args, D_MODEL, 3 * D_MODEL // 2, n_heads).double()
        norm = {"head_norm": "rms" if normed else "none", "norm_eps": eps}
        config = RetentionConfig(n_heads=n_heads, expand_v=1.5, chunk_size=CHUNK, **norm)
        self.ours = config.build(D_MODEL, layer_idx=0, n_layers=1).double()
        with torch.no_grad():
            for name in "qkvg":
                getattr(self.theirs, f"{name}_proj").weight.mul_(gain)
        layout = TorchscaleRetNet().block(SimpleNamespace(mixer=self.ours))
        self.ours.load_state_dict(mixer_weights(layout, self.ours, self.theirs.state_dict(), "retention"))
        if not normed:
            self.theirs.group_norm = nn.Identity()
        self.x, self.dy = torch.randn(2, 2, LENGTH, D_MODEL, dtype=torch.float64)

    def their_mode(self, mode, x):
        if mode == "recurrent":
            return self.recurrent(x)[0]
        chunked = mode == "chunk"
        return self.theirs(x, self.rel_pos(x.shape[1], chunkwise_recurrent=chunked), chunkwise_recurrent=chunked)

    def recurrent(self, x):
        """Their output, and their last state as ours: theirs is divided by sqrt(sum of decays) and has scaled keys."""
        state, outputs = {}, []
        for t in range(x.shape[1]):
            outputs.append(self.theirs(x[:, t : t + 1], self.rel_pos(t + 1, activate_recurrent=True), False, state))
        memory = state["prev_key_value"] * state["scale"].sqrt()[:, None, None] / self.theirs.scaling
        return torch.cat(outputs, dim=1), memory.transpose(2, 3)

    def with_gradient(self, function):
        x = self.x.clone().requires_grad_()
        y = function(x)
        y.backward(self.dy)
        return y.detach(), x.grad


def agree(actual, expected):
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_output_gradient_and_state_match_torchscale_modes(torchscale, paradigm, mode):
    pair = Pair(torchscale)
    ours = pair.with_gradient(lambda x: pair.ours(x, paradigm=paradigm)[0])
    agree(ours, pair.with_gradient(lambda x: pair.their_mode(mode, x)))
    if mode == "recurrent":
        with torch.no_grad():
            state = pair.ours(pair.x, paradigm=paradigm, return_state=True)[1]
            agree(state.memory, pair.recurrent(pair.x)[1])


@pytest.mark.parametrize("paradigm", PARADIGMS)
@torch.no_grad()
def test_packed_documents_match_torchscale_run_per_document(torchscale, paradigm):
    pair = Pair(torchscale, normed=False)  # the norm would hide a position that is off
    y, _ = pair.ours(pair.x[:1], paradigm=paradigm, cu_seqlens=torch.tensor([0, 20, LENGTH]))
    documents = pair.x[:1].split([20, LENGTH - 20], dim=1)
    agree(y, torch.cat([pair.their_mode("recurrent", x) for x in documents], dim=1))


def test_rotation_and_row_normaliser_match_torchscale(torchscale):
    pair = Pair(torchscale)
    (sin, _), mask = pair.rel_pos(LENGTH)
    n = torch.arange(LENGTH)
    theta = frequencies(D_MODEL // N_HEADS, "retnet", 10000.0, n.device).repeat_interleave(2)
    agree((n[:, None] * theta).sin(), sin)
    decay = (pair.ours.decay(CPU)[:, None, None] * (n[:, None] - n)).exp().tril()
    agree(decay * row_scale(n[None], pair.ours.decay(CPU))[0].transpose(0, 1), mask)


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_without_head_norm_only_torchscale_recurrent_mode_matches(torchscale, paradigm):
    # their parallel mode also divides by max(|sum of scores|, 1), which no recurrence can form; their chunks also
    # count a row's decays from the start of its chunk
    pair = Pair(torchscale, normed=False)
    ours = pair.with_gradient(lambda x: pair.ours(x, paradigm=paradigm)[0])
    agree(ours, pair.with_gradient(lambda x: pair.their_mode("recurrent", x)))
    for mode in ("parallel", "chunk"):
        with pytest.raises(AssertionError, match="not close"):
            agree(ours[0], pair.their_mode(mode, pair.x))


@torch.no_grad()
def test_nonzero_eps_changes_torchscale_chunks_but_not_ours(torchscale):
    # at their initial weights a head's mean square is near eps, and their chunks scale it before the norm
    pair = Pair(torchscale, eps=1e-6, gain=1.0)
    theirs = {mode: pair.their_mode(mode, pair.x) for mode in MODES}
    agree(theirs["recurrent"], theirs["parallel"])
    with pytest.raises(AssertionError, match="not close"):
        assert_close(theirs["chunk"], theirs["parallel"], rtol=1e-2, atol=1e-2 * theirs["parallel"].abs().max().item())
    for paradigm in PARADIGMS:
        agree(pair.ours(pair.x, paradigm=paradigm)[0], theirs["parallel"])


def test_torchscale_heads_beyond_the_20th_do_not_decay(torchscale):
    # 1 - 2^-25 is 1 in float32
    pair = Pair(torchscale, n_heads=32)
    agree(pair.ours.decay(CPU), pair.rel_pos.decay)
    assert (pair.rel_pos.decay < 0).tolist() == [True] * 20 + [False] * 12
    assert (pair.ours.decay(CPU) < 0).all()
