"""Build hook of the client: generates the gRPC stubs (package `vflow_client.v1`) from the contract in `proto/`.

The stubs are written to `client/vflow_client/v1/`, which git ignores, whenever the distribution is built or installed,
editable installs included. A source distribution carries them and has no `proto/` beside it: they are then taken as
they are.
"""

import re
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
CONTRACT = HERE.parent / "proto"
STUBS = HERE / "vflow_client" / "v1"


def generate_stubs() -> None:
    """Runs the pinned protocol compiler over every file of the contract; exits with its status if it fails."""
    import google.longrunning
    import grpc_tools
    from grpc_tools import protoc

    sources = sorted(str(path.relative_to(CONTRACT)) for path in CONTRACT.glob("vflow/v1/*.proto"))
    STUBS.mkdir(parents=True, exist_ok=True)
    for stale in STUBS.glob("*_pb2*"):
        stale.unlink()
    with tempfile.TemporaryDirectory() as imported, tempfile.TemporaryDirectory() as generated:
        # googleapis-common-protos ships this file under another name than the one by which it is imported.
        longrunning = Path(next(iter(google.longrunning.__path__)))
        target = Path(imported) / "google" / "longrunning" / "operations.proto"
        target.parent.mkdir(parents=True)
        shutil.copy(longrunning / "operations_proto.proto", target)
        status = protoc.main(
            [
                "protoc",
                f"--proto_path={CONTRACT}",
                f"--proto_path={Path(grpc_tools.__file__).parent / '_proto'}",
                f"--proto_path={imported}",
                f"--proto_path={longrunning.parent.parent}",
                f"--python_out={generated}",
                f"--pyi_out={generated}",
                f"--grpc_python_out={generated}",
                *sources,
            ]
        )
        if status != 0:
            sys.exit(status)
        for stub in (Path(generated) / "vflow" / "v1").iterdir():
            # The compiler writes imports by the wire package; the stubs live in the client's own.
            text = re.sub(
                r"^from vflow\.v1 import", "from vflow_client.v1 import", stub.read_text(), flags=re.MULTILINE
            )
            (STUBS / stub.name).write_text(text)
    (STUBS / "__init__.py").write_text('"""Version 1 of the contract of VFlow, generated from `proto/vflow/v1/`."""\n')


# At import, not inside a build command: setuptools looks for the packages before it runs any.
if CONTRACT.is_dir():
    generate_stubs()

setup()
