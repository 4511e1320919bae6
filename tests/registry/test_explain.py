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
            raise ValueError("13 brings bad luck")
        return value

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.flag and self.count > 5:
            raise SeqmixError("flag goes with at most 5")
        return self


CASES = [
    ("count: eight", "count", "an integer", "'eight'"),
    ("count: '8'", "count", "an integer", "'8'"),
    ("count: true", "count", "an integer", "true"),
    ("count: 8.5", "count", "an integer", "8.5"),
    ("count: -1", "count", "> 0", "-1"),
    ("count: 13", "count", "13 brings bad luck"),
    ("share: -1", "share", ">= 0", "-1"),
    ("share: 1", "share", "< 1", "1"),
    ("share: half", "share", "a number", "'half'"),
    ("bound: 0", "bound", "> 0.25", "0"),
    ("bound: 11", "bound", "<= 10", "11"),
    ("flag: yes", "flag", "true or false", "'yes'"),
    ("word: 1", "word", "a string", "1"),
    ("word: a", "word", "length >= 2", "'a'"),
    ("word: A-B", "word", "^[a-z]*$", "'A-B'"),
    ("choice: linaer", "choice", "'linear' or 'cosine'", "'linaer'", '"linear"?'),
    ("mode: chunk", "mode", "'chunkwise' or 'recurrent'", "'chunk'", '"chunkwise"?'),
    ("maybe: x", "maybe", "an integer", "'x'"),
    ("rate: aut", "rate", "a number or 'auto'", "'aut'", '"auto"?'),
    ("angles: rop", "angles", "'rope'", "'xpos'", "'none'", "'rop'", '"rope"?'),
    ("pair: [1]", "pair", "item 2"),
    ("pair: [1, 2, 3]", "pair", "length <= 2", "[1, 2, 3]"),
    ("pair: [1, x]", "pair[1]", "a number", "'x'"),
    ("pair: 1", "pair", "a list", "1"),
    ("words: []", "words", "length >= 1", "[]"),
    ("words: [a, 1]", "words[1]", "a string", "1"),
    ("named: [a]", "named", "a mapping", '["a"]'),
    ("named: {a: 1}", "named.a", "a mapping", "1"),
    ("named: {a: {std: 0}}", "named.a.std", "> 0", "0"),
    ("init: {kind: x}", "init.kind", "'paper' or 'normal'", "'x'"),
    ("init: {std: 1}", "init", "'kind'"),
    ("init: {kind: normal, std: 0}", "init.std", "> 0", "0"),
    ("init: {kind: paper, std: 1}", "init.std", "'std'", "kind"),
    ("init: paper", "init", "a mapping", "'paper'"),
    ("path: 3", "path", "a path", "3"),
    ("mutable: [1]", "mutable", "tuple[...]"),
    ("{flag: true, count: 6}", "", "flag goes with at most 5"),
    ("'{b}': 1", "{b}", "'{b}'"),
    ("chioce: linear", "chioce", "'chioce'", "count, ", '"choice"?'),
]


def sentence(text: str) -> str:
    tree = parse(text, "x.yaml")
    assert tree is not None
    with pytest.raises(ValidationError) as raised:
        Everything.model_validate(tree.plain())
    return explain(raised.value, tree)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_names_the_key_expected_and_given_value(case):
    text, key, *words = case
    place, _, problem = sentence(text).partition(f"{key}: " if key else " ")
    assert place == "x.yaml:1:" + (" " if key else "")
    assert "\n" not in problem
    assert all(word in problem for word in words), problem


def test_list_item_error_has_its_own_line_and_truncates_values():
    assert sentence("words:\n- a\n- 1").startswith("x.yaml:3: words[1]: ")
    assert len(sentence(f"count: {'x' * 500}")) < 150
