"""Triton kernels over the paged cache: write new tokens, attend to the pages in place, and combine split contexts.

A tile is a few consecutive queries of one sequence, with all query heads that share one key head; each (query, head) is
a row. One program computes one tile for one key head. A tile with few rows and a long context would leave most of a
device idle, so its keys can be split between several programs, whose results are then combined (flash-decoding).

Tables and lengths are read on the device, so a CUDA graph that was captured with these kernels can be replayed with
other ones. The grid depends on the number of tiles alone.

Pages hold float32, float16, bfloat16, or bytes in the format e4m3, four bits of exponent and three of mantissa. The
conversions of e4m3 are written out in integer operations: Triton's own need compute capability 8.9.
"""

# The parameters of a kernel have no types of Python's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

TILE_FIELDS = tl.constexpr(5)
"""Fields of a tile, each int32: sequence, first query within the sequence's new ones, split, number of splits, and the
place of its partial result."""


# Triton compiles anew for a number that is 1 or a multiple of 16, and for a pointer that is one. These vary from batch
# to batch, and nothing is gained by a kernel of their own.
_VARYING = ["table_stride"]
_UNALIGNED = ["tiles", "sequences", "query_starts", "context_lens", "block_tables"]


@triton.jit
def decode_e4m3(bits):
    """The numbers, float16, of e4m3 bit patterns, uint8; exact, also for NaN and subnormal numbers."""
    wide = bits.to(tl.uint16)
    # The fields at the places where float16 has them; its exponent is counted from 15 and not from 7.
    small = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), small * 256.0).to(tl.float16)


