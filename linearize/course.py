"""The course of a linearization: the teacher, the student with what it takes over, the stages, and the comparison.

DIR/plan.yaml           the plan, and the source
DIR/teacher/            the source as a run directory, if it is another library's model
DIR/stages/0-transfer/  the student before the first stage, and prepared.json: what it took over
DIR/stages/N-NAME/      each stage: a run directory, which continues where it stopped
DIR/                    the result, a run directory itself; linearize.json and linearize.md: the comparison
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..convert import import_from
from ..data import Source
from ..mixers import MixerConfig
from ..models import TOKENIZER_FILE, LanguageModel, build_model
from ..registry import Config, SeqmixError, dump, is_vacant, write_file
from ..training import RunConfig, load_run, read_config, train
from ..training.checkpoint.files import checkpoints, step_of
from ..training.checkpoint.run_dir import CONFIG_FILE
from ..training.checkpoint.saved_run import add_run, write_run
from ..training.checkpoint.train_state import parameters_of
from ..training.distributed.process_groups import require_alone
from ..training.monitoring.events import Event
from ..training.monitoring.logging import METRICS_FILE
from .measure import Decoding, Measured, decoding, gap_closed, measure
from .objectives import OBJECTIVES
from .plan import Plan, StageName, mixers_of, run_config, student_of
from .transfer import calibrate, initial_of, transfer

PLAN_FILE = "plan.yaml"
PREPARED_FILE = "prepared.json"
RESULT_FILE = "linearize.json"
TABLE_FILE = "linearize.md"
MARK = "# of "
"""Begins a plan that was written here, before its source."""


class Taken(Config):
    """What the new mixer of a layer took over."""

    layer: int
    old: str
    new: str
    done: tuple[str, ...]
    initial: tuple[str, ...]
    """Parameters that keep their initialisation."""


class Prepared(Config):
    """The student before its first stage."""

    taken: tuple[Taken, ...]
    costs: dict[str, float]
    """By layer, the loss with its swap alone, less the teacher's; empty unless the plan keeps layers."""
    kept: tuple[int, ...]
    """Layers that keep their mixer by the plan's `keep`."""
    teacher: Measured
    start: Measured
    """The student with random new mixers: its loss is CE0."""
    transferred: Measured


class Result(Config):
    """The comparison of a student with its teacher."""

    source: str
    prepared: Prepared
    tokens: int
    """That the stages have trained on."""
    stages: dict[str, float]
    """By stage, the loss after it."""
    student: Measured
    gap_closed: float | None
    """(CE0 - CE) / (CE0 - CE_teacher); None where nothing was swapped."""
    decoding: dict[str, Decoding]
    """Of `teacher` and `student`."""


