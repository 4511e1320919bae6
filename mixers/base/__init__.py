"""The contract of a sequence mixer, and what follows from it for any mixer.

contract, traits   `SequenceMixer` and its configuration; what a mixer declares that it supports
layer_call         what goes into a layer, and what comes out
state, rollback    states as values: copy, select, save; the state of an earlier token
roles              what each parameter is: matrix, vector, rate, norm, convolution
influence          how far back a token of the output depends on the input
context_parallel   mixers over a sequence that several processes share
"""
