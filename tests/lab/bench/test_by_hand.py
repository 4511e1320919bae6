"""The framework adds no operations: a model from YAML runs the same ones as its layers written by hand."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqmix import load_config
from seqmix.lab.bench.peers import Size
from seqmix.lab.bench.peers.by_hand import unsupported_reason
from seqmix.lab.bench.peers.ours import ByHand, Seqmix

CPU = torch.device("cpu")


class Trace(TorchDispatchMode):
    """Every tensor operation that runs inside, backward too: its name, and the shapes and dtypes that it is given."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.operations.append((str(func), [(tuple(x.shape), x.dtype) for x in given]))
        return func(*args, **(kwargs or {}))


def traced(call):
    """What a call runs the second time: the first may form tables that are kept."""
    call()
    with Trace() as trace:
        call()
    return trace.operations


@pytest.fixture
def both(model):
    def make(config=model, *, activation_checkpointing=False):
        pair = [kind(Size(config), CPU, torch.float32) for kind in (Seqmix, ByHand)]
        for peer in pair:
            if activation_checkpointing:
                peer.recompute_activations()
        return pair

    return make


def training(peer):
    peer.module.train()
    tokens = torch.arange(80).view(2, 40) % 7

    def call():
        peer.loss(tokens, tokens).backward()
        peer.module.zero_grad()

    return call


def decoding(peer):
    peer.module.eval()
    state = peer.state_after(5, 3, 10)

    @torch.no_grad()
    def call():
        logits, after = peer.step(torch.ones(3, dtype=torch.int64), state)
        peer.step(logits.argmax(-1), after)

    return call


def prefilling(peer):
    peer.module.eval()
    tokens = torch.arange(80).view(2, 40) % 7

    @torch.no_grad()
    def call():
        peer.read(tokens)

    return call


@pytest.mark.parametrize("what", [training, decoding, prefilling])
def test_model_runs_same_operations_as_handwritten_layers(what, both):
    ours, by_hand = (traced(what(peer)) for peer in both())
    assert ours == by_hand
    assert len(ours) > 100


def test_operations_match_with_activation_checkpointing(both):
    plain = traced(training(both()[0]))
    ours, by_hand = (traced(training(peer)) for peer in both(activation_checkpointing=True))
    assert ours == by_hand
    assert len(ours) > len(plain)


@pytest.mark.parametrize("decay", ["{decay: log_uniform}", "{decay: constant, gamma: 0.9}"])
def test_operations_match_for_every_decay_schedule(decay, both):
    small = ["model.d_model=32", "model.n_layers=1", "model.blocks.ret.mixer={n_heads: 2}"]
    config = load_config("retnet-tiny", [*small, f"model.blocks.ret.mixer={decay}"]).model
    ours, by_hand = (traced(training(peer)) for peer in both(config))
    assert ours == by_hand


@pytest.mark.parametrize("what", [training, decoding, prefilling])
@pytest.mark.parametrize("part", ["mixer", "ffn", "mixer_norm"])
def test_extra_operation_is_detected(what, part, both):
    ours, by_hand = both()
    module = getattr(ours.module.blocks[1], part)
    forward = module.forward
    # adds nothing, in one operation
    module.forward = lambda x, *args, **kwargs: forward(x + 0.0, *args, **kwargs)
    assert traced(what(ours)) != traced(what(by_hand))


def test_results_match_handwritten_layers(both):
    ours, by_hand = both()
    tokens = torch.randint(7, (2, 40))
    assert_close(ours.logits(tokens), by_hand.logits(tokens), rtol=0, atol=0)
    for peer in (ours, by_hand):
        peer.loss(tokens, tokens).backward()
    for mine, theirs in zip(ours.module.parameters(), by_hand.module.parameters(), strict=True):
        assert mine.grad.abs().sum() > 0
        assert_close(mine.grad, theirs.grad, rtol=0, atol=0)
    with torch.no_grad():
        after = [peer.step(tokens[:, 0], peer.read(tokens)) for peer in (ours, by_hand)]
    # a step of the library is a native kernel, which rounds in another order
    assert_close(after[0][0], after[1][0])
    for mine, theirs in zip(ours.tensors(after[0][1]), by_hand.tensors(after[1][1]), strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize(
    "change",
    [
        "model.blocks.ret.mixer={kind: attention, n_heads: 2}",
        "model.blocks.ret.mixer.gate=none",
        "model.blocks.ret.mixer.decay=none",
        "model.blocks.ret.mixer.expand_v=1.0",
        "model.blocks.ret.mixer.paradigm=parallel",
        "model.blocks.ret.ffn={kind: swiglu, expansion: 2.0}",
        "model.blocks.ret.norm={kind: rmsnorm}",
        "model.blocks.ret.dropout=0.1",
        "model.dropout=0.1",
        "model.tie_embeddings=true",
        "model.norm={kind: rmsnorm}",
    ],
)
def test_unsupported_models_give_a_reason(change):
    assert unsupported_reason(load_config("retnet-tiny", [change]).model) is not None
