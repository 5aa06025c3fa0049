"""Dub a video: the teacher's many-step sampler, and the student that streams in two steps a chunk.

    python sample.py                                    # a held-out drawn face: out/dub.mp4
    python sample.py --audio speech.wav                 # a drawn person says it
    python sample.py --text "Guten Tag" --voice de --face 7     # another one says this
    python sample.py --video IN.mp4 --audio IN.wav --out OUT.mp4 --box 40,10,128    # --compile on
    python sample.py --video IN.mp4 --audio IN.wav --out - | ffplay -f rawvideo \\
        -pixel_format rgb24 -video_size 640x480 -framerate 25 -     # IN.mp4's size

Flow matching: x_t = (1 - t) x0 + t eps, t = 0 is clean and t = 1 is noise; v = eps - x0.
"""

import contextlib
import dataclasses
import itertools
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
    RATE,
    middle,
    mouth_mask,
    mouth_rectangle,
    paste,
    to_float,
    to_pixels,
    to_uint8,
)
from faces import SPLITS, draw, dub_pair
from media import parse_box, paste_box, square
from model import Cache, Cond, has_kernel, load_dit
from runtime import Fail, mixed, opt
from syncnet import find_weights

SHIFT = 5.0  # of the time grid (paper: 5)
STEPS = 50  # of the teacher's grid (paper: 50)
FACE_SECONDS, FACE_SCALE = 8, 3  # of a drawn person who says something
LEAN = 0.1, 0.2  # how far a token's first frame leans to the one before: in a chunk, at its start


def shift(u, s=SHIFT):
    """u in 0..1 -> t in 0..1, more of it near noise for s > 1."""
    return s * u / (1 + (s - 1) * u)


def tau(j, steps=STEPS):
    """The time of index j of the shifted grid: j = 0 is noise, j = steps clean; j = 20, 30, 40 of
    50 are t = .882, .769, .556."""
    return shift(1 - j / steps)


def student_times(cfg):
    """The times of the student's calls: noise (told as .999, the last time that training knows),
    then on to the landing. At j = 30 half as much of the first guess is left in x_t as at 40
    (.23, .44): more is invented anew, and with a small network that is softer."""
    last = cfg.student_steps - 1
    return [0.999] + [tau(cfg.landing * i / last) for i in range(1, last + 1)]


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
    n = min(4 * cfg.chunk, video.shape[1])
    return torch.cat([video[:, :1].repeat_interleave(n, 1), video[:, : video.shape[1] - n]], 1)


@torch.no_grad()
def embed_clip(net, source, mel, start=0, end=None):
    """Latent frames start..end of source (B, T, S, S, 3) uint8 and mel (B, 4 T, MELS) -> Cond."""
    end = source.shape[1] // 4 if end is None else end
    video, part = to_float(middle(source)), slice(4 * start, 4 * end)
    reference = previous_chunk(video, net.cfg)
    with mixed(net):
        return net.embed(video[:, part], reference[:, part], data.hearing(mel, start, end))


def join(x0, mask, chunk, before=None):
    """Smooth the seams in time where tokens meet, as video codecs do those between blocks: in the
    mask, the first frame of each token leans to the last one of the token before. x0 (B, L, N, P)
    from the start of a chunk on, `before` the x0 that ends there -> x0 to show. (The cache holds it
    unjoined, as in training.) At small, frames then change at borders as much as elsewhere, 1.1 to
    1.2 times as much as the truth's; without, 1.5 times where a chunk starts. More costs sync."""
    n = x0.shape[-1] // 4  # values of a frame
    first = x0[:, :1, :, :n] if before is None else before[:, -1:, :, -n:]
    last = torch.cat([first, x0[:, :-1, :, -n:]], 1)
    starts = torch.arange(x0.shape[1], device=x0.device) % chunk == 0
    share = torch.where(starts, LEAN[1], LEAN[0])[:, None, None] * mask[:, :n]
    leaning = torch.lerp(x0[..., :n], last.to(x0.dtype), share.to(x0.dtype))
    return torch.cat([leaning, x0[..., n:]], -1)


