"""Parameter-free sequence maps: one folder per family, and what all families share.

runtime      what travels beside the tensors of a segment (`Call`), and how an op enters torch
recurrence   the engines of recurrences with a matrix state per head
decay        linear attention, retention, gated linear attention, Mamba-2
delta, dplr  delta rules: DeltaNet to KDA; with separate keys, Gated DeltaNet-2 and RWKV-7
attention    softmax attention and its KV caches
scan         recurrences with a vector state, element by element: Mamba, RG-LRU
convolution  short and long causal convolutions
kernels      other backends (Triton, fla, FlexAttention, xformers), and which one `auto` takes
"""

from ..registry.moved import find_moved_modules

find_moved_modules()
