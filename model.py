"""The network: one diffusion transformer (DiT) for teacher and student. Only their attention differs.

    python model.py                 # the sizes and their parameters

A token covers 4 frames x p x p pixels, P = 12 p p values; L = T/4 latent frames of N tokens. (The paper's, by a VAE of 4 x 8 x 8 and patches of
1 x 2 x 2: 4 x 16 x 16 pixels.) The network sees the pixels and predicts the clean video x0 (arXiv 2511.13720 shows that to work).

The mouth mask lies in the lower half of the square, so only that is cut into tokens, noised and denoised, less the columns of
patches that the mask does not touch (`data.inner`): x is (B, L, N, P). A token is the sum of three embeddings: its noisy
patch; the source there, the mouth hidden, and half a square above it (for the pose); a reference, the same person at another
moment, in both places. The output is composited with the source outside the mask, where the answer is known.
"""
import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import runtime
from data import MELS, Fail, columns, inner, patchify
from runtime import half, load, ranks, restore, save

SEEN, HEARD = 128, 128          # values that a patch of the conditions, and a video frame's sound, are reduced to
MAX_LATENTS = 256               # RoPE table; streaming uses the first window + sink of it, however long the video


@dataclasses.dataclass
class Config:
    size: int = 64              # pixels, the model's square (paper: 512)
    patch: int = 16             # pixels, a token's square
    width: int = 256            # D
    depth: int = 4              # blocks
    heads: int = 4              # h
    chunk: int = 3              # latent frames generated at a time (paper: 3)
    sink: int = 1               # first latent frames that are always attended to (paper: 1)
    window: int = 6             # latest latent frames attended to, the chunk included (paper: 6)
    audio_back: int = 16        # mel frames (10 ms) heard before a latent frame's own 16
    audio_ahead: int = 12       # and after: the look-ahead, 120 ms, part of the latency
    zero = ("seed", "sink", "audio_back", "audio_ahead", "band_first")      # options that may be 0, those of distill.Config included


SIZES = {
    "tiny": dict(size=32, patch=8, width=96, depth=4, heads=3),
    "small": dict(size=64, patch=8, width=256, depth=4, heads=4),
    "base": dict(size=128, patch=16, width=384, depth=12, heads=6),
}


def grid(cfg):
    """Rows and columns of the tokens of a latent frame: the patches of the square's lower half, less the columns that the mask does not touch."""
    n = cfg.size // cfg.patch
    return n // 2, len(range(n)[columns(n)])


def tokens(cfg):
    """N, tokens to a latent frame."""
    return math.prod(grid(cfg))


# ----------------------------------------------------------------------------------------------------------- attention
def visible(c, cfg):
    """The latent frames whose keys chunk c attends to, in order: the sink and the latest `window`, its own included. A
    key's RoPE position is its place in this list, so positions never grow. The only definition of the window."""
    end = (c + 1) * cfg.chunk
    return sorted({*range(min(cfg.sink, end)), *range(max(0, end - cfg.window), end)})


def runs(places):
    """Rising numbers -> [(first, end)] of each run of neighbours: the window is the sink and one run, hence two slices at the most."""
    found = []
    for p in places:
        if found and found[-1][1] == p:
            found[-1] = found[-1][0], p + 1
        else:
            found.append((p, p + 1))
    return found


