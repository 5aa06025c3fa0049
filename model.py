"""The network: one diffusion transformer (DiT) for teacher and student; only attention differs.

A token covers 4 frames x p x p pixels of the mouth rectangle (see data.py), P = 12 p p values; L =
T / 4 latent frames of N tokens. (The paper's: 4 x 16 x 16 pixels.) The network predicts the clean
pixels x0, as arXiv 2511.13720 does. A token is the sum of three embeddings: its noisy patch; the
source there, the mouth hidden, with the patch half a picture above it, for the pose; a *reference*,
the same person at another moment, in both places. Where the mask is 0 the output is the source.
"""

import dataclasses
import importlib.util
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import (
    AUDIO_AHEAD,
    AUDIO_BACK,
    MELS,
    mouth_mask,
    mouth_rectangle,
    to_tokens,
)
from runtime import fast_dtype

PATCH_FEATURES = 128  # values that a patch of the conditions comes down to
AUDIO_FEATURES = 128  # values of the sound of a video frame
MAX_LATENTS = 256  # of the RoPE table, unless sink + window, which a stream needs, are more


@dataclasses.dataclass
class Config:
    size: int = 32  # side of the square picture in pixels (paper: 512)
    patch: int = 8  # side of a token's square in pixels; less: finer and slower
    width: int = 96  # D, the number of values that a token carries
    depth: int = 4  # number of transformer blocks
    heads: int = 3  # number of attention heads
    chunk: int = 3  # latent frames that are generated at a time; more: later (paper: 3)
    sink: int = 1  # first latent frames of a video, attended to for ever (paper: 1)
    window: int = 6  # latest latent frames attended to, with the chunk's own (paper: 6)
    num_steps: int = 2  # denoising steps of the student for a chunk (paper: 2)
    landing: int = 40  # step j, of 50, at which the student's last step begins (paper: 30)


def grid(cfg):
    """Rows and columns of the tokens of a latent frame."""
    return cfg.size // 2 // cfg.patch, cfg.size * 3 // 4 // cfg.patch


def n_tokens(cfg):
    """N, tokens of a latent frame."""
    return math.prod(grid(cfg))


def attention_window(c, cfg):
    """The latent frames whose keys chunk c attends to, in order: the sink and the latest `window`,
    the chunk's own included. A key's RoPE position is its place in this list, so positions never
    grow. With a window, memory and time stay the same however long the video is. The sink is there
    because attention rests on the first frame that it has seen, and video models drift when that
    leaves the cache. (Here, where the source is shown all along, it is hardly needed.)"""
    end = (c + 1) * cfg.chunk
    sink = range(min(cfg.sink, end))
    latest = range(max(0, end - cfg.window), end)
    return sorted({*sink, *latest})


def rope_table(cfg, latents):
    """(latents, N, 2, d): cosines and sines as `apply_rope` takes them. Half of a head's d values
    turn with the latent frame, a quarter each with row and column."""
    d = cfg.width // cfg.heads
    rows, columns = grid(cfg)
    axes = [torch.arange(float(n)) for n in (latents, rows, columns)]
    positions = torch.cartesian_prod(*axes)
    angles = []
    for axis, pairs in enumerate((d // 4, d // 8, d // 8)):
        frequencies = 100.0 ** -(torch.arange(pairs) / pairs)
        angles.append(positions[:, axis, None] * frequencies)
    angle = torch.cat(angles, -1).unflatten(0, (latents, -1))
    cos = angle.cos()
    sin = angle.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], 2)


