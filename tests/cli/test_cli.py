"""The command line: what each command does; bad input gives a one-line error and status 2."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import metrics, wait_for_steps

import seqmix as library
from seqmix import MIXERS, load_config, train
from seqmix.cli import app as cli
from seqmix.cli.app import COMMANDS, import_command
from seqmix.lab.study.study import STUDIES
from seqmix.registry.yaml import parse
from seqmix.training import PRESETS
from seqmix.training.checkpoint.files import checkpoints

SMALL = (
    *("model.d_model=16", "model.n_layers=2", "data.sequence_length=16", "data.paths=[text.txt]", "training.steps=4"),
    *("training.batch_size=4", "training.warmup_steps=1", "training.checkpoint_every=2"),
    "training.final_evaluation_batches=4",
)

PARALLEL_ONLY = """
from dataclasses import replace
from typing import Literal
from seqmix import Paradigm
from seqmix.mixers.retention import RetentionConfig


class SlowConfig(RetentionConfig):
    kind: Literal["slow"] = "slow"
    n_heads: int = 2
    paradigm: Paradigm = Paradigm.PARALLEL

    @property
    def traits(self):
        return replace(super().traits, paradigms=frozenset({Paradigm.PARALLEL}))
"""

BLOCK = "{mixer: {kind: %s}, ffn: null, norm: {kind: layernorm}}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a text and a run of it in `runs/small`."""
    folder = tmp_path_factory.mktemp("trained")
    with contextlib.chdir(folder):
        Path("text.txt").write_text("the text of a small run, over and over again. " * 60)
        list(train(load_config("retnet-tiny", SMALL), "runs/small"))
    return folder


@pytest.fixture
def run(seqmix, trained) -> Path:
    """A finished run, in `runs/small`."""
    shutil.copytree(trained, ".", dirs_exist_ok=True)
    return Path("runs/small")


def test_train_writes_a_run_directory(seqmix):
    done = seqmix("train", "retnet-tiny", *SMALL)
    assert (done.status, done.err) == (0, "")
    assert "step 4: validation" in done.out
    assert "seqmix generate runs/retnet-tiny" in done.out
    run = Path("runs/retnet-tiny")
    names = {path.name for path in run.iterdir()}
    assert names == {"checkpoints", "config.yaml", "metrics.jsonl", "run.lock", "sessions.jsonl", "status.json"}
    assert load_config(run / "config.yaml") == load_config("retnet-tiny", SMALL)
    assert [folder.name for folder in checkpoints(run)] == ["step-000002", "step-000004"]


def test_dry_run_shows_the_model_without_training(seqmix):
    done = seqmix("train", "retnet-tiny", *SMALL, "--dry-run")
    assert (done.status, done.err) == (0, "")
    assert "parameters" in done.out
    assert not Path("runs").exists()
    assert done.out == seqmix("show", "retnet-tiny", *SMALL).out


def test_mixer_from_the_working_directory_trains_and_generates(seqmix):
    Path("mine.py").write_text(PARALLEL_ONLY)
    override = f"model.blocks.ret={BLOCK % 'mine:SlowConfig'}"
    assert seqmix("train", "retnet-tiny", *SMALL, override, "--out", "run").status == 0
    assert "mine:SlowConfig" in Path("run/config.yaml").read_text()
    done = seqmix("generate", "run", "--prompt", "a", "--prompt", "the", "--max-new-tokens", "5")
    assert (done.status, done.err) == (0, "")
    del sys.modules["mine"]  # a process that has not imported it says so before it does
    assert seqmix("generate", "run", "--prompt", "a").err == "note: run imports the module mine\n"


