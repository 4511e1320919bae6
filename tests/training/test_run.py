"""The training loop: the same seed gives the same run, no matter how often it is stopped."""

import json
import math
import re
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from small_runs import DROPOUT, checkpoint_bytes, contents, metrics, refusal, require_same_run, run_of, stopped

import seqmix
from seqmix import RunConfig, SeqmixError, account, build_model, load_run, train
from seqmix.data import TextConfig
from seqmix.training import TrainingError, read_config
from seqmix.training.checkpoint.files import checkpoints, read_manifest, step_of
from seqmix.training.monitoring.events import Evaluated, Noted, Saved, Started, Stepped, StoppedEarly
from seqmix.training.monitoring.metrics import Measured
from seqmix.training.optimizer import build_optimizer
from seqmix.training.run import TrainingLoop
from seqmix.training.trainer import Trainer


def of(kind: type, events: list) -> list:
    return [event for event in events if isinstance(event, kind)]


def steps(kind: type, events: list) -> list[int]:
    return [event.step for event in of(kind, events)]


def test_run_yields_the_expected_events_and_metrics(config_of, tmp_path, monkeypatch):
    # a clock that ticks once a reading: a step is one tick long, whatever else happens between steps
    ticks = iter(range(10**6))
    monkeypatch.setattr("seqmix.training.run.time.perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr("seqmix.training.run.peak_flops", lambda device, precision: 1e9)
    config, generator = config_of("training.log_every=2", *DROPOUT), torch.get_rng_state()
    first, *events = run_of(config, tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), generator)  # the global one
    assert isinstance(first, Started)
    assert (first.step, first.device.type, first.precision) == (0, "cpu", torch.float32)
    assert first.parameters == sum(p.numel() for p in build_model(config.model).parameters())
    assert [type(event) for event in events] == [Stepped, Stepped, Evaluated, Saved] * 3
    assert [event.step for event in events] == [1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6, 6]
    assert [event.final for event in of(Evaluated, events)] == [False, False, True]
    flops = 3 * account(config.model, length=16).flops_per_token
    for event in of(Stepped, events):
        assert event.tokens_per_second == 4 * 16.0
        assert event.mfu == pytest.approx(flops * event.tokens_per_second / 1e9)
        assert event.memory_bytes > 2**20
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[::2] == [asdict(event) for event in of(Stepped, events) if event.step % 2 == 0]
    evaluated = [
        {"step": e.step, "validation_loss": e.loss, "validation_tokens": e.tokens, "final": e.final}
        for e in of(Evaluated, events)
    ]
    assert lines[1::2] == evaluated
    assert read_config(tmp_path / "run") == config


def test_run_learns_and_its_model_can_be_loaded(config_of, tmp_path):
    # whose last step is logged, evaluated and saved wherever it falls
    every = (f"training.{name}=40" for name in ("log_every", "evaluate_every", "checkpoint_every"))
    config = config_of("training.steps=60", "training.learning_rate=1.0e-2", *every)
    events = run_of(config, tmp_path / "run")
    assert steps(Evaluated, events) == steps(Saved, events) == [40, 60]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [40, 40, 60, 60]
    losses = [event.loss for event in of(Stepped, events)]
    assert losses[0] > 5
    assert losses[-1] < 3
    assert of(Evaluated, events)[-1].loss < 3
    model = load_run(str(tmp_path / "run"))
    assert (model.training, model.config) == (False, config.model)
    weights = load_file(checkpoints(tmp_path / "run")[-1] / "model.safetensors")
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


def test_same_seed_reproduces_the_run(config_of, tmp_path, whole):
    torch.manual_seed(99)
    run_of(config_of(*DROPOUT), tmp_path / "run")
    require_same_run(tmp_path / "run", whole(config_of(*DROPOUT)))
    assert metrics(tmp_path / "run") != metrics(whole(config_of(*DROPOUT, "seed=1")))


