"""Inspection of a trained model on a text: where heads look, how long states remember, how gradients flow."""

from .views import LayerView, look

__all__ = ["LayerView", "look"]
