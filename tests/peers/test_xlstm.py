"""sLSTM against the layer of its authors' package xlstm (2.0.6), in plain torch and float64."""

from importlib.util import find_spec

import pytest
import torch
from mixer_formulas import exactly

from seqmix.mixers.slstm import SLSTMConfig

# not importorskip: it would also skip where xlstm is installed and its import fails
if find_spec("xlstm") is None:
    pytest.skip("needs pip install --no-deps xlstm==2.0.6 dacite omegaconf", allow_module_level=True)

from xlstm.blocks.slstm.layer import sLSTMLayer, sLSTMLayerConfig

LENGTH, D_MODEL, HEADS = 20, 12, 3
GATES = "ifzo"


@pytest.fixture
def layers():
    """Their layer, and ours with the same weights."""
    torch.manual_seed(0)
    config = sLSTMLayerConfig(
        embedding_dim=D_MODEL,
        num_heads=HEADS,
        backend="vanilla",
        dtype="float32",
        enable_automatic_mixed_precision=False,
    )
    theirs = sLSTMLayer(config).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    ours = SLSTMConfig(n_heads=HEADS).build(D_MODEL, layer_idx=0, n_layers=1).double()
    cell, width = theirs.slstm_cell, D_MODEL // HEADS
    # their layer calls the weights of the input gate fgate, and those of the forget gate igate
    named = {"i": theirs.fgate, "f": theirs.igate, "z": theirs.zgate, "o": theirs.ogate}
    ours.load_state_dict(
        {
            "gate_weight": torch.cat([named[gate].weight.mT for gate in GATES], -1),
            "recurrent_weight": cell._recurrent_kernel_int2ext(cell._recurrent_kernel_).reshape(HEADS, width, -1),
            "gate_bias": cell._bias_int2ext(cell._bias_).reshape(HEADS, -1),
            "convolution.weight": theirs.conv1d.conv.weight[:, 0],
            "convolution.bias": theirs.conv1d.conv.bias,
            "norm.weight": (1 + theirs.group_norm.weight).view(HEADS, -1),
        }
    )
    return theirs, ours


def test_output_and_input_gradient_match_xlstm_package(layers):
    theirs, ours = layers
    x, dy = torch.randn(2, 2, LENGTH, D_MODEL, dtype=torch.float64)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, their_y = ours(mine)[0], theirs(other)
    exactly(y, their_y)
    exactly(*(torch.autograd.grad(*of, dy) for of in ((y, mine), (their_y, other))))


@torch.no_grad()
def test_decoding_steps_match_xlstm_package(layers):
    theirs, ours = layers
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64)
    state, their_state = ours.init_state(2), {}
    for t in range(LENGTH):
        y, state = ours.step(x[:, t : t + 1], state)
        their_y, their_state = theirs.step(x[:, t : t + 1], **their_state)
        exactly(y, their_y)
