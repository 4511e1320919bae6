"""The dtype of matrix products in training, and the trial that chooses it on a CPU."""

import time
from collections.abc import Callable

import torch

from ..models import ModelConfig, build_meta, build_model, flops_per_token
from ..ops.recurrence import products
from .config import RunConfig, TrainingConfig

MIN_STEP_FLOPS = 2**30
"""FLOPs of a training step below which bfloat16 is not tried."""
TRIAL_FLOPS = 2**34
"""Maximum FLOPs of one timed step of the bfloat16 trial, which takes some tenths of a second."""
MAX_TIME_RATIO = 0.95
"""bfloat16 is chosen if it takes at most this fraction of float32's time."""


def precision_of(settings: TrainingConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products on a device."""
    if settings.precision == "bfloat16":
        return torch.bfloat16
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if settings.precision == "auto" and supported else torch.float32


def choose_precision(config: RunConfig, clock: Callable[[], float] = time.process_time) -> tuple[RunConfig, str | None]:
    """Replace `precision: auto` by bfloat16 in a new run on a CPU, if a trial finds it faster.

    The trial times training steps in both dtypes, interleaved, on fewer sequences and one repetition of the model's
    layer pattern. There is no trial if a step is small, or if the CPU has no bfloat16 matrix products. A resumed run
    reads the chosen precision from its config.yaml.

    Args:
        config: the run.
        clock: returns the time in seconds.

    Returns:
        The configuration, and a sentence if bfloat16 was chosen, else None.
    """
    training = config.training
    model = config.model
    if training.precision != "auto" or not products.HAS_BFLOAT16:
        return config, None
    small = model.model_copy(update={"n_layers": len(model.pattern or model.blocks)})
    length = config.data.sequence_length
    rows = max(training.batch_size // training.grad_accum_steps, 1)
    cost = 3 * length * flops_per_token(build_meta(small), length)
    if rows * cost < MIN_STEP_FLOPS:
        return config, None
    ratio = _ratio(
        small, min(rows, max(TRIAL_FLOPS // cost, 1)), max(min(length, length * TRIAL_FLOPS // cost), 1), clock
    )
    if ratio > MAX_TIME_RATIO:
        return config, None
    chosen = config.model_copy(update={"training": training.model_copy(update={"precision": "bfloat16"})})
    return chosen, (
        f"using bfloat16 matrix products, which took {ratio:.2f} of float32's time in a trial; disable with "
        "training.precision=float32"
    )


def _ratio(config: ModelConfig, rows: int, length: int, clock: Callable[[], float]) -> float:
    """Return the time of a forward and backward pass in bfloat16 divided by that in float32 (minimum of three each)."""
    times: dict[torch.dtype, list[float]] = {torch.bfloat16: [], torch.float32: []}
    model = build_model(config, seed=0)
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    with torch.random.fork_rng(devices=[]):  # for dropout
        for dtype, seconds in 4 * list(times.items()):
            began = clock()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = model(tokens, targets=tokens).loss
            assert loss is not None
            loss.backward()
            seconds.append(clock() - began)
    # the first pass of each dtype is a warm-up
    return min(times[torch.bfloat16][1:]) / min(times[torch.float32][1:])
