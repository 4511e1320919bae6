"""Synthetic tasks: generated sequences with known answers, graded by difficulty.

Training and evaluation draw from differently seeded generators, so that their examples differ.
"""

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
from jaxtyping import Int64
from pydantic import Field, model_validator

from ..models import IGNORED
from .corpus import Corpus
from .source import Batch, DataConfig, Examples, Source, blank, share

TRAINING = 1
EVALUATION = 2
ORDER = 3
"""First words of the seeds of both splits, and of the order of a training split."""
BLOCK = 64
"""Evaluation examples generated together: example i of a difficulty does not depend on how many are generated."""

Difficulties = Annotated[tuple[Annotated[int, Field(ge=0, le=2**20)], ...], Field(min_length=1)]


class TaskConfig(DataConfig):
    """A task. A subclass defines its difficulty, generates examples, and solves them."""

    field: ClassVar[str]
    """The field with the difficulties of training; null is the hardest that fits into a sequence."""
    axis: ClassVar[str]
    """The name of the difficulty in evaluations."""
    easiest: ClassVar[int] = 1
    """The smallest difficulty."""
    sequence_length: int = Field(default=64, gt=0, le=2**20)
    """Training sequence length in tokens."""
    evaluate_at: Difficulties | None = None
    """Difficulties of evaluations, in sequences as long as they need; null for those of training."""
    evaluation_examples: int = Field(default=1024, gt=0)
    """Examples of a full evaluation, over all difficulties."""
    training_examples: int | None = Field(default=None, gt=0)
    """Examples of the training split, which every epoch reads in the same batches, in another order; whole batches of
    it are used. Null generates new ones in every step."""

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """Vocabulary size: tokens are 0 to n_tokens - 1."""

    @abstractmethod
    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        """Generate examples of one difficulty, in place.

        Args:
            rng: the random generator.
            inputs: [B T], token 0 everywhere, or the text of the task; T is at least `length_of(difficulty)`.
            targets: [B T], `IGNORED` everywhere; fill in those that are asked.
            difficulty: the difficulty.
        """

    def fill_training(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        """Generate examples of the training split, in place; by default they are as those of evaluation."""
        self.fill(rng, inputs, targets, difficulty)

    @abstractmethod
    def solve(self, tokens: list[int]) -> dict[int, int]:
        """The targets of one example by position, computed from its tokens by a plain program; it may include more."""

    def length_of(self, difficulty: int) -> int:
        """Minimum sequence length of a difficulty, non-decreasing."""
        return difficulty

    @property
    def hardest(self) -> int:
        """The largest difficulty that fits into a training sequence; 0 if none does."""
        length = self.sequence_length
        fitting = bisect_right(range(self.easiest, length + 1), length, key=self.length_of)
        return self.easiest + fitting - 1 if fitting else 0

    def require(self, difficulty: int) -> None:
        """Refuse a difficulty that the task does not have.

        Raises:
            ValueError: it does not.
        """
        if difficulty < self.easiest:
            raise ValueError(f"{self.axis} must be {self.easiest} or more, and is {difficulty}")

    def name_of(self, token: int) -> str:
        """What a token is called in pictures."""
        return str(token)

    @property
    def difficulties(self) -> tuple[int, ...]:
        """Those of training."""
        return getattr(self, self.field) or (self.hardest,)

    def open(self, vocab_size: int, run: Path | None = None) -> Source:
        return Task(self)

    def require_fit(self, vocab_size: int) -> None:
        if vocab_size < self.n_tokens:
            raise ValueError(
                f"data.kind {self.kind} has {self.n_tokens} tokens as it is configured, and model.vocab_size is "
                f"{vocab_size}"
            )

    @model_validator(mode="after")
    def _difficulties_fit(self) -> Self:
        given: tuple[int, ...] | None = getattr(self, self.field)
        if given is None and self.hardest < 1:
            raise ValueError(f"sequence_length {self.sequence_length} is too short for an example of {self.kind}")
        for name, values in ((self.field, given), ("evaluate_at", self.evaluate_at)):
            for value in values or ():
                self.require(value)
            if values is not None and len(set(values)) < len(values):
                raise ValueError(f"{name} has a difficulty twice: {list(values)}")
        for value in self.difficulties:
            if (needed := self.length_of(value)) > self.sequence_length:
                fits = f", or take {self.axis} {self.hardest} at most" if 0 < self.hardest < value else ""
                raise ValueError(
                    f"an example of {self.kind} with {self.axis} {value} takes {needed} tokens, and sequence_length is "
                    f"{self.sequence_length}: raise it{fits}"
                )
        return self


class NextTokenConfig(TaskConfig):
    """A task whose training may predict every token, as a language model does."""

    train_on: Literal["answers", "every_token"] = "answers"
    """What the loss of training covers; evaluations measure answers alone."""

    def fill_training(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        super().fill_training(rng, inputs, targets, difficulty)
        self.supervise(inputs, targets)

    def supervise(self, inputs: np.ndarray, targets: np.ndarray) -> None:
        """Make every next token a target, where the loss of training covers it."""
        if self.train_on == "every_token":
            targets[:, :-1] = inputs[:, 1:]


class Task(Source):
    """An opened task, which generates examples on the fly.

    Args:
        config: the task.
        corpus: a text that sequences are filled with first, from its training or validation split; None for token 0.
    """

    def __init__(self, config: TaskConfig, corpus: Corpus | None = None) -> None:
        self.config = config
        self.name = f"the task {config.kind}"
        self.vocab_size = config.n_tokens
        self.corpus = corpus
        self.tokenizer = None if corpus is None else corpus.tokenizer

    @property
    def summary(self) -> str:
        config = self.config
        text = "" if self.corpus is None else f", in {self.corpus.name}"
        trained, measured = (", ".join(map(str, d)) for d in (config.difficulties, self._measured))
        return f"{config.axis} {trained} in {config.sequence_length:,} tokens, measured at {measured}{text}"

    def fill(
        self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int, *, validation: bool
    ) -> None:
        """Generate examples of one split."""
        if self.corpus is not None:
            stream = self.corpus.validation if validation else self.corpus.train
            length = inputs.shape[1]
            starts = rng.integers(max(len(stream) - length, 1), size=len(inputs))
            for row, start in zip(inputs, starts.tolist(), strict=True):
                row[:] = np.resize(stream[start : start + length], length)
        (self.config.fill if validation else self.config.fill_training)(rng, inputs, targets, difficulty)

    def training_batch(self, step: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The examples of one step; rows cycle through the difficulties."""
        wanted = share(batch_size, rank, world_size)
        difficulties = self.config.difficulties
        if self.config.training_examples is not None:
            batches = max(self.config.training_examples // batch_size, 1)
            order = np.random.default_rng([ORDER, seed, step // batches]).permutation(batches)
            step = int(order[step % batches])
        rng = np.random.default_rng([TRAINING, seed, step])
        inputs, targets = blank(batch_size, self.config.sequence_length)
        for number, difficulty in enumerate(difficulties):
            rows = slice((number - step * batch_size) % len(difficulties), None, len(difficulties))
            self.fill(rng, inputs[rows], targets[rows], difficulty, validation=False)
        return Batch(torch.from_numpy(inputs[wanted]), torch.from_numpy(targets[wanted]))

    def evaluation_batches(self, batch_size: int, limit: int | None, length: int | None = None) -> Iterator[Examples]:
        """The same examples in every run, equally many of each difficulty."""
        config = self.config
        trained = length or self.config.sequence_length
        wanted = config.evaluation_examples if limit is None else min(limit * batch_size, config.evaluation_examples)
        each = -(-wanted // len(self._measured))
        widths = {difficulty: max(trained, config.length_of(difficulty)) for difficulty in self._measured}
        for width in dict.fromkeys(widths.values()):
            group = [difficulty for difficulty in widths if widths[difficulty] == width]
            made = [self._validation_rows(each, difficulty, width) for difficulty in group]
            inputs, targets = (np.concatenate(side) for side in zip(*made, strict=True))
            names = np.repeat([str(difficulty) for difficulty in group], each)
            size = max(batch_size * trained // width, 1)
            for at in range(0, len(inputs), size):
                # the last batch is padded to full size, which compiled models need
                rows = np.resize(np.arange(at, min(at + size, len(inputs))), size)
                batch = Batch(torch.from_numpy(inputs[rows]), torch.from_numpy(targets[rows]))
                batch.targets[len(inputs) - at :] = IGNORED
                yield Examples(batch, {config.axis: names[rows].tolist()})

    @property
    def _measured(self) -> tuple[int, ...]:
        return self.config.evaluate_at or self.config.difficulties

    def _validation_rows(self, count: int, difficulty: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The first examples of a difficulty."""
        inputs, targets = blank(count + -count % BLOCK, length)
        for part, at in enumerate(range(0, count, BLOCK)):
            rng = np.random.default_rng([EVALUATION, difficulty, part])
            rows = slice(at, at + BLOCK)
            self.fill(rng, inputs[rows], targets[rows], difficulty, validation=True)
        return inputs[:count], targets[:count]


def letter(symbol: int, symbols: range) -> str:
    """The name of a symbol: a to z if there are enough letters, else the number of its token."""
    return ascii_lowercase[symbols.index(symbol)] if len(symbols) <= len(ascii_lowercase) else str(symbol)


def distinct(rng: np.random.Generator, rows: int, choices: int, count: int) -> Int64[np.ndarray, "B N"]:
    """`count` different numbers below `choices` in each row, in any order."""
    drawn = rng.random((rows, choices))
    fewest = np.argpartition(drawn, min(count, choices - 1), axis=1)[:, :count]
    order = np.take_along_axis(drawn, fewest, axis=1).argsort(axis=1)
    return np.take_along_axis(fewest, order, axis=1)
