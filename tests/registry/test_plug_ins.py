import re
import sys
import warnings
from typing import Annotated

import pytest
from pydantic import create_model

from seqmix.registry import Config, ConfigError, Registry, load


def add(family, kind: str, text: str | None = None) -> str:
    """Install a plug-in, and return its module."""
    module = family.module(kind, family.shape(kind) if text is None else text)
    family.plug_in(kind, f"{module}:{kind}Config")
    return module


@pytest.fixture
def holder(family):
    return create_model("Holder", __base__=Config, shape=(Annotated[family.base, family.registry], ...))


def test_plug_in_is_imported_only_when_used(family, holder):
    module = add(family, "star")
    family.registry.resolve("circle")
    assert module not in sys.modules
    assert family.registry.kinds() == ["circle", "square", "star"]
    assert family.registry.origin("star") == module
    assert holder(shape={"kind": "star", "size": 2}).shape.area() == 4
    assert Registry("shape", family.base, package=family.package).kinds() == ["circle", "square"]  # of no group


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("def", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise RuntimeError('one\\ntwo')", "RuntimeError: one"),
        ("{}['lost']", "KeyError: 'lost'"),
        ("import sys\nsys.exit(7)", "sys.exit(7)"),
        ("import pytest\npytest.skip('not here', allow_module_level=True)", "Skipped: not here"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("class Mute(Exception):\n    def __str__(self):\n        return 1 / 0\n\nraise Mute", "Mute"),
        ("", "starConfig"),
        ("from json import JSONDecoder as starConfig", "json.decoder:JSONDecoder"),
    ],
)
def test_broken_plug_in_is_reported_and_leaves_other_kinds_usable(family, holder, tmp_path, text, reason):
    module = add(family, "star", text)
    add(family, "moon")
    assert family.registry.kinds() == ["circle", "moon", "square"]
    assert family.registry.resolve("moon")(size=1)
    with pytest.raises(ConfigError) as raised:
        family.registry.resolve("star")
    assert family.registry.broken() == {"star": str(raised.value)}
    assert all(word in str(raised.value) for word in ("'star'", module, reason))
    assert "\n" not in str(raised.value)
    (tmp_path / "run.yaml").write_text("shape:\n  kind: star\n")
    with pytest.raises(ConfigError, match=rf"run\.yaml:2: shape\.kind: .*'star' .*{module}"):
        load(holder, tmp_path / "run.yaml", presets=tmp_path)


def test_naming_the_layer_instead_of_its_config_suggests_the_config(family):
    module = add(family, "star", family.shape("star").replace("starConfig", "Star") + "\nclass starConfig:\n    pass\n")
    with pytest.raises(ConfigError, match=f"got {module}:starConfig; did you mean {module}:Star\\?"):
        family.registry.resolve("star")


def test_keyboard_interrupt_while_importing_a_plug_in_propagates(family):
    add(family, "star", "raise KeyboardInterrupt")
    for ask in (family.registry.broken, family.registry.kinds, lambda: family.registry.resolve("star")):
        with pytest.raises(KeyboardInterrupt):
            ask()


def test_plug_in_whose_class_declares_another_kind_is_broken(family):
    module = family.module("moons", family.shape("moon"))
    family.plug_in("star", f"{module}:moonConfig")
    assert all(word in family.registry.broken()["star"] for word in (f"{module}:moonConfig", "'moon'"))


def test_two_plug_ins_with_one_name_raise_and_name_both(family):
    first, second = family.module("one", family.shape("star")), family.module("two", family.shape("star"))
    family.plug_in("star", f"{first}:starConfig")
    family.plug_in("star", f"{second}:starConfig")
    with pytest.raises(ConfigError) as raised:
        family.registry.resolve("star")
    assert all(module in str(raised.value) for module in (first, second))
    assert "star" not in family.registry.kinds()
    assert family.registry.broken() == {"star": str(raised.value)}


def test_plug_in_named_like_a_built_in_kind_is_ignored_with_a_warning(family, holder):
    built_in = family.registry.resolve("circle")
    module = add(family, "circle")
    both = rf"'circle' .*{family.package}\.circle .*{module}.* {module}:circleConfig"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        assert holder(shape={"kind": "circle", "size": 2}).model_dump()["shape"]["kind"] == "circle"
        assert family.registry.resolve("circle") is built_in
        assert family.registry.origin("circle") == f"{family.package}.circle"
    (warning,) = warned  # once, however often it is used
    assert re.search(both, str(warning.message))
    assert family.registry.kinds() == ["circle", "square"]
    assert re.search(both, family.registry.broken()["circle"])
    # its own class, by its path, is saved by its path
    shape = holder(shape={"kind": f"{module}:circleConfig", "size": 2})
    assert type(shape.shape).__module__ == module
    assert shape.model_dump()["shape"]["kind"] == f"{module}:circleConfig"


def test_registering_the_kind_of_a_plug_in_raises_and_names_both(family):
    module = add(family, "star")
    other = family.module("other", family.shape("star"))
    with pytest.raises(ConfigError, match=f"'star' .*{module} .*{other}"):
        family.registry.register(family.registry.resolve(f"{other}:starConfig"))


def test_plug_in_found_twice_is_accepted_and_can_be_registered_again(family):
    module = add(family, "star")
    family.plug_in("star", f"{module}:starConfig")
    assert family.registry.origin("star") == module
    config = family.registry.register(family.registry.resolve("star"))
    assert family.registry.resolve("star") is config
