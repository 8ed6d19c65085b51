"""Work done aside is done once, wherever that is."""

import pytest

from vflowopt.search.pause import Aside


def test_work_is_done_once() -> None:
    done = iter(range(10))
    aside = Aside("propose", lambda: next(done))
    assert (aside.run(), aside.run(), next(done)) == (0, 0, 1)


def test_a_result_from_elsewhere_counts_even_if_it_is_none() -> None:
    aside = Aside("encode", lambda: pytest.fail("must not be done again"))
    aside.finish(None)
    assert aside.run() is None


def test_work_that_failed_fails_again() -> None:
    aside = Aside("encode", lambda: 1 // 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            aside.run()
