"""The format of a picture file, recognised by how it begins."""

from __future__ import annotations

import struct

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""The accepted file formats. Others that Pillow knows are refused, so that fewer decoders read untrusted bytes. HEIC is
accepted besides where its plugin is installed."""

_BEGINNINGS = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
}

# The sizes of the header that follows the first 14 bytes of a BMP file. Two letters alone could begin any text.
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)

# Brands of ISO media files (the first box of the file names them): a film has others.
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_MOST_BRANDS = 64


def format_of(data: bytes) -> str | None:
    """The format of a file: one of ``FORMATS``, "HEIC", or None for a file of any other kind."""
    for beginning, form in _BEGINNINGS.items():
        if data.startswith(beginning):
            return form
    if data.startswith(b"RIFF"):
        return "WEBP" if data[8:12] == b"WEBP" else None  # WAV and AVI are RIFF, too
    if data.startswith(b"BM"):
        return "BMP" if len(data) >= 18 and struct.unpack_from("<I", data, 14)[0] in _BMP_HEADERS else None
    if data[4:8] == b"ftyp":
        brands = _brands(data)
        if brands & _AVIF_BRANDS:
            return "AVIF"
        if brands & _HEIC_BRANDS:
            return "HEIC"
    return None


def _brands(data: bytes) -> set[bytes]:
    """The brands in the box `ftyp`: the major one, and after its version the compatible ones."""
    size = min(struct.unpack_from(">I", data)[0], 16 + 4 * _MOST_BRANDS, len(data))
    return {data[8:12], *(data[at : at + 4] for at in range(16, size - 3, 4))}
