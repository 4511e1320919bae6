import math
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from seqmix.registry import ConfigError
from seqmix.registry.yaml import parse, write

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


NESTED = ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 64))]
"""Aliases of aliases, whose expansion has 2^64 values."""


def read(text: str) -> Any:
    node = parse(text, "x.yaml")
    return node and node.plain()


@pytest.mark.parametrize(
    ("texts", "value"),
    [
        (["true", "True", "TRUE"], True),
        (["~", "null", "Null", ""], None),
        (["8", "+8"], 8),
        (["010"], 10),
        (["0o17"], 15),
        (["0x1F"], 31),
        (["1_000"], 1000),
        (["1e-3"], 1e-3),
        (["1E5"], 1e5),
        (["+.5"], 0.5),
        (["1."], 1.0),
        (["-2.5e+3"], -2500.0),
        (["-.inf"], -math.inf),
        (["'true'", "!!str true"], "true"),
        (['"8"', "!!str 8"], "8"),
    ],
)
def test_scalars_follow_yaml_1_2(texts, value):
    for text in texts:
        found = read(f"a: {text}")["a"]
        assert (found, type(found)) == (value, type(value))
    assert math.isnan(read(".nan"))


@pytest.mark.parametrize("text", ["yes", "off", "y", "N", "No", "tRue", "1e", "e5", "=", ".", "2024-01-01", "12:30:00"])
def test_values_converted_only_by_yaml_1_1_stay_strings(text):
    assert read(f"a: {text}") == {"a": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("# only a comment\n", None),
        ("{1: a, true: b, null: c, 0x1F: d}", {"1": "a", "true": "b", "null": "c", "0x1F": "d"}),
        ("a: &x {k: [1]}\nb: *x", {"a": {"k": [1]}, "b": {"k": [1]}}),
        ("a: &x {k: 1, l: 2}\nb: {l: 3, <<: *x}", {"a": {"k": 1, "l": 2}, "b": {"k": 1, "l": 3}}),
        ("a: &x {k: 1}\nb: &y {k: 2, <<: *x}\nc: *y", {"a": {"k": 1}, "b": {"k": 2}, "c": {"k": 2}}),
    ],
)
def test_keys_become_strings_and_aliases_and_merges_expand(text, value):
    assert read(text) == value


def test_origin_is_the_line_of_the_key_or_alias_use():
    node = parse("a:\n  b: &x\n\n    - 1\n    - 2\nc: *x", "x.yaml")
    assert node is not None
    places = {path: str(node.find(path)[1].origin) for path in [(), ("a",), ("a", "b"), ("a", "b", 1), ("c",)]}
    lines = {(): 1, ("a",): 1, ("a", "b"): 2, ("a", "b", 1): 5, ("c",): 6}
    assert places == {path: f"x.yaml:{line}" for path, line in lines.items()}


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("a: 1\nb: 2\na: 3", 3, "'a'.* 1"),
        ("a: &x {k: 1}\nb:\n  <<: *x\n  <<: *x", 4, "'<<'"),
        ("a: 1\n'a': 2", 2, "'a'"),
        ("a: 1\n? [b]\n: 2", 2, ""),
        *((f"a: 1\nb: {tag} {{}}", 2, tag) for tag in ("!!python/object:os.system", "!!set", "!!binary", "!mine")),
        ("!!int eight", 1, "'eight'.* int"),
        ("!!bool maybe", 1, "'maybe'.* bool"),
        ("!!float x", 1, "'x'.* float"),
        ("a: {b: 1", 1, "column 9: "),
        ("a: 1\n b: 2", 2, "column 3: "),
        ("a: *b", 1, "column 4: "),
        ("a:\n\t- 1", 2, "column 1: "),
        ("a: 1\n---\nb: 2", 2, "column 1: "),
        ("%YAML", 1, "column 6: "),
        ("a: b\0", None, r"character 5 \(#x0000\)"),
        ("a: &x [*x]", 1, "alias"),
        ("a: &x {b: {<<: *x}}", 1, "alias"),
        ("<<: 3", 1, "column 5: "),
        ("<<: {? [a] : 1}", 1, "key"),
        ("[" * 5000, None, ""),
        ("1" * 5000, 1, "5000"),
        ("\n".join(NESTED), 14, "100,000"),
    ],
)
def test_invalid_yaml_raises_a_one_line_error_with_location(text, where, what):
    with pytest.raises(ConfigError) as raised:
        parse(text, "x.yaml")
    assert re.match(f"x.yaml:{where}: .*{what}" if where else f"x.yaml: .*{what}", str(raised.value))
    assert len(str(raised.value).splitlines()) == 1


def test_moderately_nested_aliases_are_accepted():
    assert len(read("\n".join(NESTED[:10]))["a9"]) == 2


@given(values)
@example({"\x85": "a\u2028b", "two\nlines": " a\tb \n"})
@example([math.inf, 1e300, 1e-6, "1e-6", "no", "null", "", "<<", "=", "0o7"])
def test_written_yaml_reads_back_equal(value):
    assert read(write(value)) == value


@given(st.text(alphabet="0123456789.eE+-xo_:~<ntruefalsNI yo"))
def test_string_that_looks_like_another_type_stays_a_string(text):
    assert read(write({"a": text})) == {"a": text}


@given(st.text() | st.text(alphabet="ab&*<>:{}[],-?!|#%@'\" \n"))
@example("&a {? *a : b}")
def test_any_text_parses_or_raises_a_one_line_error(text):
    problem = ""
    try:
        parse(text, "x.yaml")
    except ConfigError as error:
        problem = str(error)
    assert "\n" not in problem


def test_yaml_output_keeps_order_short_lists_and_portable_floats():
    assert write({"b": 1, "a": 2}) == "b: 1\na: 2\n"
    assert write({"pattern": ["a", "b"]}) == "pattern: [a, b]\n"
    assert write([1e-06, 1e17, 0.5]) == "[1.0e-06, 1.0e+17, 0.5]\n"
    assert write({"a": [{"b": "x y" * 40}], "c": {}}, in_one_line=True) == f"{{a: [{{b: {'x y' * 40}}}], c: {{}}}}\n"
    shared = {"x": 1}
    assert write({"a": shared, "b": shared}) == "a:\n  x: 1\nb:\n  x: 1\n"