def to_frames(net, x0, source, before=None, blend=True):
    """x0 (B, L, N, P), laid over source (B, T, S, S, 3) uint8 through the soft mask -> uint8.
    blend=False: with no soft edge, for those who blend in the frame that the square is cut from."""
    dub = to_pixels(join(x0, net.mask, net.cfg.chunk, before), net.cfg.patch)
    if blend:
        dub = torch.lerp(to_float(mouth_rectangle(source)), dub.float(), net.blend.float())
    return paste(to_uint8(dub), source)


def guided(net, x_t, t, cond, scale):
    """x0_null + s (x0_audio - x0_null), a forward pass of twice the batch; s = 1 is the conditional
    prediction alone. scale: a number, or one a sample (B,)."""
    if not torch.is_tensor(scale) and scale == 1:
        return net(x_t, t, cond)
    t = torch.cat([t, t]) if torch.is_tensor(t) else t
    both = Cond(*(torch.cat(pair) for pair in zip(cond, net.without_audio(cond))))
    with_audio, without = net(torch.cat([x_t, x_t]), t, both).chunk(2)
    scale = scale.view(-1, 1, 1, 1) if torch.is_tensor(scale) else scale
    return without + scale * (with_audio - without)


@torch.no_grad()
def euler(net, cond, steps=STEPS, guidance=1.0, rng=None):
    """Noise -> x0 (B, L, N, P) along the shifted grid by Euler steps of the velocity."""
    x = torch.randn(cond.known.shape, generator=rng).to(cond.known.device)
    for j in range(steps):
        t, following = tau(j, steps), tau(j + 1, steps)
        x0 = guided(net, x, t, cond, guidance).float()
        x = x + (following - t) * to_velocity(x, x0, t)
    return x


def dub_teacher(net, source, mel, steps=STEPS, guidance=1.0, latents=12, seed=0):
    """Dub whole clips with the bidirectional model, in windows of `latents` latent frames, as long
    as it was trained on (the last one is moved back to end with the clip). source (B, T, S, S, 3)
    uint8, mel (B, 4 T, MELS) -> uint8 like source."""
    rng, L = torch.Generator().manual_seed(seed), source.shape[1] // 4
    x0 = torch.empty(len(source), L, *net.mask.shape, device=source.device)
    for start in range(0, L, latents):
        start = max(0, min(start, L - latents))
        cond = embed_clip(net, source, mel, start, min(L, start + latents))
        with mixed(net):
            x0[:, start : start + latents] = euler(net, cond, steps, guidance, rng)
    return to_frames(net, x0, source)


def in_chunks(cond, k):
    """The Cond of a whole clip -> [Cond] of k latent frames each."""
    return [Cond(*parts) for parts in zip(*(x.split(k, 1) for x in cond))]


def seeded(seed):
    """Like torch.randn_like, the same numbers on every device."""
    rng = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=rng).to(x.device, non_blocking=True)


@torch.no_grad()
def generate(net, conds, noise=torch.randn_like):
    """The student's loop. conds: an iterable of Cond, one chunk each -> yields x0 (B, chunk, N, P),
    one chunk each. noise(x): Gaussian noise of the shape of x."""
    cache = None
    for cond in conds:
        empty = cond.known.float()
        with mixed(net):
            if cache is None:
                cache = Cache(net, len(empty))
                first, *later = student_times(net.cfg)
                mods = {t: net.modulation(t) for t in (first, *later, 0.0)}
            x0 = net(noise(empty), mods[first], cond, cache=cache).float()
            for t in later:
                # Fresh noise, not the first: with that, x_t would lie on a straight line from noise
                # to x0, and the net be asked about its own mistakes as if they were noise.
                x_t = add_noise(x0, noise(empty), t)
                x0 = net(x_t, mods[t], cond, cache=cache).float()
        yield x0  # before the cache is written: the next chunk needs that, a viewer does not
        with mixed(net):
            net(x0, mods[0.0], cond, cache=cache, store=True)
        cache.advance()


def noise_like(x, rng):
    return torch.randn(x.shape, generator=rng, device=x.device)


