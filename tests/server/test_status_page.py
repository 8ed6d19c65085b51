"""The status page, as a browser on this machine gets it."""

import base64
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from email.message import Message
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.server.conftest import Serve
from tests.server.drawing import png
from tests.server.served import Served
from vflow_server.access.caller import Caller
from vflow_server.access.tokens import new_token

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def served(serve: Serve) -> Served:
    return serve(metrics_port="0", status_page="on")


def fetched(served: Served, path: str, headers: Mapping[str, str] | None = None) -> tuple[Message, bytes]:
    request = urllib.request.Request(f"http://127.0.0.1:{served.service.side_port}{path}", headers=dict(headers or {}))
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.headers, answer.read()


def refused(served: Served, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, Message]:
    with pytest.raises(urllib.error.HTTPError) as error:
        fetched(served, path, headers)
    error.value.close()
    return error.value.code, error.value.headers


class Reader(HTMLParser):
    """The words of a page, its links and pictures; fails where a tag is not closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.words: list[str] = []
        self.links: list[str] = []
        self.pictures: list[str] = []
        self._open: list[str] = []
        self.feed(page.decode())
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "a":
            self.links.append(given["href"] or "")
        if tag == "img":
            self.pictures.append(given["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(filter(None, self.words))


def test_it_shows_sessions_turns_pictures_and_strategies(served: Served, picture: bytes) -> None:
    empty = Reader(fetched(served, "/")[1]).text
    assert "is serving" in empty and "preset-10 active" in empty
    with served.connect(tenant="acme") as client, client.session("preset-50") as session:
        receipt = session.add_image(picture)
        answer = session.ask("A secret question", max_new_tokens=3)
        text = answer.read()
        page = Reader(fetched(served, "/")[1])
        assert session.name.removeprefix("sessions/")[:10] in page.text
        assert page.text.count("acme") == 3  # its session, its turn, its picture
        assert " / ".join(map(str, receipt.kept_tokens)) in page.text
        assert "secret" not in page.text and text not in page.text


def test_a_picture_is_drawn_with_what_was_made_of_it(served: Served, picture: bytes) -> None:
    with served.client.session("preset-25") as session:
        receipt = session.add_image(picture)
        (link,) = Reader(fetched(served, "/")[1]).links
        page = Reader(fetched(served, link)[1])
        assert f"{receipt.visual_tokens} visual tokens" in page.text
        assert len(page.pictures) >= 1
        for source in page.pictures:
            headers, drawn = fetched(served, source)
            assert headers["Content-Type"] == "image/png" and headers["Cache-Control"] == "no-store"
            with Image.open(BytesIO(drawn)) as image, Image.open(BytesIO(picture)) as original:
                assert image.size == original.size
                assert np.any(np.asarray(image) != np.asarray(original.convert("RGB")))


def test_a_video_is_listed_and_not_drawn(served: Served) -> None:
    with served.client.session() as session:
        receipt = session.add_video([png(30, 40, seed) for seed in range(3)], fps=1)
        page = Reader(fetched(served, "/")[1])
        assert "40×30, 3 frames" in page.text and not page.links
        asked = {"tenant": "default", "digest": receipt.digest, "strategy": receipt.strategy}
        for path in ("picture", "overlay.png"):
            assert refused(served, f"/{path}?{urllib.parse.urlencode(asked)}")[0] == 404


def test_what_is_not_held_is_not_found(served: Served, picture: bytes) -> None:
    with served.client.session() as session:
        digest = session.add_image(picture).digest
        asked = {"tenant": "default", "digest": digest, "strategy": "strategies/preset-10"}
        fetched(served, f"/overlay.png?{urllib.parse.urlencode(asked)}")
        for wrong in (
            {"tenant": "other"},
            {"digest": "0" * 64},
            {"strategy": "strategies/none"},
            {"strategy": "strategies/full"},  # it was never compressed by that
            {"detail": "low"},  # nor looked at like that
            {"grid": "-1"},
            {"grid": "x"},
        ):
            path = f"/overlay.png?{urllib.parse.urlencode({**asked, **wrong})}"
            assert refused(served, path)[0] == 404, wrong


def test_a_name_that_leads_here_is_refused(served: Served) -> None:
    assert refused(served, "/", {"Host": "rebound.example:80"})[0] == 403
    fetched(served, "/metrics", {"Host": "vflow:9464"})  # as Prometheus does from its container
    fetched(served, "/", {"Host": "localhost:9464"})


def test_names_are_shown_as_text(served: Served) -> None:
    served.client.strategies.create("marked", ratios=[0.5, 0.5, 0.5], description="<script>alert(1)</script>&amp;")
    headers, page = fetched(served, "/")
    assert b"<script" not in page and "<script>alert(1)</script>&amp;" in Reader(page).text
    assert "default-src 'none'" in headers["Content-Security-Policy"]


def basic(password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'any:{password}'.encode()).decode()}"}


def test_with_tokens_an_administrator_sees_its_own_tenant_alone(serve: Serve, picture: bytes, tmp_path: Path) -> None:
    callers = {
        "acme": Caller("acme", admin=True),
        "rival": Caller("rival", admin=True),
        "user": Caller("acme", admin=False),
    }
    made = {name: new_token(caller) for name, caller in callers.items()}
    (tmp_path / "tokens").write_text("\n".join(entry.line() for _, entry in made.values()))
    served = serve(metrics_port="0", status_page="on", tokens=str(tmp_path / "tokens"))
    acme, rival, user = (basic(token) for token, _ in made.values())
    with served.connect(token=made["user"][0]) as client, client.session() as session:
        receipt = session.add_image(picture)
        for brought in ({}, user, basic("none"), {"Authorization": "Basic ?"}, {"Authorization": "Bearer x"}):
            code, headers = refused(served, "/", brought)
            assert code == 401 and headers["WWW-Authenticate"].startswith("Basic ")
        mine = Reader(fetched(served, "/", acme)[1])
        theirs = Reader(fetched(served, "/", rival)[1])
        assert session.name.removeprefix("sessions/")[:10] in mine.text and "acme" not in theirs.text
        (link,) = mine.links
        assert receipt.digest in link and not theirs.links
        overlay = Reader(fetched(served, link, acme)[1]).pictures[0]
        assert fetched(served, overlay, acme)[1].startswith(b"\x89PNG")
        for path in (link, overlay):
            assert refused(served, path, rival)[0] == 404


def test_it_is_off_unless_asked_for_and_only_for_this_machine(serve: Serve) -> None:
    assert refused(serve(metrics_port="0"), "/")[0] == 404
    with pytest.raises(ValueError, match="status_page shows what users sent"):
        serve(metrics_port="0", metrics_host="0.0.0.0", status_page="on")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_a_phone_shows_it_without_scrolling_sideways(served: Served, picture: bytes, tmp_path: Path) -> None:
    with served.client.session() as session:
        session.add_image(picture)
        session.ask("What is that?", max_new_tokens=3).read()
        shot = tmp_path / "shot.png"
        subprocess.run(
            [
                str(CHROMIUM),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={tmp_path / 'profile'}",
                "--window-size=500,1400",  # the narrowest that headless Chromium lays out
                f"--screenshot={shot}",
                f"http://127.0.0.1:{served.service.side_port}/",
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
        pixels = np.asarray(Image.open(shot).convert("L")).astype(int)
    assert pixels.shape == (1400, 500)
    # The page has a margin on both sides: nothing is drawn up to the edges, and something is in between.
    assert np.ptp(pixels[:, -8:]) == np.ptp(pixels[:, :8]) == 0 and np.ptp(pixels) > 100
