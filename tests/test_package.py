"""The package as a whole: what is shipped, which module imports what, and what importing it loads."""

import ast
import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import seqmix

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
NOT_LIBRARY = {"tests", "docs", "examples", "research", "build", "dist", "runs", "studies", "site"}
"""Folders of the root without modules of the library."""
PROGRAMS = {"setup"}
"""Files of the root that are no modules of the library."""


def module_name(path: Path) -> str:
    """The full name of a file of the library."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("seqmix", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def library_files() -> list[Path]:
    """All Python files of the library: those of the root, and of its folders but hidden ones and environments."""
    folders = [
        folder
        for folder in ROOT.iterdir()
        if folder.is_dir()
        and folder.name not in NOT_LIBRARY
        and not folder.name.startswith(".")
        and not (folder / "pyvenv.cfg").exists()
    ]
    modules = [file for file in ROOT.glob("*.py") if file.stem not in PROGRAMS]
    return sorted([*modules, *(file for folder in folders for file in folder.rglob("*.py"))])


MODULES = {module_name(path): path for path in library_files()}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
PACKAGES = {name: path.parent for name, path in MODULES.items() if path.name == "__init__.py"}


def imports(module: str) -> list[tuple[str, int]]:
    """Full names of what a module imports anywhere in its text, in functions too, each with its line."""
    found = []
    package = module if module in PACKAGES else module.rpartition(".")[0]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from .x import y` names a module y, or a name of the module x
                full = f"{base}.{alias.name}"
                found.append((full if full in MODULES else base, node.lineno))
    return found


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


LISTED = """
import json, setuptools
setuptools.setup = lambda packages: print(json.dumps(packages))
import setup
"""
"""Program that prints the packages that setup.py lists."""


def test_wheel_contains_every_package():
    done = subprocess.run([sys.executable, "-c", LISTED], cwd=ROOT, capture_output=True, text=True, check=True)
    assert sorted(json.loads(done.stdout)) == sorted(PACKAGES)
    assert SETUPTOOLS["package-dir"] == {"seqmix": "."}
    for name, file in MODULES.items():
        assert file.with_name("__init__.py").exists(), f"{name} lies in a folder that is not a package"


def test_wheel_contains_every_non_python_file():
    shipped = {
        file
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for file in PACKAGES[package].glob(pattern)
    }
    assert ROOT / "py.typed" in shipped
    for package, folder in PACKAGES.items():
        if package != "seqmix":  # the root holds the project's own files as well
            others = {file for file in folder.iterdir() if file.is_file() and file.suffix not in (".py", ".pyc")}
            assert others <= shipped
    assert len(list((ROOT / "configs").glob("*.yaml"))) >= 14


def test_version_is_the_same_everywhere():
    citation = YAML(typ="safe").load(ROOT / "CITATION.cff")
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "seqmix.__version__"}
    assert seqmix.__version__ == str(citation["version"])
    assert f"version = {{{seqmix.__version__}}}" in (ROOT / "README.md").read_text()
    assert {"cff-version", "message", "title", "authors", "license", "url"} <= citation.keys()


def test_tests_are_not_packages():
    # pytest would import the library from the folder above, under the clone's name
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not (ROOT / "conftest.py").exists()


PUBLIC = """
    MIXERS Call ConfigError ContractError DataError LanguageModel MixerConfig ModelConfig Paradigm RunConfig Sampling
    SeqmixError SequenceMixer Traits account build_model generate_text load_config load_run stream_text train
