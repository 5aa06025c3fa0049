"""The built-in world: drawn people who say random syllables, so that there is no data to download.

`draw` draws a person (seeded: skin, hair, beard, glasses, light) who talks (seeded: voice, words); the sound is synthesised from
the same phonemes as the lips. Because we draw it, we own what no recorded data set has: the same person, pose and blinks with
*another* sound (`dub_pair`), the exact answer that a dub should give. `python data.py` shows some.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

FPS = 25                # video frames a second
RATE = 16000            # audio samples a second
SPEECH_FPS = 200        # phoneme track, frames a second
# Nobody is in two of these: the judge has never seen the people that anything else is trained on, training curves are
# drawn on `watch`, and every number that is reported comes from `held-out`.
SPLITS = {"train": 0, "judge": 10_000_000, "held-out": 20_000_000, "watch": 30_000_000}


# ------------------------------------------------------------------------------------------------ phonemes and voice
# Formants F1-F3 (Hz; Peterson and Barney 1952 for the vowels), voicing, noise centre (Hz) and level, duration (s), then
# the lips: opening, width, rounding, upper teeth, tongue, and dominance, i.e. how little neighbours may bend the shape.
PHONES = {
    #      F1   F2    F3   voice noise  level  dur   open wide round teeth tongue dominance
    "a": (730, 1090, 2440, 1.00,    0, 0.00, .150, 1.00, .55, .00, .30, .10, 1.0),
    "e": (530, 1840, 2480, 1.00,    0, 0.00, .130, .55, .85, .00, .55, .25, 1.0),
    "i": (270, 2290, 3010, .90,     0, 0.00, .120, .25, 1.0, .00, .70, .30, 1.0),
    "o": (570,  840, 2410, 1.00,    0, 0.00, .140, .65, .25, .75, .05, .05, 1.2),
    "u": (300,  870, 2240, .90,     0, 0.00, .130, .30, .05, 1.0, .00, .05, 1.4),
    "@": (500, 1500, 2500, .80,     0, 0.00, .080, .40, .50, .10, .30, .15, 0.6),
    "m": (250, 1000, 2200, .35,     0, 0.00, .080, .00, .50, .10, .00, .00, 5.0),
    "b": (250,  900, 2200, .20,   700, 0.25, .070, .00, .50, .10, .00, .00, 5.0),
    "p": (300,  900, 2200, .00,   900, 0.45, .075, .00, .50, .10, .00, .00, 5.0),
    "f": (300, 1400, 2300, .00,  5500, 0.30, .090, .08, .60, .00, .90, .00, 3.5),
    "v": (300, 1400, 2300, .40,  5000, 0.18, .070, .08, .60, .00, .90, .00, 3.5),
    "s": (300, 1700, 2600, .00,  6200, 0.70, .100, .14, .80, .00, .95, .05, 1.6),
    "z": (300, 1700, 2600, .40,  6000, 0.40, .080, .14, .80, .00, .95, .05, 1.6),
    "S": (300, 1800, 2400, .00,  3200, 0.75, .105, .22, .20, .70, .70, .05, 2.0),
    "t": (350, 1750, 2600, .00,  4300, 0.55, .060, .22, .65, .00, .65, .40, 0.9),
    "d": (300, 1700, 2600, .40,  3800, 0.22, .060, .22, .65, .00, .60, .40, 0.9),
    "n": (280, 1650, 2600, .45,     0, 0.00, .070, .24, .60, .00, .45, .60, 0.8),
    "l": (380, 1150, 2700, .70,     0, 0.00, .070, .38, .60, .00, .35, .90, 0.8),
    "k": (350, 2000, 2500, .00,  2200, 0.50, .065, .32, .55, .05, .30, .10, 0.6),
    "g": (300, 1900, 2400, .35,  2000, 0.22, .065, .32, .55, .05, .30, .10, 0.6),
    "w": (300,  700, 2200, .70,     0, 0.00, .070, .14, .00, 1.0, .00, .00, 2.2),
    "r": (350, 1100, 1650, .70,     0, 0.00, .075, .24, .20, .60, .20, .10, 1.2),
    " ": (500, 1500, 2500, .00,     0, 0.00, .300, .00, .50, .05, .00, .00, 1.5),
}
VOWELS, CONSONANTS = "aeiou@", "mbpfvszStdnlkgwr"
ASIDE = .15             # the mouth mask leaves out this share of the picture at either side
ZOOM, LIFT = 1.2, .15   # the camera is this near and looks this far down (in halves of the picture): the mouth gets the pixels
SWAY = .3               # share of their motion that heads keep, since a camera (or an alignment by landmarks) follows them; 1: it stands still


def smooth(x, sigma):
    """Gaussian along axis 0 of x (K, C) float; sigma in rows; the ends are held."""
    n = max(1, int(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-n, n + 1) / sigma) ** 2)
    padded = np.pad(x, ((n, n), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, kernel / kernel.sum(), mode="valid") for column in padded.T], 1)


def wander(rng, t, slowest, fastest):
    """A smooth random track at the times t (seconds): four sines of slowest..fastest Hz, standard deviation near 1."""
    freq, phase = rng.uniform(slowest, fastest, 4), rng.uniform(0, 2 * np.pi, 4)
    return np.sin(2 * np.pi * freq * t[:, None] + phase).sum(1) / np.sqrt(2)


def speak(voice_seed, text_seed, seconds, speed=1.):
    """Random syllables by source-filter synthesis.

    Returns audio (seconds * RATE) float32 in [-1, 1] and lips (seconds * SPEECH_FPS, 5) float64, each about 0..1. Lips
    are the same phonemes under dominance-weighted smoothing (after Cohen and Massaro 1993), wider than the sound's and
    40 ms ahead of it, as lips are.
    """
    voice, text = np.random.default_rng([voice_seed, 1]), np.random.default_rng([text_seed, 2])
    pitch = voice.uniform(85, 240)
    tract = 0.88 + 0.27 * (pitch - 85) / 155 + voice.normal(0, .03)  # a short vocal tract goes with a high voice
    tempo, tilt, breath = speed * voice.uniform(.8, 1.25), voice.uniform(.7, 1.3), voice.uniform(.005, .03)

    phones, total = [" "] if text.random() < .5 else [], 0.
    durations = [text.uniform(.05, .4)] * len(phones)
    while total < seconds + .2:
        for _ in range(text.integers(3, 10)):
            for p in [text.choice(list(CONSONANTS)), text.choice(list(VOWELS))] + [text.choice(list(CONSONANTS))] * (text.random() < .25):
                phones.append(p)
                durations.append(PHONES[p][6] * text.uniform(.75, 1.45) / tempo)
        phones.append(" ")
        durations.append(text.uniform(.2, .65))
        total = sum(durations)
    table = np.array([PHONES[p] for p in phones])
    rows = np.repeat(np.arange(len(phones)), np.maximum(1, np.round(np.array(durations) * SPEECH_FPS)).astype(int))
    track = table[rows][: int(round(seconds * SPEECH_FPS)) + 8]      # 8 rows = 40 ms that the lips run ahead

    dominance = track[:, 12:]
    lips = smooth(track[:, 7:12] * dominance, 9.) / smooth(dominance, 9.)
    lips, track = lips[8:], track[:-8]

    # The source: a pulse at each glottal period, and white noise. The filter: resonances, per 5 ms frame of an STFT.
    n, samples = len(track), int(round(seconds * RATE))
    t = np.arange(n) / SPEECH_FPS
    level = smooth(track[:, [3, 5]], 1.6) * (1 + .25 * wander(text, t, .5, 3))[:, None]
    formants = smooth(track[:, :3], 4.) * tract
    f0 = pitch * np.exp(.09 * wander(text, t, .3, 2.5) + .01 * wander(text, t, 4, 9))
    phase = np.cumsum(np.interp(np.arange(samples) / RATE, t, f0)) / RATE
    pulses = np.diff(np.floor(phase), prepend=0.) * np.sqrt(RATE / pitch)
    source = torch.from_numpy(np.stack([pulses, text.standard_normal(samples)])).float()
    window = torch.hann_window(320)
    spectrum = torch.stft(source, 320, RATE // SPEECH_FPS, window=window, return_complex=True)[..., :n]    # (2, 161, n)
    freq = np.linspace(0, RATE / 2, 161)[:, None]
    voiced = sum(a / (1 + ((freq - formants[:, k]) / w) ** 2) for k, (a, w) in enumerate([(1, 90), (.6, 120), (.35, 180)]))
    voiced = (voiced + .02) * (1 + freq / 900) ** -tilt * (level[:, 0] + 1e-3)
    hiss = np.exp(-.5 * ((freq - track[:, 4]) / (350 + .22 * track[:, 4])) ** 2) * level[:, 1] + breath * voiced
    shaped = spectrum[0] * torch.from_numpy(voiced).float() + .35 * spectrum[1] * torch.from_numpy(hiss).float()
    audio = torch.istft(shaped, 320, RATE // SPEECH_FPS, window=window, length=samples).numpy()

    # A microphone: level, background noise, tone. The words' seed decides, so one voice is recorded in many ways.
    audio = audio / (audio.std() + 1e-6) * .08 * 10 ** (text.uniform(-6, 6) / 20)
    audio = audio + text.standard_normal(samples) * .08 * 10 ** (-text.uniform(8, 40) / 20)
    audio = audio + text.uniform(-.4, .4) * np.append(0, audio[:-1])
    return np.clip(audio, -1, 1).astype(np.float32), lips


# ------------------------------------------------------------------------------------------------------ talking heads
class Clip(NamedTuple):
    """video (T, S, S, 3) uint8; audio (T * 640,) float32 at 16 kHz; mouth (T, 2) float32: the drawn opening and width of
    the mouth as fractions of the picture's side."""
    video: torch.Tensor
    audio: np.ndarray
    mouth: np.ndarray


