"""Real files in and out, by ffmpeg; and the face in a frame of a video.

Whatever a file holds, its picture comes out as frames (H, W, 3) uint8 RGB at 25 a second, and its
sound as mono float32 samples at 16 kHz, both on the file's own clock.
"""

import contextlib
import functools
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import soundfile
import torch
import torch.nn.functional as F

from data import FPS, RATE
from runtime import UserError, make_folder, need_file

# A second output that throws everything away. While all tracks are in use, time 0 of each is the
# file's. Otherwise MPEG-TS starts each track at its own time 0, and sound and picture part.
ALL_TRACKS = ["-map", "0:v?", "-map", "0:a?", "-c", "copy", "-f", "null", "-"]
# The first track of each kind. V: one that moves, which the cover of an album does not.
PICTURE = "0:V:0"
SOUND = "0:a:0"
# Puts each sound at its time, with silence where there is none. Less than a frame off is jitter.
ON_TIME = "aresample=async=1:first_pts=0:min_hard_comp=0.04"
# A mean of the channels, which cannot be louder than the loudest one.
TO_MONO = "rematrix_maxval=1"
# Without these flags, colours are up to 3 levels off.
EXACT = "flags=bicubic+accurate_rnd+full_chroma_int"


@functools.cache
def warn(line):
    """Print a line on stderr, once, however often the file that it is about is opened."""
    print(line, file=sys.stderr)


def ffmpeg(*words):
    """The command line of ffmpeg with these arguments. UserError: there is none that runs."""
    try:
        path = imageio_ffmpeg.get_ffmpeg_exe()
        try_out(path)
    except (RuntimeError, OSError, subprocess.SubprocessError) as e:
        cure = "pip install -U imageio-ffmpeg brings one, if IMAGEIO_FFMPEG_EXE is not set"
        raise UserError(f"no ffmpeg could be run ({e}); {cure}") from None
    return [path, "-v", "error", "-hide_banner", "-nostdin", *words]


@functools.cache
def try_out(path):
    """Run an ffmpeg once before it is used. OSError, SubprocessError: it does not run."""
    subprocess.run([path, "-version"], capture_output=True, check=True)


def reason(path, code, complaint):
    """Why this ffmpeg gave up, by its exit code and what it wrote on stderr (bytes): the first line
    of that, without the part of ffmpeg that complains."""
    if code < 0:
        return f"{path} was ended by signal {-code}, {signal.strsignal(-code)}"
    text = re.sub(rb"^(\[.*?\] )+", b"", complaint).decode(errors="replace").strip()
    if "matches no streams" in text:
        return "it has none"
    if text:
        return text.splitlines()[0]
    if code:
        return f"{path} ended with exit code {code}"
    return "it is empty"


@contextlib.contextmanager
def running(failure, command, **pipes):
    """Run ffmpeg inside a `with`, and end it with that.

    An EOFError inside means that ffmpeg gave up: it becomes a UserError that says `failure` and
    ffmpeg's reason."""
    try:
        complaint = tempfile.TemporaryFile()
    except OSError as e:
        what = f"no folder for temporary files ({e.strerror or e})"
        raise UserError(f"{what}; set TMPDIR to one that can be written") from None
    with complaint:
        process = subprocess.Popen(command, stderr=complaint, start_new_session=True, **pipes)
        try:
            yield process
        except EOFError:
            process.wait()
            complaint.seek(0)
            why = reason(command[0], process.returncode, complaint.read())
            raise UserError(f"{failure} ({why})") from None
        finally:
            process.kill()
            process.communicate()


def source(path):
    """ffmpeg's arguments that open a file. UserError: there is none."""
    need_file(path)
    return ["-i", f"file:{path}"]  # without "file:", a:b.mp4 is taken for an address


def describe(path):
    """What ffmpeg says of a file's picture: codec, format, size, and more. UserError: it has none.
    (The cover of an album is a picture, but no video.)"""
    command = ffmpeg("-v", "info", *source(path))
    done = subprocess.run(command, capture_output=True)
    text = done.stderr.decode(errors="replace")
    picture = re.search(r"(?m)^ +Stream #0:\d+.*?: Video: (?!.*attached pic)(.*)", text)
    read = "Input #0" in text and done.returncode > 0  # 1: it has been told of no output
    if picture and read:
        return picture[1]
    why = "it has none"
    if not read:
        why = reason(command[0], done.returncode, done.stderr)
    raise UserError(f"{path}: no picture could be read ({why})")


