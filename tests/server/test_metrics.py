"""Metrics as Prometheus reads them: from the side port, in its own format, while the service works."""

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

import grpc
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from docs._generate import metrics as metrics_reference
from tests.repository.source import ROOT
from tests.server.calibrating import samples
from tests.server.conftest import Serve
from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import DeadlineExceeded, NotFound, StorageFailed


def families(served: Served) -> list[Metric]:
    with urllib.request.urlopen(f"http://127.0.0.1:{served.service.side_port}/metrics", timeout=10) as answer:
        return list(text_string_to_metric_families(answer.read().decode()))


def scraped(served: Served) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families(served)
        for sample in family.samples
    }


def value(served: Served, name: str, **labels: str) -> float:
    return scraped(served).get((name, frozenset(labels.items())), 0.0)


@pytest.fixture
def watched(serve: Serve) -> Served:
    return serve(metrics_port="0")


def test_calls_are_counted_by_method_and_code(watched: Served) -> None:
    with watched.client.session() as session, pytest.raises(NotFound):
        watched.client.attach(f"{session.name}0").state()
    count = {
        (dict(labels)["method"], dict(labels)["code"]): number
        for (name, labels), number in scraped(watched).items()
        if name == "vflow_calls_total"
    }
    assert count == {
        ("Conversations/CreateSession", "OK"): 1,
        ("Conversations/GetSession", "NOT_FOUND"): 1,
        ("Conversations/DeleteSession", "OK"): 1,
    }
    assert value(watched, "vflow_calls_in_flight") == 0


def test_a_call_that_is_cancelled_or_late_is_counted_as_that(watched: Served) -> None:
    session = watched.client.session()
    answer = session.ask("Go on", max_new_tokens=4000)
    next(answer)
    assert value(watched, "vflow_calls_in_flight") == 1 and value(watched, "vflow_requests_running") == 1
    answer.close()
    chat = {"method": "Conversations/Chat"}
    until(lambda: value(watched, "vflow_calls_total", code="CANCELLED", **chat) == 1)

    def late() -> bool:
        with pytest.raises(DeadlineExceeded):
            session.ask("Go on", max_new_tokens=4000, timeout=0.3).read()
        return value(watched, "vflow_calls_total", code="DEADLINE_EXCEEDED", **chat) >= 1

    until(late)  # on a busy machine the time may be up before the service receives the call
    assert value(watched, "vflow_turns_total", reason="length") == 0


def test_a_turn_shows_in_every_measure_as_its_receipt_says(watched: Served, picture: bytes) -> None:
    with watched.client.session() as session:
        shown = session.add_image(picture)
        answer = session.ask("What is that?", max_new_tokens=5)
        answer.read()
        found = scraped(watched)

        def read(name: str, **labels: str) -> float:
            return found[name, frozenset(labels.items())]

        assert read("vflow_pictures_total", cache="miss") == 1
        assert read("vflow_visual_tokens_total") == shown.visual_tokens
        kept = [read("vflow_visual_tokens_kept_total", stage=str(stage)) for stage in range(3)]
        assert kept == list(shown.kept_tokens)
        assert read("vflow_picture_kv_bytes_total") == shown.kv_bytes
        assert read("vflow_picture_kv_bytes_saved_total") == shown.kv_bytes_full - shown.kv_bytes
        assert read("vflow_picture_seconds_sum", phase="encode") == pytest.approx(shown.encode_ms / 1000)
        assert read("vflow_turns_total", reason="length") == 1
        assert read("vflow_completion_tokens_total") == 5
        assert read("vflow_prompt_tokens_total", source="computed") == answer.receipt.new_prompt_tokens
        assert read("vflow_prompt_tokens_total", source="reused") == answer.receipt.reused_tokens
        assert read("vflow_first_token_seconds_sum") == pytest.approx(answer.receipt.first_token_ms / 1000)
        assert read("vflow_token_seconds_sum") == pytest.approx(answer.receipt.decode_ms / 4000)
        # The fifth token is in the log, but has not run: nothing follows it yet.
        assert read("vflow_model_tokens_total", phase="decode") == 4
        assert read("vflow_batch_size_count") == read("vflow_step_seconds_count") >= 5
        used = read("vflow_kv_pages", state="used")
        assert used * read("vflow_kv_page_bytes") == watched.service.runtime.pool.bytes_used > 0
        assert read("vflow_session_kv_bytes", state="resident") == session.state().kv_bytes
        assert read("vflow_prefix_cache_entries") == 1 and read("vflow_prefix_cache_lookups_total", cache="miss") == 1
    with watched.client.session() as other:
        assert other.add_image(picture).cache_hit
    assert value(watched, "vflow_pictures_total", cache="hit") == 1
    assert value(watched, "vflow_prefix_cache_lookups_total", cache="hit") == 1