"""


def test_public_names_match_the_frozen_list():
    assert seqmix.__all__ == PUBLIC.split()


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_every_public_name_exists(package):
    if package == "seqmix.interop.hf":
        pytest.importorskip("transformers")
    module = importlib.import_module(package)
    for name in getattr(module, "__all__", []):
        assert hasattr(module, name)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_use_relative_imports_and_never_unpickle(module):
    for node in ast.walk(TREES[module]):
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            found = [node.module]
        tops = {name.partition(".")[0] for name in found}
        # the kit pickles mixers, and reads nothing else
        allowed = {"pickle"} if module == "seqmix.testing.contract.values" else set()
        assert not tops & {"seqmix", "pickle", "cloudpickle", "dill"} - allowed, f"{module}:{node.lineno}"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("torch.load", "torch.save"), f"{module}:{node.lineno}"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if within(name, "seqmix.ops")))
def test_ops_do_not_use_nn_modules(module):
    for imported, line in imports(module):
        allowed = ("torch.nn.functional", "torch.nn.attention")
        assert not within(imported, "torch.nn") or imported.startswith(allowed), f"{module}:{line} imports {imported}"
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert "nn" not in [alias.name for alias in node.names], f"{module}:{node.lineno}"
        if isinstance(node, ast.Attribute):
            chain = ast.unparse(node)
            assert not chain.startswith(("nn.", "torch.nn.Module", "torch.nn.Parameter")), f"{module}:{node.lineno}"


TRITON = ("tiles", "decay.bodies", "decay.per_key_bodies", "delta.bodies")
MAY_IMPORT = {
    **{f"seqmix.ops.kernels.triton.{name}": {"triton"} for name in TRITON},
    **{
        name: {"transformers"}
        for name in (
            "seqmix.interop.hf",
            *(f"seqmix.interop.hf.{part}" for part in ("cache", "configuration", "modeling", "replace")),
        )
    },
    "seqmix.interop.hf.tokenizer": {"tokenizers", "transformers"},
    **{f"seqmix.interop.onnx.{name}": {"onnx"} for name in ("graph", "loops")},
    "seqmix.interop.onnx.session": {"onnxruntime"},
    "seqmix.interop.onnx.quantize": {"onnx", "onnxruntime"},
    "seqmix.cli.pytest_plugin": {"pytest"},
    "seqmix.lab.figures.charts": {"altair"},
    "seqmix.lab.figures.libraries": {"vl_convert"},
    "seqmix.lab.figures.page": {"jinja2"},
    "seqmix.lab.bench.llama_cpp": {"gguf", "xllamacpp"},
    "seqmix.lab.bench.op": {"fla"},
    "seqmix.lab.bench.peers.fla": {"fla"},
    "seqmix.lab.bench.peers.llama": {"transformers"},
    "seqmix.testing.adapters.hf": {"transformers"},
    "seqmix.testing.adapters.torchscale": {"torchscale"},
}
"""Modules that need an optional library, and are imported where it is used."""
IMPORTED_AS = {"ruamel.yaml": "ruamel"}
"""Distributions whose package has another name."""
LATE = [
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch._inductor",
    "torch.nn.attention.flex_attention",
    "IPython",
    "pandas",
]

AS_NEEDED = ["cli", "lab", "interop", "testing"]
"""Packages that a program which imports the library may not need."""


def distributions(entries: list[str]) -> set[str]:
    """Names of what a list of dependencies asks for."""
    return {entry.partition(">")[0].lower() for entry in entries}


REQUIRED = distributions(PROJECT["project"]["dependencies"])
PROBE = f"""
import json, sys
import {", ".join(sorted(IMPORTED_AS.get(name, name) for name in REQUIRED - {"torch", "typer"}))}
import torch
before = set(sys.modules)
from seqmix import *
print("PROBE", json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.fixture(scope="module")
def probe() -> tuple[list[str], str]:
    """The modules that importing the library after its required dependencies adds, and what it prints."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    printed, _, result = done.stdout.partition("PROBE ")
    return json.loads(result), printed + done.stderr


def test_importing_the_library_prints_nothing(probe):
    assert probe[1] == ""


def test_importing_the_library_loads_no_optional_modules(probe):
    new, _ = probe
    optional = {"xformers", "hypothesis", "datasets", "tokenizers", "pytest"}.union(*MAY_IMPORT.values())
    for name in (*optional, *LATE, "typer", *(f"seqmix.{package}" for package in AS_NEEDED)):
        assert not [module for module in new if within(module, name)], name
    built_in = [f"seqmix.mixers.{kind}" for kind in seqmix.MIXERS.kinds() if ":" not in kind]
    built_in = [name for name in built_in if name in MODULES]
    assert len(built_in) >= 3
    assert not set(built_in) & set(new)


def test_modules_import_only_declared_libraries():
    allowed = {IMPORTED_AS.get(name, name) for name in REQUIRED} | {"pydantic_core"}
    for name in MODULES:
        here = allowed | MAY_IMPORT.get(name, set()) | ({"pytest"} if within(name, "seqmix.testing") else set())
        for imported, line in imports(name):
            top = imported.partition(".")[0]
            assert top in {"seqmix", *sys.stdlib_module_names, *here}, f"{name}:{line} imports {top}"


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_modules_allowed_an_optional_library_import_it(module):
    imported = {name.partition(".")[0] for name, _ in imports(module)}
    assert MAY_IMPORT[module] <= imported


def test_no_test_uses_torch_allclose():
    # it broadcasts, takes any dtype, and says nothing where it fails: torch.testing.assert_close
    call = "torch.allclose" + "("
    guilty = [file.name for file in (ROOT / "tests").rglob("*.py") if call in file.read_text(encoding="utf-8")]
    assert not guilty
