import sys
from typing import Annotated, Any, Literal

import pytest
from pydantic import ValidationError, ValidationInfo, create_model, model_validator

from seqmix.registry import Config, ConfigError, Registry


def holder(family: Any) -> Any:
    """A configuration with a field of the family, one that may be null, and a list."""
    shape = Annotated[family.base, family.registry]
    fields: dict[str, Any] = {
        "shape": (shape, ...),
        "other": (shape | None, None),
        "many": (tuple[shape, ...], ()),
    }
    return create_model("Holder", __base__=Config, **fields)


def errors(cls: Any, data: Any) -> list[tuple[tuple[int | str, ...], str]]:
    with pytest.raises(ValidationError) as raised:
        cls.model_validate(data)
    return [(error["loc"], error["msg"].removeprefix("Value error, ")) for error in raised.value.errors()]


def toy(family: Any, name: str = "mine", qualname: str = "Toy", module: str = "toy_module") -> Any:
    body = {"__annotations__": {"kind": Literal[name]}, "kind": name, "area": lambda self: 0.0}
    return type("Toy", (family.base,), {**body, "__module__": module, "__qualname__": qualname})


# ---- files of the family's package


def test_files_that_name_their_kind_are_kinds(family):
    assert family.registry.kinds() == ["circle", "square"]


def test_listing_imports_no_file(family):
    family.registry.kinds()
    assert f"{family.package}.circle" not in sys.modules


def test_resolving_imports_only_what_was_asked_for(family):
    assert family.registry.resolve("circle").__name__ == "circleConfig"
    assert f"{family.package}.square" not in sys.modules


def test_origin_is_the_module(family):
    assert family.registry.origin("circle") == f"{family.package}.circle"


def test_built_in_kinds_are_those_of_the_files(family):
    family.registry.register(toy(family))
    found = family.registry.built_in()
    assert {kind: cls.__name__ for kind, cls in found.items()} == {"circle": "circleConfig", "square": "squareConfig"}


def test_a_file_written_later_joins(family):
    assert "star" not in family.registry.kinds()
    (family.folder / family.package / "star.py").write_text(family.shape("star"))
    assert family.registry.resolve("star")(size=2).area() == 4


def test_an_unknown_kind_is_told_with_those_allowed_and_the_nearest(family):
    with pytest.raises(ConfigError) as raised:
        family.registry.resolve("circel")
    assert str(raised.value) == "unknown shape kind 'circel'; allowed: circle, square; did you mean \"circle\"?"


def test_a_file_without_the_class_it_promises_is_an_error(family):
    (family.folder / family.package / "star.py").write_text('x = """kind: Literal["star"]"""')
    with pytest.raises(ConfigError, match=r'star has no subclass of .* with kind: Literal\["star"\]'):
        family.registry.resolve("star")


def test_a_file_may_hold_other_classes_of_the_family(family):
    helper = f"from {family.package}.base import ShapeConfig\n\nclass Rounded(ShapeConfig):\n    radius: float = 0.0\n"
    (family.folder / family.package / "star.py").write_text(helper + family.shape("star"))
    assert family.registry.resolve("star").__name__ == "starConfig"


# ---- classes of the running program


def test_a_registered_class_is_a_kind(family):
    mine = family.registry.register(toy(family))
    assert family.registry.resolve("mine") is mine
    assert family.registry.origin("mine") == "toy_module"
    assert family.registry.kinds() == ["circle", "mine", "square"]


def test_registering_a_class_again_is_harmless(family):
    mine = toy(family)
    family.registry.register(mine)
    assert family.registry.register(mine) is mine


def test_a_class_defined_again_replaces_the_one_before(family):
    family.registry.register(toy(family))
    again = family.registry.register(toy(family))
    assert family.registry.resolve("mine") is again


def test_a_second_class_of_a_kind_is_an_error_that_names_both(family):
    family.registry.register(toy(family))
    with pytest.raises(ConfigError, match="'mine' is provided by toy_module:Toy and by other_module:Toy"):
        family.registry.register(toy(family, module="other_module"))


def test_a_class_of_a_built_in_kind_is_an_error_that_names_both(family):
    with pytest.raises(ConfigError, match=rf"'circle' is provided by {family.package}\.circle and by toy_module"):
        family.registry.register(toy(family, "circle"))


def test_a_refused_class_is_not_registered(family):
    with pytest.raises(ConfigError):
        family.registry.register(toy(family, "circle"))
    assert family.registry.resolve("circle").__name__ == "circleConfig"


