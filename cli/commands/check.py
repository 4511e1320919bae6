"""`seqmix check`: test mixers and kernels with the conformance kit, and show the outcomes."""

import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import typer
from pydantic import ValidationError
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.status import Status
from torch import nn

from ...configs import PRESETS
from ...mixers import MIXERS, MixerConfig, Paradigm, SequenceMixer
from ...ops.runtime.kernel import Kernel, all_kernels
from ...registry import (
    ConfigError,
    SeqmixError,
    import_named,
    load,
    nearest_hint,
    read_mapping,
    require_name,
    write_file,
)
from ..check_output import CheckResult, Tested, as_junit, result_of
from ..console import plain_table, terminal
from ..json_output import Ended
from ..options import require_writable

if TYPE_CHECKING:
    from ...testing import Check, CheckOutcome

QUICK_EXAMPLES = 10
"""Number of examples with --quick."""


def check(
    source: Annotated[
        str,
        typer.Argument(
            help="A mixer kind (retention), a dotted path (my_mixers:MyConfig, or any nn.Module), a preset, a YAML "
            "file of a run or of one mixer, a class of transformers (hf:transformers.models.llama.modeling_llama:"
            "LlamaModel), or a kernel (decay/chunkwise/triton).",
            metavar="MIXER",
        ),
    ],
    changes: Annotated[
        list[str] | None, typer.Argument(help="Changes as key=value, the value in YAML.", metavar="[KEY=VALUE]...")
    ] = None,
    device: Annotated[str, typer.Option(help="Device: cpu, cuda, ...")] = "cpu",
    paradigm: Annotated[
        list[str] | None,
        typer.Option(help="Check only this paradigm, against the reference; may be repeated. All by default."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Run only this check; may be repeated. By default all checks of the contract.", metavar="CHECK"
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Take only a few seconds: 10 examples, every value of every option once, and no checks that compile "
            "or take long.",
        ),
    ] = False,
    stress: Annotated[
        bool, typer.Option("--stress", help="Also check thousands of tokens, autocast, threads, and more graphs.")
    ] = False,
    examples: Annotated[
        int | None,
        typer.Option(
            help="Number of examples, by default 100; each check draws a share of it (1 to 19 % for mixers).", min=1
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the examples.")] = 0,
    d_model: Annotated[
        int | None, typer.Option(help="Width of the residual stream; small by default.", min=1, max=2**16)
    ] = None,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            help="Tolerance in a dtype, relative to the norm, such as bfloat16=0.05; may be repeated.",
            metavar="DTYPE=NUMBER",
        ),
    ] = None,
    expected_failure: Annotated[
        list[str] | None,
        typer.Option(
            help="A check that is known to fail, and why. If it passes, this counts as a failure. May be repeated.",
            metavar="CHECK=REASON",
        ),
    ] = None,
    compile_with: Annotated[
        Literal["aot_eager", "inductor", "none"] | None,
        typer.Option("--compile", help="Backend for checks that compile, by default aot_eager; `none` skips them."),
    ] = None,
    shrink: Annotated[
        bool, typer.Option("--shrink/--no-shrink", help="Reduce a failing case to the smallest one, in at most 10 s.")
    ] = True,
    hf_config: Annotated[
        str,
        typer.Option(
            "--config", help="For a class of transformers: fields of its configuration, as YAML, JSON or a file."
        ),
    ] = "",
    junit_file: Annotated[
        Path | None, typer.Option("--junit", help="Write all results as JUnit XML.", metavar="FILE")
    ] = None,
) -> CheckResult | Ended[CheckResult]:
    """Test a mixer or a kernel against the contract, and show the smallest failing case.

    If you name only a mixer kind, all values of its options are checked; a kind with changes, a preset or a file is
    checked as it is. The exit status is 1 if a check fails.

    [bold]seqmix check retention --quick[/bold]

    [bold]seqmix check retention --stress[/bold]

    [bold]seqmix check attention window=4 --device cuda[/bold]

    [bold]seqmix check my_mixers:MyConfig --only paradigms_agree --examples 1000[/bold]

    [bold]seqmix check decay/chunkwise/triton --device cuda --junit kernel.xml[/bold]
    """
    from ...testing import CHECKS, EXAMPLES, check_kernel, check_mixer
    from ...testing.engine.source import source as source_of
    from ...testing.mixer.options import not_varied

    require_writable(junit_file)
    if quick and stress:
        raise SeqmixError("expected at most one of --quick and --stress, got both: leave one out")
    console = terminal()
    kernel = kernel_of(source)
    n_examples = examples or (QUICK_EXAMPLES if quick else EXAMPLES)
    arguments: dict[str, Any] = {
        "checks": only or None,
        "device": device,
        "examples": n_examples,
        "seed": seed,
        "shrink": shrink,
        "expected_failures": dict(_parse_pairs("--expected-failure CHECK=REASON", expected_failure)),
    }
    results: list[Tested] = []
    left_out: list[str] = []
    if kernel is not None:
        mixer_options = {
            "--stress": stress,
            "KEY=VALUE": changes,
            "--paradigm": paradigm,
            "--d-model": d_model,
            "--tolerance": tolerance,
        }
        if unsupported := [name for name, value in mixer_options.items() if value]:
            raise SeqmixError(f"{source} is a kernel, but {unsupported[0]} is for mixers only: leave it out")
        report = check_kernel(kernel, **arguments, on_outcome=partial(_print_outcome, console, headings=[]))
        results = [Tested(str(kernel.key), {}, report.outcomes)]
    else:
        compiler = compile_with or ("none" if quick else "aot_eager")
        available = {name: each for name, each in CHECKS.items() if stress or only or not each.stress}
        left_out = [name for name, each in available.items() if each.compiles and compiler == "none"]
        if contradictory := [name for name in only or [] if name in left_out]:
            option = "--compile none" if compile_with else "--quick"
            raise SeqmixError(
                f"{option} leaves out {contradictory[0]}, but --only names it: leave out one of the options"
            )
        if quick and not only:
            left_out += [name for name, each in available.items() if each.long]
            arguments["checks"] = [name for name in available if name not in left_out]
        configs, vary = mixers_of(source, changes or [], hf_config)
        for name in paradigm or []:
            require_name("paradigm", name, list(Paradigm))
        arguments |= {
            "d_model": d_model,
            "paradigms": tuple(map(Paradigm, paradigm or [])) or None,
            "vary": vary,
            "tolerances": _parse_tolerances(tolerance),
            "compiles": compiler != "none",
            "stress": stress,
            "compile_backend": "aot_eager" if compiler == "none" else compiler,
        }
        for config in configs:
            # printed with the first outcome, when all arguments are known to be valid
            headings = [f"{source_of(config)} on {device}" + (", and its options" if vary else "")]
            if vary and (fixed := not_varied(config)):
                headings = [f"{headings[0]} (but {', '.join(fixed)}: no examples are declared)"]
            with console.status("") as status:
                report = check_mixer(
                    config,
                    **arguments,
                    on_outcome=partial(_print_outcome, console, headings=headings),
                    on_case=partial(_show_case, status),
                )
            about = {"config": to_jsonable_python(config, fallback=repr), "d_model": report.d_model}
            results.append(Tested(config.kind, about, report.outcomes))
        _print_summary(console, results)
    if quick:
        without = f", and without {', '.join(left_out)}" if left_out and not only else ""
        console.print(f"quick: {n_examples} examples (the default is {EXAMPLES}){without}", soft_wrap=True)
    if junit_file is not None:
        write_file(as_junit(results), junit_file)
    _print_failures(console, results)
    result = result_of(results, seed=seed)
    return Ended(result, 1) if any(each.count("failed") for each in results) else result


