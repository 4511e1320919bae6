"""The `seqmix` program: the table of commands. Each one is imported when it is called; errors are one sentence."""

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

from .output import explanation, protect_output, visible

COMMANDS = {
    "train": "Train a model from a preset or a YAML file, or resume a run.",
    "status": "Show what runs and studies are doing, or how they ended.",
    "generate": "Generate text with a trained model.",
    "evaluate": "Evaluate trained models: the validation loss at lengths beyond that of training, or tasks of lm-eval.",
    "average": "Average the weights of a run's last checkpoints, and write them as a new run directory.",
    "convert": "Convert a model of another library to a run directory, or a run to a folder of another library.",
    "linearize": "Replace mixers of a trained model as a plan says, and train the new ones to imitate the old ones.",
    "export": "Export a trained model to one safetensors file with its configuration, for Hugging Face, or to ONNX.",
    "playground": "Write a folder whose index.html runs trained models in a browser, without a network.",
    "tokenize": "Tokenize text once, into a file that training memory-maps; train a BPE tokenizer.",
    "mixers": "List the available mixers and their traits: paradigms, state, packing.",
    "check": "Test a mixer or a kernel against the contract, and show the smallest failing case.",
    "vectors": "Write conformance vectors: inputs, expected outputs, states and gradients of every op, for any "
    "implementation.",
    "bench": "Benchmark throughput, latency and peak memory against other installed implementations.",
    "bench-gpu": "Run all tests and benchmarks that need a GPU: kernels, conformance, speed, the paper's comparisons.",
    "compare": "Train several models under identical conditions and compare them.",
    "suite": "Measure mixers on recall, copying and state tracking, and show one table.",
    "paper": "Reproduce claims of the RetNet paper by name, and compare them with the paper.",
    "plot": "Plot the measurements of runs or of a study: an interactive page, or figures for a paper.",
    "inspect": "Show how a trained model processes a text: attention maps, reach of heads, states and gradients.",
    "precision": "Measure the loss of a trained model whose state is stored in fewer bits, and the error of the state.",
    "show": "Show a model's cost by layer without allocating it: parameters, FLOPs, state, activations.",
    "coordinates": "Check that training changes activations equally at every width of the model (coordinate check of "
    "muP).",
    "plan": "Estimate memory, traffic and time of a training step on many GPUs, by layout, without running it.",
    "schema": "Print the JSON schema of a configuration, for YAML completion in editors, or of a command's result.",
}
"""Summary of each command, by name. The docstring of the command's function in commands/ begins with it."""


INTERRUPTS: list[int] = []
"""Signals that interrupted the command of this process."""


class LazyGroup(TyperGroup):
    """Group of commands whose names and summaries are known without importing them, as importing torch is slow.

    Only the command that is called is imported.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # click's types have moved between versions
        """Import the command named on the command line; return its name, the command, and the remaining arguments."""
        name, _, rest = super().resolve_command(ctx, args)
        gc.disable()  # objects of modules live until the end: searching them for garbage costs time
        try:
            command = import_command(str(name))
        finally:
            gc.enable()
        if not gc.get_freeze_count() and "triton" not in sys.modules:  # triton reports frozen objects as leaks
            gc.freeze()
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, _interrupt)
        return name, command, rest


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """Handle the first Ctrl-C: end the command, and let a second one end the process at once, silently."""
    signal.signal(number, signal.SIG_DFL)
    INTERRUPTS.append(number)
    raise KeyboardInterrupt


def _handle_unraisable(unraisable: Any) -> None:
    """End the process after a Ctrl-C in a place such as a destructor, where Python would ignore the exception."""
    if unraisable.exc_type is KeyboardInterrupt:
        signal.raise_signal(signal.SIGINT)
    sys.__unraisablehook__(unraisable)


def import_command(name: str) -> TyperCommand:
    """Import a command; its options are the parameters of its function and --json, and its help is the docstring."""
    from .json_output import JsonCommand, with_json

    word = name.replace("-", "_")
    function = getattr(import_module(f".commands.{word}", __package__), word)
    # join the lines of each paragraph, as typer would keep the docstring's line breaks
    paragraphs = [" ".join(paragraph.split()) for paragraph in cleandoc(function.__doc__).split("\n\n")]
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(name, cls=JsonCommand, help="\n\n".join(paragraphs))(with_json(name, function))
    command = typer.main.get_command(app)
    assert isinstance(command, TyperCommand)
    return command


def print_versions(requested: bool) -> None:
    """Print the versions and exit, if requested. Torch's version is read from its metadata, as importing it is slow."""
    if requested:
        version = import_module(str(__package__).partition(".")[0]).__version__
        torch = metadata.version("torch")
        typer.echo(f"seqmix {version} (torch {torch}, Python {platform.python_version()})")
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_versions, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train, evaluate and benchmark language models whose sequence mixer is a plug-in, from one YAML file."""


def main() -> None:
    """Run the command line; an error of the user's ends it with one sentence and the error's exit status."""
    gc.set_threshold(20_000)  # fewer searches: torch's modules are a million objects without garbage
    columns = os.environ.get("COLUMNS", "")
    if not columns.isdecimal() or int(columns) == 0:  # 0 means unknown, but would print nothing
        os.environ.pop("COLUMNS", None)
    handles_interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a background process may not
    if handles_interrupts:
        # until the command is imported: importing libraries would turn an interrupt into an error of their own
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.unraisablehook = _handle_unraisable
    try:
        with protect_output():
            _run()
    finally:
        if handles_interrupts:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # slow exit handlers would print a traceback


def _run() -> None:
    """Run the command that the arguments name. It always ends with SystemExit, unless an error is a bug."""
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
        if INTERRUPTS:  # a library turned the interrupt into an error of its own
            sys.exit(130)
        if (known := explanation(error)) is None:
            raise
        if sentence := str(known):
            typer.secho(f"error: {visible(sentence, err=True)}", err=True, fg="red")
        sys.exit(known.exit_status)
