"""Tasks of RULER that need neither essays nor a word list (Hsieh et al. 2024, arXiv 2404.06654), as bytes."""

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
PROMPT = "The special magic {} for {} mentioned in the text is: "
SHORTEST = {"niah_single_1": 192, "niah_multikey_2": 192, "niah_multikey_3": 320, "vt": 224, "cwe": 1024, "fwe": 640}
"""Smallest length in bytes into which every example of a task fits."""
N_VARIABLES = 5
"""Number of words in the answer of `vt`."""
COMMON = 10
"""Number of words in the answer of `cwe`."""
FREQUENT = 3
"""Number of words in the answer of `fwe`."""
Rng = np.random.Generator


class RulerConfig(TaskConfig):
    """Tasks of RULER (arXiv 2404.06654): a text ends with a question; the bytes of the answer are the targets.

    `niah_single_1` asks for the number that belongs to a key, in a sentence hidden in repeated noise; `niah_multikey_2`
    hides it among many similar sentences with other keys; `niah_multikey_3` does so with UUIDs as keys and values. `vt`
    asks for the five variables that get the same value through a chain of assignments. `cwe` asks for the ten most
    common words of a list, in alphabetical order. `fwe` asks for the three most frequent words of a text whose word
    counts fall with the square of their rank; the most frequent of all, "......", does not count.

    Words are random letters, and RULER's instructions are left out.
    """

    field = "lengths"
    axis = "length"
    kind: Literal["ruler"] = "ruler"
    sequence_length: int = Field(default=1024, gt=0, le=2**20)
    """Training sequence length in bytes."""
    task: Literal["niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"] = "niah_single_1"
    """Name of the task in RULER."""
    lengths: Difficulties | None = None
    """Maximum numbers of bytes in an example; rows cycle through them. Null for the whole sequence. `evaluate_at` may
    be longer."""

    @property
    def n_tokens(self) -> int:
        return ByteTokenizer.vocab_size

    @property
    def hardest(self) -> int:
        return self.sequence_length if self.sequence_length >= SHORTEST[self.task] else 0

    def require(self, difficulty: int) -> None:
        if difficulty < SHORTEST[self.task]:
            raise ValueError(f"length of {self.task} must be {SHORTEST[self.task]} or more, got {difficulty}")

    def fill(self, rng: Rng, inputs: np.ndarray, targets: np.ndarray, difficulty: int) -> None:
        makers = {"vt": _make_variables, "cwe": _make_common, "fwe": _make_frequent}
        make = makers.get(self.task, partial(_make_needle, task=self.task))
        for input_row, target_row in zip(inputs, targets, strict=True):
            text, answer = make(rng, difficulty)
            end = len(text) - 1
            input_row[:end] = list(text[:-1].encode())
            target_row[end - len(answer) : end] = list(answer.encode())

    def solve(self, tokens: list[int]) -> dict[int, int]:
        body, _, question = bytes(token for token in tokens if token).decode().rpartition("\n")
        prompt = question[: question.index(": ") + 2]
        words = re.findall("[a-z]{6}", body)
        if self.task.startswith("niah"):
            key = prompt.split(" for ")[1].split(" ")[0]
            answer = body.split(f" for {key} is: ")[1].split(".")[0]
        elif self.task == "vt":
            values: dict[str, str] = {}
            for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", body):
                values[name] = str(values.get(value, value))
            answer = " ".join(name for name, value in values.items() if value == prompt.split(" ")[-2].rstrip(":"))
        else:
            top_words = [word for word, _ in Counter(words).most_common(COMMON if self.task == "cwe" else FREQUENT)]
            answer = " ".join(sorted(top_words) if self.task == "cwe" else top_words)
        return {len(body) + len(prompt) + i: ord(letter) for i, letter in enumerate(answer)}

    def name_of(self, token: int) -> str:
        return chr(token) if 32 < token < 127 else "␣"


