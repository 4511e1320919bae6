"""`adapt` makes any module checkable: its features are tested, missing ones skipped with a reason, errors caught."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seqmix import ContractError, SeqmixError
from seqmix.cli.commands.check import mixers_of
from seqmix.testing import Status, adapt, check_mixer
from seqmix.testing.adapters.op import adapt_op


class Convolution(nn.Module):
    """Causal, but for the tokens that leak."""

    def __init__(self, d_model, leak=0):
        super().__init__()
        self.leak, self.conv = leak, nn.Conv1d(d_model, d_model, 4)

    def forward(self, x):
        return self.conv(F.pad(x.mT, (3 - self.leak, self.leak))).mT


class Hidden(NamedTuple):
    h: torch.Tensor


def call(gru, x, state, *_):
    y, h = gru(x, None if state is None else state.h[None])
    return y, Hidden(h[0])


def gru(call=call):
    return adapt(
        lambda d_model: nn.GRU(d_model, d_model, batch_first=True),
        call=call,
        state=lambda gru, batch_size: Hidden(gru.weight_hh_l0.new_zeros(batch_size, gru.hidden_size)),
        traits={"compiles": False},
        kind="GRU",
    )


def ends(config, **options):
    report = check_mixer(config, examples=30, compiles=False, shrink=False, **options)
    return {status: {o.check.name for o in report.outcomes if o.status is status} for status in Status}


def test_stateless_module_runs_only_the_checks_that_apply():
    found = ends(adapt(Convolution))
    assert found[Status.FAILED] == set()
    assert {"the_future_changes_nothing", "rows_are_independent", "gradients_are_derivatives"} <= found[Status.PASSED]
    assert {"pieces_equal_the_whole", "flops_are_as_declared", "dtypes_are_kept"} - found[Status.PASSED] == {
        "pieces_equal_the_whole",
        "flops_are_as_declared",
    }
    assert not {name for name in found[Status.PASSED] if "state" in name or name.startswith("every_option")}


def test_every_skip_gives_a_reason():
    outcomes = check_mixer(adapt(Convolution(8), d_model=8), examples=1, compiles=False).outcomes
    reasons = {outcome.check.name: outcome.reason for outcome in outcomes if outcome.status is Status.SKIPPED}
    assert reasons["steps_equal_the_whole"] == "traits.state is none"
    assert reasons["documents_are_sequences"] == "traits.packing is False"
    assert reasons["every_parameter_is_initialised"] == "Convolution has no reset_parameters"
    assert reasons["flops_are_as_declared"] == "flops is not declared"
    assert reasons["configurations_round_trip"] == "YAML cannot describe a module that adapt was given"
    assert all(reasons.values())


def test_module_with_a_state_passes_the_decoding_checks():
    found = ends(gru())
    # in 16 bits it rounds what it remembers at every token
    assert found[Status.FAILED] == {"dtypes_are_kept"}
    assert {"pieces_equal_the_whole", "steps_equal_the_whole", "a_state_survives_the_disk"} <= found[Status.PASSED]


def forgets(gru, x, state, *_):
    return call(gru, x, state if x.shape[1] == 1 else None)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (adapt(lambda d_model: Convolution(d_model, leak=1), kind="leaky"), "the_future_changes_nothing"),
        (gru(forgets), "pieces_equal_the_whole"),
        (adapt(nn.Linear(8, 8), d_model=8, call=lambda f, x, *_: (f(x) + x.mean(0), None)), "rows_are_independent"),
        (adapt(Convolution, traits={"packing": True}), "documents_are_sequences"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_wrong_module_fails_its_check(config, name):
    (outcome,) = check_mixer(config, checks=[name], examples=20, shrink=False).outcomes
    assert outcome.status is Status.FAILED
    assert f"config = adapt({config.kind}, ...)" in outcome.script


def decayed(q, k, v, g, initial_state=None, output_final_state=False):
    s = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]) if initial_state is None else initial_state.to(q.dtype)
    o = []
    for t in range(q.shape[1]):
        s = s * g[:, t, :, None, None].exp() + k[:, t, ..., None] * v[:, t, :, None]
        o.append((q[:, t, :, None] @ s)[:, :, 0])
    return torch.stack(o, dim=1), s


def test_adapted_op_is_wrapped_in_projections_and_checked():
    names = ["paradigms_agree", "pieces_equal_the_whole", "gradients_are_derivatives", "the_future_changes_nothing"]
    assert check_mixer(adapt_op(decayed, gates={"g": F.logsigmoid}, state=True), checks=names, examples=4).passed
    bidirectional = adapt_op(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, kind="heads")  # over heads, not tokens
    assert check_mixer(bidirectional, checks=["the_future_changes_nothing"], examples=4).passed


def test_internal_rounding_does_not_fail_a_module():
    class InFloat32(Convolution):
        def forward(self, x):
            return super().forward(x).float().tanh().to(x.dtype)

    assert check_mixer(adapt(InFloat32), checks=["gradients_are_derivatives", "rows_are_independent"]).passed


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: adapt(Convolution(8)), "needs d_model= if it gets a module"),
        (lambda: adapt(Convolution, traits={"pakking": True}), "no trait 'pakking'.*did you mean \"packing\""),
        (lambda: adapt(Convolution, traits={"state": "growing"}), "traits.state 'growing': pass state="),
        (lambda: check_mixer(adapt(lambda d: 3)), "expected an nn.Module to adapt, got 3"),
        (lambda: check_mixer(adapt(lambda d: nn.GRU(d, d))), "got tuple, NoneType: pass call= to adapt"),
        (lambda: check_mixer(adapt(Convolution(8), d_model=8), d_model=12), "d_model = 8, got 12"),
        (lambda: adapt(Convolution).build(8, layer_idx=0, n_layers=1).init_state(2), "no state"),
    ],
)
def test_invalid_adaptations_raise(make, words):
    with pytest.raises(SeqmixError, match=words):
        make()


def test_command_accepts_modules_and_adapted_configs(tmp_path, monkeypatch):
    (tmp_path / "strangers.py").write_text(
        "from torch import nn\nfrom seqmix.testing import adapt\n"
        "class Layer(nn.Linear):\n    def __init__(self, d):\n        super().__init__(d, d)\n"
        "config = adapt(Layer, kind='mine')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, kind in (("Layer", "Layer"), ("config", "mine")):
        (config,), vary = mixers_of(f"strangers:{name}")
        assert (config.kind, vary) == (kind, False)
    with pytest.raises(SeqmixError, match="--config is for classes of transformers"):
        mixers_of("retention", [], "{}")
    with pytest.raises(ContractError, match="mine has no state"):
        mixers_of("strangers:config")[0][0].build(8, layer_idx=0, n_layers=1)(torch.ones(1, 2, 8), return_state=True)
