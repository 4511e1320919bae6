"""The statistical model of a comparison: entries with a score for each seed, judged against a subject and in pairs.

variance      standard deviation of a seed's score: pooled over entries, or moderated where entries differ
comparison    differences with simultaneous intervals, ranks, equivalence, and verdicts in words
learned       tasks that a seed has learned or not: k of n, and the steps that learning took
"""
