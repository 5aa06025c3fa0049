"""Dub a video: the teacher's many-step sampler, and the student that streams in two steps a chunk.

    python sample.py                                    # a held-out drawn face: out/dub.mp4
    python sample.py --audio speech.wav                 # a drawn person says it
    python sample.py --text "Guten Tag" --voice de --face 7     # another one says this
    python sample.py --video IN.mp4 --audio IN.wav --out OUT.mp4 --box 40,10,110
    python sample.py --video IN.mp4 --audio IN.wav --out - | ffplay -f rawvideo \\
        -pixel_format rgb24 -video_size 640x480 -framerate 25 -     # IN.mp4's size

Flow matching: x_t = (1 - t) x0 + t eps, t = 0 is clean and t = 1 is noise; v = eps - x0.
"""

import collections
import contextlib
import dataclasses
import itertools
import math
import os
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import torch

import data
import media
import runtime
import voices
from data import (
    AUDIO_AHEAD,
    AUDIO_BACK,
    FPS,
    HOP,
    MEL_REACH,
    RATE,
    middle,
    mouth_mask,
    mouth_rectangle,
    paste,
    to_float,
    to_pixels,
    to_uint8,
)
from faces import SPLITS, dub_pair, render_clip
from media import parse_box, paste_box, square
from model import Cond, KVCache, has_kernel, load_dit
from runtime import UserError, autocast, opt
from syncnet import find_weights

SHIFT = 5.0  # of the time grid (paper: 5)
STEPS = 50  # of the teacher's grid (paper: 50)
LOUDEST = 100  # sample that is taken; a larger one means that the sound was not scaled to -1..1
FACE_SECONDS = 8  # of a drawn person, played back and forth
FACE_SCALE = 3  # of the picture that he is shown in
# How far a token's first frame leans to the one before it: inside a chunk, and at its start.
TOKEN_LEAN = 0.1
CHUNK_LEAN = 0.2


def shift_time(u, s=SHIFT):
    """u in 0..1 -> t in 0..1, more of it near noise for s > 1."""
    return s * u / (1 + (s - 1) * u)


def grid_time(j, steps=STEPS):
    """The time of index j of the shifted grid: j = 0 is noise, j = steps clean; j = 20, 30, 40 of
    50 are t = .882, .769, .556."""
    return shift_time(1 - j / steps)


def denoising_times(cfg):
    """The times of the student's calls: noise (told as .999, the last time that training knows),
    then on to the landing. At j = 30 (the paper's) x_t keeps half as much of the first prediction
    as at 40 (.23, .44). The rest must be predicted again, which gives a small network softer
    mouths."""
    last = cfg.num_steps - 1
    return [0.999] + [grid_time(cfg.landing * i / last) for i in range(1, last + 1)]


def per_latent(t):
    """t, a number or (B, L or 1) -> what broadcasts over tokens (B, L, N, P)."""
    return t[..., None, None] if torch.is_tensor(t) else t


def add_noise(x0, eps, t):
    """x_t = (1 - t) x0 + t eps."""
    return torch.lerp(x0.to(eps.dtype), eps, per_latent(t))


def to_velocity(x_t, x0, t):
    """v = (x_t - x0) / t, for t > 0."""
    return (x_t - x0) / per_latent(t)


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
    unblended, as in training.) At small, frames then change at borders as much as elsewhere, 1.1 to
    1.2 times as much as the truth's; without, 1.5 times where a chunk starts. More costs sync."""
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


def cfg_predict(net, x_t, t, cond, scale):
    """Classifier-free guidance: x0_null + s (x0_audio - x0_null), by a forward pass of twice the
    batch; s = 1 is the conditional prediction alone. scale: a number, or one a sample (B,)."""
    if not torch.is_tensor(scale) and scale == 1:
        return net(x_t, t, cond)
    if torch.is_tensor(t):
        t = torch.cat([t, t])
    if torch.is_tensor(scale):
        scale = scale.view(-1, 1, 1, 1)
    both = Cond(*(torch.cat(pair) for pair in zip(cond, net.null_cond(cond))))
    x0_audio, x0_null = net(torch.cat([x_t, x_t]), t, both).chunk(2)
    return x0_null + scale * (x0_audio - x0_null)


