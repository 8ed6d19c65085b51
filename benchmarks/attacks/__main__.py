"""What attacks cost other tenants: the time between their tokens, their pictures, the health checks, and memory.

For each attack the tenant uses the service for a while alone, and for a while beside the attackers. Attackers without a
token, one tenant, and many tenants are told apart. Each attack meets a service of its own, on the embedded model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.attacks.attack import ATTACKS, Attack, attacking
from benchmarks.attacks.bystander import Bystander, Seen
from benchmarks.memory import listener
from benchmarks.service import running_service
from benchmarks.table import Row, publish
from vflow_server.access.caller import Caller
from vflow_server.access.tokens import new_token

MOST_RATIO = 2.0
"""Greatest acceptable ratio of the 95th percentiles of the time between two tokens, under attack to calm."""

MOST_SECONDS = 2.0
"""Seconds within which a small picture must be taken."""

MANY = 12
"""Tenants that attack together."""

_QUOTA = ("--tenant-turns", "8", "--tenant-sessions", "64", "--grace", "1s", "--log-level", "error")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the attacks; returns the exit code."""
    parser = argparse.ArgumentParser(prog="attacks", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each attack, and of each calm time")
    parser.add_argument("--only", nargs="*", default=[], help="attacks whose names contain one of these words")
    parser.add_argument("--vflow", type=Path, default=Path(sys.executable).with_name("vflow"), help="command to start")
    parser.add_argument("--flags", default="", help="further flags of `vflow serve`, in one text")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    options = parser.parse_args(arguments)
    chosen = [
        attack
        for attack in ATTACKS
        if not options.only or any(word in f"{attack.name} {attack.by}" for word in options.only)
    ]
    rows = []
    for attack in tqdm(chosen, unit="attack", disable=None):
        rows.append(measure(attack, options.vflow, options.flags.split(), options.seconds))
        tqdm.write(str(rows[-1]), file=sys.stderr)
    publish(rows, options.json)
    print(
        f"targets: p95 between two tokens, attack / calm: at most {MOST_RATIO:g}; the slowest small picture: at most "
        f"{MOST_SECONDS:g} s; nothing failed"
    )
    return 0


def measure(attack: Attack, vflow: Path, flags: Sequence[str], seconds: float) -> Row:
    """The row of one attack."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens"
        harmless, *attackers = _tokens(tokens, MANY + 1)
        with running_service("--tokens", str(tokens), *_QUOTA, *flags, vflow=vflow, patience=60) as address:
            process = listener(address)
            assert process is not None, "the service listens on this machine"
            bystander = Bystander(address, harmless, process)
            with bystander.watching():  # warms up
                time.sleep(min(seconds, 5))
            calm, attacked = Seen(), Seen()
            _watch(bystander, calm, seconds / 2)
            calm_bytes = calm.resident
            with attacking([attack], address, attackers):
                time.sleep(2)  # its imports
                _watch(bystander, attacked, seconds)
            time.sleep(1)
            _watch(bystander, calm, seconds / 2)
    ratio = attacked.p95_ms() / calm.p95_ms()
    return {
        "attack": attack.name,
        "by": attack.by,
        "calm_p95_ms": round(calm.p95_ms(), 2),
        "attack_p95_ms": round(attacked.p95_ms(), 2),
        "ratio": round(ratio, 2),
        "longest_gap_ms": round(max(attacked.gaps, default=float("inf")) * 1000, 1),
        "slowest_picture_s": round(max(attacked.pictures, default=float("inf")), 2),
        "slowest_check_s": round(max(attacked.checks, default=float("inf")), 2),
        "failed": len(attacked.failures),
        "failed_calm": len(calm.failures),
        "calm_MiB": calm_bytes >> 20,
        "attack_MiB": attacked.resident >> 20,
        "first_failure": attacked.failures[0] if attacked.failures else "",
    }


def _watch(bystander: Bystander, into: Seen, seconds: float) -> None:
    with bystander.watching() as seen:
        time.sleep(seconds)
    into.add(seen)


def _tokens(file: Path, tenants: int) -> list[str]:
    """Tokens of as many tenants, whose entries are in ``file``."""
    made = [new_token(Caller(f"tenant-{number}", admin=False)) for number in range(tenants)]
    file.write_text("".join(f"{entry.line()}\n" for _, entry in made))
    return [token for token, _ in made]


if __name__ == "__main__":
    sys.exit(main())
