"""The `seqmix` command: a table of commands, each imported when it is called; errors are one sentence."""

import errno
import gc
import os
import platform
import signal
import sys
from importlib import import_module, metadata
from inspect import cleandoc
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .commands.output import guarded, visible

COMMANDS = {
    "train": "Train a model from a preset or a YAML file, or resume a run.",
    "generate": "Generate text with a trained model.",
    "evaluate": "Evaluate trained models: the validation loss at lengths beyond that of training, or tasks of lm-eval.",
    "average": "Average the weights of a run's last checkpoints, as a run directory that other commands read.",
    "convert": "Convert a model of another library to a run directory, or a run to a folder of another library.",
    "linearize": "Swap mixers of a trained model by a plan, and teach the new ones what the old ones did.",
    "export": "Export a trained model to one safetensors file with its configuration, or for Hugging Face.",
    "tokenize": "Tokenize text once, into a file that training memory-maps; train a BPE tokenizer.",
    "mixers": "List the available mixers and their traits: paradigms, state, packing.",
    "check": "Test a mixer or a kernel against the contract, and show the smallest failing case.",
    "bench": "Benchmark throughput, latency and peak memory against other installed implementations.",
    "bench-gpu": "Run everything that needs a GPU: kernels, conformance, benchmarks, the paper's comparisons.",
    "compare": "Train several models under identical conditions and compare them.",
    "suite": "Measure mixers on recall, copying and state tracking, and show one table.",
    "paper": "Reproduce claims of the RetNet paper by name.",
    "plot": "Draw what runs or a study measured: an interactive page, or figures for a paper.",
    "inspect": "Show what a trained model does with a text: where heads look, how far back, states and gradients.",
    "show": "Show a model's cost by layer without allocating it: parameters, FLOPs, state, activations.",
    "plan": "Estimate memory, traffic and time of a training step on many GPUs, by layout; nothing is run.",
    "schema": "Print the JSON schema of a configuration, for YAML completion in editors.",
}
"""Each is a function in a file of its name in commands/, which has its options; the line here begins its docstring."""


INTERRUPTS: list[int] = []
"""The signals that ended this process's command."""


class LazyGroup(TyperGroup):
    """The commands: names and summaries are known; only the command called is imported, as torch takes seconds."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # click's types have moved between versions
        """The command named on the command line, with its options."""
        name, _, rest = super().resolve_command(ctx, args)
        gc.disable()  # what modules hold is no garbage: it is neither searched nor, at the end, freed one by one
        try:
            command = imported(str(name))
        finally:
            gc.enable()
        if not gc.get_freeze_count() and "triton" not in sys.modules:  # which reports as leaks what stays frozen
            gc.freeze()
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, _interrupt)
        return name, command, rest


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """The first Ctrl-C ends the command; the second ends the process, silently, whatever it does by then."""
    signal.signal(number, signal.SIG_DFL)
    INTERRUPTS.append(number)
    raise KeyboardInterrupt


def _unraisable(ignored: Any) -> None:
    """End by a Ctrl-C that came where Python would print it and go on, such as in a destructor."""
    if ignored.exc_type is KeyboardInterrupt:
        signal.raise_signal(signal.SIGINT)
    sys.__unraisablehook__(ignored)


def imported(name: str) -> TyperCommand:
    """A command with the options of its function; the docstring is its help."""
    word = name.replace("-", "_")
    function = getattr(import_module(f".commands.{word}", __package__), word)
    # the terminal wraps lines; typer would also keep the line breaks of the docstring
    paragraphs = [" ".join(paragraph.split()) for paragraph in cleandoc(function.__doc__).split("\n\n")]
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(name, help="\n\n".join(paragraphs))(function)
    command = typer.main.get_command(app)
    assert isinstance(command, TyperCommand)
    return command


def print_versions(asked: bool) -> None:
    """Print the versions and exit; torch's comes from its metadata, as importing it is slow."""
    if asked:
        own = import_module(str(__package__)).__version__
        torch = metadata.version("torch")
        typer.echo(f"seqmix {own} (torch {torch}, Python {platform.python_version()})")
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_versions, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train, evaluate and benchmark language models whose sequence mixer is a plug-in, from one YAML file."""


def main() -> None:
    """Run the command line; exit with 2 and one sentence on bad input."""
    gc.set_threshold(20_000)  # torch's modules are a million objects, and hold no garbage
    columns = os.environ.get("COLUMNS", "")
    if not columns.isdecimal() or int(columns) == 0:  # 0 means unknown; nothing would be printed
        os.environ.pop("COLUMNS", None)
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # in the background it may be ignored
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a command is imported: libraries report it as their error
        sys.unraisablehook = _unraisable
    try:
        with guarded():
            _run()
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # exit handlers take a while, and would show it


def _run() -> None:
    """Run the command that the arguments name; always ends by SystemExit, or by an error that is a bug."""
    app = typer.Typer(cls=LazyGroup, no_args_is_help=True, add_completion=False, rich_markup_mode="rich")
    app.callback()(options)
    group = typer.main.get_group(app)
    for name, line in COMMANDS.items():
        group.add_command(TyperCommand(name, help=line))
    try:
        group(prog_name="seqmix")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if INTERRUPTS:  # a library made an error of its own of it
            sys.exit(130)
        if (sentence := explanation(error)) is None:
            raise
        if sentence:
            typer.secho(f"error: {visible(sentence, err=True)}", err=True, fg="red")
        sys.exit(2)


def explanation(error: Exception) -> str | None:
    """One sentence for the user; empty if another process reports it; None for an error that is a bug."""
    from .registry import ElsewhereError, SeqmixError

    match error:
        case SeqmixError():
            return "" if isinstance(error, ElsewhereError) or _reported_by_another_process() else str(error)
        case OSError(filename=str() | bytes() | int()):
            # what no command foresees about a file: a name that is too long, a folder without permission
            return f"{error.filename} cannot be used: {error.strerror}"
        case OSError(errno=errno.ENOSPC | errno.EFBIG | errno.EDQUOT):
            return f"a file cannot be written: {error.strerror}"
        case FileNotFoundError(strerror=str(reason)) if "temporary directory" in reason:  # where the disk is full
            return f"a file cannot be written: {reason}"
        case MemoryError() | RuntimeError():
            from .models import is_out_of_memory

            if is_out_of_memory(error):
                reason = f" ({str(error).partition(chr(10))[0]})" if str(error) else ""
                return f"memory ran out{reason}: the text, the model or the batch is too large"
    return None


def _reported_by_another_process() -> bool:
    """Whether another process of this machine has the same error: true before the process group exists."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return False
    import torch.distributed as dist

    return not dist.is_initialized()
