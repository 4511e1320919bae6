"""Generation: prompts are prefilled in one pass, then every token takes one recurrent decode step."""

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..registry import SeqmixError
from .compiling import CompileError
from .decoding import Decoder, compiled_after
from .language_model import LanguageModel, ModelState
from .prompt_cache import RECENT, PromptCache, cache_tokens
from .sampling import Sampler, Sampling
from .speculation import Speculation, Speculator
from .tokenizer import TextDecoder, Tokenizer

MAX_TOKENS_IN_MEMORY = 256
"""Number of new tokens in memory, above which only their count and the last ones are kept."""


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
    speculation: Speculation | None = None,
) -> Generator[Int[Tensor, " N"], None, None]:
    """Yield the next token of every prompt, one step at a time; close the generator to stop early.

    Args:
        model: the model; the caller sets its training mode.
        prompts: N prompts of any lengths >= 1.
        max_new_tokens: the maximum number of tokens per prompt.
        sampling: the settings for sampling.
        vocab_size: only tokens below it are sampled (a tokenizer may have fewer than the model); None for all.
        compiled: True to compile the decode step, False to run it eagerly; None compiles it on a CPU after
            some tokens, if so many more may follow that this saves time (`compiled_after`).
        after: the prompt cache of the prefix, combined with the prompts as in `PromptCache.broadcast`; None for no
            prefix.
        on_end: called with the prompt cache of the whole text, after the last token or when the generator is closed.
        speculation: the settings of speculative decoding, which gives the same tokens; None for plain decoding.

    Raises:
        SeqmixError: `prompts` is empty, a prompt is empty, the logits of a prompt are not finite, or the draft model
            has another vocabulary.
        CompileError: `compiled` is True and the compiler fails; if it is None, a warning is shown instead.
    """
    if max_new_tokens < 1:
        raise SeqmixError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    before, texts = (PromptCache.empty(1) if after is None else after).broadcast(prompts)
    room = max_new_tokens + (0 if speculation is None else speculation.block)
    logits, state = before.prefill(model, texts, more=room)
    if not logits.isfinite().all():
        raise SeqmixError("the model's logits are not finite: its parameters are damaged or have diverged")
    sampler = Sampler(sampling, len(texts), model.device)
    if speculation is not None:
        first = sampler.next_tokens(logits[:, :vocab_size]).tolist()
        known = [[*recent, *text.tolist()] for recent, text in zip(before.recent_tokens(), texts, strict=True)]
        speculator = Speculator(
            model,
            state,
            known,
            first,
            sampler,
            speculation,
            max_new_tokens=max_new_tokens,
            vocab_size=vocab_size,
            compiled=compiled is True,
        )
        yield from _speculated(speculator, before, texts, on_end)
        return
    decoder = Decoder(model, state, compiled=compiled is True)
    compile_at = compiled_after(model, len(texts), max_new_tokens) if compiled is None else None
    new_tokens: list[Tensor] = []
    for count in range(1, max_new_tokens + 1):
        token = sampler.next_tokens(logits[:, :vocab_size])
        new_tokens.append(token)
        try:
            yield token
        except GeneratorExit:  # the caller has closed the generator
            break
        if count == max_new_tokens:
            break
        if len(new_tokens) == MAX_TOKENS_IN_MEMORY:
            before, texts = _extended(before, None, texts, new_tokens)
            new_tokens.clear()
        if count == compile_at:
            decoder = Decoder(model, decoder.state, compiled=True)
        try:
            logits = decoder.step(token)
        except CompileError as error:
            if compiled is not None:
                raise
            warnings.warn(f"{error}: generating uncompiled, which is slower", stacklevel=2)
            decoder = Decoder(model, decoder.state)
            logits = decoder.step(token)
    if on_end is not None:
        on_end(_extended(before, decoder.state, texts, new_tokens)[0])


