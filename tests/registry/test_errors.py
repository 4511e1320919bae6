from seqmix.registry import ConfigError, SeqmixError, nearest
from seqmix.registry.errors import shown


def test_nearest_names_the_closest_word():
    assert nearest("retntion", ["attention", "retention"]) == '; did you mean "retention"?'


def test_nearest_is_silent_where_nothing_is_close():
    assert nearest("xyz", ["attention", "retention"]) == ""


def test_nearest_takes_a_mapping_of_names():
    assert nearest("rett", {"ret": 1}) == '; did you mean "ret"?'


def test_a_configuration_error_is_a_user_error_and_a_value_error():
    assert issubclass(ConfigError, SeqmixError)
    assert issubclass(SeqmixError, ValueError)


def test_values_are_shown_as_yaml_has_them():
    assert [shown(v) for v in (True, None, "a", 1.5, (1, 2))] == ["true", "null", "'a'", "1.5", "[1, 2]"]


def test_a_long_value_is_cut():
    assert shown("x" * 200).endswith("...")
    assert len(shown("x" * 200)) == 80


def test_an_error_quotes_what_a_terminal_would_obey():
    assert str(SeqmixError("a key \x1b[31m\u2028, ä")) == r"a key \x1b[31m\u2028, ä"
    assert str(ConfigError("two\nlines of \udcff")) == "two\nlines of \\udcff"
