"""Sound, tokens, training batches, and real video files.

    python data.py              # out/data/clips.mp4 and sheet.png: the drawn people of faces.py

Video is float in [-1, 1] inside and uint8 RGB outside, at 25 frames a second; audio is float32 mono
at 16 kHz.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
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

from faces import FPS, SPLITS, draw, dub_pair, middle, square
from runtime import Fail, free_space, need_file, opt, options, run
from voices import RATE

HOP = 160  # samples between mel frames: 100 a second, 4 to a video frame
MELS = 40  # bands, 60 Hz to 7.6 kHz
AUDIO_BACK = 16  # mel frames heard before a latent frame's own 16
AUDIO_AHEAD = 12  # and after: the look-ahead, a part of the latency
SILENCE = (-5 + 1.5) / 3  # log-mel of nothing, for the frames before and after a file
CLIP_LATENTS = 30  # latent frames of a training clip, 4.8 s: some are left for the reference
BEND = 0.07  # deviation, in log-mel, of the equalizer that training puts before the ears: 4 dB
STILL = 0.2  # share of reference chunks that are one frame held still, as a stream starts with


@functools.cache
def mel_filters():
    """(201, MELS): triangles on the HTK mel scale."""
    lowest, highest = 2595 * np.log10(1 + np.array([60, 7600]) / 700)
    edges = 700 * (10 ** (np.linspace(lowest, highest, MELS + 2) / 2595) - 1)
    freq = np.linspace(0, RATE / 2, 201)[:, None]
    rise = (freq - edges[:-2]) / np.diff(edges)[:-1]
    fall = (edges[2:] - freq) / np.diff(edges)[1:]
    return torch.from_numpy(np.maximum(0, np.minimum(rise, fall)))


def log_mel(audio):
    """audio (n,) in [-1, 1] at 16 kHz, n a multiple of 640 -> (n / 160, MELS) float, about -1..1.

    Mel frame m sees the samples 160 m - 120 .. 160 m + 280, zeros past the ends."""
    audio = F.pad(torch.as_tensor(audio, dtype=torch.float32), (120, 120))
    window = torch.hann_window(400)
    spectrum = torch.stft(audio, 400, HOP, window=window, center=False, return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()
    # In double: how a product rounds depends on the number of frames on some CPUs, and a streamed
    # chunk must hear the same, in effect bit for bit, as in the whole file.
    mel = (power.T.double() @ mel_filters()).float()
    return (mel.clamp(min=1e-5).log10() + 1.5) / 3


def bend(mel, rng):
    """mel (B, M, MELS) through an equalizer drawn for each of B: another microphone."""
    points = BEND * torch.randn(len(mel), 1, 5, generator=rng, device=mel.device)
    curve = F.interpolate(points, mel.shape[2], mode="linear", align_corners=True)
    return (mel + curve).clamp(min=SILENCE)


def hearing(mel, start=0, end=None):
    """mel (B, M, MELS), 16 frames to a latent frame -> (B, back + 16 L + ahead, MELS): all that the
    L latent frames from `start` to `end` hear. So a chunk hears the same as in the whole file."""
    end = mel.shape[1] // 16 if end is None else end
    lo = 16 * start - AUDIO_BACK
    hi = 16 * end + AUDIO_AHEAD
    part = mel[:, max(0, lo) : hi]
    before = max(0, -lo)
    after = hi - max(0, lo) - part.shape[1]
    return F.pad(part, (0, 0, before, after), value=SILENCE)


def to_tokens(rectangle, p):
    """(B, T, S/2, 3S/4, 3) -> (B, L, N, P): a token is 4 frames of p x p pixels, row by row."""
    B, T, height, width, _ = rectangle.shape
    x = rectangle.reshape(B, T // 4, 4, height // p, p, width // p, p, 3)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4).flatten(2, 3)


def to_pixels(tokens, p):
    """Inverse of to_tokens; a rectangle has 2/3 as many rows of tokens as columns."""
    B, L, N, _ = tokens.shape
    rows = round((N * 2 / 3) ** 0.5)
    x = tokens.reshape(B, L, rows, N // rows, 4, p, p, 3)
    x = x.permute(0, 1, 4, 2, 5, 3, 6, 7)  # B L frame row p column p colour
    return x.flatten(5, 6).flatten(3, 4).flatten(1, 2)


def to_float(video):
    """uint8 0..255 -> float32 in [-1, 1]."""
    return video.float().div_(127.5).sub_(1)


def to_uint8(video):
    """float in [-1, 1] -> uint8 0..255."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Pairs(NamedTuple):
    """Dubs to be made, and their answer."""

    source: torch.Tensor  # (n, T, S, S, 3) uint8
    truth: torch.Tensor  # the same people saying what `mel` says
    mel: torch.Tensor  # (n, 4 T, MELS), the truth's sound
    mouth: torch.Tensor  # (n, T, 2), the truth's opening and width, see faces.Clip


