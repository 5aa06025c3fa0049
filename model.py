"""The network: one diffusion transformer (DiT) for teacher and student; only attention differs.

A token covers 4 frames x p x p pixels of the mouth rectangle (see data.py), P = 12 p p values; L =
T / 4 latent frames of N tokens. (The paper's: 4 x 16 x 16 pixels.) The network predicts the clean
pixels x0, as arXiv 2511.13720 does. A token is the sum of three embeddings: its noisy patch; the
source there, the mouth hidden, with the patch half a square above it, for the pose; a *reference*,
the same person at another moment, in both places. Where the mask is 0 the output is the source.
"""

import dataclasses
import functools
import importlib.util
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import runtime
from data import AUDIO_AHEAD, AUDIO_BACK, MELS, mouth_mask, mouth_rectangle, to_pixels, to_tokens
from runtime import Fail, opt

SEEN, HEARD = 128, 128  # values that a patch of the conditions, and a frame's sound, come down to
MAX_LATENTS = 256  # of the RoPE table; a stream uses the first sink + window, however long it is


@dataclasses.dataclass
class Config:
    size: int = opt(64, "pixels, side of the model's square (paper: 512)")
    patch: int = opt(8, "pixels, side of a token's square")
    width: int = opt(256, "D")
    depth: int = opt(4, "blocks")
    heads: int = opt(4, "of attention")
    chunk: int = opt(3, "latent frames generated at a time (paper: 3)")
    sink: int = opt(1, "first latent frames, always attended to (paper: 1)", least=0)
    window: int = opt(6, "latest latent frames attended to, the chunk included (paper: 6)")
    student_steps: int = opt(2, "denoising calls a chunk (paper: 2)")
    landing: int = opt(40, "j of the student's last call, 0 noise, 50 clean (paper: 30)")


def grid(cfg):
    """Rows and columns of the tokens of a latent frame."""
    return cfg.size // 2 // cfg.patch, cfg.size * 3 // 4 // cfg.patch


def n_tokens(cfg):
    """N, tokens of a latent frame."""
    return math.prod(grid(cfg))


def visible(c, cfg):
    """The latent frames whose keys chunk c attends to, in order: the sink and the latest `window`,
    its own included. A key's RoPE position is its place in this list, so positions never grow. Why
    a window: memory and time stay the same however long the video. Why a sink: attention rests on
    the first frame that it has seen, and video models drift when that leaves the cache. (Here,
    where the source is shown all along, three minutes without one are as good.)"""
    end = (c + 1) * cfg.chunk
    return sorted({*range(min(cfg.sink, end)), *range(max(0, end - cfg.window), end)})


def rope_table(cfg, latents=MAX_LATENTS):
    """(latents, N, 2, head): cosines and sines as `rotate` takes them. Half of a head turns with
    the latent frame, a quarter each with row and column."""
    head, angles = cfg.width // cfg.heads, []
    places = torch.cartesian_prod(*(torch.arange(float(n)) for n in (latents, *grid(cfg))))
    for axis, pairs in enumerate((head // 4, head // 8, head // 8)):
        angles.append(places[:, axis, None] * 100.0 ** -(torch.arange(pairs) / pairs))
    angle = torch.cat(angles, -1).unflatten(0, (latents, -1))
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], 2)


