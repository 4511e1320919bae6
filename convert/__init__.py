"""Weights of other libraries' models, and back: one file per family says what their configuration and tensors are here.

`layout.py` executes what the declarations say, both ways.
"""

from .architecture import Architecture
from .conversion import ARCHITECTURES, architecture_of, export_to, import_from, recognised

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "export_to", "import_from", "recognised"]
