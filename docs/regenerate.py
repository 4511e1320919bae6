"""Regenerate all generated files of the repository: `python docs/regenerate.py`.

`--kernels` also compiles every configuration of the Triton kernels, which takes minutes; use it after a change of
ops/kernels/triton. `--peers` also compares every converted model with the original library's model; use it after a
change of interop/convert/, with transformers, torchscale and fla installed. It also tests other libraries on the
conformance vectors; docs/explanation/conformance-matrix.md says what to install.
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {
    "research/accessories.py": "text with equal accessories",
    "docs/api.py": "pages of the Python API",
    "docs/generate.py": "pages of fields, commands, checks and presets",
    "research/language.py": "results on text at equal parameters",
    "research/leaderboard.py": "tables of the leaderboard",
    "docs/mixers.py": "page of mixers, and the README's table",
    "research/precision.py": "tables of losses with states of few bits",
    "research/rank_transfer.py": "published rankings, and what small tasks say of them",
    "research/scaling.py": "memory and traffic on several GPUs",
    "docs/tasks.py": "page of tasks",
    "tests/mutants/table.py": "page of the faulty mixers that the conformance kit catches",
    "tests/test_presets.py": "golden file of defaults",
}
"""Programs that always run, and descriptions of their output."""
PEERS = {
    "research/converters.py": "precision of every converted architecture",
    "research/conformance_matrix.py": "other libraries on the conformance vectors",
}
"""Programs that run with --peers."""
KERNELS = {"tests/ops/test_triton_compile.py": "GPU resources that the compiled Triton kernels need"}
"""Programs that run with --kernels."""


def main() -> None:
    """Run the programs one after another, and exit at the first that fails."""
    programs = dict(PROGRAMS)
    if "--kernels" in sys.argv[1:]:
        programs |= KERNELS
    if "--peers" in sys.argv[1:]:
        programs |= PEERS
    for number, (program, description) in enumerate(programs.items(), 1):
        start = time.perf_counter()
        sys.stdout.write(f"[{number}/{len(programs)}] {program}: {description} ...")
        sys.stdout.flush()
        result = subprocess.run([sys.executable, program], cwd=ROOT, capture_output=True, text=True, check=False)
        sys.stdout.write(f" {time.perf_counter() - start:.0f} s\n")
        if result.returncode:
            sys.exit(f"{program} failed:\n{result.stdout}{result.stderr}")


if __name__ == "__main__":
    main()
