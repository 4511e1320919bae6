"""Running checks: on one configuration, as pytest cases, or one check on one case."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hypothesis import reject

from ..mixers.contract import MixerConfig
from ..ops.paradigm import Paradigm
from ..registry import Config, SeqmixError
from .case import Case, source
from .check import CHECKS, Check
from .outcome import Bound, Outcome, Outcomes, Status, chosen_names, known_failures, known_names, require_examples_asked
from .search import conclude
from .trial import Subject, Trial, strict_numerics

EXAMPLES = 100
"""Examples asked for by default; each check takes its share."""

BACKEND = "aot_eager"
"""What the checks that compile use by default."""


@dataclass
class Report(Outcomes[Check, Case]):
    """All checks on one configuration."""

    config: MixerConfig
    d_model: int
    """Width of the residual stream."""


def check_mixer(
    config: MixerConfig,
    *,
    checks: Iterable[str] | None = None,
    d_model: int | None = None,
    device: str | torch.device = "cpu",
    paradigms: tuple[Paradigm, ...] | None = None,
    examples: int = EXAMPLES,
    seed: int | None = 0,
    vary: bool = True,
    compiles: bool = True,
    tolerances: Mapping[torch.dtype, float] | None = None,
    compile_backend: str = BACKEND,
    expected_failures: Mapping[str, str] | None = None,
    shrink: bool = True,
    on_outcome: Callable[[Outcome[Check, Case]], None] | None = None,
    on_case: Callable[[Check, int], None] | None = None,
) -> Report:
    """Run the conformance kit on a configuration.

    Args:
        config: what is tested.
        checks: names of the checks to run; all by default.
        d_model: width of the residual stream; by default the smallest of a few that fits.
        device: where it is tested.
        paradigms: those to test, of the declared ones, each against the reference; all by default.
        examples: examples asked for; each check takes its share.
        seed: of the cases drawn; None lets hypothesis draw anew (or use its own seed).
        vary: whether checks may change options of the configuration: Literals, booleans, None, and fields' `examples`.
        compiles: whether the checks that compile run, which take several seconds each, or are skipped.
        tolerances: allowed in low precision per dtype, relative to the norm, where the kit's own do not do.
        compile_backend: what the checks that compile use: `aot_eager`, which is quick, or `inductor`.
        expected_failures: checks that are known to fail, each with a reason. One that passes fails.
        shrink: whether the smallest counterexample is searched for.
        on_outcome: called after each check.
        on_case: called after each case, with the number of cases that the check has tried, smaller ones included.

    Raises:
        SeqmixError: an argument is wrong (a check or paradigm that does not exist, a width that does not fit), or the
            mixer cannot be built or called at all.
    """
    expected = dict(expected_failures or {})
    chosen = [CHECKS[name] for name in chosen_names(checks, CHECKS)]
    known_names(expected, CHECKS)
    require_examples_asked(examples)
    subject = Subject(
        config,
        d_model=d_model,
        device=device,
        paradigms=paradigms,
        vary=vary,
        tolerances=tolerances,
        compile_backend=compile_backend,
    )
    subject.probe()
    report = Report(config, subject.d_model)
    for check in chosen:
        outcome = run_check(
            check,
            subject,
            examples=examples,
            seed=seed,
            compiles=compiles,
            shrink=shrink,
            expected=expected.get(check.name),
            on_case=None if on_case is None else partial(on_case, check),
        )
        report.outcomes.append(outcome)
        if on_outcome is not None:
            on_outcome(outcome)
    return report


def run_check(
    check: Check,
    subject: Subject,
    *,
    examples: int = EXAMPLES,
    seed: int | None = 0,
    compiles: bool = True,
    shrink: bool = True,
    expected: str | None = None,
    on_case: Callable[[int], None] | None = None,
) -> Outcome[Check, Case]:
    """One check on one configuration; `expected` is the reason why it is known to fail."""
    if reason := check.skip_reason(subject.config):
        return Outcome(check, Status.SKIPPED, reason)
    if check.compiles and not compiles:
        return Outcome(check, Status.SKIPPED, "it compiles, and compiling was left out")
    return conclude(
        check,
        lambda case: _attempt(check, subject, case),
        check.draw.cases(subject.traits, subject.options),
        lambda case: _explain(check, subject, case),
        subject=subject.config.kind,
        examples=check.examples(examples),
        seed=seed,
        shrink=shrink,
        expected=expected,
        surely=check.draw.surely(subject.traits),
        again=lambda case: _attempt(check, subject.anew(), case),
        rerun=_explain_rerun(check, subject, examples, seed),
        on_case=on_case,
    )


def reproduce(
    name: str,
    config: MixerConfig,
    case: Case,
    *,
    d_model: int | None = None,
    device: str | torch.device = "cpu",
    paradigms: tuple[Paradigm, ...] | None = None,
    tolerances: Mapping[torch.dtype, float] | None = None,
    compile_backend: str = BACKEND,
) -> None:
    """Run one check on one case, as a report of a failure says; raises as the check does."""
    (known,) = chosen_names([name], CHECKS)
    subject = Subject(
        config,
        d_model=d_model,
        device=device,
        paradigms=paradigms,
        tolerances=tolerances,
        compile_backend=compile_backend,
    )
    _attempt(CHECKS[known], subject, case)


def parametrize_checks(
    configs: Sequence[MixerConfig],
    *,
    checks: Iterable[str] | None = None,
    expected_failures: Mapping[str, Mapping[str, str]] | None = None,
    **options: Any,
) -> Any:
    """A decorator that gives a pytest function an argument `check`, one for every configuration and check.

    The function calls it: `check()`, or `check(device="cuda")`. Cases are the same in every run, unless hypothesis gets
    a seed (`--hypothesis-seed`) or a profile of the project's own, whose `max_examples` hold too.

    Args:
        configs: what is tested.
        checks: names of the checks to run; all by default.
        expected_failures: by kind, checks that are known to fail, each with a reason.
        options: as `check_mixer` has them.

    Raises:
        SeqmixError: there is no such check or kind, or nothing to test.
    """
    import pytest

    if isinstance(configs, MixerConfig) or not all(isinstance(config, MixerConfig) for config in configs):
        raise SeqmixError(f"parametrize_checks needs a list of configurations, and was given {configs!r}")
    if not configs:
        raise SeqmixError("parametrize_checks was given no configuration, so nothing would be tested")
    names = chosen_names(checks, CHECKS)
    kinds = list(dict.fromkeys(config.kind for config in configs))
    known = known_failures(expected_failures, kinds, CHECKS, "kind")
    cases = []
    for config in configs:
        for name in names:
            reasons = {check: why for check, why in known.get(config.kind, {}).items() if check == name}
            run = partial(check_mixer, config, checks=[name], expected_failures=reasons)
            cases.append(pytest.param(Bound(run, options), id=f"{_label(config, configs)}-{name}"))
    return pytest.mark.parametrize("check", cases)


def _label(config: MixerConfig, configs: Sequence[MixerConfig]) -> str:
    """The kind, and its number where there are several of it."""
    same = [other for other in configs if other.kind == config.kind]
    return config.kind if len(same) == 1 else f"{config.kind}{same.index(config)}"


def _attempt(check: Check, subject: Subject, case: Case) -> None:
    if check.compiles:  # as in use
        check.test(Trial(subject, case))
        return
    with strict_numerics():
        trial = Trial(subject, case)
        if check.skip_reason(trial.config):
            reject()
        check.test(trial)


# ---- what is told of a failure


def _explain(check: Check, subject: Subject, case: Case) -> list[str]:
    """A failure's case, and how to run it."""
    call = f'reproduce("{check.name}", config, case, {_arguments(check, subject)})'
    return [
        f"The configuration: {source(subject.config)}",
        f"The smallest case: {case!r}",
        "To reproduce:",
        *(f"    {line}" for line in _imports(subject.config, case, call, "Case, reproduce")),
        f"    config = {source(subject.config)}",
        f"    case = {case!r}",
        f"    {call}",
    ]