@torch.no_grad()
def euler(net, cond, steps=STEPS, guidance=1.0, rng=None):
    """Noise -> x0 (B, L, N, P) along the shifted grid by Euler steps of the velocity."""
    x_t = torch.randn(cond.masked_source.shape, generator=rng).to(cond.masked_source.device)
    for j in range(steps):
        t = grid_time(j, steps)
        next_t = grid_time(j + 1, steps)
        x0 = cfg_predict(net, x_t, t, cond, guidance).float()
        x_t = x_t + (next_t - t) * to_velocity(x_t, x0, t)
    return x_t


def dub_teacher(net, source, mel, steps=STEPS, guidance=1.0, latents=12, seed=0):
    """Dub whole clips with the bidirectional model, in windows of `latents` latent frames, as long
    as it was trained on (the last one is moved back to end with the clip). source (B, T, S, S, 3)
    uint8, mel (B, 4 T, MELS) -> uint8 like source."""
    rng = torch.Generator().manual_seed(seed)
    L = source.shape[1] // 4
    x0 = torch.empty(len(source), L, *net.mask.shape, device=source.device)
    for start in range(0, L, latents):
        start = max(0, min(start, L - latents))
        end = min(L, start + latents)
        cond = embed_clip(net, source, mel, start, end)
        with autocast(net):
            x0[:, start : start + latents] = euler(net, cond, steps, guidance, rng)
    return to_frames(net, x0, source)


def in_chunks(cond, k):
    """The Cond of a whole clip -> [Cond] of k latent frames each."""
    return [Cond(*parts) for parts in zip(*(x.split(k, 1) for x in cond))]


def seeded(seed):
    """Like torch.randn_like, the same numbers on every device."""
    rng = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=rng).to(x.device, non_blocking=True)


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
            # Fresh noise, not the first: with that, x_t would lie on a straight line from noise to
            # x0, and the net be asked about its own mistakes as if they were noise.
            x_t = add_noise(x0, noise(x0), next_t)
    return net(x_t, times[exit_step], cond, cache=cache).float()


@torch.no_grad()
def store_chunk(net, x0, cond, cache):
    """The cache pass: over the finished chunk at t = 0, so that later ones may look back at it."""
    net(x0, 0.0, cond, cache=cache, store=True)
    cache.evict()


@torch.no_grad()
def generate(net, conds, noise=torch.randn_like):
    """The student's loop. conds: an iterable of Cond, one chunk each -> yields x0 (B, chunk, N, P),
    one chunk each. noise(x): Gaussian noise of the shape of x."""
    cache = None
    for cond in conds:
        with autocast(net):
            if cache is None:
                cache = KVCache(net, batch=len(cond.tokens))
            x0 = denoise_chunk(net, cond, cache, noise)
        yield x0
        with autocast(net):
            store_chunk(net, x0, cond, cache)


def noise_like(x, rng):
    return torch.randn(x.shape, generator=rng, device=x.device)


def rollout(net, cond, exit_step, rng):
    """`generate` for training (Self-Forcing): the student's own clip (B, L, N, P), chunk by chunk
    as at inference, but stopped in every chunk at the same call, see denoise_chunk. Gradient, if
    on, goes through that call and the embedding of its conditions; none passes through the cache
    from chunk to chunk. (The cache is overwritten later without harm: attend_cached copies.)"""
    cache = KVCache(net, batch=len(cond.tokens))
    outputs = []
    for chunk in in_chunks(cond, net.cfg.chunk):
        x0 = denoise_chunk(net, chunk, cache, lambda x: noise_like(x, rng), exit_step)
        store_chunk(net, x0, chunk, cache)
        outputs.append(x0)
    return torch.cat(outputs, 1)


