"""Linearization: swap mixers of a trained model by a plan, and train the new ones to imitate the original model."""

from .linearization import Linearization, Prepared, Result
from .plan import Plan, load_plan

__all__ = ["Linearization", "Plan", "Prepared", "Result", "load_plan"]
