"""Inspection of a trained model on a text: how far back heads look, how states grow, how large gradients are."""

from .views import LayerView, look

__all__ = ["LayerView", "look"]