def rotate(x, table):
    """RoPE: each pair (a, b) = (x[i], x[i + d/2]) -> (a cos - b sin, b cos + a sin).
    x (B, h, L N, d), table (L, N, 2, d)."""
    cos, sin = table.to(x.dtype).flatten(0, 1).unbind(1)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def dense(q, k, v):
    """softmax(q k^T / sqrt d) v, fused, except when training on a CPU: there the fused backward is
    two to four times slower than plain products."""
    if q.device.type == "cpu" and q.requires_grad and torch.is_grad_enabled():
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def attend_all(q, k, v, rope):
    """The teacher's: every latent frame sees every other. q, k, v (B, h, L N, d), before RoPE."""
    table = rope[: q.shape[2] // rope.shape[1]]
    return dense(rotate(q, table), rotate(k, table), v)


def attend_chunks(q, k, v, rope, cfg):
    """The student's in training, over a clip: a dense call a chunk, over the keys and positions of
    streaming. No mask could do that: a key's position differs from chunk to chunk."""
    N, outputs = rope.shape[1], []
    k, v = k.unflatten(2, (-1, N)), v.unflatten(2, (-1, N))
    for c, q_c in enumerate(q.split(cfg.chunk * N, 2)):
        frames = [f for f in visible(c, cfg) if f < k.shape[2]]
        table = rope[: len(frames)]
        q_c = rotate(q_c, table[-(q_c.shape[2] // N) :])
        k_c = rotate(k[:, :, frames].flatten(2, 3), table)
        outputs.append(dense(q_c, k_c, v[:, :, frames].flatten(2, 3)))
    return torch.cat(outputs, 2)


class Cache:
    """Keys (normed, before RoPE) and values of the latent frames that the chunk being made may look
    back at, per block. A pass over the finished chunk (t = 0) stores its own behind them; then
    `advance` drops what the next chunk does not see: after chunk 1 [0, 3, 4, 5] are left, after
    chunk 2 [0, 6, 7, 8]. Fixed memory, at a fixed address: what a CUDA graph needs."""

    def __init__(self, net, batch):
        cfg, weight = net.cfg, net.head.weight
        self.cfg, self.chunks, self.frames = cfg, 0, []  # chunks finished; latent frames held
        shape = cfg.depth, 2, batch, cfg.heads, cfg.sink + cfg.window, n_tokens(cfg)
        shape = *shape, cfg.width // cfg.heads
        self.kv = weight.new_zeros(shape, dtype=runtime.fast_dtype(weight.device))

    def store(self, k, v, layer):
        """Keep the finished chunk's keys and values (B, h, chunk N, d)."""
        kv, held = self.kv[layer].flatten(3, 4), len(self.frames) * self.kv.shape[5]
        kv[0, :, :, held : held + k.shape[2]] = k  # kv: 2 B h places d
        kv[1, :, :, held : held + k.shape[2]] = v

    def attend(self, q, k, v, rope, layer):
        """Attention of the chunk's q over what is held and its own k, v (B, h, chunk N, d)."""
        held, new = len(self.frames), k.shape[2] // rope.shape[1]
        past = self.kv[layer, :, :, :, :held].flatten(3, 4).to(k.dtype)
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        table = rope[: held + new]
        return dense(rotate(q, table[-new:]), rotate(k, table), v)

    def advance(self):
        """To be called when a chunk has been stored."""
        held = visible(self.chunks, self.cfg)
        self.chunks += 1
        self.frames = [f for f in visible(self.chunks, self.cfg) if f in held]
        for place, f in enumerate(self.frames):
            if held[place] != f:
                self.kv[:, :, :, :, place] = self.kv[:, :, :, :, held.index(f)]


def has_kernel(net):
    """Can kernels.py stream it? On NVIDIA's GPUs, where Triton comes with torch."""
    fits = net.cfg.width // net.cfg.heads in (32, 64, 128)
    return fits and net.head.weight.is_cuda and importlib.util.find_spec("triton") is not None


def qk_norm(x, scale):
    """ViT-22B's (arXiv 2302.05442), of queries and keys."""
    # To x's type: autocast on a GPU would leave it in float32.
    return F.layer_norm(x, x.shape[-1:], scale.to(x.dtype)).to(x.dtype)


def attention(q, k, v, q_scale, k_scale, rope, cfg, causal, cache, fused, layer, store):
    """QK-norm, RoPE and attention; q, k, v and what comes out (B, h, L N, d). With a cache the
    stream's, dense or (fused) by kernels.py; else a whole clip's, causal or not."""
    if store:
        cache.store(qk_norm(k, k_scale), v, layer)
        if layer == cfg.depth - 1:
            return None  # nobody reads what the last block makes of them
    if cache is not None and fused:
        from kernels import stream_attention  # needs Triton

        kept, held = cache.kv[layer].flatten(3, 4), len(cache.frames) * rope.shape[1]
        return stream_attention(q, k, v, kept, held, q_scale, k_scale, rope)
    q, k = qk_norm(q, q_scale), qk_norm(k, k_scale)
    if cache is not None:
        return cache.attend(q, k, v, rope, layer)
    return attend_chunks(q, k, v, rope, cfg) if causal else attend_all(q, k, v, rope)


class Cond(NamedTuple):
    """What is known of L latent frames, embedded once for any number of denoising calls."""

    known: torch.Tensor  # (B, L, N, P): the source with the mouth hidden
    tokens: torch.Tensor  # (B, L, N, D): it, what is above it, and the reference
    audio: torch.Tensor  # (B, L, depth, D)


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        D, self.heads = cfg.width, cfg.heads
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.q_scale = nn.Parameter(torch.ones(D // cfg.heads))
        self.k_scale = nn.Parameter(torch.ones(D // cfg.heads))
        # Added to the one that all blocks share (adaLN-single, arXiv 2310.00426): shift, scale and
        # gate, twice. Gates start half open; shut, as is usual, costs time a short run has not.
        self.modulation = nn.Parameter(torch.tensor([[0, 0, 0.5] * 2]).T.repeat(1, D))

    def forward(self, x, mod, audio, attend):
        """x (B, L, N, D); mod (B, L or 1, 6, D); audio (B, L, D); attend(q, k, v, q_scale,
        k_scale) -> (B, h, L N, d), as q, k and v -> x. None where attend is."""
        B, L, N, D = x.shape
        mod = (mod + self.modulation)[:, :, None]
        shift, scale, gate, shift2, scale2, gate2 = mod.unbind(3)  # each B L 1 D
        x = x + audio[:, :, None]
        y = torch.addcmul(shift, F.layer_norm(x, (D,)), scale)
        qkv = self.qkv(y).view(B, L * N, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each B h LN d
        y = attend(q, k, v, self.q_scale, self.k_scale)
        if y is None:
            return None
        x = torch.addcmul(x, gate, self.out(y.transpose(1, 2).reshape(B, L, N, D)))
        y = torch.addcmul(shift2, F.layer_norm(x, (D,)), scale2)
        return torch.addcmul(x, gate2, self.down(F.silu(self.up(y))))


def sound_tower(channels):
    """Log-mel (B, MELS, M) -> (B, channels, (M - 20) // 4 + 1): an output sees 20 mel frames, and
    the next one starts a video frame later. The DiT's starts from what the expert's has learned."""
    layers = []
    for inputs, kernel, stride in ((MELS, 5, 1), (channels, 4, 4), (channels, 4, 1)):
        layers += [nn.Conv1d(inputs, channels, kernel, stride), nn.SiLU()]
    return nn.Sequential(*layers)


class DiT(nn.Module):
    """x0 = net(x_t, t, net.embed(source, reference, heard))."""

    def __init__(self, cfg):
        super().__init__()
        D, p, P = cfg.width, cfg.patch, 12 * cfg.patch**2
        if cfg.size % (4 * p) or p % 4 or D % (8 * cfg.heads) or cfg.window < cfg.chunk:
            what = f"size {cfg.size} must be a multiple of 4 x patch {p}, patch of 4, width {D} of"
            raise Fail(f"{what} 8 x heads {cfg.heads}, and window at least chunk")
        self.cfg, self.stage = cfg, ""  # stage: what made the weights
        self.fused = False  # stream by kernels.py: needs a GPU, has no gradient
        self.from_noisy = nn.Linear(P, D)
        # Four kinds of patches share a bottleneck: saves two thirds of the input layers.
        self.see = nn.Linear(P, SEEN)
        self.from_source, self.from_reference = nn.Linear(2 * SEEN, D), nn.Linear(2 * SEEN, D)
        self.place = nn.Parameter(torch.randn(n_tokens(cfg), D) * 0.02)
        layers = nn.Linear(128, D), nn.SiLU(), nn.Linear(D, 128), nn.SiLU(), nn.Linear(128, 8 * D)
        self.time = nn.Sequential(*layers)
        self.hear = sound_tower(HEARD)
        self.hear_out = nn.Linear(HEARD * ((AUDIO_BACK + 16 + AUDIO_AHEAD - 20) // 4 + 1), D)
        self.null_audio = nn.Parameter(torch.zeros(D))  # heard when the sound is withheld
        self.audio_to_blocks = nn.Linear(D, cfg.depth * D)
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.depth)])
        # A token writes a square of 1.5 p x 1.5 p and neighbours overlap, so that no seam shows.
        self.margin = p // 4
        self.head = nn.Linear(D, 12 * (p + 2 * self.margin) ** 2)
        # The source's words show in the mask's soft edge, too (the jaw moves there). So the network
        # sees nothing of where the mask is above 0; sample.to_frames blends what it paints there.
        blend = mouth_rectangle(mouth_mask(cfg.size)[..., None])
        self.register_buffer("blend", blend, persistent=False)  # S/2, 3S/4, 1
        hidden = (blend > 0).float().expand(1, 4, -1, -1, 3)
        self.register_buffer("mask", to_tokens(hidden, p)[0, 0], persistent=False)  # N P
        self.register_buffer("rope", rope_table(cfg), persistent=False)
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv1d)):
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.time[-1].weight)
        nn.init.normal_(self.head.weight, std=0.2 / D**0.5)

    def cast(self, x):
        """x in the type of the weights (autocast takes anything)."""
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.head.weight.dtype)

    def embed(self, source, reference, heard, drop=None):
        """source, reference (B, T, S, 3S/4, 3) in [-1, 1], see data.middle; heard (B, back + 16 L
        + ahead, MELS), see data.hearing; drop (B,) bool: whose sound is withheld -> Cond."""
        parts = *source.chunk(2, 2), *reference.chunk(2, 2)
        above, known, *reference = (to_tokens(x, self.cfg.patch) for x in parts)
        known = known * (1 - self.mask).to(known.dtype)
        seen = [self.see(self.cast(x)) for x in (above, known, *reference)]
        tokens = self.from_source(torch.cat(seen[:2], -1)) + self.place
        tokens = tokens + self.from_reference(torch.cat(seen[2:], -1))
        y = self.hear(self.cast(heard).mT).unfold(2, self.hear_out.in_features // HEARD, 4)
        y = self.hear_out(y.transpose(1, 2).flatten(2))  # B L D
        if drop is not None:
            y = torch.where(drop.view(-1, 1, 1), self.null_audio.to(y.dtype), y)
        return Cond(known, tokens, self.to_blocks(y))

    def to_blocks(self, y):
        """Sound (B, L, D) -> what each block adds, (B, L, depth, D)."""
        return self.audio_to_blocks(y).unflatten(-1, (self.cfg.depth, -1))

    def without_audio(self, cond):
        """The Cond of the same pictures whose sound is withheld, for guidance."""
        null = self.to_blocks(self.null_audio.view(1, 1, -1))
        return cond._replace(audio=null.expand_as(cond.audio))

    def modulation(self, t):
        """t (B, L or 1) or a number, in 0..1 -> (B, L or 1, 8, D): shift, scale, gate twice, and
        the head's shift and scale."""
        if not torch.is_tensor(t):
            t = torch.full((1, 1), float(t), device=self.mask.device)
        speed = 1000 * 1e4 ** -(torch.arange(64, device=t.device) / 64)
        angle = t.float()[..., None] * speed
        mod = self.time(self.cast(torch.cat([angle.cos(), angle.sin()], -1)))
        mod = mod.to(self.head.weight.dtype).unflatten(-1, (8, -1))
        mod[:, :, 1::3] += 1  # scales
        return mod

    def forward(self, x_t, t, cond, causal=False, cache=None, store=False):
        """x_t (B, L, N, P) noisy tokens; t (B, L), (B, 1) or a number: their noise level, or its
        modulation, computed once for many calls -> x0 (B, L, N, P). Bidirectional; `causal` over a
        clip; with a `cache`, x_t is the stream's next chunk, and with `store` it is finished
        (t = 0): its keys are kept, nothing is returned."""
        mod = t if torch.is_tensor(t) and t.ndim == 4 else self.modulation(t)
        how = dict(rope=self.rope, cfg=self.cfg, causal=causal, cache=cache, fused=self.fused)
        x = self.from_noisy(self.cast(x_t)) + cond.tokens
        for layer, block in enumerate(self.blocks):
            attend = functools.partial(attention, layer=layer, store=store, **how)
            x = block(x, mod[:, :, :6], cond.audio[:, :, layer], attend)
        return None if store else self.to_x0(x, mod[:, :, 6:], cond.known)

    def to_x0(self, x, mod, known):
        """x (B, L, N, D) -> (B, L, N, P): squares added where they overlap, then what is known."""
        B, L, _, D = x.shape
        p, m = self.cfg.patch, self.margin
        shift, scale = mod[:, :, None].unbind(3)
        x = self.head(torch.addcmul(shift, F.layer_norm(x, (D,)), scale))
        height, width = (n * p for n in grid(self.cfg))
        size = height + 2 * m, width + 2 * m
        x = F.fold(x.flatten(0, 1).mT, size, p + 2 * m, stride=p)  # BL 12 height width
        x = x[:, :, m : m + height, m : m + width].reshape(B, 4 * L, 3, height, width)
        return known + self.mask.to(x.dtype) * to_tokens(x.permute(0, 1, 3, 4, 2), p)


def denoising_loss(net, x, y, weight, edges):
    """Mean of weight (x - y)^2 in the mask and, times `edges` (None: without), of the same for the
    differences between neighbouring pixels in time, y and x: lips, teeth and motion, which are few
    pixels, count for more, and the best guess is still E[x0 | x_t], since all is quadratic.
    x, y (B, L, N, P), equal outside the mask; weight (B, L or 1) -> a number."""
    error = (x - y) * weight.sqrt()[..., None, None]
    loss = (error.square() * net.mask).mean()
    if edges is not None:
        error = to_pixels(error, net.cfg.patch)  # B T height width 3
        for axis in (1, 2, 3):
            loss = loss + edges * error.diff(dim=axis).square().mean()
    return loss / net.mask.mean()


def network_of(cfg):
    """The network's part of a script's config -> Config."""
    return Config(**{field.name: getattr(cfg, field.name) for field in dataclasses.fields(Config)})


def save_dit(path, net, stage, **more):
    if runtime.rank() == 0:
        fields = dict(stage=stage, model_config=dataclasses.asdict(net.cfg), **more)
        runtime.save(path, net, kind="dit", **fields)


def load_dit(path, device="cpu", dtype=torch.float32, like=None):
    """A checkpoint -> DiT in evaluation mode. Fail: not of the shape of the config `like`."""
    state = runtime.load(path, "dit")
    there = state["model_config"]
    for key in ("size", "patch", "width", "depth", "heads") if like else ():
        if there[key] != (here := getattr(like, key)):
            what = f"{key} is {there[key]} there and {here} here"
            raise Fail(f"{path}: {what}; that config, or another --out")
    net = runtime.restore(path, lambda: DiT(Config(**there)), state["model"])
    net.stage = state["stage"]
    return net.to(device, dtype).eval().requires_grad_(False)
