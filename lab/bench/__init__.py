"""Speed and memory of operations and models against other implementations, interleaved in one run.

measure, machine, products   interleaved timing; the machine's peak rates; time of a call's matrix products alone
benchmark                    one benchmark: warms up implementations, measures them, computes their share of the floor
op, recurrences, models      the benchmarks: retention's op; every op family against a loop over tokens; training,
                             prefill and decoding of whole models
learn                        loss and training time of small models on a text
peers/                       the models: seqmix, the same model hand-written, and one file per other project
report                       table cells, JSON and Markdown of a report
gpu, gpu_plan                everything that needs a GPU in one command; the list of its parts
"""
