"""Measurements of a student and its teacher: loss, divergence, agreement, decoding speed, and size of the state."""

import time

import torch
from torch.nn.functional import cross_entropy

from ...data import Batch, Source
from ...mixers.base.state import nbytes
from ...models import IGNORED, LanguageModel, Sampling, generate_tokens
from ...models.loss import tokens_at_once
from ...registry import Config
from ...training import RunConfig
from .objectives import divergence, stream

DECODED = 64
"""Number of tokens generated to time decoding."""


class Measurement(Config):
    """Quality of a model on the validation split, compared with its teacher."""

    loss: float
    """Cross-entropy, in nats per token."""
    divergence: float
    """Kullback-Leibler divergence KL(teacher, model) of the next-token distributions, in nats per token."""
    agreement: float
    """Share of tokens at which model and teacher have the same most probable next token."""


class Decoding(Config):
    """Cost of decoding one sequence after a context of the training length."""

    milliseconds: float
    """Time per token in milliseconds, the best of three measurements."""
    state_bytes: int
    """Size of the state of one sequence, in bytes."""


def gap_closed(start: float, student: float, teacher: float) -> float | None:
    """Return the share of the loss gap that is closed, (CE0 - CE) / (CE0 - CE_teacher); None if there is no gap."""
    return None if start <= teacher else (start - student) / (start - teacher)


@torch.no_grad()
def measure(model: LanguageModel, teacher: LanguageModel, source: Source, config: RunConfig) -> Measurement:
    """Measure a model's loss and its agreement with the teacher, on the batches of the final evaluation."""
    loss = 0.0
    divergence_sum = 0.0
    agreements = 0
    tokens = 0
    settings = config.training
    limit = settings.final_evaluation_batches
    parts = settings.grad_accum_steps
    model.eval()
    batches = source.evaluation_batches(settings.batch_size // parts, None if limit is None else limit * parts)
    for micro_batch, _ in batches:
        batch = source.packed(Batch(*(part.to(model.device) for part in micro_batch)))
        targets = batch.targets[batch.targets != IGNORED]
        size = tokens_at_once(model.head.weight)
        streams = [stream(each, batch).split(size) for each in (model, teacher)]
        for model_stream, teacher_stream, target in zip(*streams, targets.split(size), strict=True):
            logits = model.logits(model_stream)
            loss += cross_entropy(logits.float(), target, reduction="sum").item()
            divergence_sum += divergence(model, teacher, model_stream, teacher_stream).item()
            agreements += int((logits.argmax(-1) == teacher.logits(teacher_stream).argmax(-1)).sum())
        tokens += len(targets)
    tokens = max(tokens, 1)
    return Measurement(loss=loss / tokens, divergence=divergence_sum / tokens, agreement=agreements / tokens)


def time_decoding(model: LanguageModel, context: int) -> Decoding:
    """Time the decoding of one sequence after a context of `context` tokens."""
    prompt = torch.randint(model.config.vocab_size, (context,), generator=torch.Generator().manual_seed(0))
    best = float("inf")
    for _ in range(3):
        options = {"max_new_tokens": DECODED, "sampling": Sampling(temperature=0), "compiled": False}
        tokens = generate_tokens(model, [prompt.to(model.device)], **options)
        next(tokens).tolist()
        start = time.perf_counter()
        torch.stack([*tokens]).tolist()  # waits for the device
        best = min(best, (time.perf_counter() - start) / (DECODED - 1))
    return Decoding(milliseconds=1000 * best, state_bytes=nbytes(model.init_state(1, max_length=context)))
