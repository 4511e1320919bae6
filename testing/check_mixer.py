"""Check mixers: a configuration, one case of a configuration, or several configurations as pytest cases."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from hypothesis.errors import UnsatisfiedAssumption
from hypothesis.strategies import SearchStrategy

from ..mixers.base.contract import MixerConfig
from ..ops.runtime.paradigm import Paradigm
from ..registry import SeqmixError
from .check import CHECKS, MixerCheck
from .engine.outcome import CheckOutcome, Outcomes, chosen_names
from .engine.parametrize import parametrized
from .engine.run import EXAMPLES, CheckedSubject, run_checks, sample_evenly, strict_numerics
from .engine.source import call_source, imports, non_defaults, source
from .memory_limit import limited_memory
from .mixer.case import FIXED, Case
from .mixer.subject import BACKEND, Subject
from .mixer.trial import Trial


@dataclass
class Report(Outcomes):
    """Outcomes of all checks of one mixer configuration."""

    config: MixerConfig
    d_model: int


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
    stress: bool = False,
    tolerances: Mapping[torch.dtype, float] | None = None,
    compile_backend: str = BACKEND,
    expected_failures: Mapping[str, str] | None = None,
    shrink: bool = True,
    on_outcome: Callable[[CheckOutcome], None] | None = None,
    on_case: Callable[[MixerCheck, int], None] | None = None,
) -> Report:
    """Run the conformance kit on a mixer configuration.

    Args:
        config: the configuration to test.
        checks: names of the checks to run; by default those of the contract.
        d_model: width of the residual stream; by default the first of a short list of widths that fits.
        device: device to test on.
        paradigms: declared paradigms to test, each against the reference; by default all.
        examples: number of requested examples; each check runs its share of them (`Check.share`).
        seed: seed of the drawn cases; None leaves it to hypothesis.
        vary: True if checks may change fields of the configuration: Literals, booleans, optional fields, numbers with
            bounds, and fields with `examples`.
        compiles: True to run the checks that compile, which take several seconds each; False to skip them.
        stress: True to run the checks of `--stress` too, unless `checks` selects some.
        tolerances: allowed relative errors by low-precision dtype, in place of the kit's own.
        compile_backend: backend of the checks that compile: `aot_eager`, which is quick, or `inductor`. With
            `aot_eager`, the check `graphs_follow_sizes` traces the forward pass alone.
        expected_failures: checks that are known to fail, each with a reason. One that passes counts as a failure.
        shrink: True to reduce a failing case to the fewest tokens and options.
        on_outcome: called after each check with its outcome.
        on_case: called after each case with the check and the number of cases run so far, including those that are
            tried to reduce a failing case.

    Raises:
        SeqmixError: an argument is wrong (a check or paradigm that does not exist, a width that does not fit), or the
            mixer cannot be built or called at all.
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
    subject.probe()
    outcomes = run_checks(
        CheckedMixer(subject, examples),
        CHECKS,
        checks=checks,
        stress=stress,
        expected_failures=expected_failures,
        compiles=compiles,
        shrink=shrink,
        examples=examples,
        seed=seed,
        on_outcome=on_outcome,
        on_case=on_case,
    )
    return Report(config, subject.d_model, outcomes=outcomes)


def reproduce(name: str, config: MixerConfig, case: Case, **options: Any) -> None:
    """Run one check on one case; the report of a failure prints such a call.

    Args:
        name: name of the check.
        config: the configuration to test.
        case: the case to run it on.
        options: arguments of `check_mixer` that decide how the mixer is built and compared: `d_model`, `device`,
            `paradigms`, `tolerances`, `compile_backend`.

    Raises:
        CheckFailure: the property does not hold on this case.
    """
    (known,) = chosen_names([name], CHECKS)
    CheckedMixer(Subject(config, **options)).attempt(CHECKS[known], case)


