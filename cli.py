"""The `seqmix` command: thin commands over the library, and one sentence for what goes wrong."""

import atexit
import json
import os
import signal
import sys
from dataclasses import asdict
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from .training import Choice, RunConfig

# torch takes seconds to import: every command imports what it needs, so that --help is quick
app = typer.Typer(
    name="seqmix",
    help="Sequence mixers as plug-ins: train a language model from one YAML file, swap its mixer, generate with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Source = Annotated[str, typer.Argument(help="A preset (retnet-tiny) or a YAML file.", metavar="CONFIG")]
Compile = Literal["aot_eager", "inductor", "none"]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes as dotted.path=value, the value in YAML: training.steps=100 "
        'model.blocks.ret.mixer="{kind: attention, n_heads: 4}"',
        metavar="[KEY=VALUE]...",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    str, typer.Option(help="Which one: newest, best (by validation loss), or a step.", metavar="newest|best|STEP")
]


def main() -> None:
    """Run the command line; exit with 2 and one sentence on bad input."""
    from .registry import ElsewhereError, SeqmixError

    # as `python -m` does: a configuration may name classes of modules that lie here (kind: my_mixers:MyConfig)
    sys.path.insert(0, "")
    columns = os.environ.get("COLUMNS", "")
    if not columns.isdecimal() or int(columns) == 0:  # 0 is said where nobody knows, and nothing would be printed
        os.environ.pop("COLUMNS", None)
    try:
        app(prog_name="seqmix")
    except KeyboardInterrupt:
        sys.exit(130)
    except ElsewhereError:
        sys.exit(2)  # another process tells it
    except SeqmixError as error:
        if not _told_beside():
            typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(2)
    except OSError as error:
        # what no command has foreseen of a file that was named: a name too long, a folder that may not be looked into
        if error.filename is None:
            raise
        typer.secho(f"error: {error.filename} cannot be used: {error.strerror}", err=True, fg="red")
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        from .models import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        reason = f" ({str(error).partition(chr(10))[0]})" if str(error) else ""
        typer.secho(f"error: memory ran out{reason}: the text, the model or the batch is too large", err=True, fg="red")
        sys.exit(2)
    finally:
        # first of all, as what was registered last: torch's own ends take a while, and a second Ctrl-C is no news
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)


@app.command()
def train(
    config: Annotated[
        str | None, typer.Argument(help="A preset (retnet-tiny) or a YAML file.", metavar="CONFIG", show_default=False)
    ] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder the run is written to; runs/NAME by default.", show_default=False)
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with a stopped run, exactly where it stopped.", metavar="RUN", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the configuration and show it; train nothing.")
    ] = False,
) -> None:
    """Train a model.

    Writes its configuration, metrics.jsonl and checkpoints to runs/NAME. With no data.paths, it reads the source of
    Python's standard library. Ctrl-C stops after the step, with a checkpoint.

    [bold]seqmix train retnet-tiny[/bold]

    [bold]seqmix train retnet-tiny training.steps=200 --out runs/short[/bold]

    [bold]seqmix train --resume runs/retnet-tiny[/bold]

    [bold]torchrun --nproc-per-node 8 -m seqmix train retnet-1.3b distributed.context_parallel=2[/bold]
    """
    from .registry import SeqmixError
    from .training import load_config, read_config

    if resume is not None:
        changes = [*([] if config is None else [config]), *(overrides or [])]
        if out is not None or dry_run or not all(change.startswith("distributed.") for change in changes):
            raise SeqmixError(
                f"--resume goes on with the run's own configuration, {resume}/config.yaml, which may be edited: give "
                "it no CONFIG, changes or options, except distributed.KEY=VALUE for other processes"
            )
        _train(read_config(resume, changes), resume, resume=True)
        return
    if config is None:
        raise SeqmixError("train needs a CONFIG (a preset such as retnet-tiny, or a YAML file) or --resume RUN")
    loaded = load_config(config, overrides or [])
    if dry_run:
        loaded.data.require_files(loaded.model.vocab_size)
        _show(loaded, None)
        return
    _train(loaded, out or Path("runs") / Path(config).name.removesuffix(".yaml").removesuffix(".yml"))


