"""Sound, the regions of a picture, tokens and training batches. No drawn world, no files.

Video is float in [-1, 1] inside and uint8 RGB outside, at 25 frames a second; audio is float32 mono
in [-1, 1] at 16 kHz.

Only the middle three quarters of a picture of S x S pixels matter, cut at half height: the
rectangle *above* (eyes, which tell the pose) is always known, and the *mouth rectangle* below,
S/2 x 3S/4, holds the mask. Tokens tile the mouth rectangle, and the lip-sync expert looks at
nothing else.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

FPS = 25  # video frames a second
RATE = 16000  # audio samples a second
HOP = 160  # samples between mel frames: 100 a second, 4 to a video frame
MEL_REACH = 120  # samples that a mel frame sees before and after its own HOP
MELS = 40  # bands, 60 Hz to 7.6 kHz
AUDIO_BACK = 16  # mel frames heard before a latent frame's own 16
AUDIO_AHEAD = 12  # and after: the look-ahead, a part of the latency
SILENCE = (-5 + 1.5) / 3  # log-mel of nothing, for the frames before and after a file
CLIP_LATENTS = 30  # latent frames of a training clip, 4.8 s: some are left for the reference
EQUALIZER = 0.07  # deviation, in log-mel, of the equalizer that training hears through: 2 dB
ASIDE = 0.15  # the mouth mask leaves out this share of the picture at either side
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
    audio = F.pad(torch.as_tensor(audio, dtype=torch.float32), (MEL_REACH, MEL_REACH))
    window = torch.hann_window(400)
    spectrum = torch.stft(audio, 400, HOP, window=window, center=False, return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()
    # In double: how a product rounds depends on the number of frames on some CPUs, and a streamed
    # chunk must hear the same, in effect bit for bit, as in the whole file.
    mel = (power.T.double() @ mel_filters()).float()
    return (mel.clamp(min=1e-5).log10() + 1.5) / 3


def equalize(mel, rng):
    """mel (B, M, MELS) through an equalizer drawn for each of B: another microphone."""
    points = EQUALIZER * torch.randn(len(mel), 1, 5, generator=rng, device=mel.device)
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


def mouth_mask(size):
    """(size, size) float32 in 0..1, on the CPU: the weight of the dub where it is laid over the
    source. Soft over a 24th of the side, so that no edge shows. What the sound decides is where it
    is above 0: all of that is hidden from the network, which paints it."""
    x = (torch.arange(size) + 0.5) / size
    across = ((x - ASIDE) * 24).clamp(0, 1) * ((1 - ASIDE - x) * 24).clamp(0, 1)
    down = ((x - 0.53) * 24).clamp(0, 1) * ((0.99 - x) * 24).clamp(0, 1)
    return down[:, None] * across


def middle(video):
    """(..., S, S, 3) -> (..., S, 3S/4, 3): above in the upper half, the mouth rectangle below."""
    side = video.shape[-2]
    return video[..., side // 8 : side - side // 8, :]


def mouth_rectangle(video):
    """(..., S, S, 3) -> its mouth rectangle (..., S/2, 3S/4, 3)."""
    return middle(video)[..., video.shape[-3] // 2 :, :, :]


def paste(rectangle, video):
    """Put mouth rectangles (..., S/2, 3S/4, 3) into videos (..., S, S, 3) -> new videos."""
    out = video.clone()
    mouth_rectangle(out).copy_(rectangle)
    return out


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


class Batch(NamedTuple):
    source: torch.Tensor  # (B, T, S, 3S/4, 3) uint8, see `middle`
    reference: torch.Tensor  # the same shape: the same people at other moments
    heard: torch.Tensor  # (B, back + 16 L + ahead, MELS), see `hearing`
    mel: torch.Tensor  # (B, 4 T, MELS), the part of it that coincides with the frames


class Clips:
    """Clips to train on, on the device: video (n, T, S, 3S/4, 3) uint8, see `middle`; mel
    (n, 4 T, MELS); mouth (n, T, 2): its opening and width, NaN where nobody measured it."""

    def __init__(self, clips, n, size, device, latents=CLIP_LATENTS):
        """Take up to n of `clips`, an iterable of (video (T, S, S, 3) uint8, audio (640 T,), mouth
        (T, 2) or NaN): see faces.drawn_clips and media.recorded. T is 4 latents."""
        T = 4 * latents
        self.video = torch.empty(n, T, size, size * 3 // 4, 3, dtype=torch.uint8, device=device)
        self.mel = torch.empty(n, 4 * T, MELS, device=device)
        self.mouth = torch.empty(n, T, 2, device=device)
        found = 0
        for video, audio, mouth in itertools.islice(clips, n):
            self.video[found] = middle(video)
            self.mel[found] = log_mel(audio)
            self.mouth[found] = torch.as_tensor(mouth)
            found += 1
        assert found, "there is no clip to train on"
        self.video = self.video[:found]
        self.mel = self.mel[:found]
        self.mouth = self.mouth[:found]

    def pick(self, B, T, rng):
        """B random clips and, in each, the frame at which a stretch of T frames begins, a multiple
        of 4: two (B, 1), on the device."""
        device = self.video.device
        n, clip_frames = self.video.shape[:2]
        clip = torch.randint(n, (B, 1), generator=rng, device=device)
        starts = clip_frames // 4 - T // 4 + 1
        start = 4 * torch.randint(starts, (B, 1), generator=rng, device=device)
        return clip, start

    def moments(self, B, T, rng):
        """B random stretches of T frames: video (B, T, S, 3S/4, 3) uint8, mel, mouth."""
        clip, start = self.pick(B, T, rng)
        frames = start + torch.arange(T, device=start.device)
        mel_frames = 4 * start + torch.arange(4 * T, device=start.device)
        return self.video[clip, frames], self.mel[clip, mel_frames], self.mouth[clip, frames]

    def sample_batch(self, B, cfg, rng):
        """-> Batch of B random samples of cfg.latents latent frames. Each of their chunks has a
        reference, a chunk of another moment of the same clip, outside the sample: inside it, the
        reference would give the answer away. There is no loop over the batch, and nothing waits for
        the device."""
        device = self.video.device
        clip_frames = self.video.shape[1]
        T = 4 * cfg.latents
        chunk = 4 * cfg.chunk
        chunks = T // chunk
        clip, start = self.pick(B, T, rng)
        end = start + T

        # A reference may begin at the frames 0 .. start - chunk, so that it ends before the sample,
        # or at end .. clip_frames - chunk. One draw chooses among all of them, counted in a row.
        choices_before = (start - chunk + 1).clamp(min=0)
        choices_after = (clip_frames - chunk - end + 1).clamp(min=0)
        drawn = torch.rand(B, chunks, generator=rng, device=device)
        choice = (drawn * (choices_before + choices_after)).long()
        is_before = choice < choices_before
        reference_start = torch.where(is_before, choice, end + choice - choices_before)

        # Some references are one frame held still, as the one that a stream starts with.
        still = torch.rand(B, chunks, 1, generator=rng, device=device) < STILL
        frame_in_chunk = torch.where(still, 0, torch.arange(chunk, device=device))
        reference_frames = (reference_start[..., None] + frame_in_chunk).flatten(1)  # (B, T)
        source_frames = start + torch.arange(T, device=device)

        # The frames of all clips in a row take one index instead of two: so a GPU copies whole
        # frames.
        all_frames = self.video.flatten(0, 1)
        clip_start = clip * clip_frames
        source = all_frames[clip_start + source_frames]
        reference = all_frames[clip_start + reference_frames]

        # What is heard before and after the clip is silence.
        mel_frames = torch.arange(-AUDIO_BACK, 4 * T + AUDIO_AHEAD, device=device)
        mel_frames = 4 * start + mel_frames
        last = self.mel.shape[1] - 1
        in_clip = (mel_frames >= 0) & (mel_frames <= last)
        heard = self.mel[clip, mel_frames.clamp(0, last)]
        heard = torch.where(in_clip[..., None], heard, SILENCE)
        heard = equalize(heard, rng)
        mel = heard[:, AUDIO_BACK : AUDIO_BACK + 4 * T]
        return Batch(source, reference, heard, mel)
