"""Preconditioned delta rules: the factors of keys, and the plain delta rule when they are 1."""

import pytest
import torch
from mixer_formulas import build, exactly, tokens

from seqmix.mixers import MIXERS
from seqmix.mixers.parts import Call

every_kind = pytest.mark.parametrize("kind", ["gated_delta_net", "kda"])


@every_kind
@pytest.mark.parametrize("paradigm", ["recurrent", "chunkwise"])
def test_factors_of_one_match_the_mixer_without_preconditioner(kind, paradigm):
    plain, preconditioned = build(kind), build(kind, precondition=1.0)
    ours = preconditioned.state_dict()
    rows = plain.in_proj.weight.shape[0]  # those of the curvature follow
    ours["in_proj.weight"] = ours["in_proj.weight"][:rows]
    plain.load_state_dict({name: x for name, x in ours.items() if not name.startswith("preconditioner")})
    x = tokens(11)
    y, state = preconditioned(x, paradigm=paradigm, return_state=True)
    expected, plain_state = plain(x, paradigm=paradigm, return_state=True)
    exactly((y, state.memory, state.recent), (expected, plain_state.memory, plain_state.recent))


@every_kind
def test_frequently_written_dimensions_get_smaller_factors(kind):
    scaled = build(kind, precondition=1.5).preconditioner
    k = torch.tensor([3.0, 1.0, 0.1, 0.0]).double().expand(1, 40, 3, 4)
    with torch.no_grad():
        scaled.decay.A_log.fill_(-torch.inf)  # the curvature is a sum
        logits, call = torch.zeros(1, 40, 3).double(), Call.of("chunkwise", 40, output_final_state=True)
        factors, curvature = scaled(k, logits, logits, call)
    exactly(curvature, 20 * k[:, 0] ** 2)
    assert ((factors > 1 / 1.5) & (factors < 1.5)).all()
    assert (factors.diff(dim=1)[..., :3] < 0).all()  # in time
    assert (factors.diff(dim=3) > 0).all()  # over dimensions, from many writes to none


@every_kind
@pytest.mark.parametrize(
    ("fields", "remedy"), [({"allow_neg_eigval": True}, "allow_neg_eigval = false"), ({"rotation": "rope"}, "rotation")]
)
def test_incompatible_options_raise(kind, fields, remedy):
    with pytest.raises(ValueError, match=remedy):
        MIXERS.resolve(kind)(n_heads=2, precondition=1.5, **fields)