def test_ctrl_c_saves_a_checkpoint_and_the_run_can_resume(seqmix):
    """Runs in a separate process, because the command installs signal handlers."""
    command = [sys.executable, "-c", "from seqmix.cli.app import main; main()", "train", "retnet-tiny", *SMALL]
    command += ["training.steps=1000000", "training.checkpoint_every=1000000", "training.log_every=1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = Path("runs/retnet-tiny")
    try:
        wait_for_steps(run, 4, lambda: process.poll() is None)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err == ""
    assert "seqmix train --resume runs/retnet-tiny" in out
    (folder,) = checkpoints(run)
    steps = [line["step"] for line in metrics(run) if "loss" in line]
    assert int(folder.name.removeprefix("step-")) == steps[-1] == len(steps)


def test_generated_text_is_determined_by_the_seed(seqmix, run):
    def text(*options):
        return seqmix("generate", str(run), "--prompt", "the ", "--max-new-tokens", "30", *options).out

    assert text("--seed", "5") == text("--seed", "5")
    assert text("--seed", "5") != text("--seed", "6")
    assert text() == text("--seed", "0")
    assert text("--temperature", "0", "--seed", "1") == text("--temperature", "0", "--seed", "2")
    for only_the_best in (("--top-k", "1"), ("--top-p", "0.001")):
        assert text(*only_the_best, "--seed", "1") == text("--temperature", "0")


def test_dtype_option_sets_the_weight_dtype_for_generation(seqmix, run, monkeypatch):
    dtypes = []
    monkeypatch.setattr(
        "seqmix.cli.commands.generate.stream_text",
        lambda model, prompts, **_: dtypes.append({p.dtype for p in model.parameters()}) or iter([["x"]]),
    )
    for options in ([], ["--dtype", "bfloat16"]):
        seqmix("generate", str(run), "--prompt", "the ", *options)
    assert dtypes == [{torch.float32}, {torch.bfloat16}]
    refused = seqmix("generate", str(run), "--prompt", "the ", "--dtype", "bf16")
    assert refused.status == 2
    assert refused.err == "error: there is no dtype 'bf16'; did you mean \"bfloat16\"? Dtypes: float32, bfloat16\n"


def test_text_is_streamed_piece_by_piece(seqmix, run, monkeypatch):
    pieces = []
    echo = __import__("typer").echo
    monkeypatch.setattr(
        "seqmix.cli.app.typer.echo", lambda *args, **options: (pieces.append(args), echo(*args, **options))
    )
    seqmix("generate", str(run), "--prompt", "the ", "--max-new-tokens", "8")
    assert len(pieces) == 8 + 2  # the bytes, what was held back, the end of the line
    assert pieces[0][0].startswith("the ")


def test_prompt_with_invalid_utf8_is_accepted(seqmix, run):
    done = seqmix("generate", str(run), "--prompt", b"a\xff".decode(errors="surrogateescape"), "--max-new-tokens", "3")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("a\ufffd")


def test_stop_string_ends_the_generated_text(seqmix, run):
    whole = seqmix("generate", str(run), "--prompt", "the ", "--max-new-tokens", "40", "--temperature", "0").out
    stop = whole[10:12]
    done = seqmix("generate", str(run), "--prompt", "the ", "--temperature", "0", "--stop", stop)
    assert done.out == "the " + whole.removeprefix("the ").partition(stop)[0] + "\n"


def test_damaged_checkpoint_is_reported_and_the_previous_one_is_used(seqmix, run):
    file = checkpoints(run)[-1] / "model.safetensors"
    file.write_bytes(b"")
    done = seqmix("generate", str(run), "--prompt", "the ", "--max-new-tokens", "5")
    assert (done.status, done.err.count("\n")) == (0, 1)
    assert done.err.startswith(f"note: {file} ")
    assert done.out.startswith("the ")


def test_exported_file_and_checkpoint_names_generate_the_same_text(seqmix, run):
    done = seqmix("export", str(run), "--out", "model.safetensors")
    assert (done.status, done.err) == (0, "")
    assert re.search(r"model\.safetensors.* 4\n", done.out)
    sources = [[run], ["model.safetensors"], *([run, "--checkpoint", name] for name in ("newest", "4", "best"))]
    first, *others = [seqmix("generate", *given, "--prompt", "the ", "--max-new-tokens", "20") for given in sources]
    assert (first.status, first.err) == (0, "")
    assert others == [first] * 4


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), ""),
        (MemoryError("Unable to allocate 8 TiB"), "Unable to allocate 8 TiB"),
        (RuntimeError("CUDA out of memory.\nmore"), "CUDA out of memory."),
    ],
)
def test_out_of_memory_reports_one_line_error_and_bugs_propagate(refused, monkeypatch, error, reason):
    def load(*args):
        raise error

    monkeypatch.setattr("seqmix.cli.commands.show.load_config", load)
    assert re.match(rf"out of memory.*{re.escape(reason)}", refused("show", "retnet-tiny", status=5))
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        refused("show", "retnet-tiny")


@pytest.mark.parametrize(
    "command", ["generate --prompt a", "evaluate", "export --out a", "train --resume", "plot", "compare", "check"]
)
def test_overlong_file_name_reports_one_line_error(refused, command):
    assert re.match(r"a{300}.* name too long", refused(*command.split(), "a" * 300, status=3))


def test_show_groups_equal_layers_into_one_row(seqmix):
    done = seqmix("show", "hybrid-tiny")
    assert (done.status, done.err) == (0, "")
    for row in (r"^ *0-2 +ret +retention ", r"^ *3 +attn +attention ", r"^ *all ", r"[\d,]+ parameters"):
        assert re.search(row, done.out, re.M)


