"""A student beside its teacher: loss, divergence, agreement, speed of decoding, and size of the state."""

import time

import torch
from torch.nn.functional import cross_entropy

from ..data import Batch, Source
from ..mixers.state import nbytes
from ..models import IGNORED, LanguageModel, Sampling, generate_tokens
from ..models.loss import tokens_at_once
from ..registry import Config
from ..training import RunConfig
from .objectives import divergence, stream

DECODED = 64
"""Tokens whose decoding is timed."""


class Measured(Config):
    """One model on the validation split."""

    loss: float
    """Nats per token."""
    divergence: float
    """Kullback-Leibler divergence of the model from the teacher, nats per token."""
    agreement: float
    """Share of the tokens at which the most probable next token is the teacher's."""


class Decoding(Config):
    """Decoding one sequence after a context of the training length."""

    milliseconds: float
    """Per token, the best of three."""
    state_bytes: int
    """Of the state."""


def gap_closed(start: float, found: float, teacher: float) -> float | None:
    """The share of the loss gap that is closed: (CE0 - CE) / (CE0 - CE_teacher); None where there is no gap."""
    return None if start <= teacher else (start - found) / (start - teacher)


@torch.no_grad()
def measure(model: LanguageModel, teacher: LanguageModel, source: Source, config: RunConfig) -> Measured:
    """Measure a model on the batches of the final evaluation."""
    loss = 0.0
    apart = 0.0
    same = 0
    asked = 0
    settings = config.training
    limit = settings.final_evaluation_batches
    parts = settings.grad_accum_steps
    model.eval()
    for found, _ in source.evaluation_batches(settings.batch_size // parts, None if limit is None else limit * parts):
        batch = source.packed(Batch(*(part.to(model.device) for part in found)))
        targets = batch.targets[batch.targets != IGNORED]
        size = tokens_at_once(model.head.weight)
        streams = [stream(each, batch).split(size) for each in (model, teacher)]
        for own, theirs, wanted in zip(*streams, targets.split(size), strict=True):
            logits = model.logits(own)
            loss += cross_entropy(logits.float(), wanted, reduction="sum").item()
            apart += divergence(model, teacher, own, theirs).item()
            same += int((logits.argmax(-1) == teacher.logits(theirs).argmax(-1)).sum())
        asked += len(targets)
    return Measured(loss=loss / max(asked, 1), divergence=apart / max(asked, 1), agreement=same / max(asked, 1))


def decoding(model: LanguageModel, context: int) -> Decoding:
    """Time the decoding of a sequence after a context of so many tokens."""
    prompt = torch.randint(model.config.vocab_size, (context,), generator=torch.Generator().manual_seed(0))
    best = float("inf")
    for _ in range(3):
        options = {"max_new_tokens": DECODED, "sampling": Sampling(temperature=0), "compiled": False}
        tokens = generate_tokens(model, [prompt.to(model.device)], **options)
        next(tokens).tolist()
        began = time.perf_counter()
        torch.stack([*tokens]).tolist()  # waits for the device
        best = min(best, (time.perf_counter() - began) / (DECODED - 1))
    return Decoding(milliseconds=1000 * best, state_bytes=nbytes(model.init_state(1, max_length=context)))
