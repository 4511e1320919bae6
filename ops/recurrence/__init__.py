"""Recurrences with a matrix state per head: the inputs of a kernel, and two engines that all families share.

family       inputs of a kernel, the description of a family, and `recur`, which runs the kernel that a call selects
token_loop   the recurrent paradigm, token by token
chunk_loop   the chunkwise paradigm: chunks one after another, several side by side (groups)
intra_chunk  decays and scores inside a chunk
"""

from .family import Family, Recurrence, RecurrenceOutput, recur

__all__ = ["Family", "Recurrence", "RecurrenceOutput", "recur"]