def test_show_fits_eighty_columns(seqmix, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (("show", "hybrid-tiny"), ("show", "transformer-1.3b"), ("mixers",)):
        lines = seqmix(*arguments).out.splitlines()
        assert max(map(len, lines)) <= 80
        assert not any("…" in line for line in lines)


@pytest.mark.parametrize("columns", ["0", "many", "-5"])
def test_invalid_columns_variable_is_ignored(seqmix, monkeypatch, columns):
    monkeypatch.delenv("COLUMNS")
    whole = seqmix("show", "retnet-tiny").out
    monkeypatch.setenv("COLUMNS", columns)
    assert seqmix("show", "retnet-tiny").out == whole != ""


def test_show_json_reports_cost_at_the_requested_length(seqmix):
    for arguments, length in (["--length", "100"], 100), ([], 256), (["data.sequence_length=64"], 64):
        done = seqmix("show", "hybrid-tiny", "--json", "-", *arguments)
        cost = json.loads(done.out)
        assert (done.status, cost["command"], cost["length"]) == (0, "show", length)
        assert f"after {length} tokens" in done.err
    assert [layer["block"] for layer in cost["layers"]] == ["ret", "ret", "ret", "attn"]
    assert cost["parameters"] == cost["body_parameters"] + cost["embedding_parameters"]
    assert cost["parameters"] > sum(layer["parameters"] for layer in cost["layers"])


def test_mixers_lists_every_kind_with_its_paradigms(seqmix):
    done = seqmix("mixers")
    assert (done.status, done.err) == (0, "")
    for kind in MIXERS.kinds():
        (line,) = (line for line in done.out.splitlines() if line.strip().startswith(f"{kind} "))
        declared = MIXERS.resolve(kind).example().traits.paradigms
        assert {word for word in ("parallel", "recurrent", "chunkwise") if word in line.split()} == declared
    assert re.search("^ *attention .*growing", done.out, re.M)
    assert re.search("^ *retention .*constant", done.out, re.M)


@pytest.mark.parametrize(("options", "folder"), [((), PRESETS), (("--study",), STUDIES)], ids=["run", "study"])
def test_schema_covers_the_keys_of_shipped_files(seqmix, options, folder):
    done = seqmix("schema", *options)
    schema = json.loads(done.out)
    assert (done.status, done.err) == (0, "")
    for file in folder.glob("*.yaml"):
        document = parse(file.read_text(), file.name)
        assert document is not None
        assert document.plain().keys() <= schema["properties"].keys()
    assert all(f'"{kind}"' in done.out for kind in ([] if options else MIXERS.kinds()))
    if options:
        assert {"extends", "model", "training", "set", "match"} == set(schema["$defs"]["Entry"]["properties"])


def test_version_help_and_unknown_command_do_not_import_torch():
    program = """
import sys
from seqmix.cli.app import main
for arguments in (["--version"], ["--help"], [], ["trian"]):
    sys.argv = ["seqmix", *arguments]
    assert arguments != ["trian"] or "pydantic" not in sys.modules  # which typer itself imports to suggest a name
    try: main()
    except SystemExit as ended: print("STATUS", ended.code or 0)
print("MODULES", *sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert re.findall(r"STATUS (\d)", done.stdout) == ["0", "0", "2", "2"]
    assert "'train'" in done.stderr
    assert not {"torch", "numpy", "yaml", "seqmix.registry"} & set(done.stdout.partition("MODULES")[2].split())


def test_version_shows_seqmix_torch_and_python(seqmix):
    python = ".".join(map(str, sys.version_info[:3]))
    done = seqmix("--version")
    assert (done.status, done.err) == (0, "")
    assert done.out == f"seqmix {library.__version__} (torch {torch.__version__}, Python {python})\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_starts_with_its_summary(seqmix, command):
    done = seqmix(command, "--help")
    assert (done.status, done.err) == (0, "")
    assert f"seqmix {command}" in done.out
    assert "[bold]" not in done.out
    assert import_command(command).help.partition("\n")[0] == COMMANDS[command]


def test_help_paragraph_stays_on_one_line_in_a_wide_terminal(seqmix, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    paragraph = import_command("train").help.split("\n\n")[1]
    assert paragraph in seqmix("train", "--help").out


RET = "model.blocks.ret"


@pytest.mark.parametrize("command", ["train", "show"])
def test_invalid_config_reports_one_line_error(refused, command):
    Path("mine.py").write_text(PARALLEL_ONLY)
    block = BLOCK % "mine:SlowConfig, paradigm: chunkwise"
    assert re.search("slow .*'chunkwise'.* parallel", refused(command, "retnet-tiny", f"{RET}={block}"))
    assert not Path("runs").exists()


@pytest.mark.parametrize("out", ["/proc/nowhere/run", "text.txt/run"])
def test_uncreatable_output_folder_reports_one_line_error(refused, out):
    sentence = refused("train", "retnet-tiny", *SMALL, "--out", out, status=3)
    assert re.search(f"{out}.*(No such file|Not a directory)", sentence)


def test_undecodable_folder_name_reports_one_line_error(refused):
    assert "'caf\\udce9'" in refused("train", "retnet-tiny", *SMALL, "--out", "caf\udce9")
    assert not Path("caf\udce9").exists()


@pytest.mark.parametrize("extra", [["retnet-tiny"], ["--out", "elsewhere"], ["--dry-run"], ["retnet-tiny", "seed=1"]])
def test_resume_rejects_other_arguments(refused, run, extra):
    assert f"{run}/config.yaml" in refused("train", "--resume", str(run), *extra)
    assert re.search("CONFIG .*--resume", refused("train"))


@pytest.mark.parametrize(
    ("given", "words"), [("bset", "'bset'.*\"best\""), ("-1", "'-1'"), ("3", "runs/small .*3.* 2, 4")]
)
def test_unknown_checkpoint_reports_one_line_error(refused, run, given, words):
    status = 3 if given == "3" else 2  # a checkpoint that is missing, or a wrong option
    assert re.search(words, refused("export", str(run), "--out", "out", "--checkpoint", given, status=status))


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "retnet-tiny", "--dryrun"],
        ["generate"],
        ["generate", "runs/small", "--prompt", "a", "--temperature", "warm"],
        ["show", "retnet-tiny", "--length", "0"],
        ["mixers", "all"],
    ],
    ids=" ".join,
)
def test_invalid_command_line_shows_the_usage(seqmix, arguments):
    done = seqmix(*arguments)
    assert done.status == 2
    assert "Usage: seqmix" in done.err
    assert "Traceback" not in done.err


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """Installs a module that offers a kind of mixer."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(module: str, kind: str, text: str) -> None:
        Path(f"{module}.py").write_text(text)
        info = Path(f"{module}-1.0.dist-info")
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[seqmix.mixers]\n{kind} = {module}:SlowConfig\n")

    return install


def test_broken_plug_in_is_reported_without_breaking_other_kinds(seqmix, refused, plug_in):
    plug_in("plug_b", "slow", "import no_such_library")
    done = seqmix("mixers")
    assert done.status == 0
    assert re.search("slow .*No module named 'no_such_library'", done.out)
    assert re.search("^ *retention ", done.out, re.M)
    assert seqmix("show", "retnet-tiny").status == 0
    assert re.search("'slow' .*plug_b .*'no_such_library'", refused("show", "retnet-tiny", f"{RET}={BLOCK % 'slow'}"))


SLOW = """
from typing import Literal
from seqmix.mixers.min_gru import MinGRUConfig

class SlowConfig(MinGRUConfig):
    kind: Literal["{kind}"] = "{kind}"

    @classmethod
    def example(cls):
        {example}
"""


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("slow", "import sys; sys.exit(7)", r"slow .*plug_c .*sys\.exit\(7\)"),
        ("slow", SLOW.format(kind="slow", example="return {}['none']"), "slow .*KeyError: 'none'"),
        (
            "retention",
            SLOW.format(kind="retention", example="return cls(n_heads=2)"),
            r"retention .*mixers\.retention .*plug_c",
        ),
    ],
    ids=["exits", "raises later", "takes a name"],
)
def test_faulty_plug_in_does_not_end_unrelated_commands(seqmix, plug_in, kind, text, reason):
    plug_in("plug_c", kind, text)
    done = seqmix("mixers")
    assert done.status == 0
    assert re.search(f"plug-in {reason}", done.out)
    assert re.search("^ *retention ", done.out, re.M)
    assert seqmix("show", "retnet-tiny").status == 0


