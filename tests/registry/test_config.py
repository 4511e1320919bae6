from enum import StrEnum
from typing import Any

import pytest
from pydantic import Field, ValidationError

from seqmix.registry import Config, ConfigError


class Mode(StrEnum):
    FAST = "fast"


class Inner(Config):
    n_heads: int
    """Heads."""


class Outer(Config):
    sizes: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    named: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    rate: float = 0.5
    mode: Mode = Field(default=Mode.FAST, strict=False)
    inner: Inner = Inner(n_heads=1)


def problems(cls: type[Config], **values: Any) -> dict[tuple[int | str, ...], str]:
    """The messages of a refusal by location."""
    with pytest.raises(ValidationError) as raised:
        cls.model_validate(values)
    return {error["loc"]: error["msg"] for error in raised.value.errors()}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_heds": 4}, ["Inner: n_heds: unknown key", '"n_heads"']),
        ({"n_heads": "4"}, ["Inner: n_heads: expected an integer, got '4'"]),
        ({}, ["Inner: missing key 'n_heads'"]),
    ],
)
def test_invalid_python_values_raise_a_one_line_error(fields, words):
    with pytest.raises(ConfigError) as refused:
        Inner(**fields)
    assert all(word in str(refused.value) for word in words)
    assert not any(word in str(refused.value) for word in ("\n", "pydantic", "validation error", "input_value"))


def test_config_is_frozen():
    with pytest.raises(ValidationError):
        Inner(n_heads=1).n_heads = 2  # pyright: ignore[reportAttributeAccessIssue]


def test_field_docstrings_become_descriptions():
    assert Inner.model_fields["n_heads"].description == "Heads."


def test_defaults_are_validated():
    class Wrong(Config):
        n: int = "eight"  # pyright: ignore[reportAssignmentType]

    assert problems(Wrong)


@pytest.mark.parametrize("field", [{"sizes": [1, 2]}, {"pairs": [[1, 2], [3, 4]]}, {"named": {"a": [1]}}])
def test_lists_become_tuples_at_any_depth(field):
    assert hash(repr(Outer(**field))) == hash(repr(Outer.model_validate(field)))
    assert "[" not in repr(Outer(**field))


def test_json_lists_become_tuples_without_converting_items():
    assert Outer.model_validate_json('{"sizes": [1, 2], "mode": "fast"}') == Outer(sizes=(1, 2))
    assert list(problems(Outer, sizes=["1"])) == [("sizes", 0)]


def test_field_alias_is_accepted_as_key():
    class Aliased(Config):
        size: int = Field(alias="width")

    assert Aliased.model_validate({"width": 3}).size == 3
