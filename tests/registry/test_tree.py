from typing import Any

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
def test_merge_is_idempotent_and_has_an_identity(base, difference, value):
    assert tree(value).plain() == value
    assert merged(base, {}) == merged({}, base) == merged(base, base) == base
    once = merged(base, difference)
    assert merged(once, difference) == once
    if base.get("kind") == difference.get("kind", base.get("kind")):
        assert once.keys() == base.keys() | difference.keys()
    if not isinstance(value, dict):
        assert merged(base, value) == value


def test_merged_values_keep_the_origin_that_set_them():
    node = tree({"a": 1, "b": 2}).merge(tree({"b": 3}, THERE))
    assert [str(node.find([key])[1].origin) for key in "ab"] == ["here:1", "there:2"]
    assert node.origin == THERE
