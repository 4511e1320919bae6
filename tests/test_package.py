"""The package as a whole: what is shipped, what imports what, and what an import costs."""

import ast
import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from structure import File, House, imports

import seqmix

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
MODULES = {file.module: file for file in House.at(ROOT).outside}
PACKAGES = {name: ROOT / file.path.parent for name, file in MODULES.items() if file.path.name == "__init__.py"}


def test_every_folder_is_a_package_in_the_wheel():
    assert sorted(SETUPTOOLS["packages"]) == sorted(PACKAGES)
    assert SETUPTOOLS["package-dir"] == {"seqmix": "."}
    for name, file in MODULES.items():
        assert (ROOT / file.path).with_name("__init__.py").exists(), f"{name} lies in a folder that is not a package"


def test_every_other_file_of_a_package_is_in_the_wheel():
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


def test_the_places_of_the_version_agree():
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
    MIXERS Call ConfigError ContractError LanguageModel MixerConfig ModelConfig Paradigm RunConfig Sampling SeqmixError
    SequenceMixer Traits account build_model generate_text load_config load_run stream_text train
"""


def test_the_public_names_are_frozen():
    assert seqmix.__all__ == PUBLIC.split()


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_every_public_name_exists(package):
    if package == "seqmix.hf":
        pytest.importorskip("transformers")
    module = importlib.import_module(package)
    for name in getattr(module, "__all__", []):
        assert hasattr(module, name)


FLOORS = [
    *("configs", "registry", "ops", "mixers", "testing", "blocks", "models", "data", "training", "convert", "hf"),
    *("linearize", "benchmarks", "experiments", "inspection", "harness", "commands", "cli", "__main__"),
    "pytest_plugin",
]
"""From the ground up: a floor may import the floors below it, and itself."""


def floor_of(module: str) -> int | None:
    """The floor of a module; None for the roof."""
    name = module.removeprefix("seqmix.").partition(".")[0]
    return FLOORS.index(name) if name in FLOORS else None


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_every_module_has_a_floor():
    homeless = [name for name in MODULES if floor_of(name) is None and name != "seqmix"]
    assert not homeless, f"FLOORS lacks {homeless}"


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"seqmix"}))
def test_a_floor_imports_only_floors_below_it(module):
    for imported, line in imports(MODULES[module], MODULES):
        if within(imported, "seqmix"):
            assert imported != "seqmix", f"{module}:{line} imports the public face"
            level = floor_of(imported)
            assert level is not None, f"{module}:{line} imports {imported}"
            assert level <= floor_of(module), f"{module}:{line} imports {imported}, a floor above it"


def test_the_check_of_floors_sees_every_way_to_import():
    text = (
        "from ..packing import x\nfrom ... import models\ndef f():\n    from ...mixers.contract import SequenceMixer\n"
        "if TYPE_CHECKING:\n    from seqmix.training.run import train\nimport seqmix.cli as cli\n"
    )
    found = dict(imports(File(Path("ops/decay/api.py"), text), MODULES))
    assert found == {
        "seqmix.ops.packing": 1,
        "seqmix.models": 2,
        "seqmix.mixers.contract": 4,
        "seqmix.training.run": 6,
        "seqmix.cli": 7,
    }
    assert floor_of("seqmix.ops.decay.api") == floor_of("seqmix.ops.packing")
    ground_up = ["seqmix.ops.packing", "seqmix.mixers.contract", "seqmix.models", "seqmix.training.run", "seqmix.cli"]
    assert sorted(found, key=floor_of) == ground_up


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_library_imports_itself_relatively_and_unpickles_nothing(module):
    for node in ast.walk(MODULES[module].tree):
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
def test_an_op_uses_no_module(module):
    file = MODULES[module]
    for imported, line in imports(file, MODULES):
        allowed = ("torch.nn.functional", "torch.nn.attention")
        assert not within(imported, "torch.nn") or imported.startswith(allowed), f"{module}:{line} imports {imported}"
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert "nn" not in [alias.name for alias in node.names], f"{module}:{node.lineno}"
        if isinstance(node, ast.Attribute):
            chain = ast.unparse(node)
            assert not chain.startswith(("nn.", "torch.nn.Module", "torch.nn.Parameter")), f"{module}:{node.lineno}"


def test_the_registry_imports_no_torch():
    for name, file in MODULES.items():
        if within(name, "seqmix.registry"):
            assert not [line for imported, line in imports(file, MODULES) if within(imported, "torch")]


TRITON = ("triton_tiles", "decay.triton_kernels", "decay.triton_key_kernels", "delta.triton_kernels")
MAY_IMPORT = {
    **{f"seqmix.ops.{name}": {"triton"} for name in TRITON},
    **{
        name: {"transformers"}
        for name in ("seqmix.hf", *(f"seqmix.hf.{part}" for part in ("cache", "configuration", "modeling", "replace")))
    },
    "seqmix.hf.tokenizer": {"tokenizers", "transformers"},
    "seqmix.pytest_plugin": {"pytest"},
    "seqmix.experiments.figures.charts": {"altair"},
    "seqmix.experiments.figures.libraries": {"vl_convert"},
    "seqmix.experiments.figures.page": {"jinja2"},
    "seqmix.benchmarks.op": {"fla"},
    "seqmix.benchmarks.peers.fla": {"fla"},
    "seqmix.benchmarks.peers.llama": {"transformers"},
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

AS_NEEDED = ["cli", "commands", "experiments", "benchmarks", "hf", "testing"]
"""Packages that a program which imports the library may not need."""


def distributions(entries: list[str]) -> set[str]:
    """Names of what a list of dependencies asks for."""
    return {entry.partition(">")[0].lower() for entry in entries}


REQUIRED = distributions(PROJECT["project"]["dependencies"])
PROBE = f"""
import json, sys, time
def seconds():  # of this process's own work: what else the machine does plays no part
    return time.process_time()
