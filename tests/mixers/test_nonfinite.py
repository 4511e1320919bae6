"""NaN and infinity in one packed document: which mixers and paradigms leave the other documents unchanged."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from seqmix import Paradigm
from seqmix.mixers import MIXERS

LENGTHS = (5, 70, 3, 0, 22)  # more than a chunk; an empty one
BOUNDARIES = [0, *itertools.accumulate(LENGTHS)]
D_MODEL = 24
DECAY = ("gated_retention", "gla", "gsa", "hgrn2", "lightning", "linear_attention", "mamba2", "mamba3", "mlstm")
WITH_DECAY_OP = (*DECAY, "mesa_net", "retention", "rwkv6", "parallel_hybrid")
SPREADS = dict.fromkeys(
    ((kind, Paradigm.PARALLEL) for kind in WITH_DECAY_OP),
    "the decay op multiplies one matrix of scores of the whole row by zeros, and 0 times nan is nan",
)
"""Where it spreads to other documents, and why. docs/explanation/contract.md says the same."""

CASES = [
    (kind, paradigm)
    for kind, config in ((kind, MIXERS.resolve(kind).example()) for kind in MIXERS.built_in())
    for paradigm in Paradigm
    if config.traits.packing and paradigm in config.traits.paradigms
]


def mixed(mixer, x, state, paradigm, kept):
    """Outputs of some tokens, all final states, and gradients of these outputs."""
    x = x.clone().requires_grad_()
    y, after = mixer(x, state, cu_seqlens=torch.tensor(BOUNDARIES), paradigm=paradigm, return_state=True)
    (gradient,) = torch.autograd.grad(y[0, kept].square().sum(), x)
    return y[0, kept], pytree.tree_leaves(after), gradient[0, kept]


def from_nothing(mixer):
    """A paradigm that gives a state."""
    return next(p for p in (Paradigm.RECURRENT, Paradigm.CHUNKWISE, Paradigm.PARALLEL) if p in mixer.traits.paradigms)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "paradigm"), CASES, ids=str)
@pytest.mark.parametrize("continued", [False, True], ids=["from nothing", "from states"])
def test_nonfinite_values_stay_in_their_document_except_in_listed_cases(kind, paradigm, continued):
    torch.manual_seed(0)
    mixer = MIXERS.resolve(kind).example().build(D_MODEL, layer_idx=0, n_layers=2).eval()
    if continued and paradigm is Paradigm.PARALLEL and not mixer.traits.parallel_from_state:
        pytest.skip("the parallel paradigm takes no state")
    x = torch.randn(1, BOUNDARIES[-1], D_MODEL)
    state = None
    if continued:
        with torch.no_grad():
            _, state = mixer(torch.randn(len(LENGTHS), 3, D_MODEL), paradigm=from_nothing(mixer), return_state=True)
    spread = []
    for document, value in ((0, math.nan), (1, math.inf), (2, -math.inf), (4, math.nan)):
        spoiled = x.clone()
        spoiled[0, BOUNDARIES[document] + LENGTHS[document] // 2] = value
        kept = torch.ones(x.shape[1], dtype=torch.bool)
        kept[BOUNDARIES[document] : BOUNDARIES[document + 1]] = False
        others = [n for n in range(len(LENGTHS)) if n != document]
        expected, states, gradient = mixed(mixer, x, state, paradigm, kept)
        found, after, d_x = mixed(mixer, spoiled, state, paradigm, kept)
        if (kind, paradigm) in SPREADS:
            spread.append(bool(found.isnan().any()))
            continue
        assert_close(found, expected)
        for leaf, whole in zip(after, states, strict=True):
            assert_close(leaf[others], whole[others])
        assert_close(d_x, gradient)
    # an exception that has become none is deleted
    assert not spread or any(spread)


def test_every_listed_exception_names_an_existing_case():
    assert SPREADS.keys() <= set(CASES)