def held_out(n, size, split, device, latents=24):
    """Pairs of n people of `split`, who say other words."""
    clips = [dub_pair(i, 4 * latents, size, split, device=device) for i in range(n)]
    videos = [torch.stack([clip.video for clip in part]) for part in zip(*clips)]
    mel = torch.stack([log_mel(truth.audio) for _, truth in clips])
    shape = torch.stack([torch.from_numpy(truth.mouth) for _, truth in clips])
    return Pairs(*(x.to(device) for x in (*videos, mel, shape)))


class Batch(NamedTuple):
    source: torch.Tensor  # (B, T, S, 3S/4, 3) uint8, see `middle`
    reference: torch.Tensor  # the same shape: the same people at other moments
    heard: torch.Tensor  # (B, back + 16 L + ahead, MELS), see `hearing`
    mel: torch.Tensor  # (B, 4 T, MELS), the part of it that belongs to the frames


class Clips:
    """Clips to train on, on the device: video (n, T, S, 3S/4, 3) uint8, see `middle`; mel
    (n, 4 T, MELS); shape (n, T, 2): the mouth's opening and width, NaN where nobody drew it."""

    def __init__(self, size, n, device, split="train", folder="", latents=CLIP_LATENTS):
        """n drawn clips, or (folder) up to n consecutive ones from real mp4s with sound."""
        T, found = 4 * latents, 0
        try:
            shape = n, T, size, size * 3 // 4, 3
            self.video = torch.empty(shape, dtype=torch.uint8, device=device)
        except RuntimeError:
            need = f"{n * T * size * size * 9 / 4e9:.0f} GB of memory"
            raise Fail(f"{n} clips need {need}; --clips for fewer") from None
        self.mel = torch.empty(n, 4 * T, MELS, device=device)
        self.shape = torch.full((n, T, 2), torch.nan, device=device)
        clips = recorded(folder, size, T) if folder else drawn(split, size, T, device)
        for found, (video, audio, shape) in enumerate(itertools.islice(clips, n), 1):
            self.video[found - 1] = middle(video)
            self.mel[found - 1] = log_mel(audio)
            self.shape[found - 1] = torch.as_tensor(shape)
        if not found:
            raise Fail(f"{folder}: no mp4 with {T / FPS:.1f} s of picture and sound in it")
        self.video, self.mel, self.shape = (x[:found] for x in (self.video, self.mel, self.shape))

    def pick(self, B, T, rng):
        """B random clips and, in each, where T frames begin: two (B, 1), on the device."""
        how = dict(generator=rng, device=self.video.device)
        clip = torch.randint(len(self.video), (B, 1), **how)
        return clip, torch.randint(self.video.shape[1] // 4 - T // 4 + 1, (B, 1), **how) * 4

    def moments(self, B, T, rng):
        """B random stretches of T frames: video (B, T, S, 3S/4, 3) uint8, mel, shape."""
        clip, first = self.pick(B, T, rng)
        at = first + torch.arange(T, device=first.device)
        mel_at = 4 * first + torch.arange(4 * T, device=first.device)
        return self.video[clip, at], self.mel[clip, mel_at], self.shape[clip, at]

    def draw(self, B, cfg, rng):
        """-> Batch. The reference of each chunk is a chunk of another moment, outside the sample
        itself: there it would give the answer away. No loop over the batch, nothing that waits for
        the device."""
        device, T, k = self.video.device, 4 * cfg.latents, 4 * cfg.chunk
        clip, first = self.pick(B, T, rng)
        # Where a reference chunk may start: `before` places before the sample, `after` behind it.
        before = (first - k + 1).clamp(min=0)
        after = (self.video.shape[1] - T - first - k + 1).clamp(min=0)
        u = torch.rand(B, T // k, generator=rng, device=device)
        place = (u * (before + after)).long()
        start = torch.where(place < before, place, first + T + place - before)
        still = torch.rand(B, T // k, 1, generator=rng, device=device) < STILL
        frame = torch.where(still, 0, torch.arange(k, device=device))
        # By one index: so a GPU copies whole frames.
        frames, begins = self.video.flatten(0, 1), clip * self.video.shape[1]
        reference = frames[begins + (start[..., None] + frame).flatten(1)]
        source = frames[begins + first + torch.arange(T, device=device)]
        # What is heard before and after the clip is silence.
        at = 4 * first + torch.arange(-AUDIO_BACK, 4 * T + AUDIO_AHEAD, device=device)
        inside = (at >= 0) & (at < self.mel.shape[1])
        heard = self.mel[clip, at.clamp(0, self.mel.shape[1] - 1)]
        heard = bend(torch.where(inside[..., None], heard, SILENCE), rng)
        mel = heard[:, AUDIO_BACK : AUDIO_BACK + 4 * T]
        return Batch(source, reference, heard, mel)


def drawn(split, size, frames, device):
    """The people of a split without end: (video, audio, shape) each."""
    for i in itertools.count():
        yield draw(SPLITS[split] + 2 * i, frames, size, device=device)


def mp4s(folder):
    """The mp4 files of a folder, in order. Fail: none."""
    found = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() == ".mp4")
    if not found:
        raise Fail(f"{folder}: no mp4 there; name a folder that holds some, or drop --folder")
    return found


def recorded(folder, size, frames):
    """Consecutive clips of real mp4s, their centred square: (video, audio, NaN) each."""
    samples = frames * RATE // FPS
    for path in mp4s(folder):
        try:
            audio, video, found = Sound(path), read_video(path), 0
            for first in range(0, len(audio) - samples + 1, samples):
                taken = [square(frame, size) for frame in itertools.islice(video, frames)]
                if len(taken) == frames:
                    found += 1
                    yield torch.stack(taken), audio[first : first + samples], torch.nan
            if not found:
                print(f"left out: {path}: shorter than {frames / FPS:.1f} s")
        except Fail as e:
            print(f"left out, or the rest of it: {e}")


# With all tracks in use, time 0 of each is the file's (else MPEG-TS starts each at its own).
ALL_TRACKS = "-map 0:v? -map 0:a? -c copy -f null -".split()
# Sound at its time, and silence where there is none; less than a frame off is jitter.
ON_TIME = "aresample=async=1:first_pts=0:min_hard_comp=0.04"
EXACT = "flags=bicubic+accurate_rnd+full_chroma_int"  # else colours are 3 levels off


@functools.cache
def warn(line):
    print(line, file=sys.stderr)  # once, however often the file is opened


def ffmpeg(*words):
    return [imageio_ffmpeg.get_ffmpeg_exe(), *"-v error -hide_banner -nostdin".split(), *words]


def reason(complaint):
    """What ffmpeg complains of first, without the part of it that does."""
    first = re.sub(rb"^(\[.*?\] )+", b"", complaint).decode(errors="replace").strip()
    return first.splitlines()[0] if first else "it is empty"


@contextlib.contextmanager
def running(failure, command, **pipes):
    """ffmpeg at work, gone at the end. Fail, with its reason: EOFError or BrokenPipeError."""
    with tempfile.TemporaryFile() as complaint:
        process = subprocess.Popen(command, stderr=complaint, start_new_session=True, **pipes)
        try:
            yield process
        except (EOFError, BrokenPipeError):
            process.communicate()
            complaint.seek(0)
            raise Fail(f"{failure} ({reason(complaint.read())})") from None
        finally:
            process.kill()
            process.communicate()


def track(path, kind):
    """The picture or the sound (kind) of a file: what tells ffmpeg to read it, and its words on it.
    Of several the default one. Fail: none. Warns of what is not as it seems."""
    need_file(path)
    source = ["-i", f"file:{path}"]  # else a:b.mp4 is an address
    command = ffmpeg("-v", "info", *source, *ALL_TRACKS)
    said = subprocess.run(command, capture_output=True).stderr
    text, word = said.decode(errors="replace"), "Video" if kind == "picture" else "Audio"
    tracks = re.findall(rf"(?m)^ +Stream #(0:\d+).*?: {word}: (.*)", text.partition("Output #0")[0])
    tracks = [found for found in tracks if "attached pic" not in found[1]]
    if not tracks:
        why = "it has none" if "Input #0" in text else reason(said)
        raise Fail(f"{path}: no {kind} could be read ({why})")
    place, about = next((found for found in tracks if "(default)" in found[1]), tracks[0])
    if len(tracks) > 1:
        warn(f"{path}: {len(tracks)} tracks of {kind}; {place} is taken ({about})")
    times = re.findall(r"(?:Duration: |time=)(\d+):(\d+):([\d.]+)", text)
    times = [3600 * int(h) + 60 * int(m) + float(s) for h, m, s in times] or [0]
    if times[-1] < times[0] - 0.5 and "Estimating duration" not in text:
        warn(f"{path}: broken off: {times[-1]:.1f} s of {times[0]:.1f} s could be read")
    return [*source, "-map", place], about


class Sound:
    """The sound of any file that ffmpeg reads, mono float32 at 16 kHz, on the file's clock:
    `len(sound)`, `sound[a:b]`. Kept in a temporary file: an hour costs no memory. Fail: none, NaN.
    """

    def __init__(self, path):
        words, about = track(path, "sound")
        self.words, layout = [*words, "-af", ON_TIME], about.partition("Hz, ")[2].split(",")[0]
        channels = sum(map(int, re.findall(r"\d+", layout)))  # 5.1, or 10 channels
        if channels <= 8 and "channels" not in layout:
            channels = 2 if layout == "stereo" else 1
        how = f"-ar {RATE} -ac {channels} -f f32le -".split() + ALL_TRACKS
        with tempfile.TemporaryFile() as file:
            done = subprocess.run(ffmpeg(*self.words, *how), stdout=file, stderr=subprocess.PIPE)
            if done.returncode or not file.seek(0, os.SEEK_END):
                raise Fail(f"{path}: no sound could be read ({reason(done.stderr)})")
            self.samples = np.memmap(file, np.float32, "r").reshape(-1, channels)
        self.channel, together, each = slice(None), 0, 0
        for start in range(0, len(self), 1 << 20):
            part = self.samples[start : start + (1 << 20)]
            if not np.isfinite(part).all():
                raise Fail(f"{path}: some samples are NaN or infinite; export it again as 16-bit")
            together += np.square(part.mean(1)).sum(dtype=float)
            each += np.square(part).sum(0, dtype=float)
        if together < 0.3 * each.max():  # they cancel, or one is silent: the louder one
            self.channel = [each.argmax()]
        if channels > 2:  # AAC has no place for them
            mix = "+".join(f"c{i}" for i in np.arange(channels)[self.channel])
            self.words[-1] = f"pan=mono|c0<{mix},{ON_TIME}"

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, where):
        return np.asarray(self.samples[where, self.channel].mean(1))


def read_video(path):
    """Yield frames (H, W, 3) uint8 at 25 a second; ffmpeg drops or repeats some by their time
    stamps, so that other rates (29.97) do not drift. Holds one frame. Fail: not a video.

    Pixels become square, HDR SDR. Colours without a tag are bt709 from 720 rows on, else bt601:
    what players take them for."""
    words, about = track(path, "picture")
    if re.search("(top|bottom)( coded)? first", about):
        warn(f"{path}: interlaced, and the combs stay; deinterlace it first (ffmpeg -vf yadif)")
    look = f"scale=w='max(iw,trunc(iw*sar/2)*2)':h='max(ih,trunc(ih/sar/2)*2)':{EXACT}"
    rows = re.search(r", \d+x(\d+)", about)
    if re.search("smpte2084|arib-std-b67", about):
        warn(f"{path}: HDR, made SDR: what is brighter than white paper is cut off")
        look = f"zscale=primaries=bt709:transfer=bt709:npl=203,format=gbrp,{look}"
    elif rows and int(rows[1]) >= 720 and not re.search(r"[( ](bt|smpte|fcc)\w*[/,)]", about):
        look += ":in_color_matrix=bt709"
    how = ["-vf", f"fps={FPS}:start_time=0,{look}", *"-pix_fmt rgb24 -c:v ppm".split()]
    command = ffmpeg(*words, *how, *"-f image2pipe -".split(), *ALL_TRACKS)
    failure, frame = f"{path}: no picture could be read", None
    with running(failure, command, stdout=subprocess.PIPE) as reader:
        while reader.stdout.readline():  # P6; a line with the size; 255; the pixels
            width, height = map(int, reader.stdout.readline().split())
            reader.stdout.readline()
            frame = torch.empty(height, width, 3, dtype=torch.uint8)
            if reader.stdout.readinto(frame.numpy()) == frame.numel():
                yield frame
        if frame is None:
            raise EOFError


@contextlib.contextmanager
def write_video(path, size, audio=None):
    """`with write_video(path, (width, height), audio) as put: put(frame)`: H.264 at 25 fps and AAC.
    frames (H, W, 3) uint8; audio: samples at 16 kHz, or a Sound, taken as its file has it.

    Written beside `path` and renamed when whole. An odd side gets one more row or column, black:
    players want H.264 to have even ones."""

    path = Path(path)
    if path.suffix.lower() not in (".mp4", ".mov", ".mkv") or path.is_dir():
        raise Fail(f"{path}: write to a file whose name ends in .mp4")
    free_space(path.parent)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
        if isinstance(audio, np.ndarray):
            soundfile.write(f"{folder}/sound.wav", audio, RATE)
            audio = Sound(f"{folder}/sound.wav")
        partial, words = Path(folder) / path.name, audio.words if audio else []
        raw = "-f rawvideo -pix_fmt rgb24 -s {}x{} -r {} -i -".format(*size, FPS).split()
        tags = "range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
        look = f"pad=ceil(iw/2)*2:ceil(ih/2)*2,scale=out_color_matrix=bt709:out_range=tv:{EXACT}"
        how = ["-vf", f"{look},format=yuv420p,setparams={tags}", "-map", "1:v" if words else "0:v"]
        how += [*words[2:], *"-c:v libx264 -crf 10 -c:a aac -movflags +faststart".split()]
        how += [f"file:{partial}", *(ALL_TRACKS if words else [])]
        command = ffmpeg(*words[:2], *raw, *how)
        with running(f"{path}: ffmpeg stopped writing", command, stdin=subprocess.PIPE) as writer:
            yield lambda frame: writer.stdin.write(np.ascontiguousarray(frame))
            writer.communicate()
            if writer.returncode:
                raise EOFError
            next(read_video(partial))  # Fail if ffmpeg could not finish it, for want of room say
        os.replace(partial, path)


@dataclasses.dataclass
class Options:
    out: str = opt("out/data", "folder")


def main(argv):
    cfg = options(Options, argv, __doc__)
    free_space(cfg.out)
    clips = [draw(SPLITS["held-out"] + 2 * i, 96, 128) for i in range(8)]
    rows = [torch.cat(list(clip.video[::12]), 1) for clip in clips]
    matplotlib.image.imsave(f"{cfg.out}/sheet.png", torch.cat(rows).numpy())
    sound = np.concatenate([clip.audio for clip in clips])
    with write_video(f"{cfg.out}/clips.mp4", (128, 128), sound) as put:
        for frame in torch.cat([clip.video for clip in clips]):
            put(frame.numpy())
    print(f"{cfg.out}/sheet.png: 8 moments of 8 people; {cfg.out}/clips.mp4: with sound")


if __name__ == "__main__":
    run(main)
