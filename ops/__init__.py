"""Parameter-free sequence maps: one folder per family, and two folders that all families share.

runtime      the call context (`Call`), packed documents, declaration of kernels, registration of custom ops
recurrence   the engines of recurrences with a matrix state per head
decay        linear attention, retention, gated linear attention, Mamba-2
delta, dplr  delta rules: DeltaNet to KDA; with separate keys, Gated DeltaNet-2 and RWKV-7
attention    softmax attention and its KV caches
choice       softmax attention to chosen blocks or tokens: MoBA, NSA, DSA
scan         recurrences with a vector state, element by element: Mamba, RG-LRU
convolution  short and long causal convolutions
cell         recurrences that are not linear in the state: sLSTM, M2RNN
ttt          test-time training: memories that are trained on the tokens
kernels      other backends (Triton, fla, FlexAttention, xformers), and how `auto` selects one
"""
