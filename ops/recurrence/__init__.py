"""Recurrences with a matrix state per head: one call of them, and the two engines that all their families share.

family       a call's tensors, what a family declares, and `recur`, which runs the kernel that a call names
token_loop   the recurrent paradigm, token by token
chunk_loop   the chunkwise paradigm: chunks one after another, several side by side (groups)
intra_chunk  decays and scores inside a chunk
"""

from .family import Family, Recurrence, RecurrenceOutput, recur

__all__ = ["Family", "Recurrence", "RecurrenceOutput", "recur"]
