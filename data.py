"""Pictures and sound: log-mel, patches, training samples, reading and writing real video.

    python data.py                          # out/data/clips.mp4 with its sound, and out/data/sheet.png: drawn people
    python data.py --size 128 --clips 6     # larger and more

Video is float in [-1, 1] inside and uint8 RGB outside, at 25 frames a second; audio is float32 mono at 16 kHz.
"""
import argparse
import dataclasses
import functools
import inspect
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg
import matplotlib.image
import numpy as np
import soundfile
import torch
import torch.nn.functional as F

from faces import ASIDE, FPS, RATE, SPLITS, Clip, draw, dub_pair, mouth_mask  # noqa: F401  Clip: for those who import this file

HOP = 160               # samples between mel frames: 100 a second, 4 to a video frame
MELS = 40               # mel bands, 60 Hz to 7.6 kHz
WINDOW = torch.hann_window(400)         # of 25 ms
SILENCE = (-5 + 1.5) / 3        # log-mel of nothing, for the frames before and after a file


class Fail(Exception):
    """Something that the person at the keyboard can mend. Printed as one line; exit code 2."""


# ---------------------------------------------------------------------------------------------------- mask and log-mel
def mouth_psnr(video, truth):
    """PSNR in dB inside the mouth mask, a clip each. video, truth (B, T, S, S, 3) uint8 -> (B,)."""
    mask = mouth_mask(video.shape[2]).to(video.device)[:, :, None]
    error = ((video.float() - truth.float()) ** 2 * mask).mean((1, 2, 3, 4)) / mask.mean()
    return 10 * (255 ** 2 / error.clamp(min=1e-3)).log10()


@functools.cache
def mel_filters():
    """(201, MELS) triangles on the HTK mel scale, 60 Hz to 7.6 kHz."""
    mel = lambda f: 2595 * np.log10(1 + f / 700)                                                      # noqa: E731
    edges = 700 * (10 ** (np.linspace(mel(60), mel(7600), MELS + 2) / 2595) - 1)
    freq = np.linspace(0, RATE / 2, 201)[:, None]
    rise, fall = (freq - edges[:-2]) / np.diff(edges)[:-1], (edges[2:] - freq) / np.diff(edges)[1:]
    return torch.from_numpy(np.maximum(0, np.minimum(rise, fall))).float()


def log_mel(audio):
    """audio (S,) float in [-1, 1] at 16 kHz, S a multiple of 640 -> (S / 160, MELS) float, about -1..1.

    Mel frame m sees the samples 160 m - 120 .. 160 m + 280 (25 ms, zeros past the ends): 4 frames to a video frame."""
    audio = F.pad(torch.as_tensor(audio, dtype=torch.float32), (120, 120))
    power = torch.view_as_real(torch.stft(audio, 400, HOP, window=WINDOW, center=False, return_complex=True)).square().sum(-1)
    return ((power.T @ mel_filters()).clamp(min=1e-5).log10() + 1.5) / 3


