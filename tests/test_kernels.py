"""kernels.py without a GPU: run by Triton's interpreter, compiled ahead of time for two GPUs."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
pytest.importorskip("triton", reason="Triton runs on Linux")

import triton.language as tl
from triton.runtime import interpreter

import model
import stream
from faces import render_clip
from kernels import stream_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def error(cfg, held, batch, dtype):
    """Relative error against PyTorch's attention in float64; what is not held is NaN."""
    d, N = cfg.width // cfg.heads, model.n_tokens(cfg)
    n = cfg.chunk * N
    make = dict(dtype=dtype, device=DEVICE)
    q, k, v = torch.randn(batch, n, 3, cfg.heads, d, **make).permute(2, 0, 3, 1, 4)
    kept = torch.randn(2, batch, cfg.heads, (cfg.sink + cfg.window) * N, d, **make)
    kept[:, :, :, held * N :] = torch.nan
    scales = 1 + 0.2 * torch.randn(2, d, device=DEVICE)
    rope = model.rope_table(cfg, 16).to(DEVICE)
    y = stream_attention(q, k, v, kept, held * N, *scales, rope)
    q, k, v, kept, scales, rope = (x.double() for x in (q, k, v, kept, scales, rope))
    q, k = F.layer_norm(q, (d,), scales[0]), F.layer_norm(k, (d,), scales[1])
    k = torch.cat([kept[0, :, :, : held * N], k], 2)
    v = torch.cat([kept[1, :, :, : held * N], v], 2)
    q = model.apply_rope(q, rope[held : held + cfg.chunk])
    exact = F.scaled_dot_product_attention(q, model.apply_rope(k, rope[: held + cfg.chunk]), v)
    return ((y - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("seed", range(30))
@torch.no_grad()
def test_any_shape_is_right(seed):
    pick = random.Random(seed)
    d, heads, chunk, window = (pick.choice(x) for x in ((32, 64, 128), (1, 3), (1, 3), (3, 5)))
    size, sink = pick.choice((32, 48, 64)), pick.choice((0, 1, 2))
    cfg = model.Config(size, 8, d * heads, 1, heads, chunk, sink, window)
    for held in {0, pick.randint(0, sink + window - chunk), sink + window - chunk}:
        assert error(cfg, held, pick.choice((1, 2)), torch.float32) < 1e-5


@pytest.fixture
def mended(monkeypatch):
    """Triton's interpreter holds bfloat16 as 16 bits: it cannot multiply them, and rounds by
    cutting off. Give it widened ones, and round before it cuts."""
    convert = interpreter._convert_float

    def wide(x):
        if x.dtype.scalar != tl.bfloat16:
            return x.data
        return (x.data.astype(np.uint32) << 16).view(np.float32)

    def dot(self, a, b, out, *_):
        product = np.matmul(wide(a), wide(b), dtype=np.float32)
        return interpreter.TensorHandle(product + out.data, out.dtype.scalar)

    def rounded(x, source, target, mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = x.view(np.uint32)
            x = (bits + 0x7FFF + (bits >> 16 & 1)).view(np.float32)
        return convert(x, source, target, mode)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.mark.parametrize("dtype, most", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@torch.no_grad()
def test_half_precision(dtype, most, mended):
    for d in (32, 64, 128):
        assert error(model.Config(32, 8, d, 1, 1), 4, 2, dtype) < most


def test_a_stream_through_it_is_the_dense_one(tiny, float32):
    """Eight chunks: every fill of the window, and three turns of it."""
    net, clip = tiny.to(DEVICE), render_clip(11, 96, 32)
    dense, fused = (stream.Streamer(net, seed=4, fused=fused) for fused in (False, True))
    for c, (pixels, _) in enumerate(stream.video_chunks(clip.video, net.cfg)):
        for streamer in (dense, fused):
            streamer.step(pixels, stream.chunk_mel(clip.audio, c, net.cfg))
        torch.testing.assert_close(dense.x0, fused.x0, atol=1e-5, rtol=0)


AHEAD_OF_TIME = """
import json, sys, kernels, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

names, made = kernels.kernel.arg_names, []
numbers = dict.fromkeys(("heads", "per_row", "per_head", "per_batch", "kept_per_head"), "i32")
numbers["factor"] = "fp32"
for arch, dtype, d, n in json.loads(sys.argv[1]):
    block_q, block_k = kernels.blocks(dtype == "fp32", d, n)
    fixed = dict(HELD=4 * n // 3, NEW=n, d=d, BLOCK_Q=block_q, BLOCK_K=block_k)
    types = {x: "constexpr" if x in fixed else numbers.get(x, "*" + dtype) for x in names}
    values = {(names.index(x),): value for x, value in fixed.items()}
    odd = {"heads", "factor", *fixed}
    even = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(names) if x not in odd}
    source = ASTSource(kernels.kernel, types, values, even)
    made.append(triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"])
print(json.dumps(made))
"""


def test_it_compiles_for_gpus_without_spills(tmp_path):
    import triton

    cases = (90, "bf16", 64, 288), (80, "bf16", 128, 1152), (80, "fp32", 128, 1152)
    where = dict(os.environ, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    command = [sys.executable, "-c", AHEAD_OF_TIME, json.dumps(cases)]
    root = Path(__file__).parents[1]
    made = json.loads(subprocess.check_output(command, cwd=root, env=where, text=True))
    ptxas = max(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*"))  # the newest
    for (arch, dtype, *_), ptx in zip(cases, made):
        path = tmp_path / "kernel.ptx"
        path.write_text(ptx)
        chip = f"--gpu-name=sm_{arch}{'a' if arch == 90 else ''}"
        command = [ptxas, "-v", chip, path, "-o", path.with_suffix(".cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        print(arch, dtype, report.splitlines()[-2])  # registers
        assert " 0 bytes spill stores, 0 bytes spill loads" in report, report
        assert dtype == "fp32" or "mma.sync" in ptx or "wgmma.mma" in ptx
