"""The suite: tasks of published benchmarks that tell mixers apart, each an ordinary study.

tasks     what is trained on: small.yaml, paper.yaml; the studies of all tasks, in files that `seqmix compare` runs too
budget    how much of it fits into a time, by steps that are timed
scores    what came out: rows that can be merged, a table
"""