def test_a_class_of_another_family_is_refused(family):
    class Other(Config):
        kind: Literal["other"] = "other"

    with pytest.raises(ConfigError, match=r"Other is no subclass of shapes\d+\.base:ShapeConfig"):
        family.registry.register(Other)


def test_an_abstract_class_is_refused(family):
    abstract = type("Half", (family.base,), {"__annotations__": {"kind": Literal["half"]}, "__module__": "toy_module"})
    with pytest.raises(ConfigError, match="is abstract: it lacks area"):
        family.registry.register(abstract)


def test_a_class_without_a_kind_is_refused(family):
    kindless = type("Kindless", (family.base,), {"area": lambda self: 0.0, "__module__": "toy_module"})
    with pytest.raises(ConfigError, match=r'toy_module:Kindless must declare kind: Literal\["its_name"\]'):
        family.registry.register(kindless)


# ---- a field of a configuration


def test_a_mapping_becomes_the_class_of_its_kind(family):
    read = holder(family)(shape={"kind": "circle", "size": 2})
    assert type(read.shape) is family.registry.resolve("circle")


def test_an_instance_is_taken_as_it_is(family):
    circle = family.registry.resolve("circle")(size=2)
    assert holder(family)(shape=circle).shape is circle


def test_null_is_taken_where_the_field_may_be_null(family):
    assert holder(family)(shape={"kind": "circle", "size": 2}, other=None).other is None


def test_a_list_of_the_family_is_read(family):
    read = holder(family)(shape={"kind": "circle", "size": 2}, many=[{"kind": "square", "size": 1}])
    assert [shape.kind for shape in read.many] == ["square"]


def test_a_kind_registered_after_the_class_was_made_joins(family):
    Holder = holder(family)
    mine = family.registry.register(toy(family))
    assert type(Holder(shape={"kind": "mine"}).shape) is mine


def test_an_unknown_kind_is_told_at_the_kind(family):
    found = errors(holder(family), {"shape": {"kind": "circel"}})
    assert found == [
        (("shape", "kind"), "unknown shape kind 'circel'; allowed: circle, square; did you mean \"circle\"?")
    ]


def test_a_missing_kind_is_told_with_those_allowed(family):
    assert errors(holder(family), {"shape": {}}) == [(("shape",), "missing key 'kind'; allowed: circle, square")]


@pytest.mark.parametrize("value", [5, "circle", None, [1]])
def test_what_is_no_mapping_is_refused(family, value):
    assert errors(holder(family), {"shape": value}) == [(("shape",), "Input should be a mapping with a kind")]


def test_a_kind_that_is_no_word_is_refused(family):
    assert errors(holder(family), {"shape": {"kind": 3}})[0][0] == ("shape", "kind")


def test_errors_inside_of_a_kind_keep_their_place(family):
    data = {"shape": {"kind": "circle", "size": "x"}, "many": [{"kind": "square", "size": 1, "colour": "red"}]}
    assert [place for place, _ in errors(holder(family), data)] == [("shape", "size"), ("many", 0, "colour")]


def test_json_is_read(family):
    read = holder(family).model_validate_json('{"shape": {"kind": "circle", "size": 2}}')
    assert read.shape.size == 2


@pytest.mark.parametrize("mode", ["python", "json"])
def test_a_field_is_dumped_with_the_fields_of_its_own_class(family, mode):
    read = holder(family)(shape={"kind": "circle", "size": 2})
    assert read.model_dump(mode=mode)["shape"] == {"kind": "circle", "color": "red", "size": 2.0}


def test_the_context_of_a_check_reaches_the_kinds(family):
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


def test_null_is_dumped_as_null(family):
    assert holder(family)(shape={"kind": "circle", "size": 2}).model_dump()["other"] is None


def test_a_dump_without_defaults_keeps_the_kind(family):
    read = holder(family)(shape={"kind": "circle", "size": 2})
    assert read.model_dump(exclude_defaults=True)["shape"] == {"kind": "circle", "size": 2.0}


def test_json_text_reads_as_an_equal_configuration(family):
    read = holder(family)(shape={"kind": "circle", "size": 2}, many=[{"kind": "square", "size": 1}])
    assert type(read).model_validate_json(read.model_dump_json()) == read


def test_registries_are_independent(family):
    other = Registry("shape", family.base, package=family.package)
    family.registry.register(toy(family))
    assert other.kinds() == ["circle", "square"]
