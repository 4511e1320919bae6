from pathlib import Path
from typing import Annotated, Literal, Self

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from seqmix.registry import Config, ConfigError, Registry, dump, load
from seqmix.registry.yaml import write


class MixerConfig(Config):
    kind: str
    scale: float = 1.0


MIXERS = Registry("mixer", MixerConfig, package="no_such_package")


@MIXERS.register
class Retention(MixerConfig):
    kind: Literal["retention"] = "retention"
    n_heads: int
    decay: Literal["geometric", "constant"] = "geometric"


@MIXERS.register
class Attention(MixerConfig):
    kind: Literal["attention"] = "attention"
    window: int | None = None


class Model(Config):
    d_model: int
    n_layers: int = 2
    blocks: dict[str, Annotated[MixerConfig, MIXERS]] = Field(default_factory=dict)
    pattern: tuple[str, ...] = ()


class Run(Config):
    name: str = "run"
    rate: float = 1e-3
    model: Model


class Square(Config):
    side: int
    area: int

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.area != self.side**2:
            raise ValueError(f"{self.area} is not {self.side} * {self.side}")
        return self


class Tiled(Config):
    name: str = "run"
    square: Square


TINY = """\
# a preset
rate: 1e-4
model:
  d_model: 64
  blocks:
    ret: {kind: retention, n_heads: 4, decay: constant}
  pattern: [ret, ret]
"""


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "large.yaml").write_text("extends: tiny\nmodel: {d_model: 512}\n")
    monkeypatch.chdir(tmp_path)
    return folder


def run(presets: Path, text: str, *overrides: str) -> Run:
    """Load a file `run.yaml` of this text."""
    Path("run.yaml").write_text(text)
    return load(Run, "run.yaml", overrides, presets=presets)


def error(presets: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        run(presets, text, *overrides)
    return str(raised.value)


# ---- sources


def test_a_preset_is_loaded_by_name(presets):
    config = load(Run, "tiny", presets=presets)
    assert config == Run(
        rate=1e-4,
        model=Model(d_model=64, blocks={"ret": Retention(n_heads=4, decay="constant")}, pattern=("ret", "ret")),
    )


def test_a_file_is_loaded_by_its_suffix(presets):
    Path("mine.yml").write_text("model: {d_model: 8}")
    assert load(Run, "mine.yml", presets=presets).model.d_model == 8


def test_a_file_is_loaded_by_its_separator(presets):
    Path("here").mkdir()
    Path("here/mine").write_text("model: {d_model: 8}")
    assert load(Run, "here/mine", presets=presets).model.d_model == 8


def test_a_file_is_loaded_because_it_exists(presets):
    Path("mine").write_text("model: {d_model: 8}")
    assert load(Run, "mine", presets=presets).model.d_model == 8


def test_a_folder_does_not_hide_a_preset_of_its_name(presets):
    Path("tiny").mkdir()
    assert load(Run, "tiny", presets=presets).model.d_model == 64


def test_a_path_object_is_a_file(presets):
    assert load(Run, presets / "tiny.yaml", presets=presets).model.d_model == 64


def test_an_empty_file_is_an_empty_mapping(presets):
    assert error(presets, "") == "run.yaml:1: missing key 'model'"


def test_a_byte_order_mark_is_no_part_of_the_text(presets):
    assert run(presets, "\ufeffmodel: {d_model: 8}").model.d_model == 8


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("tny", "unknown preset 'tny'; presets: large, tiny; did you mean \"tiny\"?"),
        ("", "unknown preset ''; presets: large, tiny"),
        ("x" * 300, f"unknown preset '{'x' * 300}'; presets: large, tiny"),
        ("no.yaml", "no file no.yaml"),
        ("presets/tin.yaml", 'no file presets/tin.yaml; did you mean "tiny"?'),
        ("presets/", "presets is a folder, not a YAML file"),
    ],
)
def test_a_source_that_is_not_there_is_one_sentence(presets, source, sentence):
    with pytest.raises(ConfigError) as raised:
        load(Run, source, presets=presets)
    assert str(raised.value) == sentence


def test_a_file_that_is_not_utf_8_is_one_sentence(presets):
    Path("run.yaml").write_bytes(b"name: a\nname: \xff")
    with pytest.raises(ConfigError, match=r"^run\.yaml:2: byte 0xff is not UTF-8 text$"):
        load(Run, "run.yaml", presets=presets)


def test_a_file_that_cannot_be_read_is_one_sentence(presets):
    Path("run.yaml").symlink_to("run.yaml")
    with pytest.raises(ConfigError, match=r"^run\.yaml cannot be read: "):
        load(Run, "run.yaml", presets=presets)


