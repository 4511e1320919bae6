from typing import Any

import pytest
from hypothesis import example, given
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
MIXER = {"kind": "retention", "n_heads": 4}
MODEL = {"d_model": 64, "mixer": MIXER, "ffn": None, "pattern": ["a", "b"]}


def base() -> Node:
    tree = parse(FILE, "run.yaml")
    assert tree is not None
    return tree


def changed(*changes: str) -> Any:
    tree = base()
    for change in changes:
        tree = override(tree, change)
    return tree.plain()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["model.mixer.n_heads=8"], {"rate": 0.1, "model": MODEL | {"mixer": MIXER | {"n_heads": 8}}}),
        (["rate=1", "rate=2"], {"rate": 2, "model": MODEL}),
        (["rate="], {"rate": None, "model": MODEL}),
        (["rate=a=b"], {"rate": "a=b", "model": MODEL}),
        (["model.mixer=null"], {"rate": 0.1, "model": MODEL | {"mixer": None}}),
        (["data.text.path=x"], {"rate": 0.1, "model": MODEL, "data": {"text": {"path": "x"}}}),
        (["model={d_model: 8}"], {"rate": 0.1, "model": MODEL | {"d_model": 8}}),
        (["model.mixer={kind: attention}"], {"rate": 0.1, "model": MODEL | {"mixer": {"kind": "attention"}}}),
        (
            ["model.mixer.kind=attention", "model.mixer.window=8"],
            {"rate": 0.1, "model": MODEL | {"mixer": {"kind": "attention", "window": 8}}},
        ),
        (["model.pattern=[c]"], {"rate": 0.1, "model": MODEL | {"pattern": ["c"]}}),
    ],
)
def test_override_changes_only_the_named_value(changes, expected):
    assert changed(*changes) == expected


def test_override_returns_a_new_tree_with_command_line_origin():
    tree = base()
    new = override(tree, "model.d_model=8")
    assert tree.plain() == {"rate": 0.1, "model": MODEL}
    assert str(new.find(["model", "d_model"])[1].origin) == "command line"
    assert str(new.find(["model"])[1].origin) == "run.yaml:2"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(
            (change, ["expected dotted.path=value", repr(change)])
            for change in ("rate", "=3", ".rate=3", "model.=3", "a..b=3", "")
        ),
        ("rate.x=3", ["rate.x: expected rate to be a mapping, got 0.1 (run.yaml:1)"]),
        ("model.pattern.0=c", ['model.pattern.0: expected model.pattern to be a mapping, got ["a", "b"] (run.yaml:6)']),
        ("model.ffn.kind=mlp", ["model.ffn.kind: expected model.ffn to be a mapping, got null (run.yaml:5)"]),
        ("rate=]", ["rate: ", "']'", "column 1: "]),
        ("rate={a: 1, a: 2}", ["rate: ", "'{a: 1, a: 2}'", "key 'a'"]),
        ("name=*.py", ["name: ", "'*.py'", "'name=\"*.py\"'"]),
    ],
)
def test_invalid_override_raises_and_names_the_key(change, words):
    with pytest.raises(ConfigError) as raised:
        override(base(), change)
    assert str(raised.value).startswith(f"command line: {words[0]}")
    assert all(word in str(raised.value) for word in words)


@given(st.recursive(st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
@example([["0" * 80, "\x1f\x1f0 0"]])
def test_an_override_sets_any_yaml_value(value):
    assert changed(f"new={write(value)}")["new"] == value
