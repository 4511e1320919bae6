"""Selection of checks and options, skipped checks, drawn cases, and checks as pytest cases."""

import gc
import importlib
import weakref
from dataclasses import replace
from types import NoneType
from typing import Literal, get_args, get_origin

import pytest
import torch
from hypothesis import core, settings
from hypothesis.internal.conjecture import providers
from pydantic import Field
from torch import nn

from seqmix import MIXERS, Paradigm
from seqmix.mixers.attention import AttentionConfig
from seqmix.mixers.base.traits import ContractError
from seqmix.mixers.linear_attention import LinearAttentionConfig
from seqmix.mixers.retention import Retention, RetentionConfig
from seqmix.registry import SeqmixError
from seqmix.testing import (
    CHECKS,
    Case,
    CheckOutcome,
    Status,
    check,
    check_mixer,
    parametrize_checks,
    parametrize_kernels,
)
from seqmix.testing.engine.outcome import Outcomes
from seqmix.testing.engine.source import source
from seqmix.testing.mixer.options import alternatives, changed, chunk_sizes

RETENTION = RetentionConfig(n_heads=2)


def passes(config, *names, **options):
    report = check_mixer(config, checks=names or None, **options)
    assert report.passed, report.failures[0].reason
    return report


class OneWayConfig(RetentionConfig):
    kind: Literal["one_way"] = "one_way"
    chunk_size: Literal[1] = 1

    @property
    def traits(self):
        return replace(super().traits, paradigms=frozenset({Paradigm.CHUNKWISE}), packing=False)


ONE_WAY = OneWayConfig(n_heads=2)


def test_skip_reason_names_the_trait():
    report = check_mixer(ONE_WAY, compiles=False, examples=1, vary=False)
    skipped = {o.check.name: o.reason for o in report.outcomes if o.status is Status.SKIPPED}
    assert skipped["paradigms_agree"] == "traits.paradigms has chunkwise alone"
    assert skipped["steps_equal_the_whole"] == "traits.paradigms has no recurrent"
    assert skipped["documents_are_sequences"] == "traits.packing is False"
    assert {name for name, check in CHECKS.items() if check.compiles and not check.stress} < skipped.keys()
    assert "rows_are_independent" not in skipped


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"checks": ["paradigm_agree"]}, "'paradigm_agree'.*\"paradigms_agree\""),
        ({"expected_failures": {"paradigm_agree": "?"}}, "'paradigm_agree'.*\"paradigms_agree\""),
        ({"checks": []}, "checks "),
        ({"checks": "paradigms_agree"}, r"checks .*\['paradigms_agree'\]"),
        ({"paradigms": "recurrent"}, r"paradigms .*'recurrent'.*\('recurrent',\)"),
        ({"paradigms": Paradigm.RECURRENT}, r"paradigms .*\('recurrent',\)"),
        ({"paradigms": ()}, "paradigms "),
        ({"paradigms": ("recurent",)}, "'recurent'.*\"recurrent\""),
        ({"config": ONE_WAY, "paradigms": (Paradigm.RECURRENT,)}, "one_way .*'recurrent'.*chunkwise"),
        ({"device": "meta"}, "device 'meta'"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
        ({"device": "gpu"}, "device 'gpu'"),
        ({"d_model": 0}, "d_model .* 0"),
        ({"d_model": 9}, "2 heads"),
        ({"config": RetentionConfig(n_heads=17)}, "retention .* 12, 8, .*17 heads"),
        ({"tolerances": {"bfloat16": 1}}, "tolerances .*'bfloat16'.*torch.float32, "),
        ({"examples": 0}, "examples .* 0"),
        ({"config": RetentionConfig}, "RetentionConfig.*class"),
    ],
    ids=str,
)
def test_invalid_argument_raises_an_error_naming_it(options, named):
    with pytest.raises(SeqmixError, match=named):
        check_mixer(**{"config": RETENTION, **options})


def test_valid_model_width_is_found_automatically(built):
    def build(self, d_model, *, layer_idx, n_layers):
        assert d_model % 16 == 0
        return Retention(self, d_model)

    for config in (RetentionConfig(n_heads=8), built(build)):  # one refuses, the other asserts
        assert check_mixer(config, checks=["dtypes_are_kept"], examples=1).d_model == 16


