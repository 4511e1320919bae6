"""Fields that mixers reject: the error names the field and suggests what to set."""

import pytest

from seqmix.mixers import MIXERS, ContractError
from seqmix.registry import ConfigError

D_MODEL = 12
N_HEADS = {"n_heads": 2}
HUGE = 10**20
WRONG = {
    "attention": [
        ({"n_kv_heads": 3, "n_heads": 4}, "n_kv_heads n_heads = 4 3 [1, 2, 4]"),
        ({"head_dim": 5}, "rope head_dim even 5"),
        ({"window": 0}, "window"),
        ({"windw": 3}, 'windw "window"'),
    ],
    "retention": [
        ({"gamma": 0.9}, "gamma constant geometric"),
        ({"gamma": 0.9, "decay": "none"}, "gamma constant none"),
        ({"decay": "constant"}, "constant gamma"),
        ({"decay": "none", "learnable_decay": True}, "learnable_decay none"),
        ({"decay": "constant", "gamma": 1.0}, "gamma"),
        ({"decay": "constant", "gamma": 0.0}, "gamma"),
        ({"norm_eps": -1e-6}, "norm_eps"),
        ({"n_heads": 0}, "n_heads"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"paradigm": "sequential"}, "paradigm 'parallel', 'recurrent' or 'chunkwise'"),
    ],
    "gated_retention": [({"gate_logit_normalizer": 0.0}, "gate_logit_normalizer"), ({"rotation": "xpos"}, "rotation")],
    "gla": [({"gate_rank": 0}, "gate_rank"), ({"gate_rank": HUGE}, "gate_rank"), ({"rotation": "rope"}, "rotation")],
    "lightning": [({"schedule": "alibi"}, "schedule 'minimax' or 'transnormer'"), ({"gamma": 0.9}, "gamma")],
    "linear_attention": [
        ({"feature_map": "identity"}, "denominator feature_map identity"),
        ({"rotation": "rope"}, "denominator rotation rope"),
        ({"feature_map": "exp"}, "feature_map 'elu', 'relu', 'softmax' or 'identity'"),
        ({"eps": 0.0}, "eps"),
    ],
    "delta_net": [
        ({"short_conv": -1}, "short_conv"),
        ({"gate": "relu"}, "gate 'swish', 'sigmoid' or 'none'"),
        ({"qk_norm": "rms"}, "qk_norm"),
        ({"paradigm": "parallel"}, "parallel chunkwise, recurrent"),
    ],
    "gated_delta_net": [({"qk_norm": "rms"}, "qk_norm"), ({"paradigm": "parallel"}, "parallel chunkwise, recurrent")],
    "mamba2": [
        ({"head_dim": 0}, "head_dim"),
        ({"head_dim": HUGE}, "head_dim"),
        ({"d_state": HUGE}, "d_state"),
        ({"n_groups": HUGE}, "n_groups"),
        ({"short_conv": 65}, "short_conv"),
        ({"a_range": (0.0, 1.0)}, "a_range 1e-06 1e+06 (0.0, 1.0)"),
        ({"a_range": (1.0, 1e7)}, "a_range 1e+06 (1.0, 10000000.0)"),
        ({"time_step_range": (0.2, 0.1)}, "time_step_range 1e-06 1000 (0.2, 0.1)"),
        ({"time_step_range": (1e-7, 0.1)}, "time_step_range 1e-06 1000 (1e-07, 0.1)"),
        ({"time_step_limit": (0.1, 0.1)}, "time_step_limit 1000 .inf (0.1, 0.1)"),
        ({"time_step_limit": (0.1, 2e3)}, "time_step_limit 1000 .inf (0.1, 2000.0)"),
        ({"time_step_limit": (0.1, float("nan"))}, "time_step_limit .inf"),
        ({"time_step_limit": (float("inf"), float("inf"))}, "time_step_limit"),
        ({"n_heads": 4}, "n_heads"),
    ],
    "hyena": [
        ({"order": 0}, "order"),
        ({"order": 1, "first_filter": False}, "first filter order 1 2"),
        ({"filter_depth": 1}, "filter_depth"),
        ({"decay_range": (1.5, 0.3)}, "decay_range 1e-06 1e+06 (1.5, 0.3)"),
        ({"decay_range": (1e-320, 1.0)}, "decay_range 1e-06"),
        ({"decay_shift": 1e38}, "decay_shift"),
        ({"sine_frequency": 1e39}, "sine_frequency"),
        ({"filter_width": 10**12}, "filter_width"),
        ({"filter_length": HUGE}, "filter_length"),
    ],
}
QK, V = "expand_k * d_model", "expand_v * d_model"
UNFIT = [
    ("attention", {"n_heads": 5, "positions": "none"}, "5 d_model = 12 n_heads = 4 or 6"),
    ("attention", {"n_heads": 12}, "12 d_model even n_heads = 6"),
    ("attention", {"n_heads": 10, "n_kv_heads": 2}, "10 n_heads = 6"),
    ("attention", {"n_heads": 5, "n_kv_heads": 5}, "5 head_dim"),
    ("retention", {"n_heads": 5}, f"5 {QK} = 1 * 12 = 12 n_heads = 4 or 6"),
    ("retention", {"n_heads": 4, "expand_k": 2.0, "expand_v": 0.5}, f"4 {V} = 0.5 * 12 = 6"),
    ("retention", {"n_heads": 6, "expand_k": 0.5}, "even width 1"),
    ("gated_retention", {"n_heads": 4}, "even width 3"),
    ("gla", {"n_heads": 4}, f"4 {QK} = 0.5 * 12 = 6 n_heads = 3 or 6"),
    ("gla", {"n_heads": 9}, "n_heads = 6"),
    ("gla", {"n_heads": 2, "expand_k": 0.7}, "0.7 * 12 = 8.4 expand_k = 0.6666666667 or 0.8333333333"),
    ("gla", {"n_heads": 2, "expand_v": 1e-9}, "expand_v = 0.1666666667"),
    ("linear_attention", {"n_heads": 4, "expand_v": 0.5}, f"4 {V} = 0.5 * 12 = 6"),
    ("mamba2", {}, "head_dim = 64 expand * d_model = 2 * 12 = 24 head_dim = 24"),
    ("mamba2", {"head_dim": 5, "expand": 0.3}, "expand 0.3 * 12 = 3.6 expand = 0.41"),
    ("mamba2", {"head_dim": 6, "n_groups": 3}, "n_groups = 3 4 heads n_groups = 2 or 4"),
]


