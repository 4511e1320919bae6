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


def test_field_schema_allows_kinds_dotted_paths_and_partial_mappings(schema):
    shape, init = schema["properties"]["shape"], schema["properties"]["init"]
    kinds, null = schema["properties"]["other"]["anyOf"]
    assert shape["discriminator"]["propertyName"] == "kind"
    assert kinds_of(shape) == kinds_of(kinds) == {k: f"#/$defs/{k}Config" for k in ("circle", "square")}
    assert null == {"type": "null"}
    assert [{"$ref": ref} for ref in kinds_of(shape).values()] == shape["oneOf"][:2]
    path = {"type": "object", "properties": {"kind": {"type": "string", "pattern": ":"}}, "required": ["kind"]}
    without_kind = {"type": "object", "not": {"required": ["kind"]}}
    assert path in shape["oneOf"]
    assert without_kind in shape["oneOf"]
    assert without_kind in init["oneOf"]


def test_schema_includes_plug_ins_unless_broken(family):
    module = family.module("stars", family.shape("star"))
    family.plug_in("star", f"{module}:starConfig")
    family.plug_in("moon", "no_such_module:Moon")
    Run = create_model("Run", __base__=Config, shape=(Annotated[family.base, family.registry], ...))
    assert kinds_of(json_schema(Run)["properties"]["shape"]).keys() == {"circle", "square", "star"}


def test_schema_requires_only_kind_and_forbids_unknown_keys(schema):
    circle, normal = schema["$defs"]["circleConfig"], schema["$defs"]["Normal"]
    assert "required" not in schema
    assert circle["required"] == normal["required"] == ["kind"]
    assert schema["additionalProperties"] is circle["additionalProperties"] is False
    assert circle["properties"]["size"]["description"] == "How large it is."
    assert schema["properties"]["extends"]["type"] == "string"
    assert "extends" not in circle["properties"]


def test_recursive_kinds_have_a_schema_and_round_trip():
    schema = json_schema(Tree)
    inner = kinds_of(schema["$defs"]["Branch"]["properties"]["inner"]["items"])
    assert inner == {"branch": "#/$defs/Branch", "leaf": "#/$defs/Leaf"}
    data = {"root": {"kind": "branch", "inner": ({"kind": "leaf"}, {"kind": "branch", "inner": ()})}}
    assert Tree.model_validate(data).model_dump() == data


def test_mapping_without_kind_gets_the_keys_of_the_default_kind(family):
    registry = Registry("shape", family.base, package=family.package, default_kind="square")
    schema = json_schema(create_model("Run", __base__=Config, shape=(Annotated[family.base, registry], ...)))
    *_, without = schema["properties"]["shape"]["oneOf"]
    assert without["not"] == {"required": ["kind"]}
    assert without["properties"].keys() == {"color", "size"}
    assert "required" not in without
