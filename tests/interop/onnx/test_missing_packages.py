"""`seqmix export --to onnx` and `seqmix playground` without the ONNX packages: a one-line error with the fix."""

import subprocess
import sys

import pytest

BLOCKED = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        is_missing = name.partition(".")[0] in ("onnx", "onnxscript", "onnxruntime")
        return None if is_missing else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
sys.argv[0] = "seqmix"
from seqmix.cli.app import main
main()
"""
"""A program that is `seqmix` in an environment without the packages."""


@pytest.mark.parametrize(
    "arguments", [("export", "run", "--to", "onnx", "run.onnx"), ("playground", "run", "--out", "p")]
)
def test_missing_onnx_packages_are_named_in_a_one_line_error(arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith("needs the packages onnx, onnxscript, onnxruntime: pip install 'seqmix[onnx]'\n")
    assert done.stderr.count("\n") == 1