def test_single_paradigm_is_compared_with_the_reference(forgetful, failure):
    for paradigm in (Paradigm.CHUNKWISE, Paradigm.RECURRENT):
        failure(forgetful, "paradigms_agree", paradigms=(paradigm,), shrink=False)
    failure(forgetful, "pieces_equal_the_whole", paradigms=(Paradigm.RECURRENT,), shrink=False)


def test_paradigms_not_requested_are_not_tested(mixing, failure):
    def shifted(inner, x, call):
        y, after = inner(x, call)
        return y + (call.paradigm is Paradigm.CHUNKWISE), after

    config = mixing(shifted)
    # the default is chunkwise
    for paradigm in ("parallel", "recurrent"):
        names = ("pieces_equal_the_whole", "the_initial_state_is_nothing_read")
        passes(config, *names, paradigms=(paradigm,), examples=6)
    failure(config, "pieces_equal_the_whole", paradigms=(Paradigm.CHUNKWISE,), shrink=False)


def test_uninitialised_parameter_fails_the_initialisation_check(built, failure):
    def build(self, d_model, *, layer_idx, n_layers):
        mixer = Retention(self, d_model)
        mixer.out_proj.weight = nn.Parameter(torch.empty_like(mixer.out_proj.weight))
        return mixer

    assert "out_proj.weight" in failure(built(build), "every_parameter_is_initialised").reason


@pytest.fixture
def cases():
    """The cases that a check is given, by the seed."""
    seen = []

    @check(share=1.0)
    def _records_its_cases(trial):
        """Nothing."""
        seen.append(trial.case)

    def of(seed, examples=20):
        seen.clear()
        check_mixer(RETENTION, checks=["_records_its_cases"], seed=seed, examples=examples)
        return list(seen)

    yield of
    del CHECKS["_records_its_cases"]


def test_cases_depend_on_the_seed_and_not_on_imported_modules(cases, tmp_path, monkeypatch):
    """Hypothesis draws numbers from the source of imported modules."""
    first = [cases(seed, examples=60) for seed in range(4)]
    assert {len(found) for found in first} == {60}
    # no example is wasted on what was seen
    assert min(len({repr(case) for case in found}) for found in first) == 60
    assert first[0] != first[1]
    numbers = ", ".join(str(n) for n in range(101, 2**16, 131))
    (tmp_path / "full_of_numbers.py").write_text(f"NUMBERS = [{numbers}]\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("full_of_numbers")
    monkeypatch.setattr(providers, "is_local_module_file", lambda path: path.endswith("full_of_numbers.py"))
    providers.CONSTANTS_CACHE.cache.clear()
    assert [cases(seed, examples=60) for seed in range(4)] == first


def test_check_needs_a_docstring_and_a_unique_name():
    def nameless(trial):
        pass

    def paradigms_agree(trial):
        """Again."""

    for wrong, named in ((nameless, "nameless .*docstring"), (paradigms_agree, "paradigms_agree already")):
        with pytest.raises(ValueError, match=named):
            check()(wrong)
    assert all(found.name == name and len(found.property) > 40 for name, found in CHECKS.items())


def ids(mark):
    return [case.id for case in mark.mark.args[1]]


def test_pytest_gets_one_case_per_configuration_and_check():
    configs = [RetentionConfig(n_heads=1), RETENTION, AttentionConfig(n_heads=2)]
    found = ids(parametrize_checks(configs, examples=1, vary=False))
    default = [name for name, check in CHECKS.items() if not check.stress]
    assert len(set(found)) == len(found) == len(configs) * len(default)
    stress = ids(parametrize_checks(configs, stress=True, examples=1, vary=False))
    assert len(set(stress)) == len(configs) * len(CHECKS) > len(found)
    assert {"retention0-paradigms_agree", "retention1-paradigms_agree", "attention-paradigms_agree"} <= set(found)
    names = ["rows_are_independent", "paradigms_agree"]
    assert ids(parametrize_checks([RETENTION], checks=names)) == [f"retention-{name}" for name in reversed(names)]
    of_kernels = ids(parametrize_kernels(checks=["results_are_deterministic"]))
    assert {name.partition("-")[2] for name in of_kernels} == {"results_are_deterministic"}


def test_pytest_reports_the_outcome_of_a_check(forgetful, bound):
    bound(RETENTION, "paradigms_agree")()
    with pytest.raises(pytest.fail.Exception, match="chunkwise against recurrent"):
        bound(forgetful, "paradigms_agree")()
    reasons = {"forgetful": {"paradigms_agree": "it ignores its state"}}
    with pytest.raises(pytest.xfail.Exception, match="it ignores its state"):
        bound(forgetful, "paradigms_agree", expected_failures=reasons)()
    with pytest.raises(pytest.skip.Exception, match=r"traits\.packing"):
        bound(ONE_WAY, "documents_are_sequences")()
    with pytest.raises(pytest.skip.Exception, match="compil"):
        bound(RETENTION, "decoding_compiles_once", compiles=False)()


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (parametrize_checks, {"configs": []}, "at least one configuration"),
        (parametrize_checks, {"configs": RETENTION}, "list of configurations"),
        (parametrize_checks, {"configs": [RetentionConfig]}, "list of configurations"),
        (parametrize_checks, {"configs": [RETENTION], "checks": ["row_are_independent"]}, "'row_are_independent'"),
        (parametrize_checks, {"configs": [RETENTION], "expected_failures": {"retntion": {}}}, 'retntion.*"retention"'),
        (parametrize_kernels, {"expected_failures": {"retntion": {}}}, "kernel 'retntion'"),
        (
            parametrize_kernels,
            {"expected_failures": {"decay/chunkwise/reference": {"row_are_independent": "?"}}},
            "'row_are_independent'",
        ),
    ],
)
def test_invalid_selection_raises_an_error_naming_it(function, arguments, named):
    with pytest.raises(SeqmixError, match=named):
        function(**arguments)


