"""The dtype of matrix products in training, and the trial that chooses it on a CPU."""

import time
from collections.abc import Callable

import torch

from ..models import ModelConfig, build_meta, build_model, flops_per_token
from ..ops.recurrence import products
from .config import RunConfig, TrainingConfig

FEWEST = 2**30
MOST = 2**34
"""Operations of a step from which a trial is made, and those of the trial at most: some tenths of a second."""
GAIN = 0.95
"""The share of float32's time that bfloat16 may take at most to be chosen."""


def precision_of(settings: TrainingConfig, device: torch.device) -> torch.dtype:
    """The dtype of matrix products."""
    if settings.precision == "bfloat16":
        return torch.bfloat16
    able = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if settings.precision == "auto" and able else torch.float32


def tried(config: RunConfig, clock: Callable[[], float] = time.process_time) -> tuple[RunConfig, str | None]:
    """The configuration of a new run on a CPU, with bfloat16 in place of `auto` where a trial finds it faster.

    The trial is a training step of the model's pattern once, of fewer sequences, in both dtypes by turns. There is none
    of a small step, nor where the CPU does not multiply bfloat16. A resumed run reads what was chosen in its
    config.yaml.

    Args:
        config: of the run.
        clock: seconds.

    Returns:
        The configuration, and a sentence where bfloat16 was chosen.
    """
    training = config.training
    model = config.model
    if training.precision != "auto" or not products.HAS_BFLOAT16:
        return config, None
    small = model.model_copy(update={"n_layers": len(model.pattern or model.blocks)})
    length = config.data.sequence_length
    rows = max(training.batch_size // training.grad_accum_steps, 1)
    cost = 3 * length * flops_per_token(build_meta(small), length)
    if rows * cost < FEWEST:
        return config, None
    ratio = _ratio(small, min(rows, max(MOST // cost, 1)), max(min(length, length * MOST // cost), 1), clock)
    if ratio > GAIN:
        return config, None
    chosen = config.model_copy(update={"training": training.model_copy(update={"precision": "bfloat16"})})
    return chosen, (
        f"products are in bfloat16, which took {ratio:.2f} of float32's time in a trial: "
        "training.precision=float32 turns it off"
    )


def _ratio(config: ModelConfig, rows: int, length: int, clock: Callable[[], float]) -> float:
    """The time of a step's forward and backward pass in bfloat16 over float32's, the shortest of three each."""
    times: dict[torch.dtype, list[float]] = {torch.bfloat16: [], torch.float32: []}
    model = build_model(config, seed=0)
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    with torch.random.fork_rng(devices=[]):  # for dropout
        for dtype, measured in 4 * list(times.items()):
            began = clock()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = model(tokens, targets=tokens).loss
            assert loss is not None
            loss.backward()
            measured.append(clock() - began)
    # the first of each warms up
    return min(times[torch.bfloat16][1:]) / min(times[torch.float32][1:])