CARRY = ("training.carry_state=true", "training.evaluate_every=100", "training.keep_best=false")
HYBRID = ("model.n_layers=4", "model.pattern=[ret, attn]", "model.blocks.attn.mixer.window=8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("hybrid-tiny", HYBRID),
        ("hybrid-tiny", (*HYBRID, *CARRY, "training.grad_accum_steps=2")),
        ("retnet-tiny", CARRY),
    ],
    ids=["hybrid", "hybrid carried", "carried"],
)
def test_repeatedly_stopped_run_matches_the_uninterrupted_one(config_of, tmp_path, whole, preset, changes):
    config, run = config_of(*DROPOUT, *changes, preset=preset), tmp_path / "run"
    for step in (1, 2, 3, 5, 6):
        stopped(config, run, step, Stepped if step % 2 or CARRY[0] in changes else Evaluated, resume=step > 1)
    require_same_run(run, whole(config))
    carried = any(name.startswith("state.safetensors") for name in checkpoint_bytes(run))
    assert carried == (CARRY[0] in changes)


TORN = ("", '{"step": 5, "lo', "not one of ours\n", "[5]\n", '{"loss": 1}\n', "\0\0\n")


@pytest.mark.parametrize(("at", "resumed", "torn"), [(1, 0, ""), *((5, 4, torn) for torn in TORN)])
def test_abandoned_run_continues_from_its_last_checkpoint(config_of, tmp_path, whole, at, resumed, torn):
    config = config_of(*DROPOUT)
    for event in train(config, tmp_path / "run"):
        if isinstance(event, Stepped) and event.step == at:
            break
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(torn)
    started, *_ = run_of(config, tmp_path / "run", resume=True)
    assert started.step == resumed
    require_same_run(tmp_path / "run", whole(config))


def test_resuming_a_finished_run_changes_nothing(config_of, tmp_path):
    events = stopped(config_of(), tmp_path / "run", 6, Evaluated)
    assert steps(Saved, events) == [2, 4, 6]  # a stop at the last step saves once
    before = metrics(tmp_path / "run"), checkpoint_bytes(tmp_path / "run")
    (event,) = run_of(config_of(), tmp_path / "run", resume=True)
    assert event.step == 6
    assert (metrics(tmp_path / "run"), checkpoint_bytes(tmp_path / "run")) == before


@pytest.mark.parametrize("what", ["a run", "a folder", "a file"])
def test_existing_files_at_the_run_path_are_left_alone(config_of, tmp_path, what):
    run = tmp_path / "run"
    if what == "a run":
        run_of(config_of("training.steps=2"), run)
    elif what == "a folder":
        run.mkdir()
        (run / "notes.txt").write_text("mine")
    else:
        run.write_text("mine")
    before = contents(tmp_path)
    message = refusal(lambda: run_of(config_of("seed=1"), run))
    assert str(run) in message
    assert (f"--resume {run}" in message) == (what == "a run")
    assert contents(tmp_path) == before


def test_run_folder_created_meanwhile_is_not_overwritten(config_of, tmp_path, monkeypatch):
    opened = TextConfig.open

    def slow(data, vocab_size, run):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text("the other's")
        return opened(data, vocab_size, run)

    monkeypatch.setattr(TextConfig, "open", slow)
    assert "already holds a run" in refusal(lambda: run_of(config_of(), tmp_path / "run"))
    assert contents(tmp_path / "run") == {"config.yaml": b"the other's"}