def _parse_pairs(option: str, texts: Sequence[str] | None) -> Iterator[tuple[str, str]]:
    """Yield the name and value of each NAME=VALUE of a repeated option."""
    for text in texts or []:
        name, _, value = (part.strip() for part in text.partition("="))
        if not name or not value:
            raise SeqmixError(f"expected {option}, got {text!r}")
        yield name, value


def _parse_tolerances(texts: Sequence[str] | None) -> dict[torch.dtype, float]:
    """Parse the values of --tolerance."""
    from ...testing.compare import LOW_PRECISION

    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in LOW_PRECISION}
    tolerances: dict[torch.dtype, float] = {}
    for name, text in _parse_pairs("--tolerance DTYPE=NUMBER", texts):
        require_name("low-precision dtype", name, dtypes)
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise SeqmixError(f"--tolerance {name} needs a number above 0, got {text!r}")
        tolerances[dtypes[name]] = number
    return tolerances


def kernel_of(source: str) -> Kernel | None:
    """Return the kernel with the name op/paradigm/backend.

    Args:
        source: the name.

    Returns:
        The kernel; None if `source` is not the name of a kernel.

    Raises:
        SeqmixError: the op exists, but has no such kernel.
    """
    if source.count("/") != 2 or Path(source).exists() or source.endswith((".yaml", ".yml")):
        return None
    kernels = all_kernels()
    if source.partition("/")[0] in {kernel.op for kernel in kernels.values()}:
        require_name("kernel", source, kernels)
    return kernels.get(source)


