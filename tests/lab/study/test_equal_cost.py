"""Models matched to equal cost: every mixer and metric, integer and real knobs, and unreachable costs."""

import pytest

from seqmix import MIXERS, SeqmixError, load_config
from seqmix.lab.study.equal_cost import Match, MatchError, cost_of, solve
from seqmix.training.presets import mixer_kind, single_kind_presets

PRESETS = single_kind_presets()
LENGTH = 64


def matched(model, metric, wanted, knob, **options):
    return solve(model, Match(knob=knob, **{metric: wanted}, **options), wanted, length=LENGTH)


def test_every_mixer_has_a_preset():
    kinds = {kind for kind in MIXERS.kinds() if MIXERS.origin(kind).startswith("seqmix.")}
    assert kinds == {mixer_kind(config) for config in PRESETS.values()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "metric", "factor"),
    [*((preset, "parameters", 1.4) for preset in sorted(PRESETS)), ("retnet-tiny", "flops", 0.9)],
)
def test_every_preset_can_be_matched_by_a_width(preset, metric, factor):
    model = PRESETS[preset].model
    wanted = round(factor * cost_of(model, metric, LENGTH))
    block = model.blocks[model.layers[0]]
    if block.ffn is None:
        with pytest.raises(MatchError, match=r"knob blocks\.\*\.ffn\.expansion: blocks\.(mamba|mix|log)\.ffn is null"):
            matched(model, metric, wanted, "blocks.*.ffn.expansion")
        width = "d_state" if hasattr(block.mixer, "d_state") else "expansion"
        found = matched(model, metric, wanted, f"blocks.*.mixer.{width}")
    else:
        found = matched(model, metric, wanted, "blocks.*.ffn.expansion")
        assert found.model.blocks[model.layers[0]].ffn.expansion == found.value
    assert abs(found.cost / wanted - 1) < 0.01
    assert cost_of(found.model, metric, LENGTH) == found.cost
    # nothing else has changed
    assert found.model.model_copy(update={"blocks": model.blocks}) == model


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_matches_state_size_by_layers(preset):
    model = PRESETS[preset].model
    # layers are the one field that moves every state alike
    wanted = 3 * cost_of(model, "state", LENGTH)
    assert matched(model, "state", wanted, "n_layers").value == 3 * model.n_layers


def test_integer_knob_finds_the_nearest_valid_model():
    heads = ["model.d_model=132", "model.blocks.ret.mixer.n_heads=3"]
    model = load_config("retnet-tiny", heads).model
    # by trying all: three heads of even width divide d_model
    costs = {}
    for d_model in range(100, 200):
        try:
            costs[d_model] = cost_of(model.model_copy(update={"d_model": d_model}), "parameters", LENGTH)
        except SeqmixError:
            continue
    assert 1 < len(costs) < 60
    wanted = 1_000_000
    nearest = min(costs, key=lambda d_model: abs(costs[d_model] - wanted))
    found = matched(model, "parameters", wanted, "d_model", tolerance=0.1)
    assert (found.value, found.cost) == (nearest, costs[nearest])
    assert isinstance(found.value, int)


def test_match_handles_knob_that_shrinks_the_state():
    model = load_config("retnet-tiny").model
    now = cost_of(model, "state", LENGTH)  # d_model^2 / n_heads a layer
    assert matched(model, "state", now / 4, "blocks.ret.mixer.n_heads").value == 8


def test_matching_value_is_left_unchanged():
    model = load_config("retnet-tiny").model
    now = cost_of(model, "parameters", LENGTH)
    assert matched(model, "parameters", now, "blocks.ret.ffn.expansion").model == model


def test_unreachable_cost_reports_nearest_value():
    model = load_config("retnet-tiny").model
    with pytest.raises(MatchError) as error:
        matched(model, "parameters", 500_000, "n_layers")
    assert str(error.value) == (
        "no n_layers gives 500,000 parameters within 1 %: 2 comes nearest, with 459,648 (-8.1 %); "
        "choose another knob, or raise tolerance"
    )


@pytest.mark.parametrize(
    ("knob", "said"),
    [
        ("blocks.rat.ffn.expansion", ("'rat'", "ret")),
        ("blocks.ret.ffn.expandion", ("'expandion'", 'did you mean "expansion"')),
        ("blocks.ret.mixer.decay", ("blocks.ret.mixer.decay",)),
        ("blocks.ret", ("blocks.ret",)),
        ("d_model.x", ("d_model",)),
    ],
)
def test_invalid_knob_raises(knob, said):
    with pytest.raises(MatchError) as error:
        matched(load_config("retnet-tiny").model, "parameters", 1_000_000, knob)
    assert str(error.value).startswith(f"knob {knob}: ")
    assert all(word in str(error.value) for word in said)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"knob": "n_layers"}, "got none"),
        ({"knob": "n_layers", "flops": 1, "state": 1}, "got flops and state"),
        ({"knob": "n_layers", "flops": 0}, "match expects flops above 0, got 0"),
    ],
)
def test_match_requires_exactly_one_positive_cost(fields, said):
    with pytest.raises(ValueError, match=said):
        Match(**fields)
