"""Write everything in the repository that programs write: `python docs/regenerate.py`.

`--kernels` compiles every configuration of the Triton kernels as well, which takes minutes: after a change of
ops/kernels/triton. `--peers` measures every converter beside the other library's model: after a change of convert/,
with transformers, torchscale and fla installed.
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {
    "docs/api.py": "the Python API, from docstrings",
    "docs/generate.py": "fields, commands, checks, presets",
    "docs/mixers.py": "the table of the README, and the page of mixers",
    "docs/scaling.py": "memory and traffic on several GPUs",
    "docs/tasks.py": "the page of tasks",
    "tests/mutants/table.py": "the wrong mixers that the kit catches",
    "tests/test_presets.py": "the golden file of defaults",
}
PEERS = {"docs/converters.py": "how exactly every architecture converts"}
KERNELS = {"tests/ops/test_triton_compile.py": "what the compiled Triton kernels need of a GPU"}


def main() -> None:
    """Run the programs, one after another; the first that fails ends it."""
    programs = dict(PROGRAMS)
    if "--kernels" in sys.argv[1:]:
        programs |= KERNELS
    if "--peers" in sys.argv[1:]:
        programs |= PEERS
    for number, (program, what) in enumerate(programs.items(), 1):
        start = time.perf_counter()
        sys.stdout.write(f"[{number}/{len(programs)}] {program}: {what} ...")
        sys.stdout.flush()
        done = subprocess.run([sys.executable, program], cwd=ROOT, capture_output=True, text=True, check=False)
        sys.stdout.write(f" {time.perf_counter() - start:.0f} s\n")
        if done.returncode:
            sys.exit(f"{program} failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
