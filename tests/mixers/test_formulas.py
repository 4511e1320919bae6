"""Mixers with queries, keys and values per head match their papers' equations with every option."""

import pytest
import torch
from mixer_formulas import assert_follows, build, tokens, written_out

from seqmix.mixers import MIXERS
from seqmix.mixers.parts import GatedNorm, QKVConfig
from seqmix.mixers.parts.scan_state import ScanConfig
from seqmix.testing.mixer.options import alternatives, changed

BUILT_IN = MIXERS.built_in()
KINDS = [kind for kind, config in BUILT_IN.items() if issubclass(config, QKVConfig)]
WIDTHS = {"expand_k": 0.5, "expand_v": 2.0}
PLAIN = {"short_conv": None, "qk_norm": "none", "rotation": "none", "gate": "none", "head_norm": "none"}
SHARED = [
    {},
    WIDTHS,
    PLAIN,
    {"short_conv": 2},
    {"short_conv": 4, "gate": "none"},
    {"qk_norm": "l2", "gate": "sigmoid"},
    {"qk_norm": "rms", "head_norm": "group", "norm_affine": True, "norm_eps": 0.1},
    {"rotation": "rope", "rotation_base": 100.0, "gate": "swish"},
    {"rotation": "retnet", "head_norm": "rms", "norm_eps": 0.01},
    {"head_norm": "none", "short_conv": 1},
    {"short_conv": 0},
]
OWN = {
    "retention": [
        {"decay": "log_uniform"},
        {"decay": "log_uniform", "n_heads": 1},
        {"decay": "constant", "gamma": 0.9},
        {"decay": "none"},
        {"learnable_decay": True},
        {"row_norm": False, "norm_eps": 0.1},
        {"expand_k": 0.25, "rotation": "none"},  # keys of 1
        {"n_heads": 6},  # and of a single pair
        {"row_norm": False, "decay": "none", **PLAIN},
    ],
    "gated_retention": [{"gate_logit_normalizer": 1.0}, {"rotation": "none", "n_heads": 4}],  # keys of 3
    "gla": [{"gate_logit_normalizer": 0.1}, {"expand_k": 1.0, "expand_v": 2.0}, {"chunk_size": 7, "gate_rank": 1}],
    "mlstm": [
        {"gate_soft_cap": 1.0},
        {"gate_soft_cap": None, "head_norm": "rms", "expand_k": 1.0},
        {"norm_affine": False, "head_norm": "none", "gate": "none"},
    ],
    "hgrn2": [{"layer_idx": 2}, {"expand_k": 0.5, "gate": "sigmoid", "chunk_size": 7}],
    "gsa": [{"n_slots": 3, "gate_logit_normalizer": 1.0}, {"n_slots": 1, "gate": "swish"}, {"chunk_size": 7}],
    "lightning": [{"schedule": "transnormer"}, {"layer_idx": 0, "n_layers": 1}, {"layer_idx": 2}],
    "linear_attention": [
        {"feature_map": "relu", "eps": 0.1},
        {"feature_map": "softmax"},
        {"denominator": False},
        {"denominator": False, "feature_map": "identity", "head_norm": "rms", "norm_eps": 0.01},
    ],
    "delta_net": [
        {"allow_neg_eigval": True},
        {"gate": "swish", "norm_eps": 0.01},
        {"update": "exact"},
        {"update": "implicit", "short_conv": None, "rotation": "rope"},
    ],
    "gated_delta_net": [
        {"allow_neg_eigval": True},
        {"n_heads": 6, "n_qk_heads": 3, "rotation": "rope"},
        {"expand_k": 0.75, "expand_v": 1.5},
        {"precondition": 2.0, "n_heads": 6, "n_qk_heads": 3},
    ],
    "kda": [
        {"n_heads": 4, "n_qk_heads": 2, "gate_bias": True},
        {"allow_neg_eigval": True, "gate_rank": 2},
        {"expand_k": 0.75, "expand_v": 1.5, "gate": "swish"},
        {"decay_lower_bound": -2.0},
        {"precondition": 1.5, "expand_v": 1.5},
    ],
    "comba": [
        {"n_heads": 6, "n_qk_heads": 3, "rotation": "rope"},
        {"output_feedback": None, "expand_k": 0.75, "expand_v": 1.5},
        {"output_feedback": 0.02, "gate": "swish"},
    ],
    "delta_product": [{"n_steps": 3, "forget_gate": False}, {"allow_neg_eigval": False, **WIDTHS}, {"n_steps": 1}],
    "mesa_net": [{"min_ridge": 0.01, "iterations": 40}, {"n_heads": 2, "chunk_size": 5}],
    "gated_delta_net2": [
        {"allow_neg_eigval": True, "gate_rank": 2},
        {"decay_lower_bound": -5.0, "expand_k": 0.75, "expand_v": 1.5},
    ],
}
REFUSED = {
    *(("hgrn2", name) for name in ("qk_norm", "rotation", "rotation_base")),
    *(("gla", name) for name in ("rotation", "rotation_base")),
    *(
        (kind, "qk_norm")
        for kind in ("delta_net", "gated_delta_net", "kda", "gated_delta_net2", "comba", "delta_product", "mesa_net")
    ),
    *((kind, name) for kind in ("kda", "gated_delta_net2", "mesa_net") for name in ("rotation", "rotation_base")),
}
"""Options with a single value; the reason stands beside the field."""


