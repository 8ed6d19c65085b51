"""Compile the Triton kernels to machine code for devices that are not there; a command for tests.

Prints a JSON object for each kernel: the device, the kernel, its options, and the bytes of shared memory that it needs.
"""

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vflowopt.runtime import ragged_kernels as kernels
from vflowopt.runtime.ragged_attention import tilings

POINTERS = {
    "tiles": "*i32",
    "sequences": "*i32",
    "query_starts": "*i32",
    "context_lens": "*i32",
    "block_tables": "*i32",
}
POINTERS |= {"partial_output": "*fp32", "partial_lse": "*fp32", "scale": "fp32"}
NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float8_e4m3fn: "*u8"}

ALIGNED = {"output", "query", "key", "value", "pool_keys", "pool_values", "partial_output", "partial_lse"}
ALIGNED |= {"query_stride", "query_head_stride", "key_stride", "key_head_stride", "value_stride", "value_head_stride"}

Shape = tuple[torch.dtype, torch.dtype, int, int, int]
"""Types of queries and of pages, key heads, query heads of each, channels of a head."""

FEW: tuple[tuple[int, Shape], ...] = (
    (90, (torch.bfloat16, torch.bfloat16, 4, 7, 128)),
    (80, (torch.bfloat16, torch.float8_e4m3fn, 8, 4, 80)),
    (80, (torch.float32, torch.float32, 2, 7, 64)),
)
"""Compute capabilities and shapes."""

MANY: tuple[tuple[int, Shape], ...] = tuple(
    (capability, (dtype, stored_as, kv_heads, group, head_dim))
    for capability in (80, 90)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for stored_as in (dtype, torch.float8_e4m3fn)
    for kv_heads, group, head_dim in ((4, 7, 128), (32, 1, 72), (1, 32, 256), (2, 3, 96), (2, 6, 16))
)


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, object], capability: int, **options: int) -> Any:
    """A kernel as machine code."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else (POINTERS | types).get(name, "i32") for name in names}
    # What the run-time finds true of the others, and compiles for: their addresses are multiples of 16.
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in ALIGNED}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_for(capability: int, shape: Shape) -> None:
    """Compile all kernels for one model."""
    dtype, stored_as, kv_heads, group, head_dim = shape
    states, pages = NAMES[dtype], NAMES[stored_as]
    types = {"output": states, "query": states, "key": states, "value": states}
    types |= {"pool_keys": pages, "pool_values": pages}
    e4m3 = stored_as == torch.float8_e4m3fn
    heads = {"KV_HEADS": kv_heads, "HEAD_DIM": head_dim}
    block = triton.next_power_of_2(kv_heads * head_dim)
    jobs: list[tuple[Any, dict[str, object], dict[str, int]]] = [
        (kernels.write_kernel, {**heads, "BLOCK": block, "PAGE_SIZE": 16, "E4M3": e4m3}, {})
    ]
    for tiling in tilings(group, head_dim, dtype):
        tile = {**heads, "GROUP": group, "BLOCK_D": triton.next_power_of_2(head_dim), "ROWS": tiling.rows}
        attention = {**tile, "PAGE_SIZE": 16, "KEYS": tiling.keys, "E4M3": e4m3}
        jobs.append((kernels.attention_kernel, attention, {"num_warps": tiling.warps, "num_stages": tiling.stages}))
        jobs.append((kernels.combine_kernel, tile, {}))
    for kernel, constants, options in jobs:
        made = compiled(kernel, types, constants, capability, **options)
        row = {"device": capability, "kernel": kernel.fn.__name__, "dtype": str(dtype), "pages": str(stored_as)}
        row |= {"constants": constants, "shared": made.metadata.shared, "code": len(made.asm["cubin"])}
        print(json.dumps({**row, "matrix_units": "mma" in made.asm["ptx"]}))


if __name__ == "__main__":
    for capability, shape in MANY if "many" in sys.argv[1:] else FEW:
        compile_for(capability, shape)
