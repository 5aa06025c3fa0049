"""Dubbing: whole clips by the teacher, and chunk by chunk by the student, at last as a stream.

The student makes a chunk in a few calls, then passes once more over the finished chunk, at t = 0,
so that later chunks may look back at it: `denoise_chunk` and `store_chunk`. `rollout` is the loop
over the chunks of a clip, in training as in inference. `Streamer` does the same work in another
order, so that the frames of a chunk are shown before its cache pass is made.
"""

import itertools
import math

import numpy as np
import torch

import data
from data import (
    AUDIO_AHEAD,
    AUDIO_BACK,
    FPS,
    HOP,
    MEL_REACH,
    RATE,
    middle,
    mouth_rectangle,
    paste,
    to_float,
    to_pixels,
    to_uint8,
)
from flow import STEPS, add_noise, denoising_times, euler, seeded
from model import Cond, KVCache
from runtime import autocast

# How far a token's first frame leans to the one before it: inside a chunk, and at its start.
TOKEN_LEAN = 0.1
CHUNK_LEAN = 0.2


def previous_chunk(video, cfg):
    """The reference at inference: the source one chunk ago, never the frames being replaced; at the
    start its first frame, held still. video (B, T, ...) -> the same shape."""
    T = video.shape[1]
    delay = min(4 * cfg.chunk, T)
    still = video[:, :1].repeat_interleave(delay, 1)
    return torch.cat([still, video[:, : T - delay]], 1)


@torch.no_grad()
def embed_clip(net, source, mel, start=0, end=None):
    """Latent frames start..end of source (B, T, S, S, 3) uint8 and mel (B, 4 T, MELS) -> Cond."""
    if end is None:
        end = source.shape[1] // 4
    video = to_float(middle(source))
    reference = previous_chunk(video, net.cfg)
    part = slice(4 * start, 4 * end)
    with autocast(net):
        return net.embed(video[:, part], reference[:, part], data.hearing(mel, start, end))


def blend_seams(x0, mask, chunk, before=None):
    """Smooth the seams in time where tokens meet, as video codecs do those between blocks: in the
    mask, the first frame of each token leans to the last one of the token before. x0 (B, L, N, P)
    from the start of a chunk on, `before` the x0 that ends there -> x0 to show. (The cache holds it
    unblended, as in training. Without this, frames change half as much again where a chunk starts;
    more of it costs sync.)"""
    n = x0.shape[-1] // 4  # values of a frame
    first_frame = x0[..., :n]
    if before is None:
        frame_before = first_frame[:, :1]  # so the very first one stays as it is
    else:
        frame_before = before[:, -1:, :, -n:]
    frames_before = torch.cat([frame_before, x0[:, :-1, :, -n:]], 1)
    starts_chunk = torch.arange(x0.shape[1], device=x0.device) % chunk == 0
    lean = torch.where(starts_chunk, CHUNK_LEAN, TOKEN_LEAN)
    weight = lean[:, None, None] * mask[:, :n]
    first_frame = torch.lerp(first_frame, frames_before.to(x0.dtype), weight.to(x0.dtype))
    return torch.cat([first_frame, x0[..., n:]], -1)


def to_frames(net, x0, source, before=None, blend=True):
    """x0 (B, L, N, P), laid over source (B, T, S, S, 3) uint8 through the soft mask -> uint8.
    blend=False: with no soft edge, for those who blend in the frame that the square is cut from."""
    dub = to_pixels(blend_seams(x0, net.mask, net.cfg.chunk, before), net.cfg.patch)
    if blend:
        dub = torch.lerp(to_float(mouth_rectangle(source)), dub.float(), net.blend.float())
    return paste(to_uint8(dub), source)


@torch.no_grad()
def dub_teacher(net, source, mel, steps=STEPS, guidance=1.0, latents=12, seed=0):
    """Dub whole clips with the bidirectional model, `latents` latent frames at a time, as many as
    it was trained on (the last part is moved back to end with the clip). source (B, T, S, S, 3)
    uint8, mel (B, 4 T, MELS) -> uint8 like source."""
    rng = torch.Generator().manual_seed(seed)
    L = source.shape[1] // 4
    x0 = torch.empty(len(source), L, *net.token_shape, device=source.device)
    for start in range(0, L, latents):
        start = max(0, min(start, L - latents))
        end = min(L, start + latents)
        cond = embed_clip(net, source, mel, start, end)
        x0[:, start:end] = euler(net, cond, steps, guidance, rng)
    return to_frames(net, x0, source)