def _speculated(
    speculator: Speculator,
    before: PromptCache,
    texts: Sequence[Tensor],
    on_end: Callable[[PromptCache], object] | None,
) -> Iterator[Tensor]:
    """Yield the next token of every text; the arguments are those of `generate_tokens` and `_extended`."""
    new_tokens: list[Tensor] = []
    for step in speculator.steps():
        new_tokens.append(torch.tensor(step, device=speculator.model.device))
        try:
            yield new_tokens[-1]
        except GeneratorExit:
            break
    if on_end is not None:
        # the speculator may be ahead of its caller, and one text ahead of another: read the whole texts once more
        new = torch.stack(new_tokens, dim=1).cpu()
        whole = [torch.cat(parts) for parts in zip(texts, new, strict=True)]
        _, state = before.prefill(speculator.model, [text[:-1] for text in whole], more=0)
        on_end(before.extend(state, whole))


def _extended(
    before: PromptCache, state: ModelState | None, texts: Sequence[Tensor], new_tokens: Sequence[Tensor]
) -> tuple[PromptCache, list[Tensor]]:
    """Return the cache after texts and new tokens, and the last token of each text, from which the next ones continue.

    Args:
        before: the cache before the texts.
        state: the state after all tokens but the last; None if it is not needed yet.
        texts: the tokens of each of the N texts.
        new_tokens: the tokens that follow, [N] at each step.
    """
    new = torch.stack(list(new_tokens), dim=1).cpu()
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
    speculation: Speculation | None = None,
) -> Iterator[list[str]]:
    """Continue texts; yield the new piece of each text at every step, or "" if a text has no new characters.

    Args:
        model: the model, whose `tokenizer` encodes and decodes; the caller sets its training mode.
        prompts: the texts; a prompt may be empty only after a prefix.
        max_new_tokens: the maximum number of tokens per text.
        sampling: the settings for sampling; None for the defaults.
        stop: stop strings; a text ends before the first one that appears in it.
        compiled: as in `generate_tokens`, except that None does not compile if there are stop strings, because the text
            may then end at any time.
        after: the prompt cache of the prefix, from `cache_text` or `on_end`: one text for all prompts, or one per
            prompt; without prompts, the cached texts are continued.
        on_end: called at the end with the prompt cache of the whole text, which includes a stop string.
        speculation: the settings of speculative decoding, which gives the same text; None for plain decoding.

    Raises:
        SeqmixError: `prompts` is empty, a prompt is empty, the model has no tokenizer, or its vocabulary is smaller
            than its tokenizer's.
    """
    if isinstance(stop, str):
        raise SeqmixError(f"stop must be a list of strings: pass [{stop[:20]!r}]")
    tokenizer = _tokenizer(model)
    encoded = _encoded(model, prompts, after)
    tokens = generate_tokens(
        model,
        encoded,
        max_new_tokens=max_new_tokens,
        sampling=sampling or Sampling(),
        vocab_size=tokenizer.text_tokens,
        compiled=False if compiled is None and stop else compiled,
        after=after,
        on_end=on_end,
        speculation=speculation,
    )
    yield from decode_stream(tokens, _decoders(model, encoded, after), stop)


def decode_stream(
    steps: Generator[Int[Tensor, " N"], None, None], decoders: Sequence[TextDecoder], stop: Sequence[str]
) -> Iterator[list[str]]:
    """Yield the new piece of each text at every step, until all texts have reached a stop string; close the steps.

    Args:
        steps: yields the next token of every text.
        decoders: one decoder per text.
        stop: stop strings.
    """
    texts = [_Text(decoder, tuple(stop)) for decoder in decoders]
    with closing(steps):
        for step in steps:
            yield [text.add(token) for text, token in zip(texts, step.tolist(), strict=True)]
            if all(text.stopped for text in texts):
                return
    yield [text.add(None) for text in texts]


