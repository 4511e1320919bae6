"""Attention maps as PNG images whose opacity shows the weight; a page uses them as masks in its own colour."""

import struct
import zlib
from base64 import b64encode

import torch
from jaxtyping import Float
from torch import Tensor


def picture(values: Float[Tensor, "Q T"]) -> str:
    """Return an attention map as the data URL of a PNG (gray and opacity) with one pixel per weight.

    The opacity is sqrt(weight / largest weight of its row), so that small weights are visible.
    """
    relative = values.float() / values.amax(-1, keepdim=True).clamp(min=1e-30)
    opacity = (255 * relative.clamp(0, 1).sqrt()).round().to(torch.uint8).cpu()
    rows, columns = opacity.shape
    pixels = torch.stack((torch.zeros_like(opacity), opacity), dim=-1).flatten(1)
    # each line begins with the type of its filter, 0 for none
    lines = torch.cat((torch.zeros(rows, 1, dtype=torch.uint8), pixels), dim=1)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 4, 0, 0, 0)
    data = zlib.compress(lines.contiguous().numpy().tobytes(), 9)
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    )
    return f"data:image/png;base64,{b64encode(png).decode()}"
