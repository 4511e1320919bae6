"""`train`: a run from its configuration, new or resumed, on one process or many; a generator of events.

Whoever shows them consumes it. What takes part is put together here; `trainer.py` is its course, `learner.py` a step.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from ..models import LanguageModel, build_model
from ..registry import ElsewhereError
from . import checkpoint
from .checkpoint import Found
from .config import RunConfig, TrainingConfig
from .course import Trainer
from .errors import TrainingError, told
from .events import Event, Noted, Started
from .optim import build_optimizer
from .provenance import record_session
from .ranks import Group, Ranks, lost
from .run_dir import claim, held, require_free
from .sharding import shard
from .trainer import Learner, precision_of


def train(
    config: RunConfig, run: str | Path, *, resume: bool = False, stop: Callable[[], bool] = lambda: False
) -> Iterator[Event]:
    """Train a model, event by event: it trains as it is iterated.

    Args:
        config: the run.
        run: its folder; made, and refused where it holds something already, unless resumed.
        resume: whether to go on from the newest intact checkpoint in it (from the start, where none was written).
        stop: asked behind every step; true writes a checkpoint and ends.

    Raises:
        SeqmixError: the folder, the text or a checkpoint cannot be used, the model cannot be built, the loss is no
            longer finite, or a checkpoint cannot be written. Nothing is written before all that is needed is there.
    """
    run = Path(run)
    with Group(config.distributed) as ranks:
        try:
            yield from _train(config, run, resume, stop, ranks)
        except RuntimeError as error:
            if ranks.size > 1 and lost(error):
                raise ElsewhereError("another process of the run is gone") from error
            raise


def _train(
    config: RunConfig, run: Path, resume: bool, stop: Callable[[], bool], ranks: Ranks
) -> Generator[Event, None, None]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, written = precision_of(config.training, device), None
    with ranks.together():
        if not resume and ranks.first:
            require_free(run)
        _require_shares(config, ranks)
        source = config.open_data(run)
        if resume and ranks.first and checkpoint.checkpoints(run):
            written = checkpoint.find(run)
        model = build_model(config.model, device=device, activations=precision, seed=config.seed)
        model.tokenizer = source.tokenizer
        _require_shared_mixers(model, config.training, ranks)
    # the first process has read it wholly; the others take its word
    folder = ranks.gather(None if written is None else str(written.folder))[0]
    with ranks.together():
        found = written
        if folder is not None and not ranks.first:
            found = Found(Path(folder), checkpoint.read_manifest(Path(folder)), ())
    shard(model, ranks)
    trainer = Trainer(Learner(config, source, model, build_optimizer(model, config.training), ranks), run)
    start, notes = 0, []
    with ranks.together():
        if found is not None:
            start, notes = found.manifest.step, [*found.notes, *trainer.restore(found)]
        elif not resume and ranks.first:
            kernels = "".join(f", {name}: {backend}" for name, backend in model.backends.items())
            claim(run, config, f"# kernels on {device} in {precision}{kernels}\n" if kernels else "")
            if source.tokenizer is not None:
                source.tokenizer.save(run)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), ExitStack() as stack:
        stack.enter_context(told(run, config.training))
        with ranks.together():
            if ranks.first:
                stack.enter_context(held(run))
                trainer.metrics.begin(start)
                checkpoint.drop_unfinished(run)
                record_session(run, config, step=start, device=device, precision=precision, ranks=ranks)
        stack.enter_context(trainer)
        parameters = sum(p.numel() for p in model.parameters())
        yield Started(source, parameters, device, precision, start, ranks.size)
        for text in notes:
            yield Noted(start, text)
        yield from trainer.steps(start, stop)


def _require_shares(config: RunConfig, ranks: Ranks) -> None:
    """Find out whether a batch has equal parts for all processes."""
    settings, shares = config.training, ranks.batch_size
    if settings.batch_size % (shares * settings.grad_accum_steps):
        raise TrainingError(
            f"training.batch_size = {settings.batch_size} is read by {shares} processes (data x shard) in "
            f"training.grad_accum_steps = {settings.grad_accum_steps} parts each: it must be a multiple of "
            f"{shares * settings.grad_accum_steps}"
        )


def _require_shared_mixers(model: LanguageModel, settings: TrainingConfig, ranks: Ranks) -> None:
    """Find out whether all mixers can share a sequence."""
    for name, block in zip(model.config.layers, model.blocks, strict=True) if ranks.context is not None else ():
        mixer = block.mixer
        if not mixer.supports_context_parallel and settings.compile:
            raise TrainingError(
                f"distributed.context_parallel = {ranks.context_size} hands the state of {mixer.kind} "
                f"(model.blocks.{name}) from process to process, which cannot be compiled: set "
                "training.compile to false"
            )
        if not mixer.supports_context_parallel and mixer.traits.state == "growing":
            raise TrainingError(
                f"distributed.context_parallel = {ranks.context_size} shares each sequence among processes, and "
                f"{mixer.kind} of model.blocks.{name} cannot: its state grows with the text, and its `mix` does not "
                "read `context`; set distributed.context_parallel to 1, or take another mixer"
            )
