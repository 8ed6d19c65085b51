"""Everything at once, at twice the capacity; VFLOW_SOAK_SECONDS sets for how long.

A refused call is refused at once and changes nothing. An accepted call ends, with the answer that an undisturbed
service gives.
"""

import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from tests.server.calibrating import samples
from tests.server.drawing import png
from tests.server.relay import Relay
from tests.server.restartable_server import Parent, RestartableServer, free_port
from tests.server.served import Served
from tests.server.waiting import until
from vflow_client import CapacityExhausted, NothingToRollBack, Session, SessionBusy
from vflow_client.v1.conversations_pb2 import ChatOptions, ChatRequest, Part
from vflow_client.v1.conversations_pb2_grpc import ConversationsStub
from vflowopt.runtime.model_runner import Runtime

RUNNING, WAITING = 2, 2
TALKERS = 2 * (RUNNING + WAITING)
STRATEGIES = ("full", "preset-50", "preset-10")
TENANTS = ("first", "second")
SCRIPTS = 3
TURNS = 4

Script = tuple[str, int]
"""Strategy and number of a conversation: these decide its questions and answers."""


def say(session: Session, number: int, turn: int) -> str:
    """Send a turn of a conversation and read the whole answer."""
    pictures = [png(50 + number, 70, seed=turn)] if turn in (0, 2) else []
    return session.ask(f"Question {turn}", images=pictures, max_new_tokens=8, min_new_tokens=8).read()


class Soak:
    """Callers of all kinds, each on a thread of its own, until :meth:`stop`.

    Args:
        server: the service.
    """

    def __init__(self, server: RestartableServer) -> None:
        self._server = server
        self._enough = threading.Event()
        self._failures: list[BaseException] = []
        self.completed: list[tuple[Script, list[str]]] = []
        self.answered: list[float] = []
        """Seconds that turns took, in order of their ends."""
        self.refused: list[float] = []
        """Seconds that refusals took."""
        self.deeds = dict.fromkeys(("cancel", "read slowly", "die", "swap", "retune"), 0)
        lives: list[Callable[[random.Random], None]] = [self._talk] * TALKERS
        lives += [self._read_slowly, self._die, self._swap, self._retune]
        self._threads = [threading.Thread(target=self._live, args=life) for life in enumerate(lives)]
        for thread in self._threads:
            thread.start()

    def wait(self, seconds: float) -> None:
        """Let it go on for so long and until everything has happened, or until something fails."""
        begun = time.monotonic()
        until(
            lambda: bool(
                self._failures or (time.monotonic() - begun > seconds and self.completed and all(self.deeds.values()))
            ),
            seconds + 60,
        )

    def stop(self) -> None:
        """Have everybody come to an end; fails as the first of them did."""
        self._enough.set()
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive(), "what was accepted does not end"
        if self._failures:
            raise self._failures[0]

    def _live(self, number: int, life: Callable[[random.Random], None]) -> None:
        chance = random.Random(number)
        try:
            while not self._enough.is_set():
                life(chance)
        except BaseException as failure:
            self._failures.append(failure)

    def _patiently(self, call: Callable[[], str]) -> str:
        """What ``call`` returns once there is room for it; empty if the end comes first."""
        while True:
            begun = time.monotonic()
            try:
                answer = call()
            except CapacityExhausted as refusal:
                self.refused.append(time.monotonic() - begun)
                assert refusal.retry_after is not None, refusal
                if self._enough.wait(0.05):
                    return ""
            except SessionBusy:  # with a turn that was cancelled a moment ago
                time.sleep(0.01)
            else:
                self.answered.append(time.monotonic() - begun)
                return answer

    def _talk(self, chance: random.Random) -> None:
        """One conversation, of which some turns are cancelled and sent again."""
        strategy, number = chance.choice(STRATEGIES), chance.randrange(SCRIPTS)
        tenant = chance.choice(TENANTS)
        with self._server.client(tenant=tenant) as client, client.session(strategy) as session:
            answers: list[str] = []
            for turn in range(TURNS):
                if chance.random() < 0.2:
                    self._cancel(session, chance)
                answers.append(self._patiently(lambda turn=turn: say(session, number, turn)))  # type: ignore[misc]
                if not answers[-1]:
                    return
            assert session.state().turn_count == TURNS
            self.completed.append(((strategy, number), answers))

    def _cancel(self, session: Session, chance: random.Random) -> None:
        answer = session.ask("Go on", max_new_tokens=4000, min_new_tokens=4000)
        with suppress(CapacityExhausted):
            for _ in range(chance.randrange(1, 5)):
                next(answer)
            self.deeds["cancel"] += 1
        answer.close()

    def _read_slowly(self, chance: random.Random) -> None:
        """A long answer through a narrow window, a piece now and then."""
        narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1)]
        with self._server.client() as client, client.session() as session:
            with grpc.insecure_channel(self._server.address, narrow) as channel, suppress(grpc.RpcError):
                answer = ConversationsStub(channel).Chat(_long(session))
                for _ in range(20):
                    next(answer)
                    self._enough.wait(0.05)
                self.deeds["read slowly"] += 1
                answer.cancel()

    def _die(self, chance: random.Random) -> None:
        """A client that is lost in the middle of an answer: at once, or after a silence."""
        with self._server.client() as client:
            session = client.session()
        relay = Relay(self._server.address)
        try:
            with grpc.insecure_channel(relay.address) as channel, suppress(grpc.RpcError):
                answer = ConversationsStub(channel).Chat(_long(session))
                next(answer)
                if chance.random() < 0.5:
                    relay.fall_silent()
                    self._enough.wait(0.5)
                relay.cut()
                self.deeds["die"] += 1
        finally:
            relay.cut()
        with self._server.client() as client:
            client.attach(session.name).delete()

    def _swap(self, chance: random.Random) -> None:
        with self._server.client() as client:
            client.strategies.activate(chance.choice(STRATEGIES))
            with suppress(NothingToRollBack):  # it was active already
                client.strategies.rollback()
        self.deeds["swap"] += 1
        self._enough.wait(0.2)

    def _retune(self, chance: random.Random) -> None:
        """A search that is let go on for a moment, and cancelled if it has not ended by then."""
        with self._server.client() as client:
            search = client.strategies.retune(0.2, samples(2), trials=2)
            self._enough.wait(chance.uniform(0, 6))
            search.cancel()
            search.wait(60)
            assert search.done
        self.deeds["retune"] += 1


