"""Model configurations: named blocks and the pattern that tiles them over the layers."""

import pytest

from seqmix import ConfigError


@pytest.mark.parametrize(
    ("pattern", "n_layers", "layers"),
    [
        (("a", "b"), 4, ("a", "b", "a", "b")),
        (["a", "a", "b"], 5, ("a", "a", "b", "a", "a")),  # a list, as YAML has it
        (("b",), 3, ("b", "b", "b")),  # a block may be left out
        (("a", "b"), 2, ("a", "b")),
    ],
)
def test_pattern_is_tiled_over_layers(config_of, pattern, n_layers, layers):
    block = config_of("retention").blocks["block0"]
    config = config_of("retention", blocks={"a": block, "b": block}, pattern=pattern, n_layers=n_layers)
    assert config.pattern == tuple(pattern)
    assert config.layers == layers


def test_single_block_needs_no_pattern(config_of):
    assert config_of("retention", pattern=None, n_layers=3).layers == ("block0",) * 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pattern": None}, "block0, block1"),
        ({"pattern": ("blck0",)}, "'blck0' block0, block1 \"block0\""),
        ({"pattern": ("block0",) * 3, "n_layers": 2}, "3 2"),
        ({"n_layer": 2}, '"n_layers"'),
    ],
    ids=str,
)
def test_invalid_field_is_named_in_error(config_of, fields, words):
    with pytest.raises(ConfigError) as raised:
        config_of("retention", "attention", **fields)
    for word in (next(iter(fields)), *words.split()):
        assert word in str(raised.value)
