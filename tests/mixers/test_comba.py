"""Comba with no feedback, with full feedback, and with very strong decays."""

import pytest
import torch
from mixer_formulas import assert_follows, build, exactly, tokens, written_out

from seqmix.mixers import comba
from seqmix.ops.decay import decay
from seqmix.ops.delta import delta

every_paradigm = pytest.mark.parametrize("paradigm", ["recurrent", "chunkwise"])


def recorded(mixer, x, paradigm, monkeypatch):
    """Inputs of the op in the layer: queries, written keys, values and log-decays; and the op's result."""
    calls, op = [], comba.dplr

    def dplr(q, k, v, a, b, log_decay, call):
        calls.append((q, k, v, log_decay, *op(q, k, v, a, b, log_decay, call)))
        return calls[-1][4:]

    monkeypatch.setattr(comba, "dplr", dplr)
    mixer(x, paradigm=paradigm, return_state=True)
    return calls[0]


@every_paradigm
def test_comba_without_feedback_matches_the_decay_op(paradigm, monkeypatch):
    mixer = build("comba", output_feedback=None)
    torch.nn.init.constant_(mixer.feedback, -torch.inf)
    q, k, v, log_decay, *result = recorded(mixer, tokens(11), paradigm, monkeypatch)
    exactly(tuple(result), tuple(decay(q, k, v, log_decay, paradigm=paradigm, output_final_state=True)))


@every_paradigm
def test_comba_with_full_feedback_and_no_decay_matches_the_delta_rule(paradigm, monkeypatch):
    mixer, x = build("comba", output_feedback=None), tokens(11)
    torch.nn.init.constant_(mixer.feedback, torch.inf)
    torch.nn.init.constant_(mixer.decay.A_log, -torch.inf)
    q, _, v, _, *result = recorded(mixer, x, paradigm, monkeypatch)
    h = mixer.project(x, comba.Call.of(paradigm, 11))
    rule = delta(q, h.k, v, h.more["beta"].sigmoid(), paradigm=paradigm, output_final_state=True)
    exactly(tuple(result), tuple(rule))


@pytest.mark.parametrize("rate", [30.0, 1e4])
def test_strong_decays_match_written_out_formulas(rate):
    mixer = build("comba", expand_v=1.0)
    with torch.no_grad():
        mixer.decay.A_log[::2] = torch.tensor(rate).log()  # decays of e^-20 and less, and others
        mixer.decay.dt_bias.fill_(0.5)
    assert_follows(mixer, written_out, tokens(11))
