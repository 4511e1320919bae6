"""Rank transfer: prediction of published rankings of mixers by small tasks.

grids        published comparisons as data (grids/*.yaml), and the mixers that stand for their models (leaderboard.yaml)
predictions  expectations from before the measurement (predictions.yaml)
ranks        statistics of ranks: Spearman's rho, intervals, permutation tests, power
analysis     scores of the suite against the grids
page         tables of docs/explanation/rank-transfer.md
"""