def test_run_cannot_be_trained_twice_at_once(config_of, tmp_path):
    run = tmp_path / "run"
    run.mkdir()  # an empty folder may be there
    first = train(config_of(), run)
    assert [next(first).step for _ in range(5)][-1] == 2
    edited = run / "config.yaml.new"  # as an editor does it: another file under the old name
    edited.write_bytes((run / "config.yaml").read_bytes())
    edited.replace(run / "config.yaml")
    (run / "run.lock").unlink()
    before = {file.name: file.read_bytes() for file in run.glob("*.*")} | {"run.lock": b""}
    assert str(run) in refusal(lambda: run_of(config_of(), run, resume=True), TrainingError)
    assert {file.name: file.read_bytes() for file in run.glob("*.*")} == before
    first.close()
    started, *_ = run_of(config_of(), run, resume=True)
    assert started.step == 2


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.paths=[nowhere]", "nowhere"),
        ("model.blocks.ret.mixer.n_heads=3", "n_heads"),
        ("training.evaluation_lengths=[16, 3000]", "training.evaluation_lengths.*3001"),
        ("training={carry_state: true, batch_size: 200, steps: 1, warmup_steps: 0}", "200 .*3216.*2701"),
    ],
)
def test_run_that_cannot_start_leaves_no_folder(config_of, tmp_path, override, named):
    assert re.search(named, refusal(lambda: run_of(config_of(override), tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "preset", "named"),
    [
        ("model.n_layers=4", "hybrid-tiny", r"model\.blocks\.attn\.mixer \(attention\)"),
        ("data.packing=true", "retnet-tiny", r"data\.packing"),
        ("data.order=epochs", "retnet-tiny", r"data\.order"),
    ],
)
def test_carry_state_with_incompatible_settings_is_refused(config_of, change, preset, named):
    with pytest.raises(SeqmixError, match=named):
        config_of("training.carry_state=true", change, preset=preset)


@pytest.mark.parametrize(("every", "evaluated", "seen"), [(1, 100, 4), (1, 1, 4), (3, 100, 5), (100, 100, 5)])
def test_nonfinite_loss_stops_the_run(config_of, tmp_path, monkeypatch, every, evaluated, seen):
    # the fourth step ruins the parameters
    monkeypatch.setattr("seqmix.training.trainer.learning_rate", lambda step, config: 1e30 if step == 3 else 1e-3)
    config = config_of(
        f"training.evaluate_every={evaluated}", "training.keep_checkpoints=9", f"training.checkpoint_every={every}"
    )
    message = refusal(lambda: run_of(config, tmp_path / "run"), TrainingError)
    assert re.match(rf"step {seen}: the (validation )?loss.* (nan|inf), .*output of .*training\.learning_rate", message)
    written = checkpoints(tmp_path / "run")
    assert not written or message.endswith(str(written[-1]))
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4]
    # what it ruined was not saved
    assert len(written) == 3 // every
    for folder in written:
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())


def test_nan_parameters_are_not_saved_even_if_evaluation_misses_them(config_of, tmp_path, monkeypatch):
    evaluate = Trainer.evaluate

    def unread(trainer, **options):
        found = evaluate(trainer, **options)
        next(trainer.model.parameters()).data.fill_(math.nan)
        return found

    monkeypatch.setattr(Trainer, "evaluate", unread)
    config = config_of("training.evaluate_every=2", "training.checkpoint_every=2")
    message = refusal(lambda: run_of(config, tmp_path / "run"), TrainingError)
    assert message.startswith("step 2: the loss after the update is nan")
    assert not checkpoints(tmp_path / "run")


def test_nonfinite_validation_loss_stops_the_run(config_of, tmp_path):
    config = config_of()
    model = build_model(config.model)
    trainer = Trainer(config, config.open_data(), model, build_optimizer(model, config.training))
    model.norm.register_forward_hook(lambda norm, args, out: out if model.training else out * math.nan)
    with pytest.raises(TrainingError, match=r"^step 2: .*validation.* nan"):
        list(TrainingLoop(trainer, tmp_path).steps(0, lambda: False))
    assert not checkpoints(tmp_path)


def test_additional_lengths_are_evaluated(config_of, tmp_path, whole):
    final = "training.final_evaluation_batches=3"
    events = run_of(config_of("training.evaluation_lengths=[8, 64]", final), tmp_path / "run")
    evaluated = of(Evaluated, events)
    assert all(list(event.by_length) == [8, 64] for event in evaluated)
    assert all(len({event.loss, *event.by_length.values()}) == 3 for event in evaluated)
    lines = [line for line in metrics(tmp_path / "run") if "final" in line]
    expected = [{str(length): loss for length, loss in event.by_length.items()} for event in evaluated]
    assert [line.pop("validation_loss_by_length") for line in lines] == expected
    # and it changes nothing else
    assert lines == [line for line in metrics(whole(config_of(final))) if "final" in line]
    assert checkpoint_bytes(tmp_path / "run") == checkpoint_bytes(whole(config_of(final)))


@pytest.fixture
def losses_are(monkeypatch):
    """Make evaluations return these losses, one after another, and the final one 9."""

    def give(*losses: float) -> None:
        rest = iter(losses)
        monkeypatch.setattr(
            Trainer, "evaluate", lambda self, *, final, length=None: Measured(9.0 if final else next(rest), 1)
        )

    return give


EARLY = ("training.patience=2", "training.evaluate_every=1", "training.checkpoint_every=100", "training.steps=9")