class Sound:
    """The sound of any file that ffmpeg reads, as mono float32 at 16 kHz, from the file's time 0:
    `len(sound)`, `sound[a:b]`. An hour takes 230 MB. UserError: there is none, or it holds NaN."""

    def __init__(self, path):
        self.path = path
        mono = ["-af", f"{ON_TIME}:{TO_MONO}", "-ac", "1", "-ar", str(RATE), "-f", "f32le", "-"]
        command = ffmpeg(*source(path), "-map", SOUND, *mono, *ALL_TRACKS)
        done = subprocess.run(command, capture_output=True)
        if done.returncode or not done.stdout:
            why = reason(command[0], done.returncode, done.stderr)
            raise UserError(f"{path}: no sound could be read ({why})")
        self.samples = np.frombuffer(done.stdout, np.float32).copy()  # bytes cannot be written to
        if not np.isfinite(self.samples).all():
            raise UserError(f"{path}: some samples are NaN or infinite; export it again as 16-bit")

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, where):
        return self.samples[where]


def read_video(path):
    """Yield the frames of a video, (H, W, 3) uint8, at 25 a second, holding one at a time.
    UserError: it is not a video.

    ffmpeg drops or repeats frames by their time stamps, so that other rates, such as 29.97, do not
    drift. Pixels become square, and HDR becomes SDR. Colours without a tag are taken for bt709 from
    720 rows on and else for bt601, as players do."""
    about = describe(path)
    look = f"scale=w='max(iw,trunc(iw*sar/2)*2)':h='max(ih,trunc(ih/sar/2)*2)':{EXACT}"
    size = re.search(r", \d+x(\d+)", about)
    rows = int(size[1]) if size else 0
    tagged = re.search(r"[( ](bt|smpte|fcc)\w*[/,)]", about)
    if re.search("smpte2084|arib-std-b67", about):
        warn(f"{path}: HDR, made SDR: what is brighter than white paper is cut off")
        look = f"zscale=primaries=bt709:transfer=bt709:npl=203,format=gbrp,{look}"
    elif rows >= 720 and not tagged:
        look += ":in_color_matrix=bt709"
    frames = ["-vf", f"fps={FPS}:start_time=0,{look}", "-pix_fmt", "rgb24"]
    frames += ["-c:v", "ppm", "-f", "image2pipe", "-"]
    command = ffmpeg(*source(path), "-map", PICTURE, *frames, *ALL_TRACKS)
    frame = None
    failure = f"{path}: no picture could be read"
    with running(failure, command, stdout=subprocess.PIPE) as reader:
        # A PPM is a line with P6, one with the size, one with 255, and the pixels.
        while reader.stdout.readline():
            width, height = map(int, reader.stdout.readline().split())
            reader.stdout.readline()
            frame = torch.empty(height, width, 3, dtype=torch.uint8)
            if reader.stdout.readinto(frame.numpy()) == frame.numel():
                yield frame
        if frame is None or reader.wait():
            raise EOFError


@contextlib.contextmanager
def write_video(path, size, audio=None):
    """`with write_video(path, (width, height), audio) as put: put(frame)`: H.264 at 25 fps and AAC.
    frames (H, W, 3) uint8; audio: samples at 16 kHz, or a Sound, whose file is read again, so that
    its rate and channels are kept.

    The video is written beside the file that `path` names and takes its place when it is whole. An
    odd side gets one more row or column, black, since players want H.264 to have even ones.
    UserError: `path` cannot be written, or ffmpeg gave up."""
    path = Path(path)
    if path.suffix.lower() not in (".mp4", ".mov", ".mkv") or path.is_dir():
        raise UserError(f"{path}: write to a file whose name ends in .mp4")
    make_folder(path.parent)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        need_replaceable(path, partial)
        if isinstance(audio, np.ndarray):
            # An open file, since soundfile cannot open every name of every system.
            with open(f"{folder}/sound.wav", "wb") as file:
                soundfile.write(file, audio, RATE, format="WAV")
            audio = Sound(f"{folder}/sound.wav")
        width, height = size
        frames = ["-f", "rawvideo", "-pix_fmt", "rgb24"]
        frames += ["-s", f"{width}x{height}", "-r", str(FPS), "-i", "-"]
        look = f"pad=ceil(iw/2)*2:ceil(ih/2)*2,scale=out_color_matrix=bt709:out_range=tv:{EXACT}"
        tags = "range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
        picture = ["-vf", f"{look},format=yuv420p,setparams={tags}"]
        coding = ["-c:v", "libx264", "-crf", "10", "-c:a", "aac", "-movflags", "+faststart"]
        coding += [f"file:{partial}"]
        if audio is None:
            command = ffmpeg(*frames, *picture, "-map", "0:v", *coding)
        else:
            # The sound's file is input 0, so that what chooses its track holds here, too.
            mapped = [*picture, "-map", "1:v", "-map", SOUND, "-af", ON_TIME]
            command = ffmpeg(*source(audio.path), *frames, *mapped, *coding, *ALL_TRACKS)
        with running(f"{path}: ffmpeg stopped writing", command, stdin=subprocess.PIPE) as writer:

            def put(frame):
                try:
                    writer.stdin.write(np.ascontiguousarray(frame))
                except OSError:  # nobody reads: on Windows that is no BrokenPipeError
                    raise EOFError from None

            yield put
            writer.communicate()
            if writer.returncode:
                raise EOFError
            # UserError if ffmpeg could not finish it, for want of room say.
            next(read_video(partial))
        take_place(partial, path)


