"""Conformance vectors: inputs, expected outputs, states and gradients of every op, for any implementation.

families.py  what each op computes, and the meaning of its tensors
composed.py  cases of ops without kernels of their own
cases.py     the cases, each with the kind of bug that it shows
write.py     writes the files: an index, its JSON schema, tensors, and the runner
runner.py    tests an implementation on these files; needs numpy and safetensors, and nothing of this package
"""
