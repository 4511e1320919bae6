"""What mixers made of parts have in common as options: each is there, is what it says, and is described."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from seqmix.mixers import MIXERS, ContractError, Paradigm
from seqmix.mixers.parts import MatrixState, QKVConfig
from seqmix.testing import check_mixer
from seqmix.testing.mixer_options import alternatives, changed

D_MODEL = 12
CONFIGS = {kind: MIXERS.resolve(kind) for kind in MIXERS.kinds() if MIXERS.origin(kind).startswith("seqmix.")}
KINDS = [kind for kind, config in CONFIGS.items() if issubclass(config, QKVConfig)]
SHARED = {
    "short_conv": {2, 4, None},
    "qk_norm": {"l2", "rms", "none"},
    "rotation": {"rope", "retnet", "none"},
    "gate": {"swish", "sigmoid", "none"},
    "head_norm": {"group", "rms", "none"},
    "norm_affine": {True, False},
}
REFUSED = {("delta_net", "qk_norm"), ("gated_delta_net", "qk_norm"), ("gla", "rotation")}
"""Where there is one value, and why stands beside the field."""
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind, dtype=torch.float64, **fields):
    torch.manual_seed(0)
    mixer = CONFIGS[kind](**{"n_heads": 2, "chunk_size": 3} | fields).build(D_MODEL, layer_idx=1, n_layers=3)
    for parameter in mixer.parameters():  # weights of 1 would hide that there are any
        torch.nn.init.normal_(parameter, std=0.4)
    return mixer.to(dtype)


def tokens(length=9, dtype=torch.float64):
    return torch.randn(2, length, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def plain_of(kind):
    """Fields that leave the recurrence by itself, where the kind has them."""
    wanted = {"short_conv": None, "qk_norm": "none", "rotation": "none", "gate": "none", "head_norm": "none"}
    return {name: value for name, value in wanted.items() if (kind, name) not in REFUSED}


def test_all_kinds_of_a_family_have_parts():
    assert set(KINDS) == set(CONFIGS) - {"attention", "hyena", "mamba2"}


@every_kind
def test_the_conformance_suite_varies_them(kind):
    config = CONFIGS[kind].example()
    varied = alternatives(config)
    for name, values in SHARED.items():
        if (kind, name) in REFUSED:
            assert name not in varied
            continue
        assert {*varied[name], getattr(config, name)} >= values - {4}, name
        # one of them, by itself or beside what it goes with, makes a configuration
        assert any(
            changed(config, {name: value, "denominator": False} if kind == "linear_attention" else {name: value})
            for value in varied[name]
        )


@every_kind
@pytest.mark.parametrize("name", ["short_conv", "qk_norm", "rotation", "gate", "head_norm"])
def test_each_changes_what_is_computed(kind, name):
    if (kind, name) in REFUSED:
        pytest.skip("refused, and why stands beside the field")
    base = plain_of(kind) | ({"denominator": False} if kind == "linear_attention" else {})
    outputs = []
    for value in sorted(SHARED[name] - {4}, key=str):
        mixer = build(kind, **base | {name: value})
        y, state = mixer(tokens(), return_state=True)
        assert isinstance(state, MatrixState)
        outputs.append(y)
        again = build(kind, **base | {name: value}, paradigm="recurrent")(tokens())[0]
        assert_close(again, y, rtol=1e-9, atol=1e-9)
    for i, y in enumerate(outputs):
        for other in outputs[:i]:
            assert (y - other).abs().max() > 1e-3


@every_kind
def test_a_gate_and_a_norm_are_what_they_say(kind):
    """From the layer without either: its output projection is made the identity."""
    heads = {"n_heads": 2, **plain_of(kind)}

    def run(**fields):
        mixer = build(kind, **heads | fields)
        with torch.no_grad():
            mixer.out_proj.weight.copy_(torch.eye(*mixer.out_proj.weight.shape))
            plain, x = build(kind, **heads | ({"expand_v": 1.0})), tokens()
            # the same queries, keys, values and decays
            shared, rows = mixer.state_dict(), plain.state_dict()
            names = dict(zip(mixer.widths, mixer.in_proj.weight.split([*mixer.widths.values()]), strict=True))
            rows = {name: value for name, value in shared.items() if name in rows and name != "in_proj.weight"}
            plain.load_state_dict(rows | {"in_proj.weight": torch.cat([names[n] for n in plain.widths])})
            return mixer, x, plain(x)[0], mixer(x)[0]

    joint = kind == "lightning"  # its norm is over all heads together
    mixer, _, plain, y = run(expand_v=1.0, head_norm="rms", norm_affine=True, norm_eps=0.1)
    o = plain if joint else plain.unflatten(-1, (2, -1))
    expected = o / (o.square().mean(-1, keepdim=True) + 0.1).sqrt() * mixer.norm.weight
    assert_close(y, expected.flatten(2) if not joint else expected, rtol=1e-9, atol=1e-9)
    mixer, x, plain, y = run(expand_v=1.0, gate="sigmoid")
    rows = dict(zip(mixer.widths, mixer.in_proj.weight.split([*mixer.widths.values()]), strict=True))
    assert_close(y, plain * (x @ rows["gate"].T).sigmoid(), rtol=1e-9, atol=1e-9)


@every_kind
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_short_convolution_may_stand_in_front_of_any(kind, size):
    mixer, x = build(kind, short_conv=size), tokens()
    rows = dict(zip(mixer.widths, mixer.in_proj.weight.split([*mixer.widths.values()]), strict=True))
    qkv = x @ torch.cat([rows[name] for name in "qkv"]).T
    assert mixer.init_state(3).recent.shape == (3, size - 1, qkv.shape[2])
    y, state = mixer(x, return_state=True)
    last = F.pad(qkv, (0, 0, size, 0))[:, qkv.shape[1] + 1 :]
    assert_close(state.recent, last)
    pieces, carried = [], None
    for piece in x.split([1, 3, 5], dim=1):
        part, carried = mixer(piece, carried, return_state=True)
        pieces.append(part)
    assert_close(torch.cat(pieces, 1), y, rtol=1e-9, atol=1e-9)
    assert_close(carried, state, rtol=1e-9, atol=1e-9)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["swish", "sigmoid", "none"])
@pytest.mark.parametrize("head_norm", ["group", "rms"])
def test_gates_and_norms_stay_near_in_low_precision(kind, dtype, gate, head_norm):
    fields = {"gate": gate, "head_norm": head_norm, "norm_affine": True, "chunk_size": 16}
    mixer, x = build(kind, torch.float32, **fields), tokens(200)
    mixer.to(dtype).double()  # the same rounded numbers
    x = x.to(dtype).double()
    exact = mixer(x)[0]
    y = mixer.to(dtype)(x.to(dtype))[0]
    assert y.dtype == dtype
    assert y.isfinite().all()
    assert (y.double() - exact).norm() / exact.norm() <= (4e-2 if dtype == torch.bfloat16 else 6e-3)


@pytest.mark.parametrize(("kind", "name"), sorted(REFUSED))
def test_what_would_not_be_what_it_says_is_refused(kind, name):
    with pytest.raises(ValueError, match="Input should be '"):
        CONFIGS[kind](n_heads=2, **{name: {"qk_norm": "rms", "rotation": "rope"}[name]})


@pytest.mark.parametrize("kind", [kind for kind in KINDS if (kind, "rotation") not in REFUSED])
def test_a_rotation_needs_pairs(kind):
    fields = {"denominator": False} if kind == "linear_attention" else {}
    config = CONFIGS[kind](n_heads=4, expand_k=1.0, rotation="rope", **fields)
    with pytest.raises(ContractError, match="rotation turns pairs, and a head's keys are 3 wide: make that even"):
        config.build(D_MODEL, layer_idx=0, n_layers=1)


@every_kind
def test_fields_keep_their_descriptions_where_a_mixer_has_its_own_default(kind):
    fields = CONFIGS[kind].model_json_schema()["properties"]
    for name, field in fields.items():
        assert field.get("description") or name == "kind", name
    assert fields["expand_v"]["description"] == "Width of all values (and the gate) over d_model."
    assert "short convolution" in fields["short_conv"]["description"]
    assert CONFIGS[kind](n_heads=2).expand_v == fields["expand_v"]["default"]


@every_kind
def test_the_suite_passes_in_the_recurrences_bare_form(kind):
    config = CONFIGS[kind](n_heads=2, **plain_of(kind))
    report = check_mixer(config, checks=["paradigms_agree", "pieces_equal_the_whole"], examples=10, d_model=D_MODEL)
    assert report.passed, report.failures[0].reason
    assert Paradigm.CHUNKWISE in config.traits.paradigms