def _word(rng: Rng, letters: str = ascii_lowercase, count: int = 6) -> str:
    return "".join(letters[i] for i in rng.integers(len(letters), size=count))


def _uuid(rng: Rng) -> str:
    digits = rng.bytes(16).hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _hide(rng: Rng, lines: list[str], filler: Callable[[], str], room: int) -> str:
    """Insert lines, in their order, at random places among filler lines, as many as fit into `room` bytes."""
    text: list[str] = []
    room -= sum(len(line) + 1 for line in lines)
    while (room := room - len(line := filler()) - 1) >= 0:
        text.append(line)
    places = sorted(rng.integers(len(text) + 1, size=len(lines)).tolist())
    for place, line in reversed(list(zip(places, lines, strict=True))):
        text.insert(place, line)
    return "".join(f"{line}\n" for line in text)


def _make_needle(rng: Rng, length: int, task: str) -> tuple[str, str]:
    """Make an example of the `niah` tasks: the text with question and answer, and the answer."""
    uses_uuids = task == "niah_multikey_3"

    def draw() -> tuple[str, str, str]:
        if uses_uuids:
            return "uuid", _uuid(rng), _uuid(rng)
        return "number", f"{_word(rng)}-{_word(rng)}", str(rng.integers(10**6, 10**7))

    value_type, key, answer = draw()
    prompt = PROMPT.format(value_type, key)
    noise = NOISE if task == "niah_single_1" else None
    needle = NEEDLE.format(value_type, key, answer)
    text = _hide(rng, [needle], lambda: noise or NEEDLE.format(*draw()), length - len(prompt + answer))
    return text + prompt + answer, answer


def _make_variables(rng: Rng, length: int) -> tuple[str, str]:
    """Make an example of `vt`: the text with question and answer, and the answer."""
    names = [_word(rng, ascii_uppercase, 5) for _ in range(N_VARIABLES)]
    value = str(rng.integers(10**4, 10**5))
    assigned = [value, *(f"VAR {name}" for name in names)]
    lines = [f"VAR {name} = {source}" for name, source in zip(names, assigned, strict=False)]
    prompt = f"Variables that are assigned the value {value}: "
    answer = " ".join(names)
    return _hide(rng, lines, lambda: NOISE, length - len(prompt + answer)) + prompt + answer, answer


def _make_common(rng: Rng, length: int) -> tuple[str, str]:
    """Make an example of `cwe`: the text with question and answer, and the answer."""
    many, few = (30, 3) if length >= 8192 else (6, 1)
    common = sorted(_word(rng) for _ in range(COMMON))
    prompt = "The 10 most common words in the list are: "
    answer = " ".join(common)
    words = common * many
    room = length - len(prompt + answer) - 1
    # an entry is its number and a word of six letters, each followed by a space
    size = sum(len(str(n)) + 8 for n in range(1, len(words) + 1))
    while (size := size + sum(len(str(n)) + 8 for n in range(len(words) + 1, len(words) + few + 1))) <= room:
        words += [_word(rng)] * few
    text = "".join(f"{n} {words[i]} " for n, i in enumerate(rng.permutation(len(words)), 1))
    return text + "\n" + prompt + answer, answer


def _make_frequent(rng: Rng, length: int) -> tuple[str, str]:
    """Make an example of `fwe`: the text with question and answer, and the answer."""
    prompt = "The three most frequently appeared words are: "
    count = (length - len(prompt)) // 7 - FREQUENT - 1
    sizes = (count * 6 / np.pi**2 * np.arange(1.0, count + 1) ** -2).astype(int)
    ranked = ["......", *(_word(rng) for _ in sizes[1:])]
    words = [word for word, size in zip(ranked, sizes, strict=True) for _ in range(size)]
    answer = " ".join(ranked[1 : FREQUENT + 1])
    return " ".join(words[i] for i in rng.permutation(len(words))) + "\n" + prompt + answer, answer
