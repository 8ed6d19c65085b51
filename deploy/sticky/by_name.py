"""A conversation with one of several replicas that the caller chooses by name, without a proxy.

    python deploy/sticky/by_name.py vflow-0.vflow:50051,vflow-1.vflow:50051 order-66 picture.png "How many circles?"

Unlike a ring of addresses it sends nothing elsewhere while a replica restarts, under whichever address: callers wait
for it, and its sessions go on.
"""

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import vflow_client


def replica_of(key: str, names: Sequence[str]) -> str:
    """The one of `names` that a conversation belongs to, by rendezvous hashing.

    A name that is added takes its share of the conversations from all others; one that is taken away leaves its own.
    """
    return max(names, key=lambda name: hashlib.sha256(f"{key} {name}".encode()).digest())


def main(names: str, key: str, picture: str, question: str) -> None:
    """Shows a picture, asks about it, and asks on."""
    chosen = replica_of(key, names.split(","))
    token, tls = os.environ.get("VFLOW_TOKEN"), os.environ.get("VFLOW_CA", False)
    with vflow_client.connect(chosen, token=token, tls=tls) as client:
        with client.session() as session:
            print(session.ask(Path(picture), question).read())
            print(session.ask("What else can be seen?").read())


if __name__ == "__main__":
    main(*sys.argv[1:])