def cache_text(model: LanguageModel, prompts: Sequence[str], *, after: PromptCache | None = None) -> PromptCache:
    """Prefill texts without generating; `stream_text` can continue them any number of times.

    Args:
        model: the model, whose `tokenizer` encodes.
        prompts: the texts, not empty.
        after: as in `stream_text`.

    Raises:
        SeqmixError: as in `stream_text`.
    """
    return cache_tokens(model, _encoded(model, prompts, after), after=after)


def _tokenizer(model: LanguageModel) -> Tokenizer:
    """Return the model's tokenizer; a SeqmixError if it has none."""
    if model.tokenizer is None:
        raise SeqmixError(
            "text needs a model with a tokenizer, got one trained on a task: use generate_tokens with token IDs"
        )
    return model.tokenizer


def _encoded(model: LanguageModel, prompts: Sequence[str], after: PromptCache | None) -> list[Int[Tensor, " T"]]:
    """Return the tokens of each prompt; a prompt without a prefix starts with the begin token."""
    encoded = encode_prompts(_tokenizer(model), model.config.vocab_size, prompts, may_be_empty=after is not None)
    return encoded if after is None else [tokens[1:] for tokens in encoded]


def encode_prompts(
    tokenizer: Tokenizer, vocab_size: int, prompts: Sequence[str], *, may_be_empty: bool = False
) -> list[Int[Tensor, " T"]]:
    """Return the begin token and the tokens of each prompt.

    Raises:
        SeqmixError: `prompts` is a string, a prompt is empty, or the model's vocabulary is smaller than that of the
            tokenizer.
    """
    if isinstance(prompts, str):
        raise SeqmixError(f"prompts must be a list of strings: pass [{prompts[:20]!r}]")
    if not isinstance(prompts, Iterable) or not all(isinstance(prompt, str) for prompt in prompts):
        raise SeqmixError(f"prompts must be a list of strings, got {prompts!r:.80}: generate_tokens takes token ids")
    if not may_be_empty and any(not prompt for prompt in prompts):
        raise SeqmixError("the prompt is empty: pass at least one character")
    if vocab_size < tokenizer.vocab_size:
        raise SeqmixError(
            f"text needs a model with a vocabulary of at least {tokenizer.vocab_size} {tokenizer.unit}, got "
            f"{vocab_size}"
        )
    return [tokenizer.encode(prompt) for prompt in prompts]


def _decoders(
    model: LanguageModel, prompts: Sequence[Int[Tensor, " T"]], after: PromptCache | None
) -> list[TextDecoder]:
    """Return one decoder per text, which has processed the prefix's last tokens: they may end within a character."""
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
    """Decoder of one growing text that holds back characters which may be the start of a stop string."""

    def __init__(self, decoder: TextDecoder, stop: tuple[str, ...]) -> None:
        self.decoder = decoder
        self.stop = tuple(text for text in stop if text)
        self.pending = ""
        self.stopped = False

    def add(self, token: int | None) -> str:
        """Decode one token, or None at the end of the text; return the new characters that start no stop string."""
        if self.stopped:
            return ""
        self.pending += self.decoder(token)
        ends = [at for text in self.stop if (at := self.pending.find(text)) >= 0]
        if ends:
            self.stopped = True
            return self.pending[: min(ends)]
        # the last pending characters may be the start of a stop string
        starts = (text[:n] for text in self.stop for n in range(1, len(text))) if token is not None else ()
        certain = len(self.pending) - max((len(start) for start in starts if self.pending.endswith(start)), default=0)
        piece = self.pending[:certain]
        self.pending = self.pending[certain:]
        return piece


def generate_text(model: LanguageModel, prompts: Sequence[str], **options: Any) -> list[str]:
    """Return the whole continuation of each prompt, without the prompt; `options` are those of `stream_text`."""
    pieces = list(stream_text(model, prompts, **options))
    return ["".join(parts) for parts in zip(*pieces, strict=True)]
