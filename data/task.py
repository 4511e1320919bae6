"""Synthetic tasks: generated sequences with known answers, graded by difficulty.

Training and evaluation seed their random generators differently, so their examples differ.
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
"""First number of the seeds of training examples."""
EVALUATION = 2
"""First number of the seeds of evaluation examples."""
ORDER = 3
"""First number of the seeds of the order of a fixed training split."""
BLOCK = 64
"""Number of evaluation examples generated together, so that example i does not depend on how many are generated."""

Difficulties = Annotated[tuple[Annotated[int, Field(ge=0, le=2**20)], ...], Field(min_length=1)]


class TaskConfig(DataConfig):
    """A synthetic task. A subclass defines its difficulty, generates examples, and solves them."""

    field: ClassVar[str]
    """Name of the field with the training difficulties; null there means the hardest that fits into a sequence."""
    axis: ClassVar[str]
    """Name of the difficulty in evaluations."""
    easiest: ClassVar[int] = 1
    """Smallest difficulty that the task has."""
    sequence_length: int = Field(default=64, gt=0, le=2**20)
    """Training sequence length in tokens."""
    evaluate_at: Difficulties | None = None
    """Difficulties to evaluate at, in sequences that are lengthened as needed; null for the training difficulties."""
    evaluation_examples: int = Field(default=1024, gt=0)
    """Number of examples in a full evaluation, over all difficulties."""
    training_examples: int | None = Field(default=None, gt=0)
    """Size of a fixed training split, rounded down to whole batches; every epoch reads the same batches in another
    order. Null generates new examples in every step."""

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """Vocabulary size of the task: tokens are 0 to n_tokens - 1."""

    @abstractmethod
    def fill(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        """Generate examples of one difficulty, in place.

        Args:
            rng: the random generator.
            inputs: [B T], filled with token 0, or with the text around the example; T >= `length_of(difficulty)`.
            targets: [B T], filled with `IGNORED`; write the answers at the positions that the task asks about.
            difficulty: the difficulty.
        """

    def fill_training(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        """Generate training examples of one difficulty, in place; by default in the same way as for evaluation."""
        self.fill(rng, inputs, targets, difficulty)

    @abstractmethod
    def solve(self, tokens: list[int]) -> dict[int, int]:
        """Compute the targets of one example from its tokens, by position, with a plain program.

        The result may include positions that the example does not ask about.
        """

    def length_of(self, difficulty: int) -> int:
        """Return the minimum sequence length of a difficulty; it must not decrease with the difficulty."""
        return difficulty

    @property
    def hardest(self) -> int:
        """Largest difficulty that fits into a training sequence; 0 if not even the easiest fits."""
        length = self.sequence_length
        fitting = bisect_right(range(self.easiest, length + 1), length, key=self.length_of)
        return self.easiest + fitting - 1 if fitting else 0

    def require(self, difficulty: int) -> None:
        """Check that the task has this difficulty.

        Raises:
            ValueError: the difficulty is out of range.
        """
        if difficulty < self.easiest:
            raise ValueError(f"{self.axis} must be {self.easiest} or more, got {difficulty}")

    def name_of(self, token: int) -> str:
        """Return the label of a token in pictures."""
        return str(token)

    @property
    def difficulties(self) -> tuple[int, ...]:
        """Training difficulties."""
        return getattr(self, self.field) or (self.hardest,)

    def open(self, vocab_size: int, run: Path | None = None) -> Source:
        return Task(self)

    def require_fit(self, vocab_size: int) -> None:
        if vocab_size < self.n_tokens:
            raise ValueError(
                f"data.kind {self.kind} as configured has {self.n_tokens} tokens, got model.vocab_size {vocab_size}: "
                f"set model.vocab_size={self.n_tokens} or more"
            )

    @model_validator(mode="after")
    def _difficulties_fit(self) -> Self:
        configured: tuple[int, ...] | None = getattr(self, self.field)
        if configured is None and self.hardest < 1:
            raise ValueError(
                f"sequence_length {self.sequence_length} is too short for an example of {self.kind}: increase it"
            )
        for name, values in ((self.field, configured), ("evaluate_at", self.evaluate_at)):
            for value in values or ():
                self.require(value)
            if values is not None and len(set(values)) < len(values):
                raise ValueError(f"{name} must not repeat a difficulty, got {list(values)}")
        for value in self.difficulties:
            if (needed := self.length_of(value)) > self.sequence_length:
                hint = f", or use {self.axis} {self.hardest} or less" if 0 < self.hardest < value else ""
                raise ValueError(
                    f"an example of {self.kind} with {self.axis} {value} needs {needed} tokens, got sequence_length "
                    f"{self.sequence_length}: increase sequence_length{hint}"
                )
        return self


class NextTokenConfig(TaskConfig):
    """A task that can also be trained on every next token, like a language model."""

    train_on: Literal["answers", "every_token"] = "answers"
    """Targets of the training loss: the answers only, or every next token. Evaluations always use the answers only."""

    def fill_training(self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        super().fill_training(rng, inputs, targets, difficulty)
        self.supervise(inputs, targets)

    def supervise(self, inputs: np.ndarray, targets: np.ndarray) -> None:
        """Make every next token a target, in place, if `train_on` is `every_token`."""
        if self.train_on == "every_token":
            targets[:, :-1] = inputs[:, 1:]


class Task(Source):
    """An opened task, which generates examples on the fly.

    Args:
        config: the configuration of the task.
        corpus: a text around the examples: sequences are filled from its training or validation split before the
            example is written. None fills them with token 0.
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
        trained = ", ".join(map(str, config.difficulties))
        evaluated = ", ".join(map(str, self._evaluation_difficulties))
        return f"{config.axis} {trained} in {config.sequence_length:,} tokens, evaluated at {evaluated}{text}"

    def fill(
        self, rng: np.random.Generator, inputs: np.ndarray, targets: np.ndarray, difficulty: int, *, validation: bool
    ) -> None:
        """Generate examples of one difficulty for the training or the validation split, in place."""
        if self.corpus is not None:
            stream = self.corpus.validation if validation else self.corpus.train
            length = inputs.shape[1]
            starts = rng.integers(max(len(stream) - length, 1), size=len(inputs))
            for row, start in zip(inputs, starts.tolist(), strict=True):
                row[:] = np.resize(stream[start : start + length], length)
        (self.config.fill if validation else self.config.fill_training)(rng, inputs, targets, difficulty)

    def training_batch(self, step: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return the examples of one step; rows cycle through the difficulties."""
        of_rank = share(batch_size, rank, world_size)
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
        return Batch(torch.from_numpy(inputs[of_rank]), torch.from_numpy(targets[of_rank]))

    def evaluation_batches(self, batch_size: int, limit: int | None, length: int | None = None) -> Iterator[Examples]:
        """Yield the same examples in every run, equally many of each difficulty."""
        config = self.config
        difficulties = self._evaluation_difficulties
        trained = length or self.config.sequence_length
        total = config.evaluation_examples if limit is None else min(limit * batch_size, config.evaluation_examples)
        per_difficulty = -(-total // len(difficulties))
        lengths = {difficulty: max(trained, config.length_of(difficulty)) for difficulty in difficulties}
        for group_length in dict.fromkeys(lengths.values()):
            group = [difficulty for difficulty in lengths if lengths[difficulty] == group_length]
            examples = [self._validation_rows(per_difficulty, difficulty, group_length) for difficulty in group]
            inputs, targets = (np.concatenate(side) for side in zip(*examples, strict=True))
            names = np.repeat([str(difficulty) for difficulty in group], per_difficulty)
            size = max(batch_size * trained // group_length, 1)
            for at in range(0, len(inputs), size):
                # the last batch is padded to full size, which compiled models need
                rows = np.resize(np.arange(at, min(at + size, len(inputs))), size)
                batch = Batch(torch.from_numpy(inputs[rows]), torch.from_numpy(targets[rows]))
                batch.targets[len(inputs) - at :] = IGNORED
                yield Examples(batch, {config.axis: names[rows].tolist()})

    @property
    def _evaluation_difficulties(self) -> tuple[int, ...]:
        return self.config.evaluate_at or self.config.difficulties

    def _validation_rows(self, count: int, difficulty: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets of the first `count` validation examples of a difficulty, [count, length] each."""
        inputs, targets = blank(count + -count % BLOCK, length)
        for part, at in enumerate(range(0, count, BLOCK)):
            rng = np.random.default_rng([EVALUATION, difficulty, part])
            rows = slice(at, at + BLOCK)
            self.fill(rng, inputs[rows], targets[rows], difficulty, validation=True)
        return inputs[:count], targets[:count]


def letter(symbol: int, symbols: range) -> str:
    """Return the label of a symbol: a letter from a to z if there are at most 26 symbols, else its token's number."""
    return ascii_lowercase[symbols.index(symbol)] if len(symbols) <= len(ascii_lowercase) else str(symbol)


def distinct(rng: np.random.Generator, rows: int, choices: int, count: int) -> Int64[np.ndarray, "B N"]:
    """Draw `count` different numbers below `choices` for each row, in random order."""
    keys = rng.random((rows, choices))
    smallest = np.argpartition(keys, min(count, choices - 1), axis=1)[:, :count]
    order = np.take_along_axis(keys, smallest, axis=1).argsort(axis=1)
    return np.take_along_axis(smallest, order, axis=1)