def _explain_rerun(check: Check, subject: Subject, examples: int, seed: int | None) -> list[str]:
    """How to run all cases of a check again."""
    given = {"checks": [check.name], "examples": examples, "seed": seed} | ({} if subject.vary else {"vary": False})
    asked = ", ".join(f"{name}={value!r}" for name, value in given.items())
    call = f"check_mixer(config, {asked}, {_arguments(check, subject)})"
    return [
        f"The configuration: {source(subject.config)}",
        "To run all cases again:",
        *(f"    {line}" for line in _imports(subject.config, None, call, "check_mixer")),
        f"    config = {source(subject.config)}",
        f"    {call}",
    ]


def _arguments(check: Check, subject: Subject) -> str:
    """What else decides how a case ends, where it is not the default."""
    given: dict[str, Any] = {"d_model": subject.d_model}
    if subject.device.type != "cpu":
        given["device"] = str(subject.device)
    if subject.paradigms is not None:
        given["paradigms"] = subject.paradigms
    if subject.given_tolerances:
        given["tolerances"] = subject.given_tolerances
    if check.compiles and subject.compile_backend != BACKEND:
        given["compile_backend"] = subject.compile_backend
    return ", ".join(f"{name}={source(value)}" for name, value in given.items())


def _imports(config: MixerConfig, case: Case | None, call: str, kit: str) -> Iterator[str]:
    options = {} if case is None else case.options
    written = f"{source(config)}{case!r}{call}"
    if "Paradigm." in written:
        yield "from seqmix import Paradigm"
    if "torch." in written:
        yield "import torch"
    yield f"from seqmix.testing import {kit}"
    for cls in dict.fromkeys(_classes((config, *options.values()))):
        # a field that has its default is not written
        if cls is type(config) or f"{cls.__name__}." in written or f"{cls.__name__}(" in written:
            yield _import(cls)


def _classes(value: Any) -> Iterator[type]:
    """The classes that a value's source names, but for those of the kit."""
    if isinstance(value, Config):
        yield type(value)
        value = [getattr(value, name) for name in type(value).model_fields]
    if isinstance(value, Mapping):
        value = [*value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _classes(item)
    elif isinstance(value, Enum) and not isinstance(value, Paradigm):
        yield type(value)


def _import(cls: type) -> str:
    module, main = cls.__module__, sys.modules.get("__main__")
    if module == "__main__":  # of the script that ran, which is a module to others
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        module = spec.name if spec is not None else Path(file).stem if file else ""
    if not all(part.isidentifier() for part in module.split(".")) or "." in cls.__qualname__:
        return f"...  # {cls.__qualname__} of {cls.__module__}, which cannot be imported"
    return f"from {module} import {cls.__name__}"
