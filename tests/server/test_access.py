"""Access over a real channel: which callers are admitted, by their tokens."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import vflow_client
from tests.server.conftest import Serve
from tests.server.served import Served
from vflow_client import AdminRequired, TenantForbidden, Unauthenticated, VFlowError
from vflow_client.v1.conversations_pb2 import ListSessionsRequest
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub
from vflow_server.access import watched_files
from vflow_server.access.access import Access
from vflow_server.access.caller import Caller
from vflow_server.access.tokens import new_token, read_tokens
from vflow_server.cli import main
from vflow_server.option import OptionError
from vflow_server.rpc.errors import ServiceError
from vflow_server.settings import load

USER, USER_ENTRY = new_token(Caller("red", admin=False))
ADMIN, ADMIN_ENTRY = new_token(Caller("red", admin=True))
TOKENS = f"{USER_ENTRY.line()}\n{ADMIN_ENTRY.line()}"


@pytest.fixture
def guarded(serve: Serve) -> Served:
    return serve(tokens=TOKENS)


@pytest.fixture
def channel(guarded: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(guarded.address) as channel:
        yield channel


def opens(served: Served, **identity: str) -> bool:
    """Whether a session can be opened; raises what the client says where it cannot."""
    with served.connect(**identity) as client, client.session():
        return True


def test_the_tenant_is_the_tokens(guarded: Served) -> None:
    with guarded.connect(token=USER) as client, client.session() as session:
        assert guarded.live(session, "red").tenant == "red"
    assert opens(guarded, token=USER, tenant="red")
    with pytest.raises(TenantForbidden, match="another tenant than 'blue'") as refused:
        opens(guarded, token=ADMIN, tenant="blue")
    assert refused.value.metadata == {"tenant": "blue"}


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ([], "TOKEN_MISSING"),
        ([("vflow-tenant", "red")], "TOKEN_MISSING"),
        ([("authorization", USER)], "TOKEN_INVALID"),
        ([("authorization", f"Basic {USER}")], "TOKEN_INVALID"),
        ([("authorization", "Bearer ")], "TOKEN_INVALID"),
        ([("authorization", f"Bearer {USER[:-1]}")], "TOKEN_INVALID"),
        ([("authorization", f"Bearer {USER_ENTRY.digest.hex()}")], "TOKEN_INVALID"),
        ([("authorization", f"Bearer {USER}")] * 2, "TOKEN_INVALID"),
        ([("authorization", f"Bearer {USER}"), ("vflow-tenant", "No name")], "TENANT_INVALID"),
        ([("authorization", f"bearer {USER}")], None),
    ],
)
def test_what_is_a_token(channel: grpc.Channel, metadata: list[tuple[str, str]], reason: str | None) -> None:
    try:
        ConversationsStub(channel).ListSessions(ListSessionsRequest(), metadata=metadata)
        assert reason is None
    except grpc.RpcError as error:
        assert vflow_client.errors.error_from_call(error).reason == reason
        assert USER not in (error.details() or "")


def test_the_client_tells_apart_who_is_unknown_and_who_may_not(guarded: Served) -> None:
    with pytest.raises(Unauthenticated, match="Bearer TOKEN"):
        opens(guarded)
    with guarded.connect(token=USER) as client, pytest.raises(AdminRequired, match="for administrators"):
        next(client.strategies.list())
    with guarded.connect(token=ADMIN) as client:
        assert next(client.strategies.list()).name


def test_the_log_tells_no_token(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    served = serve(tokens=TOKENS)
    unknown = USER[::-1]
    with pytest.raises(Unauthenticated):
        opens(served, token=unknown)
    assert opens(served, token=USER)
    served.stop()  # by then the log is complete
    output = capsys.readouterr().out
    assert "TOKEN_INVALID" in output and "tenant=red" in output
    assert USER not in output and unknown not in output


def test_nothing_is_read_of_what_a_caller_without_access_sends(serve: Serve) -> None:
    served = serve(tokens=TOKENS, max_message_bytes="1MiB")
    with grpc.insecure_channel(served.address, [("grpc.max_send_message_length", 8 << 20)]) as channel:
        call = channel.unary_unary("/vflow.v1.Conversations/CreateSession")
        for message, known in (
            (b"\xff" * 9, grpc.StatusCode.INVALID_ARGUMENT),
            (bytes(4 << 20), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                call(message, metadata=[("authorization", f"Bearer {USER}")])
            assert refused.value.code() == known
            with pytest.raises(grpc.RpcError) as refused:
                call(message)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_health_and_the_contract_are_open_to_all(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert "vflow.v1.Conversations" in ProtoReflectionDescriptorDatabase(channel).get_services()


def test_the_file_of_tokens_is_read_again_when_it_changes(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched_files, "LOOK_EVERY", 0.0)
    file = tmp_path / "tokens"
    file.write_text(USER_ENTRY.line())
    served = serve(tokens=str(file))
    with pytest.raises(Unauthenticated):
        opens(served, token=ADMIN)
    with served.connect(token=USER) as client:
        answer = client.session().ask("Go on", max_new_tokens=60)
        next(answer)
        file.write_text(f"# the user is gone\n{ADMIN_ENTRY.line()}\n")
        with pytest.raises(Unauthenticated) as refused:
            opens(served, token=USER)
        assert refused.value.reason == "TOKEN_INVALID"
        answer.read()  # a call that was admitted may end
    assert opens(served, token=ADMIN)
    assert opens(served, token=ADMIN)


UNUSABLE: dict[str, Callable[[Path], object]] = {
    "it has lost its last line": lambda file: file.write_text(""),
    "it holds comments only": lambda file: file.write_text("# nobody\n"),
    "it is removed": lambda file: file.unlink(),
    "its folder is removed": lambda file: file.parent.rename(file.parent.with_name("elsewhere")),
    "it is a folder": lambda file: (file.unlink(), file.mkdir()),
    "its line is broken": lambda file: file.write_text(USER_ENTRY.line()[:-3]),
    "its line is there twice": lambda file: file.write_text(f"{USER_ENTRY.line()}\n" * 2),
    "it is no text": lambda file: file.write_bytes(b"\xff\xfe" + USER_ENTRY.line().encode("utf-16-le")),
}


@pytest.mark.parametrize("change", UNUSABLE.values(), ids=UNUSABLE)
def test_a_token_whose_line_cannot_be_read_any_more_is_refused(
    change: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched_files, "LOOK_EVERY", 0.0)
    (folder := tmp_path / "folder").mkdir()
    file = folder / "tokens"
    file.write_text(USER_ENTRY.line())
    access = Access(file)
    assert access.bearer(USER).tenant == "red"
    change(file)
    with pytest.raises(ServiceError, match="not known here"):
        access.bearer(USER)
    with pytest.raises(ServiceError, match="needs a token"):
        access.caller("/vflow.v1.Conversations/CreateSession", ())


def test_lines_that_can_be_read_count_beside_one_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_files, "LOOK_EVERY", 0.0)
    file = tmp_path / "tokens"
    file.write_text(USER_ENTRY.line())
    access = Access(file)
    file.write_text(f"sha256=oops\n{ADMIN_ENTRY.line()}\r\n")
    assert access.bearer(ADMIN).admin
    with pytest.raises(ServiceError):
        access.bearer(USER)


def test_a_token_stays_valid_while_descriptors_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_files, "LOOK_EVERY", 0.0)
    file = tmp_path / "tokens"
    file.write_text(USER_ENTRY.line())
    access = Access(file)

    def exhausted(path: Path) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", exhausted)
        file.write_text(ADMIN_ENTRY.line())
        assert access.bearer(USER).tenant == "red"
    assert access.bearer(ADMIN).admin, "it is read once there are descriptors again"


def test_a_token_expires(serve: Serve) -> None:
    soon, entry = new_token(Caller("red", admin=False), datetime.now(UTC) + timedelta(hours=1))
    late, expired = new_token(Caller("red", admin=False), datetime.now(UTC) - timedelta(seconds=1))
    served = serve(tokens=f"{entry.line()}\n{expired.line()}")
    assert opens(served, token=soon)
    with pytest.raises(Unauthenticated) as refused:
        opens(served, token=late)
    assert refused.value.reason == "TOKEN_EXPIRED"


def test_administrators_may_have_a_port_of_their_own(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    served = serve(tokens=TOKENS, admin_port="0")
    with served.connect(token=ADMIN) as public, public.session():
        with pytest.raises(VFlowError) as refused:
            next(public.strategies.list())
        assert refused.value.code == grpc.StatusCode.UNIMPLEMENTED
    assert main(["strategies", "list", "--address", served.address, "--token", ADMIN]) == 1
    assert "a port of their own: --address" in capsys.readouterr().err
    address = f"127.0.0.1:{served.service.admin_port}"
    with vflow_client.connect(address, token=ADMIN) as private:
        assert next(private.strategies.list()).name and not list(private.strategies.operations())
        with pytest.raises(VFlowError) as refused:
            private.session()
        assert refused.value.code == grpc.StatusCode.UNIMPLEMENTED
    with vflow_client.connect(address, token=USER) as private, pytest.raises(AdminRequired):
        next(private.strategies.list())
    with grpc.insecure_channel(address) as channel:
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert "vflow.v1.Strategies" in services and "vflow.v1.Conversations" not in services


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_without_tokens_only_this_machine_is_listened_to(host: str) -> None:
    assert load({"host": host}, {}).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "vflow.example"])
def test_others_are_listened_to_where_it_is_said(host: str) -> None:
    with pytest.raises(OptionError, match="whoever reaches it may do everything.*--tokens"):
        load({"host": host}, {})
    assert load({"host": host, "insecure": "on"}, {}).host == host
    assert load({"host": host}, {"VFLOW_TOKENS": USER_ENTRY.line()}).tokens == (USER_ENTRY,)
    with pytest.raises(OptionError, match="admin_host is"):
        load({"admin_host": host, "admin_port": "0"}, {})
    assert load({"admin_host": host}, {}).admin_port is None


def test_the_flag_is_said_without_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    output = capsys.readouterr().err
    assert output.startswith("vflow: host is '0.0.0.0'") and output.count("\n") == 1
    assert main(["serve", "--host", "0.0.0.0", "--insecure", "--port", "none"]) == 2
    assert "--port is 'none'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "needed"), [("tls_cert", "tls_key"), ("tls_key", "tls_cert"), ("tls_client_ca", "tls_cert")]
)
def test_tls_needs_a_certificate_and_its_key(given: str, needed: str) -> None:
    with pytest.raises(OptionError, match=f"{given} is set without {needed}"):
        load({given: "file.pem"}, {})


WRONG_TOKENS = {
    "": "no token is listed",
    "# nothing but a comment": "no token is listed",
    "password": "line 1: expected sha256=",
    f"{USER_ENTRY.line()}\n\ntenant=red role=user": "line 3: expected sha256=",
    f"{USER_ENTRY.line()} role=admin": "each once",
    f"{USER_ENTRY.line()} colour=red": "expected sha256=",
    "sha256=12AB tenant=red role=user": "64 lower-case hexadecimal digits",
    USER_ENTRY.line().replace("red", "Red"): "tenant is 'Red'",
    USER_ENTRY.line().replace("role=user", "role=root"): "role is 'root'",
    f"{USER_ENTRY.line()} expires=soon": "expires is 'soon'",
    f"{USER_ENTRY.line()}\n{USER_ENTRY.line()}": "listed twice",
}


@pytest.mark.parametrize(("text", "complaint"), WRONG_TOKENS.items(), ids=WRONG_TOKENS.values())
def test_what_lists_no_tokens(serve: Serve, tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_tokens(text)
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"the tokens file {file} cannot be used: .*{complaint}"):
        serve(tokens=str(file))


def test_a_file_of_tokens_that_is_not_there(serve: Serve, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none cannot be read: No such file"):
        serve(tokens=str(tmp_path / "none"))


def test_a_token_is_made_and_listed(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tokens"
    made = []
    for arguments in (["red"], ["blue", "--role", "admin", "--expires", "90d"]):
        assert main(["token", *arguments, "--into", str(file)]) == 0
        made.append(capsys.readouterr().out.strip())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not any(token in file.read_text() for token in made)
    red, blue = read_tokens(file.read_text())
    assert (red.caller, red.expires) == (Caller("red", admin=False), None)
    assert blue.caller == Caller("blue", admin=True) and blue.expires is not None
    assert timedelta(days=89) < blue.expires - datetime.now(UTC) < timedelta(days=91)
    served = serve(tokens=str(file))
    assert opens(served, token=made[0]) and opens(served, token=made[1], tenant="blue")


def test_a_line_is_added_below_a_comment_without_an_end(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# the first of many")
    for tenant in ("red", "blue"):
        assert main(["token", tenant, "--into", str(file)]) == 0
        file.write_text(file.read_text().rstrip("\n"))
    assert [entry.caller.tenant for entry in read_tokens(file.read_text())] == ["red", "blue"]


def test_lines_that_are_added_at_the_same_time_are_all_there(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    with ThreadPoolExecutor(8) as callers:
        assert set(callers.map(lambda number: main(["token", "--into", str(file)]), range(40))) == {0}
    assert len(read_tokens(file.read_text())) == 40


def test_a_token_is_told_with_the_line_that_lists_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "--expires", "1h"]) == 0
    _, token, _, line = capsys.readouterr().out.strip().split("\n")
    (entry,) = read_tokens(line)
    assert entry.caller.tenant == "default" and token not in line and entry.line() == line


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["No name"], "the tenant is 'No name'"),
        (["--expires", "soon"], "--expires is 'soon': expected a duration"),
        (["--expires", "9999999d"], "--expires is '9999999d'"),
        (["--into", "/proc/none/tokens"], "cannot be written"),
    ],
)
def test_a_token_that_cannot_be_made(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_a_command_says_the_token_of_its_environment(
    guarded: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["strategies", "list", "--address", guarded.address]
    assert main(command) == 1
    assert "VFLOW_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("VFLOW_TOKEN", ADMIN)
    assert main(command) == 0
