import sys
from typing import Annotated

import pytest
from pydantic import create_model

from seqmix.registry import Config, ConfigError, Registry, load


def add(family, kind: str, text: str | None = None) -> str:
    """Install a plug-in, and return its module."""
    module = family.module(kind, family.shape(kind) if text is None else text)
    family.plug_in(kind, f"{module}:{kind}Config")
    return module


def test_a_plug_in_is_a_kind(family):
    module = add(family, "star")
    assert family.registry.kinds() == ["circle", "square", "star"]
    assert family.registry.origin("star") == module
    assert family.registry.resolve("star")(size=2).area() == 4


def test_a_plug_in_is_not_imported_for_another_kind(family):
    module = add(family, "star")
    family.registry.resolve("circle")
    assert module not in sys.modules


def test_a_plug_in_installed_after_a_field_was_declared_joins(family):
    Holder = create_model("Holder", __base__=Config, shape=(Annotated[family.base, family.registry], ...))
    add(family, "star")
    assert Holder(shape={"kind": "star", "size": 2}).shape.kind == "star"


def test_a_group_of_another_family_is_not_read(family):
    add(family, "star")
    assert Registry("shape", family.base, package=family.package).kinds() == ["circle", "square"]


def test_a_plug_in_that_fails_to_import_is_told_by_name_module_and_exception(family):
    module = add(family, "star", "import no_such_library")
    with pytest.raises(ConfigError) as raised:
        family.registry.resolve("star")
    assert str(raised.value) == (
        f"shape kind 'star' of module {module} cannot be loaded: ModuleNotFoundError: No module named 'no_such_library'"
    )


@pytest.mark.parametrize("text", ["import no_such_library", "def", "1 / 0", "raise KeyError('two\\nlines')", ""])
def test_a_broken_plug_in_breaks_nothing_else(family, text):
    add(family, "star", text)
    add(family, "moon")
    assert family.registry.kinds() == ["circle", "moon", "square"]
    assert family.registry.resolve("moon")(size=1)
    assert list(family.registry.broken()) == ["star"]


def test_the_reason_of_a_broken_plug_in_is_one_line(family):
    add(family, "star", "raise RuntimeError('one\\ntwo')")
    assert family.registry.broken()["star"].endswith("RuntimeError: one")


def test_a_broken_plug_in_is_told_where_a_file_asks_for_it(family, tmp_path):
    Holder = create_model("Holder", __base__=Config, shape=(Annotated[family.base, family.registry], ...))
    add(family, "star", "import no_such_library")
    (tmp_path / "run.yaml").write_text("shape:\n  kind: star\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:2: shape\.kind: shape kind 'star' of module"):
        load(Holder, tmp_path / "run.yaml", presets=tmp_path)


def test_two_plug_ins_of_one_name_are_an_error_that_names_both(family):
    first, second = family.module("one", family.shape("star")), family.module("two", family.shape("star"))
    family.plug_in("star", f"{first}:starConfig")
    family.plug_in("star", f"{second}:starConfig")
    with pytest.raises(ConfigError) as raised:
        family.registry.resolve("star")
    assert first in str(raised.value)
    assert second in str(raised.value)
    assert "star" not in family.registry.kinds()
    assert family.registry.broken() == {"star": str(raised.value)}


def test_one_plug_in_found_twice_is_one_plug_in(family):
    module = add(family, "star")
    family.plug_in("star", f"{module}:starConfig")
    assert family.registry.origin("star") == module


def test_a_plug_in_with_the_name_of_a_built_in_is_an_error_that_names_both(family):
    module = add(family, "circle")
    with pytest.raises(ConfigError, match=rf"'circle' is provided by {family.package}\.circle and by {module}"):
        family.registry.resolve("circle")


def test_a_class_with_the_kind_of_a_plug_in_is_refused(family):
    module = add(family, "star")
    other = family.module("other", family.shape("star"))
    with pytest.raises(ConfigError, match=f"'star' is provided by {module} and by {other}"):
        family.registry.register(family.registry.resolve(f"{other}:starConfig"))


def test_a_plug_in_may_register_its_class_as_well(family):
    add(family, "star")
    config = family.registry.register(family.registry.resolve("star"))
    assert family.registry.resolve("star") is config


def test_a_plug_in_whose_class_says_another_kind_is_broken(family):
    module = family.module("moons", family.shape("moon"))
    family.plug_in("star", f"{module}:moonConfig")
    assert family.registry.broken()["star"].endswith(f"{module}:moonConfig says kind 'moon'")


def test_a_plug_in_of_another_family_is_broken(family):
    family.plug_in("star", "json:JSONDecoder")
    assert "json.decoder:JSONDecoder is no subclass of" in family.registry.broken()["star"]
