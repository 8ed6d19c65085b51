"""Tenants taking turns."""

from dataclasses import dataclass

from vflow_server.engine.fair_queue import RoundRobin


@dataclass(frozen=True)
class Wish:
    tenant: str
    number: int = 0


def wishes(tenants: str) -> list[Wish]:
    return [Wish(tenant, number) for number, tenant in enumerate(tenants)]


def test_one_of_each_then_a_second_of_each_and_those_of_one_in_order() -> None:
    ordered = RoundRobin().order(wishes("aaabac"))
    assert [(wish.tenant, wish.number) for wish in ordered] == [
        ("a", 0),
        ("b", 3),
        ("c", 5),
        ("a", 1),
        ("a", 2),
        ("a", 4),
    ]


def test_who_was_served_last_comes_last() -> None:
    turns, served = RoundRobin(), ""
    for _ in range(6):
        first = turns.order(wishes("aaabbc"))[0]
        turns.served(first.tenant)
        served += first.tenant
    assert served == "abcabc"


def test_those_who_come_and_go_keep_nobody_from_being_served() -> None:
    """Each of the others is new in the line every second time, and one or the other always is."""
    turns, served = RoundRobin(), ""
    for step in range(12):
        first = turns.order(wishes("aaaa" + ("bc" if step % 2 else "de")))[0]
        turns.served(first.tenant)
        served += first.tenant
    assert served.count("a") >= 4
