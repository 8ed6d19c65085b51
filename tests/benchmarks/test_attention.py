"""The comparison of attention kernels, rehearsed at its smallest size; the kernels are interpreted without a GPU."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import attention
from benchmarks.attention import GEOMETRIES, Variant, rows, scenarios, variants
from tests.vflowopt.interpreter import DEVICE, repaired_interpreter  # noqa: F401
from vflowopt.runtime.attention import SdpaBackend
from vflowopt.runtime.cache import PagePool

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:flex_attention called:UserWarning")

TINY = GEOMETRIES["tiny"]


def measured(ways: list[Variant], budget_s: float = 1000.0) -> list[dict[str, object]]:
    device = torch.device(DEVICE)
    return list(rows(device, torch.float32, TINY, scenarios(1000), ways, budget_s=budget_s, repeats=1))


def test_every_variant_is_right_in_every_batch_or_says_why_not() -> None:
    ways = variants(torch.float32, TINY, tilings=False)
    found = measured(ways)
    assert len(found) == len(ways) * 5
    for row in found:
        if str(row["variant"]).startswith("varlen"):  # float32 is nothing for flash attention
            assert row["ms"] is None and row["why_not"]
        else:
            assert row["ms"] is not None and row["why_not"] is None, row
            assert isinstance(row["error"], float) and row["error"] < 1e-4


class Forgetful(SdpaBackend):
    """Attends as if every context were a token shorter."""

    def decodes(self, batch: int, blocks: int):  # type: ignore[no-untyped-def]
        right = super().decodes(batch, blocks)
        return lambda *states_and_pages: right(*states_and_pages[:4], states_and_pages[4] - 1, states_and_pages[5])

    def plan(self, layers, caches, counts):  # type: ignore[no-untyped-def]
        raise RuntimeError("not here")


def test_what_is_wrong_is_not_timed() -> None:
    def build(pool: PagePool, heads: int) -> SdpaBackend:
        return Forgetful(pool)

    for row in measured([Variant("forgetful", build)]):
        decodes = str(row["scenario"]).startswith("decode,")
        assert row["why_not"] == ("wrong numbers" if decodes else "RuntimeError: not here")
        assert row["ms"] is None


def test_nothing_begins_without_time() -> None:
    assert measured(variants(torch.float32, TINY), budget_s=0.0) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attention, "variants", lambda *_, **__: [Variant("sdpa", lambda pool, heads: SdpaBackend(pool))]
    )
    arguments = ["--device", "cpu", "--dtype", "float32", "--geometry", "tiny", "--shorter", "300", "--repeats", "1"]
    assert attention.main([*arguments, "--json", str(tmp_path / "rows.json")]) == 0
    assert "prefill" in capsys.readouterr().out
    assert {row["variant"] for row in json.loads((tmp_path / "rows.json").read_text())} == {"sdpa"}