@pytest.mark.parametrize(("text", "given"), [("- a", '["a"]'), ("8", "8"), ("null", "null")])
def test_a_file_that_is_no_mapping_is_one_sentence(presets, text, given):
    assert error(presets, text) == f"run.yaml:1: a configuration is a mapping of keys to values, not {given}"


def test_errors_of_a_preset_elsewhere_name_its_whole_path(presets, monkeypatch):
    (presets / "tiny.yaml").write_text("{}")
    monkeypatch.chdir("/")
    with pytest.raises(ConfigError) as raised:
        load(Run, "tiny", presets=presets)
    assert str(raised.value) == f"{str(presets / 'tiny.yaml').removeprefix('/')}:1: missing key 'model'"


# ---- extends


def test_a_file_extends_a_preset(presets):
    config = run(presets, "extends: tiny\nmodel: {n_layers: 4}")
    assert (config.model.n_layers, config.model.d_model) == (4, 64)


def test_extends_chains(presets):
    config = run(presets, "extends: large\nmodel: {n_layers: 4}")
    assert (config.model.n_layers, config.model.d_model, config.rate) == (4, 512, 1e-4)


def test_a_file_extends_a_file_relative_to_itself(presets):
    Path("sub").mkdir()
    Path("sub/base.yaml").write_text("model: {d_model: 8}")
    Path("sub/mine.yaml").write_text("extends: base.yaml\nname: mine")
    assert load(Run, "sub/mine.yaml", presets=presets).model.d_model == 8


def test_a_file_may_extend_the_preset_of_its_own_name(presets):
    Path("tiny.yaml").write_text("extends: tiny\nname: mine")
    assert load(Run, "tiny.yaml", presets=presets).name == "mine"


def test_a_file_of_nothing_but_extends_is_what_it_extends(presets):
    assert run(presets, "extends: tiny") == load(Run, "tiny", presets=presets)


def test_a_mixer_of_another_kind_replaces_the_whole_mixer(presets):
    config = run(presets, "extends: tiny\nmodel: {blocks: {ret: {kind: attention}}}")
    assert config.model.blocks == {"ret": Attention()}


def test_a_circle_is_told_as_a_chain(presets):
    Path("b.yaml").write_text("# b\nextends: ./run.yaml")
    assert error(presets, "extends: b.yaml") == (
        "b.yaml:2: extends: files extend each other in a circle: run.yaml -> b.yaml -> run.yaml"
    )


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("tny", "unknown preset 'tny'; presets: large, tiny; did you mean \"tiny\"?"),
        ("no.yaml", "no file no.yaml"),
        ("./presets", "presets is a folder, not a YAML file"),
        ("[tiny]", 'needs the name of a preset or a file, and was given ["tiny"]'),
        ("null", "needs the name of a preset or a file, and was given null"),
    ],
)
def test_an_error_of_extends_names_its_line(presets, value, sentence):
    assert error(presets, f"name: a\nextends: {value}") == f"run.yaml:2: extends: {sentence}"


def test_extends_belongs_to_the_top_of_a_file(presets):
    assert "model.extends: unknown key 'extends'" in error(presets, "model: {d_model: 8, extends: tiny}")


# ---- overrides


def test_overrides_are_applied_last_and_in_order(presets):
    config = run(presets, "extends: tiny\nrate: 1", "rate=2", "model.n_layers=8", "model.n_layers=9")
    assert (config.rate, config.model.n_layers, config.model.d_model) == (2, 9, 64)


def test_an_error_of_an_override_names_the_command_line(presets):
    assert error(presets, "extends: tiny", "model.n_layers=x") == (
        "command line: model.n_layers: needs an integer, and was given 'x'"
    )


def test_parts_that_do_not_go_together_may_be_of_the_command_line(presets):
    Path("run.yaml").write_text("name: run\nsquare:\n  side: 2\n  area: 4\n")
    assert load(Tiled, "run.yaml", ["name=other"], presets=presets).square.area == 4
    with pytest.raises(ConfigError, match=r"^run\.yaml:2, changed on the command line: square: 9 is not 2 \* 2$"):
        load(Tiled, "run.yaml", ["square.area=9"], presets=presets)
    Path("run.yaml").write_text("square: {side: 2, area: 5}\n")
    with pytest.raises(ConfigError, match=r"^run\.yaml:1: square: 5 is not 2 \* 2$"):
        load(Tiled, "run.yaml", ["name=other"], presets=presets)


def test_an_override_of_another_key_leaves_a_missing_key_in_its_file(presets):
    assert error(presets, "name: a\nmodel: {}", "model.n_layers=8") == "run.yaml:2: model: missing key 'd_model'"


# ---- where an error was written


def test_an_error_names_the_line_of_its_key(presets):
    assert error(presets, "model:\n\n  d_model: eight") == (
        "run.yaml:3: model.d_model: needs an integer, and was given 'eight'"
    )


