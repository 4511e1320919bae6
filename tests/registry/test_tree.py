from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from seqmix.registry.tree import Node, Origin

HERE = Origin("here", 1)

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


@given(values)
def test_a_tree_holds_its_values(value):
    assert tree(value).plain() == value


@given(mappings)
def test_an_empty_difference_changes_nothing(base):
    assert merged(base, {}) == base


@given(mappings)
def test_a_difference_of_nothing_is_itself(difference):
    assert merged({}, difference) == difference


@given(mappings)
def test_merging_twice_is_merging_once(value):
    assert merged(value, value) == value


@given(mappings, mappings)
def test_a_difference_wins(base, difference):
    once = merged(base, difference)
    assert merged(once, difference) == once


@given(mappings, mappings)
def test_no_key_is_lost_but_with_a_kind(base, difference):
    if base.get("kind") == difference.get("kind", base.get("kind")):
        assert merged(base, difference).keys() == base.keys() | difference.keys()


@given(mappings, values.filter(lambda value: not isinstance(value, dict)))
def test_what_is_no_mapping_replaces(base, difference):
    assert merged(base, difference) == difference


def test_mappings_merge_key_by_key():
    assert merged({"a": {"x": 1, "y": 2}}, {"a": {"y": 3, "z": 4}}) == {"a": {"x": 1, "y": 3, "z": 4}}


def test_lists_are_replaced():
    assert merged({"a": [1, 2, 3]}, {"a": [4]}) == {"a": [4]}


def test_null_replaces():
    assert merged({"a": {"x": 1}}, {"a": None}) == {"a": None}


def test_a_mapping_of_another_kind_replaces():
    assert merged({"a": {"kind": "p", "x": 1}}, {"a": {"kind": "q"}}) == {"a": {"kind": "q"}}


def test_a_mapping_of_the_same_kind_merges():
    assert merged({"a": {"kind": "p", "x": 1}}, {"a": {"kind": "p", "y": 2}}) == {"a": {"kind": "p", "x": 1, "y": 2}}


def test_a_mapping_that_says_no_kind_merges():
    assert merged({"kind": "p", "x": 1}, {"x": 2}) == {"kind": "p", "x": 2}


def test_a_merged_value_keeps_the_place_that_wrote_it():
    there = Origin("there", 2)
    node = tree({"a": 1, "b": 2}).merge(tree({"b": 3}, there))
    assert [str(node.find([key])[1].origin) for key in "ab"] == ["here:1", "there:2"]


def test_a_merged_mapping_is_of_the_place_that_changed_it_last():
    assert tree({"a": 1}).merge(tree({"b": 2}, Origin("there", 2))).origin == Origin("there", 2)


def test_find_passes_over_what_is_no_key():
    keys, node = tree({"a": [{"b": 1}]}).find(["a", "tuple", 0, "branch", "b", "int"])
    assert (keys, node.value) == (("a", 0, "b"), 1)


def test_find_stops_at_the_deepest_value_there_is():
    keys, node = tree({"a": [1]}).find(["a", 1])
    assert (keys, node.plain()) == (("a",), [1])


def test_an_origin_without_lines_is_its_source():
    assert str(Origin("command line")) == "command line"
