"""`vflow strategies` and `vflow retune` against a fake service, as a person and as a program see them."""

import argparse
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2

from tests.client.fake_service import FakeService, Refusal
from vflow_client.commands import progress
from vflow_client.commands.connection import seconds
from vflow_client.commands.share import share
from vflow_client.quantities import duration
from vflow_client.v1.strategies_pb2 import RetuneMetadata
from vflow_server.cli import main

Vflow = Callable[..., tuple[int, str, str]]


class FakeTerminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> FakeTerminal:
    """A terminal of 100 columns with colours."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return FakeTerminal()


@pytest.fixture
def vflow(address: str, capsys: pytest.CaptureFixture[str]) -> Vflow:
    """Runs the command; returns its exit code and what it wrote."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([*map(str, arguments), "--address", address])
        written = capsys.readouterr()
        return code, written.out, written.err

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(b"picture")
    lines = [{"image": "a.png", "question": question} for question in ("What?", "Where?", "How many?")]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


@pytest.fixture
def retune_on_terminal(vflow: Vflow, data: Path, terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch) -> Vflow:
    """Runs a search whose error stream is the terminal."""

    def run() -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stderr", terminal)
        return vflow("retune", "--budget", 0.1, "--data", data)

    return run


def test_a_list_is_aligned_and_marks_the_active_strategy(vflow: Vflow) -> None:
    code, out, err = vflow("strategies", "list")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "   NAME       BUDGET  RATIOS                 T   ALPHA   GRID  DIVERSITY  OBJECTIVE  ORIGIN",
        "*  full        10.0%  0.125/1.000/0.500  39.00   0.000  17.00      0.000          -  built in",
        "   tuned-one   10.0%  0.200/0.500/0.600  12.50  -0.250   6.50      0.250     0.9500  search",
    ]


def test_what_is_known_of_a_strategy(vflow: Vflow) -> None:
    code, out, _ = vflow("strategies", "show", "preset-10")
    assert code == 0
    assert "name         strategies/preset-10 (active)\n" in out
    assert "stages       from layers 0, 8, 16; each keeps 0.125/1.000/0.500 of those before it\n" in out
    assert "etag         e1\nhistory      1970-01-01 00:00:00 UTC replaced: on trial\n" in out


def test_without_a_name_the_active_strategy_is_shown(vflow: Vflow) -> None:
    assert "strategies/full (active)" in vflow("strategies", "show")[1]


def test_activating_and_rolling_back(vflow: Vflow, service: FakeService) -> None:
    code, out, _ = vflow("strategies", "activate", "mine", "--etag", "e1")
    assert code == 0 and out == "mine is active: new sessions use it, existing sessions are not affected\n"
    request = service.requests["ActivateStrategy"][0]
    assert (request.name, request.etag) == ("strategies/mine", "e1")
    code, out, _ = vflow("strategies", "rollback", "--tenant", "red")
    assert code == 0 and out.startswith("preset-25 is active")
    assert service.tenants == [None, "red"]


def test_a_comparison_is_a_table(vflow: Vflow, service: FakeService, data: Path) -> None:
    code, out, _ = vflow("strategies", "compare", "preset-10", "mine", "--data", data, "--questions", 2)
    assert code == 0
    assert out.splitlines() == [
        "               preset-10             mine                  CHANGE",
        "budget         10.0%                 10.0%",
        "ratios         0.125/1.000/0.500     0.125/1.000/0.500",
        "threshold t    39.00                 39.00",
        "alpha          0.000                 0.000",
        "grid           17.00                 17.00",
        "diversity      0.000                 0.000",
        "visual tokens  131.0 of 1,312.0      132.0 of 1,312.0      +1.0",
        "KV bytes       393.0 KiB of 3.8 MiB  393.0 KiB of 3.8 MiB  +0 B",
        "objective      0.9000                0.9500                +0.0500",
        "agreement      50.0%                 75.0%                 +25.0 points",
        "means over 2 pictures and 4 questions (data abababababab)",
    ]
    sent = service.requests["CompareStrategies"][0].calibration.samples.samples
    assert [list(sample.questions) for sample in sent] == [["What?", "Where?"]]


