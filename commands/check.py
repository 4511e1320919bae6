"""The `check` command: what is to be checked, and how the conformance kit's outcomes are shown."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError
from pydantic_core import to_jsonable_python
from rich.box import SIMPLE
from rich.console import Console
from rich.status import Status as Progress
from rich.table import Table

from ..mixers import MIXERS, MixerConfig, Paradigm
from ..registry import ConfigError, SeqmixError, load, nearest, read_mapping
from ..training import PRESETS, load_config
from .console import terminal

if TYPE_CHECKING:
    from ..testing import Check, Outcome, Report


def check_command(
    source: str,
    changes: Sequence[str],
    *,
    device: str,
    paradigms: Sequence[str],
    only: Sequence[str],
    examples: int,
    seed: int,
    d_model: int | None,
    compile_backend: str | None,
    shrink: bool,
) -> bool:
    """Check every mixer that `source` names and print the outcomes; whether all passed.

    Raises:
        SeqmixError: there is no such mixer, check, paradigm or device, or hypothesis is not installed.
    """
    try:
        from ..testing import CHECKS, check_mixer
        from ..testing.case import source as source_of
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise SeqmixError("check needs hypothesis, which draws the cases: pip install 'seqmix[test]'") from None
    if left_out := [name for name in only if name in CHECKS and CHECKS[name].compiles and compile_backend is None]:
        raise SeqmixError(f"--compile none leaves out {left_out[0]}, which --only asks for")
    configs, vary = mixers_of(source, changes)
    chosen = tuple(map(_paradigm, paradigms)) or None
    console = terminal()
    reports = []
    for config in configs:
        heading = f"{source_of(config)} on {device}" + (", and its options" if vary else "")
        with _progress(console) as progress:
            report = check_mixer(
                config,
                checks=only or None,
                d_model=d_model,
                device=device,
                paradigms=chosen,
                examples=examples,
                seed=seed,
                vary=vary,
                compiles=compile_backend is not None,
                compile_backend=compile_backend or "aot_eager",
                shrink=shrink,
                on_outcome=_Lines(console, heading),
                on_case=progress,
            )
        reports.append(report)
    _summary(console, reports)
    return all(report.passed for report in reports)


def mixers_of(source: str, changes: Sequence[str] = ()) -> tuple[list[MixerConfig], bool]:
    """The mixers that a kind, dotted path, preset or file names, and whether their options are to be varied.

    A kind is an example of itself, checked in its options too; a configuration is checked as it stands. A file holds
    the configuration of a run, or of one mixer (it says `kind` then).

    Raises:
        SeqmixError: what is wrong with it, in one sentence.
    """
    kinds = MIXERS.kinds()
    if source in kinds or (":" in source and not Path(source).exists()):
        return [_example(_class_of(source), changes)], not changes
    presets = sorted(file.stem for file in PRESETS.glob("*.yaml"))
    if not _is_file(source) and source not in presets:
        end = nearest(source, [*kinds, *presets]) or "; a mixer of your own is my_module:MyConfig"
        raise SeqmixError(f"there is no mixer kind, preset or file {source!r}; kinds: {', '.join(kinds)}{end}")
    if source.endswith(".py"):
        module = Path(source).stem
        raise SeqmixError(f"{source} is a module: name its configuration, {module}:MyConfig")
    mapping = read_mapping(source, PRESETS)
    if not mapping:
        raise SeqmixError(f"{source} is empty: a configuration of a run or of a mixer was expected")
    if "kind" in mapping:
        return [load(_class_of(str(mapping["kind"])), source, changes, presets=PRESETS)], False
    blocks = load_config(source, changes).model.blocks
    return list({repr(block.mixer): block.mixer for block in blocks.values()}.values()), False


def _class_of(kind: str) -> type[MixerConfig]:
    module, colon, name = kind.partition(":")
    if colon and not (module and name):
        lacks = "the class after" if module else "the module before"
        raise SeqmixError(f"{kind!r} lacks {lacks} the colon: write my_module:MyConfig")
    try:
        return MIXERS.resolve(kind)
    except SystemExit as error:  # what else an import raises, the registry tells
        raise SeqmixError(f"module {module} calls sys.exit({error.code}) when it is imported") from None


def _example(cls: type[MixerConfig], changes: Sequence[str]) -> MixerConfig:
    """The example of a class with changes.

    Raises:
        SeqmixError: what is wrong with the changes, or with the class.
    """
    filled = cls.example_fields()
    given = [f"{name}={json.dumps(to_jsonable_python(value))}" for name, value in filled.items()]
    try:
        return load(cls, None, [*given, *changes], presets=PRESETS)
    except ConfigError as error:
        # the command line is to blame for what it says, not for what the class says of itself
        said = {change.partition("=")[0].partition(".")[0] for change in changes}
        fields, cause = {name: value for name, value in filled.items() if name not in said}, error.__cause__
        if isinstance(cause, ValidationError) and (sentence := cls.example_error(cause, fields, alone=not said)):
            raise SeqmixError(sentence) from error
        raise


def _is_file(source: str) -> bool:
    return source.endswith((".yaml", ".yml")) or "/" in source or Path(source).is_file()


def _paradigm(name: str) -> Paradigm:
    if name not in list(Paradigm):
        raise SeqmixError(
            f"there is no paradigm {name!r}; allowed: {', '.join(Paradigm)}{nearest(name, list(Paradigm))}"
        )
    return Paradigm(name)


MARKS = {"passed": "✓", "failed": "✗", "skipped": "-", "expected failure": "x"}


@dataclass
class _Lines:
    """Prints a line a check as it ends; the heading comes with the first, when nothing that is given can be wrong."""

    console: Console
    heading: str

    def __call__(self, outcome: "Outcome") -> None:
        if self.heading:
            self.console.print(self.heading, soft_wrap=True)
            self.heading = ""
        _line(self.console, outcome)


@contextmanager
def _progress(console: Console) -> "Iterator[_Counter | None]":
    """A last line on a terminal that says which case of which check is run; nothing elsewhere."""
    if not console.is_terminal:
        yield None
        return
    with console.status("") as status:
        yield _Counter(status)


@dataclass
class _Counter:
    status: Progress

    def __call__(self, check: "Check", tried: int) -> None:
        """After each case."""
        self.status.update(f"{check.name}: {tried} {'case' if tried == 1 else 'cases'} tried")


def _line(console: Console, outcome: "Outcome") -> None:
    cases = f"{outcome.examples:5} {'case ' if outcome.examples == 1 else 'cases'} {outcome.seconds:6.1f} s"
    text = f"  {MARKS[outcome.status]} {outcome.check.name:<48}"
    if outcome.status == "skipped":
        console.print(f"{text} skipped: {outcome.reason}", style="dim", soft_wrap=True)
    elif outcome.status == "failed":
        console.print(f"{text} {cases}", style="red")
        console.print("\n".join(f"      {line}" for line in outcome.reason.splitlines()), soft_wrap=True)
    else:
        console.print(f"{text} {cases}")


def _summary(console: Console, reports: Iterable["Report"]) -> None:
    """A line a mixer."""
    table = Table("mixer", "d_model", "passed", "failed", "skipped", "cases", "seconds", box=SIMPLE, pad_edge=False)
    for report in reports:
        by_status = {status: [o for o in report.outcomes if o.status == status] for status in MARKS}
        table.add_row(
            report.config.kind,
            str(report.d_model),
            str(len(by_status["passed"])),
            str(len(by_status["failed"])),
            str(len(by_status["skipped"])),
            f"{sum(o.examples for o in report.outcomes):,}",
            f"{sum(o.seconds for o in report.outcomes):.1f}",
        )
    console.print(table)
    for report in reports:
        if report.failures:
            names = ", ".join(outcome.check.name for outcome in report.failures)
            console.print(f"{report.config.kind} fails {names}", style="red", soft_wrap=True)
