"""Linearizing: a trained model whose mixers are swapped by a plan, and taught by the model that it was."""

from .course import Linearization, Prepared, Result
from .plan import Plan, load_plan

__all__ = ["Linearization", "Plan", "Prepared", "Result", "load_plan"]
