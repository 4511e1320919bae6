import sys
from typing import Annotated, Any, Literal

import pytest
from pydantic import ValidationError, ValidationInfo, create_model, model_validator

from seqmix.registry import Config, ConfigError, Registry, dump, load


def holder(family: Any) -> Any:
    """A configuration with a field of the family, one that may be null, and a list."""
    shape = Annotated[family.base, family.registry]
    fields: dict[str, Any] = {"shape": (shape, ...), "other": (shape | None, None), "many": (tuple[shape, ...], ())}
    return create_model("Holder", __base__=Config, **fields)


def toy(family: Any, name: str = "mine", qualname: str = "Toy", module: str = "toy_module") -> Any:
    body = {"__annotations__": {"kind": Literal[name]}, "kind": name, "area": lambda self: 0.0}
    return type("Toy", (family.base,), {**body, "__module__": module, "__qualname__": qualname})


CIRCLE = {"kind": "circle", "size": 2}


@pytest.fixture
def star(family) -> str:
    """The dotted path of a class outside the package."""
    return f"{family.module('stars', family.shape('star'))}:starConfig"


def test_kinds_are_listed_without_importing_their_modules(family):
    assert family.registry.kinds() == ["circle", "square"]
    assert f"{family.package}.circle" not in sys.modules
    assert family.registry.resolve("circle").__name__ == "circleConfig"
    assert f"{family.package}.square" not in sys.modules
    assert family.registry.origin("circle") == f"{family.package}.circle"


def test_built_in_kinds_exclude_registered_classes(family):
    family.registry.register(toy(family))
    found = family.registry.built_in()
    assert {kind: cls.__name__ for kind, cls in found.items()} == {"circle": "circleConfig", "square": "squareConfig"}


def test_file_added_later_becomes_a_kind(family):
    assert "star" not in family.registry.kinds()
    helper = f"from {family.package}.base import ShapeConfig\n\nclass Rounded(ShapeConfig):\n    radius: float = 0.0\n"
    (family.folder / family.package / "star.py").write_text(helper + family.shape("star"))
    assert family.registry.resolve("star")(size=2).area() == 4


def test_file_without_the_named_class_raises(family):
    (family.folder / family.package / "star.py").write_text('x = """kind: Literal["star"]"""')
    with pytest.raises(ConfigError, match=r'star .*base:ShapeConfig .*kind: Literal\["star"\]'):
        family.registry.resolve("star")


def test_redefining_a_registered_class_replaces_it(family):
    mine = family.registry.register(toy(family))
    assert family.registry.register(mine) is mine
    assert family.registry.origin("mine") == "toy_module"
    assert family.registry.kinds() == ["circle", "mine", "square"]
    again = family.registry.register(toy(family))
    assert family.registry.resolve("mine") is again is not mine
    assert Registry("shape", family.base, package=family.package).kinds() == ["circle", "square"]


def test_registering_a_taken_kind_raises_and_names_both_classes(family):
    family.registry.register(toy(family))
    with pytest.raises(ConfigError, match=r"'mine' .*toy_module:Toy .*other_module:Toy"):
        family.registry.register(toy(family, module="other_module"))
    with pytest.raises(ConfigError, match=rf"'circle' .*{family.package}\.circle .*toy_module"):
        family.registry.register(toy(family, "circle"))
    assert family.registry.resolve("circle").__name__ == "circleConfig"


def test_registering_an_unsuitable_class_raises(family):
    class Other(Config):
        kind: Literal["other"] = "other"

    module = {"__module__": "toy_module"}
    abstract = type("Half", (family.base,), {"__annotations__": {"kind": Literal["half"]}} | module)
    kindless = type("Kindless", (family.base,), {"area": lambda self: 0.0} | module)
    for refused, words in (
        (Other, r"base:ShapeConfig, got .*Other$"),
        (abstract, "Half .*area"),
        (kindless, "Kindless .*kind"),
    ):
        with pytest.raises(ConfigError, match=words):
            family.registry.register(refused)


