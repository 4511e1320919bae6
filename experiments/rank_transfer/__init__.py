"""Rank transfer: prediction of published rankings of mixers by small tasks.

ranks  statistics of ranks: Spearman's rho, intervals, permutation tests, power
"""
