"""Kernel backends beside the plain-torch references: Triton, and those of other libraries; `selection` chooses one.

A kernel is declared beside its code (`Kernel`), with its tolerances and the reasons for which it refuses a call. These
modules are imported on demand: each needs its optional library only where a kernel is launched.
"""

from ..runtime.kernel import Kernel, Probe, declare, find

__all__ = ["Kernel", "Probe", "declare", "find"]