def need_replaceable(path, aside):
    """UserError if another file cannot take the place of the one at `path`, if there is one, since
    it is mounted, somebody else's or held by a player. Asked by moving it aside and back."""
    if not path.exists():
        return
    try:
        os.replace(path, aside)
    except OSError as e:
        what = f"cannot be replaced ({e.strerror}); choose another --out"
        raise UserError(f"{path}: {what}") from None
    os.replace(aside, path)


def take_place(partial, path):
    """Move a finished file to `path`. UserError: that fails, and it is kept elsewhere."""
    try:
        os.replace(partial, path)
    except OSError as e:
        kept = Path(tempfile.mkdtemp(prefix=f"{path.stem}-", dir=path.parent), path.name)
        os.replace(partial, kept)
        raise UserError(f"{path}: cannot be replaced ({e.strerror}); it is {kept}") from None


def mp4s(folder):
    """The paths of the mp4 files in a folder, in order. UserError: there is none."""
    paths = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() == ".mp4")
    if not paths:
        raise UserError(f"{folder}: no mp4 there; name a folder that holds some, or drop --folder")
    return paths


def recorded(folder, size, frames):
    """Yield consecutive clips of the mp4s in a folder, cut to their centred square, as data.Clips
    takes them: (video (T, S, S, 3) uint8, audio (640 T,), NaN, since nobody measured the mouth).
    UserError: no mp4 is long enough."""
    samples = frames * RATE // FPS
    in_all = 0
    ffmpeg()  # without one, every file would be left out
    for path in mp4s(folder):
        try:
            audio = Sound(path)
            video = read_video(path)
            found = 0
            for first in range(0, len(audio) - samples + 1, samples):
                taken = [square(frame, size) for frame in itertools.islice(video, frames)]
                if len(taken) < frames:
                    break
                found += 1
                in_all += 1
                yield torch.stack(taken), audio[first : first + samples], torch.nan
            if not found:
                print(f"left out: {path}: shorter than {frames / FPS:.1f} s")
        except UserError as e:
            print(f"left out, or the rest of it: {e}")
    if not in_all:
        raise UserError(f"{folder}: no mp4 with {frames / FPS:.1f} s of picture and sound in it")


def centred(height, width):
    """The largest centred square of a picture: (x, y, side) in pixels."""
    side = min(height, width)
    return (width - side) // 2, (height - side) // 2, side


def square(frame, size, box=None):
    """Cut the box (x, y, side) out of frame (H, W, 3) uint8 and resize it -> (size, size, 3) uint8.
    Without a box it is the largest centred square."""
    x, y, side = box or centred(*frame.shape[:2])
    cut = frame[y : y + side, x : x + side]
    if side == size:
        return cut
    cut = cut.permute(2, 0, 1)[None].float()
    resized = F.interpolate(cut, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)


def parse_box(text, frame):
    """A text, X,Y,SIDE -> (x, y, side) in pixels of frame (H, W, 3). An empty text is the largest
    centred square. UserError: it is no box inside the frame."""
    height, width = frame.shape[:2]
    if not text:
        return centred(height, width)
    try:
        x, y, side = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--box {text}: give three whole numbers, X,Y,SIDE") from None
    if min(x, y) < 0 or side < 16 or x + side > width or y + side > height:
        raise UserError(
            f"--box {text}: not inside the picture of {width}x{height}, or under 16 pixels"
        )
    return x, y, side


def paste_box(frame, dub, box, mask):
    """Lay dub (S, S, 3) uint8, resized, over the box (x, y, side) of frame (H, W, 3) uint8, through
    the mask (side, side, 1) in 0..1 -> a new frame. Outside the mask it stays as it was."""
    x, y, side = box
    shrinks = side < dub.shape[0]
    dub = dub.permute(2, 0, 1)[None].float()
    dub = F.interpolate(dub, (side, side), mode="bicubic", antialias=shrinks, align_corners=False)
    frame = frame.clone()
    cut = frame[y : y + side, x : x + side]
    blended = torch.lerp(cut.float(), dub[0].permute(1, 2, 0), mask)
    cut.copy_(blended.round().clamp(0, 255))
    return frame


def write_side_by_side(path, rows, audio):
    """Rows of videos (n, S, S, 3) uint8, equally long -> an mp4 that shows the videos of a row side
    by side, one row after another, with this sound. Small ones are enlarged."""
    frames = torch.cat([torch.cat(row, 2) for row in rows])
    scale = max(1, 256 // frames.shape[1])
    frames = frames.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    with write_video(path, (frames.shape[2], frames.shape[1]), audio) as put:
        for frame in frames:
            put(frame.numpy())
