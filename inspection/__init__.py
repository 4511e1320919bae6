"""What a trained model does with a text: where its heads look, how long its states remember, how gradients flow."""

from .views import LayerView, look

__all__ = ["LayerView", "look"]