def test_evictions_and_restores_are_counted(serve: Serve) -> None:
    served = serve(metrics_port="0")
    with served.client.session() as session:
        session.ask("Hello", max_new_tokens=4).read()
        assert value(served, "vflow_sessions", state="resident") == 1
        served.on_engine(served.service.kv.release_idle)
        assert value(served, "vflow_sessions", state="evicted") == 1
        assert value(served, "vflow_evictions_total", held_by="idle") == 1
        assert value(served, "vflow_offloaded_bytes", tier="host_memory") > 0
        session.ask("Go on", max_new_tokens=4).read()
    assert value(served, "vflow_restores_total", tier="host_memory") == 1


def test_a_search_and_the_fidelity_of_live_turns_are_exported(serve: Serve, picture: bytes) -> None:
    served = serve(metrics_port="0", watch_share="1")
    with served.client.session() as session:
        session.add_image(picture)
        session.ask("What is that?", max_new_tokens=4).read()
        name = "strategies/preset-10"
        until(lambda: value(served, "vflow_fidelity_cosine_count", strategy=name) == 1)
        # Of random weights nobody knows which way it points.
        assert 0 < abs(value(served, "vflow_fidelity_cosine_sum", strategy=name)) <= 1.0001
        assert value(served, "vflow_fidelity_tokens_compared_total", strategy=name) == 4
    assert value(served, "vflow_retune_running") == 0
    search = served.client.strategies.retune(0.3, samples(2), trials=1000)
    until(lambda: value(served, "vflow_retune_trials_done") >= 1)
    assert value(served, "vflow_retune_running") == 1 and value(served, "vflow_retune_trials") == 1000
    search.cancel()
    until(lambda: value(served, "vflow_retune_running") == 0)


def test_writing_sessions_down_is_timed_and_its_failures_counted(serve: Serve, tmp_path: Path) -> None:
    served = serve(metrics_port="0", data=str(tmp_path))
    session = served.client.session()
    session.ask("Hello", max_new_tokens=2).read()
    assert value(served, "vflow_journal_commit_seconds_count") >= 2  # the session, and its turn
    assert value(served, "vflow_journal_failures_total") == 0
    moved = (tmp_path / "sessions.sqlite3").rename(tmp_path / "elsewhere")
    with pytest.raises(StorageFailed):
        session.ask("Hello", max_new_tokens=2).read()
    assert value(served, "vflow_journal_failures_total") >= 1
    moved.rename(tmp_path / "sessions.sqlite3")


def test_several_services_count_for_themselves(serve: Serve) -> None:
    first, second = serve(metrics_port="0"), serve(metrics_port="0")
    with first.client.session():
        assert value(first, "vflow_sessions", state="evicted") == 1
        assert value(second, "vflow_sessions", state="evicted") == 0


def test_without_a_port_nothing_listens(served: Served) -> None:
    assert served.service.side_port is None


def test_methods_of_others_are_not_counted(watched: Served) -> None:
    with grpc.insecure_channel(watched.address) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary("/vflow.v1.Conversations/Nothing")(b"")
    assert not [labels for name, labels in scraped(watched) if name == "vflow_calls_total"]


def test_no_series_says_when_another_was_created(watched: Served, picture: bytes) -> None:
    with watched.client.session() as session:
        session.add_image(picture)
        session.ask("What is that?", max_new_tokens=2).read()
    assert not [name for name, _ in scraped(watched) if name.endswith("_created")]


def test_names_and_help_texts_follow_the_conventions_of_prometheus(watched: Served) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool")
    with urllib.request.urlopen(f"http://127.0.0.1:{watched.service.side_port}/metrics", timeout=10) as answer:
        done = subprocess.run(("promtool", "check", "metrics"), input=answer.read(), capture_output=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def named(text: str) -> set[str]:
    return set(re.findall(r"\bvflow_[a-z_]+\b", text))


def test_every_metric_is_documented_and_dashboards_and_alerts_use_no_other(watched: Served) -> None:
    ours = {each.name: each.type for each in families(watched) if each.name.startswith("vflow_")}
    exported = {f"{name}_total" if kind == "counter" else name for name, kind in ours.items()}
    assert len(exported) > 40
    assert named(metrics_reference.page()) == exported
    parts = {
        f"{name}_{part}"
        for name, kind in ours.items()
        if kind in ("histogram", "summary")
        for part in ("bucket", "sum", "count")
    }
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/vflow.json").read_text())
    drawn = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    alerts = (ROOT / "deploy/prometheus/alerts.yml").read_text()
    assert len(drawn) > 30
    assert named(" ".join(drawn)) | named(alerts) <= exported | parts


def test_every_alarm_is_explained() -> None:
    alarms = re.findall(r"alert: (\w+)", (ROOT / "deploy/prometheus/alerts.yml").read_text())
    explained = re.findall(r"^\| `(VFlow\w+)` \|", (ROOT / "docs/how-to/monitor.md").read_text(), re.M)
    assert alarms == explained
