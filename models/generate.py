"""Generation: the prompts are prefilled in one pass, then every token costs one recurrent decode step."""

import math
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..registry import SeqmixError
from .compiling import CompileError
from .decoding import Decoder, compiled_after
from .language_model import LanguageModel, ModelState
from .prompt_cache import RECENT, PromptCache, cache_tokens
from .tokenizer import TextDecoder, Tokenizer

LEAST_TEMPERATURE = 1e-3
"""Below it, logits divided by the temperature leave the range of floats; it is greedy in effect."""

GATHERED = 256
"""New tokens that are kept until only their number and the last ones are: the memory of a long text does not grow."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Raises:
        SeqmixError: a value out of its range.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token (greedy)."""
    top_k: int | None = None
    """Only the k most probable tokens; None for all."""
    top_p: float = 1.0
    """Nucleus sampling: only the most probable tokens, until their probabilities add up to this."""
    seed: int = 0
    """The tokens are a function of it."""

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < math.inf):
            raise SeqmixError(
                f"temperature must be 0 (greedy) or at least {LEAST_TEMPERATURE:g}, and is {self.temperature:g}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise SeqmixError(f"top_k must be 1 or more, and is {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise SeqmixError(f"top_p must be above 0 and at most 1, and is {self.top_p:g}")
        if not 0 <= self.seed < 2**63:
            raise SeqmixError(f"the seed must be from 0 to 2^63 - 1, and is {self.seed}")


def sample(
    logits: Float[Tensor, "B vocab"], sampling: Sampling, generator: torch.Generator | None = None
) -> Int[Tensor, " B"]:
    """Sample one token per row."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p < 1:
        ranked, order = logits.sort(descending=True)
        probabilities = ranked.softmax(-1)
        # a token stays if those before it do not reach top_p, so the first always stays
        dropped = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits = logits.masked_fill(dropped.scatter(1, order, dropped), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def generate_tokens(
    model: LanguageModel,
    prompts: Sequence[Int[Tensor, " T"]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    vocab_size: int | None = None,
    compiled: bool | None = None,
    after: PromptCache | None = None,
    on_end: Callable[[PromptCache], object] | None = None,
) -> Generator[Int[Tensor, " N"], None, None]:
    """Yield the next token of every prompt, one step at a time; close the generator to stop early.

    Args:
        model: the model; its training mode is the caller's.
        prompts: N prompts of any lengths >= 1.
        max_new_tokens: the maximum number of tokens per prompt.
        sampling: how they are sampled.
        vocab_size: only tokens below it are sampled (a tokenizer may have fewer than the model); None for all.
        compiled: whether to compile the decode step; None compiles it for at least `COMPILED_FROM` tokens.
        after: the prompt cache of the prefix, as `PromptCache.broadcast` takes it; None for no prefix.
        on_end: called with the prompt cache of the whole text, after the last token or when the generator is closed.

    Raises:
        SeqmixError: there is no prompt, or a prompt is empty, or its logits are not finite.
        CompileError: `compiled` is True and the compiler fails; with None, that is a warning.
    """
    if max_new_tokens < 1:
        raise SeqmixError(f"max_new_tokens must be at least 1, and is {max_new_tokens}")
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    before, texts = (PromptCache.empty(1) if after is None else after).broadcast(prompts)
    logits, state = before.prefill(model, texts, more=max_new_tokens)
    if not logits.isfinite().all():
        raise SeqmixError("the model gives logits that are not finite: its parameters are damaged or have diverged")
    decoder = Decoder(model, state, compiled=compiled is True)
    by_itself = compiled is None and all(block.mixer.traits.compiles for block in model.blocks)
    compile_at = compiled_after(max_new_tokens) if by_itself else None
    written: list[Tensor] = []
    for left in range(max_new_tokens, 0, -1):
        token = sample(logits[:, :vocab_size], sampling, generator)
        written.append(token)
        try:
            yield token
        except GeneratorExit:  # the caller has closed the generator
            break
        if left == 1:
            break
        if len(written) == GATHERED:
            before, texts = _extended(before, None, texts, written)
            written.clear()
        if max_new_tokens - left + 1 == compile_at:
            decoder = Decoder(model, decoder.state, compiled=True)
        try:
            logits = decoder.step(token)
        except CompileError as error:
            if compiled is not None:
                raise
            warnings.warn(f"{error}: tokens are generated uncompiled, which takes longer", stacklevel=2)
            decoder = Decoder(model, decoder.state)
            logits = decoder.step(token)
    if on_end is not None:
        on_end(_extended(before, decoder.state, texts, written)[0])


def _extended(
    before: PromptCache, state: ModelState | None, texts: Sequence[Tensor], written: Sequence[Tensor]
) -> tuple[PromptCache, list[Tensor]]:
    """The cache after texts and the tokens that follow them, and the last token of each, which the next begins with."""
    new = torch.stack(list(written), dim=1).cpu()
    whole = [torch.cat(parts) for parts in zip(texts, new, strict=True)]
    return before.extend(state, whole), [text[-1:] for text in whole]


def stream_text(
    model: LanguageModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    compiled: bool | None = None,
    after: PromptCache | None = None,
    on_end: Callable[[PromptCache], object] | None = None,
) -> Iterator[list[str]]:
    """Continue texts; yield the new piece of each at every step ("" where there is none).

    Args:
        model: the model, whose `tokenizer` encodes and decodes; its training mode is the caller's.
        prompts: the texts; a prompt may be empty after a prefix only.
        max_new_tokens: the maximum number of tokens per text.
        sampling: how they are sampled.
        stop: stop strings; a text ends before the first that appears in it.
        compiled: as in `generate_tokens`, but that None never compiles where a stop text may end the text any time.
        after: the prompt cache of the prefix, from `cache_text` or `on_end`: one text for all prompts, or one per
            prompt; without prompts, its texts are continued.
        on_end: called at the end with the prompt cache of the whole text, a stop string included.

    Raises:
        SeqmixError: there is no prompt, or a prompt is empty; the model has no tokenizer, or a smaller vocabulary than
            its tokenizer.
    """
    if isinstance(stop, str):
        raise SeqmixError(f"stop is a list of texts: give [{stop[:20]!r}]")
    tokenizer = _tokenizer(model)
    encoded = _encoded(model, prompts, after)
    texts = [_Text(decoder, tuple(stop)) for decoder in _decoders(model, encoded, after)]
    tokens = generate_tokens(
        model,
        encoded,
        max_new_tokens=max_new_tokens,
        sampling=sampling or Sampling(),
        vocab_size=tokenizer.text_tokens,
        compiled=False if compiled is None and stop else compiled,
        after=after,
        on_end=on_end,
    )
    with closing(tokens):
        for step in tokens:
            yield [text.add(token) for text, token in zip(texts, step.tolist(), strict=True)]
            if all(text.stopped for text in texts):
                return
    yield [text.add(None) for text in texts]


def cache_text(model: LanguageModel, prompts: Sequence[str], *, after: PromptCache | None = None) -> PromptCache:
    """Prefill texts without generating: `stream_text` continues them, any number of times.

    Args:
        model: the model, whose `tokenizer` encodes.
        prompts: the texts, not empty.
        after: as in `stream_text`.

    Raises:
        SeqmixError: as `stream_text`.
    """
    return cache_tokens(model, _encoded(model, prompts, after), after=after)


def _tokenizer(model: LanguageModel) -> Tokenizer:
    if model.tokenizer is None:
        raise SeqmixError("the tokens of this model stand for no text, for it has learned a task: there is no prompt")
    return model.tokenizer


def _encoded(model: LanguageModel, prompts: Sequence[str], after: PromptCache | None) -> list[Int[Tensor, " T"]]:
    """The tokens of prompts; the begin token opens a text without a prefix."""
    tokenizer = _tokenizer(model)
    if isinstance(prompts, str):
        raise SeqmixError(f"prompts is a list of texts: give [{prompts[:20]!r}]")
    if after is None and any(not prompt for prompt in prompts):
        raise SeqmixError("the prompt is empty: give at least one character")
    if model.config.vocab_size < tokenizer.vocab_size:
        raise SeqmixError(
            f"text needs a model of {tokenizer.vocab_size} tokens ({tokenizer.unit}), and this one has "
            f"{model.config.vocab_size}"
        )
    return [tokenizer.encode(prompt)[0 if after is None else 1 :] for prompt in prompts]


def _decoders(
    model: LanguageModel, prompts: Sequence[Int[Tensor, " T"]], after: PromptCache | None
) -> list[TextDecoder]:
    """A decoder per text, which has seen the last tokens of the prefix: they may be half a character."""
    tokenizer = _tokenizer(model)
    if after is None:
        return [tokenizer.decoder() for _ in prompts]
    before, texts = after.broadcast(prompts)
    decoders = [tokenizer.decoder() for _ in texts]
    for decoder, *parts in zip(decoders, before.recent[:, :-1], texts, strict=True):
        for token in torch.cat(parts)[-RECENT:].tolist():
            if 0 <= token < tokenizer.text_tokens:
                decoder(token)
    return decoders


class _Text:
    """One text as it grows: decodes tokens, and holds back what may begin a stop string."""

    def __init__(self, decoder: TextDecoder, stop: tuple[str, ...]) -> None:
        self.decoder = decoder
        self.stop = tuple(text for text in stop if text)
        self.held = ""
        self.stopped = False

    def add(self, token: int | None) -> str:
        """The text that is certain after one more token; None ends the text."""
        if self.stopped:
            return ""
        self.held += self.decoder(token)
        ends = [at for text in self.stop if (at := self.held.find(text)) >= 0]
        if ends:
            self.stopped = True
            return self.held[: min(ends)]
        # the end of the held text may be the start of a stop string
        starts = (text[:n] for text in self.stop for n in range(1, len(text))) if token is not None else ()
        certain = len(self.held) - max((len(start) for start in starts if self.held.endswith(start)), default=0)
        piece = self.held[:certain]
        self.held = self.held[certain:]
        return piece


def generate_text(model: LanguageModel, prompts: Sequence[str], **options: Any) -> list[str]:
    """The whole continuations of `stream_text`."""
    pieces = list(stream_text(model, prompts, **options))
    return ["".join(parts) for parts in zip(*pieces, strict=True)]