def mixers_of(source: str, changes: Sequence[str] = (), hf_config: str = "") -> tuple[list[MixerConfig], bool]:
    """Load the mixers to check.

    Args:
        source: a mixer kind, a dotted path, a preset, or a file with the configuration of a run or of one mixer (with
            the key `kind`). A dotted path may name a configuration class, a configuration object (such as one from
            `adapt`), or an `nn.Module`; with the prefix `hf:`, it names a class of transformers.
        changes: changes of the configuration, as key=value.
        hf_config: for a class of transformers: the fields of its configuration, as YAML or JSON, or a file.

    Returns:
        The configurations, and whether their options are to be varied: True for a kind without changes, False for other
        configurations, which are checked as they are.

    Raises:
        SeqmixError: the source or a change is invalid.
    """
    if source.startswith("hf:"):
        from ...testing.adapters import hf

        return list(hf.load_configs(source.removeprefix("hf:"), hf_config, changes, presets=PRESETS)), False
    if hf_config:
        raise SeqmixError(f"--config is for classes of transformers: expected hf:MODULE:CLASS, got {source!r}")
    if ":" in source and not changes and (adapted := _load_adapted(source)) is not None:
        return [adapted], False
    kinds = MIXERS.kinds()
    if source in kinds or (":" in source and not Path(source).exists()):
        return [_build_example(_resolve_class(source), changes)], not changes
    presets = sorted(file.stem for file in PRESETS.glob("*.yaml"))
    is_file = source.endswith((".yaml", ".yml")) or "/" in source or Path(source).is_file()
    if not is_file and source not in presets:
        hint = nearest_hint(source, [*kinds, *presets]) or "; write your own mixer as my_module:MyConfig."
        raise SeqmixError(f"there is no mixer kind, preset or file {source!r}{hint} `seqmix mixers` lists the kinds")
    if source.endswith(".py"):
        module = Path(source).stem
        raise SeqmixError(f"{source} is a Python file: write the dotted path of its configuration, {module}:MyConfig")
    mapping = read_mapping(source, PRESETS)
    if not mapping:
        raise SeqmixError(f"expected {source} to have the configuration of a run or of a mixer, but it is empty")
    if "kind" in mapping:
        return [load(_resolve_class(str(mapping["kind"])), source, changes, presets=PRESETS)], False
    from ...training import load_config  # imported late, as it takes 0.2 s that a mixer kind does not need

    blocks = load_config(source, changes).model.blocks
    return list({repr(block.mixer): block.mixer for block in blocks.values()}.values()), False


def _load_adapted(path: str) -> MixerConfig | None:
    """Load the configuration object or the `nn.Module` class of a dotted path; None if it names something else.

    Raises:
        SeqmixError: the path names a function, or a class that needs more than a width.
    """
    from ...testing import adapt

    module, _, name = path.partition(":")
    try:
        value = getattr(import_named(module), name)
    except (Exception, SystemExit):
        return None
    if isinstance(value, type) and issubclass(value, nn.Module) and not issubclass(value, SequenceMixer):
        _require_only_width(path, value)
        return adapt(value)
    if isinstance(value, FunctionType):
        raise SeqmixError(
            f"{path} is a function: if it returns a layer of a given width, write layer = adapt({name}) beside it and "
            f"check {module}:layer (docs/how-to/check-your-own-layer.md)"
        )
    return value if isinstance(value, MixerConfig) else None


def _require_only_width(path: str, module: type[nn.Module]) -> None:
    """Raise SeqmixError if the constructor of a class needs more arguments than a width."""
    try:
        with torch.device("meta"):
            module(8)
    except TypeError as error:
        raise SeqmixError(
            f"{path} does not have the interface of the contract, and cannot be constructed from a width only "
            f"({error}): adapt it with seqmix.testing.adapt (docs/how-to/check-your-own-layer.md)"
        ) from None
    except Exception:  # may be due to this width or device; the kit reports other problems
        return


