from typing import Annotated, Any

import pytest
from pydantic import create_model

from seqmix.registry import Config, ConfigError, dump, load


def holder(family: Any) -> Any:
    return create_model("Holder", __base__=Config, shape=(Annotated[family.base, family.registry], ...))


@pytest.fixture
def star(family) -> str:
    return f"{family.module('stars', family.shape('star'))}:starConfig"


def test_a_path_resolves_to_the_class(family, star):
    assert family.registry.resolve(star).__name__ == "starConfig"


def test_a_path_may_lead_into_a_class(family):
    module = family.module("nested", f"{family.shape('star')}\n\nclass Outer:\n    Inner = starConfig\n")
    assert family.registry.resolve(f"{module}:Outer.Inner").__name__ == "starConfig"


def test_the_origin_of_a_path_is_its_module(family, star):
    assert family.registry.origin(star) == star.partition(":")[0]


def test_a_path_stands_in_place_of_a_kind(family, star):
    shape = holder(family)(shape={"kind": star, "size": 3}).shape
    assert (shape.kind, shape.area()) == ("star", 9)


def test_a_path_is_dumped_as_a_path(family, star):
    assert holder(family)(shape={"kind": star, "size": 3}).model_dump()["shape"]["kind"] == star


def test_a_dumped_path_loads_as_an_equal_configuration(family, star, tmp_path):
    config = holder(family)(shape={"kind": star, "size": 3})
    (tmp_path / "run.yaml").write_text(dump(config))
    assert load(type(config), tmp_path / "run.yaml", presets=tmp_path) == config


def test_an_instance_of_an_unregistered_class_is_dumped_as_a_path(family, star):
    instance = family.registry.resolve(star)(size=3)
    assert holder(family)(shape=instance).model_dump()["shape"]["kind"] == star


def test_a_class_with_the_kind_of_a_built_in_is_dumped_as_a_path(family):
    path = f"{family.module('mine', family.shape('circle'))}:circleConfig"
    config = holder(family)(shape={"kind": path, "size": 3})
    assert config.model_dump()["shape"]["kind"] == path


def test_a_path_to_a_built_in_is_dumped_as_its_kind(family):
    config = holder(family)(shape={"kind": f"{family.package}.circle:circleConfig", "size": 3})
    assert config.model_dump()["shape"]["kind"] == "circle"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_module:Config", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("json:JSONDecodr", 'module json has no JSONDecodr; did you mean "JSONDecoder"?'),
        ("json:JSONDecoder", "json.decoder:JSONDecoder is no subclass of"),
        ("json:dumps", "is no subclass of"),
        ("json:", "'json:' is no path like my_package.my_module:MyConfig"),
        (":Config", "':Config' is no path like"),
        ("..up:Config", "cannot be loaded: TypeError"),
    ],
)
def test_a_path_that_leads_to_no_configuration_says_why(family, path, reason):
    with pytest.raises(ConfigError) as raised:
        family.registry.resolve(path)
    assert reason in str(raised.value)
    assert str(raised.value).startswith(f"shape kind {path!r} of module ")
