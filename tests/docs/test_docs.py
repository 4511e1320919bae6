"""The documentation runs: its Python, its commands (with tiny models), and its claims about files and presets.

Rules of the fenced blocks: a page's Python blocks share one namespace; a block whose first line is `# name.ext` is a
file; `console` blocks show a command and its output, in which `...` stands for anything.
"""

import contextlib
import io
import re
import runpy
import shlex
import sys
import tomllib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from seqmix import MIXERS, account, load_config
from seqmix.cli import app as cli
from seqmix.lab.study.study import STUDIES
from seqmix.training import PRESETS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
TINY = [
    "data={paths: [text.txt], split: tail, sequence_length: 16}",
    "training={steps: 2, batch_size: 2, warmup_steps: 1, evaluation_batches: 1, final_evaluation_batches: 1}",
    "model.d_model=32",
]
"""What is added to a command that trains; to one that learns a task, all but the text. Studies get it in their file,
and plans of linearizing few tokens."""
NEEDS = {
    "hugging-face.md": ("transformers", "accelerate"),
    "onnx.md": ("onnx", "onnxscript", "onnxruntime"),
    "playground.md": ("onnx", "onnxscript", "onnxruntime"),
}
"""Libraries of pages that need one."""


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int
    """Of the text's first line, from 1."""

    @property
    def file(self) -> str | None:
        found = re.match(r"# (\S+\.(?:py|yaml|toml))\n", self.text)
        return found[1] if found else None

    @property
    def commands(self) -> list[str]:
        """The seqmix commands of a bash block."""
        parts = re.split(r"\n|&&", self.text) if self.language == "bash" else []
        return [part.strip() for part in parts if part.strip().startswith("seqmix ")]


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(found[1], found[2], text.count("\n", 0, found.start()) + 2)
        for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a text to learn; modules imported and mixers registered there are removed."""
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(MIXERS, "_registered", dict(MIXERS._registered))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def seqmix(command: str) -> tuple[str, int]:
    """Run a command of the documentation; what it prints, and its exit status."""
    command, _, target = command.partition(" > ")
    arguments = shlex.split(command)[1:]
    if arguments[0] == "train" and not {"wrong.yaml", "--resume"} & {*arguments}:
        config = load_config(arguments[1], [change for change in arguments[2:] if "=" in change])
        arguments += TINY if config.data.kind == "text" else TINY[1:]
    if arguments[0] == "generate":
        arguments += ["--max-new-tokens", "3"]
    if arguments[0] == "compare" and "--dry-run" not in arguments:
        yaml, file = YAML(typ="safe"), Path(arguments[1])
        if not file.exists():  # a study of the package, whose models are not to be as large as it says
            arguments[1], file = f"{file}.yaml", Path(f"{file}.yaml")
            yaml.dump(yaml.load(STUDIES / file) | {"match": None}, file)
        changes = {key: yaml.load(value) for key, value in (change.split("=", 1) for change in TINY[:2])}
        yaml.dump(yaml.load(file) | changes | {"model": {"d_model": 32}, "seeds": [0]}, file)
    if arguments[0] == "linearize":
        yaml, file = YAML(typ="safe"), Path(arguments[2])
        plan = yaml.load(file)
        stages = {name: stage | {"tokens": 32} for name, stage in plan["stages"].items()}
        yaml.dump(plan | {"stages": stages, "calibration_tokens": 32}, file)
    output, status = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        patch.setattr(sys, "argv", ["seqmix", *arguments])
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr("seqmix.models.quantization.MIN_WEIGHTS", 1)  # tiny models have only small matrices
        try:
            cli.main()
        except SystemExit as ended:
            status = int(ended.code or 0)
    if target:
        Path(target).write_text(output.getvalue())
    return output.getvalue(), status


def is_like(pattern: str, text: str) -> bool:
    """Whether a text is the pattern's, which has `...` for anything."""
    return re.fullmatch(".*".join(map(re.escape, pattern.strip().split("..."))), text.strip(), re.DOTALL) is not None


def paged(page):
    """A page as a parameter: all but the README are slow."""
    return pytest.param(page, marks=() if page.name == "README.md" else pytest.mark.slow)


