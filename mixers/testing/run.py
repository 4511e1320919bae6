"""Running checks: on one configuration, as pytest cases, or one check on one case."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis import reject

from ..base import MixerConfig
from ..paradigm import Paradigm
from . import options
from .case import Case, source
from .check import CHECKS, Check
from .outcome import Bound, Outcome, Outcomes, Status, conclude, known_names
from .trial import Subject, Trial, strict_numerics

EXAMPLES = 100
"""Examples asked for by default; each check takes its share."""


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
    compile_backend: str = "aot_eager",
    expected_failures: Mapping[str, str] | None = None,
    shrink: bool = True,
    on_outcome: Callable[[Outcome[Check, Case]], None] | None = None,
) -> Report:
    """Run the conformance kit on a configuration.

    Args:
        config: what is tested.
        checks: names of the checks to run; all by default.
        d_model: width of the residual stream; by default the smallest of a few that fits.
        device: where it is tested.
        paradigms: those to test, of the declared ones; all by default.
        examples: examples asked for; each check takes its share.
        seed: of the cases drawn; None lets hypothesis draw anew (or use its own seed).
        vary: whether checks may change options of the configuration: Literals, booleans, None, and fields' `examples`.
        compiles: whether the checks that compile run; they take several seconds each.
        tolerances: allowed in low precision per dtype, relative to the norm, where the kit's own do not do.
        compile_backend: what the checks that compile use: `aot_eager`, which is quick, or `inductor`.
        expected_failures: checks that are known to fail, each with a reason. One that passes fails.
        shrink: whether the smallest counterexample is searched for.
        on_outcome: called after each check.

    Raises:
        SeqmixError: a check or paradigm that does not exist, or a width that does not fit.
    """
    subject = Subject(
        config,
        d_model=d_model,
        device=device,
        paradigms=paradigms,
        vary=vary,
        tolerances=tolerances,
        compile_backend=compile_backend,
    )
    expected = dict(expected_failures or {})
    chosen = [CHECKS[name] for name in known_names(checks if checks is not None else CHECKS, CHECKS)]
    known_names(expected, CHECKS)
    report = Report(config, subject.d_model)
    for check in chosen:
        if check.compiles and not compiles:
            continue
        outcome = run_check(
            check, subject, examples=examples, seed=seed, shrink=shrink, expected=expected.get(check.name)
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
    shrink: bool = True,
    expected: str | None = None,
) -> Outcome[Check, Case]:
    """One check on one configuration; `expected` is the reason why it is known to fail."""
    if reason := check.skip_reason(subject.config):
        return Outcome(check, Status.SKIPPED, reason)
    return conclude(
        check,
        lambda case: _attempt(check, subject, case),
        check.draw.cases(subject.config.traits, options.strategy(subject.config, vary=subject.vary)),
        lambda case: _explain(check, subject, case),
        subject=subject.config.kind,
        examples=check.examples(examples),
        seed=seed,
        shrink=shrink,
        expected=expected,
    )


def reproduce(
    name: str, config: MixerConfig, case: Case, *, d_model: int | None = None, device: str | torch.device = "cpu"
) -> None:
    """Run one check on one case, as a report of a failure says; raises as the check does."""
    (known,) = known_names([name], CHECKS)
    _attempt(CHECKS[known], Subject(config, d_model=d_model, device=device), case)


def parametrize_checks(
    configs: Sequence[MixerConfig],
    *,
    expected_failures: Mapping[str, Mapping[str, str]] | None = None,
    **options: Any,
) -> Any:
    """A decorator that gives a pytest function an argument `check`, one for every configuration and check.

    The function calls it: `check()`, or `check(device="cuda")`.

    Args:
        configs: what is tested.
        expected_failures: by kind, checks that are known to fail, each with a reason.
        options: as `check_mixer` has them.
    """
    import pytest

    known = expected_failures or {}
    cases = [
        pytest.param(
            _bound(check, config, known.get(config.kind, {}).get(check.name), options),
            id=f"{_label(config, configs)}-{check.name}",
        )
        for config in configs
        for check in CHECKS.values()
    ]
    return pytest.mark.parametrize("check", cases)


def _bound(check: Check, config: MixerConfig, expected: str | None, options: Mapping[str, Any]) -> Bound:
    failures = {} if expected is None else {check.name: expected}
    return Bound(partial(check_mixer, config, checks=[check.name], expected_failures=failures), options)


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


def _explain(check: Check, subject: Subject, case: Case) -> list[str]:
    """A failure's case, and how to run it."""
    config = subject.config
    where = "" if subject.device.type == "cpu" else f', device="{subject.device}"'
    return [
        f"The configuration: {source(config)}",
        f"The smallest case: {case!r}",
        "To reproduce:",
        *(f"    {line}" for line in _imports(config, case)),
        f"    config = {source(config)}",
        f"    case = {case!r}",
        f'    reproduce("{check.name}", config, case, d_model={subject.d_model}{where})',
    ]


def _imports(config: MixerConfig, case: Case) -> Iterator[str]:
    text = f"{case!r}{source(config)}"
    if "Paradigm." in text:
        yield "from seqmix import Paradigm"
    if "torch." in text:
        yield "import torch"
    yield "from seqmix.mixers.testing import Case, reproduce"
    yield f"from {type(config).__module__} import {type(config).__name__}"
