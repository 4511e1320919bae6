"""`seqmix check`: what is to be checked, and how the conformance kit's outcomes are shown."""

import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import typer
from pydantic import ValidationError
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.status import Status
from torch import nn

from ..configs import PRESETS
from ..mixers import MIXERS, MixerConfig, Paradigm, SequenceMixer
from ..ops.runtime.kernel import Kernel, all_kernels
from ..registry import ConfigError, SeqmixError, import_named, load, nearest, read_mapping, require_name, write_file
from .check_output import Tested, as_json, as_junit
from .console import plain_table, terminal
from .options import JsonFile, require_writable

if TYPE_CHECKING:
    from ..testing import Check, CheckOutcome

QUICK = 10
"""Examples of --quick."""


def check(
    source: Annotated[
        str,
        typer.Argument(
            help="A mixer kind (retention), a dotted path (my_mixers:MyConfig, or any nn.Module), a preset, or a YAML "
            "file of a run or of one mixer; a class of transformers (hf:transformers.models.llama.modeling_llama:"
            "LlamaModel); or a kernel (decay/chunkwise/triton).",
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
    only: Annotated[
        list[str] | None,
        typer.Option(help="Run this check; may be repeated; the contract's by default.", metavar="CHECK"),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A few seconds: 10 examples, every value of every option once, and no check that compiles or is long.",
        ),
    ] = False,
    stress: Annotated[
        bool, typer.Option("--stress", help="Also checks of thousands of tokens, autocast, threads, more graphs.")
    ] = False,
    examples: Annotated[
        int | None, typer.Option(help="Cases of the largest check, 100 by default; others take a share.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="The cases are a function of it.")] = 0,
    d_model: Annotated[
        int | None, typer.Option(help="Width of the residual stream; small by default.", min=1, max=2**16)
    ] = None,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            help="Allowed in a dtype, relative to the norm: bfloat16=0.05; may be repeated.", metavar="DTYPE=NUMBER"
        ),
    ] = None,
    expected_failure: Annotated[
        list[str] | None,
        typer.Option(
            help="A check that is known to fail, and why; it fails if it passes. May be repeated.",
            metavar="CHECK=REASON",
        ),
    ] = None,
    compile_with: Annotated[
        Literal["aot_eager", "inductor", "none"] | None,
        typer.Option("--compile", help="What the checks that compile use, aot_eager by default; none skips them."),
    ] = None,
    shrink: Annotated[
        bool, typer.Option("--shrink/--no-shrink", help="Reduce a case that fails to the smallest, in at most 10 s.")
    ] = True,
    hf_config: Annotated[
        str,
        typer.Option("--config", help="Fields of a class of transformers' configuration, as YAML or JSON, or a file."),
    ] = "",
    json_file: JsonFile = None,
    junit_file: Annotated[
        Path | None, typer.Option("--junit", help="Write all results as JUnit XML.", metavar="FILE")
    ] = None,
) -> None:
    """Test a mixer or a kernel against the contract, and show the smallest failing case.

    A kind is checked in all its options, a configuration as it stands. Exits with 1 if a check fails.

    [bold]seqmix check retention --quick[/bold]

    [bold]seqmix check retention --stress[/bold]

    [bold]seqmix check attention window=4 --device cuda[/bold]

    [bold]seqmix check my_mixers:MyConfig --only paradigms_agree --examples 1000[/bold]

    [bold]seqmix check decay/chunkwise/triton --device cuda --junit kernel.xml[/bold]
    """
    from ..testing import CHECKS, EXAMPLES, check_kernel, check_mixer
    from ..testing.engine.source import source as source_of
    from ..testing.mixer.options import not_varied

    require_writable(json_file, junit_file)
    if quick and stress:
        raise SeqmixError("--quick and --stress exclude each other: expected at most one of them")
    console, kernel, chosen = terminal(), kernel_of(source), examples or (QUICK if quick else EXAMPLES)
    asked: dict[str, Any] = {"checks": only or None, "device": device, "examples": chosen, "seed": seed}
    asked |= {"shrink": shrink, "expected_failures": dict(_pairs("--expected-failure CHECK=REASON", expected_failure))}
    found, left_out = list[Tested](), list[str]()
    if kernel is not None:
        mixers_alone = {"--stress": stress, "KEY=VALUE": changes, "--paradigm": paradigm, "--d-model": d_model}
        mixers_alone |= {"--tolerance": tolerance}
        if given := [name for name, value in mixers_alone.items() if value]:
            raise SeqmixError(f"{source} is a kernel, and {given[0]} is for mixers")
        report = check_kernel(kernel, **asked, on_outcome=partial(_line, console, headings=[]))
        found = [Tested(str(kernel.key), {}, report.outcomes)]
    else:
        compiler = compile_with or ("none" if quick else "aot_eager")
        known = {name: each for name, each in CHECKS.items() if stress or only or not each.stress}
        left_out = [name for name, each in known.items() if each.compiles and compiler == "none"]
        if refused := [name for name in only or [] if name in left_out]:
            option = "--compile none" if compile_with else "--quick"
            raise SeqmixError(f"{option} leaves out {refused[0]}, which --only asks for")
        if quick and not only:
            left_out += [name for name, each in known.items() if each.long]
            asked["checks"] = [name for name in known if name not in left_out]
        configs, vary = mixers_of(source, changes or [], hf_config)
        for name in paradigm or []:
            require_name("paradigm", name, list(Paradigm))
        asked |= {"d_model": d_model, "paradigms": tuple(map(Paradigm, paradigm or [])) or None, "vary": vary}
        asked |= {"tolerances": _tolerances(tolerance), "compiles": compiler != "none", "stress": stress}
        asked |= {"compile_backend": "aot_eager" if compiler == "none" else compiler}
        for config in configs:
            # the heading comes with the first line, after all arguments are known to be valid
            headings = [f"{source_of(config)} on {device}" + (", and its options" if vary else "")]
            if vary and (fixed := not_varied(config)):
                headings = [f"{headings[0]} (but {', '.join(fixed)}: no examples are declared)"]
            with console.status("") as status:
                asked |= {"on_outcome": partial(_line, console, headings=headings), "on_case": partial(_case, status)}
                report = check_mixer(config, **asked)
            about = {"config": to_jsonable_python(config, fallback=repr), "d_model": report.d_model}
            found.append(Tested(config.kind, about, report.outcomes))
        _summary(console, found)
    if quick:
        without = f", and without {', '.join(left_out)}" if left_out and not only else ""
        console.print(f"quick: {chosen} examples (the default is {EXAMPLES}){without}", soft_wrap=True)
    if json_file is not None:
        write_file(as_json(found, seed=seed), json_file)
    if junit_file is not None:
        write_file(as_junit(found), junit_file)
    _conclude(console, found)


def _pairs(option: str, given: Sequence[str] | None) -> Iterator[tuple[str, str]]:
    """Names and values of an option that is written NAME=VALUE and may be repeated."""
    for text in given or []:
        name, _, value = (part.strip() for part in text.partition("="))
        if not name or not value:
            raise SeqmixError(f"write {option}: {text!r} was given")
        yield name, value


def _tolerances(given: Sequence[str] | None) -> dict[torch.dtype, float]:
    from ..testing.compare import LOW_PRECISION

    dtypes, found = {str(dtype).removeprefix("torch."): dtype for dtype in LOW_PRECISION}, {}
    for name, text in _pairs("--tolerance DTYPE=NUMBER", given):
        require_name("low-precision dtype", name, dtypes)
        try:
            found[dtypes[name]] = float(text)
        except ValueError:
            found[dtypes[name]] = math.nan
        if not 0 < found[dtypes[name]] < math.inf:
            raise SeqmixError(f"--tolerance {name} needs a number above 0, and was given {text!r}")
    return found


def kernel_of(source: str) -> Kernel | None:
    """The kernel that is called op/paradigm/backend; None where none is meant, a SeqmixError if unknown."""
    if source.count("/") != 2 or Path(source).exists() or source.endswith((".yaml", ".yml")):
        return None
    kernels = all_kernels()
    if source.partition("/")[0] in {kernel.op for kernel in kernels.values()}:
        require_name("kernel", source, kernels)
    return kernels.get(source)


def mixers_of(source: str, changes: Sequence[str] = (), hf_config: str = "") -> tuple[list[MixerConfig], bool]:
    """The mixers that a kind, dotted path, preset or file names, and whether their options are to be varied.

    A kind is an example of itself, checked in its options too; a configuration is checked as it stands. A file holds
    the configuration of a run, or of one mixer (it says `kind` then). A dotted path may name a configuration that is
    made already, as by `adapt`, or an `nn.Module`; `hf:` and a path name a class of transformers.

    Raises:
        SeqmixError: what is wrong with it, in one sentence.
    """
    if source.startswith("hf:"):
        from ..testing.adapters import hf

        return list(hf.named(source.removeprefix("hf:"), hf_config, changes, presets=PRESETS)), False
    if hf_config:
        raise SeqmixError(f"--config is for classes of transformers, hf:MODULE:CLASS, and {source!r} was given")
    if ":" in source and not changes and (adapted := _adapted(source)) is not None:
        return [adapted], False
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
    from ..training import load_config  # a fifth of a second that a kind does not need

    blocks = load_config(source, changes).model.blocks
    return list({repr(block.mixer): block.mixer for block in blocks.values()}.values()), False


def _adapted(path: str) -> MixerConfig | None:
    """The configuration or the module that a dotted path names; None where it names another thing, or nothing."""
    from ..testing import adapt

    module, _, name = path.partition(":")
    try:
        found = getattr(import_named(module), name)
    except (Exception, SystemExit):
        return None
    if isinstance(found, type) and issubclass(found, nn.Module) and not issubclass(found, SequenceMixer):
        _require_width_alone(path, found)
        return adapt(found)
    return found if isinstance(found, MixerConfig) else None


def _require_width_alone(path: str, module: type[nn.Module]) -> None:
    """Refuse a class that cannot be made of a width alone."""
    try:
        with torch.device("meta"):
            module(8)
    except TypeError as error:
        raise SeqmixError(
            f"{path} is a module without the contract, and is not made of a width alone ({error}): "
            "say how with seqmix.testing.adapt (docs/how-to/check-your-own-layer.md)"
        ) from None
    except Exception:  # of this width or device; the kit says what is wrong with others
        return


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


def _line(console: Console, outcome: "CheckOutcome", *, headings: list[str]) -> None:
    """One line per check as it ends, after headings that are still to be printed."""
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
    else:  # an expected failure has its reason
        console.print(f"{text} {cases}" + (f"  {outcome.reason}" if outcome.reason else ""), soft_wrap=True)
    for note in outcome.notes if outcome.status != "skipped" else ():
        console.print(f"      warning: {note}", soft_wrap=True)


def _summary(console: Console, found: Sequence[Tested]) -> None:
    """One line per mixer."""
    statuses = ("passed", "failed", "expected failure", "skipped")
    rows = []
    for one in found:
        cases = f"{sum(outcome.examples for outcome in one.outcomes):,}"
        numbers = [one.about["d_model"], *map(one.count, statuses), cases, f"{one.seconds:.1f}"]
        rows.append((one.kind, *map(str, numbers)))
    console.print(plain_table("mixer", "d_model", *statuses, "cases", "seconds", rows=rows))


def _conclude(console: Console, found: Sequence[Tested]) -> None:
    """Say what fails of what, and exit with 1 if anything does."""
    for one in found:
        failed = [outcome for outcome in one.outcomes if outcome.status == "failed"]
        if names := [outcome.check.name for outcome in failed if not outcome.same_as]:
            folded = [outcome.check.name for outcome in failed if outcome.same_as]
            also = f"; also fails: {', '.join(folded)}" if folded else ""
            console.print(f"{one.kind} fails {', '.join(names)}{also}", style="red", soft_wrap=True)
    if any(one.count("failed") for one in found):
        raise typer.Exit(1)
