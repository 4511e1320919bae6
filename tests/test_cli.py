"""The command: what it does, and that bad input is one sentence and status 2."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from seqmix import MIXERS, load_config
from seqmix.cli import COMMANDS, imported
from seqmix.experiments.study import STUDIES
from seqmix.registry.yaml import parse
from seqmix.training import PRESETS
from seqmix.training.checkpoint import checkpoints

SMALL = (
    "model.d_model=16",
    "model.n_layers=2",
    "data.sequence_length=16",
    "data.paths=[text.txt]",
    "training.steps=4",
    "training.batch_size=4",
    "training.warmup_steps=1",
    "training.checkpoint_every=2",
    "training.final_evaluation_batches=4",
)

PARALLEL_ONLY = '''
from typing import Any, Literal
from pydantic import Field
from seqmix import MixerConfig, Paradigm, SequenceMixer, Traits
from torch import nn


class SlowConfig(MixerConfig):
    kind: Literal["slow"] = "slow"
    paradigm: Paradigm = Field(default=Paradigm.PARALLEL, strict=False)

    @property
    def traits(self):
        return Traits(paradigms=frozenset({Paradigm.PARALLEL}), state="constant", packing=False, shift_invariant=True)

    def build(self, d_model, *, layer_idx, n_layers):
        return Slow(self, d_model)


class Slow(SequenceMixer[Any]):
    """A mixer that remembers nothing."""

    def __init__(self, config, d_model):
        super().__init__(config)
        self.proj = nn.Linear(d_model, d_model, bias=False)

    def reset_parameters(self):
        self.proj.reset_parameters()

    def mix(self, x, call):
        return self.proj(x), self.init_state(len(x))

    def init_state(self, batch_size, *, max_length=None):
        return (self.proj.weight.new_zeros(batch_size),)

    def flops(self, length, paradigm, context=0):
        return 2 * length * self.proj.weight.numel()
'''

BLOCK = "{mixer: {kind: %s}, ffn: null, norm: {kind: layernorm}}"


@pytest.fixture
def run(seqmix) -> Path:
    """A run that is done, in `runs/small`."""
    assert seqmix("train", "retnet-tiny", *SMALL, "--out", "runs/small").status == 0
    return Path("runs/small")


# ---- train


def test_train_writes_a_run(seqmix):
    done = seqmix("train", "retnet-tiny", *SMALL)
    assert (done.status, done.err) == (0, "")
    assert "step 4: validation" in done.out
    assert "seqmix generate runs/retnet-tiny" in done.out
    run = Path("runs/retnet-tiny")
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "sessions.jsonl",
    ]
    assert load_config(run / "config.yaml") == load_config("retnet-tiny", SMALL)
    assert [folder.name for folder in checkpoints(run)] == ["step-000002", "step-000004"]


def test_train_takes_a_file_and_writes_where_it_is_told(seqmix):
    Path("mine.yaml").write_text("extends: retnet-tiny\nmodel: {d_model: 16, n_layers: 1}\nseed: 3\n")
    overrides = [change for change in SMALL if not change.startswith("model.")]
    assert seqmix("train", "mine.yaml", *overrides).status == 0
    assert seqmix("train", "mine.yaml", *overrides, "--out", "elsewhere").status == 0
    for run in ("runs/mine", "elsewhere"):
        config = load_config(Path(run) / "config.yaml")
        assert (config.seed, config.model.n_layers) == (3, 1)


def test_a_run_s_own_configuration_repeats_it(seqmix, run):
    assert seqmix("train", str(run / "config.yaml"), "--out", "again").status == 0
    first, second = (load_file(checkpoints(folder)[-1] / "model.safetensors") for folder in (run, Path("again")))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_dry_run_shows_the_model_and_trains_nothing(seqmix):
    done = seqmix("train", "retnet-tiny", *SMALL, "--dry-run")
    assert (done.status, done.err) == (0, "")
    assert "parameters" in done.out
    assert not Path("runs").exists()
    assert done.out == seqmix("show", "retnet-tiny", *SMALL).out


def test_a_mixer_of_the_folder_is_trained_and_generates(seqmix):
    Path("mine.py").write_text(PARALLEL_ONLY)
    override = f"model.blocks.ret={BLOCK % 'mine:SlowConfig'}"
    assert seqmix("train", "retnet-tiny", *SMALL, override, "--out", "run").status == 0
    assert "mine:SlowConfig" in Path("run/config.yaml").read_text()
    done = seqmix("generate", "run", "--prompt", "a", "--prompt", "the", "--max-new-tokens", "5")
    assert (done.status, done.err) == (0, "")


def test_resume_goes_on_with_a_finished_run(seqmix, run):
    before = (run / "metrics.jsonl").read_text()
    done = seqmix("train", "--resume", str(run))
    assert (done.status, done.err) == (0, "")
    assert "resumed after step 4" in done.out
    assert (run / "metrics.jsonl").read_text() == before


def test_ctrl_c_stops_with_a_checkpoint_and_says_how_to_go_on(seqmix):
    """In a process of its own, for its signal handlers are the process's."""
    program = "from seqmix.cli import main; main()"
    overrides = [*SMALL, "training.steps=1000000", "training.checkpoint_every=1000000", "training.log_every=1"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, "train", "retnet-tiny", *overrides, "training.schedule=constant"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = Path("runs/retnet-tiny/metrics.jsonl")
    try:
        waited = time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < waited, "no step within a minute"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err == ""
    assert "stopped with a checkpoint" in out
    assert "seqmix train --resume runs/retnet-tiny" in out
    (folder,) = checkpoints(Path("runs/retnet-tiny"))
    steps = [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]
    assert int(folder.name.removeprefix("step-")) == steps[-1] == len(steps)

    # the folder is the user's: one who wants fewer steps says so there
    file = Path("runs/retnet-tiny/config.yaml")
    file.write_text(file.read_text().replace("steps: 1000000\n", f"steps: {steps[-1] + 2}\n", 1))
    done = seqmix("train", "--resume", "runs/retnet-tiny")
    assert (done.status, done.err) == (0, "")
    assert f"resumed after step {steps[-1]}" in done.out
    assert checkpoints(Path("runs/retnet-tiny"))[-1].name == f"step-{steps[-1] + 2:06d}"


# ---- generate


def test_generate_continues_the_prompt(seqmix, run):
    done = seqmix("generate", str(run), "--prompt", "the te", "--max-new-tokens", "30")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("the te")
    assert done.out.endswith("\n")
    assert len(done.out) > 7


def test_generated_text_is_a_function_of_the_seed(seqmix, run):
    def text(*options):
        return seqmix("generate", str(run), "--prompt", "the ", "--max-new-tokens", "30", *options).out

    assert text("--seed", "5") == text("--seed", "5")
    assert text("--seed", "5") != text("--seed", "6")
    assert text() == text("--seed", "0")
    assert text("--temperature", "0", "--seed", "1") == text("--temperature", "0", "--seed", "2")
    assert text("--top-k", "1", "--seed", "1") == text("--temperature", "0")


def test_text_is_streamed_piece_by_piece(seqmix, run, monkeypatch):
    pieces = []
    echo = __import__("typer").echo
    monkeypatch.setattr("seqmix.cli.typer.echo", lambda *args, **options: (pieces.append(args), echo(*args, **options)))
    seqmix("generate", str(run), "--prompt", "the ", "--max-new-tokens", "8")
    assert len(pieces) == 8 + 2  # the bytes, what was held back, the end of the line
    assert pieces[0][0].startswith("the ")


def test_bytes_that_are_no_text_are_a_prompt(seqmix, run):
    done = seqmix("generate", str(run), "--prompt", b"a\xff".decode(errors="surrogateescape"), "--max-new-tokens", "3")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("a\ufffd")


def test_several_prompts_are_continued_as_alone(seqmix, run):
    options = ("--temperature", "0", "--max-new-tokens", "12")
    done = seqmix("generate", str(run), "--prompt", "the te", "--prompt", "a", *options)
    alone = [seqmix("generate", str(run), "--prompt", prompt, *options).out for prompt in ("the te", "a")]
    assert re.sub("─+\n", "", done.out) == "".join(alone)


def test_a_stop_text_ends_the_text(seqmix, run):
    whole = seqmix("generate", str(run), "--prompt", "the ", "--max-new-tokens", "40", "--temperature", "0").out
    stop = whole[10:12]
    done = seqmix("generate", str(run), "--prompt", "the ", "--temperature", "0", "--stop", stop)
    assert done.out == "the " + whole.removeprefix("the ").partition(stop)[0] + "\n"


def test_another_checkpoint_may_be_taken(seqmix, run):
    def text(*options):
        done = seqmix("generate", str(run), "--prompt", "the ", "--max-new-tokens", "20", *options)
        assert (done.status, done.err) == (0, "")
        return done.out

    assert text() == text("--checkpoint", "newest") == text("--checkpoint", "4") == text("--checkpoint", "best")


def test_a_damaged_checkpoint_is_named_and_the_one_before_generates(seqmix, run):
    file = checkpoints(run)[-1] / "model.safetensors"
    file.write_bytes(b"")
    done = seqmix("generate", str(run), "--prompt", "the ", "--max-new-tokens", "5")
    assert (done.status, done.err.count("\n")) == (0, 1)
    assert done.err.startswith(f"note: {file} is damaged: it has 0 bytes")
    assert done.out.startswith("the ")


# ---- export


def test_export_writes_one_file_that_generates_the_same(seqmix, run):
    done = seqmix("export", str(run), "--out", "model.safetensors")
    assert (done.status, done.out, done.err) == (0, "model.safetensors has the weights of step 4\n", "")
    texts = [
        seqmix("generate", source, "--prompt", "the ", "--max-new-tokens", "20")
        for source in (run, "model.safetensors")
    ]
    assert texts[0] == texts[1]
    assert texts[0].status == 0


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), ""),
        (MemoryError("Unable to allocate 8 TiB"), " (Unable to allocate 8 TiB)"),
        (RuntimeError("CUDA out of memory.\nmore"), " (CUDA out of memory.)"),
    ],
)
def test_a_lack_of_memory_is_one_sentence_wherever_it_is(refused, monkeypatch, error, reason):
    def load(*args):
        raise error

    monkeypatch.setattr("seqmix.commands.show.load_config", load)
    said = f"memory ran out{reason}: the text, the model or the batch is too large"
    assert refused("show", "retnet-tiny") == said