def cases():
    for kind in KINDS:
        for fields in [*SHARED, *OWN[kind]]:
            given = {name: value for name, value in fields.items() if (kind, name) not in REFUSED}
            if kind == "linear_attention" and given.get("rotation", "none") != "none":
                given["denominator"] = False
            if given or not fields:
                yield pytest.param(kind, given, id=f"{kind} {given}")


ELSEWHERE = {
    "attention",
    "channel_mix",
    "dsa",
    "hyena",
    "latent_attention",
    "latent_dsa",
    "log_linear",
    "m2rnn",
    "mamba2",
    "mamba3",
    "moba",
    "nsa",
    "parallel_hybrid",
    "path_attention",
    "rwkv6",
    "rwkv7",
    "slstm",
    "titans",
    "ttt",
}
"""What has tests of its own, as the mixers of the scan family have."""


def test_every_built_in_mixer_of_the_family_has_cases():
    scans = {kind for kind, config in BUILT_IN.items() if issubclass(config, ScanConfig)}
    assert set(OWN) == set(KINDS) == set(BUILT_IN) - ELSEWHERE - scans


@pytest.mark.parametrize(("kind", "fields"), list(cases()))
def test_output_state_and_gradients_match_written_out_formulas(kind, fields):
    assert_follows(build(kind, **fields), written_out, tokens(20 if kind in ("gla", "hgrn2") else 11))


@pytest.mark.parametrize("update", ["exact", "implicit"])
@pytest.mark.parametrize("paradigm", ["recurrent", "chunkwise"])
def test_delta_net_state_stays_bounded_with_long_keys(update, paradigm):
    mixer = build("delta_net", update=update, dtype=torch.float32)
    x = tokens(40).float()
    with torch.no_grad():
        mixer.in_proj.weight[mixer.widths["q"] :][: mixer.widths["k"]] *= 1000
        _, state = mixer(x, paradigm=paradigm, return_state=True)
        values = mixer.in_proj(x).split(list(mixer.widths.values()), -1)[2]
    # each key's value is at most the largest that was written; an explicit step would multiply the state by 10^6
    assert state.memory.abs().max() < values.abs().max()


VARIED = {
    "short_conv": {2, None},
    "qk_norm": {"l2", "rms", "none"},
    "rotation": {"rope", "retnet", "none"},
    "gate": {"swish", "sigmoid", "none"},
    "head_norm": {"group", "rms", "none"},
    "norm_affine": {True, False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_shared_options_are_described_and_varied_by_the_kit(kind):
    config = BUILT_IN[kind].example()
    varied = alternatives(config)
    for name, values in VARIED.items():
        if (kind, name) in REFUSED:
            assert name not in varied
            continue
        assert {*varied[name], getattr(config, name)} >= values, name
        # one of them makes a configuration, by itself or beside what it goes with
        beside = {"denominator": False} if kind == "linear_attention" else {}
        assert any(changed(config, {name: value, **beside}) for value in varied[name])
    # where a mixer has its own default too
    fields = BUILT_IN[kind].model_json_schema()["properties"]
    assert all(field.get("description") or name == "kind" for name, field in fields.items())
    assert config.expand_v == fields["expand_v"]["default"]


@pytest.mark.parametrize("norm", ["rms", "group"])
@pytest.mark.parametrize("gate", ["swish", "sigmoid"])
def test_gated_norm_stays_in_float16_range(norm, gate):
    x, given = torch.randn(2, 1, 64).sign().half() * 6e4
    layer = GatedNorm(64, norm, gate, affine=True, eps=1e-6)  # its parameter is wide, as under autocast
    y = layer(x, given / 10000)
    assert y.dtype == torch.float32
    assert y.isfinite().all()
    assert y.half().isfinite().all()
