"""RULER's tasks that need neither essays nor a list of words (Hsieh et al. 2024, arXiv 2404.06654), as bytes."""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from string import ascii_lowercase, ascii_uppercase
from typing import Literal

import numpy as np
from pydantic import Field

from ...models import ByteTokenizer
from ..task import Difficulties, TaskConfig

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {}s for {} is: {}."
ASKED = "The special magic {} for {} mentioned in the text is: "
SHORTEST = {"niah_single_1": 192, "niah_multikey_2": 192, "niah_multikey_3": 320, "vt": 224, "cwe": 1024, "fwe": 640}
"""Bytes that any example of a task fits into."""
VARIABLES = 5
COMMON = 10
FREQUENT = 3
"""Answers of `vt`, `cwe` and `fwe`."""
Rng = np.random.Generator


class RulerConfig(TaskConfig):
    """Tasks of RULER (arXiv 2404.06654): the answer to a question at the end of a text is the target, byte by byte.

    `niah_single_1` asks for the number of a key in repeated noise; `niah_multikey_2` among other needles alone,
    `niah_multikey_3` with UUIDs as keys and values; `vt` for the variables that get one value by four assignments;
    `cwe` for the ten common words of a list, in alphabetical order; `fwe` for the three most frequent of words whose
    counts fall with the square of their rank, but the first. Words are random letters, and instructions are left out.
    """

    field = "lengths"
    axis = "length"
    kind: Literal["ruler"] = "ruler"
    sequence_length: int = Field(default=1024, gt=0, le=2**20)
    """Training sequence length in bytes."""
    task: Literal["niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"] = "niah_single_1"
    """The task, by its name there."""
    lengths: Difficulties | None = None
    """Most bytes of an example, which rows cycle through; null for the whole sequence. `evaluate_at` may be longer."""

    @property
    def n_tokens(self) -> int:
        return ByteTokenizer.vocab_size

    @property
    def hardest(self) -> int:
        return self.sequence_length if self.sequence_length >= SHORTEST[self.task] else 0

    def require(self, difficulty: int) -> None:
        if difficulty < SHORTEST[self.task]:
            raise ValueError(f"length of {self.task} must be {SHORTEST[self.task]} or more, and is {difficulty}")

    def fill(self, rng: Rng, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        makers = {"vt": _variables, "cwe": _common, "fwe": _frequent}
        make = makers.get(self.task, partial(_needle, task=self.task))
        for row, wanted in zip(inputs, targets, strict=True):
            text, answer = make(rng, difficulty)
            end = len(text) - 1
            row[:end], wanted[end - len(answer) : end] = list(text[:-1].encode()), list(answer.encode())

    def solve(self, tokens: list[int]) -> dict[int, int]:
        body, _, question = bytes(token for token in tokens if token).decode().rpartition("\n")
        asked = question[: question.index(": ") + 2]
        words = re.findall("[a-z]{6}", body)
        if self.task.startswith("niah"):
            key = asked.split(" for ")[1].split(" ")[0]
            answer = body.split(f" for {key} is: ")[1].split(".")[0]
        elif self.task == "vt":
            values: dict[str, str] = {}
            for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", body):
                values[name] = str(values.get(value, value))
            answer = " ".join(name for name, value in values.items() if value == asked.split(" ")[-2].rstrip(":"))
        else:
            most = [word for word, _ in Counter(words).most_common(COMMON if self.task == "cwe" else FREQUENT)]
            answer = " ".join(sorted(most) if self.task == "cwe" else most)
        return {len(body) + len(asked) + i: ord(letter) for i, letter in enumerate(answer)}

    def name_of(self, token: int) -> str:
        return chr(token) if 32 < token < 127 else "␣"


def _word(rng: Rng, letters: str = ascii_lowercase, count: int = 6) -> str:
    return "".join(letters[i] for i in rng.integers(len(letters), size=count))


def _uuid(rng: Rng) -> str:
    digits = rng.bytes(16).hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _hidden(rng: Rng, lines: list[str], filler: Callable[[], str], room: int) -> str:
    """Lines in their order at random places among as much filler as there is room for."""
    others: list[str] = []
    room -= sum(len(line) + 1 for line in lines)
    while (room := room - len(line := filler()) - 1) >= 0:
        others.append(line)
    places = sorted(rng.integers(len(others) + 1, size=len(lines)).tolist())
    for place, line in reversed(list(zip(places, lines, strict=True))):
        others.insert(place, line)
    return "".join(f"{line}\n" for line in others)


def _needle(rng: Rng, length: int, task: str) -> tuple[str, str]:
    """The text with question and answer, and the answer; of the other tasks too."""
    coded = task == "niah_multikey_3"

    def draw() -> tuple[str, str, str]:
        if coded:
            return "uuid", _uuid(rng), _uuid(rng)
        return "number", f"{_word(rng)}-{_word(rng)}", str(rng.integers(10**6, 10**7))

    what, key, answer = draw()
    asked = ASKED.format(what, key)
    noise = NOISE if task == "niah_single_1" else None
    text = _hidden(
        rng, [NEEDLE.format(what, key, answer)], lambda: noise or NEEDLE.format(*draw()), length - len(asked + answer)
    )
    return text + asked + answer, answer


def _variables(rng: Rng, length: int) -> tuple[str, str]:
    names = [_word(rng, ascii_uppercase, 5) for _ in range(VARIABLES)]
    value = str(rng.integers(10**4, 10**5))
    lines = [
        f"VAR {name} = {before}" for name, before in zip(names, [value, *(f"VAR {n}" for n in names)], strict=False)
    ]
    asked = f"Variables that are assigned the value {value}: "
    answer = " ".join(names)
    return _hidden(rng, lines, lambda: NOISE, length - len(asked + answer)) + asked + answer, answer


def _common(rng: Rng, length: int) -> tuple[str, str]:
    many, few = (30, 3) if length >= 8192 else (6, 1)
    common = sorted(_word(rng) for _ in range(COMMON))
    asked = "The 10 most common words in the list are: "
    answer = " ".join(common)
    words = common * many
    room = length - len(asked + answer) - 1
    # entries have a word of six letters, two spaces, and a number
    size = sum(len(str(n)) + 8 for n in range(1, len(words) + 1))
    while (size := size + sum(len(str(n)) + 8 for n in range(len(words) + 1, len(words) + few + 1))) <= room:
        words += [_word(rng)] * few
    text = "".join(f"{n} {words[i]} " for n, i in enumerate(rng.permutation(len(words)), 1))
    return text + "\n" + asked + answer, answer


def _frequent(rng: Rng, length: int) -> tuple[str, str]:
    asked = "The three most frequently appeared words are: "
    count = (length - len(asked)) // 7 - FREQUENT - 1
    sizes = (count * 6 / np.pi**2 * np.arange(1.0, count + 1) ** -2).astype(int)
    ranked = ["......", *(_word(rng) for _ in sizes[1:])]
    words = [word for word, size in zip(ranked, sizes, strict=True) for _ in range(size)]
    answer = " ".join(ranked[1 : FREQUENT + 1])
    return " ".join(words[i] for i in rng.permutation(len(words))) + "\n" + asked + answer, answer
