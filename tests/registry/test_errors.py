import pytest

from seqmix.registry import ConfigError, SeqmixError, choices_hint, nearest_hint, require_name
from seqmix.registry.errors import MAX_LINE_LENGTH, shown


def test_nearest_hint_suggests_only_close_names():
    assert '"retention"' in nearest_hint("retntion", ["attention", "retention"])
    assert '"ret"' in nearest_hint("rett", {"ret": 1})
    assert nearest_hint("xyz", ["attention", "retention"]) == ""


def test_require_name_rejects_unknown_names():
    require_name("part", "op", ["op", "train"])
    with pytest.raises(SeqmixError, match=r"^there is no part 'trian'; did you mean \"train\"\? Parts: op, train$"):
        require_name("part", "trian", ["op", "train"])


def test_choices_hint_lists_names_and_shortens_long_lists():
    assert choices_hint("xyz", ["op", "train"]) == "; allowed: op, train"
    assert choices_hint("name-3", [f"name-{n}0" for n in range(13)]).endswith(
        "Allowed: " + ", ".join(f"name-{n}0" for n in range(10)) + " and 3 more"
    )
    assert choices_hint("xyz", [f"name-{n}" for n in range(11)]).endswith("name-9, name-10")


def test_shown_formats_values_as_yaml_and_truncates():
    assert [shown(v) for v in (True, None, "a", 1.5, (1, 2))] == ["true", "null", "'a'", "1.5", "[1, 2]"]
    assert shown("x" * 200).endswith("...")
    assert len(shown("x" * 200)) == 80


def test_error_message_escapes_control_characters():
    assert str(SeqmixError("a key \x1b[31m\u2028, ä")) == r"a key \x1b[31m\u2028, ä"
    assert str(ConfigError("two\nlines of \udcff")) == "two\nlines of \\udcff"


def test_long_error_line_is_shortened_in_the_middle():
    message = str(SeqmixError(f"run.yaml:1: {'x' * 300_000} is wrong\nanother"))
    assert len(message) < 2 * MAX_LINE_LENGTH
    assert message.startswith("run.yaml:1: xxx")
    assert message.endswith("x is wrong\nanother")
    assert nearest_hint("x" * 300_000, ["x"]) == ""
