"""TIFF files: how their samples are stored, and kinds that are not read."""

from __future__ import annotations

from io import BytesIO

from PIL import ImageFile, ImagePalette, TiffImagePlugin

from vflowopt.media.greys import SampleType

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_FILL_ORDER, _SAMPLES, _BYTES_OF_STRIPS, _PLANES = 266, 277, 279, 284
_COLOUR_MAP, _EXTRA_SAMPLES, _SAMPLE_FORMAT, _SUBSAMPLING = 320, 338, 339, 530
_UNASSOCIATED = 2

_NATIVE = {
    **dict.fromkeys(("I;16S", "I;16BS"), "I;16NS"),
    **dict.fromkeys(("I;32S", "I;32BS"), "I;32NS"),
    **dict.fromkeys(("F;32F", "F;32BF"), "F;32NF"),
}

_KINDS = {1: "u", 2: "i", 3: "f"}
_KIND_NAMES = {1: "unsigned", 2: "signed", 3: "floating point", 4: "untyped", 5: "complex", 6: "complex"}
_COLOURS = {
    0: "grey, white is zero",
    1: "grey",
    2: "RGB",
    3: "palette",
    4: "mask",
    5: "CMYK",
    6: "YCbCr",
    8: "CIE L*a*b*",
    9: "ICC L*a*b*",
    10: "ITU L*a*b*",
    32803: "colour filter array",
    32844: "LogL",
    32845: "LogLuv",
    34892: "linear raw",
}
_MOST_COMPRESSION = 65535

RARE_COMPRESSIONS = {"webp", "tiff_jpeg", "tiff_thunderscan", "tiff_sgilog", "tiff_sgilog24"}
"""Compressions that many builds of Pillow's libtiff lack. It does not say so: to it, such a file is damaged."""


class TiffFile(TiffImagePlugin.TiffImageFile):
    """A TIFF file, with what Pillow's class misreads put right.

    Attributes:
        greys: how greys are stored; None for colours and for plain greys of up to 8 bits, which Pillow reads well.
        misread_kind: what the file holds, if Pillow takes its samples for others all the same; else None.
    """

    greys: SampleType | None
    misread_kind: str | None

    def _setup(self) -> None:
        tags = self.tag_v2
        white_is_zero = False
        if _first(tags.get(_SAMPLES, 1)) == 1 and _PLANES in tags:
            tags[_PLANES] = 1  # one plane is no different from one sample after the other
        if tags.get(_PHOTOMETRIC) == 0 and (_first(tags.get(_BITS, 1)) > 8 or _first(tags.get(_SAMPLE_FORMAT, 1)) != 1):
            white_is_zero = True
            tags[_PHOTOMETRIC] = 1
        super()._setup()
        colours = tags.get(_COLOUR_MAP, ())
        if self.mode in ("P", "PA") and colours and max(colours) < 256:
            self.palette = ImagePalette.raw("RGB;L", bytes(colours))  # some writers give 8 bits instead of 16
        self.tile = [self._mended(tile) for tile in self.tile]
        self.greys = self._sample_type(white_is_zero)
        self.misread_kind = self._misread_kind()

    def _sample_type(self, white_is_zero: bool) -> SampleType | None:
        kind = _KINDS.get(_first(self.tag_v2.get(_SAMPLE_FORMAT, 1)), "u")
        bits = _first(self.tag_v2.get(_BITS, 1))
        if self.mode in ("I", "F") or self.mode.startswith("I;16") or (self.mode == "L" and bits == 8 and kind == "i"):
            return SampleType(bits, kind, white_is_zero)
        return None

    def _misread_kind(self) -> str | None:
        tags = self.tag_v2
        if self.mode == "YCbCr" and not self.use_load_libtiff and tuple(tags.get(_SUBSAMPLING, (2, 2))) != (1, 1):
            if sum(tags.get(_BYTES_OF_STRIPS, (0,))) < 3 * self.width * self.height:
                return "YCbCr, subsampled without compression"
        if tags.get(_PLANES, 1) != 1 and not self._reads_planes():
            return f"planes of {_COLOURS[tags.get(_PHOTOMETRIC, 1)]}, {_first(tags[_BITS])}-bit"
        return None

    def _reads_planes(self) -> bool:
        unassociated = _first(self.tag_v2.get(_EXTRA_SAMPLES, _UNASSOCIATED)) == _UNASSOCIATED
        plain = self.mode in ("RGB", "CMYK") or (self.mode == "RGBA" and unassociated)
        return plain and (_first(self.tag_v2[_BITS]) == 8 or (self.mode == "RGB" and not self.use_load_libtiff))

    def _mended(self, tile: ImageFile._Tile) -> ImageFile._Tile:
        """A tile whose samples are read at their width and in their byte order."""
        assert isinstance(tile.args, tuple)
        rawmode, *rest = tile.args
        if self.use_load_libtiff:
            rawmode = _NATIVE.get(rawmode, rawmode)  # libtiff gives samples in the order of the processor
        elif rawmode in ("R", "G", "B") and _first(self.tag_v2[_BITS]) == 16:
            rawmode += ";16B" if self.tag_v2.prefix == TiffImagePlugin.MM else ";16L"
        return tile._replace(args=(rawmode, *rest))


def unread_kind(data: bytes) -> str | None:
    """What a file that Pillow does not open holds, if that is something a TIFF file may hold; else None."""
    try:
        if data.startswith(b"MM\0+"):
            return "BigTIFF, big-endian"
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[:16] if data.startswith(b"II+\0") else data[:8])
        file = BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        bits, sample_format = tags.get(_BITS, (1,)), _first(tags.get(_SAMPLE_FORMAT, 1))
        colours, compression = tags.get(_PHOTOMETRIC, 1), tags.get(_COMPRESSION, 1)
        whole = tags[_WIDTH] > 0 and tags[_HEIGHT] > 0 and all(1 <= each <= 64 for each in bits)
        whole = whole and colours in _COLOURS and sample_format in _KIND_NAMES and 1 <= compression <= _MOST_COMPRESSION
    except MemoryError:
        raise
    except Exception:  # Pillow's reader raises exceptions of many types
        return None
    if not whole:
        return None
    if compression not in TiffImagePlugin.COMPRESSION_INFO:
        return f"compression {compression}"
    kind = f"{_COLOURS[colours]}, {'/'.join(map(str, bits))}-bit {_KIND_NAMES[sample_format]}"
    if tags.get(_FILL_ORDER, 1) != 1:
        return f"{kind}, bits reversed"
    plain = set(bits) <= {1, 8} and sample_format == 1 and colours in (0, 1, 2, 3, 5, 6) and len(bits) in (1, 3, 4)
    return None if plain else kind


def _first(value: object) -> int:
    first = value[0] if isinstance(value, tuple) and value else value
    return first if isinstance(first, int) else 1
