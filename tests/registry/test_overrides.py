from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqmix.registry import ConfigError
from seqmix.registry.loading import override
from seqmix.registry.tree import Node
from seqmix.registry.yaml import parse, write

FILE = """\
rate: 0.1
model:
  d_model: 64
  mixer: {kind: retention, n_heads: 4}
  ffn: null
  pattern: [a, b]
"""


def base() -> Node:
    tree = parse(FILE, "run.yaml")
    assert tree is not None
    return tree


def changed(*changes: str) -> Any:
    tree = base()
    for change in changes:
        tree = override(tree, change)
    return tree.plain()


def error(change: str) -> str:
    with pytest.raises(ConfigError) as raised:
        override(base(), change)
    return str(raised.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("8", 8), ("true", True), ("no", "no"), ("", None), ("[a, 1]", ["a", 1]), ("a=b", "a=b")],
)
def test_values_are_yaml(text, value):
    assert changed(f"rate={text}")["rate"] == value


def test_a_path_leads_into_mappings():
    assert changed("model.mixer.n_heads=8")["model"]["mixer"] == {"kind": "retention", "n_heads": 8}


def test_nothing_else_changes():
    assert {**changed("model.d_model=8")["model"], "d_model": 64} == base().plain()["model"]


def test_the_tree_itself_is_not_changed():
    tree = base()
    override(tree, "rate=5")
    assert tree.plain()["rate"] == 0.1


def test_a_later_change_wins():
    assert changed("rate=1", "rate=2")["rate"] == 2


def test_mappings_on_the_way_are_made():
    assert changed("data.text.path=x")["data"] == {"text": {"path": "x"}}


def test_a_mapping_merges():
    assert changed("model={d_model: 8}")["model"]["mixer"] == {"kind": "retention", "n_heads": 4}


def test_a_mapping_of_another_kind_replaces():
    assert changed("model.mixer={kind: attention}")["model"]["mixer"] == {"kind": "attention"}


def test_another_kind_alone_replaces_too():
    assert changed("model.mixer.kind=attention", "model.mixer.window=8")["model"]["mixer"] == {
        "kind": "attention",
        "window": 8,
    }


def test_a_list_is_replaced():
    assert changed("model.pattern=[c]")["model"]["pattern"] == ["c"]


def test_what_is_set_is_of_the_command_line():
    assert str(override(base(), "model.d_model=8").find(["model", "d_model"])[1].origin) == "command line"


def test_mappings_on_the_way_keep_their_place():
    assert str(override(base(), "model.d_model=8").find(["model"])[1].origin) == "run.yaml:2"


@pytest.mark.parametrize("change", ["rate", "=3", ".rate=3", "model.=3", "model..d_model=3", ""])
def test_what_is_no_change_is_told_how_to_write_one(change):
    assert error(change) == (
        f"command line: {change!r} is no change; write dotted.path=value, such as model.n_layers=2"
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("rate.x=3", "rate.x: rate is 0.1 (run.yaml:1), and not a mapping"),
        ("model.pattern.0=c", 'model.pattern.0: model.pattern is ["a", "b"] (run.yaml:6), and not a mapping'),
        ("model.ffn.kind=mlp", "model.ffn.kind: model.ffn is null (run.yaml:5), and not a mapping"),
        (
            "rate=]",
            "rate: the value ']' is no YAML: column 1: while parsing a block node, "
            "expected the node content, but found ']'",
        ),
        ("rate={a: 1, a: 2}", "rate: the value '{a: 1, a: 2}' is no YAML: key 'a' is given twice"),
        (
            "name=*.py",
            "name: the value '*.py' is no YAML: column 1: found undefined alias '.py'; a text that begins with * is "
            "quoted, for the shell too: 'name=\"*.py\"'",
        ),
    ],
)
def test_a_change_that_cannot_be_made_is_one_sentence(change, sentence):
    assert error(change) == f"command line: {sentence}"


@given(st.recursive(st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_any_value_can_be_set(value):
    assert changed(f"new={write(value)}")["new"] == value