def apply_rope(x, table):
    """RoPE: each pair (a, b) = (x[i], x[i + d/2]) -> (a cos - b sin, b cos + a sin).
    x (B, h, L N, d), table (L, N, 2, d)."""
    cos, sin = table.to(x.dtype).flatten(0, 1).unbind(1)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def sdpa(q, k, v):
    """softmax(q k^T / sqrt d) v, fused, except when training on a CPU: there the fused backward is
    two to four times slower than plain products."""
    if q.device.type == "cpu" and q.requires_grad and torch.is_grad_enabled():
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def attend_all(q, k, v, rope):
    """The teacher's: every latent frame sees every other. q, k, v (B, h, L N, d), before RoPE."""
    table = rope[: q.shape[2] // rope.shape[1]]
    return sdpa(apply_rope(q, table), apply_rope(k, table), v)


def attend_chunks(q, k, v, rope, cfg):
    """The student's in training, over a clip: a dense call a chunk, over the keys and positions of
    streaming. No mask could do that: a key's position differs from chunk to chunk. (What it attends
    to agrees with a stream's to 1e-5. What is there differs: the chunks before are as noisy as the
    training made them, a stream's are finished.)"""
    N = rope.shape[1]
    k = k.unflatten(2, (-1, N))  # B h L N d
    v = v.unflatten(2, (-1, N))
    outputs = []
    for c, q_chunk in enumerate(q.split(cfg.chunk * N, 2)):
        frames = [frame for frame in attention_window(c, cfg) if frame < k.shape[2]]
        table = rope[: len(frames)]
        new = q_chunk.shape[2] // N  # the chunk's own latent frames are the last ones
        q_chunk = apply_rope(q_chunk, table[-new:])
        k_window = apply_rope(k[:, :, frames].flatten(2, 3), table)
        outputs.append(sdpa(q_chunk, k_window, v[:, :, frames].flatten(2, 3)))
    return torch.cat(outputs, 2)


class KVCache:
    """Keys (normed, before RoPE) and values of the latent frames that the chunk being made may look
    back at. RoPE is applied when they are read: a frame's place in the window, by which its keys
    are turned, changes from chunk to chunk. The tensor never grows and stays at one address, which
    is what a CUDA graph needs:

        kv (depth, 2, B, h, sink + window, N, d): for each block, keys and values

    The first len(frames) of the sink + window places are filled. When a chunk is finished, a pass
    over it at t = 0 stores its keys and values behind those (`update`, in every block); `evict`
    then drops what the next chunk does not see:

        chunk   held while it is made   stored after it   kept for the next one
          0                                 0 1 2             0 1 2
          1          0 1 2                  3 4 5             0 3 4 5
          2          0 3 4 5                6 7 8             0 6 7 8
          3          0 6 7 8                9 10 11           0 9 10 11

    From chunk 2 on, the same places are read and written each time, as a CUDA graph does."""

    def __init__(self, net, batch, fused=False):
        """fused: read it by kernels.py, see has_kernel; that has no gradient."""
        cfg = net.cfg
        weight = net.final_layer.weight
        places = cfg.sink + cfg.window
        shape = (cfg.depth, 2, batch, cfg.heads, places, n_tokens(cfg), cfg.width // cfg.heads)
        self.kv = weight.new_zeros(shape, dtype=fast_dtype(weight.device))
        self.cfg = cfg
        self.fused = fused
        self.frames = []  # the latent frames held, in order
        self.chunks = 0  # how many are finished

    def held(self, layer):
        """Keys and values held for a block: two (B, h, len(frames) N, d)."""
        k, v = self.kv[layer, :, :, :, : len(self.frames)].flatten(3, 4)
        return k, v

    def update(self, layer, k, v):
        """Store the finished chunk's keys and values (B, h, chunk N, d) of a block."""
        N = self.kv.shape[5]
        new = k.shape[2] // N
        places = slice(len(self.frames), len(self.frames) + new)
        self.kv[layer, 0, :, :, places] = k.unflatten(2, (new, N))
        self.kv[layer, 1, :, :, places] = v.unflatten(2, (new, N))

    def evict(self):
        """Drop what the next chunk does not see, once every block has stored the last one."""
        stored = attention_window(self.chunks, self.cfg)
        self.chunks += 1
        self.frames = [f for f in attention_window(self.chunks, self.cfg) if f in stored]
        for place, frame in enumerate(self.frames):
            if stored[place] != frame:
                self.kv[:, :, :, :, place] = self.kv[:, :, :, :, stored.index(frame)]


def attend_cached(q, k, v, rope, cache, layer):
    """The stream's: the chunk's q over what the cache holds and its own k, v (B, h, chunk N, d)."""
    past_k, past_v = cache.held(layer)
    k = torch.cat([past_k.to(k.dtype), k], 2)
    v = torch.cat([past_v.to(v.dtype), v], 2)
    N = rope.shape[1]
    table = rope[: k.shape[2] // N]
    new = q.shape[2] // N
    return sdpa(apply_rope(q, table[-new:]), apply_rope(k, table), v)


def has_kernel(net):
    """Can kernels.py stream it? On NVIDIA's GPUs, where Triton comes with torch."""
    if not net.final_layer.weight.is_cuda or importlib.util.find_spec("triton") is None:
        return False
    return net.cfg.width // net.cfg.heads in (32, 64, 128)


def qk_norm(x, scale):
    """ViT-22B's (arXiv 2302.05442), of queries and keys."""
    # To x's type: autocast on a GPU would leave it in float32.
    return F.layer_norm(x, x.shape[-1:], scale.to(x.dtype)).to(x.dtype)


class Cond(NamedTuple):
    """What is known of L latent frames, embedded once for any number of denoising calls."""

    masked_source: torch.Tensor  # (B, L, N, P): the source with the mouth hidden
    tokens: torch.Tensor  # (B, L, N, D): it, the upper face, and the reference
    audio: torch.Tensor  # (B, L, depth, D)


class Block(nn.Module):
    """Attention, then an MLP, each modulated by the time, after the sound has been added."""

    def __init__(self, cfg, layer):
        super().__init__()
        D = cfg.width
        self.heads = cfg.heads
        self.layer = layer
        self.is_last = layer == cfg.depth - 1
        self.qkv = nn.Linear(D, 3 * D)
        self.q_scale = nn.Parameter(torch.ones(D // cfg.heads))
        self.k_scale = nn.Parameter(torch.ones(D // cfg.heads))
        self.out = nn.Linear(D, D)
        self.up = nn.Linear(D, 4 * D)
        self.down = nn.Linear(4 * D, D)
        # Added to the one that all blocks share (adaLN-single, arXiv 2310.00426): shift, scale and
        # gate, twice. Gates start half open; shut, as is usual, costs time a short run has not.
        self.modulation = nn.Parameter(torch.tensor([[0, 0, 0.5] * 2]).T.repeat(1, D))

    def forward(self, x, mod, audio, rope, causal_cfg=None, cache=None, store=False):
        """x (B, L, N, D); mod (B, L or 1, 6, D); audio (B, L, D) -> x. causal_cfg: the Config that
        says which latent frames a chunk sees; None: all. cache, store: see DiT.forward; with
        `store` the last block returns None, since nobody reads what it would make."""
        B, L, N, D = x.shape
        mod = (mod + self.modulation)[:, :, None]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = mod.unbind(3)  # each B L 1 D
        x = x + audio[:, :, None]

        y = torch.addcmul(shift, F.layer_norm(x, (D,)), scale)
        qkv = self.qkv(y).view(B, L * N, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each B h LN d
        if store:
            cache.update(self.layer, qk_norm(k, self.k_scale), v)
            if self.is_last:
                return None
        y = self.attention(q, k, v, rope, causal_cfg, cache)
        x = torch.addcmul(x, gate, self.out(y.transpose(1, 2).reshape(B, L, N, D)))

        y = torch.addcmul(mlp_shift, F.layer_norm(x, (D,)), mlp_scale)
        return torch.addcmul(x, mlp_gate, self.down(F.silu(self.up(y))))

    def attention(self, q, k, v, rope, causal_cfg=None, cache=None):
        """QK-norm, RoPE and attention; q, k, v and what comes out (B, h, L N, d). With a cache the
        stream's; else a whole clip's, causal or not."""
        if cache is not None and cache.fused:
            from kernels import stream_attention  # needs Triton

            kept = cache.kv[self.layer].flatten(3, 4)
            held = len(cache.frames) * rope.shape[1]
            return stream_attention(q, k, v, kept, held, self.q_scale, self.k_scale, rope)
        q = qk_norm(q, self.q_scale)
        k = qk_norm(k, self.k_scale)
        if cache is not None:
            return attend_cached(q, k, v, rope, cache, self.layer)
        if causal_cfg:
            return attend_chunks(q, k, v, rope, causal_cfg)
        return attend_all(q, k, v, rope)


def make_audio_encoder(channels):
    """Log-mel (B, MELS, M) -> (B, channels, (M - 20) // 4 + 1): an output sees 20 mel frames, and
    the next one starts a video frame later. The DiT's starts from what the expert's has learned."""
    return nn.Sequential(
        nn.Conv1d(MELS, channels, kernel_size=5),
        nn.SiLU(),
        nn.Conv1d(channels, channels, kernel_size=4, stride=4),
        nn.SiLU(),
        nn.Conv1d(channels, channels, kernel_size=4),
        nn.SiLU(),
    )


class DiT(nn.Module):
    """x0 = net(x_t, t, net.embed(source, reference, heard))."""

    Config = Config  # what describes one, see runtime.load_net

    def __init__(self, cfg):
        super().__init__()
        D, p = cfg.width, cfg.patch
        assert p % 4 == 0, f"patch {p}: choose a multiple of 4"
        assert cfg.size % (4 * p) == 0, f"size {cfg.size}: choose a multiple of 4 x patch {p}"
        assert D % (8 * cfg.heads) == 0, f"width {D}: choose a multiple of 8 x heads {cfg.heads}"
        assert cfg.window >= cfg.chunk, f"window {cfg.window}: choose at least chunk {cfg.chunk}"
        self.cfg = cfg
        self.stage = ""  # what made the weights

        # Pictures. Four kinds of patches share a bottleneck: saves two thirds of the input layers.
        P = 12 * p**2
        self.token_shape = (n_tokens(cfg), P)
        self.x_embedder = nn.Linear(P, D)
        self.patch_embedder = nn.Linear(P, PATCH_FEATURES)
        self.source_embedder = nn.Linear(2 * PATCH_FEATURES, D)
        self.reference_embedder = nn.Linear(2 * PATCH_FEATURES, D)
        self.pos_embed = nn.Parameter(torch.randn(n_tokens(cfg), D) * 0.02)
        # Time.
        self.t_embedder = nn.Sequential(
            nn.Linear(128, D), nn.SiLU(), nn.Linear(D, 128), nn.SiLU(), nn.Linear(128, 8 * D)
        )
        # Sound.
        self.audio_frames = (AUDIO_BACK + 16 + AUDIO_AHEAD - 20) // 4 + 1  # heard by a latent frame
        self.audio_encoder = make_audio_encoder(AUDIO_FEATURES)
        self.audio_proj = nn.Linear(AUDIO_FEATURES * self.audio_frames, D)
        self.null_audio = nn.Parameter(torch.zeros(D))  # heard when the sound is withheld
        self.audio_to_blocks = nn.Linear(D, cfg.depth * D)

        self.blocks = nn.ModuleList([Block(cfg, layer) for layer in range(cfg.depth)])
        # A token writes a square of 1.5 p x 1.5 p and neighbours overlap, so that no seam shows.
        self.margin = p // 4
        self.final_layer = nn.Linear(D, 12 * (p + 2 * self.margin) ** 2)

        # The source's words show in the mask's soft edge, too (the jaw moves there). So the network
        # sees nothing of where the mask is above 0; stream.to_frames blends what it paints there.
        blend = mouth_rectangle(mouth_mask(cfg.size)[..., None])
        self.register_buffer("blend", blend, persistent=False)  # S/2, 3S/4, 1
        hidden = (blend > 0).float().expand(1, 4, -1, -1, 3)
        self.register_buffer("mask", to_tokens(hidden, p)[0, 0], persistent=False)  # N P
        latents = max(MAX_LATENTS, cfg.sink + cfg.window)
        self.register_buffer("rope", rope_table(cfg, latents), persistent=False)

        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv1d)):
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.t_embedder[-1].weight)
        nn.init.normal_(self.final_layer.weight, std=0.2 / D**0.5)

    def cast(self, x):
        """x in the type of the weights (autocast takes anything)."""
        if torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(self.final_layer.weight.dtype)

    def embed(self, source, reference, heard, drop=None):
        """source, reference (B, T, S, 3S/4, 3) in [-1, 1], see data.middle; heard (B, back + 16 L
        + ahead, MELS), see data.hearing; drop (B,) bool: whose sound is withheld -> Cond."""
        patches = []
        for video in (source, reference):
            upper_face, mouth = video.chunk(2, 2)
            patches.append(to_tokens(upper_face, self.cfg.patch))
            patches.append(to_tokens(mouth, self.cfg.patch))
        upper_face, mouth, reference_upper_face, reference_mouth = patches
        masked_source = mouth * (1 - self.mask).to(mouth.dtype)

        def features(upper_face, mouth):
            upper_face = self.patch_embedder(self.cast(upper_face))
            mouth = self.patch_embedder(self.cast(mouth))
            return torch.cat([upper_face, mouth], -1)

        tokens = self.source_embedder(features(upper_face, masked_source)) + self.pos_embed
        tokens = tokens + self.reference_embedder(features(reference_upper_face, reference_mouth))

        audio = self.audio_encoder(self.cast(heard).mT)  # B features video frames
        audio = audio.unfold(2, self.audio_frames, 4)  # B features L audio_frames
        audio = self.audio_proj(audio.transpose(1, 2).flatten(2))  # B L D
        if drop is not None:
            audio = torch.where(drop.view(-1, 1, 1), self.null_audio.to(audio.dtype), audio)
        return Cond(masked_source, tokens, self.audio_for_blocks(audio))

    def audio_for_blocks(self, audio):
        """Sound (B, L, D) -> what each block adds, (B, L, depth, D)."""
        return self.audio_to_blocks(audio).unflatten(-1, (self.cfg.depth, -1))

    def null_cond(self, cond):
        """The Cond of the same pictures whose sound is withheld, for guidance."""
        null = self.audio_for_blocks(self.null_audio.view(1, 1, -1))
        return cond._replace(audio=null.expand_as(cond.audio))

    def modulation(self, t):
        """t (B, L or 1) or a number, in 0..1 -> (B, L or 1, 8, D): shift, scale, gate twice, and
        the final layer's shift and scale."""
        if not torch.is_tensor(t):
            t = torch.full((1, 1), float(t), device=self.mask.device)
        frequencies = 1000 * 1e4 ** -(torch.arange(64, device=t.device) / 64)
        angle = t.float()[..., None] * frequencies
        mod = self.t_embedder(self.cast(torch.cat([angle.cos(), angle.sin()], -1)))
        mod = mod.to(self.final_layer.weight.dtype).unflatten(-1, (8, -1))
        mod[:, :, 1::3] += 1  # scales
        return mod

    def forward(self, x_t, t, cond, causal=False, cache=None, store=False):
        """x_t (B, L, N, P) noisy tokens; t (B, L), (B, 1) or a number: their noise level -> x0
        (B, L, N, P). Bidirectional; `causal` over a clip; with a `cache`, x_t is the stream's next
        chunk, and with `store` it is finished (t = 0): its keys are kept, nothing is returned."""
        mod = self.modulation(t)
        x = self.x_embedder(self.cast(x_t)) + cond.tokens
        causal_cfg = self.cfg if causal else None
        for layer, block in enumerate(self.blocks):
            audio = cond.audio[:, :, layer]
            x = block(x, mod[:, :, :6], audio, self.rope, causal_cfg, cache, store)
        if store:
            return None
        return self.to_x0(x, mod[:, :, 6:], cond.masked_source)

    def to_x0(self, x, mod, masked_source):
        """x (B, L, N, D) -> (B, L, N, P): squares added where they overlap, then the source."""
        B, L, _, D = x.shape
        p, m = self.cfg.patch, self.margin
        shift, scale = mod[:, :, None].unbind(3)
        x = self.final_layer(torch.addcmul(shift, F.layer_norm(x, (D,)), scale))
        rows, columns = grid(self.cfg)
        height = rows * p
        width = columns * p
        x = x.flatten(0, 1).mT  # BL, values of a square, N
        x = F.fold(x, (height + 2 * m, width + 2 * m), kernel_size=p + 2 * m, stride=p)
        x = x[:, :, m : m + height, m : m + width]  # BL 12 height width
        x = x.reshape(B, 4 * L, 3, height, width).permute(0, 1, 3, 4, 2)
        return masked_source + self.mask.to(x.dtype) * to_tokens(x, p)


def network_of(cfg):
    """The network's part of a script's config -> Config."""
    return Config(**{field.name: getattr(cfg, field.name) for field in dataclasses.fields(Config)})