def in_chunks(cond, k):
    """The Cond of a whole clip -> [Cond] of k latent frames each."""
    return [Cond(*parts) for parts in zip(*(x.split(k, 1) for x in cond))]


def denoise_chunk(net, cond, cache, noise, exit_step=None):
    """The student's calls for one chunk: Cond -> x0 (B, chunk, N, P) float32.

    noise(x): Gaussian noise of the shape of x. exit_step: the index, from 0, of the call to stop
    at, the only one that carries gradient (if that is on); the last one if not given."""
    times = denoising_times(net.cfg)
    if exit_step is None:
        exit_step = len(times) - 1
    x_t = noise(cond.masked_source.float())
    with torch.no_grad():
        for t, next_t in zip(times[:exit_step], times[1:]):
            x0 = net(x_t, t, cond, cache=cache).float()
            # Fresh noise, independent of the guess x0, as that of init's training is of its x0. The
            # guess was made from the first noise, and mixed with that again it would be an input
            # that the network has not been trained on: mistakes and noise would go together.
            x_t = add_noise(x0, noise(x0), next_t)
    return net(x_t, times[exit_step], cond, cache=cache).float()


@torch.no_grad()
def store_chunk(net, x0, cond, cache):
    """The cache pass: over the finished chunk at t = 0, so that later ones may look back at it.
    (Init has trained on noisy chunks before the current one, never at t = 0, and no loss has a
    gradient through this pass: that the keys of a clean chunk are good ones is carried over from
    the teacher, whose times reach down to t = .02.)"""
    net(x0, 0.0, cond, cache=cache, store=True)
    cache.evict()


def rollout(net, conds, noise, exit_step=None):
    """The student's loop. conds: an iterable of Cond, one chunk each -> yields x0 (B, chunk, N, P),
    one chunk each, made from what it has made before. noise and exit_step: see denoise_chunk.

    In training (Self-Forcing) gradient goes through one call in every chunk, and through the
    embedding of its conditions. None passes through the cache from chunk to chunk. (The cache is
    overwritten later without harm: attend_cached copies.)"""
    cache = None
    for cond in conds:
        with autocast(net):
            if cache is None:
                cache = KVCache(net, batch=len(cond.tokens))
            x0 = denoise_chunk(net, cond, cache, noise, exit_step)
        yield x0
        with autocast(net):
            store_chunk(net, x0, cond, cache)


@torch.no_grad()
def dub_student(net, source, mel, seed=0):
    """Dub whole clips chunk by chunk. source (B, T, S, S, 3) uint8, T a multiple of a chunk's
    frames, mel (B, 4 T, MELS) -> uint8 like source."""
    conds = in_chunks(embed_clip(net, source, mel), net.cfg.chunk)
    return to_frames(net, torch.cat(list(rollout(net, conds, seeded(seed))), 1), source)


def chunk_mel(audio, c, cfg):
    """What chunk c hears: (1, back + 16 chunk + ahead, MELS), bit for bit that of the whole file.
    audio: (n,) floats in -1..1 at 16 kHz, anything that slices and has a length.

        first        AUDIO_BACK       the chunk's own      AUDIO_AHEAD        last
          |     |<-- mel frames -->|<-- video frames -->|<-- mel frames -->|   |
          |<-------- margin ------>|                    |<----- margin ------->|

    Read are the samples from `first` to the end of the look-ahead, and the 7.5 ms that its last mel
    frame reaches further: what comes later may not exist yet. `first` and `last` are whole video
    frames, since log_mel takes no others; up to `last` and before the file's start zeros stand."""
    samples = RATE // FPS  # of a video frame, 4 mel frames
    frames = 4 * cfg.chunk
    margin = math.ceil(max(AUDIO_BACK, AUDIO_AHEAD) / 4) + 1  # video frames; 1 for the reach
    first = frames * c - margin
    last = frames * (c + 1) + margin
    end = frames * (c + 1) * samples + HOP * AUDIO_AHEAD + MEL_REACH
    part = np.asarray(audio[max(0, first * samples) : end])
    assert part.ndim == 1 and part.dtype.kind == "f", "one channel of floats in -1..1 is needed"
    part = part.astype(np.float32)
    before = max(0, -first * samples)  # of the file's start
    part = np.pad(part, (before, (last - first) * samples - before - len(part)))
    mel = data.log_mel(part)[None]
    mel = mel[:, 4 * margin - AUDIO_BACK : mel.shape[1] - 4 * margin + AUDIO_AHEAD]
    # Before the file's first video frame and after its last, there is silence.
    position = torch.arange(mel.shape[1]) + 4 * frames * c - AUDIO_BACK
    outside = (position < 0) | (position >= 4 * math.ceil(len(audio) / samples))
    mel[:, outside] = data.SILENCE
    return mel


