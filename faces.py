"""A drawn world of talking people, so that there is no data to download.

`render_clip` makes pictures of lips that go with the speech of voices.py. So we own what no
recorded data set has: the same person, pose and blinks with *another* sound (`dub_pair`), which is
what a dub should give.
"""

import itertools
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data import FPS, log_mel, mouth_mask
from voices import LIPS_FPS, speak

# Nobody is in two of these: the judge has never seen the people that anything else is trained on,
# training curves and choices are made on `val`, and what is reported is of `held-out`.
SPLITS = {"train": 0, "judge": 10_000_000, "held-out": 20_000_000, "val": 30_000_000}
ZOOM = 1.2  # the camera is this near, so that the mouth gets the pixels,
LIFT = 0.15  # and looks this far down, in halves of the picture
SWAY = 0.3  # share of their motion that heads keep, since a camera follows them


def wander(rng, t, slowest, fastest):
    """A random track at the times t (s): four sines of slowest..fastest Hz, deviation near 1."""
    freq = rng.uniform(slowest, fastest, 4)
    phase = rng.uniform(0, 2 * np.pi, 4)
    return np.sin(2 * np.pi * freq * t[:, None] + phase).sum(1) / np.sqrt(2)


class Clip(NamedTuple):
    video: torch.Tensor  # (T, S, S, 3) uint8, on the device that drew it
    audio: np.ndarray  # (T * 640,) float32 in [-1, 1], at 16 kHz
    mouth: np.ndarray  # (T, 2) float32: drawn opening and width as fractions of the picture's side


def person(seed):
    """A seeded identity: colours (RGB), shapes (in halves of the picture before ZOOM), a way of
    speaking. New draws belong at the end: then everybody stays who he was."""
    rng = np.random.default_rng([seed, 3])
    u = rng.uniform
    tone = u()
    skin = np.array([0.97, 0.80, 0.70]) * (1 - tone) + np.array([0.36, 0.23, 0.17]) * tone
    skin = skin + rng.normal(0, 0.02, 3)
    hair = np.array([0.08, 0.06, 0.05]) + u() ** 2 * np.array([0.75, 0.55, 0.30])
    hair = hair + rng.normal(0, 0.02, 3)
    if u() < 0.12:
        hair = np.full(3, u(0.45, 0.8))  # grey
    lip = skin * np.array([0.86, 0.58, 0.58]) + np.array([u(0, 0.10), 0, u(0, 0.04)])
    return SimpleNamespace(
        skin=skin,
        hair=hair.clip(0.02, 0.95),
        lip=lip,
        eye=np.array([u(0.1, 0.4), u(0.15, 0.5), u(0.1, 0.6)]),
        back=u(0.1, 0.9, (2, 3)),  # the background's two colours
        cloth=u(0.05, 0.8, 3),
        width=u(0.66, 0.78),
        height=u(0.82, 0.9),
        chin=u(1.9, 2.6),  # 2: round; more: square
        eye_y=u(-0.33, -0.24),
        eye_x=u(0.27, 0.33),
        eye_r=u(0.1, 0.13),
        brow=u(0.02, 0.045),
        nose=u(0.07, 0.11),
        mouth_y=u(0.45, 0.53),
        mouth_w=u(0.3, 0.38),
        lip_up=u(0.035, 0.065),
        lip_low=u(0.05, 0.085),
        hairline=u(-0.72, -0.5),
        long=u() < 0.4,  # long hair
        beard=u(0.25, 0.8) if u() < 0.3 else 0.0,
        beard_y=u(0.15, 0.45),
        glasses=u() < 0.22,
        light=rng.normal(0, 1, 2) * 0.12,
        gloss=u(0.0, 0.1),
        strength=u(0.65, 1.25),  # how far the mouth opens
        tilt=rng.normal(0, 0.05),  # of the mouth
        smile=rng.normal(0.01, 0.025),
        show=u(0.5, 1.3),  # how much of the teeth shows
    )


def ellipse(x, y, rx, ry):
    """Approximate signed distance (negative inside) to an ellipse, in the units of x and y."""
    return (((x / rx) ** 2 + (y / ry) ** 2).sqrt() - 1) * min(rx, ry)


