"""Maps as pictures: PNG files whose opacity is the value, which a page paints in a colour of its theme."""

import struct
import zlib
from base64 import b64encode

import torch
from jaxtyping import Float
from torch import Tensor


def picture(values: Float[Tensor, "Q T"]) -> str:
    """A map as the address of a PNG (gray and opacity), one pixel per entry: each row over its largest entry, by its
    square root, so that small weights are seen."""
    share = values.float() / values.amax(-1, keepdim=True).clamp(min=1e-30)
    opacity = (255 * share.clamp(0, 1).sqrt()).round().to(torch.uint8).cpu()
    rows, columns = opacity.shape
    pixels = torch.stack((torch.zeros_like(opacity), opacity), dim=-1).flatten(1)
    lines = torch.cat(
        (torch.zeros(rows, 1, dtype=torch.uint8), pixels), dim=1
    )  # each line begins with its filter: none
    header = struct.pack(">IIBBBBB", columns, rows, 8, 4, 0, 0, 0)
    data = zlib.compress(lines.contiguous().numpy().tobytes(), 9)
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    )
    return f"data:image/png;base64,{b64encode(png).decode()}"