def dub_student(net, source, mel, seed=0):
    """Dub whole clips chunk by chunk. source (B, T, S, S, 3) uint8, T a multiple of a chunk's
    frames, mel (B, 4 T, MELS) -> uint8 like source."""
    chunks = in_chunks(embed_clip(net, source, mel), net.cfg.chunk)
    return to_frames(net, torch.cat(list(generate(net, chunks, seeded(seed))), 1), source)


def chunk_mel(audio, c, cfg):
    """What chunk c hears: (1, back + 16 chunk + ahead, MELS), bit for bit that of the whole file.
    Reads no sample beyond the look-ahead and the 7.5 ms that its last mel frame reaches further."""
    samples = RATE // FPS  # of a video frame, 4 mel frames
    frames = 4 * cfg.chunk
    # Whole video frames around the chunk: what it hears, and one more for the mel's window.
    margin = math.ceil(max(AUDIO_BACK, AUDIO_AHEAD) / 4) + 1
    first = frames * c - margin
    last = frames * (c + 1) + margin
    end = frames * (c + 1) * samples + HOP * AUDIO_AHEAD + MEL_REACH
    part = np.asarray(audio[max(0, first * samples) : end])
    if part.ndim != 1 or part.dtype.kind != "f":
        what = f"{part.dtype} sound of {part.shape}"
        raise UserError(f"{what} where the model needs float32 (n,), one channel in -1..1")
    if not np.abs(part).max(initial=0) < LOUDEST:  # nor if one is NaN
        raise UserError("sound with NaN, or far louder than 1, where the model needs -1..1")
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
    shape = (cfg.size, cfg.size, 3)
    while True:
        chunk = [torch.as_tensor(frame) for frame in itertools.islice(frames, n)]
        if not chunk:
            return
        for frame in chunk:
            if frame.shape != shape or frame.dtype != torch.uint8:
                what = f"{frame.dtype} frames of {tuple(frame.shape)}"
                raise UserError(f"{what} where the model needs uint8 {shape}")
        still = chunk[-1:] * (n - len(chunk))
        yield torch.stack(chunk + still)[None], len(chunk)


class Streamer:
    """The student dubbing one stream, a chunk at a time: `frames = streamer.step(pixels, mel)`.

    What it holds is the KV cache and, of the chunk before, the pixels (the next one's reference),
    x0 (its last frame is blended into the next one) and the conditions: the cache pass over a chunk
    is made at the start of the next step, when its frames have been shown already. All of it, and
    what a step is given, lies at fixed addresses. So when the window is full and every step is the
    same work, `cuda_graph` captures one and replays it by one call instead of hundreds. (Attention
    by kernels.py: set net.fused.)"""

    def __init__(self, net, seed=0, cuda_graph=False, blend=True):
        """blend: see to_frames. Noise is drawn on the device: on another one, details differ."""
        self.net = net
        self.device = net.final_layer.weight.device
        if cuda_graph and self.device.type != "cuda":
            raise UserError("--cuda_graph needs an NVIDIA GPU")
        self.cuda_graph = cuda_graph
        self.blend = blend
        self.rng = torch.Generator(self.device).manual_seed(seed)
        cfg = net.cfg
        shape = (cfg.num_steps, 1, cfg.chunk, *net.mask.shape)
        self.noise = torch.empty(shape, device=self.device)
        self.cache = KVCache(net, batch=1)
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


def stream(net, source, audio, seed=0, cuda_graph=False, blend=True):
    """Dub a stream. source: an iterable of (S, S, 3) uint8 frames at 25 fps; audio: (n,) float32 at
    16 kHz, anything that slices and has a length. Yields (4 chunk = 12, S, S, 3) uint8, less at
    the end. See Streamer."""
    streamer = Streamer(net, seed, cuda_graph=cuda_graph, blend=blend)
    for c, (pixels, length) in enumerate(video_chunks(source, net.cfg)):
        frames = streamer.step(pixels, chunk_mel(audio, c, net.cfg))
        yield frames[:length]


