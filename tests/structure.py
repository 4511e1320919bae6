"""Measure the code base: its length, its layering, and how much of it is plumbing.

    python tests/structure.py [ROOT]

prints a table for any checkout of this repository, the present one by default. test_structure.py enforces the limits.

- **lines**: all lines of the library's Python files: those outside `tests/`, `docs/` and `examples/`; by folder of the
  root (`.` for the root's own files).
- **import cycles**: sets of modules that import each other, directly or through others. Imports inside functions and
  under `TYPE_CHECKING` count; the implicit import of a module's package does not.
- **plumbing**: the share of lines of the ops that only pass arguments on: signatures, from `def` to their colon; and,
  in calls of several lines, those lines with nothing but names, attributes and constants, with `*`, `**`, a sign or
  `key=` before them. A lone bracket is not counted.
- **recurring lines**: of the lines of a mixer's file that are not blank, without indentation, those that are also in
  at least three other mixers' files.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

NOT_OURS = {"build", "dist", "runs", "studies", "site"}
"""Folders of the root that git ignores."""
NOT_LIBRARY = {"tests", "docs", "examples"}
OTHER_FAMILIES = {"softmax", "convolution", "scan"}
"""Ops of mixers outside the decay and delta families."""


@dataclass(frozen=True)
class File:
    """A Python file: its path from the root, and its text."""

    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def length(self) -> int:
        return len(self.text.splitlines())

    @property
    def room(self) -> str:
        return self.path.parts[0] if len(self.path.parts) > 1 else "."

    @property
    def module(self) -> str:
        parts = self.path.with_suffix("").parts
        return ".".join(("seqmix", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def files(root: Path) -> list[File]:
    """All Python files of a checkout, without hidden, ignored and installed folders."""
    return [File(path.relative_to(root), path.read_text(encoding="utf-8")) for path in sorted(_walk(root, root))]


def _walk(folder: Path, root: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        ignored = path.name.startswith(".") or (folder == root and path.name in NOT_OURS)
        if path.is_file() and path.suffix == ".py":
            yield path
        elif path.is_dir() and not ignored and not (path / "pyvenv.cfg").exists():
            yield from _walk(path, root)


def imports(file: File, modules: Container[str]) -> Iterator[tuple[str, int]]:
    """Full names of what a file imports anywhere in its text, in functions too, each with its line."""
    package = file.module if file.path.name == "__init__.py" else file.module.rpartition(".")[0]
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from .x import y` names a module y, or a name of the module x
                yield (full if (full := f"{base}.{alias.name}") in modules else base), node.lineno


def imported(file: File, modules: set[str]) -> set[str]:
    """The modules among `modules` that a file imports."""
    return ({name for name, _ in imports(file, modules)} & modules) - {file.module}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of a graph with more than one member, largest first."""
    reached: dict[str, set[str]] = {}
    for node in graph:
        seen, open_ = set[str](), [node]
        while open_:
            new = graph[open_.pop()] - seen
            seen |= new
            open_ += new
        reached[node] = seen
    found = {
        tuple(sorted({node, *(other for other in seen if node in reached[other])})) for node, seen in reached.items()
    }
    return sorted((list(circle) for circle in found if len(circle) > 1), key=lambda circle: (-len(circle), circle))


def signature_lines(text: str) -> set[int]:
    """Line numbers of all signatures, from `def` to the colon."""
    found: set[int] = set()
    start, depth = None, 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME and token.string == "def":
            start, depth = token.start[0], 0
        elif start is not None and token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
            if token.string == ":" and depth == 0:
                found |= set(range(start, token.end[0] + 1))
                start = None
    return found


def passing_lines(tree: ast.Module) -> set[int]:
    """Line numbers of calls that have only plain arguments."""
    found: set[int] = set()
    for call in ast.walk(tree):
        if isinstance(call, ast.Call):
            plain: set[int] = set()
            computed = set(range(call.lineno, (call.func.end_lineno or call.lineno) + 1))
            for argument in (*call.args, *call.keywords):
                value = argument.value if isinstance(argument, ast.keyword) else argument
                lines = range(argument.lineno, (argument.end_lineno or argument.lineno) + 1)
                (plain if _is_plain(value) else computed).update(lines)
            found |= plain - computed
    return found