def parametrize_checks(
    configs: Sequence[MixerConfig],
    *,
    checks: Iterable[str] | None = None,
    stress: bool = False,
    expected_failures: Mapping[str, Mapping[str, str]] | None = None,
    **options: Any,
) -> Any:
    """Return a decorator that makes a pytest function one test per configuration and check, with an argument `check`.

    The function has to call it: `check()`, or `check(device="cuda")`. Every run draws the same cases, unless you give
    hypothesis a seed (`--hypothesis-seed`) or your project loads a hypothesis profile. Without an option `examples`,
    the number of requested examples is the profile's `max_examples`.

    Args:
        configs: configurations to test.
        checks: names of the checks to run; by default those of the contract.
        stress: True to run the checks of `--stress` too, unless `checks` selects some.
        expected_failures: checks that are known to fail, each with a reason, by the kind of the configuration.
        options: further arguments of `check_mixer`.

    Raises:
        SeqmixError: a check or kind does not exist, or there is nothing to test.
    """
    if isinstance(configs, MixerConfig) or not all(isinstance(config, MixerConfig) for config in configs):
        raise SeqmixError(f"parametrize_checks expects a list of configurations, got {configs!r}: pass [config, ...]")
    if not configs:
        raise SeqmixError("parametrize_checks expects at least one configuration, got none: pass [config, ...]")
    tested = [(_label(config, configs), config.kind, partial(check_mixer, config)) for config in configs]
    return parametrized(
        tested,
        CHECKS,
        what="kind",
        checks=checks,
        stress=stress,
        expected_failures=expected_failures,
        options=options,
    )


def _label(config: MixerConfig, configs: Sequence[MixerConfig]) -> str:
    """Return a configuration's kind, followed by its number among those of the same kind if there are several."""
    same_kind = [other for other in configs if other.kind == config.kind]
    return config.kind if len(same_kind) == 1 else f"{config.kind}{same_kind.index(config)}"


class CheckedMixer(CheckedSubject[Case]):
    """A mixer, in the form that the engine runs checks on."""

    what = "mixer"

    def __init__(self, subject: Subject, examples: int = EXAMPLES) -> None:
        self.subject, self.name, self.examples = subject, subject.config.kind, examples
        self.notes = {}

    def skip_reason(self, check: MixerCheck) -> str | None:
        return check.skip_reason(self.subject.config, self.subject.mixer({}))

    def cases(self, check: MixerCheck) -> SearchStrategy[Case]:
        draw, options = check.draw.of(self.subject.traits), self.subject.options
        fixed_chunk = {"chunk_size": draw.chunk_size}
        if draw.chunk_size is not None and self.subject.accepts(fixed_chunk):
            options = lambda rng, vary: self.subject.options(rng, vary) | fixed_chunk  # noqa: E731
        return draw.cases(self.subject.traits, options)

    def fixed_cases(self, check: MixerCheck) -> list[Case]:
        draw = check.draw.of(self.subject.traits)
        tokens = max(draw.tokens[0], min(5, draw.tokens[1]))
        short = Case((tokens,) * draw.pieces[0], draw.batch_size[0], draw.starts[-1], seed=FIXED, dtype=draw.dtypes[0])
        cases = draw.fixed_cases(self.subject.traits)
        if draw.options or draw.wide:
            cases += [replace(short, options=options) for options in self.subject.shared_options]
        # every value of every option is tried, however few examples are asked for
        singly = self.subject.single_options if draw.options else []
        return sample_evenly(cases, self.examples) + [replace(short, options=options) for options in singly]

    def simpler(self, check: MixerCheck, case: Case) -> Iterable[Case]:
        return check.draw.of(self.subject.traits).simpler(case)

    def attempt(self, check: MixerCheck, case: Case) -> None:
        if check.compiles:  # no strict numerics: compile as a user does
            self._test(check, Trial(self.subject, case))
            return
        limited = limited_memory if self.subject.device.type == "cpu" else nullcontext
        with strict_numerics(), limited():
            trial = Trial(self.subject, case)
            if check.skip_reason(trial.config, trial.mixer):
                raise UnsatisfiedAssumption
            self._test(check, trial)

    def _test(self, check: MixerCheck, trial: Trial) -> None:
        check.test(trial)
        self.notes |= dict.fromkeys(trial.notes)

    def renew(self) -> "CheckedMixer":
        return CheckedMixer(self.subject.renew())

    def script(self, check: MixerCheck, case: Case | None, **run_options: Any) -> list[str]:
        # of the other arguments that decide the outcome, write those that differ from their defaults
        defaults = {"device": "cpu", "paradigms": None, "tolerances": None}
        defaults |= {"compile_backend": BACKEND} if check.compiles else {}
        differing = {"d_model": self.subject.d_model, **non_defaults(self.subject.arguments, defaults)}
        lines, values = [f"config = {source(self.subject.config)}"], [self.subject.config]
        if case is None:
            vary = non_defaults(self.subject.arguments, {"vary": True})
            kit, named = "check_mixer", {"checks": [check.name], **run_options, **vary, **differing}
            lines += [call_source(kit, named, "config")]
        else:
            kit, values = "Case, reproduce", [*values, *case.options.values()]
            lines += [f"case = {case!r}", call_source("reproduce", differing, f'"{check.name}"', "config", "case")]
        return [*imports("\n".join(lines), kit, values), *lines]