def rollout(net, cond, call, rng):
    """`generate` for training (self-forcing): the student's own clip (B, L, N, P), chunk by chunk
    as at inference, stopped in every chunk at the same `call`, the only one that carries gradient
    (if that is on)."""
    cache, times, outputs = Cache(net, len(cond.known)), student_times(net.cfg), []
    for part in in_chunks(cond, net.cfg.chunk):
        still = Cond(*(x.detach() for x in part))
        x_t = noise_like(part.known, rng)
        with torch.no_grad():
            for t, following in zip(times[:call], times[1:]):
                x0 = net(x_t, t, still, cache=cache).float()
                x_t = add_noise(x0, noise_like(x0, rng), following)
        x0 = net(x_t, times[call], part, cache=cache).float()
        outputs.append(x0)
        with torch.no_grad():
            net(x0, 0.0, still, cache=cache, store=True)
        cache.advance()
    return torch.cat(outputs, 1)


def dub_student(net, source, mel, seed=0):
    """Dub whole clips chunk by chunk. source (B, T, S, S, 3) uint8, T a multiple of a chunk's
    frames, mel (B, 4 T, MELS) -> uint8 like source."""
    chunks = in_chunks(embed_clip(net, source, mel), net.cfg.chunk)
    return to_frames(net, torch.cat(list(generate(net, chunks, seeded(seed))), 1), source)


