"""The steps of a linearization: load the teacher, build the student, train it in stages, compare the two.

DIR/plan.yaml           the plan, and the path of the source
DIR/teacher/            the source as a run directory, if it is another library's model
DIR/stages/0-transfer/  the student before the first stage; prepared.json records what it took over from the teacher
DIR/stages/N-NAME/      the run directory of each stage, which resumes where it stopped
DIR/                    the result, a run directory; linearize.json and linearize.md have the comparison
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ...data import Source
from ...interop.convert import import_from
from ...mixers import MixerConfig
from ...models import TOKENIZER_FILE, LanguageModel, build_model
from ...registry import Config, SeqmixError, dump, is_vacant, write_file
from ...training import RunConfig, load_run, read_config, train
from ...training.checkpoint.files import checkpoints, step_of
from ...training.checkpoint.run_dir import CONFIG_FILE
from ...training.checkpoint.saved_run import add_run, write_run
from ...training.checkpoint.train_state import parameters_of
from ...training.distributed.process_groups import require_alone
from ...training.monitoring.events import Event
from ...training.monitoring.metrics_file import METRICS_FILE
from .measure import Decoding, Measurement, gap_closed, measure, time_decoding
from .objectives import OBJECTIVES
from .plan import Plan, StageName, mixers_of, run_config, student_of
from .transfer import calibrate, initial_parameters, transfer

PLAN_FILE = "plan.yaml"
PREPARED_FILE = "prepared.json"
RESULT_FILE = "linearize.json"
TABLE_FILE = "linearize.md"
MARK = "# of "
"""Prefix of the first line of a plan file written by this module; the path of the source follows."""


class LayerTransfer(Config):
    """Record of the parameters that a swapped layer's new mixer took over from its old one."""

    layer: int
    """Index of the layer, from 0."""
    old: str
    """Kind of the old mixer."""
    new: str
    """Kind of the new mixer."""
    done: tuple[str, ...]
    """Descriptions of what was copied or fitted, such as "q copied"."""
    initial: tuple[str, ...]
    """Names of the new mixer's parameters that keep their random initialisation, in part or as a whole."""


class Prepared(Config):
    """Record of a student before its first training stage: what was swapped, kept and transferred."""

    taken: tuple[LayerTransfer, ...]
    """Transfers from old to new mixers, one per swapped layer."""
    costs: dict[str, float]
    """Increase of the teacher's loss, in nats per token, if one layer alone is swapped, by the layer's index; empty
    unless the plan has `keep`."""
    kept: tuple[int, ...]
    """Indices of the layers that keep their mixer because of the plan's `keep`."""
    teacher: Measurement
    """Quality of the teacher."""
    start: Measurement
    """Quality of the student with random new mixers; its loss is CE0 in `gap_closed`."""
    transferred: Measurement
    """Quality of the student after transfer and calibration."""


class Result(Config):
    """Comparison of a student with its teacher."""

    source: str
    """Path of the teacher's run directory."""
    prepared: Prepared
    """Record of the student before its first training stage."""
    tokens: int
    """Number of tokens that the student was trained on, in all stages together."""
    stages: dict[str, float]
    """Validation loss in nats per token after each stage, by the name of the stage."""
    student: Measurement
    """Quality of the student after the last stage."""
    gap_closed: float | None
    """Share of the loss gap to the teacher that training has closed: (CE0 - CE) / (CE0 - CE_teacher), where CE0 is the
    loss of the student with random new mixers; None if no layer was swapped."""
    decoding: dict[str, Decoding]
    """Decoding cost of the `teacher` and of the `student`."""


