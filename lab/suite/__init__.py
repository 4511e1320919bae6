"""The suite: tasks of published benchmarks that separate mixers, each an ordinary study.

tasks     the tasks (small.yaml, paper.yaml), and their studies, as files that `seqmix compare` can also run
budget    the part of the suite that fits into a time budget, from timed steps
scores    the results: rows that can be merged, and a table
"""