def test_installed_command_reports_one_line_error(tmp_path):
    program = Path(sys.executable).with_name("seqmix")
    command = [str(program)] if program.exists() else [sys.executable, "-m", "seqmix"]
    done = subprocess.run([*command, "show", "retnet-tny"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert re.match("error: .*'retnet-tny'", done.stderr)


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_second_ctrl_c_at_exit_is_silent():
    # registered first, so called last, as torch's own handlers
    late = "import atexit, os, signal; atexit.register(os.kill, os.getpid(), signal.SIGINT)"
    # a shell's background jobs ignore SIGINT
    late += "; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{late}; from seqmix.cli.app import main; main()", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_ctrl_c_while_importing_the_command_is_silent():
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'typer':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from seqmix.__main__ import start\n"
        "start()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_ctrl_c_turned_into_another_exception_exits_silently(monkeypatch, capsys):
    class Group:
        def add_command(self, *_, **__):
            pass

        def __call__(self, **_):
            try:
                cli._interrupt(signal.SIGINT, None)
            except KeyboardInterrupt:
                raise ValueError("Error calling function") from None

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(cli, "INTERRUPTS", [])
    monkeypatch.setattr("typer.main.get_group", lambda _: Group())
    try:
        with pytest.raises(SystemExit) as ended:
            cli._run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    assert capsys.readouterr() == ("", "")