def video_chunks(source, cfg):
    """An iterable of frames (S, S, 3) uint8 -> yields (frames (1, 4 chunk, S, S, 3), how many of
    them were there: less than a chunk's at the end, where the last one is held still)."""
    frames = iter(source)
    n = 4 * cfg.chunk
    while True:
        chunk = [torch.as_tensor(frame) for frame in itertools.islice(frames, n)]
        if not chunk:
            return
        still = chunk[-1:] * (n - len(chunk))
        pixels = torch.stack(chunk + still)[None]
        assert pixels.dtype == torch.uint8 and pixels.shape[2:] == (cfg.size, cfg.size, 3)
        yield pixels, len(chunk)


class Streamer:
    """The student dubbing one stream, a chunk at a time: `frames = streamer.step(pixels, mel)`.

    What it holds is the KV cache and, of the chunk before, the pixels (the next one's reference),
    x0 (its last frame is blended into the next one) and the conditions: the cache pass over a chunk
    is made at the start of the next step, when its frames have been shown already. All of it, and
    what a step is given, lies at fixed addresses. So when the window is full and every step is the
    same work, `cuda_graph` captures one and replays it by one call instead of hundreds."""

    def __init__(self, net, seed=0, cuda_graph=False, blend=True, fused=False):
        """blend: see to_frames; fused: see KVCache. cuda_graph needs an NVIDIA GPU. Noise is drawn
        on the device: on another one, details differ."""
        self.net = net
        self.device = net.final_layer.weight.device
        assert self.device.type == "cuda" or not cuda_graph, "a CUDA graph needs an NVIDIA GPU"
        self.cuda_graph = cuda_graph
        self.blend = blend
        self.rng = torch.Generator(self.device).manual_seed(seed)
        cfg = net.cfg
        shape = (cfg.num_steps, 1, cfg.chunk, *net.token_shape)
        self.noise = torch.empty(shape, device=self.device)
        self.cache = KVCache(net, batch=1, fused=fused)
        self.steps = 0
        self.graph = None

    @torch.no_grad()
    def step(self, pixels, mel):
        """The next chunk: pixels (1, 4 chunk, S, S, 3) uint8 and what it hears, see chunk_mel ->
        frames (4 chunk, S, S, 3) uint8, on the CPU."""
        if self.steps == 0:
            self.pixels = pixels.to(self.device, copy=True)
            self.mel = mel.to(self.device, copy=True)
            first = to_float(middle(self.pixels[:, :1]))
            self.reference = first.repeat_interleave(pixels.shape[1], 1)  # held still
        self.pixels.copy_(pixels)
        self.mel.copy_(mel)
        self.noise.normal_(generator=self.rng)
        cfg = self.net.cfg
        window_is_full = self.steps * cfg.chunk >= cfg.sink + cfg.window
        if self.cuda_graph and window_is_full and self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.frames = self.dub()
        if self.graph:
            self.graph.replay()
        else:
            self.frames = self.dub()
        self.steps += 1
        return self.frames[0].cpu()

    def dub(self):
        """All that the device does for a chunk."""
        net = self.net
        draws = iter(self.noise)
        with autocast(net):
            if self.steps > 0:
                store_chunk(net, self.x0, Cond(*self.cond), self.cache)
            video = to_float(middle(self.pixels))
            cond = net.embed(video, self.reference, self.mel)
            x0 = denoise_chunk(net, cond, self.cache, lambda x: next(draws))
        if self.steps == 0:
            frames = to_frames(net, x0, self.pixels, blend=self.blend)
            self.x0 = x0.clone()
            self.cond = [part.clone() for part in cond]
        else:
            frames = to_frames(net, x0, self.pixels, self.x0, self.blend)
            self.x0.copy_(x0)
            for kept, new in zip(self.cond, cond):
                kept.copy_(new)
        self.reference.copy_(video)
        return frames


def dub_stream(net, source, audio, seed=0, **how):
    """Dub a stream. source: an iterable of (S, S, 3) uint8 frames at 25 fps; audio: see chunk_mel.
    Yields (4 chunk = 12, S, S, 3) uint8, less at the end. how: see Streamer."""
    streamer = Streamer(net, seed, **how)
    for c, (pixels, length) in enumerate(video_chunks(source, net.cfg)):
        frames = streamer.step(pixels, chunk_mel(audio, c, net.cfg))
        yield frames[:length]
