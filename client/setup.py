"""Build hook of the client: generates the gRPC stubs (package `vflow.v1`) from the contract in `proto/`.

The stubs are written to `client/generated/`, which git ignores, whenever the distribution is built or installed,
editable installs included. A source distribution carries them and has no `proto/` beside it: they are then taken as
they are.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
CONTRACT = HERE.parent / "proto"
GENERATED = HERE / "generated"


def generate_stubs() -> None:
    """Runs the pinned protocol compiler over every file of the contract; exits with its status if it fails."""
    import google.longrunning
    import grpc_tools
    from grpc_tools import protoc

    sources = sorted(str(path.relative_to(CONTRACT)) for path in CONTRACT.glob("vflow/v1/*.proto"))
    package = GENERATED / "vflow" / "v1"
    package.mkdir(parents=True, exist_ok=True)
    for stale in package.glob("*_pb2*"):
        stale.unlink()
    with tempfile.TemporaryDirectory() as imported:
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
                f"--python_out={GENERATED}",
                f"--pyi_out={GENERATED}",
                f"--grpc_python_out={GENERATED}",
                *sources,
            ]
        )
    if status != 0:
        sys.exit(status)
    (package.parent / "__init__.py").write_text('"""The contract of VFlow, generated from `proto/`."""\n')
    (package / "__init__.py").write_text(
        '"""Version 1 of the contract of VFlow, generated from `proto/vflow/v1/`."""\n'
    )
    (package.parent / "py.typed").touch()


# At import, not inside a build command: setuptools looks for the packages before it runs any.
if CONTRACT.is_dir():
    generate_stubs()

# Named, because setuptools leaves the setup script itself out of the packages only if it knows which file that is.
setup(script_name=__file__)
