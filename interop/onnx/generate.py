"""Generation with an exported file: prompts are prefilled one by one, then all texts decode together."""

from collections.abc import Generator, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ...models import Sampling
from ...models.generate import decode_stream, encode_prompts
from ...models.sampling import Sampler
from ...registry import SeqmixError
from .session import OnnxModel


def stream_text(
    model: OnnxModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
) -> Iterator[list[str]]:
    """Continue texts; yield the new piece of each text at every step. The arguments are those of `models.stream_text`.

    With the same seed, both draw the same random numbers.

    Raises:
        SeqmixError: a prompt is empty, the model has no tokenizer, or its logits are not finite.
    """
    tokenizer = model.tokenizer
    encoded = encode_prompts(tokenizer, model.metadata["vocabulary"], prompts)
    steps = generate_tokens(
        model,
        encoded,
        max_new_tokens=max_new_tokens,
        sampling=sampling or Sampling(),
        vocab_size=tokenizer.text_tokens,
    )
    yield from decode_stream(steps, [tokenizer.decoder() for _ in encoded], stop)


def generate_tokens(
    model: OnnxModel,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    vocab_size: int | None = None,
) -> Generator[Tensor, None, None]:
    """Yield the next token of every prompt; the arguments are those of `models.generate_tokens`.

    Raises:
        SeqmixError: there are no prompts, or the logits of a prompt are not finite.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise SeqmixError("generate_tokens expects at least one prompt, each of at least one token")
    if max_new_tokens < 1:
        raise SeqmixError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    prefilled = [model(prompt.numpy()[None], model.init_state(1)) for prompt in prompts]
    logits = np.concatenate([logits[:, -1] for logits, _ in prefilled])
    state = model.concatenate([state for _, state in prefilled])
    if not np.isfinite(logits).all():
        raise SeqmixError("the model's logits are not finite: its parameters are damaged or have diverged")
    sampler = Sampler(sampling, len(prompts), torch.device("cpu"))
    for count in range(1, max_new_tokens + 1):
        token = sampler.next_tokens(torch.from_numpy(logits)[:, :vocab_size])
        yield token
        if count < max_new_tokens:
            outputs, state = model(token.numpy()[:, None], state)
            logits = outputs[:, -1]