@app.command()
def generate(
    run: Annotated[
        Path,
        typer.Argument(help="A folder that `seqmix train` wrote, or a file that `seqmix export` wrote.", metavar="RUN"),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="The text to continue; several are read as one batch.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens to generate at most: bytes, by default; 0 with --save-state only reads.", min=0)
    ] = 400,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Only the k most probable tokens.", show_default=False)] = None,
    top_p: Annotated[float, typer.Option(help="Only the most probable tokens that reach this probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The text is a function of it.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text.", show_default=False)] = None,
    checkpoint: Checkpoint = "newest",
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the step of a token: seconds before the first, less time for each. By default where it pays.",
            show_default=False,
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            help="Go on behind the text of this file, with the prompt or without: one text for all prompts, or one for "
            "each.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    save_state: Annotated[
        Path | None,
        typer.Option(
            help="Write there what was read and generated, for --state to go on from.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Continue a text with a trained model.

    The prompt is read at once (chunkwise), then every token costs one recurrent step. The run's
    own copy of its tokenizer turns text into tokens and back.

    [bold]seqmix generate runs/retnet-tiny --prompt "def "[/bold]

    [bold]seqmix generate runs/retnet-tiny --prompt "def " --save-state def.state --max-new-tokens 0[/bold]

    [bold]seqmix generate runs/retnet-tiny --state def.state --prompt "main" --prompt "read"[/bold]
    """
    from .commands.generate import generate_command
    from .models import Sampling

    generate_command(
        run,
        prompt or [],
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
        stop=stop or [],
        choice=_choice(checkpoint),
        compiled=compiled,
        state=state,
        save_state=save_state,
        tell=_tell,
    )


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A folder that `seqmix train` wrote.", metavar="RUN")],
    length: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens of a sequence; may be given several times. By default 1, 2, 4, 8 and 16 times those of "
            "training, as far as the text goes.",
            min=1,
            metavar="TOKENS",
            show_default=False,
        ),
    ] = None,
    paradigm: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure by this one, and then by others; by default by each that all layers declare, and parallel "
            "up to 8,192 tokens.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            help="Measure how the same tokens gain from so much text; may be given several times.",
            min=1,
            metavar="TOKENS",
            show_default=False,
        ),
    ] = None,
    scored: Annotated[
        int | None,
        typer.Option(
            help="Tokens at the end that contexts are about; a quarter of the shortest by default.",
            min=1,
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Tokens that are read at each length, about; a batch at least.", min=1)
    ] = 16384,
    checkpoint: Checkpoint = "newest",
    device: Annotated[str, typer.Option(help="Where: cpu, cuda, ...")] = "cpu",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures.", metavar="FILE", show_default=False)
    ] = None,
) -> None:
    """Measure a trained model at longer texts than it has learned from.

    By length, with the loss by position in the sequence, in every paradigm; or by context: the same tokens behind more
    and less text.

    [bold]seqmix evaluate runs/retnet-tiny[/bold]

    [bold]seqmix evaluate runs/retnet-tiny --context 64 --context 128 --context 256 --scored 32[/bold]
    """
    from .commands.evaluate import evaluate_command

    evaluate_command(
        run,
        lengths=length or [],
        paradigms=paradigm or [],
        contexts=context or [],
        scored=scored,
        tokens=tokens,
        choice=_choice(checkpoint),
        device=device,
        json_file=json_file,
        tell=_tell,
    )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A folder that `seqmix train` wrote.", metavar="RUN")],
    out: Annotated[Path, typer.Option(help="The file, which must not exist.", metavar="FILE", show_default=False)],
    checkpoint: Checkpoint = "newest",
) -> None:
    """Write a trained model to one safetensors file, with its configuration in the metadata.

    [bold]seqmix export runs/retnet-tiny --out retnet-tiny.safetensors --checkpoint best[/bold]

    [bold]seqmix generate retnet-tiny.safetensors --prompt "def "[/bold]
    """
    from .training import export_run

    step = export_run(run, out, choice=_choice(checkpoint), tell=_tell)
    typer.echo(f"{out} has the weights of step {step}")


@app.command()
def tokenize(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Text files, JSON lines and folders, and fields of `data` as key=value: text_field=body "
            'dataset="{path: wikitext, name: wikitext-2-raw-v1}"',
            metavar="[SOURCE]... [KEY=VALUE]...",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The token file that is written: FILE.tokens.", metavar="FILE")],
    tokenizer: Annotated[
        str, typer.Option(help="bytes, or a tokenizer.json; with --train-bpe, the one that is written.")
    ] = "bytes",
    train_bpe: Annotated[
        int | None,
        typer.Option(
            help="Learn this many byte pairs and bytes from the text first, the begin token counted; written beside "
            "FILE as FILE.json, unless --tokenizer says where.",
            metavar="VOCAB",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Tokenize text once, into a file that training maps instead of reading.

    [bold]seqmix tokenize books/ --out books.tokens --train-bpe 8192[/bold]

    [bold]seqmix train retnet-tiny data.paths="\\[books.tokens]" data.tokenizer=books.json model.vocab_size=8192[/bold]
    """
    from .commands.tokenize import tokenize_command

    tokenize_command(sources, out, tokenizer=tokenizer, train_bpe=train_bpe)


@app.command()
def mixers() -> None:
    """List the registered mixers and what they declare."""
    from .commands.show import mixer_table

    mixer_table()


@app.command()
def check(
    source: Annotated[
        str,
        typer.Argument(
            help="A mixer kind (retention), a dotted path (my_mixers:MyConfig), a preset, or a YAML file of a run or "
            "of one mixer.",
            metavar="MIXER",
        ),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Argument(help="Changes as key=value, the value in YAML.", metavar="[KEY=VALUE]...", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="Where it is checked: cpu, cuda, ...")] = "cpu",
    paradigm: Annotated[
        list[str] | None,
        typer.Option(help="Check this paradigm (against the reference); all by default.", show_default=False),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Run this check; all by default.", metavar="CHECK", show_default=False)
    ] = None,
    examples: Annotated[int, typer.Option(help="Cases of the largest check; others take a share.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="The cases are a function of it.")] = 0,
    d_model: Annotated[
        int | None,
        typer.Option(help="Width of the residual stream; small by default.", min=1, max=2**16, show_default=False),
    ] = None,
    compile_with: Annotated[
        Compile, typer.Option("--compile", help="What the checks that compile use; none skips them.")
    ] = "aot_eager",
    shrink: Annotated[
        bool,
        typer.Option("--shrink/--no-shrink", help="Look for the smallest case that fails; slow for slow mixers."),
    ] = True,
) -> None:
    """Prove that a mixer keeps the contract, or show the smallest case in which it does not.

    A kind is checked in all its options, a configuration as it stands. Exits with 1 if a check fails.

    [bold]seqmix check retention[/bold]

    [bold]seqmix check attention window=4 --device cuda[/bold]

    [bold]seqmix check my_mixers:MyConfig --only paradigms_agree --examples 1000[/bold]
    """
    from .commands.check import check_command

    passed = check_command(
        source,
        changes or [],
        device=device,
        paradigms=paradigm or [],
        only=only or [],
        examples=examples,
        seed=seed,
        d_model=d_model,
        compile_backend=None if compile_with == "none" else compile_with,
        shrink=shrink,
    )
    if not passed:
        raise typer.Exit(1)


@app.command()
def bench(
    what: Annotated[
        str,
        typer.Argument(
            help="op (a map over a sequence), train (a training step), decode (a token), prefill (a prompt).",
            metavar="op|train|decode|prefill",
        ),
    ],
    config: Annotated[
        str | None,
        typer.Argument(
            help="A preset or a YAML file: the model; a RetNet of 20M parameters by default.",
            metavar="[CONFIG]",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            "--length",
            "--context",
            help="Tokens of a sequence; for decode, tokens read before. May be given several times.",
            metavar="TOKENS",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where: cpu, cuda, ...")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="float32 or bfloat16; train computes by autocast, with float32 parameters.")
    ] = "float32",
    repeat: Annotated[int, typer.Option(help="Rounds, in each of which all run once; at least 5.")] = 5,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Measure this one; all by default.", metavar="NAME", show_default=False),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Add compiled variants of those that have one.")] = False,
    checkpoint: Annotated[
        bool, typer.Option("--checkpoint", help="train: compute layers anew in backward, for less memory.")
    ] = False,
    tokens: Annotated[int, typer.Option(help="train: tokens of a step at most, in whole sequences.")] = 2048,
    batch: Annotated[int, typer.Option(help="op, decode, prefill: sequences at once.")] = 1,
    limit: Annotated[float, typer.Option(help="Skip what would take longer a call, in seconds.")] = 120.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures.", metavar="FILE", show_default=False)
    ] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", help="Write the table.", metavar="FILE", show_default=False)
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw time and memory: .png, .svg, .pdf.", metavar="FILE", show_default=False),
    ] = None,
) -> None:
    """Measure speed and memory beside what is installed of other implementations.

    All models have as many parameters, run warm, and take turns in one run. Ratios are to the first; shares are of
    what the machine can do at most, measured in the same rounds. What cannot run is shown with its reason.

    [bold]seqmix bench op --length 2048 --length 8192[/bold]

    [bold]seqmix bench train --length 512 --only seqmix --only llama[/bold]

    [bold]seqmix bench decode hybrid-tiny --context 1024 --json decode.json[/bold]
    """
    from .commands.bench import bench_command

    bench_command(
        what,
        config,
        overrides or [],
        lengths=length or [],
        device=device,
        dtype=dtype,
        repeat=repeat,
        only=only or [],
        compiled=compiled,
        checkpoint=checkpoint,
        tokens=tokens,
        batch=batch,
        limit=limit,
        json_file=json_file,
        markdown_file=markdown_file,
        plot_file=plot_file,
    )


