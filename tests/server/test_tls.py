"""TLS over a real channel: authentication of both sides, and certificates that change while calls run."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import vflow_client.aio
from tests.server.certificates import Authority, Pair
from tests.server.conftest import Serve
from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import Tls, TlsSource, Unavailable
from vflow_server.access import watched_files
from vflow_server.cli import main


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def served_with(serve: Serve, pair: Pair, **settings: str) -> Served:
    return serve(tls_cert=str(pair.certificate), tls_key=str(pair.key), **settings)


def connects(served: Served, tls: TlsSource) -> bool:
    """Whether a conversation comes about; False where no connection does."""
    with served.connect(tls=tls) as client:
        try:
            with client.session() as session:
                return bool(session.ask("Hello?", max_new_tokens=2).read())
        except Unavailable as error:
            assert error.reason is None  # not the service's word
            return False


def test_a_service_is_believed_by_its_certificate_alone(serve: Serve, authority: Authority, tmp_path: Path) -> None:
    served = served_with(serve, authority.issue("server"))
    assert connects(served, authority.certificate)
    assert not connects(served, False)  # unencrypted
    assert not connects(served, True)  # by public roots
    assert not connects(served, Authority(tmp_path, "stranger").certificate)


def test_an_expired_certificate_is_not_believed(serve: Serve, authority: Authority) -> None:
    assert not connects(served_with(serve, authority.issue("server", expired=True)), authority.certificate)


def test_the_certificate_of_another_host_is_believed_where_it_was_asked_for(serve: Serve, authority: Authority) -> None:
    served = served_with(serve, authority.issue("server", ["vflow.example"]))
    assert not connects(served, authority.certificate)
    assert connects(served, Tls(authority.certificate, server_name="vflow.example"))


def test_callers_must_show_a_certificate_where_one_is_asked_for(
    serve: Serve, authority: Authority, tmp_path: Path
) -> None:
    served = served_with(serve, authority.issue("server"), tls_client_ca=str(authority.certificate))

    def shown(pair: Pair) -> Tls:
        return Tls(authority.certificate, pair.certificate, pair.key)

    assert connects(served, shown(authority.issue("client")))
    assert not connects(served, authority.certificate)
    assert not connects(served, shown(authority.issue("late", expired=True)))
    assert not connects(served, shown(Authority(tmp_path, "stranger").issue("foreign")))


def test_certificates_change_without_a_dropped_stream(
    serve: Serve, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched_files, "LOOK_EVERY", 0.0)
    pair = authority.issue("server")
    served = served_with(serve, pair)
    after = Authority(tmp_path, "after")
    with served.connect(tls=authority.certificate) as client, client.session() as session:
        answer = session.ask("Go on", max_new_tokens=400)
        next(answer)
        pair.replace_by(after.issue("renewed"))
        assert connects(served, after.certificate) and not connects(served, authority.certificate)
        assert not answer.finished
        answer.read()
        assert answer.usage.completion_tokens == 400
        assert session.ask("Still there?", max_new_tokens=2).read()  # over the connection from before


@pytest.mark.parametrize("broken", ["certificate", "key"])
def test_files_that_do_not_belong_together_change_nothing(
    serve: Serve, authority: Authority, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(watched_files, "LOOK_EVERY", 0.0)
    pair, renewed = authority.issue("server"), authority.issue("renewed")
    served = served_with(serve, pair)
    first: Path = getattr(pair, broken)
    first.write_bytes(getattr(renewed, broken).read_bytes())  # the other file has not been replaced yet
    assert connects(served, authority.certificate)
    first.unlink()
    assert connects(served, authority.certificate)
    pair.replace_by(renewed)
    until(lambda: connects(served, authority.certificate))


def test_a_health_check_comes_in_by_tls(serve: Serve, authority: Authority) -> None:
    served = served_with(serve, authority.issue("server"))
    health = ["health", "--address", served.address]
    assert main([*health, "--ca", str(authority.certificate)]) == 0
    assert main(health) == 1
    assert main([*health, "--ca", str(authority.certificate.with_name("none.pem"))]) == 2
    assert main([*health, "--cert", "only"]) == 2


@pytest.mark.parametrize("command", ["client", "health"])
@pytest.mark.parametrize(
    ("encrypted", "asked", "advice"),
    [
        (True, [], "if the service uses TLS, pass tls=... or --tls"),
        (False, ["--tls"], "does not use TLS: for an unencrypted connection leave out"),
        (True, ["--tls"], "not signed by a known authority"),
        (True, ["--ca", "CA", "--server-name", "other.example"], "for another name"),
    ],
    ids=["unencrypted", "encrypted", "unknown authority", "another name"],
)
def test_a_connection_that_fails_by_tls_says_what_to_do(
    serve: Serve,
    authority: Authority,
    capsys: pytest.CaptureFixture[str],
    command: str,
    encrypted: bool,
    asked: list[str],
    advice: str,
) -> None:
    served = served_with(serve, authority.issue("server")) if encrypted else serve()
    options = [str(authority.certificate) if option == "CA" else option for option in asked]
    arguments = ["health"] if command == "health" else ["strategies", "list", "--timeout", "2"]
    began = time.monotonic()
    assert main([*arguments, "--address", served.address, *options]) == 1
    assert advice in capsys.readouterr().err
    assert not asked or time.monotonic() - began < 1.5  # what cannot change is not tried again


UNUSABLE: dict[str, tuple[Callable[[Pair, Authority], dict[str, str]], str]] = {
    "no such file": (lambda pair, ca: {"tls_cert": f"{pair.certificate}.none"}, "cannot be read: No such file"),
    "another's key": (lambda pair, ca: {"tls_key": str(ca.issue("other").key)}, "are not a certificate and its"),
    "no certificate": (lambda pair, ca: {"tls_cert": str(pair.key)}, "are not a certificate and its"),
    "no roots": (lambda pair, ca: {"tls_client_ca": str(pair.key)}, "holds no certificates"),
}


@pytest.mark.parametrize(("files", "complaint"), UNUSABLE.values(), ids=UNUSABLE)
def test_files_that_cannot_be_used_are_named_at_the_start(
    serve: Serve, authority: Authority, files: Callable[[Pair, Authority], dict[str, str]], complaint: str
) -> None:
    pair = authority.issue("server")
    with pytest.raises((OSError, ValueError), match=complaint):
        serve(**{"tls_cert": str(pair.certificate), "tls_key": str(pair.key), **files(pair, authority)})


def test_the_async_client_encrypts_too(serve: Serve, authority: Authority) -> None:
    served = served_with(serve, authority.issue("server"))

    async def ask() -> str:
        async with vflow_client.aio.connect(served.address, tls=authority.certificate) as client:
            async with await client.session() as session:
                answer = await session.ask("Hello?", max_new_tokens=2)
                return await answer.read()

    assert asyncio.run(ask())


def test_a_client_certificate_without_its_key_is_refused_here() -> None:
    with pytest.raises(ValueError, match="go together"):
        Tls(certificate="only.pem")