def clock(frames_of, device):
    """Time an iterable of uint8 frames (n, S, S, 3): (frames a second, seconds to the first frame).
    Pixels and samples are in memory when the clock starts; everything from there to uint8 frames in
    host memory is included."""
    runtime.synchronize(device)
    start = time.perf_counter()
    first = None
    count = 0
    for frames in frames_of:
        frames.cpu()
        if first is None:
            first = time.perf_counter() - start
        count += len(frames)
    return count / (time.perf_counter() - start), first


def play(path, total):
    """Yield `total` frames of a video. If it is shorter, it is read again from its start, as often
    as it takes, and a line on stderr says so."""
    length = 0
    for frame in itertools.islice(media.read_video(path), total):
        yield frame
        length += 1
    missing = total - length
    if missing == 1:
        yield frame  # the sound's length was rounded up to a whole frame
    elif missing > 1:
        media.warn(f"{path}: shorter than the sound; it is played again from its start")
        again = itertools.chain.from_iterable(media.read_video(path) for _ in itertools.count())
        yield from itertools.islice(again, missing)


def dub_face(net, cfg, audio):
    """A held-out drawn person says `audio`, samples or a Sound -> cfg.out, in sound and picture.
    The face was drawn saying other words, for FACE_SECONDS; this is played back and forth."""
    seed = SPLITS["held-out"] + 2 * cfg.face
    face = render_clip(seed, FACE_SECONDS * FPS, net.cfg.size).video
    there_and_back = torch.cat([face, face[1:-1].flip(0)])
    total = math.ceil(len(audio) * FPS / RATE)
    source = (there_and_back[i % len(there_and_back)] for i in range(total))
    side = FACE_SCALE * net.cfg.size
    with media.write_video(cfg.out, (side, side), audio) as put:
        for frames in stream(net, source, audio, cfg.seed, cfg.cuda_graph):
            for frame in frames:
                put(square(frame, side).numpy())
    print(f"{cfg.out}: {total / FPS:.1f} s, said by the drawn person --face {cfg.face}")


def dub_file(net, cfg, audio):
    """cfg.video with `audio`, samples or a Sound -> cfg.out, as long as the sound, at the video's
    own size. Nothing is held but a chunk."""
    start = time.time()
    total = math.ceil(len(audio) * FPS / RATE)
    source = play(cfg.video, total)
    first = next(source)
    height, width, _ = first.shape
    box = parse_box(cfg.box, first)
    mask = mouth_mask(box[2])[:, :, None]
    waiting = collections.deque()  # whole frames whose squares are being dubbed

    def squares():
        for frame in itertools.chain([first], source):
            waiting.append(frame)
            yield square(frame, net.cfg.size, box)

    if cfg.out == "-":
        if not hasattr(sys.stdout, "buffer"):
            raise UserError("--out -: standard output takes no bytes here; name a file")
        messages = sys.stderr
        output = contextlib.nullcontext(sys.stdout.buffer.write)
    else:
        messages = sys.stdout
        output = media.write_video(cfg.out, (width, height), audio)
    # Not blended in the square, but once, in the frame.
    dubs = stream(net, squares(), audio, cfg.seed, cfg.cuda_graph, blend=False)
    with output as put:
        for frames in dubs:
            for dub in frames:
                put(paste_box(waiting.popleft(), dub, box, mask).numpy())
    elapsed = time.time() - start
    pace = f"{total} frames in {elapsed:.1f} s, {total / elapsed:.0f} frames a second"
    print(f"{cfg.out}: {pace}, reading and writing included", file=messages)