def assert_names(text, words):
    """Each word, or `name = value`, stands in it."""
    for word in words.replace(" = ", "=").split():
        assert word.strip(",") in text.replace(" = ", "=")


@pytest.mark.parametrize(
    ("kind", "fields", "words"), [(kind, *case) for kind, cases in WRONG.items() for case in cases], ids=str
)
def test_invalid_field_is_named_in_error(kind, fields, words):
    given = {} if kind in ("mamba2", "hyena") else N_HEADS
    with pytest.raises(ConfigError) as raised:
        MIXERS.resolve(kind)(**given | fields)
    assert_names(str(raised.value), words)


@pytest.mark.parametrize(("kind", "fields", "words"), UNFIT, ids=str)
def test_invalid_widths_raise_with_a_nearby_valid_value(kind, fields, words):
    with pytest.raises(ContractError) as raised:
        MIXERS.resolve(kind)(**fields).build(D_MODEL, layer_idx=0, n_layers=1)
    assert_names(str(raised.value), words)


@pytest.mark.parametrize("expand", [0.6666666667, 0.8333333333, 0.1666666667])
def test_width_suggested_by_error_is_accepted(expand):
    MIXERS.resolve("gla")(n_heads=2, expand_k=expand).build(D_MODEL, layer_idx=0, n_layers=1)


def test_widths_tolerate_floating_point_rounding():
    mixer = MIXERS.resolve("linear_attention")(n_heads=3, expand_v=0.1).build(30, layer_idx=0, n_layers=1)
    assert mixer.out_proj.in_features == 3  # 0.1 * 30 is 3.0000000000000004