def _is_plain(node: ast.expr) -> bool:
    match node:
        case ast.Name() | ast.Constant():
            return True
        case ast.Attribute(value=inner) | ast.Starred(value=inner) | ast.UnaryOp(operand=inner):
            return _is_plain(inner)
    return False


def recurring_lines(texts: dict[str, str]) -> dict[str, list[str]]:
    """By file, its lines that are in at least three of the others."""
    lines = {name: _stripped(text) for name, text in texts.items()}
    sets = {name: set(own) for name, own in lines.items()}
    return {
        name: [line for line in own if sum(line in sets[other] for other in sets if other != name) >= 3]
        for name, own in lines.items()
    }


def _stripped(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def example_of(readme: str) -> str:
    """The mixer of a README: the Python block that begins with a file name and defines a mixer."""
    blocks = re.findall(r"^```python\n(# \w+\.py\n.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    return next((block for block in blocks if re.search(r"^class \w+\(.*Mixer", block, re.MULTILINE)), "")


@dataclass(frozen=True)
class House:
    """A checkout of the repository."""

    files: list[File]
    readme: str = ""

    @staticmethod
    def at(root: Path) -> "House":
        readme = root / "README.md"
        return House(files(root), readme.read_text(encoding="utf-8") if readme.exists() else "")

    @cached_property
    def outside(self) -> list[File]:
        """The library's files: those outside tests, docs and examples."""
        return [file for file in self.files if file.room not in NOT_LIBRARY]

    @property
    def length(self) -> int:
        return sum(file.length for file in self.outside)

    @cached_property
    def rooms(self) -> dict[str, int]:
        """Lines of each room, the largest first."""
        found: dict[str, int] = {}
        for file in self.outside:
            found[file.room] = found.get(file.room, 0) + file.length
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def biggest_room(self) -> tuple[str, float]:
        name, lines = next(iter(self.rooms.items()))
        return name, lines / self.length

    def longer_than(self, limit: int) -> dict[str, int]:
        """Lines of the files that are longer, except Triton kernels."""
        long = [file for file in self.outside if file.length > limit and "triton_kernels" not in file.path.name]
        return {str(file.path): file.length for file in long}

    @cached_property
    def circles(self) -> list[list[str]]:
        modules = {file.module for file in self.outside}
        return circles({file.module: imported(file, modules) for file in self.outside})

    @cached_property
    def ops(self) -> list[File]:
        return [file for file in self.files if file.path.parts[0] == "ops" or file.path.parts[:2] == ("mixers", "ops")]

    @cached_property
    def plumbing(self) -> dict[str, tuple[int, int, int]]:
        """Of each op's file: lines of signatures, other lines of passed arguments, all lines."""
        found = {}
        for file in self.ops:
            signatures = signature_lines(file.text)
            found[str(file.path)] = (len(signatures), len(passing_lines(file.tree) - signatures), file.length)
        return found

    @property
    def plumbing_share(self) -> float:
        return share(*_total(self.plumbing))

    @cached_property
    def mixers(self) -> dict[str, File]:
        """The built-in mixers by kind: the files of mixers/ with `kind: Literal["<the file's name>"]`."""
        files = {file.path.stem: file for file in self.files if file.path.parts[:-1] == ("mixers",)}
        return {name: file for name, file in files.items() if f'kind: Literal["{name}"]' in file.text}

    @cached_property
    def families(self) -> list[str]:
        """The mixers of the decay and delta families: those that call no other op, and are not made of mixers."""
        modules = {file.module for file in self.ops}
        ops = {
            kind: {part for op in imported(file, modules) for part in op.split(".")}
            for kind, file in self.mixers.items()
            if "MIXERS" not in file.text
        }
        return [kind for kind, called in ops.items() if not called & OTHER_FAMILIES]

    @cached_property
    def recurring(self) -> dict[str, float]:
        """Each mixer's share of lines that recur."""
        texts = {kind: file.text for kind, file in self.mixers.items()}
        return {kind: len(lines) / len(_stripped(texts[kind])) for kind, lines in recurring_lines(texts).items()}

    @property
    def example(self) -> int:
        """Lines of the README's mixer."""
        return len(example_of(self.readme).splitlines())


def share(signatures: int, passed: int, lines: int) -> float:
    """The share of plumbing."""
    return (signatures + passed) / lines if lines else 0.0


def _total(plumbing: dict[str, tuple[int, int, int]]) -> tuple[int, int, int]:
    signatures, passed, lines = (sum(column) for column in zip((0, 0, 0), *plumbing.values(), strict=True))
    return signatures, passed, lines


def _percent(limit: float, shares: dict[str, float]) -> list[str]:
    return [f"{name}: {value:.1%}" for name, value in shares.items() if value > limit]


def _plumbing(house: House) -> list[str]:
    if house.plumbing_share <= 0.12:
        return []
    files = sorted(house.plumbing.items(), key=lambda item: -sum(item[1][:2]))
    worst = [f"{name}: {share(*lines):.0%} of {lines[2]}" for name, lines in files[:10] if any(lines[:2])]
    return [f"{house.plumbing_share:.1%} of the ops", *worst]


LIMITS: dict[str, tuple[str, Callable[[House], list[str]]]] = {
    "length": ("at most 48,800 lines outside tests", lambda h: [f"{h.length:,}"] if h.length > 48_800 else []),
    "room": (
        "no room above a quarter",
        lambda h: _percent(0.25, {n: lines / h.length for n, lines in h.rooms.items()}),
    ),
    "files": (
        "no file above 450 lines except Triton kernels",
        lambda h: [f"{name}: {lines}" for name, lines in h.longer_than(450).items()],
    ),
    "circles": ("no import cycle", lambda h: [" - ".join(circle) for circle in h.circles]),
    "plumbing": ("signatures and passed arguments at most 12 % of the ops", _plumbing),
    "mixers": (
        "mixers of the decay and delta families at most 100 lines each",
        lambda h: [f"{kind}: {h.mixers[kind].length}" for kind in h.families if h.mixers[kind].length > 100],
    ),
    "recurring": ("at most a quarter of a mixer recurs in three others", lambda h: _percent(0.25, h.recurring)),
    "example": ("the README's mixer at most 45 lines", lambda h: [f"{h.example}"] if not 0 < h.example <= 45 else []),
}
"""By name: the limit, and what exceeds it."""


def table(house: House) -> str:
    """The measurements as text."""
    name, biggest = house.biggest_room
    signatures, passed, lines = _total(house.plumbing)
    rows = [
        ("lines outside tests", f"{house.length:,}"),
        ("biggest folder", f"{name}, {biggest:.1%}"),
        *((f"  {room}", f"{lines:,} ({lines / house.length:.1%})") for room, lines in house.rooms.items()),
        (
            "plumbing of the ops",
            f"{house.plumbing_share:.1%} of {lines:,} lines: {signatures:,} signatures, {passed:,} arguments",
        ),
        ("mixers", "lines, share of recurring lines (* neither decay nor delta)"),
        *(
            (f"  {kind}{'' if kind in house.families else ' *'}", f"{file.length}, {house.recurring[kind]:.0%}")
            for kind, file in house.mixers.items()
        ),
        ("README's mixer", f"{house.example} lines"),
        *(
            (rule, f"{allowed}: {'; '.join(offenders(house)) or 'kept'}")
            for rule, (allowed, offenders) in LIMITS.items()
        ),
    ]
    width = max(len(head) for head, _ in rows) + 2
    return "\n".join(f"{head:{width}}{value}" for head, value in rows)


if __name__ == "__main__":
    root = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[1]
    print(table(House.at(root.resolve())))
