"""A new mixer needs one file and one preset: in a copy of the repository, nothing else is edited by hand.

The mixer is tests/data/leaky_average.py, of the decay family. Commands, the suite and the documentation find it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
ADDED = {
    "mixers/leaky_average.py": DATA / "leaky_average.py",
    "configs/leaky-average-tiny.yaml": DATA / "leaky-average-tiny.yaml",
}
GENERATORS = ["docs/generate.py", "docs/mixers.py", "research/scaling.py", "tests/test_presets.py"]
GENERATED = {
    "README.md",
    "docs/reference/fields.md",
    "docs/reference/mixers.md",
    "docs/reference/presets.md",
    "docs/how-to/multi-gpu.md",
    "tests/data/defaults.txt",
}
"""What the generators write of a new mixer."""
SUITE = [
    "tests/testing/test_conformance.py",
    "tests/test_presets.py",
    "tests/test_package.py",
    "tests/cli/test_cli.py",
    "tests/training/test_single_kind_presets.py",
    "tests/lab/study/test_equal_cost.py",
]
"""Where a new mixer joins tests by discovery, or would fail one that has a list of mixers or presets."""
CHECKS = "leaky_average and (paradigms_agree or pieces_equal_the_whole or documents_are_sequences)"
LISTS = "presets_match or presets_use or presets_have or has_a_preset or mixers_lists or schema_covers or test_wheel"
WHICH = f"({CHECKS}) or leaky-average or {LISTS}"


@pytest.fixture
def copy(tmp_path) -> Path:
    """The repository as it is, without what git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: the files of the repository are unknown")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name, follow_symlinks=False)
    return tmp_path


def contents(root: Path) -> dict[str, bytes]:
    """The text and data of a checkout by path."""
    return {
        path: (root / path).read_bytes()
        for file in root.rglob("*")
        if file.is_file()
        and not any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(root).parts)
        and (path := file.relative_to(root).as_posix())
    }


def python(root: Path, *arguments: str) -> str:
    """What Python prints in a checkout; its package is that of the checkout, whatever else is installed."""
    environment = os.environ | {"PYTHONPATH": str(root / ".typing"), "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def passed(output: str) -> set[str]:
    """The tests of a verbose report that passed."""
    return set(re.findall(r"^PASSED \S+::(.+)$", output, re.MULTILINE))


@pytest.mark.slow
def test_new_mixer_needs_only_one_file_and_one_preset(copy):
    before = contents(copy)
    assert not ADDED.keys() & before.keys()
    for name, file in ADDED.items():
        shutil.copy(file, copy / name)

    python(copy, "-c", f"import runpy; [runpy.run_path(file, run_name='__main__') for file in {GENERATORS}]")
    after = contents(copy)
    assert {name for name in after if after[name] != before.get(name)} == ADDED.keys() | GENERATED

    # the commands know it, and the preset builds it
    assert re.search("^ *leaky_average .*constant", python(copy, "-m", "seqmix", "mixers"), re.MULTILINE)
    assert "leaky_average" in python(copy, "-m", "seqmix", "show", "leaky-average-tiny")

    # the pages show it: its row, formulas and fields, and the preset
    assert (
        "| [`leaky_average`](#leaky_average) |  | `h_t = f_t h_{t-1} + (1 - f_t) v_t` |"
        in after["docs/reference/mixers.md"].decode()
    )
    assert "\n### `leaky_average`\n" in after["docs/reference/fields.md"].decode()
    assert "\n| `leaky-average-tiny` | 4 | 128 |" in after["docs/reference/presets.md"].decode()
    assert "[`leaky_average`](docs/reference/mixers.md#leaky_average)" in after["README.md"].decode()

    # the suite has it, and passes
    found = passed(python(copy, "-m", "pytest", "-q", "-rp", "-p", "no:cacheprovider", *SUITE, "-k", WHICH))
    assert {
        "test_every_mixer_passes_the_check[cpu-leaky_average-paradigms_agree]",
        "test_every_mixer_passes_the_check[cpu-leaky_average-documents_are_sequences]",
        "test_tiny_preset_trains[leaky-average-tiny]",
        "test_tiny_presets_have_similar_sizes_and_share_training_and_data",
        "test_every_mixer_has_a_preset",
    } <= found