@app.command()
def compare(
    study: Annotated[
        str | None,
        typer.Argument(help="A study's YAML file, or the name of one of --list.", metavar="STUDY", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The study's folder; studies/NAME by default.", show_default=False)
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at once; one a core or GPU by default.", min=1, show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the study and show it; train nothing.")] = False,
    list_all: Annotated[bool, typer.Option("--list", help="List the studies that come with the package.")] = False,
) -> None:
    """Train several models alike and compare them.

    Every run is an ordinary one in the study's folder, and so are results.json, tables and a report. Called again, it
    goes on where it was stopped. Exits with 1 if runs failed.

    [bold]seqmix compare recall[/bold]

    [bold]seqmix compare study.yaml --dry-run[/bold]
    """
    from .registry import SeqmixError

    if list_all:
        from .commands.compare import list_studies
        from .commands.console import terminal

        list_studies(terminal())
        return
    if study is None:
        raise SeqmixError("compare needs a STUDY: a YAML file, or the name of a study that --list shows")
    from .commands.compare import compare_command

    if status := compare_command(study, out=out, jobs=jobs, dry_run=dry_run):
        raise typer.Exit(status)


@app.command()
def plot(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders that `seqmix train` wrote, drawn over each other.", metavar="RUN...")
    ],
    out: Annotated[
        Path, typer.Option(help="What is written: a page, .html; or a drawing, .svg or .png.", metavar="FILE")
    ] = Path("plot.html"),
) -> None:
    """Draw what runs have measured: loss over tokens and time, learning rate, gradient norm, throughput, memory.

    Works while they train, too.

    [bold]seqmix plot runs/retnet-tiny[/bold]

    [bold]seqmix plot runs/retnet-tiny runs/attention-tiny --out both.svg[/bold]
    """
    from .commands.plot import plot_runs

    typer.echo(f"{plot_runs(runs, out)} is drawn")