# ------------------------------------------------------------------------------------------------------------ patches
def patchify(video, p):
    """(B, T, S, S, 3) -> (B, L, G, 2 P): for each patch of the lower half, the one half a square above it, then itself."""
    B, T, H, W, _ = video.shape
    if T % 4 or H % (2 * p) or W % p:
        raise Fail(f"a video of {T} frames of {W}x{H} does not split into tokens of 4 frames x {p} x {p} pixels")
    x = video.reshape(B, T // 4, 4, 2, H // p // 2, p, W // p, p, 3)              # B L f half row p column p c
    return x.permute(0, 1, 4, 6, 3, 2, 5, 7, 8).reshape(B, T // 4, -1, 24 * p * p)


def unpatchify(x, p):
    """Inverse of patchify."""
    x = in_rows(x).unflatten(-1, (2, 4, p, p, 3))                                 # B L row column half f p p c
    B, L, _, n = x.shape[:4]
    return x.permute(0, 1, 5, 4, 2, 6, 3, 7, 8).reshape(B, 4 * L, n * p, n * p, 3)


def in_rows(x):
    """(B, L, G, C) -> (B, L, n/2, n, C): rows and columns of patches."""
    n = int((2 * x.shape[2]) ** .5)
    return x.unflatten(2, (n // 2, n))


def columns(n):
    """Which of n columns of patches the mouth mask touches. The others (2 of 8) are known altogether: no tokens are spent on them."""
    return slice(int(ASIDE * n), n - int(ASIDE * n))


def inner(x):
    """(B, L, G, C) of all places, see patchify -> (B, L, N, C) of those that are tokens."""
    x = in_rows(x)
    return x[:, :, :, columns(x.shape[3])].flatten(2, 3)


def picture(x, source, p):
    """x (B, L, N, P), what was generated, and source (B, L, G, 2 P), which has the rest -> video (B, T, S, S, 3)."""
    above, lower = in_rows(source.to(x.dtype)).split(12 * p * p, -1)
    tokens = columns(lower.shape[3])
    lower = torch.cat([lower[:, :, :, : tokens.start], x.unflatten(2, (lower.shape[2], -1)), lower[:, :, :, tokens.stop:]], 3)
    return unpatchify(torch.cat([above, lower], -1).flatten(2, 3), p)


def to_float(video):
    """uint8 0..255 -> float32 in [-1, 1]."""
    return video.float().div_(127.5).sub_(1)


def to_uint8(video):
    """float in [-1, 1] -> uint8 0..255."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def hearing(mel, cfg, start=0, end=None):
    """mel (B, M, MELS), 16 frames to a latent frame -> (B, back + 16 L + ahead, MELS): what the L latent frames from `start` to `end` hear.
    Each hears only its own 16, `back` before and `ahead` after them, so a chunk's audio features are those of the whole file."""
    lo, hi = 16 * start - cfg.audio_back, 16 * (mel.shape[1] // 16 if end is None else end) + cfg.audio_ahead
    part = mel[:, max(0, lo):hi]
    return F.pad(part, (0, 0, max(0, -lo), hi - max(0, lo) - part.shape[1]), value=SILENCE)


# ---------------------------------------------------------------------------------------------------- training samples
class Pairs(NamedTuple):
    """Dubs to be made, and their answer: source, truth (n, T, S, S, 3) uint8; mel (n, 4 T, MELS) of the truth; mouth (n, T, 2), see Clip."""
    source: torch.Tensor
    truth: torch.Tensor
    mel: torch.Tensor
    mouth: torch.Tensor

    @classmethod
    def of(cls, pairs, device):
        """From (source, truth) Clips."""
        mels, mouths = [log_mel(truth.audio) for _, truth in pairs], [torch.from_numpy(truth.mouth) for _, truth in pairs]
        return cls(*(torch.stack(x).to(device) for x in ([s.video for s, _ in pairs], [t.video for _, t in pairs], mels, mouths)))


def held_out(n, size, split, device, latents=24):
    """Pairs of n people of `split`, who say other words."""
    return Pairs.of([dub_pair(i, 4 * latents, size, split) for i in range(n)], device)


def mp4s(folder):
    """The mp4 files of a folder, in order. Fail: none."""
    found = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() == ".mp4")
    if not found:
        raise Fail(f"{folder}: no mp4 there; name a folder that holds some, or drop --folder")
    return found


class Bank:
    """Clips to train on, in memory: video (n, T, S, S, 3) uint8, mel (n, 4 T, MELS) float32, mouth (n, T, 2): see Clip; NaN where
    nobody drew it."""

    def __init__(self, size, frames, n, split="train", folder=""):
        """`n` drawn clips of `frames` frames, or (folder) up to n consecutive ones from real mp4s with sound, their centred square."""
        try:
            self.video = torch.empty(n, frames, size, size, 3, dtype=torch.uint8)
        except RuntimeError:
            raise Fail(f"{n} clips need {n * frames * size * size * 3 / 1e9:.0f} GB of memory; --clips for fewer") from None
        self.mel, self.mouth = torch.empty(n, 4 * frames, MELS), torch.full((n, frames, 2), torch.nan)
        if not folder:
            for i in range(n):
                clip = draw(SPLITS[split] + 2 * i, frames, size)
                self.video[i], self.mel[i], self.mouth[i] = clip.video, log_mel(clip.audio), torch.from_numpy(clip.mouth)
            return
        found, samples = 0, frames * RATE // FPS
        for path in mp4s(folder):
            if found == n:
                break
            try:
                audio, video, had = Sound(path), read_video(path), found
                for first in range(0, len(audio) - samples + 1, samples):
                    taken = [square(frame, size) for frame in itertools.islice(video, frames)]
                    if found == n or len(taken) < frames:
                        break
                    self.video[found], self.mel[found] = torch.stack(taken), log_mel(audio[first:first + samples])
                    found += 1
                if found == had:
                    print(f"left out: {path}: shorter than {frames / FPS:.1f} s")
            except Fail as e:
                print(f"left out, or the rest of it: {e}")
        if not found:
            raise Fail(f"{folder}: no mp4 with {frames / FPS:.1f} s of picture and sound; put some there or drop --folder")
        self.video, self.mel, self.mouth = self.video[:found], self.mel[:found], self.mouth[:found]


class Batch(NamedTuple):
    source: torch.Tensor        # (B, L, G, 2 P) float in [-1, 1]: see patchify
    reference: torch.Tensor     # the same shape: chunks of other moments
    heard: torch.Tensor         # (B, back + 16 L + ahead, MELS): see hearing
    mel: torch.Tensor           # (B, 16 L, MELS), a part of it, for the reward

    @property
    def x0(self):
        """(B, L, N, P): what is to be generated."""
        return inner(self.source[..., self.source.shape[-1] // 2:])


class Samples:
    """Training samples out of a Bank, cut into patches once, in the Bank's memory: gigabytes need not fit twice. The Bank is empty afterwards."""

    def __init__(self, bank, cfg, device, dtype=torch.float32):
        self.cfg, self.dtype, self.device, self.heard = cfg, dtype, device, hearing(bank.mel, cfg).to(device)
        for video in bank.video:
            video.view(-1)[:] = patchify(video[None], cfg.patch).flatten()
        n, T = bank.video.shape[:2]
        # On a Mac they stay with the CPU: it is the same memory, and indexing more than 2^31 values on mps is not to be relied on.
        home = device if device.type == "cuda" else "cpu"
        self.patches, bank.video = bank.video.view(n, T // 4, -1, 24 * cfg.patch ** 2).to(home), None

    def cut(self, patch):
        """Into patches of another size, in place. -> self."""
        was = math.isqrt(self.patches.shape[-1] // 24)
        if patch != was:
            for clip in self.patches:
                clip.view(-1)[:] = patchify(unpatchify(clip[None], was), patch).flatten()
            self.patches = self.patches.view(*self.patches.shape[:2], -1, 24 * patch ** 2)
        return self

    def draw(self, n, rng, rank=0, world=1):
        """-> Batch of n, or process `rank`'s share of it if there are more. The reference of each chunk is another moment, outside the
        sample itself: there it would give the answer away."""
        cfg, total = self.cfg, self.patches.shape[1]
        L, k = cfg.latents, cfg.chunk
        pick = lambda high, *shape: torch.randint(high, shape, generator=rng)                         # noqa: E731
        clip, first = pick(len(self.patches), n), pick(total - L + 1, n)
        at = first[:, None] + torch.arange(L)                                                         # B L
        starts = torch.empty(n, -(-L // k), dtype=torch.long)
        for i, s in enumerate(first.tolist()):
            free = torch.tensor([*range(0, s - k + 1), *range(s + L, total - k + 1)])
            starts[i] = free[pick(len(free), starts.shape[1])]
        still = torch.rand(starts.shape, generator=rng) < cfg.still
        clip, first, at, starts, still = (x[rank::world] for x in (clip, first, at, starts, still))
        where = (starts[..., None] + torch.arange(k)).flatten(1)[:, :L]
        source, reference = self.patches[clip[:, None], at], self.patches[clip[:, None], where]
        # Some reference chunks are one frame held still, as at the start of a stream.
        for b, c in still.nonzero().tolist():
            chunk = reference[b, c * k:(c + 1) * k].unflatten(-1, (2, 4, -1))                         # k G half f 3pp
            chunk[:] = chunk[:1, :, :, :1].clone()
        source, reference = (x.to(self.device).to(self.dtype).sub_(127.5).div_(127.5) for x in (source, reference))
        heard = torch.stack([self.heard[c, 16 * s:16 * (s + L) + cfg.audio_back + cfg.audio_ahead] for c, s in zip(clip, first)])
        return Batch(source, reference, heard, heard[:, cfg.audio_back:cfg.audio_back + 16 * L])


# ----------------------------------------------------------------------------------------------------- real video files
def reason(complaint):
    """What ffmpeg's complaint says is wrong: there is no such stream, or its last line."""
    lines = [line.strip() for line in complaint.splitlines() if line.strip()] or ["ffmpeg gave no reason"]
    return "it has none" if re.search("matches no streams|not contain any stream", complaint) else lines[-1]


def need_file(path):
    if not os.path.isfile(path):
        raise Fail(f"{path}: a folder; name a file in it" if os.path.isdir(path) else f"{path}: no such file")


class Sound:
    """The sound of any file that ffmpeg reads, mono float32 at 16 kHz: `len(sound)`, `sound[a:b]`. Kept in a temporary file, so that
    an hour of it costs no memory. Fail: no sound in it, none of it, NaN."""

    def __init__(self, path):
        need_file(path)
        self.file = tempfile.TemporaryFile()
        done = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-i", str(path), "-map", "0:a:0", "-ac", "1", "-ar", str(RATE),
                               "-f", "f32le", "-"], stdout=self.file, stderr=subprocess.PIPE)
        if done.returncode:
            raise Fail(f"{path}: no sound could be read ({reason(done.stderr.decode(errors='replace'))}); give a file with sound, --audio X.wav for instance")
        self.samples = self.file.seek(0, os.SEEK_END) // 4
        if not self.samples:
            raise Fail(f"{path}: its sound is empty (0 samples)")
        if not all(np.isfinite(self[a:a + (1 << 20)]).all() for a in range(0, self.samples, 1 << 20)):
            raise Fail(f"{path}: some samples are NaN or infinite; export it again as 16-bit PCM")

    def __len__(self):
        return self.samples

    def __getitem__(self, where):
        start, stop, _ = where.indices(self.samples)
        self.file.seek(4 * start)
        return np.frombuffer(bytearray(self.file.read(4 * max(0, stop - start))), np.float32)


def read_audio(path):
    """All of a Sound -> (S,) float32."""
    return Sound(path)[:]


def probe(path):
    """Duration (s; 0 if the file does not say), width and height of a video."""
    need_file(path)
    reader = imageio_ffmpeg.read_frames(str(path))
    try:
        meta = next(reader)
        return meta["duration"], *meta["size"]
    except (OSError, StopIteration, RuntimeError, KeyError) as e:
        raise no_picture(path, e) from None
    finally:
        reader.close()


def picture_seconds(path, limit):
    """How long the picture lasts, decoded to its end, or to `limit` seconds: a file may say otherwise, or hold longer sound."""
    done = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-progress", "pipe:1", "-i", str(path), "-map", "0:v:0",
                           "-t", str(limit), "-f", "null", "-"], capture_output=True, text=True, errors="replace")
    reached = re.findall(r"^out_time_us=(\d+)", done.stdout, re.M)
    if done.returncode or not reached:
        raise no_picture(path, done.stderr)
    return int(reached[-1]) / 1e6


def no_picture(path, e):
    return Fail(f"{path}: no picture could be read ({reason(str(e))}); give a video file, mp4 for instance")


def read_video(path):
    """Yield frames (H, W, 3) uint8 at 25 a second; ffmpeg drops or repeats frames by their time stamps, so that other
    rates (29.97) do not drift. Holds one frame. Fail: not a video."""
    need_file(path)
    reader = imageio_ffmpeg.read_frames(str(path), output_params=["-vf", f"fps={FPS}"])
    raw = None
    try:
        width, height = next(reader)["size"]
        for raw in reader:
            yield torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(height, width, 3)
    except (OSError, StopIteration, RuntimeError, KeyError) as e:
        raise no_picture(path, e) from None
    finally:
        reader.close()
    if raw is None:
        raise no_picture(path, "no frames")


def square(frame, size, box=None):
    """Cut box (x, y, side; default: the largest centred square) out of frame (H, W, 3) uint8 and resize -> (size, size, 3)."""
    x, y, side = box or centred(*frame.shape[:2])
    cut = frame[y:y + side, x:x + side].permute(2, 0, 1)[None].float()
    out = F.interpolate(cut, size=(size, size), mode="bilinear", antialias=True, align_corners=False) if side != size else cut
    return out[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)


def centred(height, width):
    side = min(height, width)
    return (width - side) // 2, (height - side) // 2, side


def parse_box(text, frame):
    """"X,Y,SIDE" -> (x, y, side) in pixels of frame (H, W, 3); "" -> the largest centred square. Fail: not inside the picture."""
    height, width = frame.shape[:2]
    if not text:
        return centred(height, width)
    try:
        x, y, side = (int(part) for part in text.split(","))
    except ValueError:
        raise Fail(f"--box {text}: give three whole numbers, X,Y,SIDE") from None
    if x < 0 or y < 0 or side < 16 or x + side > width or y + side > height:
        raise Fail(f"--box {text} is not inside the picture of {width}x{height}, or under 16 pixels")
    return x, y, side


class write_video:
    """`with write_video(path, (width, height), audio) as put: put(frame)`: H.264 at 25 fps and AAC, frames (H, W, 3) uint8;
    audio: samples at 16 kHz, or a file whose sound is taken as it is.

    Written beside `path` under another name and renamed when whole, so that nothing half-written is left under it. A side of an odd
    number of pixels gets one more, black: H.264 as players want it has even sides."""

    def __init__(self, path, size, audio=None):
        self.path, self.size, self.audio = Path(path), size, audio

    def __enter__(self):
        if self.path.suffix.lower() not in (".mp4", ".mov", ".mkv"):
            raise Fail(f"{self.path}: write to a name that ends in .mp4")
        free_space(self.path.parent, 64 << 20)
        self.folder = tempfile.TemporaryDirectory(prefix=".writing-", dir=self.path.parent)
        self.partial = Path(self.folder.name) / self.path.name
        extra = dict(audio_path=str(self.audio), audio_codec="aac") if self.audio is not None else {}
        if isinstance(self.audio, np.ndarray):
            extra["audio_path"] = str(Path(self.folder.name) / "sound.wav")
            soundfile.write(extra["audio_path"], self.audio, RATE)
        self.writer = imageio_ffmpeg.write_frames(str(self.partial), self.size, fps=FPS, codec="libx264", quality=8, macro_block_size=1,
                                                  ffmpeg_log_level="error", output_params=[
                                                      "-movflags", "+faststart", "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2"], **extra)
        self.writer.send(None)
        return self.put

    def put(self, frame):
        try:
            self.writer.send(np.ascontiguousarray(frame))
        except OSError as e:
            raise Fail(f"{self.path}: ffmpeg stopped writing ({str(e).splitlines()[0]}); what it says itself stands above") from None

    def __exit__(self, kind, *_):
        self.writer.close()
        try:
            if kind is None:
                probe(self.partial)                          # Fail if ffmpeg could not finish it, for want of room for instance
                os.replace(self.partial, self.path)
        finally:
            self.folder.cleanup()


def free_space(folder, need, instead="choose another --out"):
    """Make `folder`; Fail unless it can be written and has `need` bytes free."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as e:
        raise Fail(f"{folder}: cannot be written ({e.strerror}); {instead}") from None
    if not os.access(folder, os.W_OK):
        raise Fail(f"{folder}: not writable; {instead}")
    if free < need:
        raise Fail(f"{folder}: {free >> 20} MB free, {need >> 20} MB needed; make room or {instead}")


# -------------------------------------------------------------------------------------------------------- command lines
def options(cls, argv, usage, presets=None):
    """Command line -> cls, a dataclass: every field is an option (`--beta 0`), and the comment beside it its help; `--config NAME`
    picks a preset first; hyphens do for underscores. Whole numbers may be 0 only where the class says so, in `zero`."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise Fail(f"{message}; --help lists the options")

    parser = Parser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    if presets:
        parser.add_argument("--config", choices=list(presets), default=next(iter(presets)))
    source = "\n".join(inspect.getsource(c) for c in cls.__mro__[:-1])
    truth = {"0": False, "off": False, "false": False, "1": True, "on": True, "true": True}

    def boolean(word):
        if word.lower() not in truth:
            raise ValueError
        return truth[word.lower()]

    for field in dataclasses.fields(cls):
        comment = re.search(rf"^    {field.name}: [^#\n]*# +(.*)$", source, re.M)
        default = "; ".join([str(field.default), *(f"{fields[field.name]} in {name}" for name, fields in (presets or {}).items() if field.name in fields)])
        if field.name != "config" or not presets:
            parser.add_argument("--" + field.name, metavar=field.type.__name__.upper(), type=boolean if field.type is bool else field.type,
                                help=f"{comment[1] if comment else ''} (default {default})".replace("%", "%%"))
    given = vars(parser.parse_args([re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in argv]))
    for name, value in given.items():
        if type(value) is int and value < (name not in getattr(cls, "zero", ("seed",))):
            raise Fail(f"--{name} {value} is too small")
    return cls(**{**(presets[given["config"]] if presets else {}), **given})


def run(main):
    """Run a script's main; what a person can mend is one line on stderr and exit code 2."""
    try:
        main(sys.argv[1:])
    except Fail as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full; in training, --accumulate 2 runs each batch in two parts and --clips keeps fewer people there", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                                  # whoever read our frames has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@dataclasses.dataclass
class Config:
    out: str = "out/data"
    size: int = 128         # pixels
    clips: int = 4
    seconds: float = 3.84
    seed: int = 20_000_000


def main(argv):
    cfg = options(Config, argv, __doc__)
    if cfg.size < 16 or cfg.size % 2 or cfg.clips < 1 or cfg.seconds < .5:
        raise Fail("--size must be even and at least 16, --clips at least 1, --seconds at least 0.5")
    free_space(cfg.out, 64 << 20)
    clips = [draw(cfg.seed + 2 * i, int(cfg.seconds * FPS), cfg.size) for i in range(cfg.clips)]
    rows = [torch.cat(list(clip.video[:: max(1, len(clip.video) // 8)][:8]), 1) for clip in clips]
    matplotlib.image.imsave(f"{cfg.out}/sheet.png", torch.cat(rows, 0).numpy())
    with write_video(f"{cfg.out}/clips.mp4", (cfg.size, cfg.size), np.concatenate([c.audio for c in clips])) as put:
        for clip in clips:
            for frame in clip.video:
                put(frame.numpy())
    print(f"{cfg.out}/sheet.png: a row a clip, 8 moments of each; {cfg.out}/clips.mp4: the same with sound")


if __name__ == "__main__":
    run(main)
