"""Parameter-free sequence maps: one folder per family of recurrences, and what all families share.

call, packing, context_parallel     what travels beside the tensors of a segment
recurrence, recurrent, chunkwise    the engines of recurrences with a matrix state per head
autograd                            how an op enters torch
kernels, backends                   which function computes it
"""
