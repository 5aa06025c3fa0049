"""The stream's attention as one Triton kernel, for GPUs.

In a pass of the stream, a chunk's queries attend to the keys in the cache and to the chunk's own,
each key turned by its place in the window. In PyTorch's words (`attention` in model.py) that is
eleven launches a block: norm q and k, join new keys and values to the held ones, turn q and k (a
product, a roll and a sum each), attend. What lies between them goes out to memory and comes back:

                                      a pass at small      at the paper's 1.3B
    launches, dense -> here           66 -> 6              330 -> 30
    bytes, dense -> here              43 -> 6 MB           5.0 -> 0.7 GB
    arithmetic                        1 GFLOP              570 GFLOP
    a block's attention, H100         .30 -> .08 ms        .21 -> .12 ms

A launch costs some microseconds whatever it does, so a small student waits for nothing else. (Timed
eagerly, once, by `bench.py attention`; launches and bytes are counted by hand.)

If you have never seen Triton: `kernel` runs once for every BLOCK_Q queries of every head, many at a
time. A tensor in it is a small tile in registers; tl.load fetches one by its addresses (a pointer
plus offsets), with a mask for what lies outside; tl.dot multiplies two on the matrix units. The
softmax is online (FlashAttention, arXiv 2205.14135): walk over the keys in tiles and keep, for each
query, the largest score so far, the sum of exp(score - largest) and the weighted sum of values;
where a larger score turns up, scale these two down. So the matrix of scores never exists as a
whole. RoPE turns the pair (x[i], x[i + d/2]), so a head's halves are two tiles, and a score the sum
of two products.
"""

import math
import os

import torch
import triton
import triton.language as tl

WIDE = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def normed(a, b, scale, half, d: tl.constexpr):
    """QK-norm of the halves a, b (rows, d/2) of each row: layer norm, times scale (d,)."""
    by_a = tl.load(scale + half).to(tl.float32)
    by_b = tl.load(scale + d // 2 + half).to(tl.float32)
    mean = (tl.sum(a, 1) + tl.sum(b, 1)) / d
    a -= mean[:, None]
    b -= mean[:, None]
    r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / d + 1e-5)[:, None]
    return a * r * by_a[None], b * r * by_b[None]


