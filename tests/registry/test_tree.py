from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqmix.registry.tree import Node, Origin

HERE, THERE = Origin("here", 1), Origin("there", 2)

scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
keys = st.sampled_from(["a", "b", "kind"])
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))
mappings = st.dictionaries(keys, values, max_size=3)


def tree(value: Any, origin: Origin = HERE) -> Node:
    if isinstance(value, dict):
        return Node({key: tree(entry, origin) for key, entry in value.items()}, origin)
    if isinstance(value, list):
        return Node(tuple(tree(item, origin) for item in value), origin)
    return Node(value, origin)


def merged(base: Any, difference: Any) -> Any:
    return tree(base).merge(tree(difference)).plain()


@given(mappings, mappings, values)
def test_laws_of_merging(base, difference, value):
    assert tree(value).plain() == value
    assert merged(base, {}) == merged({}, base) == merged(base, base) == base
    once = merged(base, difference)
    assert merged(once, difference) == once
    if base.get("kind") == difference.get("kind", base.get("kind")):
        assert once.keys() == base.keys() | difference.keys()
    if not isinstance(value, dict):
        assert merged(base, value) == value


@pytest.mark.parametrize(
    ("base", "difference", "expected"),
    [
        ({"a": {"x": 1, "y": 2}}, {"a": {"y": 3, "z": 4}}, {"a": {"x": 1, "y": 3, "z": 4}}),
        ({"a": [1, 2, 3]}, {"a": [4]}, {"a": [4]}),
        ({"a": {"x": 1}}, {"a": None}, {"a": None}),
        ({"a": {"kind": "p", "x": 1}}, {"a": {"kind": "q"}}, {"a": {"kind": "q"}}),
        ({"a": {"kind": "p", "x": 1}}, {"a": {"kind": "p", "y": 2}}, {"a": {"kind": "p", "x": 1, "y": 2}}),
        ({"kind": "p", "x": 1}, {"x": 2}, {"kind": "p", "x": 2}),
    ],
)
def test_mappings_merge_key_by_key_and_all_else_is_replaced(base, difference, expected):
    assert merged(base, difference) == expected


def test_a_merged_value_has_the_origin_that_set_it_and_a_mapping_that_of_the_last_change():
    node = tree({"a": 1, "b": 2}).merge(tree({"b": 3}, THERE))
    assert [str(node.find([key])[1].origin) for key in "ab"] == ["here:1", "there:2"]
    assert node.origin == THERE
    assert str(Origin("command line")) == "command line"


def test_find_skips_what_is_not_a_key_and_stops_at_the_deepest_value():
    keys, node = tree({"a": [{"b": 1}]}).find(["a", "tuple", 0, "branch", "b", "int"])
    assert (keys, node.value) == (("a", 0, "b"), 1)
    keys, node = tree({"a": [1]}).find(["a", 1])
    assert (keys, node.plain()) == (("a",), [1])