@pytest.mark.parametrize(
    "command", ["generate --prompt a", "evaluate", "export --out a", "train --resume", "plot", "compare", "check"]
)
def test_a_name_that_no_file_can_have_is_one_sentence(refused, command):
    said = refused(*command.split(), "a" * 300)
    assert re.fullmatch(r"a{300}(/config\.yaml)? cannot be used: File name too long", said)


def test_an_error_that_is_none_of_ours_is_not_hidden(seqmix, monkeypatch):
    def load(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr("seqmix.commands.show.load_config", load)
    with pytest.raises(RuntimeError, match="a bug"):
        seqmix("show", "retnet-tiny")


# ---- show, mixers, schema, help


def test_show_is_a_table_with_a_line_a_run_of_layers(seqmix):
    done = seqmix("show", "hybrid-tiny")
    assert (done.status, done.err) == (0, "")
    assert re.search(r"^ *0-2 +ret +retention ", done.out, re.M)
    assert re.search(r"^ *3 +attn +attention ", done.out, re.M)
    assert re.search(r"^ *all ", done.out, re.M)
    assert re.search(r"[\d,]+ parameters", done.out)


def test_show_fits_eighty_columns(seqmix, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (("show", "hybrid-tiny"), ("show", "transformer-1.3b"), ("mixers",)):
        lines = seqmix(*arguments).out.splitlines()
        assert max(map(len, lines)) <= 80
        assert not any("…" in line for line in lines)


@pytest.mark.parametrize("columns", ["0", "many", "-5"])
def test_columns_that_are_none_are_as_unknown(seqmix, monkeypatch, columns):
    monkeypatch.delenv("COLUMNS")
    whole = seqmix("show", "retnet-tiny").out
    monkeypatch.setenv("COLUMNS", columns)
    assert seqmix("show", "retnet-tiny").out == whole != ""


def test_show_json_is_the_account(seqmix):
    done = seqmix("show", "hybrid-tiny", "--json", "--length", "100")
    cost = json.loads(done.out)
    assert (done.status, done.err) == (0, "")
    assert cost["length"] == 100
    assert [layer["block"] for layer in cost["layers"]] == ["ret", "ret", "ret", "attn"]
    assert cost["parameters"] == cost["body_parameters"] + cost["embedding_parameters"]
    assert cost["parameters"] > sum(layer["parameters"] for layer in cost["layers"])


def test_show_counts_at_the_run_s_own_length_unless_told(seqmix):
    assert json.loads(seqmix("show", "retnet-tiny", "--json").out)["length"] == 256
    assert json.loads(seqmix("show", "retnet-tiny", "data.sequence_length=64", "--json").out)["length"] == 64


def test_mixers_lists_every_kind_and_what_it_declares(seqmix):
    done = seqmix("mixers")
    assert (done.status, done.err) == (0, "")
    for kind in MIXERS.kinds():
        (line,) = (line for line in done.out.splitlines() if line.strip().startswith(f"{kind} "))
        declared = MIXERS.resolve(kind).example().traits.paradigms
        assert {word for word in ("parallel", "recurrent", "chunkwise") if word in line.split()} == declared
    assert re.search("^ *attention .*growing", done.out, re.M)
    assert re.search("^ *retention .*constant", done.out, re.M)


def test_schema_is_json_that_knows_the_kinds_and_the_presets_fit_it(seqmix):
    done = seqmix("schema")
    schema = json.loads(done.out)
    assert (done.status, done.err) == (0, "")
    assert {"extends", "seed", "model", "data", "training", "distributed"} == set(schema["properties"])
    for kind in MIXERS.kinds():
        assert f'"{kind}"' in done.out
    for file in PRESETS.glob("*.yaml"):
        document = parse(file.read_text(), file.name)
        assert document is not None
        assert document.plain().keys() <= schema["properties"].keys()


def test_the_schema_of_a_study_has_the_keys_of_those_that_are_shipped(seqmix):
    done = seqmix("schema", "--study")
    schema = json.loads(done.out)
    assert (done.status, done.err) == (0, "")
    for file in STUDIES.glob("*.yaml"):
        document = parse(file.read_text(), file.name)
        assert document is not None
        assert document.plain().keys() <= schema["properties"].keys()
    assert {"extends", "model", "training", "set", "match"} == set(schema["$defs"]["Entry"]["properties"])


@pytest.mark.parametrize("arguments", [["--help"], [], ["trian"]], ids=str)
def test_help_and_a_wrong_command_import_no_torch(arguments):
    program = "import sys; from seqmix.cli import main\ntry: main()\nfinally: print('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == (0 if arguments == ["--help"] else 2)
    loaded = set(done.stdout.partition("MODULES")[2].split())
    assert "typer" in loaded
    assert not {"torch", "numpy", "yaml", "seqmix.registry"} & loaded
    assert "pydantic" not in loaded or arguments == ["trian"]  # which typer itself has for what is given


def test_a_wrong_command_is_told_the_nearest(seqmix):
    done = seqmix("trian")
    assert done.status == 2
    assert re.search("No such command 'trian'. Did you mean 'train'", done.err)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_line_of_a_command_begins_its_help(command):
    assert imported(command).help.partition("\n")[0] == COMMANDS[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(seqmix, command):
    done = seqmix(command, "--help")
    assert (done.status, done.err) == (0, "")
    assert f"seqmix {command}" in done.out
    assert command in seqmix("--help").out
    assert "[bold]" not in done.out


def test_help_breaks_its_lines_by_the_terminal_alone(seqmix, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = seqmix("train", "--help").out
    assert re.search(r"With no data.paths, .* Ctrl-C stops after the step, with a checkpoint\.", shown)


def test_options_are_documented(seqmix):
    for command, options in {
        "train": ("--out", "--resume", "--dry-run", "CONFIG", "KEY=VALUE"),
        "generate": (
            "--prompt",
            "--max-new-tokens",
            "--temperature",
            "--top-k",
            "--top-p",
            "--seed",
            "--stop",
            "--checkpoint",
        ),
        "export": ("--out", "--checkpoint", "RUN"),
        "check": ("--device", "--paradigm", "--only", "--examples", "--seed", "--d-model", "--compile", "MIXER"),
        "show": ("--length", "--json"),
        "tokenize": ("--out", "--tokenizer", "--train-bpe", "SOURCE", "KEY=VALUE"),
    }.items():
        out = seqmix(command, "--help").out
        for option in options:
            assert option in out


# ---- bad input

RET = "model.blocks.ret"

BAD_CONFIGURATIONS = {
    "unknown preset": (["retnet-tny"], "unknown preset 'retnet-tny'; presets: .*did you mean \"retnet-tiny\""),
    "seed too large": (["retnet-tiny", "seed=4294967296"], "seed: needs a number < 2147483648"),
    "glob that is none": (["retnet-tiny", "data.glob=/etc/*"], "glob is a pattern .* relative to the folder"),
    "missing file": (["no.yaml"], "no file no.yaml"),
    "unknown kind": (
        ["retnet-tiny", f"{RET}.mixer={{kind: retntion, n_heads: 4}}"],
        "unknown mixer kind 'retntion'; allowed: .*did you mean \"retention\"",
    ),
    "typo in a key": (["retnet-tiny", "training.step=3"], "unknown key 'step'; allowed: .*did you mean \"steps\""),
    "wrong type": (["retnet-tiny", "model.n_layers=two"], "model.n_layers: needs an integer, and was given 'two'"),
    "out of range": (["retnet-tiny", "training.steps=0"], "training.steps: needs a number > 0, and was given 0"),
    "unknown block": (["retnet-tiny", "model.pattern=[rat]"], "'rat'.*did you mean \"ret\""),
    "pattern too long": (["retnet-tiny", "model.n_layers=1", "model.pattern=[ret, ret]"], "pattern has 2 layers"),
    "vocabulary too small": (["retnet-tiny", "model.vocab_size=100"], "257 tokens .*model.vocab_size is 100"),
    "heads that do not divide": (["retnet-tiny", f"{RET}.mixer.n_heads=3"], "3 heads do not divide"),
    "heads of odd width": (["retnet-tiny", f"{RET}.mixer.n_heads=128"], "turns pairs"),
    "undeclared paradigm": (
        ["retnet-tiny", f"{RET}={BLOCK % 'mine:SlowConfig, paradigm: chunkwise'}"],
        "slow has no paradigm 'chunkwise'; it declares parallel",
    ),
    "no paradigm": (
        ["retnet-tiny", f"{RET}.mixer.paradigm=paralel"],
        "needs 'parallel', 'recurrent' or 'chunkwise', and was given 'paralel'; did you mean \"parallel\"",
    ),
    "no module": (["retnet-tiny", f"{RET}={BLOCK % 'nothere:Config'}"], "No module named 'nothere'"),
    "no class": (["retnet-tiny", f"{RET}={BLOCK % 'mine:SlwConfig'}"], "mine has no SlwConfig; did you mean"),
    "malformed override": (["retnet-tiny", "training.steps"], "'training.steps' is no change; write dotted.path=value"),
    "override that is no YAML": (["retnet-tiny", "model.pattern=[ret"], "the value '\\[ret' is no YAML"),
    "override through a value": (["retnet-tiny", "seed.x=1"], 'seed: needs an integer, and was given {"x": 1}'),
    "file that is no YAML": (["bad.yaml"], "bad.yaml:\\d: "),
    "file that extends itself": (["circle.yaml"], "files extend each other in a circle"),
}


@pytest.mark.parametrize("command", [("train",), ("train", "--dry-run"), ("show",)], ids=" ".join)
@pytest.mark.parametrize("case", BAD_CONFIGURATIONS)
def test_a_bad_configuration_is_one_sentence(refused, command, case):
    arguments, sentence = BAD_CONFIGURATIONS[case]
    Path("mine.py").write_text(PARALLEL_ONLY)
    Path("bad.yaml").write_text("seed: 1\nmodel: [\n")
    Path("circle.yaml").write_text("extends: circle.yaml\n")
    assert re.search(sentence, refused(*command, *arguments))
    assert not Path("runs").exists()


BAD_CORPORA = {
    "missing": ("data.paths=[nowhere.txt]", "the corpus nowhere.txt does not exist"),
    "empty file": ("data.paths=[empty.txt]", "the corpus is empty: no text in empty.txt"),
    "nothing matches": ('data.glob="*.md"', "the corpus is empty: no text in folder \\(glob \\*.md\\)"),
    "too short": ("data.paths=[short.txt]", "short.txt has \\d+ tokens"),
}


@pytest.mark.parametrize("case", BAD_CORPORA)
def test_a_text_that_cannot_be_used_is_one_sentence(refused, case):
    override, sentence = BAD_CORPORA[case]
    Path("empty.txt").touch()
    Path("short.txt").write_text("short")
    Path("folder").mkdir()
    Path("folder/text.txt").write_text("text " * 100)
    paths = [] if override.startswith("data.paths") else ["data.paths=[folder]"]
    assert re.search(sentence, refused("train", "retnet-tiny", *SMALL, *paths, override))
    assert not Path("runs").exists()


@pytest.mark.parametrize("out", ["/proc/nowhere/run", "text.txt/run"])
def test_a_folder_that_cannot_be_made_is_one_sentence(refused, out):
    assert re.search(f"{out}.*(No such file|Not a directory)", refused("train", "retnet-tiny", *SMALL, "--out", out))


def test_a_folder_that_no_weights_can_be_read_from_is_one_sentence(refused):
    said = refused("train", "retnet-tiny", *SMALL, "--out", "caf\udce9")
    assert said == "a run cannot be written to 'caf\\udce9': a path must be UTF-8"
    assert not Path("caf\udce9").exists()


def test_train_needs_something_to_train(refused):
    assert "train needs a CONFIG" in refused("train")


@pytest.mark.parametrize("extra", [["retnet-tiny"], ["--out", "elsewhere"], ["--dry-run"], ["retnet-tiny", "seed=1"]])
def test_resume_takes_nothing_else(refused, run, extra):
    sentence = refused("train", "--resume", str(run), *extra)
    assert f"--resume goes on with the run's own configuration, {run}/config.yaml, which may be edited" in sentence


@pytest.mark.parametrize(
    ("folder", "sentence"),
    [("nowhere", "^nowhere .*does not exist"), (".", r"^\. .*config.yaml")],
)
@pytest.mark.parametrize("command", [("train", "--resume"), ("generate", "--prompt", "a")], ids=" ".join)
def test_a_folder_that_is_no_run_is_one_sentence(refused, command, folder, sentence):
    assert re.search(sentence, refused(*command, folder))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("bset", "--checkpoint is newest, best or the number of a step, and was given 'bset'; did you mean \"best\"?"),
        ("-1", "--checkpoint is newest, best or the number of a step, and was given '-1'"),
        ("3", "no checkpoint of runs/small is of step 3; there are those of step 2, 4"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_one_sentence(refused, run, given, sentence):
    assert refused("export", str(run), "--out", "out", "--checkpoint", given) == sentence


def test_a_run_is_not_overwritten(refused, run):
    before = (run / "config.yaml").read_bytes(), (run / "metrics.jsonl").read_bytes()
    sentence = refused("train", "retnet-tiny", *SMALL, "seed=1", "--out", str(run))
    assert "runs/small already holds a run" in sentence
    assert "--resume runs/small" in sentence
    assert "--out" in sentence
    assert ((run / "config.yaml").read_bytes(), (run / "metrics.jsonl").read_bytes()) == before


def test_a_folder_of_other_things_is_not_written_to(refused):
    assert "not an empty" in refused("train", "retnet-tiny", *SMALL, "--out", ".")


@pytest.mark.parametrize("command", [("train", "--resume"), ("generate", "--prompt", "a")], ids=" ".join)
def test_a_damaged_checkpoint_is_one_sentence(refused, run, command):
    for folder in checkpoints(run):
        (folder / "model.safetensors").write_bytes(b"not a checkpoint")
    assert "model.safetensors is damaged" in refused(*command, str(run))


@pytest.mark.parametrize("command", [("train", "--resume"), ("generate", "--prompt", "a")], ids=" ".join)
def test_a_foreign_checkpoint_is_one_sentence(refused, run, command):
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("d_model: 16", "d_model: 32"))
    assert "was trained with another model than the configuration beside it describes" in refused(*command, str(run))


def test_a_run_without_a_checkpoint_generates_nothing(refused, run):
    for folder in checkpoints(run):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert refused("generate", str(run), "--prompt", "a") == "runs/small holds no checkpoint"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--prompt", ""], "the prompt is empty: give at least one character"),
        (["--prompt", "a", "--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be 0 \\(greedy\\) or at least 0.001, and is -1"),
        (["--prompt", "a", "--temperature", "nan"], "temperature must be 0 .* and is nan"),
        (["--prompt", "a", "--seed", "99999999999999999999"], "the seed must be from 0 to 2\\^63 - 1"),
        (["--prompt", "a", "--top-p", "0"], "top_p must be above 0 and at most 1, and is 0"),
        (["--prompt", "a", "--top-p", "1.5"], "top_p must be above 0 and at most 1, and is 1.5"),
        (["--prompt", "a", "--top-p", "nan"], "top_p must be above 0 and at most 1, and is nan"),
        (["--prompt", "a", "--top-k", "0"], "top_k must be 1 or more, and is 0"),
    ],
    ids=str,
)
def test_what_cannot_be_generated_is_one_sentence(refused, run, options, sentence):
    assert re.search(sentence, refused("generate", str(run), *options))


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["train", "retnet-tiny", "--dryrun"],
        ["generate"],
        ["generate", "runs/small", "--prompt", "a", "--temperature", "warm"],
        ["show"],
        ["show", "retnet-tiny", "--length", "0"],
        ["mixers", "all"],
        [],
    ],
    ids=" ".join,
)
def test_a_command_that_is_none_is_told_its_usage(seqmix, arguments):
    done = seqmix(*arguments)
    assert done.status == 2
    assert "Usage: seqmix" in done.out + done.err
    assert "Traceback" not in done.err


# ---- plug-ins


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """Install a distribution with one mixer."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(distribution: str, kind: str, value: str) -> None:
        info = tmp_path / f"{distribution}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[seqmix.mixers]\n{kind} = {value}\n")

    return install


def test_a_plug_in_is_a_mixer_like_any_other(seqmix, plug_in):
    Path("plug_a.py").write_text(PARALLEL_ONLY)
    plug_in("plug_a", "slow", "plug_a:SlowConfig")
    out = seqmix("mixers").out
    assert re.search("^ *slow +parallel ", out, re.M)
    assert "slow comes from plug_a" in out
    assert seqmix("train", "retnet-tiny", *SMALL, f"{RET}={BLOCK % 'slow'}", "--out", "run").status == 0
    assert seqmix("generate", "run", "--prompt", "a", "--max-new-tokens", "3").status == 0


def test_a_plug_in_that_cannot_be_imported_is_told_where_it_is_asked_for(refused, plug_in):
    Path("plug_b.py").write_text("import no_such_library")
    plug_in("plug_b", "slow", "plug_b:SlowConfig")
    sentence = refused("show", "retnet-tiny", f"{RET}={BLOCK % 'slow'}")
    assert "mixer kind 'slow' of module plug_b cannot be loaded" in sentence
    assert "No module named 'no_such_library'" in sentence


def test_a_broken_plug_in_is_listed_and_breaks_nothing_else(seqmix, plug_in):
    Path("plug_c.py").write_text("import no_such_library")
    plug_in("plug_c", "slow", "plug_c:SlowConfig")
    done = seqmix("mixers")
    assert done.status == 0
    assert re.search("plug-in slow is broken: .*No module named 'no_such_library'", done.out)
    assert re.search("^ *retention ", done.out, re.M)
    assert seqmix("show", "retnet-tiny").status == 0


def test_two_plug_ins_of_one_name_are_told_both(refused, seqmix, plug_in):
    for name in ("plug_d", "plug_e"):
        Path(f"{name}.py").write_text(PARALLEL_ONLY)
        plug_in(name, "slow", f"{name}:SlowConfig")
    sentence = refused("show", "retnet-tiny", f"{RET}={BLOCK % 'slow'}")
    assert re.search("mixer kind 'slow' is provided by plug_[de] and by plug_[de]", sentence)
    out = seqmix("mixers").out
    assert re.search("plug-in slow is broken: .*plug_[de] and by plug_[de]", out)


# ---- as a program


@pytest.mark.parametrize(
    ("arguments", "status"), [(["show", "retnet-tny"], 2), (["show", "retnet-tiny", "--json"], 0)], ids=str
)
def test_the_installed_command_does_the_same(arguments, status, tmp_path):
    program = Path(sys.executable).with_name("seqmix")
    command = [str(program)] if program.exists() else [sys.executable, "-c", "from seqmix.cli import main; main()"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == status
    if status:
        assert done.stdout == ""
        assert done.stderr.startswith("error: unknown preset 'retnet-tny'")
        assert done.stderr.count("\n") == 1
    else:
        assert done.stderr == ""
        assert json.loads(done.stdout)["parameters"] > 0


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_a_second_ctrl_c_while_the_interpreter_ends_is_quiet():
    # what is registered first is called last, as torch's own
    late = "import atexit, os, signal; atexit.register(os.kill, os.getpid(), signal.SIGINT)"
    command = [sys.executable, "-c", f"{late}; from seqmix.cli import main; main()", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