@pytest.mark.parametrize("given", [{"checks": []}, {"expected_failures": {}}], ids=str)
def test_bound_check_rejects_selection_arguments(bound, given):
    with pytest.raises(SeqmixError, match=next(iter(given))):
        bound(RETENTION, "paradigms_agree")(**given)


def test_suite_draws_the_same_cases_in_every_run(bound, monkeypatch):
    def record(**options):
        seen.update(options)
        return Outcomes(outcomes=[CheckOutcome(CHECKS["paradigms_agree"], Status.PASSED)])

    def seed():
        seen.clear()
        call()
        return seen["seed"]

    seen = {}
    call = replace(bound(RETENTION, "paradigms_agree"), run=record)
    assert seed() == 0
    monkeypatch.setattr(core, "global_force_seed", 7)
    assert seed() is None
    monkeypatch.undo()
    # a profile of the project's own
    monkeypatch.setattr(settings, "_current_profile", "nightly")
    assert seed() is None


class TiledConfig(RetentionConfig):
    kind: Literal["tiled"] = "tiled"
    chunk_size: int = Field(default=64, ge=16, multiple_of=16, examples=[32])


class ListedConfig(RetentionConfig):
    kind: Literal["listed"] = "listed"
    chunk_size: Literal[32, 64] = 64


@pytest.mark.parametrize("config", [TiledConfig(n_heads=2), ListedConfig(n_heads=2)], ids=lambda config: config.kind)
def test_only_chunk_sizes_the_configuration_accepts_are_drawn(config):
    assert chunk_sizes(config) == [64, 32]
    passes(config, "paradigms_agree", "chunk_size_changes_nothing", examples=3)


def test_chunk_sizes_that_fail_to_build_are_not_drawn(built):
    def build(self, d_model, *, layer_idx, n_layers):
        if self.chunk_size % 64:
            raise ContractError("chunks are whole tiles")
        return Retention(self, d_model)

    passes(built(build), "rows_are_independent", "chunk_size_changes_nothing", examples=2, vary=False)


class OneOfThreeConfig(RetentionConfig):
    kind: Literal["one_of_three"] = "one_of_three"
    paradigm: Literal[Paradigm.PARALLEL] = Paradigm.PARALLEL


def test_declared_paradigm_that_the_configuration_rejects_fails(failure):
    reason = failure(OneOfThreeConfig(n_heads=2), "configurations_round_trip").reason
    assert "paradigm=chunkwise" in reason.splitlines()[0]


class RefusedConfig(RetentionConfig):
    kind: Literal["refused"] = "refused"
    width: int = Field(default=2, examples=["no", 3])