@triton.jit
def turned(a, b, rope, row, half, inside, d: tl.constexpr):
    """RoPE by the table's rows: cosines, then sines with a minus in their first half."""
    at = rope + row[:, None] * 2 * d + half[None]
    cos = tl.load(at, inside, 0.0).to(tl.float32)
    sin = tl.load(at + d + d // 2, inside, 0.0).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def product(a, b, WIDE: tl.constexpr):
    """a @ b, summed in float32. "ieee": in float32 exact, not TF32. WIDE: Triton's interpreter,
    which the tests use, multiplies no bfloat16."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def over(
    state, qa, qb, k, v, stride, k_scale, rope, FIRST: tl.constexpr, N: tl.constexpr,
    NORM: tl.constexpr, WIDE: tl.constexpr, d: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Walk over N keys and values; FIRST is the first one's row in the RoPE table."""
    best, total, out = state
    half, whole = tl.arange(0, d // 2), tl.arange(0, d)
    for start in range(0, N, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        inside = (row < N)[:, None]
        at = k + row[:, None] * stride + half[None]
        a = tl.load(at, inside, 0.0).to(tl.float32)
        b = tl.load(at + d // 2, inside, 0.0).to(tl.float32)
        if NORM:
            a, b = normed(a, b, k_scale, half, d)
        a, b = turned(a, b, rope, FIRST + row, half, inside, d)
        score = product(qa, tl.trans(a.to(qa.dtype)), WIDE)
        score += product(qb, tl.trans(b.to(qb.dtype)), WIDE)
        score = tl.where((row < N)[None], score, float("-inf"))
        largest = tl.maximum(best, tl.max(score, 1))
        weight = tl.exp2(score - largest[:, None])
        shrink = tl.exp2(best - largest)
        values = tl.load(v + row[:, None] * stride + whole[None], inside, 0.0)
        out = out * shrink[:, None] + product(weight.to(values.dtype), values, WIDE)
        total = total * shrink + tl.sum(weight, 1)
        best = largest
    return best, total, out


@triton.jit
def kernel(
    q, k, v, kept_k, kept_v, q_scale, k_scale, rope, y,
    heads, per_row, per_head, per_batch, kept_per_head, factor,
    HELD: tl.constexpr, NEW: tl.constexpr, WIDE: tl.constexpr, d: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """q, k, v (B, h, NEW, d) by strides; kept (B, h, places, d), normed; y (B, NEW, h, d)."""
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    q += batch * per_batch + head * per_head
    k += batch * per_batch + head * per_head
    v += batch * per_batch + head * per_head
    kept_k += tl.program_id(1).to(tl.int64) * kept_per_head
    kept_v += tl.program_id(1).to(tl.int64) * kept_per_head
    half, whole = tl.arange(0, d // 2), tl.arange(0, d)
    row = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = (row < NEW)[:, None]
    at = q + row[:, None] * per_row + half[None]
    a, b = tl.load(at, inside, 0.0), tl.load(at + d // 2, inside, 0.0)
    qa, qb = normed(a.to(tl.float32), b.to(tl.float32), q_scale, half, d)
    qa, qb = turned(qa, qb, rope, HELD + row, half, inside, d)
    qa, qb = (qa * factor).to(a.dtype), (qb * factor).to(a.dtype)
    best = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    state = best, tl.zeros_like(best), tl.zeros((BLOCK_Q, d), tl.float32)
    state = over(state, qa, qb, kept_k, kept_v, d, k_scale, rope, 0, HELD, False, WIDE, d, BLOCK_K)
    state = over(state, qa, qb, k, v, per_row, k_scale, rope, HELD, NEW, True, WIDE, d, BLOCK_K)
    out = state[2] / state[1][:, None]
    at = y + ((batch * NEW + row[:, None]) * heads + head) * d + whole[None]
    tl.store(at, out.to(a.dtype), inside)


def blocks(wide, d, n):
    """BLOCK_Q and BLOCK_K: as large as registers hold without spills (tests/test_kernels.py); small
    for short chunks, so that there are enough programs to keep a GPU busy."""
    if wide:  # float32
        return (32, 32) if d < 128 else (16, 16)
    return (64, 32) if n > 512 else (32, 32)


def stream_attention(q, k, v, kept, held, q_scale, k_scale, rope):
    """The chunk's q, k, v (B, h, n, d), as the projection leaves them (equal strides, the last 1),
    over the first `held` places of kept (2, B, h, places, d), keys (normed) and values, and over
    themselves. q_scale, k_scale (d,): QK-norm's; rope (latents, N, 2, d), see model.rope_table.
    float32, float16 or bfloat16 -> (B, h, n, d), without gradient."""
    B, heads, n, d = q.shape
    assert d in (32, 64, 128) and q.stride() == k.stride() == v.stride() and q.stride(3) == 1
    assert kept.is_contiguous() and kept.dtype == q.dtype and not torch.is_grad_enabled()
    y = q.new_empty(B, n, heads, d)
    block_q, block_k = blocks(q.dtype == torch.float32, d, n)
    kernel[triton.cdiv(n, block_q), B * heads](
        q, k, v, kept[0], kept[1], q_scale, k_scale, rope, y,
        heads, q.stride(2), q.stride(1), q.stride(0), kept.stride(2), d**-0.5 * math.log2(math.e),
        HELD=held, NEW=n, WIDE=WIDE and q.dtype == torch.bfloat16,
        d=d, BLOCK_Q=block_q, BLOCK_K=block_k,
    )  # fmt: skip
    return y.transpose(1, 2)
