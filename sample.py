"""Dub a video: the teacher's many-step sampler, and the student that streams chunk by chunk in two denoising steps.

    python sample.py                                            # a held-out drawn face and voice: out/dub.mp4
    python sample.py --video IN.mp4 --audio IN.wav --out OUT.mp4
    python sample.py --video IN.mp4 --audio IN.wav --out OUT.mp4 --box 40,10,128 --weights out/tiny/student.pt
    python sample.py --video IN.mp4 --audio IN.wav --out - | ffplay -f rawvideo -pixel_format rgb24 -video_size 640x480 -framerate 25 -    # IN.mp4's size

From Python (frames come as soon as they are made; source and audio may be longer than memory):

    for frames in stream(student, source, audio):               # (12, S, S, 3) uint8, 0.48 s at a time
        show(frames)

Flow matching: x_t = (1 - t) x0 + t eps, so t = 0 is clean and t = 1 is noise, and the velocity is v = eps - x0.
"""
import contextlib
import copy
import dataclasses
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import torch
import torch.nn.functional as F

import data
import runtime
import syncnet
from data import FPS, RATE, Fail, hearing, patchify, picture, to_float, to_uint8
from model import Cache, Cond, load_dit
from runtime import mixed

SHIFT = 5.                  # paper: 5
STEPS = 50                  # the teacher's grid (paper: 50)
TIMES = (.999, .556)        # the student's two steps: noise, and j = 40 of the grid (paper: j = 30, .769)
LEAN = .2, .3               # how far the first frame of a token leans towards the one before: inside a chunk, and at its start


# ---------------------------------------------------------------------------------------------------- flow-matching time
def shift(u, s=SHIFT):
    """Time shift: u in 0..1 -> t in 0..1, more of it near noise for s > 1."""
    return s * u / (1 + (s - 1) * u)


def tau(j, steps=STEPS, s=SHIFT):
    """The time of index j of the shifted grid: j = 0 is noise, j = steps is clean; j = 20, 30, 40 of 50 are .882, .769, .556."""
    return shift(1 - j / steps, s)


def per_latent(t):
    """t, a float or (B, L or 1) -> something that broadcasts over patches (B, L, N, P)."""
    return t[..., None, None] if torch.is_tensor(t) else t


def add_noise(x0, eps, t):
    """x_t = (1 - t) x0 + t eps."""
    return torch.lerp(x0.to(eps.dtype), eps, per_latent(t))


def to_velocity(x_t, x0, t):
    """v = (x_t - x0) / t, for t > 0."""
    return (x_t - x0) / per_latent(t)


# ------------------------------------------------------------------------------------------------------------ conditions
def held_still(frame, latents):
    """One frame (B, 1, S, S, 3), repeated for that many latent frames -> (B, 4 latents, S, S, 3)."""
    return frame.expand(-1, 4 * latents, -1, -1, -1)