@triton.jit
def encode_e4m3(numbers):
    """e4m3 bit patterns, uint8, of float32 numbers: rounded to nearest even; beyond the largest, 448, that one."""
    size = tl.minimum(tl.abs(numbers), 448.0)
    bits = size.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Adding 2^14 leaves 9 bits after the point: as many as subnormal numbers have.
    subnormal = (size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    coded = tl.where(size < 0.015625, subnormal, normal)
    coded = tl.where(numbers == numbers, coded, 0x7F)
    sign = (numbers.to(tl.uint32, bitcast=True) >> 24) & 0x80
    return (coded | sign).to(tl.uint8)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def write_kernel(
    pool_keys,  # [slots, KV_HEADS, HEAD_DIM]
    pool_values,
    key,  # [tokens, KV_HEADS, HEAD_DIM]
    value,
    sequences,  # int32 [tokens], the sequence of each token
    query_starts,  # int32 [sequences + 1]
    context_lens,  # int32 [sequences]
    block_tables,  # int32 [sequences, blocks]
    table_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, KV_HEADS * HEAD_DIM at least
    PAGE_SIZE: tl.constexpr,
    E4M3: tl.constexpr,
):
    """Write the keys and values of one new token to its slot. Grid: tokens."""
    token = tl.program_id(0)
    sequence = tl.load(sequences + token)
    # The last token of a sequence in the batch is the last of its context.
    place = tl.load(context_lens + sequence) - tl.load(query_starts + sequence + 1) + token
    page = tl.load(block_tables + sequence.to(tl.int64) * table_stride + place // PAGE_SIZE)
    slot = page.to(tl.int64) * PAGE_SIZE + place % PAGE_SIZE
    channel = tl.arange(0, BLOCK)
    inside = channel < KV_HEADS * HEAD_DIM
    head, within = channel // HEAD_DIM, channel % HEAD_DIM
    row = token.to(tl.int64)
    new_key = tl.load(key + row * key_stride + head * key_head_stride + within, mask=inside)
    new_value = tl.load(value + row * value_stride + head * value_head_stride + within, mask=inside)
    target = slot * (KV_HEADS * HEAD_DIM) + channel
    if E4M3:
        tl.store(pool_keys + target, encode_e4m3(new_key.to(tl.float32)), mask=inside)
        tl.store(pool_values + target, encode_e4m3(new_value.to(tl.float32)), mask=inside)
    else:
        tl.store(pool_keys + target, new_key.to(pool_keys.dtype.element_ty), mask=inside)
        tl.store(pool_values + target, new_value.to(pool_values.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def attention_kernel(
    output,  # [tokens, KV_HEADS * GROUP, HEAD_DIM]
    partial_output,  # float32 [partial results, KV_HEADS, ROWS, HEAD_DIM]
    partial_lse,  # float32 [partial results, KV_HEADS, ROWS], logarithms to the base 2
    query,  # [tokens, KV_HEADS * GROUP, HEAD_DIM]
    pool_keys,  # [slots, KV_HEADS, HEAD_DIM]
    pool_values,
    tiles,  # int32 [tiles, TILE_FIELDS]
    query_starts,  # int32 [sequences + 1]
    context_lens,  # int32 [sequences], the new tokens included
    block_tables,  # int32 [sequences, blocks]
    table_stride,
    query_stride,
    query_head_stride,
    scale,  # of the scores, times log2(e)
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # a power of two, HEAD_DIM at least
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,  # keys in one step of the loop
    E4M3: tl.constexpr,
):
    """Causal attention of one tile. Grid: tiles, key heads."""
    tile, kv_head = tiles + tl.program_id(0) * TILE_FIELDS, tl.program_id(1)
    sequence, first = tl.load(tile), tl.load(tile + 1)
    split, splits, place = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    start = tl.load(query_starts + sequence)
    count = tl.load(query_starts + sequence + 1) - start
    context_len = tl.load(context_lens + sequence)

    row = tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_D)
    queries: tl.constexpr = ROWS // GROUP
    own = first + row // GROUP
    is_row = (row < queries * GROUP) & (own < count)
    is_channel = channel < HEAD_DIM
    head = kv_head * GROUP + row % GROUP
    token = (start + own).to(tl.int64)
    inside = is_row[:, None] & is_channel[None, :]
    states = tl.load(
        query + token[:, None] * query_stride + head[:, None] * query_head_stride + channel[None, :],
        mask=inside,
        other=0.0,
    )

    sees = context_len - count + own + 1  # how many keys each row sees
    most = context_len - count + tl.minimum(first + queries, count)
    steps = tl.cdiv(tl.cdiv(most, KEYS), splits)
    begin = split * steps * KEYS
    end = tl.minimum(begin + steps * KEYS, most)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, BLOCK_D], tl.float32)
    table = block_tables + sequence.to(tl.int64) * table_stride
    for at in range(begin, end, KEYS):
        number = at + tl.arange(0, KEYS)
        is_key = number < end
        page = tl.load(table + number // PAGE_SIZE, mask=is_key, other=0)
        slot = page.to(tl.int64) * PAGE_SIZE + number % PAGE_SIZE
        source = (slot * KV_HEADS + kv_head) * HEAD_DIM
        # What lies behind the end of a context is not read: NaN times a weight of zero would be NaN.
        keys = tl.load(
            pool_keys + source[None, :] + channel[:, None], mask=is_key[None, :] & is_channel[:, None], other=0
        )
        values = tl.load(
            pool_values + source[:, None] + channel[None, :], mask=is_key[:, None] & is_channel[None, :], other=0
        )
        if E4M3:
            keys, values = decode_e4m3(keys), decode_e4m3(values)
        # "ieee": float32 is not rounded to the 10 bits of TensorFloat-32.
        scores = tl.dot(states, keys.to(states.dtype), input_precision="ieee") * scale
        scores = tl.where(is_key[None, :] & (number[None, :] < sees[:, None]), scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # a row may see no key of this split
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(largest - base)
        total = total * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None] + tl.dot(weights.to(states.dtype), values.to(states.dtype), input_precision="ieee")
        largest = larger

    mean = sums / tl.where(total > 0.0, total, 1.0)[:, None]
    if splits == 1:
        target = output + (token[:, None] * (KV_HEADS * GROUP) + head[:, None]) * HEAD_DIM + channel[None, :]
        tl.store(target, mean.to(output.dtype.element_ty), mask=inside)
    else:
        at_row = (place.to(tl.int64) * KV_HEADS + kv_head) * ROWS + row
        tl.store(partial_output + at_row[:, None] * HEAD_DIM + channel[None, :], mean, mask=inside)
        lse = tl.where(total > 0.0, largest + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))
        tl.store(partial_lse + at_row, lse, mask=is_row)


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def combine_kernel(
    output,  # [tokens, KV_HEADS * GROUP, HEAD_DIM]
    partial_output,  # float32 [partial results, KV_HEADS, ROWS, HEAD_DIM]
    partial_lse,  # float32 [partial results, KV_HEADS, ROWS]
    tiles,  # int32 [tiles, TILE_FIELDS], the first split of each tile that is split
    query_starts,  # int32 [sequences + 1]
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Combine the splits of one tile. Grid: tiles that are split, key heads."""
    tile, kv_head = tiles + tl.program_id(0) * TILE_FIELDS, tl.program_id(1)
    sequence, first = tl.load(tile), tl.load(tile + 1)
    splits, place = tl.load(tile + 3), tl.load(tile + 4)
    start = tl.load(query_starts + sequence)
    count = tl.load(query_starts + sequence + 1) - start
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_D)
    queries: tl.constexpr = ROWS // GROUP
    own = first + row // GROUP
    is_row = (row < queries * GROUP) & (own < count)
    inside = is_row[:, None] & (channel < HEAD_DIM)[None, :]

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for split in range(splits):
        at_row = ((place + split).to(tl.int64) * KV_HEADS + kv_head) * ROWS + row
        lse = tl.load(partial_lse + at_row, mask=is_row, other=float("-inf"))
        mean = tl.load(partial_output + at_row[:, None] * HEAD_DIM + channel[None, :], mask=inside, other=0.0)
        larger = tl.maximum(largest, lse)
        base = tl.where(larger == float("-inf"), 0.0, larger)
        weight, fade = tl.exp2(lse - base), tl.exp2(largest - base)
        total = total * fade + weight
        sums = sums * fade[:, None] + mean * weight[:, None]
        largest = larger

    token = (start + own).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    target = output + (token[:, None] * (KV_HEADS * GROUP) + head[:, None]) * HEAD_DIM + channel[None, :]
    mean = sums / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(target, mean.to(output.dtype.element_ty), mask=inside)
