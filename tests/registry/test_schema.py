from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, create_model

from seqmix.registry import Config, Registry, json_schema


class Paper(Config):
    kind: Literal["paper"] = "paper"


class Normal(Config):
    kind: Literal["normal"] = "normal"
    std: float
    """Standard deviation."""


class NestConfig(Config):
    kind: str


NESTS = Registry("nest", NestConfig, package="no_such_package")


@NESTS.register
class Leaf(NestConfig):
    kind: Literal["leaf"] = "leaf"


@NESTS.register
class Branch(NestConfig):
    kind: Literal["branch"] = "branch"
    inner: tuple[Annotated[NestConfig, NESTS], ...] = ()


class Tree(Config):
    root: Annotated[NestConfig, NESTS]


@pytest.fixture
def schema(family) -> dict[str, Any]:
    shape = Annotated[family.base, family.registry]
    fields: dict[str, Any] = {
        "shape": (shape, ...),
        "other": (shape | None, ...),
        "init": (Annotated[Paper | Normal, Field(discriminator="kind")], ...),
    }
    return json_schema(create_model("Run", __base__=Config, **fields))


def kinds_of(union: dict[str, Any]) -> dict[str, str]:
    return union["discriminator"]["mapping"]


def test_a_field_is_one_of_all_kinds_told_apart_by_kind(family, schema):
    shape = schema["properties"]["shape"]
    assert shape["discriminator"]["propertyName"] == "kind"
    assert kinds_of(shape) == {k: f"#/$defs/{k}Config" for k in ("circle", "square")}
    assert [{"$ref": ref} for ref in kinds_of(shape).values()] == shape["oneOf"][:2]


def test_a_field_that_may_be_null_has_the_kinds_and_null(schema):
    kinds, null = schema["properties"]["other"]["anyOf"]
    assert kinds_of(kinds).keys() == {"circle", "square"}
    assert null == {"type": "null"}


def test_every_kind_is_defined(schema):
    assert {"circleConfig", "squareConfig", "Paper", "Normal"} <= schema["$defs"].keys()


def test_a_plug_in_joins(family):
    module = family.module("stars", family.shape("star"))
    family.plug_in("star", f"{module}:starConfig")
    family.plug_in("moon", "no_such_module:Moon")
    Run = create_model("Run", __base__=Config, shape=(Annotated[family.base, family.registry], ...))
    assert kinds_of(json_schema(Run)["properties"]["shape"]).keys() == {"circle", "square", "star"}


def test_a_dotted_path_is_allowed(schema):
    path = {"type": "object", "properties": {"kind": {"type": "string", "pattern": ":"}}, "required": ["kind"]}
    assert path in schema["properties"]["shape"]["oneOf"]


def test_a_difference_may_leave_out_the_kind(schema):
    without_kind = {"type": "object", "not": {"required": ["kind"]}}
    assert without_kind in schema["properties"]["shape"]["oneOf"]
    assert without_kind in schema["properties"]["init"]["oneOf"]


def test_nothing_is_required_but_a_kind(schema):
    assert "required" not in schema
    assert {d: schema["$defs"][d].get("required") for d in ("circleConfig", "Normal")} == {
        "circleConfig": ["kind"],
        "Normal": ["kind"],
    }


def test_extends_is_allowed_at_the_top(schema):
    assert schema["properties"]["extends"]["type"] == "string"
    assert "extends" not in schema["$defs"]["circleConfig"]["properties"]


def test_unknown_keys_are_not_allowed(schema):
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["circleConfig"]["additionalProperties"] is False


def test_docstrings_of_fields_are_descriptions(schema):
    assert schema["$defs"]["circleConfig"]["properties"]["size"]["description"] == "How large it is."


def test_kinds_that_hold_kinds_are_described():
    schema = json_schema(Tree)
    assert kinds_of(schema["$defs"]["Branch"]["properties"]["inner"]["items"]) == {
        "branch": "#/$defs/Branch",
        "leaf": "#/$defs/Leaf",
    }


def test_kinds_that_hold_kinds_are_read_and_written():
    data = {"root": {"kind": "branch", "inner": ({"kind": "leaf"}, {"kind": "branch", "inner": ()})}}
    assert Tree.model_validate(data).model_dump() == data


def test_a_mapping_without_kind_has_the_keys_of_the_default(family):
    registry = Registry("shape", family.base, package=family.package, default_kind="square")
    schema = json_schema(create_model("Run", __base__=Config, shape=(Annotated[family.base, registry], ...)))
    *_, without = schema["properties"]["shape"]["oneOf"]
    assert without["not"] == {"required": ["kind"]}
    assert without["properties"].keys() == {"color", "size"}
    assert "required" not in without