def side_by_side(path, net, pairs, seed=0, cuda_graph=False):
    """Dub drawn (source, truth) pairs -> an mp4, source | dub | truth one pair after another with
    the dub's sound, and beside it a PNG of eight moments of each: rows of source, dub, truth."""
    frames = []
    sheet = []
    for source, truth in pairs:
        dub = torch.cat(list(stream(net, source.video, truth.audio, seed, cuda_graph)))
        frames.append(torch.cat([source.video, dub, truth.video], 2))
        for video in (source.video, dub, truth.video):
            moments = video[6::12][:8]
            sheet.append(torch.cat(list(moments), 1))
    sound = np.concatenate([truth.audio for _, truth in pairs])
    scale = max(1, 256 // net.cfg.size)
    frames = enlarge(torch.cat(frames), scale)
    with media.write_video(path, (frames.shape[2], frames.shape[1]), sound) as put:
        for frame in frames:
            put(frame.numpy())
    sheet = enlarge(torch.cat(sheet)[None], max(1, scale // 2))[0]
    matplotlib.image.imsave(Path(path).with_suffix(".png"), sheet.numpy())


def enlarge(frames, scale):
    """(n, H, W, 3) -> (n, scale H, scale W, 3), pixel by pixel."""
    return frames.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


@dataclasses.dataclass
class Options:
    video: str = opt("", "the recording to dub; a drawn person if not given")
    audio: str = opt("", "the sound to dub it with; the video's own if not given")
    text: str = opt("", "the words to dub it with, said by eSpeak NG")
    voice: str = opt(
        "en-us", "the eSpeak voice of --text: a language, or one with a variant, de+f4"
    )
    face: int = opt(
        3,
        "the number of the drawn person, if there is no --video",
        least=0,
    )
    out: str = opt(
        "out/dub.mp4",
        "the dubbed video; - for raw RGB frames on standard output",
    )
    box: str = opt(
        "",
        "X,Y,SIDE of the face in pixels; the centred square if not given",
    )
    weights: str = opt("", "the checkpoint of a student; the bundled one if not given")
    device: str = opt("", "cuda, mps or cpu; the best that there is if not given")
    precision: str = opt("", *runtime.PRECISIONS)
    seed: int = opt(0, "the number that the noise is drawn from", least=0)
    attention: str = opt(
        "auto", "the stream's attention; auto: by kernels.py on NVIDIA's GPUs", ("auto", "dense")
    )
    cuda_graph: bool = opt(
        False,
        "replay each chunk as one CUDA graph; needs an NVIDIA GPU",
    )


def main(argv):
    cfg = runtime.options(Options, argv, __doc__)
    if (cfg.box or cfg.out == "-") and not cfg.video:
        raise UserError("--box or --out - without --video: which recording should it dub?")
    if cfg.audio and cfg.text:
        raise UserError("--audio and --text: which of them should be said?")
    given = [path for path in (cfg.video, cfg.audio) if os.path.exists(path)]
    if os.path.exists(cfg.out) and any(os.path.samefile(cfg.out, path) for path in given):
        raise UserError(f"--out {cfg.out} is what is to be dubbed; choose another name")
    device = runtime.find_device(cfg.device, cfg.precision)
    path = find_weights("student", cfg.weights)
    net = load_dit(path, device, runtime.fast_dtype(device))
    if net.stage == "teacher":
        raise UserError(f"{path}: a teacher, which cannot stream; distil a student by distill.py")
    net.fused = cfg.attention == "auto" and has_kernel(net)
    if device.type == "cuda":
        print(f"attention: {'kernels.py' if net.fused else 'dense'}", file=sys.stderr)
    if not (cfg.video or cfg.audio or cfg.text):
        pairs = [dub_pair(1000 + cfg.seed, 96, net.cfg.size)]
        side_by_side(cfg.out, net, pairs, cfg.seed, cfg.cuda_graph)
        print(f"{cfg.out} (and .png): source | dub | truth; the models never saw this person")
        return
    if cfg.text:
        audio = voices.say(cfg.text, cfg.voice)
    else:
        audio = media.Sound(cfg.audio or cfg.video)
    if cfg.video:
        dub_file(net, cfg, audio)
    else:
        dub_face(net, cfg, audio)


if __name__ == "__main__":
    runtime.run(main)
