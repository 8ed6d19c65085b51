"""Samples of live traffic: which ones are kept, and for which tenant."""

import pytest

from tests.server.calibrating import NoProcess
from tests.server.conftest import Serve
from tests.server.drawing import noise, png
from tests.server.waiting import until
from vflow_client import CalibrationUnavailable, Client, LiveTraffic, OptionOutOfRange
from vflow_server.rpc.errors import ServiceError
from vflow_server.sessions.live_samples import MOST_QUESTIONS, LiveSamples
from vflowopt.media.picture import Picture
from vflowopt.media.video import Video

PICTURES = [Picture.from_pixels(noise(20, 20, seed)) for seed in range(4)]


def samples_of(live: LiveSamples, tenant: str = "red", most: int = 0) -> list[tuple[str, tuple[str, ...]]]:
    return [(sample.picture.digest, sample.questions) for sample in live.pop(tenant, most)]


def ask(live: LiveSamples, session: str, *texts: str, tenant: str = "red", after: int = 0) -> None:
    for turn, text in enumerate(texts, start=after + 1):
        live.note_turn(tenant, session, [text], turns=turn, images=1)


def test_a_conversation_about_one_picture_is_a_sample() -> None:
    live = LiveSamples(9, 1 << 20)
    live.note_image("red", "one", PICTURES[0], images=1)
    ask(live, "one", "What?", "Where?")
    live.note_turn("red", "two", ["Look:", PICTURES[1], "who?"], turns=1, images=1)
    ask(live, "two", "Why?", after=1)
    assert samples_of(live) == [
        (PICTURES[1].digest, ("Look: who?", "Why?")),
        (PICTURES[0].digest, ("What?", "Where?")),
    ]
    with pytest.raises(ServiceError, match="CALIBRATION_UNAVAILABLE|since the last search"):
        live.pop("red", 0)


def test_what_makes_no_sample() -> None:
    live = LiveSamples(9, 1 << 20)
    live.note_image("red", "nothing asked", PICTURES[0], images=1)
    ask(live, "no picture", "Hello?")
    live.note_image("red", "no picture", PICTURES[0], images=1)  # too late: there was a turn without it
    ask(live, "no picture", "And now?", after=1)
    live.note_turn("red", "two at once", [PICTURES[0], PICTURES[1], "Which?"], turns=1, images=2)
    clip = Video.of(PICTURES, range(4))
    live.note_image("red", "a video ahead", clip, images=1)
    ask(live, "a video ahead", "What happens?")
    live.note_turn("red", "a video within", [clip, "What happens?"], turns=1, images=1)
    live.note_turn("red", "a video beside it", [PICTURES[0], clip, "Which?"], turns=1, images=2)
    ask(live, "a fork", "What else?", after=1)
    with pytest.raises(ServiceError):
        live.pop("red", 0)


def test_a_sample_ends_where_a_second_picture_comes_and_after_so_many_questions() -> None:
    live = LiveSamples(9, 1 << 20)
    live.note_image("red", "ahead", PICTURES[0], images=1)
    ask(live, "ahead", "One?")
    live.note_image("red", "ahead", PICTURES[1], images=2)
    live.note_turn("red", "ahead", ["Two?"], turns=2, images=2)
    live.note_turn("red", "within", [PICTURES[2], "One?"], turns=1, images=1)
    live.note_turn("red", "within", [PICTURES[3], "Two?"], turns=2, images=2)
    live.note_image("red", "long", PICTURES[3], images=1)
    ask(live, "long", *"abcdefghijk")
    questions = {digest: len(texts) for digest, texts in samples_of(live)}
    assert questions == {PICTURES[0].digest: 1, PICTURES[2].digest: 1, PICTURES[3].digest: MOST_QUESTIONS}


def test_the_latest_are_kept_within_their_number_and_bytes() -> None:
    few, small = LiveSamples(2, 1 << 20), LiveSamples(9, 3 * PICTURES[0].pixels.nbytes)
    for live in (few, small):
        for number, picture in enumerate(PICTURES):
            live.note_image("red", f"s{number}", picture, images=1)
            ask(live, f"s{number}", "What?")
    assert [digest for digest, _ in samples_of(few)] == [PICTURES[3].digest, PICTURES[2].digest]
    assert [digest for digest, _ in samples_of(small, most=1)] == [PICTURES[3].digest]
    assert [digest for digest, _ in samples_of(small)] == [PICTURES[2].digest, PICTURES[1].digest], "and not twice"
    none = LiveSamples(0, 1 << 20)
    none.note_image("red", "s", PICTURES[0], images=1)
    ask(none, "s", "What?")
    assert len(none) == 0


def test_everybody_gets_their_own() -> None:
    live = LiveSamples(9, 1 << 20)
    for tenant, picture in zip(("red", "blue"), PICTURES, strict=False):
        live.note_image(tenant, "s", picture, images=1)
        ask(live, "s", "What?", tenant=tenant)
    assert [digest for digest, _ in samples_of(live, "blue")] == [PICTURES[1].digest]
    assert [digest for digest, _ in samples_of(live, "red")] == [PICTURES[0].digest]


def test_one_tenant_does_not_displace_what_others_said() -> None:
    live = LiveSamples(2, 1 << 20)
    live.note_image("blue", "s", PICTURES[0], images=1)
    ask(live, "s", "What?", tenant="blue")
    for number in range(3):
        live.note_image("red", f"s{number}", PICTURES[number], images=1)
        ask(live, f"s{number}", "What?")
    assert [digest for digest, _ in samples_of(live, "blue")] == [PICTURES[0].digest]
    assert [digest for digest, _ in samples_of(live, "red")] == [PICTURES[2].digest]


def converse(client: Client) -> None:
    with client.session() as session:
        session.add_image(png(60, 80, seed=41))
        session.ask("What?", max_new_tokens=2).read()
        session.ask("And then?", max_new_tokens=2).read()
        with session.fork() as fork:
            fork.ask("Or else?", max_new_tokens=2).read()


def test_a_service_keeps_nothing_unless_it_was_told_to(client: Client) -> None:
    converse(client)
    for use in (
        lambda: client.strategies.retune(0.2, LiveTraffic()),
        lambda: client.strategies.compare("full", "preset-10", LiveTraffic()),
    ):
        with pytest.raises(CalibrationUnavailable, match="--calibration-samples"):
            use()


def test_a_search_takes_what_was_held_lately(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vflow_server.tuning.search.Proposer", NoProcess)
    served = serve(calibration_samples="4")
    for _ in range(3):
        converse(served.client)
    until(lambda: len(served.service.live_samples) == 3)
    compared = served.client.strategies.compare("full", "preset-10", LiveTraffic(max_samples=1))
    assert (compared.samples, compared.questions) == (1, 2)
    with pytest.raises(OptionOutOfRange):
        served.client.strategies.compare("full", "preset-10", LiveTraffic(max_samples=-1))
    found = served.client.strategies.retune(0.2, LiveTraffic(), trials=1).result(timeout=20)
    assert found.provenance.samples == 2
    with pytest.raises(CalibrationUnavailable, match="since the last search"):
        served.client.strategies.retune(0.2, LiveTraffic())
