"""Where settings come from, and which of them wins."""

import re
from pathlib import Path

import pytest

from vflow_server.cli import main
from vflow_server.option import OptionError, Share, switch
from vflow_server.settings import Group, Settings, load, options


def test_a_flag_wins_over_a_variable_over_the_file_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / "vflow.toml"
    file.write_text('port = 1\nkv_budget = "2MiB"\nhost = "127.0.0.9"\n')
    settings = load({"port": "3"}, {"VFLOW_PORT": "2", "VFLOW_KV_BUDGET": "3KiB", "VFLOW_MODEL": ""}, file)
    assert (settings.port, settings.kv_budget, settings.host) == (3, 3072, "127.0.0.9")
    assert settings.grace == Settings().grace == 10.0 and settings.model is None
    assert load({}, {"VFLOW_CONFIG": str(file)}).port == 1


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("kv_budget", "1.5GiB", 3 * 2**29),
        ("kv_budget", "4096", 4096),
        ("kv_budget", "10 MB", 10_000_000),
        ("kv_budget", "12.5%", Share(12.5)),
        ("spill_bytes", "1GiB", 2**30),
        ("idle_timeout", "90", 90.0),
        ("idle_timeout", "2h", 7200.0),
        ("grace", "250ms", 0.25),
        ("watch_share", "0.01", 0.01),
        ("watch_floor", "1", 1.0),
        ("watch_tenants", "red, blue", frozenset({"red", "blue"})),
        ("data", "/tmp/x", Path("/tmp/x")),
        ("log_format", "json", "json"),
        ("tower_dtype", "bfloat16", "bfloat16"),
    ],
)
def test_values_are_read_as_people_write_them(name: str, text: str, value: object) -> None:
    assert getattr(load({name: text}, {}), name) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("port", "70000"),
        ("port", "http"),
        ("max_sessions", "0"),
        ("kv_budget", "lots"),
        ("kv_budget", "0"),
        ("kv_budget", "-1GiB"),
        ("kv_budget", "0%"),
        ("kv_budget", "101%"),
        ("kv_budget", "some%"),
        ("spill_bytes", "25%"),
        ("idle_timeout", "soon"),
        ("idle_timeout", "nan"),
        ("watch_share", "2"),
        ("watch_floor", "nan"),
        ("watch_tenants", "red,"),
        ("watch_tenants", "Red"),
        ("log_level", "loud"),
        ("log_format", "xml"),
    ],
)
def test_a_value_that_cannot_be_used_names_its_source(name: str, text: str) -> None:
    with pytest.raises(OptionError, match=f"--{name.replace('_', '-')} is '{text}': expected"):
        load({name: text}, {})
    with pytest.raises(OptionError, match=f"VFLOW_{name.upper()} is"):
        load({}, {f"VFLOW_{name.upper()}": text})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("kv_budgt = 3", "did you mean 'kv_budget'"),
        ("kv_budget = [1]", "must be a text or a number"),
        ("port = true", "must be a text or a number"),
        ("port = ", "not valid TOML"),
        ("port = 700000", "port in .* is '700000'"),
        ("[serve]\nport = 1", "no setting"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "vflow.toml"
    file.write_text(text)
    with pytest.raises(OptionError, match=complaint):
        load({}, {}, file)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"status_page": "on"}, "status_page is on without metrics_port"),
        ({"status_page": "on", "metrics_port": "0", "metrics_host": "0.0.0.0"}, "status_page shows what users sent"),
        ({"tls_cert": "a.pem"}, "tls_cert is set without tls_key"),
        ({"host": "0.0.0.0"}, "without tokens whoever reaches it"),
    ],
    ids=["no-port", "shown-to-all", "no-key", "open"],
)
def test_settings_that_do_not_go_together(flags: dict[str, str], complaint: str) -> None:
    with pytest.raises(OptionError, match=complaint):
        load(flags, {})


@pytest.mark.parametrize("empty", ["", "  ", "\n"])
def test_an_empty_variable_is_unset_but_where_that_would_open_the_service(empty: str) -> None:
    protecting = {"tokens", "tls_cert", "tls_key", "tls_client_ca"}
    assert load({}, {f"VFLOW_{name.upper()}": empty for name in options() if name not in protecting}) == Settings()
    for name in protecting:
        with pytest.raises(OptionError, match=f"VFLOW_{name.upper()} is empty; .*leave it out to serve without it"):
            load({"insecure": "on"}, {f"VFLOW_{name.upper()}": empty})


@pytest.mark.parametrize("name", options())
def test_an_empty_flag_or_key_is_no_value(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"--{name.replace('_', '-')} is empty"):
        load({name: ""}, {})
    file = tmp_path / "vflow.toml"
    file.write_text(f'{name} = " "\n')
    with pytest.raises(OptionError, match=f"{name} in .* is empty"):
        load({}, {}, file)


@pytest.mark.parametrize(
    ("given", "host"),
    [("::1", "::1"), ("[::1]", "::1"), (" 127.0.0.1 ", "127.0.0.1"), ("vflow-0.vflow", "vflow-0.vflow")],
)
def test_hosts(given: str, host: str) -> None:
    assert load({"host": given, "insecure": "on"}, {}).host == host


@pytest.mark.parametrize("given", ["127.0.0.1:50051", "[::1]:50051", "[::1", "http://localhost", "[localhost]", "a b"])
def test_what_is_no_host(given: str) -> None:
    for name in ("host", "admin_host", "metrics_host"):
        with pytest.raises(OptionError, match="expected an address such as 127.0.0.1"):
            load({name: given}, {})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read"):
        load({}, {}, tmp_path / "none.toml")


def test_help_shows_the_options_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = re.findall(r"^(?:(\w[\w ]*):$|  --([a-z-]+))", capsys.readouterr().out, re.MULTILINE)
    headings = [heading for heading, _ in shown if heading]
    assert headings == ["options", *Group], "every group is shown, in its order"
    heading, groups = "", {}
    for new_heading, name in shown:
        heading = new_heading or heading
        groups[name.replace("-", "_")] = heading
    assert {name: groups[name] for name in options()} == {name: one.group for name, one in options().items()}


def test_help_shows_the_commands_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^  ([a-z]+)  +[a-z]", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(SystemExit):
        main(["nothing"])
    known = re.search(r"choose from (.*)\)", capsys.readouterr().err)
    assert known and sorted(commands) == sorted(known[1].replace("'", "").split(", "))


def test_help_names_every_option_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    output = capsys.readouterr().out
    for name, declared in options().items():
        value = f"[{declared.metavar}]" if declared.parse is switch else declared.metavar
        assert f"--{name.replace('_', '-')} {value}" in output
        assert declared.shown is None or declared.shown in output


def test_every_default_reads_back_as_itself() -> None:
    shown = {name: declared.shown for name, declared in options().items() if declared.shown is not None}
    assert load(shown, {}) == Settings()
