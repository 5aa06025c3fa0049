"""The stream's attention as one Triton kernel, for GPUs.

A chunk's queries attend to the keys in the cache and to its own, each turned by its place in the
window. In PyTorch's words (`Block.attention` in model.py) that is 13 launches a block: copy and
norm q and k; join new keys and values to those held; turn q and k (product, roll and sum each);
attend:

                                      a pass at small      at the paper's 1.3B
    launches, dense -> here           78 -> 6              390 -> 30
    bytes, dense -> here              45 -> 6 MB           5.4 -> 0.7 GB
    a block's attention, H100         .30 -> .08 ms        .21 -> .12 ms

What one launch writes to memory the next one reads, and each costs microseconds whatever it does.
(Launches and bytes are counted by hand; times were measured once, eagerly.)

If you have never seen Triton: `kernel` runs once for every BLOCK_Q queries of every head, many at a
time. A tensor in it is a tile in registers; tl.load fetches one by its addresses (pointer plus
offsets) where a mask allows; tl.dot multiplies two on the matrix units. The softmax is online
(FlashAttention, arXiv 2205.14135): walk over the keys in tiles and keep, for each query, the
largest score so far, the sum of exp(score - largest) and the weighted sum of values; where a larger
score turns up, scale these two down. So the matrix of scores never exists as a whole. RoPE turns
the pair (x[i], x[i + d/2]): a head's halves are two tiles, a score two products.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def layer_norm(a, b, scale, half, d: tl.constexpr):
    """QK-norm of the halves a, b (rows, d/2) of each row: layer norm, times scale (d,)."""
    scale_a = tl.load(scale + half).to(tl.float32)
    scale_b = tl.load(scale + d // 2 + half).to(tl.float32)
    mean = ((tl.sum(a, 1) + tl.sum(b, 1)) / d)[:, None]
    a = a - mean
    b = b - mean
    variance = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / d
    r = tl.rsqrt(variance + 1e-5)[:, None]
    return a * r * scale_a[None], b * r * scale_b[None]


@triton.jit
def apply_rope(a, b, rope, row, half, inside, d: tl.constexpr):
    """RoPE by the table's rows: cosines, then sines with a minus in their first half."""
    at = rope + row[:, None] * 2 * d + half[None]
    cos = tl.load(at, inside, 0.0).to(tl.float32)
    sin = tl.load(at + d + d // 2, inside, 0.0).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def attend(
    m_i, l_i, out, q_a, q_b, k, v, stride, k_scale, rope,
    FIRST: tl.constexpr, N: tl.constexpr, NORM: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Walk over N keys and values; FIRST is the first one's row in the RoPE table. m_i (the largest
    score so far), l_i (the sum of weights) and out (the weighted sum of values) go on."""
    d: tl.constexpr = out.shape[1]
    half = tl.arange(0, d // 2)
    for start in range(0, N, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        inside = (row < N)[:, None]
        at = k + row[:, None] * stride + half[None]
        k_a = tl.load(at, inside, 0.0).to(tl.float32)
        k_b = tl.load(at + d // 2, inside, 0.0).to(tl.float32)
        if NORM:
            k_a, k_b = layer_norm(k_a, k_b, k_scale, half, d)
        k_a, k_b = apply_rope(k_a, k_b, rope, FIRST + row, half, inside, d)
        # Summed in float32, and "ieee": factors in float32 are not cut to TF32.
        score = tl.dot(q_a, tl.trans(k_a.to(q_a.dtype)), input_precision="ieee")
        score = tl.dot(q_b, tl.trans(k_b.to(q_b.dtype)), score, input_precision="ieee")
        score = tl.where((row < N)[None], score, float("-inf"))
        largest = tl.maximum(m_i, tl.max(score, 1))
        weight = tl.exp2(score - largest[:, None])
        shrink = tl.exp2(m_i - largest)
        values = tl.load(v + row[:, None] * stride + tl.arange(0, d)[None], inside, 0.0)
        out *= shrink[:, None]
        out = tl.dot(weight.to(values.dtype), values, out, input_precision="ieee")
        m_i = largest
        l_i = l_i * shrink + tl.sum(weight, 1)
    return m_i, l_i, out


@triton.jit
def kernel(
    q, k, v, kept_k, kept_v, q_scale, k_scale, rope, y,
    heads, per_row, per_head, per_batch, kept_per_head, factor,
    HELD: tl.constexpr, NEW: tl.constexpr, d: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """q, k, v (B, h, NEW, d) by strides; kept (B, h, places, d), normed; y (B, NEW, h, d)."""
    pair = tl.program_id(1)
    batch = pair // heads
    head = pair % heads
    mine = batch * per_batch + head * per_head
    kept = pair.to(tl.int64) * kept_per_head
    half = tl.arange(0, d // 2)
    row = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = (row < NEW)[:, None]

    at = q + mine + row[:, None] * per_row + half[None]
    a = tl.load(at, inside, 0.0)
    b = tl.load(at + d // 2, inside, 0.0)
    q_a, q_b = layer_norm(a.to(tl.float32), b.to(tl.float32), q_scale, half, d)
    q_a, q_b = apply_rope(q_a, q_b, rope, HELD + row, half, inside, d)
    q_a = (q_a * factor).to(a.dtype)
    q_b = (q_b * factor).to(a.dtype)

    m_i = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    l_i = tl.zeros_like(m_i)
    out = tl.zeros((BLOCK_Q, d), tl.float32)
    m_i, l_i, out = attend(
        m_i, l_i, out, q_a, q_b, kept_k + kept, kept_v + kept, d, k_scale, rope,
        FIRST=0, N=HELD, NORM=False, BLOCK_K=BLOCK_K,
    )  # fmt: skip
    m_i, l_i, out = attend(
        m_i, l_i, out, q_a, q_b, k + mine, v + mine, per_row, k_scale, rope,
        FIRST=HELD, N=NEW, NORM=True, BLOCK_K=BLOCK_K,
    )  # fmt: skip
    at = y + ((batch * NEW + row[:, None]) * heads + head) * d + tl.arange(0, d)[None]
    tl.store(at, (out / l_i[:, None]).to(a.dtype), inside)


def blocks(wide, d, n):
    """BLOCK_Q and BLOCK_K: what registers hold; for short chunks less, to keep a GPU busy."""
    if wide:  # float32
        return (32, 32) if d < 128 else (16, 16)
    return (64, 32) if n > 512 else (32, 32)


def stream_attention(q, k, v, kept, held, q_scale, k_scale, rope):
    """A chunk's q, k, v (B, h, n, d), as the projection leaves them (equal strides, the last 1),
    over the first `held` places of kept (2, B, h, places, d), keys (normed) and values, and over
    themselves; q_scale, k_scale (d,): QK-norm's; rope: model.rope_table. -> (B, h, n, d)."""
    B, heads, n, d = q.shape
    assert d in (32, 64, 128) and q.stride() == k.stride() == v.stride() and q.stride(3) == 1
    assert kept.is_contiguous() and kept.dtype == q.dtype and not torch.is_grad_enabled()
    y = q.new_empty(B, n, heads, d)
    block_q, block_k = blocks(q.dtype == torch.float32, d, n)
    kernel[triton.cdiv(n, block_q), B * heads](
        q, k, v, kept[0], kept[1], q_scale, k_scale, rope, y,
        heads, q.stride(2), q.stride(1), q.stride(0), kept.stride(2), d**-0.5 * 1.442695,  # log2(e)
        HELD=held, NEW=n, d=d, BLOCK_Q=block_q, BLOCK_K=block_k,
    )  # fmt: skip
    return y.transpose(1, 2)
