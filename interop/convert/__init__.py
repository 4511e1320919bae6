"""Conversion of weights from other libraries' models to seqmix, and back.

One file per model family declares which configuration fields and tensors correspond to each other. `fields.py` and
`layout.py` execute the declarations in both directions. In this package, `ours` names a field or tensor of seqmix, and
`theirs` the one of the other library.
"""

from .architecture import Architecture
from .conversion import ARCHITECTURES, architecture_of, export_to, import_from, recognised

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "export_to", "import_from", "recognised"]
