"""Kernels for CPUs in plain C++: loops over tokens, which torch could only run as thousands of small operations.

A family of kernels has one source and one module of the same name:

    scan.cpp    functions `extern "C" void name(...)`, each below its recurrence; common.h has exp and threads
    scan.py     an `Op` whose forward and backward pass call these functions, and the declaration of its `Kernel`
    build.py    provides the library of a source: compiled (compiler.py) at first use, then cached (library_cache.py)

functions.py calls a function of a library, with the types that its source declares.

To add a family:

1. Write FAMILY.cpp. Its functions take pointers, `int64_t` and `double`, in declarations without macros, which
   functions.py reads. The last argument is the number of threads; results must not depend on it, so split work by
   rows, documents, heads or blocks of channels of a fixed size, and add partial sums in a fixed order. Sequences are
   ranges of tokens, `bounds[n]` to `bounds[n + 1]`, so that rows of a batch and packed documents are the same
   (`sequences` in common.py).
2. Write FAMILY.py. It makes tensors contiguous and float32, allocates the results, and calls
   `call("FAMILY", "function", *arguments)`. Its Kernel has `backend="native"`, `limits=limits_of("FAMILY")`
   and `follows_inputs=True`.
3. Add the module to `ON_DEMAND["native"]` in ops/runtime/kernel.py, and to `AUTO_ON_CPU` in ops/kernels/selection.py
   once it passes `seqmix check OP/PARADIGM/native`.
"""
