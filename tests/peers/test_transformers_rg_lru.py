"""RG-LRU against the recurrent block of transformers (5.24): outputs, gradients, and decoding with its cache."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from mixer_formulas import exactly

from seqmix.mixers.rg_lru import RGLRUConfig
from seqmix.ops.scan import SCAN_PARADIGMS

# not importorskip: it would also skip where transformers is installed and its import fails
if find_spec("transformers") is None:
    pytest.skip("needs pip install transformers", allow_module_level=True)

from transformers import RecurrentGemmaConfig
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

every_paradigm = pytest.mark.parametrize("paradigm", sorted(SCAN_PARADIGMS))
LENGTH, D_MODEL, HEADS = 30, 12, 3


def their_weights(theirs):
    """Parameters by our names, as functions of theirs: what gates and branches have is one tensor here."""
    lru, join = theirs.rg_lru, torch.cat
    names = {"in_proj": (theirs.linear_x, theirs.linear_y), "out_proj": (theirs.linear_out,)}
    weights = {f"{name}.{part}": join([getattr(x, part) for x in of]) for name, of in names.items() for part in PARTS}
    weights |= {"convolution.weight": theirs.conv_1d.weight[:, 0], "convolution.bias": theirs.conv_1d.bias}
    weights["gate_weight"] = join([lru.recurrent_gate_weight, lru.input_gate_weight], -1)
    weights["gate_bias"] = join([lru.recurrent_gate_bias, lru.input_gate_bias], -1)
    return weights | {"rate": lru.recurrent_param}


PARTS = ("weight", "bias")


@pytest.fixture
def layers():
    """Their layer, whose scan adds in float32 unless it is asked for more, and ours with the same weights."""
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(hidden_size=D_MODEL, lru_width=D_MODEL, num_attention_heads=HEADS)
    theirs = RecurrentGemmaRecurrentBlock(config, 0).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    theirs.rg_lru._rnn_scan = partial(theirs.rg_lru._rnn_scan, acc_dtype=torch.float64)
    ours = RGLRUConfig(n_heads=HEADS, chunk_size=8).build(D_MODEL, layer_idx=0, n_layers=1).double()
    ours.load_state_dict(their_weights(theirs))
    return theirs, ours


def whole(theirs, x):
    return theirs(x, torch.arange(x.shape[1])[None], None, use_cache=False)[0]


@every_paradigm
def test_output_and_gradients_match_transformers(layers, paradigm):
    theirs, ours = layers
    x, dy = torch.randn(2, 2, LENGTH, D_MODEL, dtype=torch.float64)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, their_y = ours(mine, paradigm=paradigm)[0], whole(theirs, other)
    exactly(y, their_y)
    exactly(*(torch.autograd.grad(*of, dy, retain_graph=True) for of in ((y, mine), (their_y, other))))
    y.backward(dy)
    their_y.backward(dy)
    # the gradients of theirs, joined as their weights are
    for parameter in theirs.parameters():
        parameter.data.copy_(parameter.grad)
    wanted = their_weights(theirs)
    for name, parameter in ours.named_parameters():
        exactly(parameter.grad, wanted[name])


@every_paradigm
@torch.no_grad()
def test_prompt_and_decoding_steps_match_transformers_with_cache(layers, paradigm):
    theirs, ours = layers
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64)
    exactly(ours(x, paradigm=paradigm)[0], whole(theirs, x))
    y, state = ours(x[:, :20], paradigm=paradigm, return_state=True)
    exactly(y, theirs(x[:, :20], torch.arange(20)[None], None)[0])
    for t in range(20, LENGTH):
        y, state = ours.step(x[:, t : t + 1], state)
        exactly(y, theirs(x[:, t : t + 1], torch.tensor([[t]]), None)[0])
    exactly(state.memory, theirs.rg_lru.recurrent_states)
    exactly(state.recent.mT, theirs.conv1d_state)


@every_paradigm
@torch.no_grad()
def test_packed_documents_match_transformers_run_per_document(layers, paradigm):
    theirs, ours = layers
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64)
    packed, _ = ours(x.reshape(1, -1, D_MODEL), paradigm=paradigm, cu_seqlens=torch.tensor([0, LENGTH, 2 * LENGTH]))
    exactly(packed, whole(theirs, x).reshape(1, -1, D_MODEL))
