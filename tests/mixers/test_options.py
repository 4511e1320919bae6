"""The options that all mixers made of parts share: each is there, described, varied by the kit and near in 16 bits."""

import pytest
import torch
from formulas import build, tokens

from seqmix.mixers import MIXERS
from seqmix.mixers.parts import QKVConfig
from seqmix.testing.mixer_options import alternatives, changed

CONFIGS = {kind: MIXERS.resolve(kind) for kind in MIXERS.kinds() if MIXERS.origin(kind).startswith("seqmix.")}
every_kind = pytest.mark.parametrize(
    "kind", [kind for kind, config in CONFIGS.items() if issubclass(config, QKVConfig)]
)
SHARED = {
    "short_conv": {2, None},
    "qk_norm": {"l2", "rms", "none"},
    "rotation": {"rope", "retnet", "none"},
    "gate": {"swish", "sigmoid", "none"},
    "head_norm": {"group", "rms", "none"},
    "norm_affine": {True, False},
}
FIXED = {("delta_net", "qk_norm"), ("gated_delta_net", "qk_norm"), ("gla", "rotation")}
"""Options with a single value; the reason stands beside the field."""


@every_kind
def test_the_conformance_kit_varies_them(kind):
    config = CONFIGS[kind].example()
    varied = alternatives(config)
    for name, values in SHARED.items():
        if (kind, name) in FIXED:
            assert name not in varied
            continue
        assert {*varied[name], getattr(config, name)} >= values, name
        # one of them makes a configuration, by itself or beside what it goes with
        beside = {"denominator": False} if kind == "linear_attention" else {}
        assert any(changed(config, {name: value, **beside}) for value in varied[name])


@every_kind
def test_no_convolution_is_written_in_two_ways(kind):
    for size in (None, 0):
        mixer = build(kind, short_conv=size)
        assert "convolution" not in dict(mixer.named_children())
        assert mixer(tokens(5), return_state=True)[1].recent.numel() == mixer.init_state(2).recent.numel() == 0


@every_kind
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float16, 6e-3)])
@pytest.mark.parametrize(("gate", "head_norm"), [("swish", "group"), ("sigmoid", "rms"), ("none", "group")])
def test_gates_and_norms_stay_near_in_low_precision(kind, dtype, tolerance, gate, head_norm):
    fields = {"gate": gate, "head_norm": head_norm, "norm_affine": True, "chunk_size": 16}
    mixer, x = build(kind, torch.float32, **fields), tokens(200)
    mixer.to(dtype).double()  # the same rounded numbers
    x = x.to(dtype).double()
    with torch.no_grad():
        exact = mixer(x)[0]
        y = mixer.to(dtype)(x.to(dtype))[0]
    assert y.dtype == dtype
    assert y.isfinite().all()
    assert (y.double() - exact).norm() / exact.norm() <= tolerance


@every_kind
def test_fields_have_descriptions_where_a_mixer_has_its_own_default(kind):
    fields = CONFIGS[kind].model_json_schema()["properties"]
    assert all(field.get("description") or name == "kind" for name, field in fields.items())
    assert CONFIGS[kind](n_heads=2).expand_v == fields["expand_v"]["default"]