@pytest.mark.parametrize("page", [paged(page) for page in PAGES], ids=names(PAGES))
def test_code_and_commands_of_a_page_run(page, folder):
    if missing := [name for name in NEEDS.get(page.name, ()) if find_spec(name) is None]:
        pytest.skip(f"needs pip install {' '.join(missing)}")
    namespace: dict[str, object] = {"__name__": "documentation"}
    done: set[str] = set()
    for block in blocks_of(page):
        if block.file is not None:
            (folder / block.file).write_text(block.text)
        elif block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            exec(code, namespace)
        elif block.language == "console":
            command, _, expected = block.text.removeprefix("$ ").partition("\n")
            output, _ = seqmix(command)
            assert is_like(expected, output), output
        for command in block.commands:
            if command not in done or "compare" in command:  # a run is never overwritten; a study goes on
                output, status = seqmix(command)
                assert status == 0, f"{command}\n{output}"
                done.add(command)


def test_packaging_example_on_the_page_ships_a_mixer(folder):
    page = ROOT / "docs" / "how-to" / "own-mixer.md"
    files = {block.file: block.text for block in blocks_of(page) if block.file}
    (folder / "convolution.py").write_text(files["convolution.py"])
    project = tomllib.loads(files["pyproject.toml"])
    (group, points), *others = project["project"]["entry-points"].items()
    assert not others
    info = folder / "seqmix_convolution-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: seqmix-convolution\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))
    assert "convolution" in MIXERS.kinds()
    assert MIXERS.origin("convolution") == "convolution"
    assert "convolution" in seqmix("seqmix mixers")[0]
    assert "ConvolutionConfig" in seqmix("seqmix schema")[0]


@pytest.mark.parametrize(
    "name",
    [
        "accessories",
        "api",
        "generate",
        "language",
        "leaderboard",
        "mixers",
        "paper",
        "precision",
        "rank_transfer",
        "scaling",
        "tasks",
    ],
)
def test_generated_files_are_up_to_date(name):
    if name == "api":
        pytest.importorskip("griffe", reason="needs pip install griffelib")
    (program,) = (path for folder in ("docs", "research") if (path := ROOT / folder / f"{name}.py").exists())
    files = runpy.run_path(str(program))["files"]()
    for file, text in files.items():
        assert file.read_text(encoding="utf-8") == text, f"run: python {program.relative_to(ROOT)}"
    pictures = {file for file in files if file.suffix == ".svg"}
    assert pictures == {file for folder in {file.parent for file in pictures} for file in folder.iterdir()}


def rows(text: str, head: str) -> list[list[str]]:
    """The rows of the table whose first line starts with `head`."""
    table = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in table]


def test_reference_lists_all_presets_with_their_sizes():
    page = ROOT / "docs" / "reference" / "presets.md"
    listed = {row[0]: row[1:4] for row in rows(page.read_text(), "| preset |")}
    found = {}
    for file in PRESETS.glob("*.yaml"):
        model = load_config(file.stem).model
        found[file.stem] = [str(model.n_layers), str(model.d_model), f"{account(model, length=64).body_parameters:,}"]
    assert listed == found


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING], ids=names([*PAGES, CONTRIBUTING]))
def test_links_and_mentioned_files_exist(page):
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target
    written = "config.yaml metrics.jsonl sessions.jsonl results.json summary.md logs/ manifest.json seqmix.schema.json"
    written += " index.json status.json modeling_seqmix.py mine.py"
    made = {block.file for block in blocks_of(page)} | {*written.split(), "average.py"}
    for name in re.findall(r"`([\w./-]+(?:\.(?:py|yaml|md|toml|jsonl?)|/))`", page.read_text()):
        assert name in made or name.startswith((".vscode", "runs/", "RUN/")) or (ROOT / name).exists(), name


def test_layout_in_contributing_names_every_package():
    (text,) = (block.text for block in blocks_of(CONTRIBUTING) if block.language == "text")
    folders = set(re.findall(r"^(\w+)/", text, re.MULTILINE))
    assert all((ROOT / name).is_dir() for name in folders)
    packages = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert packages - folders == set()
