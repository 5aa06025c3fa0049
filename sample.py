"""Let a face say a text, a sound or the sound of a recording: the student streams it.

    python sample.py                                    # a held-out drawn face: out/dub.mp4
    python sample.py --audio speech.wav                 # a drawn person says it
    python sample.py --text "Guten Tag" --voice de --face 7     # another one says this
    python sample.py --video IN.mp4 --audio IN.wav --out OUT.mp4 --box 40,10,110
    python sample.py --video IN.mp4 --audio IN.wav --out - | ffplay -f rawvideo \\
        -pixel_format rgb24 -video_size 640x480 -framerate 25 -     # IN.mp4's size
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import sys
import time
from typing import Literal

import torch

import media
import runtime
import voices
from data import FPS, RATE, mouth_mask
from faces import SPLITS, dub_pair, render_clip
from media import parse_box, paste_box, square
from model import DiT, has_kernel
from runtime import Precision, UserError, find_weights
from stream import dub_stream

FACE_SECONDS = 8  # of a drawn person, played back and forth
FACE_SCALE = 3  # of the picture that he is shown in


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


def dub_face(dub, size, cfg, audio):
    """A held-out drawn person says `audio`, samples or a Sound -> cfg.out, in sound and picture.
    dub: dub_stream, of a student that takes pictures of this size. The face was drawn saying other
    words, for FACE_SECONDS; this is played back and forth."""
    seed = SPLITS["held-out"] + 2 * cfg.face
    face = render_clip(seed, FACE_SECONDS * FPS, size).video
    there_and_back = torch.cat([face, face[1:-1].flip(0)])
    total = math.ceil(len(audio) * FPS / RATE)
    source = (there_and_back[i % len(there_and_back)] for i in range(total))
    side = FACE_SCALE * size
    with media.write_video(cfg.out, (side, side), audio) as put:
        for frames in dub(source, audio):
            for frame in frames:
                put(square(frame, side).numpy())
    print(f"{cfg.out}: {total / FPS:.1f} s, said by the drawn person --face {cfg.face}")


def dub_file(dub, size, cfg, audio):
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
            yield square(frame, size, box)

    if cfg.out == "-":
        if not hasattr(sys.stdout, "buffer"):
            raise UserError("--out -: standard output takes no bytes here; name a file")
        messages = sys.stderr
        output = contextlib.nullcontext(sys.stdout.buffer.write)
    else:
        messages = sys.stdout
        output = media.write_video(cfg.out, (width, height), audio)
    # Not blended in the square, but once, in the frame.
    with output as put:
        for frames in dub(squares(), audio, blend=False):
            for mouth in frames:
                put(paste_box(waiting.popleft(), mouth, box, mask).numpy())
    elapsed = time.time() - start
    pace = f"{total} frames in {elapsed:.1f} s, {total / elapsed:.0f} frames a second"
    print(f"{cfg.out}: {pace}, reading and writing included", file=messages)


@dataclasses.dataclass
class Options:
    video: str = ""  # the recording to dub; a drawn person if not given
    audio: str = ""  # the sound to dub it with; the video's own if not given
    text: str = ""  # the words to dub it with, said by eSpeak NG
    voice: str = "en-us"  # the eSpeak voice of --text: a language, or one with a variant, de+f4
    face: int = 3  # the number of the drawn person, if there is no --video
    out: str = "out/dub.mp4"  # the dubbed video; - for raw RGB frames on standard output
    box: str = ""  # X,Y,SIDE of the face in pixels; the centred square if not given
    weights: str = ""  # the checkpoint of a student; the bundled one if not given
    device: str = ""  # cuda, mps or cpu; the best that there is if not given
    precision: Precision = "auto"  # number type of matrix products; auto: the device's fastest
    seed: int = 0  # the number that the noise is drawn from
    attention: Literal["auto", "dense"] = "auto"  # in the stream; auto: kernels.py on NVIDIA
    cuda_graph: bool = False  # replay each chunk as one CUDA graph; needs an NVIDIA GPU


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
    net = runtime.load_net(path, DiT, device, runtime.fast_dtype(device))
    if net.stage == "teacher":
        raise UserError(f"{path}: a teacher, which cannot stream; distil a student by distill.py")
    if cfg.cuda_graph and device.type != "cuda":
        raise UserError("--cuda_graph needs an NVIDIA GPU")
    fused = cfg.attention == "auto" and has_kernel(net)
    if device.type == "cuda":
        print(f"attention: {'kernels.py' if fused else 'dense'}", file=sys.stderr)
    how = dict(seed=cfg.seed, cuda_graph=cfg.cuda_graph, fused=fused)
    dub = functools.partial(dub_stream, net, **how)
    size = net.cfg.size
    if not (cfg.video or cfg.audio or cfg.text):
        source, truth = dub_pair(1000 + cfg.seed, 96, size)
        dubbed = torch.cat(list(dub(source.video, truth.audio)))
        media.write_side_by_side(cfg.out, [[source.video, dubbed, truth.video]], truth.audio)
        print(f"{cfg.out}: source | dub | truth; the models never saw this person")
        return
    if cfg.text:
        audio = voices.say(cfg.text, cfg.voice)
    else:
        audio = media.Sound(cfg.audio or cfg.video)
    if cfg.video:
        dub_file(dub, size, cfg, audio)
    else:
        dub_face(dub, size, cfg, audio)


if __name__ == "__main__":
    runtime.run(main)