def test_run_without_improvement_stops_early(config_of, tmp_path, losses_are):
    losses_are(4, 3, 3.5, 2, 2, 2.5)
    events = run_of(config_of(*EARLY), tmp_path / "run")
    assert events[-1] == StoppedEarly(6, best_step=4, best_loss=2)
    assert [(event.step, event.loss) for event in of(Evaluated, events) if event.final] == [(6, 9.0)]
    # its last step and its best one are there
    assert [step_of(folder) for folder in checkpoints(tmp_path / "run")] == [4, 6]
    # and it does not continue
    losses_are()
    started, end = run_of(config_of(*EARLY), tmp_path / "run", resume=True)
    assert (started.step, end) == (6, events[-1])
    # patience outlasts a stop
    losses_are(4, 3, 3.5)
    stopped(config_of(*EARLY), tmp_path / "other", 3, Stepped)
    losses_are(3.5)
    assert run_of(config_of(*EARLY), tmp_path / "other", resume=True)[-1] == StoppedEarly(4, 2, 3)


def notes(config: RunConfig, run) -> list[str]:
    """What is noted where a run is resumed."""
    return [event.text for event in of(Noted, run_of(config, run, resume=True))]


def test_resumed_run_notes_a_changed_thread_count(config_of, tmp_path):
    stopped(config_of(), tmp_path / "run", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        (note,) = notes(config_of(), tmp_path / "run")
    finally:
        torch.set_num_threads(threads)
    assert re.search(rf"threads {threads} .*{threads + 1}", note)
    sessions = [json.loads(line) for line in (tmp_path / "run" / "sessions.jsonl").read_text().splitlines()]
    assert [(session["step"], session["threads"]) for session in sessions] == [(0, threads), (1, threads + 1)]
    for session in sessions:
        assert (session["seed"], session["device"], session["precision"]) == (0, "cpu", "float32")
        assert (session["seqmix"], session["torch"]) == (seqmix.__version__, torch.__version__)
        assert all(session[name] for name in ("time", "python", "processor", "cores", "system"))


def test_resume_skips_and_names_a_damaged_checkpoint(config_of, tmp_path, whole):
    config, run = config_of(*DROPOUT), tmp_path / "run"
    run_of(config_of(*DROPOUT, "training.keep_checkpoints=3"), run)
    damaged = checkpoints(run)[-1] / "optimizer.safetensors"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    started, note, *_ = run_of(config, run, resume=True)
    assert (started.step, note.step) == (4, 4)
    assert note.text.startswith(f"{damaged} is damaged")
    require_same_run(run, whole(config))


def test_resume_notes_execution_changes_but_refuses_other_mixer_changes(config_of, tmp_path):
    run, mixer = tmp_path / "run", "model.blocks.ret.mixer"
    stopped(config_of(), run, 1)
    other = config_of(f"{mixer}.gate=none", f"{mixer}.chunk_size=32")
    assert "paradigm, chunk_size, backend" in refusal(lambda: run_of(other, run, resume=True))
    file = run / "config.yaml"
    text = file.read_text().replace("chunk_size: 64", "chunk_size: 32")
    file.write_text(text.replace("paradigm: chunkwise", "paradigm: parallel"))
    (note,) = notes(read_config(run), run)
    assert re.search(rf"{mixer}\.paradigm chunkwise .*parallel.*{mixer}\.chunk_size 64 .*32", note)
    assert load_run(run).blocks[0].mixer.config.chunk_size == 32


@pytest.mark.parametrize("change", ["longer", "as long", "the same again", "split otherwise", "of an older version"])
def test_resume_notes_a_changed_text(config_of, tmp_path, text, change):
    stopped(config_of(), tmp_path / "run", 1)
    content, changes = text.read_text(), ()
    if change == "as long":
        text.write_text(content[:1000] + "?" + content[1001:])
    elif change == "split otherwise":
        changes = ("data.validation_fraction=0.2",)
    elif change == "the same again":
        text.write_text(content)
    else:
        text.write_text(content + " and more")
    if change == "of an older version":  # whose manifests do not name the text
        folder = checkpoints(tmp_path / "run")[-1]
        manifest = read_manifest(folder).model_copy(update={"data": None})
        sealed = manifest.model_copy(update={"sha256": manifest.checksum})
        (folder / "manifest.json").write_text(sealed.model_dump_json(exclude={"data"}))
    found = notes(config_of(*changes), tmp_path / "run")
    assert len(found) == (change not in ("the same again", "of an older version"))
    assert all(str(text) in note for note in found)
