"""The forms of an address, and the channel that is made of it."""

import socket

import grpc
import pytest

import vflow_client
import vflow_client.aio
from vflow_client.address import Address, to_address
from vflow_client.channel import channel_plan


@pytest.mark.parametrize(
    ("text", "target", "encrypted", "local"),
    [
        ("localhost:50051", "localhost:50051", None, True),
        (" localhost:50051\n", "localhost:50051", None, True),
        ("vflow.example", "vflow.example:50051", None, False),
        ("LOCALHOST.", "LOCALHOST.:50051", None, True),
        ("127.0.0.1:7", "127.0.0.1:7", None, True),
        ("127.8.9.10", "127.8.9.10:50051", None, True),
        ("0.0.0.0:7", "0.0.0.0:7", None, True),
        ("10.0.0.1:7", "10.0.0.1:7", None, False),
        ("::1", "[::1]:50051", None, True),
        ("[::1]", "[::1]:50051", None, True),
        ("[::1]:7", "[::1]:7", None, True),
        ("fe80::2", "[fe80::2]:50051", None, False),
        ("http://vflow.example:7/", "vflow.example:7", False, False),
        ("HTTPS://vflow.example", "vflow.example:50051", True, False),
        ("grpc://[::1]:7", "[::1]:7", False, True),
        ("unix:/run/vflow.sock", "unix:/run/vflow.sock", None, True),
        ("unix-abstract:vflow", "unix-abstract:vflow", None, True),
        ("dns:///localhost:7", "dns:///localhost:7", None, True),
        ("dns:///vflow.example:7", "dns:///vflow.example:7", None, False),
        ("ipv4:127.0.0.1:7,127.0.0.1:8", "ipv4:127.0.0.1:7,127.0.0.1:8", None, True),
        ("ipv4:127.0.0.1:7,10.0.0.1:8", "ipv4:127.0.0.1:7,10.0.0.1:8", None, False),
        ("ipv6:[::1]:7", "ipv6:[::1]:7", None, True),
        ("xds:///vflow", "xds:///vflow", None, False),
    ],
)
def test_forms(text: str, target: str, encrypted: bool | None, local: bool) -> None:
    assert to_address(text) == Address(target, encrypted, local)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no address of a service; give HOST:PORT"),
        ("   ", "no address of a service"),
        (":50051", "no address of a service"),
        ("two words:7", "no address of a service"),
        ("host:port", "from 1 to 65535"),
        ("host:", "from 1 to 65535"),
        ("host:0", "from 1 to 65535"),
        ("host:65536", "from 1 to 65535"),
        ("host:-1", "from 1 to 65535"),
        ("::1:50051", "brackets: "),
        ("[host]:7", "no IPv6 address"),
        ("http://host:7/path", "no address of a service|1 to 65535"),
        ("ftp://host:7", "'ftp://', which is not known"),
        ("user@host:7", "no address of a service"),
    ],
)
def test_what_is_no_address(text: str, complaint: str) -> None:
    for connect in (vflow_client.connect, vflow_client.aio.connect):
        with pytest.raises(ValueError, match=complaint):
            connect(text)


def test_an_address_and_tls_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="unencrypted connection, tls for an encrypted one"):
        vflow_client.connect("http://localhost:7", tls=True)
    with vflow_client.connect("https://127.0.0.1:1", retry=vflow_client.RetryPolicy(attempts=1)) as client:
        assert client.strategies._caller._peer.encrypted  # type: ignore[attr-defined]


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_no_proxy_leads_to_this_machine(address: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        port = address.rpartition(":")[2]
        for name in (address, f"localhost:{port}", f"http://127.0.0.1:{port}", f"ipv4:127.0.0.1:{port}"):
            with vflow_client.connect(name, timeout=10) as client:
                client.session()


def test_a_proxy_leads_to_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(10)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        with vflow_client.connect("vflow.invalid:7") as client:
            with pytest.raises(vflow_client.DeadlineExceeded):
                client.session(timeout=1.0)
            connection, _ = proxy.accept()
            with connection:
                assert connection.recv(100).startswith(b"CONNECT vflow.invalid:7 ")


@pytest.mark.parametrize("tls", [False, True])
def test_channels_connect_again_soon(tls: bool) -> None:
    """What comes of it, the long tests of restarts show."""
    options = dict(channel_plan("vflow.example", tls).options)
    assert options["grpc.initial_reconnect_backoff_ms"] == 200 and options["grpc.max_reconnect_backoff_ms"] == 1000
    assert options["grpc.dns_min_time_between_resolutions_ms"] == 1000
    assert int(options["grpc.min_reconnect_backoff_ms"]) >= 2000  # the time that TCP and TLS may take on a slow line


def test_the_address_is_refused_before_a_channel_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc, "insecure_channel", None)
    with pytest.raises(ValueError, match="no address"):
        vflow_client.connect("a b")