def test_an_error_in_an_extended_file_names_that_file(presets):
    (presets / "tiny.yaml").write_text(TINY.replace("64", "eight"))
    assert error(presets, "extends: tiny").startswith("presets/tiny.yaml:4: model.d_model: needs an integer")


def test_an_error_names_the_file_that_changed_the_key(presets):
    text = "extends: tiny\nmodel:\n  blocks:\n    ret:\n      n_heads: x"
    assert error(presets, text).startswith("run.yaml:5: model.blocks.ret.n_heads: needs an integer")


def test_an_unknown_key_is_told_in_its_line(presets):
    text = "extends: tiny\nmodel:\n  blocks:\n    ret: {kind: retention,\n      n_head: 4}"
    assert error(presets, text) == (
        "run.yaml:5: model.blocks.ret.n_head: unknown key 'n_head'; allowed: kind, scale, n_heads, decay; "
        'did you mean "n_heads"?'
    )


def test_an_unknown_kind_is_told_in_its_line(presets):
    text = "extends: tiny\nmodel:\n  blocks:\n    ret: {\n      kind: retntion}"
    assert error(presets, text) == (
        "run.yaml:5: model.blocks.ret.kind: unknown mixer kind 'retntion'; allowed: attention, retention; "
        'did you mean "retention"?'
    )


def test_an_unknown_kind_that_is_like_none_may_be_a_class(presets):
    text = "extends: tiny\nmodel:\n  blocks:\n    ret: {\n      kind: mine}"
    assert error(presets, text) == (
        "run.yaml:5: model.blocks.ret.kind: unknown mixer kind 'mine'; allowed: attention, retention, or a class of "
        "your own, my_module:MyConfig"
    )


def test_a_missing_key_is_told_in_the_line_of_its_mapping(presets):
    text = "name: a\nmodel:\n  d_model: 8\n  blocks:\n    ret: {kind: retention}"
    assert error(presets, text) == "run.yaml:5: model.blocks.ret: missing key 'n_heads'"


def test_several_errors_are_several_lines(presets):
    assert error(presets, "name: 1\nrate: x\nmodel: {}").split("\n") == [
        "run.yaml:1: name: needs a string, and was given 1",
        "run.yaml:2: rate: needs a number, and was given 'x'",
        "run.yaml:3: model: missing key 'd_model'",
    ]


def test_at_most_five_errors_are_told(presets):
    text = "\n".join(f"key{n}: 1" for n in range(8))
    assert error(presets, text).split("\n")[5:] == ["... and 3 more"]


def test_the_cause_is_kept_for_who_debugs(presets):
    Path("run.yaml").write_text("{}")
    with pytest.raises(ConfigError) as raised:
        load(Run, "run.yaml", presets=presets)
    assert raised.value.__cause__ is not None


keys = st.sampled_from(["name", "rate", "model", "d_model", "blocks", "pattern", "kind", "n_heads", "extends", "x"])
words = st.sampled_from(["retention", "attention", "json:dumps", "tiny", "x"])
data = st.recursive(
    st.none() | st.integers(0, 9) | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=4),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])  # presets are only read
@given(st.dictionaries(keys, data, max_size=4))
def test_whatever_a_file_holds_it_is_read_or_refused_in_a_few_sentences(presets, values):
    try:
        told = dump(run(presets, write(values)))
    except ConfigError as problem:
        told = str(problem)
    assert told


# ---- dump

names = st.text(max_size=4)
mixers = st.builds(Retention, n_heads=st.integers(), decay=st.sampled_from(["geometric", "constant"])) | st.builds(
    Attention, scale=st.floats(allow_nan=False, allow_infinity=False), window=st.none() | st.integers()
)
models = st.builds(
    Model,
    d_model=st.integers(),
    blocks=st.dictionaries(names, mixers, max_size=2),
    pattern=st.lists(names, max_size=3).map(tuple),
)
runs = st.builds(Run, name=st.text(), rate=st.floats(allow_nan=False, allow_infinity=False), model=models)


@settings(deadline=None)  # it writes files
@given(runs)
def test_a_dump_loads_as_an_equal_configuration(tmp_path_factory, config):
    file = tmp_path_factory.mktemp("dump") / "run.yaml"
    file.write_text(dump(config), encoding="utf-8")
    assert load(Run, file, presets=file.parent) == config


def test_a_dump_is_whole_and_in_the_order_of_the_fields(presets):
    assert dump(load(Run, "tiny", presets=presets)) == (
        "name: run\n"
        "rate: 0.0001\n"
        "model:\n"
        "  d_model: 64\n"
        "  n_layers: 2\n"
        "  blocks:\n"
        "    ret:\n"
        "      kind: retention\n"
        "      scale: 1.0\n"
        "      n_heads: 4\n"
        "      decay: constant\n"
        "  pattern: [ret, ret]\n"
    )