@pytest.mark.parametrize(
    ("arguments", "look"),
    [
        (
            ["list"],
            lambda printed: [strategy["name"] for strategy in printed] == ["strategies/full", "strategies/tuned-one"],
        ),
        (["show", "full"], lambda printed: printed["draft"] is False and printed["ratios"] == [0.125, 1.0, 0.5]),
        (["activate", "mine"], lambda printed: printed["active"] is True),
        (["rollback"], lambda printed: printed["name"] == "strategies/preset-25"),
        (["compare", "a", "b", "--live"], lambda printed: printed["compared"][1]["agreement"] == 0.75),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_json_for_programs(vflow: Vflow, arguments: list[str], look: Callable[[Any], bool]) -> None:
    code, out, err = vflow("strategies", *arguments, "--json")
    assert code == 0 and err == "" and look(json.loads(out))


def test_a_refusal_is_told_and_the_exit_code_is_1(vflow: Vflow, service: FakeService, data: Path) -> None:
    service.refusals["RollbackStrategy"] = [Refusal(grpc.StatusCode.FAILED_PRECONDITION, "NOTHING_TO_ROLL_BACK")]
    assert vflow("strategies", "rollback") == (1, "", "error: NOTHING_TO_ROLL_BACK: refused on purpose\n")
    service.refusals["Retune"] = [
        Refusal(grpc.StatusCode.ABORTED, "RETUNE_RUNNING", metadata={"operation": "operations/other"})
    ]
    code, out, err = vflow("retune", "--budget", 0.1, "--data", data)
    assert (code, out) == (1, "") and "vflow retune --follow operations/other" in err


@pytest.mark.parametrize(
    ("method", "arguments"),
    [("Retune", ["retune", "--budget", 0.1]), ("CompareStrategies", ["strategies", "compare", "a", "b"])],
)
def test_a_picture_that_is_none_is_named(
    vflow: Vflow, service: FakeService, data: Path, method: str, arguments: list[object]
) -> None:
    (data / "b.png").write_bytes(b"no picture")
    with (data / "questions.jsonl").open("a") as questions:
        questions.write('\n{"image": "b.png", "question": "What?"}')
    service.refusals[method] = [
        Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "PICTURE_NOT_AN_IMAGE",
            fields={"calibration.samples.samples[1].image": "refused on purpose"},
        )
    ]
    message = f"error: {data / 'b.png'}: PICTURE_NOT_AN_IMAGE: refused on purpose\n"
    assert vflow(*arguments, "--data", data) == (2, "", message)


def test_a_reader_that_leaves_early_is_no_mistake_of_ours(address: str) -> None:
    command = [sys.executable, "-m", "vflow_server", "strategies", "list", "--json", "--address", address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1


def test_without_a_service(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["strategies", "activate", "mine", "--etag", "e1", "--address", "127.0.0.1:1", "--timeout", "1"]) == 1
    assert "no service answers at 127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--data", "/nowhere"], "a search needs --budget"),
        (["--budget", "0.1"], "a search needs --data DIR or --live"),
        (["--budget", "0.1", "--data", "/nowhere"], "/nowhere/questions.jsonl: No such file or directory"),
        (["--budget", "0.1", "--live", "--detach", "--activate"], "give one of them"),
        (["--follow", "one", "--seed", "0"], "--seed is for a new search"),
        (["--follow", "one", "--live"], "--live is for a new search"),
        (["--follow", "one", "--detach"], "contradict each other"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_done_has_exit_code_2(
    vflow: Vflow, service: FakeService, arguments: list[str], fault: str
) -> None:
    code, out, err = vflow("retune", *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and fault in err
    assert not service.requests


@pytest.mark.parametrize(
    "arguments",
    [
        ["retune", "--data", "a", "--live"],
        ["retune", "--budget", "0.1", "--live", "--trials", "0"],
        ["retune", "--budget", "0.1", "--live", "--seed", "x"],
        ["strategies", "compare", "a", "b"],
    ],
)
def test_the_parser_refuses_with_exit_code_2(vflow: Vflow, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        vflow(*arguments)
    assert caught.value.code == 2


def test_a_search_in_a_log(vflow: Vflow, service: FakeService, data: Path) -> None:
    options = ["--trials", 4, "--seed", 7, "--base", "preset-10", "--id", "tuned-one", "--data", data]
    code, out, err = vflow("retune", "--budget", 0.1, *options)
    assert code == 0
    assert err.splitlines() == [
        "operations/one: budget 10.0%, measured on 1 picture, 3 questions",
        "encoding 2 pictures",
        "answering with the unpruned model",
        "trial 1 of 4: 0.9100, best 0.9100",
        "trial 2 of 4: 0.8800 (stopped early), best 0.9100",
        "trial 3 of 4: 0.9500, best 0.9500",
        "trial 4 of 4: 0.9300, best 0.9500",
        "comparing with preset-10 on the same samples",
    ]
    assert out.startswith(
        "strategies/tuned-one found: objective 0.9500 at a budget of 10.0%, preset-10 has 0.9000\n\nobjective by trial"
    )
    assert "objective      0.9000                0.9500                +0.0500\n" in out and "\x1b" not in out
    assert out.endswith("\nactivate it with: vflow strategies activate tuned-one\n")
    request = service.requests["Retune"][0]
    assert (request.trials, request.seed, request.base) == (4, 7, "strategies/preset-10")
    assert list(service.requests["CompareStrategies"][0].names) == ["strategies/preset-10", "strategies/tuned-one"]
    assert "ActivateStrategy" not in service.requests


def frames(terminal: FakeTerminal) -> list[str]:
    """What the last line of the terminal showed, one state after the other."""
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    return [frame.rstrip() for line in drawn.split("\n") for frame in line.split("\r")]


def test_a_search_on_a_terminal(retune_on_terminal: Vflow, terminal: FakeTerminal) -> None:
    assert retune_on_terminal()[0] == 0
    shown = frames(terminal)
    bar = "━" * 25
    half = "━" * 12 + "╸" + "━" * 12
    assert f"{bar} encoding 2 pictures" in shown
    assert f"{half} trial 2 of 4, best 0.9100, base 0.9000, 1 min 40 s left" in shown
    assert shown[-3] == f"{bar} trial 4 of 4, best 0.9500, base 0.9000"
    assert shown[-2:] == ["comparing with preset-10 on the same samples", ""]
    assert terminal.getvalue().count("\x1b[?25h") == 1, "the cursor is visible again"


@pytest.mark.parametrize("columns", [12, 24, 60])
def test_a_search_on_a_narrow_terminal(
    retune_on_terminal: Vflow, terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = retune_on_terminal()
    bars = [frame for frame in frames(terminal) if "trial" in frame]
    assert code == 0 and bars and max(map(len, bars)) <= columns
    chart = [line for line in out.splitlines() if "┤" in line or "│" in line]
    assert chart and max(map(len, chart)) <= columns


def test_no_color_is_respected(
    retune_on_terminal: Vflow, terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    colors = re.compile(r"\x1b\[[0-9;]*[349][0-9]")
    assert retune_on_terminal()[0] == 0
    assert colors.search(terminal.getvalue())
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.truncate(0)
    assert retune_on_terminal()[0] == 0
    assert not colors.search(terminal.getvalue())


def test_a_terminal_that_cannot_redraw_gets_a_log(
    retune_on_terminal: Vflow, terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert retune_on_terminal()[0] == 0
    written = terminal.getvalue()
    assert "trial 4 of 4: 0.9300, best 0.9500\n" in written and not set("\x1b\r") & set(written)


def test_colors_in_a_file_are_no_reason_to_redraw(vflow: Vflow, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    code, out, err = vflow("retune", "--budget", 0.1, "--data", data)
    assert code == 0 and "\x1b[" in out, "colours are printed if they are asked for"
    assert "trial 4 of 4: 0.9300, best 0.9500\n" in err and not set("\x1b\r") & set(err)


def test_a_table_on_a_narrow_terminal_wraps_and_loses_nothing(
    vflow: Vflow, service: FakeService, terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.stdout", terminal)
    assert vflow("strategies", "show", "tuned-one")[0] == 0
    shown = frames(terminal)
    assert max(map(len, shown)) <= 60
    assert "from layers 0, 8, 16; each keeps 0.125/1.000/0.500 of those before it" in " ".join(
        line[13:].strip() for line in shown
    )


@pytest.mark.parametrize(("columns", "head"), [(100, "RATIOS  "), (60, "OBJECTIVE  ORIGIN"), (30, "ORIGIN")])
def test_a_list_fits_the_terminal(
    vflow: Vflow, terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch, columns: int, head: str
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout", terminal)
    assert vflow("strategies", "list")[0] == 0
    shown = frames(terminal)
    assert max(map(len, shown)) <= columns and any(head in line for line in shown)
    assert ("DIVERSITY" in " ".join(shown)) == (columns == 100)
    assert any(line.startswith("*  full") for line in shown)


def test_a_stream_that_cannot_encode_the_chart(address: str, data: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "vflow_server", "retune", "--budget", "0.1", "--data", data, "--address", address],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "0.9500?" in result.stdout and "*" in result.stdout


def test_live_traffic_is_not_asked_for_twice(vflow: Vflow, service: FakeService) -> None:
    service.search.samples = 30
    code, out, err = vflow("retune", "--budget", 0.1, "--live", 20, "--activate")
    assert code == 0 and "measured on the latest 20 conversations" in err
    assert service.requests["Retune"][0].calibration.live.max_samples == 20
    assert "CompareStrategies" not in service.requests
    assert "ratios       0.125/1.000/0.500  0.200/0.500/0.600\n" in out
    assert out.endswith("tuned-one is active: new sessions use it, existing sessions are not affected\n")
    assert service.requests["ActivateStrategy"][0].name == "strategies/tuned-one"


def test_a_comparison_that_fails_spoils_nothing(vflow: Vflow, service: FakeService, data: Path) -> None:
    service.search.samples = 30
    service.refusals["CompareStrategies"] = [Refusal(grpc.StatusCode.INTERNAL, "INTERNAL")]
    code, out, err = vflow("retune", "--budget", 0.1, "--data", data, "--activate")
    assert code == 0 and "error: no comparison: INTERNAL" in err
    assert "tuned-one is active" in out and len(service.requests["ActivateStrategy"]) == 1


CLEAR = [0.05 + 0.01 * (number % 3) for number in range(12)]
UNCLEAR = [0.0003 + 0.05 * (-1) ** number for number in range(12)]


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        (CLEAR, "gain in the objective: +0.0600 on 12 pictures, 95% interval +0.05"),
        (UNCLEAR, "not activated: the gain may be chance (+0.0003 on 12 pictures, 95% interval -0.0"),
        ([0.0003, 0.0002, 0.0004], "not activated: the gain may be chance (+0.0003 on 3 pictures, too few to tell"),
        ([-gain for gain in CLEAR], "not activated: the gain may be chance (-0.0600 on 12 pictures"),
    ],
    ids=["clear", "unclear", "too few", "loss"],
)
def test_a_gain_that_may_be_chance_is_not_activated(
    vflow: Vflow, service: FakeService, data: Path, gains: list[float], said: str
) -> None:
    service.sample_objectives = [[0.9] * len(gains), [0.9 + gain for gain in gains]]
    code, out, err = vflow("retune", "--budget", "10%", "--data", data, "--activate")
    assert said in out + err and service.requests["Retune"][0].budget == pytest.approx(0.1)
    assert code == (0 if gains is CLEAR else 1) and ("ActivateStrategy" in service.requests) == (gains is CLEAR)
    if gains is not CLEAR:
        assert out.endswith("activate it with: vflow strategies activate tuned-one\n")


def test_what_was_not_compared_needs_pictures_enough(vflow: Vflow, service: FakeService) -> None:
    code, out, err = vflow("retune", "--budget", 0.1, "--live", "--activate", "--json")
    assert code == 1 and json.loads(out)["strategy"]["name"] == "strategies/tuned-one"
    assert "not activated: it was found on 2 pictures and not compared; that takes 30 or more" in err
    assert "ActivateStrategy" not in service.requests


def test_a_smaller_budget_is_no_loss(vflow: Vflow, service: FakeService, data: Path) -> None:
    """Another budget is another choice: it is activated although the objective falls."""
    service.budgets = {"strategies/preset-10": 0.5}
    service.sample_objectives = [[0.99] * 12, [0.9] * 12]
    assert vflow("retune", "--budget", 0.1, "--data", data, "--activate")[0] == 0


@pytest.mark.parametrize(("text", "value"), [("0.1", 0.1), ("10%", 0.1), ("10.0%", 0.1), (" 100% ", 1.0), ("1", 1.0)])
def test_shares(text: str, value: float) -> None:
    assert share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["0", "0%", "-1", "nan", "101%", "10", "x", "", "%", "1e400"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="such as 0.1 or 10%"):
        share(text)


@pytest.mark.parametrize("value", [0.5, 1, 90, 100, 3599, 3600, 7260])
def test_what_is_printed_can_be_typed(value: float) -> None:
    assert seconds(f"{value:g}") == seconds(f"{value:g}s") == value
    assert seconds(duration(value)) == pytest.approx(value, abs=30) if value >= 1 else True


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon", "", "1 2 3", "1.2.3s", "5 m"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="number of seconds above 0"):
        seconds(text)


def test_a_search_for_programs(vflow: Vflow, data: Path) -> None:
    code, out, _ = vflow("retune", "--budget", 0.1, "--data", data, "--json")
    printed = json.loads(out)
    assert code == 0 and printed["operation"] == "operations/one"
    assert [trial["objective"] for trial in printed["metadata"]["tried"]] == [0.91, 0.88, 0.95, 0.93]
    assert printed["strategy"]["name"] == "strategies/tuned-one" and printed["comparison"]["questions"] == 4


def test_leaving_a_search_and_taking_it_up_again(vflow: Vflow, service: FakeService, data: Path) -> None:
    code, out, _ = vflow("retune", "--budget", 0.1, "--data", data, "--detach")
    assert (code, out) == (0, "operations/one\n") and "WaitOperation" not in service.requests
    assert json.loads(vflow("retune", "--budget", 0.1, "--live", "--detach", "--json")[1]) == {
        "operation": "operations/one"
    }
    code, out, err = vflow("retune", "--follow", "operations/one")
    assert code == 0 and "trial 4 of 4" in err and "strategies/tuned-one found" in out
    assert "CompareStrategies" not in service.requests and len(service.requests["Retune"]) == 2
    code, out, err = vflow("retune", "--follow", "one", "--data", data)
    assert code == 0 and "agreement" in out, "a search that has ended can be looked at again"


def interrupt_after(trials: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes when so many trials have been shown."""
    show = progress.ProgressLog.show

    def interrupted(log: progress.ProgressLog, metadata: RetuneMetadata) -> None:
        show(log, metadata)
        if len(metadata.tried) == trials:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress.ProgressLog, "show", interrupted)


def test_ctrl_c_cancels_and_names_the_draft(
    vflow: Vflow, service: FakeService, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(2, monkeypatch)
    code, out, err = vflow("retune", "--budget", 0.1, "--data", data, "--activate")
    assert (code, out) == (1, "")
    assert err.splitlines()[-3:] == [
        "cancelling; the best strategy so far is stored as a draft (Ctrl-C again: leave at once)",
        "error: OPERATION_CANCELLED: ended on purpose",
        "the best of 2 trials, objective 0.9100, is stored as the draft strategies/tuned-draft",
    ]
    assert len(service.requests["CancelOperation"]) == 1 and "ActivateStrategy" not in service.requests


def test_ctrl_c_before_the_first_trial_leaves_nothing(
    vflow: Vflow, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(0, monkeypatch)
    code, out, err = vflow("retune", "--budget", 0.1, "--data", data, "--json")
    assert code == 1 and "draft strategies/" not in err
    printed = json.loads(out)
    assert printed["error"]["reason"] == "OPERATION_CANCELLED" and printed["metadata"]["tried"] == []


def test_a_second_ctrl_c_leaves_at_once(
    vflow: Vflow, service: FakeService, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(2, monkeypatch)
    monkeypatch.setattr(service.search, "cancel", lambda: None)

    def interrupted(search: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vflow_client.retune.Retune.wait", interrupted)
    code, out, err = vflow("retune", "--budget", 0.1, "--data", data)
    assert (code, out) == (1, "") and len(service.requests["CancelOperation"]) == 1
    assert err.endswith("left before the search ended; see its result with: vflow retune --follow operations/one\n")


def test_ctrl_c_at_the_very_end_activates_nothing(
    vflow: Vflow, service: FakeService, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(4, monkeypatch)
    service.search.advance()
    monkeypatch.setattr(service.search, "cancel", lambda: None)
    code, out, err = vflow("retune", "--budget", 0.1, "--data", data, "--activate")
    assert (code, out) == (1, "") and "had ended already: strategies/tuned-one was created, but not activated" in err
    assert "ActivateStrategy" not in service.requests


def test_a_search_that_was_interrupted_by_a_restart(vflow: Vflow, service: FakeService, data: Path) -> None:
    for _ in range(4):
        service.search.advance()
    service.search.fail(code_pb2.ABORTED, "OPERATION_INTERRUPTED", draft="strategies/tuned-draft")
    code, _, err = vflow("retune", "--follow", "operations/one")
    assert code == 1 and "error: OPERATION_INTERRUPTED: ended on purpose\n" in err
    assert err.endswith("the best of 3 trials, objective 0.9500, is stored as the draft strategies/tuned-draft\n")


def test_a_service_that_goes_away_tells_how_to_come_back(vflow: Vflow, service: FakeService, data: Path) -> None:
    service.refusals["WaitOperation"] = [Refusal(grpc.StatusCode.UNAVAILABLE, "ENGINE_FAILED")]
    code, _, err = vflow("retune", "--budget", 0.1, "--data", data)
    assert code == 1 and "vflow retune --follow operations/one" in err
