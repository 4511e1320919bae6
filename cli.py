"""The `seqmix` command: a table of commands, each imported when it is called, and one sentence for what goes wrong."""

import atexit
import os
import signal
import sys
from importlib import import_module
from inspect import cleandoc
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

COMMANDS = {
    "train": "Train a model.",
    "generate": "Continue a text with a trained model.",
    "evaluate": "Measure a trained model at longer texts than it has learned from.",
    "export": "Write a trained model to one safetensors file, with its configuration in the metadata.",
    "tokenize": "Tokenize text once, into a file that training maps instead of reading.",
    "mixers": "List the registered mixers and what they declare.",
    "check": "Test that a mixer or a kernel keeps the contract, or show the smallest case in which it does not.",
    "bench": "Measure speed and memory beside what is installed of other implementations.",
    "bench-gpu": "Measure all that a GPU is needed for: kernels, conformance, benchmarks, the paper's comparisons.",
    "compare": "Train several models under identical conditions and compare them.",
    "paper": "Measure claims of the RetNet paper, each by its name.",
    "plot": "Draw what runs have measured: loss, learning rate, gradient norm, throughput, memory.",
    "show": "Show what a model costs, by layer, without allocating it: parameters, operations, state, activations.",
    "schema": "Print the JSON schema of a configuration, for editors that complete YAML.",
}
"""Each is a function in a file of its name in commands/, which has its options; the line here begins its docstring."""


class LazyGroup(TyperGroup):
    """The commands: their names and lines are known, and the one that is called is imported. torch takes seconds."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # click's types have moved between versions
        """The command that a command line names, with its options."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, imported(str(name)), rest


def imported(name: str) -> TyperCommand:
    """A command with the options of its function, whose docstring is the help."""
    word = name.replace("-", "_")
    function = getattr(import_module(f".commands.{word}", __package__), word)
    # the terminal breaks lines: typer would break them where a docstring does, too
    paragraphs = [" ".join(paragraph.split()) for paragraph in cleandoc(function.__doc__).split("\n\n")]
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(name, help="\n\n".join(paragraphs))(function)
    command = typer.main.get_command(app)
    assert isinstance(command, TyperCommand)
    return command


def main() -> None:
    """Run the command line; exit with 2 and one sentence on bad input."""
    # as `python -m` does: a configuration may name classes of modules that lie here (kind: my_mixers:MyConfig)
    sys.path.insert(0, "")
    columns = os.environ.get("COLUMNS", "")
    if not columns.isdecimal() or int(columns) == 0:  # 0 is said where nobody knows, and nothing would be printed
        os.environ.pop("COLUMNS", None)
    commands = LazyGroup(
        name="seqmix",
        help="Sequence mixers as plug-ins: train a language model from one YAML file, swap its mixer, generate.",
        commands={name: TyperCommand(name, help=line) for name, line in COMMANDS.items()},
        no_args_is_help=True,
        rich_markup_mode="rich",
    )
    try:
        commands(prog_name="seqmix")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if (sentence := explanation(error)) is None:
            raise
        if sentence:
            typer.secho(f"error: {sentence}", err=True, fg="red")
        sys.exit(2)
    finally:
        # first of all, as what was registered last: torch's own ends take a while, and a second Ctrl-C is no news
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)


def explanation(error: Exception) -> str | None:
    """One sentence for the user; nothing where another process says it; None for an error that is a bug."""
    from .registry import ElsewhereError, SeqmixError

    match error:
        case SeqmixError():
            return "" if isinstance(error, ElsewhereError) or _said_by_another_process() else str(error)
        case OSError(filename=str() | bytes() | int()):
            # what no command has foreseen of a file that was named: a name too long, a folder without permission
            return f"{error.filename} cannot be used: {error.strerror}"
        case MemoryError() | RuntimeError():
            from .models import is_out_of_memory

            if is_out_of_memory(error):
                reason = f" ({str(error).partition(chr(10))[0]})" if str(error) else ""
                return f"memory ran out{reason}: the text, the model or the batch is too large"
    return None


def _said_by_another_process() -> bool:
    """Whether another process of this machine meets the same error: what is wrong before processes have joined."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return False
    import torch.distributed as dist

    return not dist.is_initialized()