class Painter:
    """Paints person p, back to front, on `image` (3, T, S, S) float32 in 0..1, on any device."""

    def __init__(self, p, pose, opening, size, device):
        self.p = p
        self.k = size / 2 * ZOOM  # pixels a unit
        # 1 in the mouth's rectangle, where a dub paints, else 0. All that moves with the lips is
        # multiplied by it: outside, where a dub shows the source, nothing may depend on the sound.
        self.inside = (mouth_mask(size).to(device) > 0).float()
        axis = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
        self.px = axis / ZOOM
        self.py = axis[:, None] / ZOOM + LIFT
        self.image = self.tracks(*p.back[0])[:, None].repeat(1, len(opening), size, size)
        self.rows = slice(None)  # that are being painted
        roll, scale, dx, dy, self.yaw, pitch, self.opening = self.tracks(*pose, opening)
        dx = self.px - dx
        dy = self.py - dy
        # Each pixel's place, (T, S, S): x, y on the head; u, v on the face, which turns.
        self.x = (dx * roll.cos() + dy * roll.sin()) / scale
        self.y = (dy * roll.cos() - dx * roll.sin()) / scale
        self.u = self.x - self.yaw
        self.v = self.y - pitch

    def tracks(self, *tracks):
        """Each track (T,) as (T, 1, 1) on the device, to which they travel together."""
        return torch.tensor(np.array(tracks, np.float32), device=self.px.device)[..., None, None]

    def cover(self, distance):
        """Anti-aliased coverage in 0..1 of a signed distance."""
        return (0.5 - distance * self.k).clamp_(0, 1)

    def paint(self, alpha, rgb, shade=1.0):
        """Lays a colour times shade over `rows` of all frames; alpha in 0..1."""
        colour = self.tracks(*np.clip(rgb, 0, 1))[:, None] * shade
        self.image[:, :, self.rows].lerp_(colour, alpha[None])

    def behind_the_face(self):
        """The background's second colour, long hair, shoulders, neck and hair."""
        p = self.p
        x = self.x
        y = self.y
        slope = ((self.py + 0.6 * self.px) * 0.35 + 0.5).clamp(0, 1)[None]
        self.paint(slope, p.back[1])
        if p.long:
            self.paint(self.cover(ellipse(x, y - 0.15, p.width + 0.13, 1.15)), p.hair)
        self.paint(self.cover(ellipse(self.px, self.py - 1.28, 0.95, 0.42))[None], p.cloth)
        neck = ((y - 0.3) * self.k).clamp(0, 1) * ((1.02 - y) * self.k).clamp(0, 1)
        self.paint(self.cover(x.abs() - 0.34) * neck, p.skin * 0.72)
        hair = ellipse(x, y + 0.12, p.width + 0.09, p.height + 0.06)
        self.paint(self.cover(hair) * (y < 0.1), p.hair)

    def face(self, noise):
        """Skin, beard and fringe. noise (48, 48): unevenness of the skin, fine and coarse."""
        p = self.p
        x = self.x
        y = self.y
        u = self.u
        v = self.v
        # The jaw: below the nose the face is stretched down as the mouth opens.
        jaw = ((y - 0.2) * 1.6).clamp(0, 1) * (1 - (u / 0.44) ** 2).clamp(min=0)
        jaw = y - 0.08 * self.inside * self.opening * jaw
        noise = torch.tensor(noise, dtype=torch.float32, device=x.device)[None, None]
        noise = noise + 3 * F.interpolate(F.avg_pool2d(noise, 4), size=48, mode="bilinear")
        noise = noise.expand(len(u), -1, -1, -1)
        grid = torch.stack([u, jaw], -1) * 0.8
        noise = F.grid_sample(noise, grid, align_corners=False, padding_mode="reflection")[:, 0]
        low = (jaw / p.height).clamp(min=0) ** p.chin
        high = (y / (p.height * 0.95)).clamp(max=0) ** 2
        edge = ((x / p.width).abs() ** p.chin + low + high) ** (1 / p.chin)  # 1: the edge
        shade = 1 + p.light[0] * u * 1.3 + p.light[1] * v
        shade = shade - 0.22 * edge.clamp(0, 1) ** 4 + 0.018 * noise
        fold = (u.abs() - p.mouth_w - 0.12 + 0.2 * (v - 0.4)) / 0.035  # from nose to chin
        self.shade = shade - 0.10 * torch.exp(-(fold**2) - ((v - 0.3) / 0.16) ** 2)
        alpha = self.cover((edge - 1) * p.width)
        self.paint(alpha, p.skin, shade=self.shade)
        if p.beard:
            beard = jaw - p.beard_y + 0.9 * (x.abs() - 0.45).clamp(max=0) + 0.02 * noise
            beard = (0.5 + beard * 9).clamp(0, 1) * p.beard * (1 + 0.12 * noise)
            self.paint(alpha * beard.clamp(0, 1), p.hair * 0.8, shade=self.shade)
        fringe = y - p.hairline - 0.10 * torch.sin(2.2 * u + p.light[0] * 20) - 0.03 * noise
        self.paint(alpha * self.cover(fringe / 2), p.hair, shade=1 + 0.08 * noise)

    def eyes_and_nose(self, blink, gaze):
        """blink (T,) in 0..1: how shut the eyes are; gaze (T,): shift of the pupils."""
        p = self.p
        r = p.eye_r
        rows = slice(0, int(len(self.inside) * 0.66))  # the others need no work
        self.rows = rows
        u = self.u[:, rows]
        v = self.v[:, rows]
        shade = self.shade[:, rows]
        lid, gaze = self.tracks(r * 0.62 * (1 - 0.92 * blink), gaze)
        y = v - p.eye_y
        for side in (-1, 1):
            x = u - side * p.eye_x
            socket = ellipse(x, y, r * 1.25, r * 0.95)
            self.paint(self.cover(socket / 2) * 0.25, p.skin * 0.6, shade)
            eye = self.cover((((x / r) ** 2 + (y / lid) ** 2).sqrt() - 1) * lid)
            eye = eye * self.cover(x.abs() - r)
            self.paint(eye, (0.93, 0.93, 0.92))
            for share, rgb in ((0.48, p.eye), (0.22, (0.03, 0.03, 0.03))):  # iris and pupil
                self.paint(eye * self.cover(ellipse(x - gaze, y, r * share, r * share)), rgb)
            brow = (y + r * 1.35 + 0.5 * x**2 - 0.02 * side * x).abs() - p.brow
            self.paint(self.cover(brow) * self.cover(x.abs() - r * 1.4), p.hair * 0.7)
            if p.glasses:
                frame = ellipse(x, y, r * 1.75, r * 1.5).abs() - 0.014
                self.paint(self.cover(frame), (0.08, 0.08, 0.08))
        ridge = torch.exp(-(((u - 0.6 * self.yaw) / 0.05) ** 2)) * (0.10 + p.gloss)
        ridge = ridge * ((v + 0.3) * 3).clamp(0, 1) * ((0.13 - v) * 8).clamp(0, 1)
        self.paint(ridge, (1, 1, 1))
        for side in (-1, 1):
            nostril = ellipse(u - side * p.nose * 0.6, v - 0.12, p.nose * 0.42, 0.028)
            self.paint(self.cover(nostril) * 0.55, p.skin * 0.35)

    def mouth(self, *tracks):
        """Lips, teeth and tongue from the tracks (T,) that render_clip makes."""
        p = self.p
        rows = slice(len(self.inside) // 2, None)
        self.rows = rows
        shade = self.shade[:, rows]
        inside = self.inside[rows]
        half, rounding, teeth, tongue, aside, slant, smile = self.tracks(*tracks)
        gap = 0.31 * self.opening  # height of the inner opening, from -lower to lower
        u = self.u[:, rows] - aside
        w = (u / half).clamp(-1, 1)  # -1 and 1 at the corners
        bend = 1 - w * w
        circle = bend.sqrt()
        y = self.v[:, rows] - p.mouth_y - 0.25 * gap  # the lower lip moves more than the upper
        y = y - (p.tilt + slant) * u - (p.smile + smile) * (1 - 2 * w * w)
        lower = 0.5 * gap * torch.lerp(bend, circle, 0.25 + 0.75 * rounding.clamp(0, 1))
        full = (1 + 0.25 * rounding) * circle
        bow = 1 - 0.30 * torch.exp(-((w / 0.16) ** 2))  # the dip in the middle of the upper lip
        top = -lower - p.lip_up * full * bow
        bottom = lower + p.lip_low * full
        shadow = torch.exp(-(((y - bottom - 0.05) / 0.03) ** 2)) * circle * 0.22
        self.paint(shadow * inside, p.skin * 0.55, shade)
        inside = inside * self.cover(u.abs() - half)
        gloss = torch.exp(-(((y - lower - p.lip_low * 0.5) / 0.018) ** 2))
        lit = shade * (1 + (0.10 + p.gloss) * gloss)
        self.paint(inside * self.cover(top - y) * self.cover(y - bottom), p.lip, lit)
        hole = inside * self.cover(-lower - y) * self.cover(y - lower)
        self.paint(hole, (0.16, 0.04, 0.05))
        tip = lower - gap * (0.12 + 0.50 * tongue) * (1 - 0.6 * w * w)
        seen = self.cover(tip - y) * (gap * 12).clamp(0, 1)
        self.paint(hole * seen, (0.70, 0.30, 0.32))
        edge = (0.03 + 0.05 * teeth) * (1 - 0.5 * w * w) - lower
        seen = self.cover(y - edge) * (teeth * 1.5).clamp(0, 1) * (1 - 0.5 * w**4)
        ridges = torch.exp(-(((torch.remainder(u / 0.055, 1) - 0.5) / 0.09) ** 2))
        self.paint(hole * seen, (1, 1, 1), 0.86 - 0.10 * ridges)


def render_clip(seed, frames, size, text=None, speech=None, detail=None, device="cpu"):
    """Draw a Clip of `frames` frames, size x size pixels, on `device`. `seed` decides the person,
    pose, blinks and voice; `text` (default: seed) the words and hence the lips; `detail` (default:
    text) what the sound does not decide, such as how much of the teeth shows.
    `render_clip(seed, ..., text=other)` is the exact dub of `render_clip(seed, ...)`.

    speech: (audio, lips), see voices.speak, to be said instead, in sound and lips."""
    text = seed if text is None else text
    p = person(seed)
    rng = np.random.default_rng([seed, 4])
    audio, lips = speech or speak(seed, text, frames / FPS)
    t = np.arange(frames) / FPS
    lips = lips[(t * LIPS_FPS).astype(int) + LIPS_FPS // (2 * FPS)].T  # (5, T), mid-frame
    # Roll, scale, dx, dy, yaw, pitch: how far each goes, and at most how fast (Hz).
    sways = ((0.05, 0.6), (0.02, 0.4), (0.03, 0.7), (0.025, 0.8), (0.05, 0.5), (0.02, 0.6))
    pose = np.stack([SWAY * far * wander(rng, t, 0.05, fast) for far, fast in sways])
    pose[1] += 1
    starts = np.cumsum(rng.uniform(1.0, 4.0, max(8, frames // 25))) - rng.uniform(0, 2)
    blink = np.exp(-(((t[:, None] - starts) / 0.06) ** 2)).max(1)
    gaze = 0.025 * np.round(wander(rng, t, 0.1, 0.5))
    # What the sound leaves open: how much of teeth and tongue shows, and how the mouth sits.
    fine = np.random.default_rng([text if detail is None else detail, 5])
    teeth = (lips[3] * p.show + 0.3 * wander(fine, t, 0.3, 3.0)).clip(0, 1.2)
    tongue = (lips[4] + 0.25 * wander(fine, t, 0.3, 3.0)).clip(0, 1)
    sits = [far * wander(fine, t, 0.3, 2.0) for far in (0.03, 0.06, 0.015)]
    wide, rounding = lips[1:3].astype(np.float32)
    half = p.mouth_w * (0.74 + 0.36 * wide - 0.40 * rounding)  # in halves: the width in pictures
    painter = Painter(p, pose, lips[0] * p.strength, size, device)
    painter.behind_the_face()
    painter.face(np.random.default_rng([seed, 6]).standard_normal((48, 48)))
    painter.eyes_and_nose(blink, gaze)
    painter.mouth(half, rounding, teeth, tongue, *sits)
    video = (painter.image * 255).add_(0.5).clamp_(0, 255).to(torch.uint8)
    mouth = np.stack([0.155 * lips[0] * p.strength, half], 1).astype(np.float32)
    mouth = mouth * ZOOM * pose[1].astype(np.float32)[:, None]
    return Clip(video.permute(1, 2, 3, 0).contiguous(), audio, mouth)


def dub_pair(index, frames, size, split="held-out", language=None, device="cpu"):
    """(source, truth), two Clips: the same person, pose and blinks saying other words. Source:
    what a dubber is given, with truth.audio. Truth: what it should give back. `language`: another
    than the person's own, see voices.LANGUAGES."""
    seed = SPLITS[split] + 2 * index
    source = render_clip(seed, frames, size, device=device)
    speech = speak(seed, seed + 1, frames / FPS, language)
    return source, render_clip(seed, frames, size, text=seed + 1, speech=speech, device=device)


def drawn_clips(split, size, frames, device):
    """The people of a split without end, as data.Clips takes them: (video, audio, mouth) each."""
    for i in itertools.count():
        yield render_clip(SPLITS[split] + 2 * i, frames, size, device=device)


class Pairs(NamedTuple):
    """Dubs to be made, and their answer."""

    source: torch.Tensor  # (n, T, S, S, 3) uint8
    truth: torch.Tensor  # the same people saying what `mel` says
    mel: torch.Tensor  # (n, 4 T, MELS), the truth's sound
    mouth: torch.Tensor  # (n, T, 2), the truth's opening and width, see Clip


def make_pairs(n, size, split, device, latents=24):
    """Pairs of n people of `split`, who say other words."""
    clips = [dub_pair(i, 4 * latents, size, split, device=device) for i in range(n)]
    source = torch.stack([source.video for source, _ in clips])
    truth = torch.stack([truth.video for _, truth in clips])
    mel = torch.stack([log_mel(truth.audio) for _, truth in clips])
    mouth = torch.stack([torch.from_numpy(truth.mouth) for _, truth in clips])
    return Pairs(source.to(device), truth.to(device), mel.to(device), mouth.to(device))