def chunk_mel(audio, c, cfg):
    """What chunk c hears: (1, back + 16 chunk + ahead, MELS), bit for bit that of the whole file.
    Reads no sample beyond the look-ahead and the 7.5 ms that its last mel frame reaches further."""
    per, chunk = RATE // FPS, 4 * cfg.chunk
    margin = -(-max(AUDIO_BACK, AUDIO_AHEAD) // 4) + 1  # video frames; one for the mel's window
    lo, hi = chunk * c - margin, chunk * (c + 1) + margin
    end = chunk * (c + 1) * per + data.HOP * AUDIO_AHEAD + 120
    part = np.asarray(audio[max(0, lo * per) : end], dtype=np.float32)
    before = max(0, -lo * per)
    part = np.pad(part, (before, (hi - lo) * per - before - len(part)))
    mel = data.log_mel(part)[None]
    mel = mel[:, 4 * margin - AUDIO_BACK : mel.shape[1] - 4 * margin + AUDIO_AHEAD]
    at = torch.arange(mel.shape[1]) + 4 * chunk * c - AUDIO_BACK  # mel frames of the file
    mel[:, (at < 0) | (at >= 4 * -(-len(audio) // per))] = data.SILENCE
    return mel


def chunks_in(source, audio, cfg):
    """What comes in of a stream: (video (1, 4 chunk, S, S, 3) uint8, what is heard, and how many
    frames were there: less than a chunk's at the end, where the last one is held still)."""
    frames, n, shape = iter(source), 4 * cfg.chunk, (cfg.size, cfg.size, 3)
    for c in itertools.count():
        taken = [torch.as_tensor(frame) for frame in itertools.islice(frames, n)]
        if not taken:
            return
        for frame in taken:
            if frame.shape != shape or frame.dtype != torch.uint8:
                what = f"{frame.dtype} frames of {tuple(frame.shape)}"
                raise Fail(f"{what} where the model needs uint8 {shape}")
        video = torch.stack(taken + taken[-1:] * (n - len(taken)))[None]
        yield video, chunk_mel(audio, c, cfg), len(taken)


def stream(net, source, audio, seed=0, compile=False, blend=True):
    """Dub a stream. source: an iterable of (S, S, 3) uint8 frames at 25 fps; audio: (n,) float32 at
    16 kHz, anything that slices and has a length. Yields (4 chunk = 12, S, S, 3) uint8, less at
    the end. Holds one chunk, the one before, and the cache.

    compile: once the window is full, every chunk is the same work at the same addresses. So it is
    captured once, as a CUDA graph, and replayed by one call instead of hundreds. (Attention by
    kernels.py: set net.fused.) Noise is the device's own: another GPU or CPU, other details."""
    cfg, device, n = net.cfg, net.head.weight.device, 4 * net.cfg.chunk
    if compile and device.type != "cuda":
        raise Fail("--compile on captures CUDA graphs, which needs an NVIDIA GPU")
    rng, graph, made = torch.Generator(device).manual_seed(seed), None, None
    eps = torch.empty(cfg.student_steps, 1, cfg.chunk, *net.mask.shape, device=device)
    turns = itertools.cycle(eps)
    now, last = [], []  # Cond of this chunk; x0, Cond of the last

    def conds():
        reference = to_float(middle(pixels[:, :1])).repeat_interleave(n, 1)
        while True:
            video = to_float(middle(pixels))
            with mixed(net), torch.no_grad():
                cond = net.embed(video, reference, heard)
            reference.copy_(video)
            now[:] = cond
            yield cond

    def chunk():
        """All that the device does for a chunk, after the cache pass over the one before."""
        x0 = next(made)
        frames = to_frames(net, x0, pixels, last[0] if last else None, blend)
        last[:] = x0, *now
        return frames

    for c, (video, mel, length) in enumerate(chunks_in(source, audio, cfg)):
        if made is None:
            pixels, heard = video.to(device, copy=True), mel.to(device, copy=True)
            made = generate(net, conds(), lambda x: next(turns))
        pixels.copy_(video)
        heard.copy_(mel)
        eps.normal_(generator=rng)
        if compile and graph is None and c * cfg.chunk >= cfg.sink + cfg.window:
            graph, read = torch.cuda.CUDAGraph(), list(last)
            with torch.cuda.graph(graph):
                frames = chunk()
                for old, new in zip(read, last):  # the next cache pass reads there
                    old.copy_(new)
        if graph is None:
            frames = chunk()
        else:
            graph.replay()
        yield frames[0, :length].cpu()


def clock(frames_of, device):
    """Time an iterable of uint8 frames (n, S, S, 3): (frames a second, seconds to the first frame).
    Pixels and samples are in memory when the clock starts; everything from there to uint8 frames in
    host memory is included."""
    runtime.synchronize(device)
    begun, first, count = time.perf_counter(), None, 0
    for frames in frames_of:
        frames.cpu()
        first = first or time.perf_counter() - begun
        count += len(frames)
    return count / (time.perf_counter() - begun), first


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
    """A drawn person of held-out people says `audio`, samples or a Sound -> cfg.out, in sound and
    picture. He was drawn saying other words, for FACE_SECONDS; they are played back and forth."""
    seed = SPLITS["held-out"] + 2 * cfg.face
    face = draw(seed, FACE_SECONDS * FPS, net.cfg.size).video
    there_and_back = torch.cat([face, face[1:-1].flip(0)])
    total = -(-len(audio) * FPS // RATE)
    source = (there_and_back[i % len(there_and_back)] for i in range(total))
    side = FACE_SCALE * net.cfg.size
    with media.write_video(cfg.out, (side, side), audio) as put:
        for frames in stream(net, source, audio, cfg.seed, cfg.compile == "on"):
            for frame in frames:
                put(square(frame, side).numpy())
    print(f"{cfg.out}: {total / FPS:.1f} s, said by the drawn person --face {cfg.face}")


def dub_file(net, cfg, audio):
    """cfg.video with `audio`, samples or a Sound -> cfg.out, as long as the sound, at the video's
    own size. Nothing is held but a chunk."""
    total = -(-len(audio) * FPS // RATE)
    source = play(cfg.video, total)
    first = next(source)
    box = parse_box(cfg.box, first)
    mask, waiting = mouth_mask(box[2])[:, :, None], []  # waiting: whole frames being dubbed

    def squares():
        for frame in itertools.chain([first], source):
            waiting.append(frame)
            yield square(frame, net.cfg.size, box)

    size, begun, to_pipe = (first.shape[1], first.shape[0]), time.time(), cfg.out == "-"
    pipe = contextlib.nullcontext(sys.stdout.buffer.write)
    with pipe if to_pipe else media.write_video(cfg.out, size, audio) as put:
        # Blended once, at the frame's own size.
        dubs = stream(net, squares(), audio, cfg.seed, cfg.compile == "on", blend=False)
        for frames in dubs:
            for dub in frames:
                put(paste_box(waiting.pop(0), dub, box, mask).numpy())
    pace = f"in {time.time() - begun:.1f} s, {total / (time.time() - begun):.0f} frames a second"
    said = f"{cfg.out}: {total} frames {pace}, reading and writing included"
    print(said, file=sys.stderr if to_pipe else sys.stdout)


def side_by_side(path, net, pairs, seed=0, compile=False):
    """Dub drawn (source, truth) pairs -> an mp4, source | dub | truth one pair after another with
    the dub's sound, and beside it a PNG of eight moments of each: rows of source, dub, truth."""
    frames, sheet, scale = [], [], max(1, 256 // net.cfg.size)
    for source, truth in pairs:
        dub = torch.cat(list(stream(net, source.video, truth.audio, seed, compile)))
        frames.append(torch.cat([source.video, dub, truth.video], 2))
        sheet += [torch.cat(list(v[6::12][:8]), 1) for v in (source.video, dub, truth.video)]
    sound = np.concatenate([truth.audio for _, truth in pairs])
    frames = torch.cat(frames).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    with media.write_video(path, (frames.shape[2], frames.shape[1]), sound) as put:
        for frame in frames:
            put(frame.numpy())
    half = max(1, scale // 2)
    sheet = torch.cat(sheet).repeat_interleave(half, 0).repeat_interleave(half, 1)
    matplotlib.image.imsave(Path(path).with_suffix(".png"), sheet.numpy())


@dataclasses.dataclass
class Options:
    video: str = opt("", "the recording to dub; a held-out drawn face if not given")
    audio: str = opt("", "the sound to dub it with; the video's own if not given")
    text: str = opt("", "or words, which eSpeak NG says")
    voice: str = opt("en-us", "of --text: an eSpeak language, or one with a variant, de+f4")
    face: int = opt(3, "without --video: the drawn person who says it", least=0)
    out: str = opt("out/dub.mp4", "the dubbed video; - for raw RGB frames on standard output")
    box: str = opt("", "X,Y,SIDE of the face in pixels; the centred square if not given")
    weights: str = opt("", "a student's checkpoint; the bundled one if not given")
    device: str = opt("", "cuda, mps or cpu; the best there is if not given")
    precision: str = opt("", *runtime.PRECISIONS)
    seed: int = opt(0, least=0)
    attention: str = opt("auto", "auto: kernels.py on NVIDIA's GPUs, else dense", ("auto", "dense"))
    compile: str = opt("off", "a chunk as one CUDA graph, on a GPU", ("on", "off"))


def main(argv):
    cfg = runtime.options(Options, argv, __doc__)
    if (cfg.box or cfg.out == "-") and not cfg.video:
        raise Fail("--box or --out - without --video: which recording should it dub?")
    if cfg.audio and cfg.text:
        raise Fail("--audio and --text: which of them should be said?")
    given = [path for path in (cfg.video, cfg.audio) if os.path.exists(path)]
    if os.path.exists(cfg.out) and any(os.path.samefile(cfg.out, path) for path in given):
        raise Fail(f"--out {cfg.out} is what is to be dubbed; choose another name")
    device = runtime.find_device(cfg.device, cfg.precision)
    path = find_weights("student", cfg.weights)
    net = load_dit(path, device, runtime.fast_dtype(device))
    if net.stage == "teacher":
        raise Fail(f"{path}: a teacher, which cannot stream; distil a student by distill.py")
    net.fused = cfg.attention == "auto" and has_kernel(net)
    if device.type == "cuda":
        print(f"attention: {'kernels.py' if net.fused else 'dense'}", file=sys.stderr)
    if cfg.video or cfg.audio or cfg.text:
        said = voices.say(cfg.text, cfg.voice) if cfg.text else media.Sound(cfg.audio or cfg.video)
        return dub_file(net, cfg, said) if cfg.video else dub_face(net, cfg, said)
    pairs = [dub_pair(1000 + cfg.seed, 96, net.cfg.size)]
    side_by_side(cfg.out, net, pairs, cfg.seed, cfg.compile == "on")
    print(f"{cfg.out} (and .png): source | dub | truth, a face and a voice never seen in training")


if __name__ == "__main__":
    runtime.run(main)
