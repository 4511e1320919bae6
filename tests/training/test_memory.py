"""Freed memory stays with the process and is reused."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from seqmix.training.monitoring.memory import keep_freed_memory, return_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**24).fill_(1)  # 64 MiB: 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
keep_freed_memory()
return_freed_memory()
faults()
print(faults())
keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose setting it is")
def test_kept_freed_memory_is_reused_with_fewer_page_faults():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    without, returned, kept = map(int, done.stdout.split())
    # huge pages may make few of many
    assert kept < without / 4
    assert returned > without / 2