def person(seed):
    """A seeded identity: colours (RGB in 0..1), shapes in units of half the picture before ZOOM, and a way of speaking."""
    rng = np.random.default_rng([seed, 3])
    u = rng.uniform
    tone = u()
    skin = np.array([.97, .80, .70]) * (1 - tone) + np.array([.36, .23, .17]) * tone + rng.normal(0, .02, 3)
    hair = np.array([.08, .06, .05]) + u() ** 2 * np.array([.75, .55, .30]) + rng.normal(0, .02, 3)
    if u() < .12:
        hair = np.full(3, u(.45, .8))                                # grey
    return dict(
        skin=skin, hair=hair.clip(.02, .95), lip=skin * np.array([.86, .58, .58]) + np.array([u(0, .10), 0, u(0, .04)]),
        eye=np.array([u(.1, .4), u(.15, .5), u(.1, .6)]), back=rng.uniform(.1, .9, (2, 3)), cloth=rng.uniform(.05, .8, 3),
        width=u(.66, .78), height=u(.82, .90), chin=u(1.9, 2.6), eye_y=u(-.33, -.24), eye_x=u(.27, .33), eye_r=u(.10, .13),
        brow=u(.02, .045), nose=u(.07, .11), mouth_y=u(.45, .53), mouth_w=u(.30, .38), lip_up=u(.035, .065), lip_low=u(.05, .085),
        hairline=u(-.72, -.5), long=u() < .4, beard=u(.25, .8) if u() < .3 else 0., beard_y=u(.15, .45), glasses=u() < .22,
        light=rng.normal(0, 1, 2) * .12, gloss=u(.0, .10),
        strength=u(.65, 1.25), tilt=rng.normal(0, .05), smile=rng.normal(.01, .025), show=u(.5, 1.3))