class Linearization:
    """A source (as `seqmix convert` reads it, or a run), a plan and the folder of the result.

    An earlier call's folder, of the same source and plan, continues. It computes on `device`, None for a GPU if there
    is one; `tokenizer` is that of `import_from`.

    Raises:
        SeqmixError: the source cannot be read, the plan does not fit it, the folder is another linearization's, or
            torchrun has started several processes.
    """

    def __init__(
        self, source: Path, plan: Plan, out: Path, *, device: str | None = None, tokenizer: str | None = None
    ) -> None:
        require_alone("linearize")
        self.source = source
        self.plan = plan
        self.out = out
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.written = f"{MARK}{source.absolute()}\n{dump(plan)}"
        if (out / PLAN_FILE).is_file():
            before = (out / PLAN_FILE).read_text(encoding="utf-8")
            # before the first stage there is nothing to lose: a plan that did not fit may be mended
            begun = not before.startswith(MARK) or (out / "stages").exists()
            if begun and before != self.written:
                raise SeqmixError(f"{out} was begun with another source or plan: choose another --out DIR")
            if before.partition("\n")[0] != self.written.partition("\n")[0]:
                shutil.rmtree(out / "teacher", ignore_errors=True)
        elif not is_vacant(out):
            raise SeqmixError(f"{out} exists and is not an empty directory: choose another one with --out DIR")
        if not (source / CONFIG_FILE).is_file():  # another library's
            self.source = out / "teacher"
            write_file(self.written, out / PLAN_FILE)
            if not checkpoints(self.source):
                shutil.rmtree(self.source, ignore_errors=True)
                import_from(source, self.source, tokenizer)
        config = read_config(self.source)
        if (file := self.source / TOKENIZER_FILE).is_file():
            config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(file)})})
        self.run = config
        self.mixers = mixers_of(plan, config.model)
        for stage in plan.staged.values():
            run_config(config, plan, student_of(config.model, self.mixers), stage)
        if len(self.mixers) < (0 if plan.keep is None else plan.keep.best):
            raise SeqmixError(f"keep.best is {plan.keep.best if plan.keep else 0}, and {len(self.mixers)} are swapped")

    @property
    def swapped(self) -> dict[int, MixerConfig]:
        """The new mixers by layer, without those that the plan keeps, once they are known."""
        kept = self.prepared.kept if (self.folders[0] / PREPARED_FILE).is_file() else ()
        return {layer: mixer for layer, mixer in self.mixers.items() if layer not in kept}

    @property
    def prepared(self) -> Prepared:
        """What `prepare` found."""
        return Prepared.model_validate_json((self.folders[0] / PREPARED_FILE).read_bytes())

    def config(self, name: StageName | None = None) -> RunConfig:
        """The configuration of a stage, or of the result."""
        model = student_of(self.run.model, self.swapped)
        if name is None:
            return run_config(self.run, self.plan, model)
        return run_config(self.run, self.plan, model, self.plan.staged[name], self.folders[self._number(name) - 1])

    def prepare(self) -> Prepared:
        """Load the teacher, and make the student: transfer, calibration, and which layers are kept."""
        folder = self.folders[0]
        plan = self.plan
        self.teacher = load_run(self.source, device=self.device)
        if (folder / PREPARED_FILE).is_file():
            return self.prepared
        shutil.rmtree(folder, ignore_errors=True)
        write_file(self.written, self.out / PLAN_FILE)
        config = run_config(self.run, plan, self.run.model)
        source = config.open_data(self.source)

        def measured(model: LanguageModel) -> Measured:
            return measure(model, self.teacher, source, config)

        def made(mixers: dict[int, MixerConfig]) -> tuple[LanguageModel, Measured, list[Taken]]:
            student = self._random_student(mixers)
            return student, measured(student), self._teach(student, list(mixers), source, config)

        teacher = measured(self.teacher)
        costs = dict[int, float]()
        kept = tuple[int, ...]()
        student, start, taken = made(self.mixers)
        if plan.keep is not None:
            for layer in self.mixers:
                block = self.teacher.blocks[layer]
                mixer = self.teacher.blocks[layer].mixer
                block.mixer = student.blocks[layer].mixer
                costs[layer] = measured(self.teacher).loss - teacher.loss
                block.mixer = mixer
            kept = tuple(sorted(sorted(costs, key=costs.__getitem__, reverse=True)[: plan.keep.best]))
            student, start, taken = made({i: mixer for i, mixer in self.mixers.items() if i not in kept})
        found = Prepared(
            taken=tuple(taken),
            costs={f"{i}": cost for i, cost in costs.items()},
            kept=kept,
            teacher=teacher,
            start=start,
            transferred=measured(student),
        )
        config = run_config(self.run, plan, student.config)
        write_run(folder, config, parameters_of(student), vocabulary=vocabulary_of(source))
        write_file(found.model_dump_json(indent=2), folder / PREPARED_FILE)
        return found

    def _random_student(self, mixers: dict[int, MixerConfig]) -> LanguageModel:
        """The teacher with random new mixers."""
        student = build_model(student_of(self.run.model, mixers), device=self.device, seed=self.plan.seed)
        theirs = self.teacher.state_dict()
        new = tuple(f"blocks.{layer}.mixer." for layer in mixers)
        with torch.no_grad():
            for name, tensor in student.state_dict().items():
                if not name.startswith(new):
                    if name not in theirs:
                        raise SeqmixError(f"{name} depends on a mixer that is swapped: swap its layer too")
                    tensor.copy_(theirs[name])
        return student.eval()

    def _teach(self, student: LanguageModel, layers: list[int], source: Any, config: RunConfig) -> list[Taken]:
        """Transfer and calibrate."""
        pairs = {i: (self.teacher.blocks[i].mixer, student.blocks[i].mixer) for i in layers}
        before = {i: {n: p.detach().clone() for n, p in new.named_parameters()} for i, (_, new) in pairs.items()}
        done = {i: transfer(old, new, self.plan.transfer) for i, (old, new) in pairs.items()}
        rows = config.training.batch_size // config.training.grad_accum_steps
        tokens = self.plan.calibration_tokens
        more = calibrate(self.teacher, student, layers, source, rows, tokens) if layers else {}
        taken = []
        for i, (old, new) in pairs.items():
            words = (*(f"{name} {how}" for name, how in done[i].items()), *more[i])
            initial = initial_of(new, before[i], done[i])
            taken.append(Taken(layer=i, old=old.kind, new=new.kind, done=words, initial=initial))
        return taken

    def stage(self, name: StageName, stop: Callable[[], bool] = lambda: False) -> Iterator[Event] | None:
        """Train a stage, or continue it, after those before it: events as of `train`; None where it has ended."""
        folder = self.folders[self._number(name)]
        config = self.config(name)
        if (found := checkpoints(folder)) and step_of(found[-1]) == config.training.steps:
            return None
        alone = self.trained(name) == "mixers"
        objective = OBJECTIVES[name](self.teacher, list(self.swapped), mixers_alone=alone)
        if not self.swapped and (alone or name != "text"):
            raise SeqmixError(f"stage {name} teaches new mixers, and nothing is swapped")
        resume = (folder / CONFIG_FILE).is_file()
        return train(config, folder, resume=resume, stop=stop, device=self.device, objective=objective)

    def finish(self) -> Result:
        """Write the result, and compare it with the teacher."""
        names = list(self.plan.staged)
        last = self.folders[-1]
        student = load_run(last, device=self.device)
        config = self.config()
        source = config.open_data(last)
        prepared = self.prepared
        found = measure(student, self.teacher, source, config)
        size = config.data.sequence_length
        steps = [self.config(name).training.steps for name in names]
        result = Result(
            source=str(self.source),
            prepared=prepared,
            tokens=sum(steps) * config.training.batch_size * size,
            stages={name: _final_loss(folder) for name, folder in zip(names, self.folders[1:], strict=True)},
            student=found,
            gap_closed=gap_closed(prepared.start.loss, found.loss, prepared.teacher.loss) if self.swapped else None,
            decoding={"teacher": decoding(self.teacher, size), "student": decoding(student, size)},
        )
        add_run(self.out, config, parameters_of(student), step=sum(steps), vocabulary=vocabulary_of(source))
        write_file(result.model_dump_json(indent=2) + "\n", self.out / RESULT_FILE)
        head, rows = table(result)
        lines = [head, ["---"] * len(head), *rows]
        write_file("".join(f"| {' | '.join(line)} |\n" for line in lines), self.out / TABLE_FILE)
        return result

    @property
    def folders(self) -> list[Path]:
        """The run of the student before its first stage, and that of each stage."""
        return [self.out / "stages" / f"{i}-{name}" for i, name in enumerate(["transfer", *self.plan.staged])]

    def trained(self, name: StageName) -> str:
        """What a stage trains."""
        return self.plan.staged[name].train or ("all" if name == "text" else "mixers")

    def _number(self, name: StageName) -> int:
        return list(self.plan.staged).index(name) + 1


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """The comparison: heads, and a row for each model on the way."""
    before = result.prepared
    rows = list[list[str]]()
    found = {"teacher": before.teacher, "random mixers": before.start, "transferred": before.transferred}
    losses = {name: one.loss for name, one in found.items()}
    losses |= {f"after {name}": loss for name, loss in result.stages.items()} | {"student": result.student.loss}
    found["student"] = result.student
    for name, loss in losses.items():
        gap = gap_closed(before.start.loss, loss, before.teacher.loss)
        cells = [name, f"{loss:.4f}", "" if gap is None else f"{gap:.3f}"]
        one = found.get(name)
        speed = result.decoding.get(name)
        cells += ["", ""] if one is None else [f"{one.divergence:.4f}", f"{one.agreement:.1%}"]
        rows.append(cells + (["", ""] if speed is None else [f"{speed.milliseconds:.2f}", f"{speed.state_bytes:,}"]))
    return ["", "loss", "gap closed", "KL", "agreement", "ms/token", "state bytes"], rows


def vocabulary_of(source: Source) -> bytes | None:
    """The content of the tokenizer.json of a source; None for bytes and tasks."""
    return None if source.tokenizer is None else source.tokenizer.vocabulary


def _final_loss(run: Path) -> float:
    """The validation loss at the end of a stage."""
    lines = [json.loads(line) for line in (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    return next(line["validation_loss"] for line in reversed(lines) if "validation_loss" in line)