def _long(session: Session) -> ChatRequest:
    options = ChatOptions(max_new_tokens=1000, min_new_tokens=1000)
    return ChatRequest(session=session.name, parts=[Part(text="Go on")], options=options)


def check_answers(completed: list[tuple[Script, list[str]]], runtime: Runtime) -> None:
    """Each conversation has the answers that it would have alone."""
    undisturbed = Served(runtime)
    try:
        for strategy, number in {script for script, _ in completed}:
            with undisturbed.client.session(strategy) as session:
                expected = [say(session, number, turn) for turn in range(TURNS)]
            assert all(answers == expected for script, answers in completed if script == (strategy, number))
    finally:
        undisturbed.stop()


@pytest.mark.parametrize("seconds", [10, pytest.param(900, marks=pytest.mark.long)])
def test_soak(seconds: float, parent: Parent, model_folder: Path, tmp_path: Path) -> None:
    if seconds > 60:
        seconds = float(os.environ.get("VFLOW_SOAK_SECONDS", seconds))
    server = RestartableServer(
        parent,
        tmp_path / "log",
        model=model_folder,
        kv_budget="2MiB",
        max_running=RUNNING,
        max_waiting=WAITING,
        offload_memory="256KiB",
        spill_dir=tmp_path / "spilled",
        data=tmp_path / "data",
        metrics_port=free_port(),
    )
    try:
        soak = Soak(server)
        soak.wait(seconds)
        soak.stop()
        for tenant in (None, *TENANTS):
            with server.client(tenant=tenant) as client:
                for state in client.sessions():
                    client.attach(state.name).delete()
        until(lambda: not server.gauges()["vflow_requests_running"], 20)
        gauges = server.gauges()
        assert gauges["vflow_engine_up"] and not gauges["vflow_requests_waiting"] and not gauges["vflow_retune_running"]
        assert not server.lost_pages()
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
    finally:
        server.close()
    assert not [line for line in server.logged() if line["level"] == "error"]
    assert not list((tmp_path / "data").rglob("*.safetensors")), "what was deleted is still there"
    assert soak.refused, "it was never full: the test proves little"
    assert statistics.median(soak.refused) < statistics.median(soak.answered)
    check_answers(soak.completed, Runtime.load(model_folder, kv_budget=32 << 20))