def _resolve_class(kind: str) -> type[MixerConfig]:
    module, colon, name = kind.partition(":")
    if colon and not (module and name):
        missing = "class after" if module else "module before"
        raise SeqmixError(f"{kind!r} has no {missing} the colon: write my_module:MyConfig")
    try:
        return MIXERS.resolve(kind)
    except SystemExit as error:  # the registry reports other errors of an import
        raise SeqmixError(f"module {module} calls sys.exit({error.code}) when it is imported") from None


def _build_example(cls: type[MixerConfig], changes: Sequence[str]) -> MixerConfig:
    """Build the example configuration of a class, with changes; SeqmixError if a change or the example is invalid."""
    examples = cls.example_fields()
    fields = [f"{name}={json.dumps(to_jsonable_python(value))}" for name, value in examples.items()]
    try:
        return load(cls, None, [*fields, *changes], presets=PRESETS)
    except ConfigError as error:
        # distinguish errors in the command line's changes from errors in the class's own examples
        changed = {change.partition("=")[0].partition(".")[0] for change in changes}
        unchanged = {name: value for name, value in examples.items() if name not in changed}
        cause = error.__cause__
        if isinstance(cause, ValidationError) and (sentence := cls.example_error(cause, unchanged, alone=not changed)):
            raise SeqmixError(sentence) from error
        raise


MARKS = {"passed": "✓", "failed": "✗", "skipped": "-", "expected failure": "x"}
"""Mark before the name of a check, by the status of its outcome."""


def _show_case(status: Status, check: "Check", cases: int) -> None:
    """Show the running check and its number of cases on a terminal."""
    status.update(f"{check.name}: {cases} {'case' if cases == 1 else 'cases'} tried")


def _print_outcome(console: Console, outcome: "CheckOutcome", *, headings: list[str]) -> None:
    """Print the outcome of a check, after headings that were not printed yet."""
    while headings:
        console.print(headings.pop(), soft_wrap=True)
    cases = f"{outcome.examples:5} {'case ' if outcome.examples == 1 else 'cases'} {outcome.seconds:6.1f} s"
    text = f"  {MARKS[outcome.status]} {outcome.check.name:<48}"
    if outcome.status == "skipped":
        console.print(f"{text} skipped: {outcome.reason}", style="dim", soft_wrap=True)
    elif outcome.status == "failed" and outcome.same_as:
        console.print(f"{text} {cases}  also fails: as {outcome.same_as}", style="red", soft_wrap=True)
    elif outcome.status == "failed":
        console.print(f"{text} {cases}", style="red")
        console.print("\n".join(f"      {line}" for line in outcome.reason.splitlines()), soft_wrap=True)
    else:  # only an expected failure has a reason
        console.print(f"{text} {cases}" + (f"  {outcome.reason}" if outcome.reason else ""), soft_wrap=True)
    for note in outcome.notes if outcome.status != "skipped" else ():
        console.print(f"      warning: {note}", soft_wrap=True)


def _print_summary(console: Console, results: Sequence[Tested]) -> None:
    """Print a table with one line per mixer."""
    statuses = ("passed", "failed", "expected failure", "skipped")
    rows = []
    for result in results:
        cases = f"{sum(outcome.examples for outcome in result.outcomes):,}"
        numbers = [result.about["d_model"], *map(result.count, statuses), cases, f"{result.seconds:.1f}"]
        rows.append((result.kind, *map(str, numbers)))
    console.print(plain_table("mixer", "d_model", *statuses, "cases", "seconds", rows=rows))


def _print_failures(console: Console, results: Sequence[Tested]) -> None:
    """Print the failed checks of each mixer or kernel."""
    for result in results:
        failed = [outcome for outcome in result.outcomes if outcome.status == "failed"]
        if names := [outcome.check.name for outcome in failed if not outcome.same_as]:
            same_cause = [outcome.check.name for outcome in failed if outcome.same_as]
            also = f"; also fails: {', '.join(same_cause)}" if same_cause else ""
            console.print(f"{result.kind} fails {', '.join(names)}{also}", style="red", soft_wrap=True)
