import math
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


def read(text: str) -> Any:
    node = parse(text, "x.yaml")
    return node and node.plain()


def error(text: str) -> str:
    with pytest.raises(ConfigError) as raised:
        parse(text, "x.yaml")
    return str(raised.value)


@pytest.mark.parametrize("text", ["true", "True", "TRUE"])
def test_true_is_a_boolean(text):
    assert read(text) is True


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "y", "N", "No", "tRue"])
def test_other_words_are_strings(text):
    assert read(text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E5", 1e5), ("+.5", 0.5), ("1.", 1.0), ("-2.5e+3", -2500.0), ("-.inf", -math.inf)],
)
def test_numbers_with_a_point_or_an_exponent_are_floats(text, value):
    assert (read(text), type(read(text))) == (value, float)


def test_not_a_number_is_a_float():
    assert math.isnan(read(".nan"))


@pytest.mark.parametrize(
    ("text", "value"), [("8", 8), ("-8", -8), ("010", 10), ("0o17", 15), ("0x1F", 31), ("1_000", 1000)]
)
def test_integers(text, value):
    assert (read(text), type(read(text))) == (value, int)


@pytest.mark.parametrize("text", ["2024-01-01", "12:30:00", "1e", "=", "e5", "."])
def test_what_yaml_1_1_takes_for_something_else_is_a_string(text):
    assert read(f"a: {text}") == {"a": text}


@pytest.mark.parametrize("text", ["~", "null", "Null", ""])
def test_null(text):
    assert read(f"a: {text}") == {"a": None}


@pytest.mark.parametrize("text", ["'true'", '"8"', "!!str 8", "'1e-3'"])
def test_quoted_is_a_string(text):
    assert isinstance(read(text), str)


def test_keys_are_strings_as_written():
    assert read("{1: a, true: b, null: c, 0x1F: d}") == {"1": "a", "true": "b", "null": "c", "0x1F": "d"}


def test_nothing_is_no_document():
    assert parse("# only a comment\n", "x.yaml") is None


def test_anchors_and_aliases():
    assert read("a: &x {k: [1]}\nb: *x") == {"a": {"k": [1]}, "b": {"k": [1]}}


def test_merge_keys_give_way_to_own_keys():
    assert read("a: &x {k: 1, l: 2}\nb: {l: 3, <<: *x}") == {"a": {"k": 1, "l": 2}, "b": {"k": 1, "l": 3}}


def test_an_aliased_mapping_with_a_merge_key_is_read_twice_alike():
    assert read("a: &x {k: 1}\nb: &y {k: 2, <<: *x}\nc: *y")["c"] == {"k": 2}


def test_values_know_the_line_of_their_key():
    node = parse("a:\n  b:\n\n    - 1\n    - 2\n", "x.yaml")
    assert node is not None
    places = {path: str(node.find(path)[1].origin) for path in [(), ("a",), ("a", "b"), ("a", "b", 1)]}
    assert places == {(): "x.yaml:1", ("a",): "x.yaml:1", ("a", "b"): "x.yaml:2", ("a", "b", 1): "x.yaml:5"}


def test_an_alias_is_placed_where_it_is_used():
    node = parse("a: &x {k: 1}\nb: *x", "x.yaml")
    assert node is not None
    assert str(node.find(["b"])[1].origin) == "x.yaml:2"


def test_a_key_given_twice_is_told_with_both_lines():
    assert error("a: 1\nb: 2\na: 3") == "x.yaml:3: key 'a' is given twice, first in line 1"


def test_a_merge_key_given_twice_is_given_twice():
    assert "'<<' is given twice" in error("a: &x {k: 1}\nb:\n  <<: *x\n  <<: *x")


def test_a_key_given_twice_in_two_ways_is_given_twice():
    assert "given twice" in error("a: 1\n'a': 2")


def test_a_key_that_is_no_word_is_an_error():
    assert error("a: 1\n? [b]\n: 2") == "x.yaml:2: a key must be a word, not a list or a mapping"


@pytest.mark.parametrize("tag", ["!!python/object:os.system", "!!set", "!!binary", "!mine"])
def test_tags_are_refused(tag):
    assert error(f"a: 1\nb: {tag} {{}}").startswith(f"x.yaml:2: the tag {tag} is not allowed")


@pytest.mark.parametrize("text", ["!!int eight", "!!bool maybe", "!!float x"])
def test_a_tag_that_does_not_fit_is_an_error(text):
    assert "is no" in error(text)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a: {b: 1", "x.yaml:1: column 9: "),
        ("a: 1\n b: 2", "x.yaml:2: column 3: "),
        ("a: *b", "x.yaml:1: column 4: "),
        ("a:\n\t- 1", "x.yaml:2: column 1: "),
        ("a: 1\n---\nb: 2", "x.yaml:2: column 1: expected a single document in the stream, but found another document"),
        ("%YAML", "x.yaml:1: column 6: "),
        ("a: b\0", "x.yaml: character 5 (#x0000)"),
        ("a: &x [*x]", "x.yaml:1: an alias stands inside of what it names"),
        ("<<: 3", "x.yaml:1: column 5: "),
        ("<<: {? [a] : 1}", "x.yaml:1: a key must be a word"),
        ("a: &x {b: {<<: *x}}", "x.yaml:1: an alias stands inside of what it names"),
        ("[" * 5000, "x.yaml: nested too deeply"),
        ("1" * 5000, "x.yaml:1: a number of 5000 digits is too long"),
    ],
)
def test_broken_text_is_one_sentence_with_its_place(text, where):
    assert error(text).startswith(where)
    assert "\n" not in error(text)


@given(values)
@example({"\x85": "a\u2028b", "two\nlines": " a\tb \n"})
@example([math.inf, 1e300, 1e-6, "1e-6", "no", "null", "", "<<", "=", "0o7"])
def test_what_is_written_is_read_as_the_same_value(value):
    assert read(write(value)) == value


@given(st.text(alphabet="0123456789.eE+-xo_:~<ntruefalsNI yo"))
def test_a_string_that_looks_like_something_else_stays_a_string(text):
    assert read(write({"a": text})) == {"a": text}


@given(st.text() | st.text(alphabet="ab&*<>:{}[],-?!|#%@'\" \n"))
@example("&a {? *a : b}")
def test_any_text_is_read_or_refused_in_one_line(text):
    problem = ""
    try:
        parse(text, "x.yaml")
    except ConfigError as error:
        problem = str(error)
    assert "\n" not in problem


def test_keys_are_written_in_their_order():
    assert write({"b": 1, "a": 2}) == "b: 1\na: 2\n"


def test_a_list_of_scalars_is_written_in_one_line():
    assert write({"pattern": ["a", "b"]}) == "pattern: [a, b]\n"


def test_a_number_is_written_so_that_yaml_1_1_has_a_number_too():
    assert write([1e-06, 1e17, 0.5]) == "[1.0e-06, 1.0e+17, 0.5]\n"


def test_a_value_is_written_in_one_line_on_demand():
    assert write({"a": [{"b": "x y" * 40}], "c": {}}, in_one_line=True) == f"{{a: [{{b: {'x y' * 40}}}], c: {{}}}}\n"


def test_a_shared_value_is_written_out_each_time():
    shared = {"x": 1}
    assert write({"a": shared, "b": shared}) == "a:\n  x: 1\nb:\n  x: 1\n"


def test_aliases_of_aliases_are_counted_and_not_written_out():
    lines = ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 64))]
    assert error("\n".join(lines)) == "x.yaml:14: a document has at most 100,000 values, aliases written out"
    assert len(read("\n".join(lines[:10]))["a9"]) == 2
