"""Every line of the tables in docs/reference/pictures.md is true."""

import re

import numpy as np
import pytest

from tests.repository.source import ROOT
from tests.vflowopt.picture_lines import LINES, Read, Refused
from vflowopt.media.picture import Picture, PictureError

CASES = [
    pytest.param(case, id=f"{line} {number}") for line, cases in LINES.items() for number, case in enumerate(cases, 1)
]


@pytest.mark.parametrize("case", CASES)
def test_what_a_file_holds_is_read_or_refused_for_the_right_reason(case: Read | Refused) -> None:
    if isinstance(case, Refused):
        with pytest.raises(PictureError) as refused:
            Picture.decode(case.data)
        assert (refused.value.reason, refused.value.metadata) == (case.reason, case.metadata)
        return
    pixels = Picture.decode(case.data).pixels
    right = np.array(case.colours).reshape(-1, case.width or len(case.colours), 3)
    assert pixels.shape == right.shape
    assert np.abs(pixels.astype(int) - right).max() <= case.within, pixels.tolist()


def test_the_tables_name_what_is_tested() -> None:
    page = (ROOT / "docs" / "reference" / "pictures.md").read_text()
    named = re.findall(r"^\| ((?:PNG|JPEG|WebP|GIF|BMP|TIFF|AVIF): [^|]*?) \|", page, re.M)
    assert named == list(LINES)
