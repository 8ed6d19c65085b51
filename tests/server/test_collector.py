"""The garbage collector does not look through the libraries while the service serves."""

import gc
import sys

from benchmarks.wire.__main__ import serving


def test_what_the_start_made_is_left_alone() -> None:
    with serving(sys.executable, calls=False) as service:
        assert service.use().threads["process"]["frozen"] > 100_000
    assert not gc.get_freeze_count()