@app.command()
def show(
    config: Source,
    overrides: Overrides = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a sequence; data.sequence_length by default.", min=1, max=2**31, show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a model costs, by layer, without allocating it: parameters, operations, state, activations."""
    from .training import load_config

    _show(load_config(config, overrides or []), length, as_json=as_json)


@app.command()
def schema(
    study: Annotated[bool, typer.Option("--study", help="That of a study, which `compare` reads.")] = False,
) -> None:
    """Print the JSON schema of a configuration, for editors that complete YAML."""
    from .experiments.study import Study
    from .registry import json_schema
    from .training import RunConfig

    typer.echo(json.dumps(json_schema(Study if study else RunConfig), indent=2))


def _told_beside() -> bool:
    """Whether another process of this machine meets the same error: what is wrong before processes have joined."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return False
    import torch.distributed as dist

    return not dist.is_initialized()


def _choice(checkpoint: str) -> "Choice":
    from .registry import SeqmixError, nearest

    if checkpoint == "newest" or checkpoint == "best":
        return checkpoint
    if checkpoint.isascii() and checkpoint.isdigit():
        return int(checkpoint)
    raise SeqmixError(
        f"--checkpoint is newest, best or the number of a step, and was given {checkpoint!r}"
        f"{nearest(checkpoint, ('newest', 'best'))}"
    )


def _tell(note: str) -> None:
    typer.secho(f"note: {note}", err=True, fg="yellow")


def _train(config: "RunConfig", run: Path, *, resume: bool = False) -> None:
    from .commands.progress import run_with_progress
    from .training.memory import keep_freed_memory

    keep_freed_memory()
    if not run_with_progress(config, run, resume=resume):
        raise typer.Exit(130)  # what a shell reports of an interrupted command: `train && generate` must not go on


def _show(config: "RunConfig", length: int | None, *, as_json: bool = False) -> None:
    from .commands.show import cost_table
    from .models import account

    cost = account(config.model, length=length or config.data.sequence_length)
    if as_json:
        typer.echo(json.dumps(asdict(cost) | {"body_parameters": cost.body_parameters}, indent=2))
    else:
        cost_table(config, cost)


for command in app.registered_commands:
    # the terminal breaks lines: typer would break them where a docstring does, too
    paragraphs = cleandoc((command.callback and command.callback.__doc__) or "").split("\n\n")
    command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
