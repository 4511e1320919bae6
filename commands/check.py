"""`seqmix check`: what is to be checked, and how the conformance kit's outcomes are shown."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from pydantic import ValidationError
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.status import Status

from ..mixers import MIXERS, MixerConfig, Paradigm
from ..ops.kernels import Kernel, all_kernels
from ..registry import ConfigError, SeqmixError, load, nearest, read_mapping, require_name
from ..training import PRESETS, load_config
from .console import plain_table, terminal

if TYPE_CHECKING:
    from ..testing import Check, Outcome, Report
    from ..testing.outcome import Outcomes


def check(
    source: Annotated[
        str,
        typer.Argument(
            help="A mixer kind (retention), a dotted path (my_mixers:MyConfig), a preset, or a YAML file of a run or "
            "of one mixer; or a kernel (decay/chunkwise/triton).",
            metavar="MIXER",
        ),
    ],
    changes: Annotated[
        list[str] | None, typer.Argument(help="Changes as key=value, the value in YAML.", metavar="[KEY=VALUE]...")
    ] = None,
    device: Annotated[str, typer.Option(help="Where it is checked: cpu, cuda, ...")] = "cpu",
    paradigm: Annotated[
        list[str] | None, typer.Option(help="Check this paradigm (against the reference); all by default.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run this check; all by default.", metavar="CHECK")] = None,
    examples: Annotated[int, typer.Option(help="Cases of the largest check; others take a share.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="The cases are a function of it.")] = 0,
    d_model: Annotated[
        int | None, typer.Option(help="Width of the residual stream; small by default.", min=1, max=2**16)
    ] = None,
    compile_with: Annotated[
        Literal["aot_eager", "inductor", "none"],
        typer.Option("--compile", help="What the checks that compile use; none skips them."),
    ] = "aot_eager",
    shrink: Annotated[
        bool, typer.Option("--shrink/--no-shrink", help="Look for the smallest case that fails; slow for slow mixers.")
    ] = True,
) -> None:
    """Test a mixer or a kernel against the contract, and show the smallest failing case.

    A kind is checked in all its options, a configuration as it stands. Exits with 1 if a check fails.

    [bold]seqmix check retention[/bold]

    [bold]seqmix check attention window=4 --device cuda[/bold]

    [bold]seqmix check my_mixers:MyConfig --only paradigms_agree --examples 1000[/bold]

    [bold]seqmix check decay/chunkwise/triton --device cuda[/bold]
    """
    try:
        from ..testing import CHECKS, check_kernel, check_mixer
        from ..testing.source import source as source_of
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise SeqmixError("check needs hypothesis, which draws the cases: pip install 'seqmix[test]'") from None
    console = terminal()
    if (kernel := kernel_of(source)) is not None:
        mixers_alone = {"KEY=VALUE": changes, "--paradigm": paradigm, "--d-model": d_model}
        if given := [name for name, value in mixers_alone.items() if value]:
            raise SeqmixError(f"{source} is a kernel, and {given[0]} is for mixers")
        print_line = partial(_line, console, headings=[])
        asked = {"checks": only or None, "device": device, "examples": examples, "seed": seed, "shrink": shrink}
        _conclude(console, [(str(kernel.key), check_kernel(kernel, **asked, on_outcome=print_line))])
        return
    if left_out := [name for name in only or [] if name in CHECKS and CHECKS[name].compiles and compile_with == "none"]:
        raise SeqmixError(f"--compile none leaves out {left_out[0]}, which --only asks for")
    configs, vary = mixers_of(source, changes or [])
    for name in paradigm or []:
        require_name("paradigm", name, list(Paradigm))
    reports = []
    for config in configs:
        # the heading comes with the first line, after all arguments are known to be valid
        headings = [f"{source_of(config)} on {device}" + (", and its options" if vary else "")]
        with console.status("") as status:
            report = check_mixer(
                config,
                checks=only or None,
                d_model=d_model,
                device=device,
                paradigms=tuple(map(Paradigm, paradigm or [])) or None,
                examples=examples,
                seed=seed,
                vary=vary,
                compiles=compile_with != "none",
                compile_backend="aot_eager" if compile_with == "none" else compile_with,
                shrink=shrink,
                on_outcome=partial(_line, console, headings=headings),
                on_case=partial(_case, status),
            )
        reports.append(report)
    _summary(console, reports)
    _conclude(console, [(report.config.kind, report) for report in reports])


def kernel_of(source: str) -> Kernel | None:
    """The kernel that is called op/paradigm/backend; None where none is meant, a SeqmixError if unknown."""
    if source.count("/") != 2 or Path(source).exists() or source.endswith((".yaml", ".yml")):
        return None
    kernels = all_kernels()
    if source.partition("/")[0] in {kernel.op for kernel in kernels.values()}:
        require_name("kernel", source, kernels)
    return kernels.get(source)


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
    is_file = source.endswith((".yaml", ".yml")) or "/" in source or Path(source).is_file()
    if not is_file and source not in presets:
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
    except SystemExit as error:  # what else an import raises, the registry reports
        raise SeqmixError(f"module {module} calls sys.exit({error.code}) when it is imported") from None


def _example(cls: type[MixerConfig], changes: Sequence[str]) -> MixerConfig:
    """The example of a class with changes; a SeqmixError says what is wrong with them, or with the class."""
    filled = cls.example_fields()
    given = [f"{name}={json.dumps(to_jsonable_python(value))}" for name, value in filled.items()]
    try:
        return load(cls, None, [*given, *changes], presets=PRESETS)
    except ConfigError as error:
        # the command line is responsible for its own changes, not for the examples of the class
        said = {change.partition("=")[0].partition(".")[0] for change in changes}
        fields, cause = {name: value for name, value in filled.items() if name not in said}, error.__cause__
        if isinstance(cause, ValidationError) and (sentence := cls.example_error(cause, fields, alone=not said)):
            raise SeqmixError(sentence) from error
        raise


MARKS = {"passed": "✓", "failed": "✗", "skipped": "-", "expected failure": "x"}


def _case(status: Status, check: "Check", tried: int) -> None:
    """The last line on a terminal: which case of which check is run."""
    status.update(f"{check.name}: {tried} {'case' if tried == 1 else 'cases'} tried")


def _line(console: Console, outcome: "Outcome", *, headings: list[str]) -> None:
    """One line per check as it ends, after headings that are still to be printed."""
    while headings:
        console.print(headings.pop(), soft_wrap=True)
    cases = f"{outcome.examples:5} {'case ' if outcome.examples == 1 else 'cases'} {outcome.seconds:6.1f} s"
    text = f"  {MARKS[outcome.status]} {outcome.check.name:<48}"
    if outcome.status == "skipped":
        console.print(f"{text} skipped: {outcome.reason}", style="dim", soft_wrap=True)
    elif outcome.status == "failed":
        console.print(f"{text} {cases}", style="red")
        console.print("\n".join(f"      {line}" for line in outcome.reason.splitlines()), soft_wrap=True)
    else:
        console.print(f"{text} {cases}")


def _summary(console: Console, reports: Sequence["Report"]) -> None:
    """One line per mixer."""
    rows = []
    for report in reports:
        count = Counter(str(outcome.status) for outcome in report.outcomes)
        numbers = [report.d_model, count["passed"], count["failed"], count["skipped"]]
        cases = f"{sum(outcome.examples for outcome in report.outcomes):,}"
        seconds = f"{sum(outcome.seconds for outcome in report.outcomes):.1f}"
        rows.append((report.config.kind, *map(str, numbers), cases, seconds))
    console.print(plain_table("mixer", "d_model", "passed", "failed", "skipped", "cases", "seconds", rows=rows))


def _conclude(console: Console, reports: Iterable[tuple[str, "Outcomes"]]) -> None:
    """Say what fails of what, and exit with 1 if anything does."""
    failing = [(name, report.failures) for name, report in reports if report.failures]
    for name, failures in failing:
        names = ", ".join(outcome.check.name for outcome in failures)
        console.print(f"{name} fails {names}", style="red", soft_wrap=True)
    if failing:
        raise typer.Exit(1)
