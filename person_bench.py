"""Held-out sentences of a real person, dubbed with the sound of other held-out sentences of his:
does the mouth open as his own did when he said them?

The opening is read from the pictures by people.py's landmarks, which know nothing of the networks,
and correlated frame by frame: sound and pictures begin together, so that no alignment is needed.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import people
from data import FPS, RATE, log_mel
from media import Sound, read_video, square
from runtime import UserError

READ_AT = 192  # pixels: side that pictures are brought to before landmarks are looked for


class Sentences(NamedTuple):
    """Held-out sentences, cut to the same length."""

    names: list
    video: torch.Tensor  # (n, T, S, S, 3) uint8
    mel: torch.Tensor  # (n, 4 T, MELS)
    opening: np.ndarray  # (n, T): read from the recordings themselves, at their full size


def held_out(folder, n, size, frames=72):
    """Up to n Sentences of a folder that people.py has made, spread over all that is held out
    there. UserError: there are not two."""
    table = people.read_table(folder)
    parts = [piece for line in table for piece in line.get("pieces", [])]
    parts = [piece for piece in parts if piece["held_out"] and piece["frames"] >= frames]
    if len(parts) < 2:
        need = f"two held-out pieces of {frames / FPS:.1f} s"
        raise UserError(f"{folder}: fewer than {need} in it; make it with people.py")
    n = min(n, len(parts))
    parts = [parts[i * len(parts) // n] for i in range(n)]
    video = []
    mel = []
    for piece in parts:
        path = Path(folder) / piece["file"]
        start = piece["start"]
        taken = list(read_video(path))[start : start + frames]
        video.append(torch.stack([square(frame, size) for frame in taken]))
        samples = RATE // FPS
        mel.append(log_mel(Sound(path)[start * samples : (start + frames) * samples]))
    opening = np.array([piece["mouth"][:frames] for piece in parts])[:, :, 0]
    names = [piece["name"] for piece in parts]
    return Sentences(names, torch.stack(video), torch.stack(mel), opening)


def read_opening(video, finder):
    """The opening of the mouth (T,) in each frame of video (T, S, S, 3) uint8, NaN where no face is
    found. In pictures of 32 pixels it still correlates by .93 with what it is at full size, in
    pictures of 128 by .98."""
    pictures = video.permute(0, 3, 1, 2).float()
    pictures = F.interpolate(pictures, (READ_AT, READ_AT), mode="bicubic", align_corners=False)
    pictures = pictures.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    marks, _ = people.follow(pictures, finder)
    return people.mouth_of(marks, np.full(len(marks), float(READ_AT)))[:, 0]


def correlation(a, b):
    """Of two tracks (T,), over the frames in which both are known; NaN if those are under half."""
    known = np.isfinite(a) & np.isfinite(b)
    if known.mean() < 0.5:
        return np.nan
    return np.corrcoef(a[known], b[known])[0, 1]


def mean_and_error(values, rng):
    """The mean of the values that are known, and half the 95 % interval of 2000 resamples."""
    values = np.array(values)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return np.nan, np.nan
    means = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return values.mean(), (high - low) / 2


def cross_dub(dub, sentences, finder):
    """Dub each sentence's pictures with the next one's sound. dub(source (1, T, S, S, 3) uint8,
    mel (1, 4 T, MELS)) -> the dub, like source.

    -> {name: (mean of the correlations, half its interval)}: `asked`: the dub's opening with that
    of the person when he said it; `old`: with that of the pictures that were dubbed over; `shared`:
    the two recordings with each other, which is what `old` is where nothing leaks from the old
    mouth into a dub that is right; `limit`: what is read in the real pictures, at this size, with
    what is asked, the best that `asked` can be; and `lost`, the share of frames without a face."""
    rows = {"asked": [], "old": [], "shared": [], "limit": []}
    lost = []
    n = len(sentences.names)
    for i in range(n):
        other = (i + 1) % n
        source = sentences.video[i : i + 1]
        made = dub(source, sentences.mel[other : other + 1])
        opening = read_opening(made[0], finder)
        real = read_opening(sentences.video[other], finder)
        rows["asked"].append(correlation(opening, sentences.opening[other]))
        rows["old"].append(correlation(opening, sentences.opening[i]))
        rows["shared"].append(correlation(sentences.opening[i], sentences.opening[other]))
        rows["limit"].append(correlation(real, sentences.opening[other]))
        lost.append(np.isnan(opening).mean())
    rng = np.random.default_rng(0)
    result = {name: mean_and_error(values, rng) for name, values in rows.items()}
    result["lost"] = float(np.mean(lost))
    return result