def previous_chunk(source, cfg):
    """The reference at inference: the source one chunk ago, never the frames being replaced; at the start its first frame, held
    still. source (B, T, S, S, 3) -> the same shape."""
    n = 4 * cfg.chunk
    return torch.cat([held_still(source[:, :1], min(cfg.chunk, source.shape[1] // 4)), source[:, :-n]], 1)


# ---------------------------------------------------------------------------------------------------------------- output
def join(x0, mask, chunk, before=None):
    """Smooth the seams in time, where tokens meet, as video codecs do those between blocks: in the mask, the first frame of each token leans
    towards the last one of the token before. x0 (B, L, N, P) from the start of a chunk on, `before` the x0 that ends there, if any -> x0 to show. The
    cache holds it unjoined, as in training."""
    n = x0.shape[-1] // 4                                                    # values of a frame
    last = torch.cat([x0[:, :1, :, :n] if before is None else before[:, -1:, :, -n:], x0[:, :-1, :, -n:]], 1)
    share = torch.where(torch.arange(x0.shape[1], device=x0.device) % chunk == 0, LEAN[1], LEAN[0])[:, None, None] * mask[:, :n]
    return torch.cat([torch.lerp(x0[..., :n], last.to(x0.dtype), share.to(x0.dtype)), x0[..., n:]], -1)


# --------------------------------------------------------------------------------------------------- teacher: many steps
def guided(model, x_t, t, cond, audio, null, guidance):
    """x0_null + s (x0_audio - x0_null), one forward pass of twice the batch; s = 1 is the conditional prediction alone."""
    if guidance == 1:
        return model(x_t, t, cond, audio)
    twice = lambda x: torch.cat([x, x])                                       # noqa: E731
    t = twice(t.expand(x_t.shape[0], -1)) if torch.is_tensor(t) else t
    with_audio, without = model(twice(x_t), t, Cond(*map(twice, cond)), torch.cat([audio, null])).chunk(2)
    return without + guidance * (with_audio - without)


def null_audio(model, latents, batch):
    """embed_audio of nothing, for guidance: (batch, latents, depth, D)."""
    null = model.audio_to_blocks(model.null_audio).view(1, 1, model.cfg.depth, -1)
    return null.expand(batch, latents, -1, -1)


@torch.no_grad()
def euler(model, cond, audio, steps=STEPS, guidance=1., rng=None):
    """Noise -> x0 patches (B, L, N, P) along the shifted grid by Euler steps of the velocity."""
    x = torch.randn(cond.known.shape, generator=rng).to(cond.known.device)
    null = null_audio(model, x.shape[1], x.shape[0])
    for j in range(steps):
        t, following = tau(j, steps), tau(j + 1, steps)
        x0 = guided(model, x, t, cond, audio, null, guidance).float()
        x = x + (following - t) * to_velocity(x, x0, t) if following > 0 else x0
    return x


@torch.no_grad()
def dub_teacher(model, source, mel, steps=STEPS, guidance=1., latents=12, seed=0):
    """Dub whole clips with the bidirectional model, in windows of `latents` latent frames, the length it was trained on (the last
    window is moved back to end with the clip). source (B, T, S, S, 3) uint8, mel (B, 4 T, MELS) -> uint8 like source."""
    rng, L = torch.Generator().manual_seed(seed), source.shape[1] // 4
    p = model.cfg.patch
    reference, source = patchify(to_float(previous_chunk(source, model.cfg)), p), patchify(to_float(source), p)
    out = torch.empty(*source.shape[:2], *model.mask.shape, device=source.device)
    with mixed(source.device):
        for a in range(0, L, latents):
            a = max(0, min(a, L - latents))
            b = min(L, a + latents)
            cond, audio = model.embed_cond(source[:, a:b], reference[:, a:b]), model.embed_audio(hearing(mel, model.cfg, a, b))
            out[:, a:b] = euler(model, cond, audio, steps, guidance, rng)
    return to_uint8(picture(join(out, model.mask, model.cfg.chunk), source, p))


# ------------------------------------------------------------------------------------------- student: two steps a chunk
def in_chunks(cond, audio, k):
    """Conditions of a whole clip -> [(Cond, audio)] of k latent frames each."""
    return [(Cond(*(c[:, a:a + k] for c in cond)), audio[:, a:a + k]) for a in range(0, audio.shape[1], k)]


def seeded(seed):
    """Like torch.randn_like, the same numbers on every device."""
    rng = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=rng).to(x.device, non_blocking=x.is_cuda)


@torch.no_grad()
def generate(model, conditions, times=None, noise=torch.randn_like, make_cache=Cache):
    """The student's loop. conditions: an iterable of (Cond, audio), one chunk each -> yields x0 patches, one chunk each. noise(x): Gaussian
    noise of the shape of x. In the paper's three passes a chunk, it is

        x0 = model(noise, t1);  x0 = model(add_noise(x0, fresh noise, t2), t2);  model(x0, 0, store="finished");  cache.advance();  yield x0

    The last pass is not needed before the next chunk, so here it runs in one forward with that chunk's first: two calls a chunk, the same numbers. A
    model whose `cache_from` is "last" has no such pass: its last denoising pass writes the cache.

    A compiled model (`model.compile(dynamic=False, mode="reduce-overhead")`: CUDA graphs) is run uncompiled until the window is full: its shapes
    still change till then."""
    cache, x0, before, times = None, None, None, times or model.times or TIMES
    for cond, audio in conditions:
        device, k, empty = cond.known.device, model.cfg.chunk, cond.known.float()
        with mixed(device):
            if cache is None:
                cache, mods = make_cache(model, len(cond.known), runtime.fast_dtype(device)), [model.modulation(t) for t in times]
                # A time's modulation is computed once; joint: of a finished chunk, t = 0, and the next one's first call.
                joint = torch.cat([model.modulation(0.).expand(-1, k, -1, -1), mods[0].expand(-1, k, -1, -1)], 1)
            call = model if cache.full else model.forward        # the second is never compiled
            for i, t in enumerate(times):
                x = add_noise(x0, noise(empty), t) if i else noise(empty)
                given = x, mods[i], cond, audio
                store = "passing" if model.cache_from == "last" and i == len(times) - 1 else ""
                if i == 0 and before is not None:                # the chunk before comes along, to be cached
                    clean, cond_before, audio_before = before
                    both = lambda a, b: torch.cat([a, b], 1)                                                # noqa: E731
                    given, store = (both(clean, x), joint, Cond(*map(both, cond_before, cond)), both(audio_before, audio)), "finished"
                x0 = call(*given, cache=cache, store=store).to(torch.float32, copy=True)     # a CUDA graph's output is overwritten by its next run
                if store:
                    cache.advance()
        before = (x0, cond, audio) if model.cache_from == "clean" else None
        yield x0


def dub_student(model, source, mel, times=None, seed=0):
    """Dub a batch of whole clips chunk by chunk. source (B, T, S, S, 3) uint8, T a multiple of a chunk's frames -> uint8 like source."""
    p = model.cfg.patch
    reference, source = patchify(to_float(previous_chunk(source, model.cfg)), p), patchify(to_float(source), p)
    with mixed(source.device), torch.no_grad():
        cond, audio = model.embed_cond(source, reference), model.embed_audio(hearing(mel, model.cfg))
    x0 = torch.cat(list(generate(model, in_chunks(cond, audio, model.cfg.chunk), times, seeded(seed))), 1)
    return to_uint8(picture(join(x0, model.mask, model.cfg.chunk), source, p))


def stream(model, source, audio, times=None, seed=0, make_cache=Cache):
    """Dub a stream. source: an iterable of (S, S, 3) uint8 frames at 25 fps; audio: (samples,) float32 at 16 kHz, anything
    that slices and has a length. Yields (n, S, S, 3) uint8, n = 12 frames (0.48 s; less at the end). Holds one chunk, the one before, and the cache."""
    cfg, device = model.cfg, model.head.weight.device
    n = 4 * cfg.chunk
    under_way = []                                  # source patches and frame count of the chunk being made

    def chunks():
        frames, before = iter(source), None
        for c in itertools.count():
            taken = list(itertools.islice(frames, n))
            if not taken:
                return
            video = torch.stack([torch.as_tensor(f) for f in taken + taken[-1:] * (n - len(taken))])[None]
            if video.shape[2:] != (cfg.size, cfg.size, 3) or video.dtype != torch.uint8:
                raise Fail(f"{video.dtype} frames of {tuple(video.shape[2:])} where the model needs uint8 ({cfg.size}, {cfg.size}, 3); see data.square")
            video, mel = to_float(video.to(device)), chunk_mel(audio, c, cfg).to(device)
            patches = patchify(video, cfg.patch)
            before = patchify(held_still(video[:, :1], cfg.chunk), cfg.patch) if before is None else before
            with mixed(device), torch.no_grad():
                parts = model.embed_cond(patches, before), model.embed_audio(mel)
            before, under_way[:] = patches, [patches, len(taken)]
            yield parts

    before = None
    for x0 in generate(model, chunks(), times, seeded(seed), make_cache):
        patches, length = under_way
        yield to_uint8(picture(join(x0, model.mask, cfg.chunk, before), patches, cfg.patch))[0, :length].cpu()
        before = x0


def chunk_mel(audio, c, cfg):
    """What chunk c hears: (1, back + 16 chunk + ahead, MELS), bit for bit that of the whole file. Reads no sample beyond the
    look-ahead and the 7.5 ms that its last mel frame reaches further."""
    margin = -(-max(cfg.audio_back, cfg.audio_ahead) // 4) + 1               # video frames; one more for the mel's own window
    lo, hi = 4 * cfg.chunk * c - margin, 4 * cfg.chunk * (c + 1) + margin
    per = RATE // FPS
    end = data.HOP * (16 * cfg.chunk * (c + 1) + cfg.audio_ahead) + 120
    part = np.asarray(audio[max(0, lo * per):end], dtype=np.float32)
    part = np.pad(part, (max(0, -lo * per), hi * per - max(0, lo * per) - len(part)))
    mel = data.log_mel(part)[None, 4 * margin - cfg.audio_back: len(part) // data.HOP - 4 * margin + cfg.audio_ahead]
    at = torch.arange(mel.shape[1]) + 16 * cfg.chunk * c - cfg.audio_back              # mel frames of the file; outside it is silence
    mel[:, (at < 0) | (at >= 4 * -(-len(audio) // per))] = data.SILENCE
    return mel


def once(dub):
    """dub() -> uint8 (1, n, S, S, 3), called when `clock` asks for its frames."""
    yield dub()[0]


def clock(frames_of, device):
    """Time an iterable of uint8 frames (n, S, S, 3): (frames a second, seconds to the first frame). Pixels and samples are in
    memory when the clock starts; everything from there to uint8 frames in host memory is included."""
    runtime.synchronize(device)
    begun, first, count = time.perf_counter(), None, 0
    for frames in frames_of:
        frames.cpu()
        first = first or time.perf_counter() - begun
        count += len(frames)
    return count / (time.perf_counter() - begun), first


# ------------------------------------------------------------------------------------------------- dubbing real footage
def play(path, total):
    """Yield `total` frames of a video, back and forth if it is shorter. Then its frames are kept in a file on disk, not in memory."""
    _, width, height = data.probe(path)
    have = data.picture_seconds(path, total / FPS + 1) * FPS
    short = have < total - 1
    if short:
        data.free_space(tempfile.gettempdir(), int(have + 2) * width * height * 3, "set TMPDIR to a folder on a larger disk")
    with tempfile.TemporaryFile() as spool:
        n = 0
        for frame in itertools.islice(data.read_video(path), total):
            if short:
                spool.write(frame.numpy().tobytes())
            yield frame
            n += 1
        for k in range(n, total):
            if not short:                            # rounding of the rate: a frame or two
                yield frame
                continue
            k %= max(1, 2 * n - 2)
            spool.seek((k if k < n else 2 * n - 2 - k) * frame.numel())
            yield torch.frombuffer(bytearray(spool.read(frame.numel())), dtype=torch.uint8).view(frame.shape)


def paste(frame, dub, box, mask):
    """Put dub (S, S, 3) uint8 into frame (H, W, 3) uint8 at box, through the mask (side, side, 1). The rest stays as it was."""
    x, y, side = box
    up = F.interpolate(dub.permute(2, 0, 1)[None].float(), size=(side, side), mode="bicubic", align_corners=False, antialias=side < len(dub))
    frame = frame.clone()
    cut = frame[y:y + side, x:x + side].float()
    frame[y:y + side, x:x + side] = torch.lerp(cut, up[0].permute(1, 2, 0), mask).round().clamp(0, 255).to(torch.uint8)
    return frame


def dub_file(model, cfg):
    """cfg.video with the sound of cfg.audio -> cfg.out, as long as the sound, at the video's own size. Nothing is held but a chunk."""
    audio = data.Sound(cfg.audio)
    total = -(-len(audio) * FPS // RATE)
    source = play(cfg.video, total)
    first = next(source)
    box = data.parse_box(cfg.box, first)
    mask = data.mouth_mask(box[2])[:, :, None]
    frames, kept = itertools.chain([first], source), []

    def squares():
        for frame in frames:
            kept.append(frame)
            yield data.square(frame, model.cfg.size, box)

    height, width = first.shape[:2]
    begun = time.time()
    raw = contextlib.nullcontext(lambda frame: sys.stdout.buffer.write(np.ascontiguousarray(frame)))
    with raw if cfg.out == "-" else data.write_video(cfg.out, (width, height), cfg.audio) as put:
        for dub in stream(model, squares(), audio, seed=cfg.seed):
            for made in dub:
                put(paste(kept.pop(0), made, box, mask).numpy())
    print(f"{cfg.out}: {total} frames, {width}x{height}, in {time.time() - begun:.1f} s (files and all, {total / (time.time() - begun):.0f} frames a second)",
          file=sys.stderr if cfg.out == "-" else sys.stdout)


def side_by_side(path, model, pairs, seed=0, scale=4):
    """Dub drawn (source, truth) pairs -> an mp4, source | dub | truth one pair after another with the dub's sound, and beside it a PNG
    of eight moments of each: rows of source, dub, truth."""
    size, frames, sound, sheet = model.cfg.size, [], [], []
    for source, truth in pairs:
        dub = torch.cat(list(stream(model, source.video, truth.audio, seed=seed)))
        frames.append(torch.cat([source.video, dub, truth.video], 2))
        sheet += [torch.cat(list(v[6::max(1, len(v) // 8)][:8]), 1) for v in (source.video, dub, truth.video)]
        sound.append(truth.audio)
    frames = torch.cat(frames)
    big = frames.repeat_interleave(scale, 1).repeat_interleave(scale, 2) if scale > 1 else frames
    with data.write_video(path, (3 * size * scale, size * scale), np.concatenate(sound)) as put:
        for frame in big:
            put(frame.numpy())
    half = max(1, scale // 2)
    sheet = torch.cat(sheet).repeat_interleave(half, 0).repeat_interleave(half, 1)
    matplotlib.image.imsave(Path(path).with_suffix(".png"), sheet.numpy())


def closing_table(cfg, teacher, student, judge, device, spent):
    """Held-out dub pairs: teacher against student; then what each stage took."""
    teacher, student = (copy.deepcopy(net).to(runtime.fast_dtype(device)) for net in (teacher, student))      # as sample.py runs them
    pairs = data.held_out(cfg.table_clips, cfg.size, "held-out", device, 8 * cfg.chunk)
    source, truth, mel, _ = pairs
    one, audio, T = source[0].cpu(), data.dub_pair(0, source.shape[1], cfg.size)[1].audio, 4 * cfg.latents
    rows = [("truth", syncnet.judged(truth, pairs, judge, cfg.patch), None)]
    for name, scale in (("teacher, 50 steps, unguided", 1.), (f"teacher, 50 steps, guidance {cfg.guidance:g}", cfg.guidance)):
        dub = dub_teacher(teacher, source, mel, guidance=scale, latents=cfg.latents)
        window = lambda: dub_teacher(teacher, one[None, :T].to(device), data.log_mel(audio[:T * 640])[None].to(device), guidance=scale, latents=cfg.latents)  # noqa: E731
        rows.append((name, syncnet.judged(dub, pairs, judge, cfg.patch), clock(once(window), device)))
    list(stream(student, one[:24], audio, cfg.times))                                                # warm up
    speed = clock(stream(student, one, audio, cfg.times), device)
    rows.append((f"student, {len(cfg.times)} steps a chunk", syncnet.judged(dub_student(student, source, mel, cfg.times), pairs, judge, cfg.patch), speed))
    print(f"\n{cfg.table_clips} held-out people dubbed to other words, {len(one) / data.FPS:.2f} s each, judged by an expert that trained on other people\n"
          f"{'':30} {'Sync-C':>7} {'PSNR dB':>8} {'landmark %':>11} {'sharp':>6} {'FPS':>7} {'TTFF ms':>8}")
    for name, q, speed in rows:
        psnr, timing = (f"{q['psnr']:8.2f}", f"{speed[0]:7.1f} {1000 * speed[1]:8.1f}") if speed else (" " * 8, "")
        print(f"{name:30} {q['sync_c']:7.3f} {psnr} {q['landmark']:11.2f} {q['sharp']:6.2f} {timing}")
    print("PSNR: in the mouth mask, against the exact dub; a blur pleases it. Landmark: error of the mouth's opening and width, percent of the side.\n"
          "Sharp: 1 if as sharp as the truth. TTFF: from the first chunk's pixels and samples in memory to its first frame as uint8.\n"
          + "Took: " + ", ".join(f"{k} {v:.0f} s" for k, v in spent.items()))


@dataclasses.dataclass
class Options:
    video: str = ""  # the recording to dub; a held-out drawn face if not given
    audio: str = ""  # the sound to dub it with; the video's own if not given
    out: str = "out/dub.mp4"  # where the dubbed video goes; - for raw RGB frames on standard output
    box: str = ""  # X,Y,SIDE of the face in pixels; the centred square if not given
    weights: str = ""  # a student's checkpoint; else the bundled one, else what distill.py made last
    device: str = ""  # cuda, mps or cpu; the best there is if not given
    precision: str = ""  # float32 or bfloat16; what the device multiplies fastest if not given
    seed: int = 0
    compile: bool = False  # torch.compile, with CUDA graphs on a GPU: takes a minute or so before it pays


def main(argv):
    cfg = data.options(Options, argv, __doc__)
    if (cfg.audio or cfg.box or cfg.out == "-") and not cfg.video:
        raise Fail("--audio, --box or --out - without --video: which recording should it dub?")
    if os.path.exists(cfg.out) and any(os.path.samefile(cfg.out, given) for given in (cfg.video, cfg.audio) if os.path.exists(given)):
        raise Fail(f"--out {cfg.out} is what is to be dubbed; choose another name")
    device = runtime.find_device(cfg.device, cfg.precision)
    path = syncnet.find_weights("student", cfg.weights)
    model = load_dit(path, device, runtime.fast_dtype(device))
    if model.stage == "teacher":
        raise Fail(f"{path}: a teacher, which cannot stream; give a student, or distil one with distill.py --teacher {path}")
    if cfg.compile:
        model.compile(dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)
    if cfg.video:
        cfg.audio = cfg.audio or cfg.video
        return dub_file(model, cfg)
    pair = data.dub_pair(1000 + cfg.seed, 96, model.cfg.size)
    side_by_side(cfg.out, model, [pair], cfg.seed)
    print(f"{cfg.out}: source | dub | truth, 3.84 s, a face and a voice that training never saw; {Path(cfg.out).with_suffix('.png')}: moments of it, in rows")


if __name__ == "__main__":
    data.run(main)
