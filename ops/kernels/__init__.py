"""Kernel backends besides the plain-torch references: this library's Triton kernels, and kernels of other libraries.

Each kernel is declared next to its code (`Kernel`), with its tolerances and the calls it does not support; `selection`
chooses one. These modules are imported on demand, and each imports its optional library only to launch a kernel.
"""

from ..runtime.kernel import Kernel, Probe, declare, find

__all__ = ["Kernel", "Probe", "declare", "find"]