def mouth_mask(size):
    """(S, S) float in 0..1: 1 where the model must invent the picture. Soft over a 24th of the side, so that no edge shows. What the
    sound decides is drawn inside it only."""
    axis = (torch.arange(size) + .5) / size
    ramp = lambda a, lo, hi: ((a - lo) * 24).clamp(0, 1) * ((hi - a) * 24).clamp(0, 1)                # noqa: E731
    return ramp(axis, .53, .99)[:, None] * ramp(axis, ASIDE, 1 - ASIDE)[None, :]


def coverage(distance, k):
    """Anti-aliased inside-ness in 0..1 of a signed distance (negative inside) at k pixels a unit."""
    return (.5 - distance * k).clamp_(0, 1)


def ellipse(x, y, cx, cy, rx, ry):
    """Approximate signed distance to an ellipse, in the units of x and y."""
    return ((((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2).sqrt() - 1) * min(rx, ry)


def band(y, top, bottom, k):
    """Coverage of the region between two curves."""
    return ((y - top) * k + .5).clamp(0, 1) * ((bottom - y) * k + .5).clamp(0, 1)


def draw(seed, frames, size, text=None, voice=None, detail=None, speed=1.):
    """Draw a Clip of `frames` frames, size x size pixels. `seed` decides the person, pose and blinks; `text` and
    `voice` the sound and hence the lips (default: seed); `detail` what the sound does not decide, such as how much of the
    teeth shows (default: text); `speed` how fast it is said. `draw(seed, ..., text=other)` is the exact dub of `draw(seed, ...)` to other words."""
    text = seed if text is None else text
    p, rng = person(seed), np.random.default_rng([seed, 4])
    fine = np.random.default_rng([text if detail is None else detail, 5])
    audio, lips = speak(seed if voice is None else voice, text, frames / FPS, speed)
    t = np.arange(frames) / FPS
    lips = lips[(t * SPEECH_FPS).astype(int) + SPEECH_FPS // (2 * FPS)]                              # (T, 5)

    column = lambda x: torch.as_tensor(np.asarray(x), dtype=torch.float32).reshape(-1, 1, 1)         # noqa: E731
    colour = lambda c: torch.tensor(np.clip(c, 0, 1), dtype=torch.float32).reshape(3, 1, 1, 1)       # noqa: E731
    k, axis = size / 2 * ZOOM, (torch.arange(size) + .5) / size * 2 - 1
    img, inside = torch.empty(3, frames, size, size), (mouth_mask(size) > 0).float()

    def paint(alpha, c, rows=slice(None)):
        img[:, :, rows] = torch.lerp(img[:, :, rows], c if torch.is_tensor(c) else colour(c), alpha[None])

    # Background and head pose. Everything on the head is drawn in its own coordinates x, y; u is x turned by the yaw.
    px, py = axis.expand(size, size)[None] / ZOOM, axis[:, None].expand(size, size)[None] / ZOOM + LIFT
    img[:] = torch.lerp(colour(p["back"][0]), colour(p["back"][1]), ((py + .6 * px) * .35 + .5).clamp(0, 1)[None])
    sway = lambda amount, fastest, around=0: column(around + SWAY * amount * wander(rng, t, .05, fastest))     # noqa: E731
    roll, scale = sway(.05, .6), sway(.02, .4, around=1)
    dx, dy = px - sway(.03, .7), py - sway(.025, .8)
    x, y = (dx * roll.cos() + dy * roll.sin()) / scale, (dy * roll.cos() - dx * roll.sin()) / scale
    yaw, pitch = sway(.05, .5), sway(.02, .6)
    u, v = x - yaw, y - pitch
    opening = column(lips[:, 0] * p["strength"])
    # The jaw: below the nose the face is stretched down as the mouth opens.
    yj = y - .08 * inside * opening * ((y - .2) * 1.6).clamp(0, 1) * (1 - (u / .44) ** 2).clamp(min=0)

    if p["long"]:
        paint(coverage(ellipse(x, y, 0, .15, p["width"] + .13, 1.15), k), p["hair"])
    paint(coverage(ellipse(px, py, 0, 1.28, .95, .42), k).expand(frames, -1, -1), p["cloth"])
    paint(coverage((x.abs() - .34), k) * ((y - .3) * k).clamp(0, 1) * ((1.02 - y) * k).clamp(0, 1), p["skin"] * .72)
    paint(coverage(ellipse(x, y, 0, -.12, p["width"] + .09, p["height"] + .06), k) * (y < .1), p["hair"])

    lower = (yj / p["height"]).clamp(min=0)
    face = ((x / p["width"]).abs() ** p["chin"] + lower ** p["chin"] + (y / (p["height"] * .95)).clamp(max=0) ** 2) ** (1 / p["chin"])
    alpha = coverage((face - 1) * p["width"], k)
    noise = torch.from_numpy(np.random.default_rng([seed, 6]).standard_normal((1, 1, 48, 48))).float()
    noise = noise + F.interpolate(F.avg_pool2d(noise, 4), size=48, mode="bilinear") * 3
    grid = torch.stack([u, yj], -1) * .8
    texture = F.grid_sample(noise.expand(frames, -1, -1, -1), grid, align_corners=False, padding_mode="reflection")[:, 0]
    shade = 1 + p["light"][0] * u * 1.3 + p["light"][1] * v - .22 * face.clamp(0, 1) ** 4 + .018 * texture
    shade = shade - .10 * torch.exp(-((u.abs() - p["mouth_w"] - .12 + .2 * (v - .4)) / .035) ** 2 - ((v - .3) / .16) ** 2)
    skin = colour(p["skin"]) * shade[None]
    paint(alpha, skin)
    if p["beard"]:
        edge = .5 + (yj - p["beard_y"] + .9 * (x.abs() - .45).clamp(max=0) + .02 * texture) * 9
        paint(alpha * (edge.clamp(0, 1) * p["beard"] * (1 + .12 * texture)).clamp(0, 1), colour(p["hair"] * .8) * shade[None])
    fringe = coverage(y - p["hairline"] - .10 * torch.sin(2.2 * u + p["light"][0] * 20) - .03 * texture, k / 2)
    paint(alpha * fringe, colour(p["hair"]) * (1 + .08 * texture)[None])

    blink = np.zeros(frames)
    for start in np.cumsum(rng.uniform(1., 4., max(8, frames // 25))) - rng.uniform(0, 2):
        blink = np.maximum(blink, np.exp(-((t - start) / .06) ** 2))
    gaze, top = column(.025 * np.round(wander(rng, t, .1, .5))), slice(0, int(size * .66))
    draw_eyes(paint, top, u[:, top], v[:, top], shade[:, top], k, p, column, colour, blink, gaze, yaw)

    low = slice(int(size * .5), size)
    within = lambda alpha, c, rows: paint(alpha * inside[rows], c, rows)                             # noqa: E731
    width = draw_mouth(within, low, u[:, low], v[:, low], shade[:, low], k, p, column, colour, lips, fine, t)
    video = (img * 255).add_(.5).clamp_(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()
    mouth = np.stack([.155 * lips[:, 0] * p["strength"], width.flatten().numpy()], 1).astype(np.float32)
    return Clip(video, audio, mouth * ZOOM * scale.flatten().numpy()[:, None])


def draw_eyes(paint, rows, u, v, shade, k, p, column, colour, blink, gaze, yaw):
    """Eyes, brows, glasses and nose on the head's coordinates u, v (T, rows, S). blink (T,) in 0..1; gaze and yaw (T, 1, 1)."""
    for side in (-1, 1):
        ex, ey, r = side * p["eye_x"], p["eye_y"], p["eye_r"]
        lid = column(r * .62 * (1 - .92 * blink))
        eye = coverage((((u - ex) / r) ** 2 + ((v - ey) / lid) ** 2).sqrt().sub(1) * lid, k) * coverage((u - ex).abs() - r, k)
        paint(coverage(ellipse(u, v, ex, ey, r * 1.25, r * .95), k / 2) * .25, colour(p["skin"] * .6) * shade[None], rows)
        paint(eye, np.array([.93, .93, .92]), rows)
        paint(eye * coverage(ellipse(u, v, ex + gaze, ey, r * .48, r * .48), k), p["eye"], rows)
        paint(eye * coverage(ellipse(u, v, ex + gaze, ey, r * .22, r * .22), k), np.full(3, .03), rows)
        paint(coverage((v - ey + r * 1.35 + .5 * (u - ex) ** 2 - .02 * side * (u - ex)).abs() - p["brow"], k)
              * coverage((u - ex).abs() - r * 1.4, k), p["hair"] * .7, rows)
        if p["glasses"]:
            paint(coverage(ellipse(u, v, ex, ey, r * 1.75, r * 1.5).abs() - .014, k), np.full(3, .08), rows)
    nose = torch.exp(-((u - .6 * yaw) / .05) ** 2) * (.10 + p["gloss"]) * ((v + .3) * 3).clamp(0, 1) * ((.13 - v) * 8).clamp(0, 1)
    paint(nose, np.ones(3), rows)
    for side in (-1, 1):
        paint(coverage(ellipse(u, v, side * p["nose"] * .6, .12, p["nose"] * .42, .028), k) * .55, p["skin"] * .35, rows)


def draw_mouth(paint, rows, u, v, shade, k, p, column, colour, lips, fine, t):
    """Lips, teeth and tongue on the head's coordinates u, v (T, rows, S). Returns the mouth's width (T, 1, 1), as a
    fraction of the picture's side before ZOOM; its inner opening is .155 * lips' opening * strength of it."""
    opening, wide, rounding = (column(lips[:, i]) for i in range(3))
    # What the sound leaves open: how much of the teeth and the tongue shows, and how the mouth sits: aside, aslant, in a smile.
    teeth = column(np.clip(lips[:, 3] * p["show"] + .3 * wander(fine, t, .3, 3.), 0, 1.2))
    tongue = column(np.clip(lips[:, 4] + .25 * wander(fine, t, .3, 3.), 0, 1))
    aside, aslant, smile = (a * column(wander(fine, t, .3, 2.)) for a in (.03, .06, .015))
    u = u - aside
    half = p["mouth_w"] * (.74 + .36 * wide - .40 * rounding)
    gap = .31 * opening * p["strength"]                              # height of the inner opening
    w = (u / half).clamp(-1, 1)
    y = v - p["mouth_y"] - (p["tilt"] + aslant) * u - (p["smile"] + smile) * (1 - 2 * w * w)
    y = y - .25 * gap                                                # the lower lip goes down more than the upper goes up
    arch = torch.lerp(1 - w * w, (1 - w * w).sqrt(), .25 + .75 * rounding.clamp(0, 1))
    round_ = (1 - w * w).sqrt()
    upper, lower = -.5 * gap * arch, .5 * gap * arch
    full = 1 + .25 * rounding
    bow = 1 - .30 * torch.exp(-(w / .16) ** 2)                       # the dip in the middle of the upper lip
    lip_top, lip_bottom = upper - p["lip_up"] * full * bow * round_, lower + p["lip_low"] * full * round_
    inside = coverage(u.abs() - half, k)
    shadow = torch.exp(-((y - lip_bottom - .05) / .03) ** 2) * round_ * .22
    paint(shadow, colour(p["skin"] * .55) * shade[None], rows)
    lit = shade * (1 + (.10 + p["gloss"]) * torch.exp(-((y - lower - p["lip_low"] * .5) / .018) ** 2))
    paint(inside * band(y, lip_top, lip_bottom, k), colour(p["lip"]) * lit[None], rows)
    hole = inside * band(y, upper, lower, k)
    paint(hole, np.array([.16, .04, .05]), rows)
    tip = lower - gap * (.12 + .50 * tongue) * (1 - .6 * w * w)
    paint(hole * band(y, tip, lower + .1, k) * (gap * 12).clamp(0, 1), np.array([.70, .30, .32]), rows)
    edge = upper + (.03 + .05 * teeth) * (1 - .5 * w * w)
    ridges = .86 - .10 * torch.exp(-((torch.remainder(u / .055, 1) - .5) / .09) ** 2)
    paint(hole * band(y, upper - .1, edge, k) * (teeth * 1.5).clamp(0, 1) * (1 - .5 * w ** 4), ridges.clamp(0, 1)[None], rows)
    return half


def dub_pair(index, frames, size, split="held-out"):
    """(source, truth): the same person, pose and blinks saying other words. Source: what a dubber is given, with
    truth.audio. Truth: what it should give back."""
    seed = SPLITS[split] + 2 * index
    return draw(seed, frames, size), draw(seed, frames, size, text=seed + 1)