def test_field_example_that_fails_validation_raises():
    with pytest.raises(ContractError, match=r"RefusedConfig: .*width .*'no'"):
        check_mixer(RefusedConfig(n_heads=2))


class LearnedConfig(RetentionConfig):
    kind: Literal["learned"] = "learned"
    n_heads: int = 2
    positions: int = Field(default=1024, gt=0)


def test_options_come_from_annotations_and_examples():
    found = alternatives(RETENTION)
    wanted = {"n_heads": [1, 3], "decay": ["log_uniform", "constant", "none"], "gamma": [0.8], "row_norm": [False]}
    assert {name: found[name] for name in wanted} == wanted
    assert not {"kind", "paradigm", "chunk_size"} & found.keys()
    assert alternatives(AttentionConfig(n_heads=2, window=3))["window"] == [4, 1, None]
    # few positions would refuse what is read
    assert alternatives(LearnedConfig())["positions"] == [1023]
    # options that exclude each other
    assert changed(RETENTION, {"gamma": 0.8}) is None
    assert changed(RETENTION, {"gamma": 0.8, "decay": "constant"}).gamma == 0.8


@pytest.mark.parametrize("kind", [kind for kind in MIXERS.kinds() if MIXERS.origin(kind).startswith("seqmix.")])
def test_all_options_of_built_in_mixers_are_varied(kind):
    """A numeric option without examples would never be varied."""
    config = MIXERS.resolve(kind).example()
    continuous = {"rope_base", "rotation_base", "norm_eps", "key_eps", "eps", "dropout"}
    of_the_start = {"a_range", "time_step_range", "decay_range", "decay_shift", "sine_frequency"}
    fixed = {"kind", "paradigm", "chunk_size", "backend"}
    types = {name: field.annotation for name, field in type(config).model_fields.items()}
    single = {name for name, cls in types.items() if get_origin(cls) is Literal and len(get_args(cls)) == 1}
    single |= {name for name, cls in types.items() if cls in (None, NoneType)}
    assert types.keys() - alternatives(config).keys() <= continuous | of_the_start | fixed | single


class DeepConfig(RetentionConfig):
    kind: Literal["deep"] = "deep"
    scales: tuple[float, ...] = Field(default=(1.0,), examples=[(0.5, 2.0)])


@pytest.mark.parametrize(
    "value",
    [
        Case(),
        Case(lengths=(0, 3), batch_size=2, start="moved", paradigms=(Paradigm.PARALLEL, Paradigm.CHUNKWISE)),
        Case(rows=(1,), seed=7, dtype=torch.bfloat16, options={"chunk_size": 2, "gamma": None, "decay": "none"}),
        RetentionConfig(n_heads=2, decay="constant", gamma=0.5, paradigm="parallel"),
        LinearAttentionConfig(n_heads=3),
        DeepConfig(n_heads=1, scales=(0.5, 2.0)),
    ],
    ids=source,
)
def test_evaluating_source_of_a_value_gives_an_equal_value(value):
    assert eval(source(value), globals()) == value


@pytest.mark.parametrize("name", ["modes_change_nothing", "a_state_survives_the_disk", "paradigms_agree"])
def test_checks_free_mixers_without_garbage_collection(name, monkeypatch):
    """The collector runs rarely in a process with many objects: a suite over all mixers kept 10 GiB."""
    made, build = weakref.WeakSet(), RetentionConfig.build
    monkeypatch.setattr(RetentionConfig, "build", lambda *a, **k: [mixer := build(*a, **k), made.add(mixer)][0])
    gc.disable()
    try:
        assert check_mixer(RetentionConfig(n_heads=2), checks=[name], examples=2).passed
    finally:
        gc.enable()
    assert not made


def test_options_a_check_does_not_need_are_not_searched(monkeypatch):
    """`build` may be slow, and a mixer can have hundreds of option combinations."""
    built, build = [], RetentionConfig.build
    monkeypatch.setattr(RetentionConfig, "build", lambda *a, **k: [build(*a, **k), built.append(None)][0])
    check_mixer(RetentionConfig(n_heads=2), checks=["a_state_is_tensors_batch_first"], examples=2)
    few = len(built)
    check_mixer(RetentionConfig(n_heads=2), checks=["steps_equal_the_whole"], examples=2)
    assert few < 20 < len(built) - few
