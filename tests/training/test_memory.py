"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from seqmix.training.memory import keep_freed_memory, return_freed_memory

if sys.argv[1] != "nothing":
    keep_freed_memory()
if sys.argv[1] == "return":
    return_freed_memory()
def fill():
    torch.empty(2**24).fill_(1)  # 64 MiB: 16,384 pages
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(what: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, what], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose setting it is")
def test_freed_memory_comes_back_without_page_faults():
    # huge pages may make few of many
    without = faults("nothing")
    assert faults("keep") < without / 4
    assert faults("return") > without / 2
