import re
from pathlib import Path
from typing import Annotated, Literal, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from seqmix.registry import Config, ConfigError, Registry, dump, load


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


def test_preset_loads_by_name_or_path(presets):
    blocks = {"ret": Retention(n_heads=4, decay="constant")}
    expected = Run(rate=1e-4, model=Model(d_model=64, blocks=blocks, pattern=("ret", "ret")))
    Path("tiny").mkdir()  # a folder does not hide the preset of its name
    assert load(Run, "tiny", presets=presets) == expected
    assert load(Run, presets / "tiny.yaml", presets=presets) == expected
    assert run(presets, "extends: tiny") == expected


@pytest.mark.parametrize("name", ["mine.yml", "here/mine", "mine"])
def test_file_is_recognized_by_suffix_separator_or_existence(presets, name):
    Path("here").mkdir()
    Path(name).write_text("\ufeffmodel: {d_model: 8}")  # a byte order mark is ignored
    assert load(Run, name, presets=presets).model.d_model == 8


SOURCES = [
    ("tny", ["'tny'", "large, tiny", '"tiny"?']),
    ("no.yaml", ["no.yaml"]),
    ("./presets", ["presets is a folder"]),
]
"""What cannot be loaded, and what the error names; by itself or under `extends`."""


@pytest.mark.parametrize(
    ("source", "words"),
    [
        *SOURCES,
        ("", ["''", "large, tiny"]),
        ("x" * 300, ["x" * 300, "large, tiny"]),
        ("presets/tin.yaml", ["presets/tin.yaml", '"tiny.yaml"?']),
        ("bytes.yaml", ["bytes.yaml:2: ", "0xff"]),
        ("loop.yaml", ["loop.yaml cannot be read: "]),
    ],
)
def test_unreadable_source_raises_and_is_named(presets, source, words):
    Path("bytes.yaml").write_bytes(b"name: a\nname: \xff")
    Path("loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(ConfigError) as raised:
        load(Run, source, presets=presets)
    assert all(word in str(raised.value) for word in words)
    assert "\n" not in str(raised.value)


def test_error_does_not_quote_a_file_that_is_not_a_mapping(presets):
    Path("secret").write_text("root:x:0:0\ndaemon:x:1:1\n")
    for source in ("run.yaml", "secret"):
        Path("run.yaml").write_text("extends: ./secret")
        with pytest.raises(ConfigError) as raised:
            load(Run, source, presets=presets)
        assert str(raised.value) == "secret:1: expected a mapping of keys to values, got text"


def test_error_outside_the_working_directory_shows_the_full_path(presets, monkeypatch):
    (presets / "tiny.yaml").write_text("{}")
    monkeypatch.chdir("/")
    with pytest.raises(ConfigError) as raised:
        load(Run, "tiny", presets=presets)
    assert str(raised.value).startswith(f"{str(presets / 'tiny.yaml').removeprefix('/')}:1: ")
    assert raised.value.__cause__ is not None  # for a debugger


def test_extends_accepts_presets_and_relative_files(presets):
    config = run(presets, "extends: large\nmodel: {n_layers: 4}")
    assert (config.model.n_layers, config.model.d_model, config.rate) == (4, 512, 1e-4)
    Path("sub").mkdir()
    Path("sub/base.yaml").write_text("model: {d_model: 8}")
    Path("sub/mine.yaml").write_text("extends: base.yaml\nname: mine")
    assert load(Run, "sub/mine.yaml", presets=presets).model.d_model == 8
    Path("tiny.yaml").write_text("extends: tiny\nname: mine")  # the preset, not the file itself
    assert load(Run, "tiny.yaml", presets=presets).name == "mine"


def test_overrides_are_applied_last_in_the_given_order(presets):
    config = run(presets, "extends: tiny\nrate: 1", "rate=2", "model.n_layers=8", "model.n_layers=9")
    assert (config.rate, config.model.n_layers, config.model.d_model) == (2, 9, 64)
    config = run(presets, "extends: tiny\nmodel: {blocks: {ret: {kind: attention}}}")
    assert config.model.blocks == {"ret": Attention()}  # another kind replaces the mixer


RET = "extends: tiny\nmodel:\n  blocks:\n    ret:"


@pytest.mark.parametrize(
    ("text", "overrides", "place", "words"),
    [
        ("", [], "run.yaml:1: ", ["'model'"]),
        ("- a", [], "run.yaml:1: ", ["a mapping", "got a list"]),
        ("null", [], "run.yaml:1: ", ["a mapping", "got a single value"]),
        ("a: - b", [], "run.yaml:1: column 4: ", ["not allowed here"]),
        *((f"name: a\nextends: {value}", [], "run.yaml:2: extends: ", words) for value, words in SOURCES),
        ("name: a\nextend: tiny", [], "run.yaml:2: ", ["'extend'", 'did you mean "extends"']),
        ("name: a\nextends: [tiny]", [], "run.yaml:2: extends: ", ['["tiny"]']),
        ("name: a\nextends: null", [], "run.yaml:2: extends: ", ["null"]),
        ("extends: b.yaml", [], "b.yaml:2: extends: ", ["run.yaml -> b.yaml -> run.yaml"]),
        ("model: {d_model: 8, extends: tiny}", [], "run.yaml:1: model.extends: ", ["'extends'"]),
        ("extends: tiny", ["model.n_layers=x"], "command line: model.n_layers: ", ["an integer", "'x'"]),
        (
            "extends: tiny\nmodel: {blocks: {att: {kind: attention}}}",
            ["model.blocks.att.kind=retention"],
            "command line: model.blocks.att: ",
            ["missing key 'n_heads'", "{kind: retention, n_heads: ...}"],
        ),
        ("name: a\nmodel: {}", ["model.n_layers=8"], "run.yaml:2: model: ", ["'d_model'"]),
        ("model:\n\n  d_model: eight", [], "run.yaml:3: model.d_model: ", ["an integer", "'eight'"]),
        ("extends: presets/bad.yaml", [], "presets/bad.yaml:4: model.d_model: ", ["'eight'"]),
        (f"{RET}\n      n_heads: x", [], "run.yaml:5: model.blocks.ret.n_heads: ", ["'x'"]),
        (
            f"{RET} {{kind: retention,\n      n_head: 4}}",
            [],
            "run.yaml:5: model.blocks.ret.n_head: ",
            ["'n_head'", "kind, scale, n_heads, decay", '"n_heads"?'],
        ),
        (
            f"{RET} {{\n      kind: retntion}}",
            [],
            "run.yaml:5: model.blocks.ret.kind: ",
            ["'retntion'", "attention, retention", '"retention"?'],
        ),
        (f"{RET} {{\n      kind: mine}}", [], "run.yaml:5: model.blocks.ret.kind: ", ["'mine'", "my_module:MyConfig"]),
        (
            "model:\n  d_model: 8\n  blocks:\n    ret: {kind: retention}",
            [],
            "run.yaml:4: model.blocks.ret: ",
            ["'n_heads'"],
        ),
    ],
)
def test_error_names_the_location_key_and_value(presets, text, overrides, place, words):
    Path("b.yaml").write_text("# b\nextends: ./run.yaml")
    (presets / "bad.yaml").write_text(TINY.replace("64", "eight"))
    found = error(presets, text, *overrides)
    assert found.startswith(place)
    assert "\n" not in found
    assert all(word.replace("large, tiny", "bad, large, tiny") in found for word in words)


def test_field_conflict_error_names_file_and_command_line(presets):
    Path("run.yaml").write_text("name: run\nsquare:\n  side: 2\n  area: 4\n")
    assert load(Tiled, "run.yaml", ["name=other"], presets=presets).square.area == 4
    with pytest.raises(ConfigError, match=r"^run\.yaml:2, .*command line: square: 9 is not 2 \* 2$"):
        load(Tiled, "run.yaml", ["square.area=9"], presets=presets)
    Path("run.yaml").write_text("square: {side: 2, area: 5}\n")
    with pytest.raises(ConfigError, match=r"^run\.yaml:1: square: 5 is not 2 \* 2$"):
        load(Tiled, "run.yaml", ["name=other"], presets=presets)


def test_error_lists_five_problems_and_counts_the_rest(presets):
    lines = error(presets, "name: 1\nrate: x\nmodel: {}").split("\n")
    assert [line.split(" ")[:2] for line in lines] == [
        [f"run.yaml:{i}:", f"{k}:"] for i, k in enumerate(("name", "rate", "model"), 1)
    ]
    lines = error(presets, "\n".join(f"key{n}: 1" for n in range(8))).split("\n")
    assert (len(lines), re.findall(r"\d", lines[5])) == (6, ["3"])


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
def test_dumped_config_loads_back_equal(tmp_path_factory, config):
    file = tmp_path_factory.mktemp("dump") / "run.yaml"
    file.write_text(dump(config), encoding="utf-8")
    assert load(Run, file, presets=file.parent) == config


def test_dump_contains_all_fields_in_declared_order(presets):
    assert dump(load(Run, "tiny", presets=presets)) == (
        "name: run\nrate: 0.0001\nmodel:\n  d_model: 64\n  n_layers: 2\n  blocks:\n    ret:\n      kind: retention\n"
        "      scale: 1.0\n      n_heads: 4\n      decay: constant\n  pattern: [ret, ret]\n"
    )