def rope_table(cfg, latents=MAX_LATENTS):
    """(latents, N, 2, head) cosines and sines as `rotate` takes them; half of a head turns with the latent frame, a quarter each with row and column."""
    (rows, across), head = grid(cfg), cfg.width // cfg.heads
    turns = lambda positions, pairs: positions[:, None] * 100. ** -(torch.arange(pairs) / pairs)      # noqa: E731
    time, (down, right) = turns(torch.arange(float(latents)), head // 4), (turns(torch.arange(float(n)), head // 8) for n in (rows, across))
    shape = latents, rows, across, -1
    angle = torch.cat([time[:, None, None].expand(shape), down[:, None].expand(shape), right.expand(shape)], -1).flatten(1, 2)
    return torch.stack([torch.cat([angle.cos(), angle.cos()], -1), torch.cat([-angle.sin(), angle.sin()], -1)], 2)


def rotate(x, table):
    """RoPE: each pair (a, b) = (x[i], x[i + d/2]) -> (a cos - b sin, b cos + a sin). x (B, h, S, d), table (S/N latent frames, N, 2, d)."""
    cos, sin = table.to(x.dtype).flatten(0, 1).unbind(1)                                      # each (S, d)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def dense(q, k, v):
    """softmax(q k^T / sqrt d) v, by the fused kernel, except when training on a CPU: at these lengths its backward is two to four
    times slower there than plain products (63 ms against 30 forward and back, 16 x 4 heads x 384 tokens)."""
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        return ((q * q.shape[-1] ** -.5) @ k.transpose(-1, -2)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def attend_all(q, k, v, rope, cfg):
    """Bidirectional: every latent frame sees every other. q, k, v (B, h, L N, d), before RoPE."""
    table = rope[: q.shape[2] // rope.shape[1]]
    return dense(rotate(q, table), rotate(k, table), v)


def attend_chunks(q, k, v, rope, cfg):
    """Causal over a whole clip: one dense call a chunk over exactly the keys, at exactly the positions, of streaming. No
    mask, so that the fused kernels apply. A last chunk may be short."""
    N, outputs = rope.shape[1], []
    for c, q_c in enumerate(q.split(cfg.chunk * N, 2)):
        frames = [f for f in visible(c, cfg) if f * N < q.shape[2]]
        new, table = q_c.shape[2] // N, rope[: len(frames)]
        take = lambda x: torch.cat([x[:, :, a * N:b * N] for a, b in runs(frames)], 2)      # noqa: E731
        outputs.append(dense(rotate(q_c, table[-new:]), rotate(take(k), table), take(v)))
    return torch.cat(outputs, 2)


class Cache:
    """Keys (before RoPE) and values of what the next chunk sees of the past, per block. Fixed memory: sink + window - chunk latent
    frames, however long the video. A pass at t = 0 stores a finished chunk; the chunk after it may come along in
    the same pass, and sees what was just stored. (Or the last denoising pass stores its own.) Other passes only read.

    With a sink of 1 and a window of 6, chunk 2 (latent frames 6-8) finds [0, 3, 4, 5] here; once it is stored, of those and its own, places
    0 and 4-6 are kept: [0, 6, 7, 8], for chunk 3.

    A pass reads `past` and `runs` of this object. Once the window is `full` they stay as they are, so that every chunk runs the same
    compiled graph, or CUDA graph, at the same addresses."""

    def __init__(self, model, batch, dtype=None):
        cfg, parameter = model.cfg, model.head.weight
        n = tokens(cfg)
        shape = (cfg.depth, 2, batch, cfg.heads, (cfg.sink + cfg.window - cfg.chunk) * n, cfg.width // cfg.heads)
        self.cfg, self.kv = cfg, torch.zeros(shape, dtype=dtype or parameter.dtype, device=parameter.device)
        if parameter.is_cuda:
            torch._dynamo.mark_static_address(self.kv)           # or a CUDA graph would not write into it
        self.chunks, self.frames = -1, []        # chunks stored; the latent frames held, in order
        self.advance()

    def attend(self, i, q, k, v, rope, store):
        """Block i's attention over the cached and the new keys; with `store` (see DiT.forward), keep what the chunk after the first new one sees of both."""
        N, past = rope.shape[1], self.past
        size, outputs = self.cfg.chunk * N, []
        for c, (q_c, k_c, v_c) in enumerate(zip(q.split(size, 2), k.split(size, 2), v.split(size, 2))):
            k_c = torch.cat([self.kv[i, 0, :, :, :past * N].to(k.dtype), k_c], 2)
            v_c = torch.cat([self.kv[i, 1, :, :, :past * N].to(v.dtype), v_c], 2)
            table = self.table(rope, k_c.shape[2] // N, c)
            if store != "finished" or c or i < self.cfg.depth - 1:       # nobody reads what the last block makes of a finished chunk
                outputs.append(dense(rotate(q_c, table[-(q_c.shape[2] // N):]), rotate(k_c, table), v_c))
            if store and c == 0:
                past = 0
                for a, b in self.runs:           # places in the keys just attended to
                    self.kv[i, 0, :, :, past * N:(past + b - a) * N] = k_c[:, :, a * N:b * N].detach()
                    self.kv[i, 1, :, :, past * N:(past + b - a) * N] = v_c[:, :, a * N:b * N].detach()
                    past += b - a
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs or [q[:, :, :0]], 2)

    def table(self, rope, n, c):
        """RoPE of the n latent frames that this pass's c-th chunk attends to: their places in the window. (`bench.py long` tries others.)"""
        return rope[:n]

    def advance(self):
        """To be called after each pass that stores, outside of what is compiled (`torch.compiler.disable` would keep it out, and makes every command start
        two seconds later). past: how many latent frames are held; runs: once the next chunk is stored, these places (first, end) of [the held frames, that
        chunk's] are kept."""
        cfg, self.chunks = self.cfg, self.chunks + 1
        seen = lambda c: [f for f in visible(c, cfg) if f < c * cfg.chunk]   # noqa: E731  of the past, by chunk c
        self.frames = seen(self.chunks)
        held = self.frames + list(range(self.chunks * cfg.chunk, (self.chunks + 1) * cfg.chunk))
        self.full = self.chunks * cfg.chunk >= cfg.sink + cfg.window     # from now on every chunk is like the last one
        self.past, self.runs = len(self.frames), runs(held.index(f) for f in seen(self.chunks + 1))


# ------------------------------------------------------------------------------------------------------------- the DiT
class Cond(NamedTuple):
    """What the source gives: known (B, L, N, P), the source with the mouth hidden; tokens (B, L, N, D), it and the reference embedded."""
    known: torch.Tensor
    tokens: torch.Tensor


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        D = cfg.width
        self.cfg = cfg
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.q_scale, self.k_scale = nn.Parameter(torch.ones(D // cfg.heads)), nn.Parameter(torch.ones(D // cfg.heads))
        # Added to the shared one (adaLN-single, arXiv 2310.00426): shift, scale, gate, twice. Gates start half open; shut, as is
        # usual, costs time that a run of minutes does not have.
        self.modulation = nn.Parameter(torch.tensor([0., 0., .5, 0., 0., .5])[:, None].repeat(1, D))

    def forward(self, x, mod, audio, attend):
        """x (B, L, N, D); mod (B, L or 1, 6, D); audio (B, L, D); attend(q, k, v), each (B, h, L N, d) -> the same for all latent
        frames, or for the last ones alone if no others are wanted; x is then cut to match -> x."""
        B, L, N, D = x.shape
        h = self.cfg.heads
        shift, scale, gate, shift2, scale2, gate2 = (mod + self.modulation)[:, :, None].unbind(3)  # each B L 1 D
        x = x + audio[:, :, None]
        y = torch.addcmul(shift, F.layer_norm(x, (D,)), scale)
        q, k, v = self.qkv(y).view(B, L * N, 3, h, D // h).permute(2, 0, 3, 1, 4)                  # each B h LN d
        norm = lambda z, g: F.layer_norm(z, (D // h,), g.to(z.dtype)).to(z.dtype)    # noqa: E731  QK-norm as in ViT-22B, arXiv 2302.05442 (float32 in CUDA's autocast)
        y = attend(norm(q, self.q_scale), norm(k, self.k_scale), v)
        left_out = L - y.shape[2] // N           # latent frames of a finished chunk, of which the last block made no more than keys and values
        if left_out:
            cut = lambda z: z[:, left_out:] if z.shape[1] > 1 else z             # noqa: E731  one modulation for all frames stays
            x, gate, shift2, scale2, gate2 = map(cut, (x, gate, shift2, scale2, gate2))
        x = torch.addcmul(x, gate, self.out(y.transpose(1, 2).reshape(x.shape)))
        y = torch.addcmul(shift2, F.layer_norm(x, (D,)), scale2)
        return torch.addcmul(x, gate2, self.down(F.silu(self.up(y))))


class OverlapAdd(torch.autograd.Function):
    """Squares of p + 2 m pixels on a grid of p -> one picture, added where they overlap: F.fold, by slices and in bf16. A square
    comes as its own p x p pixels, then the eight strips that it writes into its neighbours. (B, rows, columns, 12 (p + 2 m)^2)
    -> (B, rows, columns, 4, p, p, 3). Own backward, since autograd would copy the whole picture once a strip."""

    @staticmethod
    def strips(p, m):
        """For each of eight neighbours: (their slice, our slice) of the grid, the pixels written there, and where the strip is stored."""
        whole, end, start = slice(None), slice(None, -1), slice(1, None)
        grid = {-1: (end, start), 0: (whole, whole), 1: (start, end)}
        pixels = {-1: slice(p - m, p), 0: whole, 1: slice(0, m)}
        a = 12 * p * p
        for dy, dx in [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]:
            shape = 4, m if dy else p, m if dx else p, 3
            b = a + 12 * shape[1] * shape[2]
            yield (whole, grid[dy][0], grid[dx][0], whole, pixels[dy], pixels[dx]), (whole, grid[dy][1], grid[dx][1], slice(a, b)), shape
            a = b

    @staticmethod
    def forward(ctx, x, p, m):
        ctx.p, ctx.m = p, m
        out = x[..., : 12 * p * p].clone().unflatten(-1, (4, p, p, 3))
        for there, here, shape in OverlapAdd.strips(p, m):
            out[there].add_(x[here].unflatten(-1, shape))        # += would slice twice, and there are many small ones
        return out

    @staticmethod
    def backward(ctx, grad):
        p, m = ctx.p, ctx.m
        out = grad.new_empty(*grad.shape[:3], 12 * (p + 2 * m) ** 2)
        out[..., : 12 * p * p] = grad.flatten(3)
        out[..., 12 * p * p:] = 0                                # at the rim there is no neighbour
        for there, here, _ in OverlapAdd.strips(p, m):
            out[here] = grad[there].flatten(3)
        return out, None, None


def sound_tower(channels):
    """Log-mel (B, MELS, M) -> (B, channels, (M - 20) // 4 + 1): each output sees 20 mel frames, and the next one starts 4 later, a video frame.
    The lip-sync expert and the DiT hear through the same one, so that the second can start from what the first has learned."""
    return nn.Sequential(nn.Conv1d(MELS, channels, 5), nn.SiLU(), nn.Conv1d(channels, channels, 4, 4), nn.SiLU(),
                         nn.Conv1d(channels, channels, 4), nn.SiLU())


class DiT(nn.Module):
    """x0 = DiT(x_t, t, cond, audio). Condition and audio are embedded once (`embed_cond`, `embed_audio`) for any number of steps."""

    def __init__(self, cfg):
        super().__init__()
        D, p = cfg.width, cfg.patch
        if cfg.size % (2 * p) or p % 4 or D % cfg.heads or (D // cfg.heads) % 8 or cfg.window < cfg.chunk or cfg.audio_back + cfg.audio_ahead < 4:
            raise Fail(f"model: size {cfg.size} must be a multiple of twice patch {p}, patch of 4, width {D} of 8 x heads {cfg.heads}; window at least chunk; "
                       "audio_back + audio_ahead at least 4")
        self.cfg, self.grid, self.m = cfg, grid(cfg), p // 4
        self.times, self.cache_from, self.stage = None, "clean", ""      # a student's, see distill.Config.times and cache; what made it
        # Conditions go through a bottleneck that all of their patches share: two thirds of the input layers' parameters saved.
        self.from_noisy, self.see = nn.Linear(12 * p * p, D), nn.Linear(12 * p * p, SEEN)
        self.from_source, self.from_reference = nn.Linear(2 * SEEN, D), nn.Linear(2 * SEEN, D)
        self.place = nn.Parameter(torch.randn(tokens(cfg), D) * .02)
        self.time = nn.Sequential(nn.Linear(128, D), nn.SiLU(), nn.Linear(D, 128), nn.SiLU(), nn.Linear(128, 8 * D))
        self.hear = sound_tower(HEARD)
        self.hear_out = nn.Linear(HEARD * ((cfg.audio_back + 16 + cfg.audio_ahead - 20) // 4 + 1), D)
        self.null_audio = nn.Parameter(torch.zeros(D))           # what the network hears when it is told nothing
        self.audio_to_blocks = nn.Linear(D, cfg.depth * D)
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.depth)])
        # Each token writes a square of 1.5 p and neighbours overlap, so that no seam shows (F.fold, folded into OverlapAdd).
        self.head = nn.Linear(D, 12 * (p + 2 * self.m) ** 2)
        mask = data.mouth_mask(cfg.size)[None, None, :, :, None].expand(1, 4, -1, -1, 3)
        for name, value in dict(rope=rope_table(cfg), mask=inner(patchify(mask, p))[0, 0, :, 12 * p * p:]).items():
            self.register_buffer(name, value, persistent=False)
        self.apply(lambda m: nn.init.zeros_(m.bias) if isinstance(m, (nn.Linear, nn.Conv1d)) else None)
        nn.init.zeros_(self.time[-1].weight)
        nn.init.normal_(self.head.weight, std=.2 / D ** .5)

    def embed_cond(self, source, reference):
        """source, reference (B, L, G, 2 P) in [-1, 1], see patchify; what the source shows under the mask is not read (in its soft rim: as much as shows)."""
        P, dtype, source, reference = self.mask.shape[1], self.dtype(source), inner(source), inner(reference)
        known = source[..., P:] * (1 - self.mask).to(source.dtype)
        see = lambda above, own: torch.cat([self.see(above.to(dtype)), self.see(own.to(dtype))], -1)         # noqa: E731
        source, reference = see(source[..., :P], known), see(reference[..., :P], reference[..., P:])
        return Cond(known, self.from_source(source) + self.from_reference(reference) + self.place)

    def dtype(self, x):
        """What the first layer of x wants: its weights' type, or (autocast) x as it is."""
        return x.dtype if torch.is_autocast_enabled(x.device.type) else self.head.weight.dtype

    def modulation(self, t):
        """t (B, L or 1) in 0..1 or a float -> (B, L or 1, 8, D): all that depends on time alone, for as many passes as share it."""
        t = t.float() if torch.is_tensor(t) else torch.full((1, 1), t, device=self.mask.device)
        freq = 1000 * t[..., None] * torch.exp(-torch.arange(64, device=t.device) / 64 * 9.21)        # down to a 10,000th
        dtype = self.head.weight.dtype
        mod = self.time(torch.cat([freq.cos(), freq.sin()], -1).to(dtype)).to(dtype).unflatten(-1, (8, -1))
        mod[:, :, 1::3] += 1                                     # the scales, the head's included (in autocast's bf16 it would round them)
        return mod

    def embed_audio(self, heard, drop=None):
        """heard (B, back + 16 L + ahead, MELS), see data.hearing -> (B, L, depth, D); drop (B,) bool: told nothing (guidance's null)."""
        y = self.hear(heard.transpose(1, 2).to(self.dtype(heard)))                                    # B HEARD 4L+3
        y = self.hear_out(y.unfold(2, self.hear_out.in_features // HEARD, 4).transpose(1, 2).flatten(2))
        if drop is not None:
            y = torch.where(drop.view(-1, 1, 1), self.null_audio.to(y.dtype), y)
        return self.audio_to_blocks(y).unflatten(-1, (self.cfg.depth, -1))

    def forward(self, x_t, t, cond, audio, causal=False, cache=None, store=""):
        """x_t (B, L, N, P): noisy patches; t (B, L), (B, 1) or a float in 0..1: their noise level, or its `modulation` -> x0 (B, L, N, P).

        Bidirectional; causal over the whole clip with `causal`; with a `cache`, x_t is the next chunk. `store` says what the cache is to keep: "", nothing;
        "finished": x_t begins with a finished chunk (at inference clean, t = 0), which is kept, and only the x0 of the chunk behind it is returned, or None
        if there is none; "passing": the chunk that is being denoised, as it came in. After either, call `cache.advance()`."""
        B, L, N, _ = x_t.shape
        if L > MAX_LATENTS and not causal:
            raise Fail(f"{L} latent frames at once, at most {MAX_LATENTS}; stream it, or cut it into windows")
        mod = t if torch.is_tensor(t) and t.ndim == 4 else self.modulation(t)                      # B L|1 8 D
        x = self.from_noisy(x_t.to(self.dtype(x_t))) + cond.tokens.to(self.dtype(cond.tokens))
        audio = audio.to(self.dtype(audio))
        for i, block in enumerate(self.blocks):
            if cache is not None:
                attend = lambda q, k, v, i=i: cache.attend(i, q, k, v, self.rope, store)          # noqa: E731
            else:
                attend = lambda q, k, v: (attend_chunks if causal else attend_all)(q, k, v, self.rope, self.cfg)  # noqa: E731
            x = block(x, mod[..., :6, :], audio[:, :, i], attend)
        wanted = x.shape[1]                      # latent frames whose x0 is asked for
        return self.to_pixels(x, mod[:, -wanted:, 6:], cond.known[:, -wanted:]) if wanted else None

    def to_pixels(self, x, mod, known):
        """Tokens (B, L, N, D), shift and scale (B, L or 1, 2, D) -> x0 (B, L, N, P), composited with what is known."""
        B, L, N, D = x.shape
        shift, scale = mod[:, :, None].unbind(3)
        x = self.head(torch.addcmul(shift, F.layer_norm(x, (D,)), scale))
        x = OverlapAdd.apply(x.view(B * L, *self.grid, -1), self.cfg.patch, self.m)
        return known + self.mask.to(x.dtype) * x.view(B, L, N, -1)


# -------------------------------------------------------------------------------------------------- the denoising loss
class DenoisingLoss(torch.autograd.Function):
    """Mean of weight (x - y)^2 over the masked pixels and, times `edges`, of the same for the differences between neighbouring pixels, in x, in y and in
    time: quadratic in x - y, so that the best guess is E[x0 | x_t] still, but lips, teeth and what moves count for more than large smooth areas,
    and steps between tokens are seen. Outside the mask x = y. In bf16, where that is fast, and with its gradient made on the way: 20 ms where autograd
    needs 35."""

    @staticmethod
    def forward(ctx, x, y, weight, edges, model):
        """x, y (B, L, N, P); weight (B, L or 1) -> a number."""
        (B, L, _, _), p, (rows, across), area = x.shape, model.cfg.patch, model.grid, model.mask.mean()
        root = weight[..., None, None].sqrt().to(runtime.fast_dtype(x.device))
        e = (x - y).to(root.dtype) * root
        gradient = e * model.mask.to(e.dtype)
        total = lambda z: z.sum(-1).sum(dtype=torch.float32)     # noqa: E731  over rows in bf16: three times as fast, 1e-4 off
        loss = total(gradient * e) / (e.numel() * area)
        gradient *= 2 / (e.numel() * area)
        if edges:
            v = e.reshape(B, L, rows, across, 4, p, p, 3).permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(B, 4 * L, rows * p, across * p * 3)
            pull = torch.zeros_like(v)                           # each difference pulls at both of its ends
            whole, but_first, but_last = slice(None), slice(1, None), slice(None, -1)
            for later, sooner in (((whole, but_first), (whole, but_last)), ((whole, whole, but_first), (whole, whole, but_last)),
                                  ((..., slice(3, None)), (..., slice(None, -3)))):                       # in time, in y, in x
                d = v[later] - v[sooner]
                share = edges / (d.numel() * area)
                loss += share * total(d * d)
                d *= 2 * share
                pull[later] += d
                pull[sooner] -= d
            gradient += pull.view(B, L, 4, rows, p, across, p, 3).permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(x.shape)
        ctx.save_for_backward(gradient, root)
        ctx.dtype = x.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        gradient, root = ctx.saved_tensors
        return ((grad * root).to(root.dtype) * gradient).to(ctx.dtype), None, None, None, None


# --------------------------------------------------------------------------------------------------------- checkpoints
def load_dit(path, device="cpu", dtype=torch.float32):
    """-> DiT in evaluation mode, from a teacher or student checkpoint. With runtime.fast_dtype its weights are cast once, not once a pass."""
    state = load(path, "dit")
    model = restore(path, lambda: DiT(Config(**state["model_config"])), state["model"])
    model.stage = state.get("stage", "")
    model.times, model.cache_from = tuple(state.get("times", ())) or None, state.get("cache_from", "clean")
    return model.to(device, dtype).eval()


def model_fields(cfg):
    """The network's part of a script's config."""
    return {f.name: getattr(cfg, f.name) for f in dataclasses.fields(Config)}


def save_dit(path, net, cfg, stage, step):
    if not ranks()[0]:
        save(path, kind="dit", stage=stage, step=step, model_config=model_fields(cfg), made_with=dataclasses.asdict(cfg), times=list(cfg.times),
             cache_from=net.cache_from, model=half(net))


def main(argv):
    if argv:
        print(__doc__)
        return
    print(f"{'':8}{'parameters':>12}{'tokens/latent':>15}")
    for name, cfg in ((name, Config(**size)) for name, size in SIZES.items()):
        count = sum(p.numel() for p in DiT(cfg).parameters())
        print(f"{name:8}{count / 1e6:>11.1f}M{tokens(cfg):>15}")


if __name__ == "__main__":
    data.run(main)
