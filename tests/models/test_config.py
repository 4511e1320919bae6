"""The configuration of a model: named blocks and the pattern that tiles them."""

import pytest
from pydantic import ValidationError

from seqmix import ModelConfig
from seqmix.models.config import NormalInit, PaperInit


def error(config_of, *mixers: str, **fields) -> str:
    with pytest.raises(ValidationError) as raised:
        config_of(*mixers, **fields)
    return str(raised.value)


@pytest.mark.parametrize(
    ("pattern", "n_layers", "layers"),
    [
        (("a", "b"), 4, ("a", "b", "a", "b")),
        (("a", "a", "b"), 5, ("a", "a", "b", "a", "a")),
        (("b",), 3, ("b", "b", "b")),
        (("a", "b"), 2, ("a", "b")),
    ],
)
def test_the_pattern_is_tiled_over_the_layers(config_of, pattern, n_layers, layers):
    block = config_of("retention").blocks["block0"]
    config = config_of("retention", blocks={"a": block, "b": block}, pattern=pattern, n_layers=n_layers)
    assert config.layers == layers


def test_a_list_is_a_pattern(config_of):
    assert config_of("retention", pattern=["block0", "block0"]).pattern == ("block0", "block0")


def test_one_block_needs_no_pattern(config_of):
    assert config_of("retention", pattern=None, n_layers=3).layers == ("block0",) * 3


def test_several_blocks_need_a_pattern(config_of):
    assert "pattern is missing: there are 2 blocks, block0, block1" in error(
        config_of, "retention", "attention", pattern=None
    )


def test_a_pattern_of_an_unknown_block_names_the_nearest(config_of):
    message = error(config_of, "retention", pattern=("blck0",))
    assert "no block is called 'blck0'; blocks: block0; did you mean \"block0\"?" in message


def test_a_pattern_longer_than_the_model_is_refused(config_of):
    message = error(config_of, "retention", pattern=("block0",) * 3, n_layers=2)
    assert "pattern has 3 layers, and n_layers is 2" in message


def test_a_block_may_be_left_out_of_the_pattern(config_of):
    assert config_of("retention", "attention", pattern=("block1",)).layers == ("block1", "block1")


@pytest.mark.parametrize(
    "fields",
    [
        {"d_model": 0},
        {"n_layers": 0},
        {"vocab_size": 0},
        {"blocks": {}},
        {"pattern": ()},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"d_model": 16.0},
        {"tie_embeddings": 1},
        {"init": {"kind": "normal", "std": 0.0}},
        {"init": {"kind": "other"}},
        {"n_layer": 2},
    ],
    ids=str,
)
def test_values_out_of_their_range_are_refused(config_of, fields):
    assert next(iter(fields)) in error(config_of, "retention", **fields)


def test_the_paper_initialises_unless_asked_otherwise(config_of):
    assert config_of("retention").init == PaperInit()
    assert config_of("retention", init={"kind": "normal"}).init == NormalInit(std=0.02)


def test_a_configuration_is_frozen(config_of):
    config = config_of("retention")
    with pytest.raises(ValidationError, match="frozen"):
        config.d_model = 32


def test_equal_configurations_are_equal(config_of):
    assert config_of("retention", "attention") == config_of("retention", "attention")
    assert config_of("retention") != config_of("attention")
    assert isinstance(config_of("retention"), ModelConfig)