import {", ".join(sorted(IMPORTED_AS.get(name, name) for name in REQUIRED - {"torch", "typer"}))}
began = seconds()
import torch
between, before = seconds(), set(sys.modules)
from seqmix import *
ended, new = seconds(), sorted(set(sys.modules) - before)
print("PROBE", json.dumps([between - began, ended - between, new]))
"""


@pytest.fixture(scope="module")
def probes() -> list[tuple[float, float, list[str], str]]:
    """Processes that import torch and then the library: seconds of each, new modules, and what was printed."""
    found = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
        printed, _, result = done.stdout.partition("PROBE ")
        torch_seconds, seconds, new = json.loads(result)
        found.append((torch_seconds, seconds, new, printed + done.stderr))
    return found


def test_an_import_prints_nothing_and_takes_half_a_second_beyond_torch(probes):
    assert {printed for *_, printed in probes} == {""}
    assert min(seconds for _, seconds, *_ in probes) < 0.5


def test_an_import_needs_no_optional_library_no_mixer_and_no_package_that_was_not_asked_for(probes):
    new = probes[0][2]
    optional = {"xformers", "hypothesis", "datasets", "tokenizers", "pytest"}.union(*MAY_IMPORT.values())
    for name in (*optional, *LATE, "typer", *(f"seqmix.{package}" for package in AS_NEEDED)):
        assert not [module for module in new if within(module, name)], name
    built_in = [f"seqmix.mixers.{kind}" for kind in seqmix.MIXERS.kinds() if ":" not in kind]
    built_in = [name for name in built_in if name in MODULES]
    assert len(built_in) >= 3
    assert not set(built_in) & set(new)


def test_required_libraries_are_declared():
    allowed = {IMPORTED_AS.get(name, name) for name in REQUIRED} | {"pydantic_core"}
    for name, file in MODULES.items():
        here = allowed | MAY_IMPORT.get(name, set()) | ({"pytest"} if within(name, "seqmix.testing") else set())
        for imported, line in imports(file, MODULES):
            top = imported.partition(".")[0]
            assert top in {"seqmix", *sys.stdlib_module_names, *here}, f"{name}:{line} imports {top}"


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_a_module_that_may_import_an_optional_library_does(module):
    imported = {name.partition(".")[0] for name, _ in imports(MODULES[module], MODULES)}
    assert MAY_IMPORT[module] <= imported


def test_no_test_compares_with_allclose():
    # it broadcasts, takes any dtype, and says nothing where it fails: torch.testing.assert_close
    call = "torch.allclose" + "("
    guilty = [file.name for file in (ROOT / "tests").rglob("*.py") if call in file.read_text(encoding="utf-8")]
    assert not guilty