class Linearization:
    """A linearization: a source model, a plan and the directory of the result.

    If the directory has an earlier linearization of the same source and plan, it is resumed.

    Args:
        source: a run directory, or a model that `seqmix convert` can read.
        plan: the plan, as from `load_plan`.
        out: directory of the result.
        device: device to compute on; None means a GPU if there is one.
        tokenizer: tokenizer of the source, as for `import_from`.

    Raises:
        SeqmixError: the source cannot be read, the plan does not match it, the directory belongs to another
            linearization, or torchrun has started several processes.
    """

    def __init__(
        self, source: Path, plan: Plan, out: Path, *, device: str | None = None, tokenizer: str | None = None
    ) -> None:
        require_alone("linearize")
        self.source = source
        self.plan = plan
        self.out = out
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.plan_text = f"{MARK}{source.absolute()}\n{dump(plan)}"
        if (out / PLAN_FILE).is_file():
            previous = (out / PLAN_FILE).read_text(encoding="utf-8")
            # before the first stage, a plan that did not work can be replaced: no training is lost
            must_match = not previous.startswith(MARK) or (out / "stages").exists()
            if must_match and previous != self.plan_text:
                raise SeqmixError(f"{out} was started with another source or plan: choose another --out DIR")
            if previous.partition("\n")[0] != self.plan_text.partition("\n")[0]:
                shutil.rmtree(out / "teacher", ignore_errors=True)
        elif not is_vacant(out):
            raise SeqmixError(f"{out} exists and is not an empty directory: choose another one with --out DIR")
        if not (source / CONFIG_FILE).is_file():  # a model of another library
            self.source = out / "teacher"
            write_file(self.plan_text, out / PLAN_FILE)
            if not checkpoints(self.source):
                shutil.rmtree(self.source, ignore_errors=True)
                import_from(source, self.source, tokenizer)
        config = read_config(self.source)
        if (file := self.source / TOKENIZER_FILE).is_file():
            config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(file)})})
        self.run = config
        self.mixers = mixers_of(plan, config.model)
        if plan.stages.hidden is not None and config.model.residual.kind != "plain":
            raise SeqmixError(
                "the stage hidden compares the residual stream and needs the residual connection plain, got "
                f"{config.model.residual.kind}: leave the stage out"
            )
        if config.model.value_embeddings is not None:
            raise SeqmixError(
                "linearize cannot swap mixers that take value embeddings: model.value_embeddings must be null"
            )
        for stage in plan.staged.values():
            run_config(config, plan, student_of(config.model, self.mixers), stage)
        if plan.keep is not None and plan.keep.best > len(self.mixers):
            raise SeqmixError(
                f"keep.best must be at most the number of swapped layers ({len(self.mixers)}), got {plan.keep.best}"
            )

    @property
    def swapped(self) -> dict[int, MixerConfig]:
        """New mixer of each swapped layer, by index; once `prepare` has run, without layers that keep their mixer."""
        kept = self.prepared.kept if (self.folders[0] / PREPARED_FILE).is_file() else ()
        return {layer: mixer for layer, mixer in self.mixers.items() if layer not in kept}

    @property
    def prepared(self) -> Prepared:
        """Record of the student before its first training stage, as `prepare` has written it."""
        return Prepared.model_validate_json((self.folders[0] / PREPARED_FILE).read_bytes())

    def config(self, name: StageName | None = None) -> RunConfig:
        """Return the run configuration of a training stage; without a name, that of the result."""
        model = student_of(self.run.model, self.swapped)
        if name is None:
            return run_config(self.run, self.plan, model)
        return run_config(self.run, self.plan, model, self.plan.staged[name], self.folders[self._number(name) - 1])

    def prepare(self) -> Prepared:
        """Load the teacher, build the student, decide which layers keep their mixer, and transfer parameters."""
        folder = self.folders[0]
        plan = self.plan
        self.teacher = load_run(self.source, device=self.device)
        if (folder / PREPARED_FILE).is_file():
            return self.prepared
        shutil.rmtree(folder, ignore_errors=True)
        write_file(self.plan_text, self.out / PLAN_FILE)
        config = run_config(self.run, plan, self.run.model)
        source = config.open_data(self.source)

        def measure_model(model: LanguageModel) -> Measurement:
            return measure(model, self.teacher, source, config)

        def build_student(mixers: dict[int, MixerConfig]) -> tuple[LanguageModel, Measurement, list[LayerTransfer]]:
            student = self._random_student(mixers)
            return student, measure_model(student), self._transfer(student, list(mixers), source, config)

        teacher = measure_model(self.teacher)
        costs = dict[int, float]()
        kept = tuple[int, ...]()
        student, start, transfers = build_student(self.mixers)
        if plan.keep is not None:
            for layer in self.mixers:
                block = self.teacher.blocks[layer]
                mixer = self.teacher.blocks[layer].mixer
                block.mixer = student.blocks[layer].mixer
                costs[layer] = measure_model(self.teacher).loss - teacher.loss
                block.mixer = mixer
            kept = tuple(sorted(sorted(costs, key=costs.__getitem__, reverse=True)[: plan.keep.best]))
            student, start, transfers = build_student({i: mixer for i, mixer in self.mixers.items() if i not in kept})
        prepared = Prepared(
            taken=tuple(transfers),
            costs={f"{i}": cost for i, cost in costs.items()},
            kept=kept,
            teacher=teacher,
            start=start,
            transferred=measure_model(student),
        )
        config = run_config(self.run, plan, student.config)
        write_run(folder, config, parameters_of(student), vocabulary=vocabulary_of(source))
        write_file(prepared.model_dump_json(indent=2), folder / PREPARED_FILE)
        return prepared

    def _random_student(self, mixers: dict[int, MixerConfig]) -> LanguageModel:
        """Build a student with the teacher's parameters, except for its new mixers, whose parameters are random."""
        student = build_model(student_of(self.run.model, mixers), device=self.device, seed=self.plan.seed)
        teacher_tensors = self.teacher.state_dict()
        new = tuple(f"blocks.{layer}.mixer." for layer in mixers)
        with torch.no_grad():
            for name, tensor in student.state_dict().items():
                if not name.startswith(new):
                    if name not in teacher_tensors:
                        raise SeqmixError(f"{name} depends on a mixer that is swapped: swap its layer too")
                    tensor.copy_(teacher_tensors[name])
        return student.eval()

    def _transfer(
        self, student: LanguageModel, layers: list[int], source: Any, config: RunConfig
    ) -> list[LayerTransfer]:
        """Transfer parameters from the teacher to the student's new mixers, and calibrate the new mixers."""
        pairs = {i: (self.teacher.blocks[i].mixer, student.blocks[i].mixer) for i in layers}
        before = {i: {n: p.detach().clone() for n, p in new.named_parameters()} for i, (_, new) in pairs.items()}
        done = {i: transfer(old, new, self.plan.transfer) for i, (old, new) in pairs.items()}
        batch_size = config.training.batch_size // config.training.grad_accum_steps
        tokens = self.plan.calibration_tokens
        calibrated = calibrate(self.teacher, student, layers, source, batch_size, tokens) if layers else {}
        transfers = []
        for i, (old, new) in pairs.items():
            words = (*(f"{name} {how}" for name, how in done[i].items()), *calibrated[i])
            initial = initial_parameters(new, before[i], done[i])
            transfers.append(LayerTransfer(layer=i, old=old.kind, new=new.kind, done=words, initial=initial))
        return transfers

    def stage(self, name: StageName, stop: Callable[[], bool] = lambda: False) -> Iterator[Event] | None:
        """Train one stage of the plan, or resume it; earlier stages must be complete.

        Args:
            name: the stage.
            stop: called after each step; training stops with a checkpoint when it returns True.

        Returns:
            The events of `train`; None if the stage is already complete.
        """
        folder = self.folders[self._number(name)]
        config = self.config(name)
        saved = checkpoints(folder)
        if saved and step_of(saved[-1]) == config.training.steps:
            return None
        mixers_alone = self.trained(name) == "mixers"
        objective = OBJECTIVES[name](self.teacher, list(self.swapped), mixers_alone=mixers_alone)
        if not self.swapped and (mixers_alone or name != "text"):
            raise SeqmixError(
                f"stage {name} trains new mixers, but nothing is swapped: add a swap, or remove the stage"
            )
        resume = (folder / CONFIG_FILE).is_file()
        return train(config, folder, resume=resume, stop=stop, device=self.device, objective=objective)

    def finish(self) -> Result:
        """Write the trained student as a run, compare it with the teacher, and return the comparison."""
        names = list(self.plan.staged)
        last = self.folders[-1]
        student = load_run(last, device=self.device)
        config = self.config()
        source = config.open_data(last)
        prepared = self.prepared
        measurement = measure(student, self.teacher, source, config)
        size = config.data.sequence_length
        steps = [self.config(name).training.steps for name in names]
        result = Result(
            source=str(self.source),
            prepared=prepared,
            tokens=sum(steps) * config.training.batch_size * size,
            stages={name: _final_loss(folder) for name, folder in zip(names, self.folders[1:], strict=True)},
            student=measurement,
            gap_closed=gap_closed(prepared.start.loss, measurement.loss, prepared.teacher.loss)
            if self.swapped
            else None,
            decoding={"teacher": time_decoding(self.teacher, size), "student": time_decoding(student, size)},
        )
        add_run(self.out, config, parameters_of(student), step=sum(steps), vocabulary=vocabulary_of(source))
        write_file(result.model_dump_json(indent=2) + "\n", self.out / RESULT_FILE)
        head, rows = table(result)
        lines = [head, ["---"] * len(head), *rows]
        write_file("".join(f"| {' | '.join(line)} |\n" for line in lines), self.out / TABLE_FILE)
        return result

    @property
    def folders(self) -> list[Path]:
        """Run directories: that of the student before its first stage, then one per stage."""
        return [self.out / "stages" / f"{i}-{name}" for i, name in enumerate(["transfer", *self.plan.staged])]

    def trained(self, name: StageName) -> str:
        """Return which parameters a stage trains: `mixers` for those of the new mixers, or `all`."""
        return self.plan.staged[name].train or ("all" if name == "text" else "mixers")

    def _number(self, name: StageName) -> int:
        return list(self.plan.staged).index(name) + 1


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Return the comparison as a table: column names, and a row for the teacher and for the student at each step."""
    before = result.prepared
    rows = list[list[str]]()
    measurements = {"teacher": before.teacher, "random mixers": before.start, "transferred": before.transferred}
    losses = {name: measurement.loss for name, measurement in measurements.items()}
    losses |= {f"after {name}": loss for name, loss in result.stages.items()} | {"student": result.student.loss}
    measurements["student"] = result.student
    for name, loss in losses.items():
        gap = gap_closed(before.start.loss, loss, before.teacher.loss)
        cells = [name, f"{loss:.4f}", "" if gap is None else f"{gap:.3f}"]
        measurement = measurements.get(name)
        speed = result.decoding.get(name)
        cells += ["", ""] if measurement is None else [f"{measurement.divergence:.4f}", f"{measurement.agreement:.1%}"]
        cells += ["", ""] if speed is None else [f"{speed.milliseconds:.2f}", f"{speed.state_bytes:,}"]
        rows.append(cells)
    return ["", "loss", "gap closed", "KL", "agreement", "ms/token", "state bytes"], rows


def vocabulary_of(source: Source) -> bytes | None:
    """Return the content of a data source's tokenizer.json; None for bytes and tasks, which have no tokenizer file."""
    return None if source.tokenizer is None else source.tokenizer.vocabulary


def _final_loss(run: Path) -> float:
    """Return the last validation loss of a run directory, in nats per token."""
    lines = [json.loads(line) for line in (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    return next(line["validation_loss"] for line in reversed(lines) if "validation_loss" in line)
