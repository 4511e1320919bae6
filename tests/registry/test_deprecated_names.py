import warnings
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field

from seqmix.registry import Config, ConfigError, Registry, dump, load


class MixerConfig(Config):
    kind: str


MIXERS = Registry("mixer", MixerConfig, package="no_such_package", default_kind="plain")


@MIXERS.register
class Plain(MixerConfig):
    kind: Literal["plain"] = "plain"
    n_heads: int = 1

    deprecated_names: ClassVar = {"heads": "n_heads"}


@MIXERS.register
class Other(MixerConfig):
    kind: Literal["other"] = "other"
    heads: int = 1


class Training(Config):
    steps: int = 1
    grad_accum_steps: int = Field(default=1, gt=0)
    rates: dict[str, float] = Field(default_factory=dict)

    deprecated_names: ClassVar = {"accumulate": "grad_accum_steps"}


class Run(Config):
    training: Training = Training()
    mixers: dict[str, Annotated[MixerConfig, MIXERS]] = Field(default_factory=dict, max_length=9)
    last: Annotated[MixerConfig, MIXERS] | None = None


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str, *overrides: str) -> tuple[Run, list[tuple[str, int, str]]]:
    """What a file of this text is read as, and each warning's file, line and message."""
    Path("run.yaml").write_text(text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = load(Run, "run.yaml", overrides, presets=Path())
    assert all(warning.category is FutureWarning for warning in caught)  # which Python shows by default
    return run, [(warning.filename, warning.lineno, str(warning.message)) for warning in caught]


def test_deprecated_name_is_accepted_with_a_warning_that_has_its_line():
    run, warned = read("training:\n  steps: 3\n  accumulate: 2\n", "training.accumulate=5")
    assert run.training.grad_accum_steps == 5
    assert [warning[:2] for warning in warned] == [("run.yaml", 3), ("command line", 1)]
    assert all(name in warned[0][2] for name in ("training.accumulate", "training.grad_accum_steps"))


@pytest.mark.parametrize("below", ["accumulate", "grad_accum_steps"])
@pytest.mark.parametrize("above", ["accumulate", "grad_accum_steps"])
@pytest.mark.parametrize("last", ["accumulate", "grad_accum_steps"])
def test_last_value_wins_whether_the_old_or_new_name_is_used(below, above, last):
    Path("base.yaml").write_text(f"training: {{{below}: 4}}")
    text = f"extends: base.yaml\ntraining:\n  {above}: 3"
    assert read(text)[0].training.grad_accum_steps == 3
    run, warned = read(text, f"training.{last}=2")
    assert (run.training.grad_accum_steps, len(warned)) == (2, [below, above, last].count("accumulate"))


def test_name_is_deprecated_only_for_the_kind_that_declares_it():
    text = "mixers: {a: {kind: plain, heads: 2}, b: {kind: other, heads: 3}}"
    run, warned = read(text, "mixers.a.heads=4", "mixers.b.heads=5")
    assert run.mixers == {"a": Plain(n_heads=4), "b": Other(heads=5)}
    assert ["mixers.a.heads" in message for *_, message in warned] == [True, True]
    run, warned = read("last: {kind: plain, n_heads: 2}", "last={kind: other, heads: 3}")
    assert (run.last, warned) == (Other(heads=3), [])


def test_default_kind_can_have_deprecated_names():
    run, warned = read("mixers: {a: {heads: 2}}\nlast:\n  heads: 3", "last.heads=4")
    assert (run.mixers, run.last) == ({"a": Plain(n_heads=2)}, Plain(n_heads=4))
    assert [warning[:2] for warning in warned] == [("run.yaml", 1), ("run.yaml", 3), ("command line", 1)]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("training:\n  steps: 3\n  accumulate: x", r"^run\.yaml:3: training\.grad_accum_steps: .*'x'"),
        (
            "training:\n  grad_accum_steps: 2\n  accumulate: 2",
            r"^run\.yaml:3: training\.accumulate: 'accumulate'.*'grad_accum_steps'",
        ),
        ("training: {accumulat: 2}", "allowed: steps, grad_accum_steps, rates"),
    ],
)
def test_wrong_value_both_names_or_a_typo_raises(text, error):
    with pytest.raises(ConfigError, match=error):
        read(text)


def test_a_subclass_inherits_deprecated_names_and_adds_its_own():
    class Longer(Training):
        minutes: int = 0

        deprecated_names: ClassVar = {"hours": "minutes"}

    values: dict[str, Any] = {"hours": 1, "accumulate": 2}
    with pytest.warns(FutureWarning) as caught:
        assert Longer(**values) == Longer(minutes=1, grad_accum_steps=2)
    assert len(caught) == 2
    assert "hours" not in Training.deprecated_names


def test_dumped_config_contains_only_the_current_name():
    run, _ = read("training: {accumulate: 2}")
    assert "accumulate" not in dump(run)
    assert read(dump(run)) == (run, [])


def test_deprecation_warning_points_at_the_calling_line():
    values: dict[str, Any] = {"accumulate": 2}
    with pytest.warns(FutureWarning, match=r"accumulate.*grad_accum_steps") as caught:
        assert Training(**values).grad_accum_steps == 2
    assert caught[0].filename == __file__
    with pytest.warns(FutureWarning):
        assert Run.model_validate_json('{"training": {"accumulate": 2}}').training.grad_accum_steps == 2
    with pytest.raises(ConfigError, match=r"'accumulate'.*'grad_accum_steps'"):
        Training(**values, grad_accum_steps=2)


def test_deprecation_warning_is_shown_once(recwarn):
    warnings.simplefilter("default")
    Path("run.yaml").write_text("training: {accumulate: 2}")
    for _ in range(3):
        load(Run, "run.yaml", presets=Path())
    assert len(recwarn) == 1
