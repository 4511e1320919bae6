from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

import pytest
from pydantic import Field, ValidationError, field_validator, model_validator

from seqmix.registry import Config, SeqmixError
from seqmix.registry.explain import explain
from seqmix.registry.yaml import parse


class Mode(StrEnum):
    CHUNKWISE = "chunkwise"
    RECURRENT = "recurrent"


class Paper(Config):
    kind: Literal["paper"] = "paper"


class Normal(Config):
    kind: Literal["normal"] = "normal"
    std: float = Field(default=0.02, gt=0)


class Everything(Config):
    count: int = Field(default=1, gt=0)
    share: float = Field(default=0.5, ge=0, lt=1)
    bound: float = Field(default=0.5, gt=0.25, le=10)
    flag: bool = False
    word: str = Field(default="abc", min_length=2, pattern="^[a-z]*$")
    choice: Literal["linear", "cosine"] = "linear"
    mode: Mode = Field(default=Mode.CHUNKWISE, strict=False)
    maybe: int | None = None
    rate: float | Literal["auto"] = "auto"
    angles: Literal["rope", "xpos"] | Literal["none"] = "none"
    pair: tuple[float, float] = (0.0, 1.0)
    words: tuple[str, ...] = Field(default=("a",), min_length=1)
    named: dict[str, Normal] = Field(default_factory=dict)
    init: Annotated[Paper | Normal, Field(discriminator="kind")] = Paper()
    path: Path | None = Field(default=None, strict=False)
    mutable: list[int] = Field(default_factory=list)

    @field_validator("count")
    @classmethod
    def _count_is_not_13(cls, value: int) -> int:
        if value == 13:
            raise ValueError("13 brings bad luck; take 12")
        return value

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.flag and self.count > 5:
            raise SeqmixError("flag goes with at most 5")
        return self


def sentence(text: str) -> str:
    tree = parse(text, "x.yaml")
    assert tree is not None
    with pytest.raises(ValidationError) as raised:
        Everything.model_validate(tree.plain())
    return explain(raised.value, tree)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("count: eight", "count: needs an integer, and was given 'eight'"),
        ("count: '8'", "count: needs an integer, and was given '8'"),
        ("count: true", "count: needs an integer, and was given true"),
        ("count: 8.5", "count: needs an integer, and was given 8.5"),
        ("count: null", "count: needs an integer, and was given null"),
        ("count: -1", "count: needs a number > 0, and was given -1"),
        ("count: 13", "count: 13 brings bad luck; take 12"),
        ("share: -1", "share: needs a number >= 0, and was given -1"),
        ("share: 1", "share: needs a number < 1, and was given 1"),
        ("share: half", "share: needs a number, and was given 'half'"),
        ("bound: 0", "bound: needs a number > 0.25, and was given 0"),
        ("bound: 11", "bound: needs a number <= 10, and was given 11"),
        ("flag: yes", "flag: needs true or false, and was given 'yes'"),
        ("flag: 1", "flag: needs true or false, and was given 1"),
        ("word: 1", "word: needs a string, and was given 1"),
        ("word: a", "word: needs a length >= 2, and was given 'a'"),
        ("word: A-B", "word: needs a string like ^[a-z]*$, and was given 'A-B'"),
        ("choice: linaer", "choice: needs 'linear' or 'cosine', and was given 'linaer'; did you mean \"linear\"?"),
        ("choice: 1", "choice: needs 'linear' or 'cosine', and was given 1"),
        ("mode: chunk", "mode: needs 'chunkwise' or 'recurrent', and was given 'chunk'; did you mean \"chunkwise\"?"),
        ("maybe: x", "maybe: needs an integer, and was given 'x'"),
        ("rate: aut", "rate: needs a number or 'auto', and was given 'aut'; did you mean \"auto\"?"),
        ("pair: [1]", "pair: missing item 2"),
        ("pair: [1, 2, 3]", "pair: needs a length <= 2, and was given [1, 2, 3]"),
        ("pair: [1, x]", "pair[1]: needs a number, and was given 'x'"),
        ("pair: 1", "pair: needs a list, and was given 1"),
        ("words: []", "words: needs a length >= 1, and was given []"),
        ("words: [1]", "words[0]: needs a string, and was given 1"),
        ("words: [a, 1]", "words[1]: needs a string, and was given 1"),
        ("named: [a]", 'named: needs a mapping, and was given ["a"]'),
        ("named: {a: 1}", "named.a: needs a mapping, and was given 1"),
        ("named: {a: {std: 0}}", "named.a.std: needs a number > 0, and was given 0"),
        ("init: {kind: x}", "init.kind: needs 'paper' or 'normal', and was given 'x'"),
        ("init: {kind: 3}", "init.kind: needs 'paper' or 'normal', and was given 3"),
        ("init: {std: 1}", "init: missing key 'kind'"),
        ("init: {kind: normal, std: 0}", "init.std: needs a number > 0, and was given 0"),
        ("init: {kind: paper, std: 1}", "init.std: unknown key 'std'; allowed: kind"),
        ("init: paper", "init: needs a mapping, and was given 'paper'"),
        ("path: 3", "path: needs a path, and was given 3"),
        ("mutable: [1]", "mutable: a configuration is frozen: its class must declare tuple[...] here"),
        ("{flag: true, count: 6}", "flag goes with at most 5"),
        ("chioce: linear", None),
    ],
)
def test_an_error_says_what_is_needed_and_what_was_given(text, expected):
    told = sentence(text)
    if expected is None:
        assert told.startswith("x.yaml:1: chioce: unknown key 'chioce'; allowed: count, ")
        assert told.endswith('did you mean "choice"?')
    else:
        assert told == f"x.yaml:1: {expected}"


def test_two_literals_are_one_need():
    told = sentence("angles: rop")
    assert told.startswith("x.yaml:1: angles: needs '")
    assert all(word in told for word in ("'rope'", "'xpos'", "'none'", "and was given 'rop'; did you mean \"rope\"?"))


def test_an_item_of_a_list_is_told_in_its_own_line():
    assert sentence("words:\n- a\n- 1").startswith("x.yaml:3: words[1]: ")


def test_a_long_value_is_cut():
    assert len(sentence(f"count: {'x' * 500}")) < 150