def test_field_accepts_a_mapping_with_kind_or_an_instance(family):
    Holder = holder(family)
    read = Holder(shape=CIRCLE, other=None, many=[{"kind": "square", "size": 1}])
    assert type(read.shape) is family.registry.resolve("circle")
    assert (read.other, [shape.kind for shape in read.many]) == (None, ["square"])
    assert Holder(shape=read.shape).shape is read.shape
    mine = family.registry.register(toy(family))  # after the field was declared
    assert type(Holder(shape={"kind": "mine"}).shape) is mine


@pytest.mark.parametrize(
    ("data", "place", "words"),
    [
        ({"shape": {"kind": "circel"}}, ("shape", "kind"), ["'circel'", "circle, square", '"circle"?']),
        ({"shape": {}}, ("shape",), ["'kind'", "circle, square"]),
        *(({"shape": value}, ("shape",), ["mapping"]) for value in (5, "circle", None, [1])),
        ({"shape": {"kind": 3}}, ("shape", "kind"), []),
        ({"shape": {"kind": "circle", "size": "x"}}, ("shape", "size"), []),
        ({"shape": CIRCLE, "many": [CIRCLE | {"colour": "red"}]}, ("many", 0, "colour"), ["'colour'", '"color"?']),
    ],
)
def test_validation_error_has_the_location_of_the_fault(family, data, place, words):
    with pytest.raises(ValidationError) as raised:
        holder(family).model_validate(data)
    (error,) = raised.value.errors()
    assert error["loc"] == place
    assert all(word in error["msg"] for word in words)


def test_dump_includes_subclass_fields_and_always_the_kind(family):
    read = holder(family)(shape=CIRCLE, many=[{"kind": "square", "size": 1}])
    for mode in ("python", "json"):
        dumped = read.model_dump(mode=mode)
        assert (dumped["shape"], dumped["other"]) == ({"kind": "circle", "color": "red", "size": 2.0}, None)
    assert read.model_dump(exclude_defaults=True)["shape"] == CIRCLE
    assert type(read).model_validate_json(read.model_dump_json()) == read


def test_validation_context_reaches_nested_kinds(family):
    seen = []
    base = toy(family)

    class Watching(base):
        @model_validator(mode="after")
        def _watch(self, info: ValidationInfo) -> Any:
            seen.append(info.context)
            return self

    family.registry.register(Watching)
    holder(family).model_validate({"shape": {"kind": "mine"}}, context="here")
    assert seen == ["here"]


def test_dotted_path_works_as_kind_and_is_dumped_as_path(family, star, tmp_path):
    assert family.registry.resolve(star).__name__ == "starConfig"
    assert family.registry.origin(star) == star.partition(":")[0]
    config = holder(family)(shape={"kind": star, "size": 3})
    assert (config.shape.kind, config.shape.area()) == ("star", 9)
    instance = holder(family)(shape=family.registry.resolve(star)(size=3))
    assert config.model_dump()["shape"]["kind"] == instance.model_dump()["shape"]["kind"] == star
    (tmp_path / "run.yaml").write_text(dump(config))
    assert load(type(config), tmp_path / "run.yaml", presets=tmp_path) == config


def test_dotted_path_can_name_a_nested_class(family):
    module = family.module("nested", f"{family.shape('star')}\n\nclass Outer:\n    Inner = starConfig\n")
    assert family.registry.resolve(f"{module}:Outer.Inner").__name__ == "starConfig"


def test_path_is_dumped_as_kind_only_for_the_same_class(family):
    for path, dumped in (
        (f"{family.module('mine', family.shape('circle'))}:circleConfig", None),
        (f"{family.package}.circle:circleConfig", "circle"),
    ):
        config = holder(family)(shape={"kind": path, "size": 3})
        assert config.model_dump()["shape"]["kind"] == (dumped or path)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_module:Config", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("json:JSONDecodr", '"JSONDecoder"?'),
        ("json:JSONDecoder", "json.decoder:JSONDecoder"),
        ("json:dumps", "function dumps"),
        ("json:", "'json:'"),
        (":Config", "':Config'"),
        ("..up:Config", "TypeError"),
    ],
)
def test_invalid_dotted_path_raises_with_the_reason(family, path, reason):
    with pytest.raises(ConfigError) as raised:
        family.registry.resolve(path)
    assert str(raised.value).startswith(f"shape kind {path!r} ")
    assert reason in str(raised.value)
