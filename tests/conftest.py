"""What all tests share: no network, and no more threads than a small machine has cores."""

import os
from importlib.util import find_spec

# Before any test imports torch or transformers, which read these once.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# Before Triton is imported, which decides then how its own functions are run.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Where there are no wheels of it.
if find_spec("triton") is None:
    collect_ignore = [
        "benchmarks/test_attention.py",
        "vflowopt/test_compiled_kernels.py",
        "vflowopt/test_cuda.py",
        "vflowopt/test_cuda_graph.py",
        "vflowopt/test_ragged_attention.py",
        "vflowopt/test_triton_backend.py",
    ]

# No test depends on how busy the machine is.
settings.register_profile("vflow", deadline=None)
settings.load_profile("vflow")
