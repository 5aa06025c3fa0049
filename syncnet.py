"""SyncNet, the lip-sync expert: do this mouth and this sound belong together?

Two towers (after SyncNet, Chung and Zisserman 2016) make unit vectors of 5 frames of the mouth
rectangle and of the 20 mel frames that go with them. They are trained by InfoNCE over the moments
of a clip, where only timing tells right from wrong. They look at the mouth rectangle alone, since
that is what a dub changes: eyes and pose, which it keeps, could tell nothing but the wrong words.

distill.py trains two experts, on different people. One is the *reward expert* (syncnet.pt): it
gives the reward and the perceptual loss. The other is the *judge* (judge.pt): it only measures
dubs, see metrics.py. Of recorded faces their score says nothing.
"""

import dataclasses
import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import equalize, mouth_rectangle, to_float, to_pixels
from model import make_audio_encoder
from runtime import autocast

SPAN = 5  # video frames that one decision looks at
REACH = 15  # offsets -15..15 video frames
BATCH = 16


@dataclasses.dataclass
class Config:
    size: int = 64  # side of the pictures it was trained on; others are resized
    channels: int = 32
    embed: int = 64


class SyncNet(nn.Module):
    Config = Config  # what describes one, see runtime.load_net

    def __init__(self, cfg):
        super().__init__()
        c = cfg.channels
        self.cfg = cfg
        self.rectangle = (cfg.size // 2, cfg.size * 3 // 4)  # rows and columns that it sees
        rows = math.ceil(self.rectangle[0] / 8)  # after three strides of 2
        columns = math.ceil(self.rectangle[1] / 8)
        self.frame_encoder = nn.Sequential(
            nn.Conv2d(3, c, kernel_size=5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(c, 2 * c, kernel_size=3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * c, 3 * c, kernel_size=3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(1),
            nn.Linear(3 * c * rows * columns, 4 * c),
            nn.SiLU(),
        )
        self.video_head = nn.Sequential(
            nn.Conv1d(4 * c, 4 * c, kernel_size=SPAN),
            nn.SiLU(),
            nn.Conv1d(4 * c, cfg.embed, kernel_size=1),
        )
        self.audio_encoder = make_audio_encoder(4 * c)
        self.audio_head = nn.Conv1d(4 * c, cfg.embed, kernel_size=1)
        # The mouth's opening and width in tenths of the picture's side: for the landmark error.
        self.mouth_head = nn.Linear(4 * c, 2)
        self.mouth_head.bias.data = torch.tensor([0.5, 3.4])  # what is usual
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def encode_video(self, rectangle):
        """rectangle (B, T, S/2, 3S/4, 3) in [-1, 1] -> features of each frame (B, T, 4 channels),
        an embedding of every five frames (B, T - 4, embed), and the mouth's opening and width
        (B, T, 2) as fractions of the picture's side."""
        B, T = rectangle.shape[:2]
        x = rectangle.flatten(0, 1).permute(0, 3, 1, 2)
        if x.shape[2:] != self.rectangle:
            x = F.interpolate(x.float(), self.rectangle, mode="bilinear", antialias=True)
        x = x.contiguous(memory_format=torch.channels_last)
        features = self.frame_encoder(x).view(B, T, -1)
        v = F.normalize(self.video_head(features.mT).float().mT, dim=-1)
        mouth = 0.1 * self.mouth_head(features).float()
        return features, v, mouth

    def encode_audio(self, mel):
        """mel (B, 4 T, MELS) -> an embedding for every five frames (B, T - 4, embed)."""
        a = self.audio_head(self.audio_encoder(mel.mT))
        return F.normalize(a.float().mT, dim=-1)


def perceptual_loss(net, pred, truth):
    """How differently the expert sees two rectangles (B, T, S/2, 3S/4, 3) in [-1, 1] -> a number:
    frame by frame (as LPIPS, but by eyes that know mouths) and, a fifth each, in the embedding of
    five frames and in the mouth, of which 3% of the side count as 1. The reward has no gradient,
    this has: it pulls towards one known picture, not towards whatever pleases the expert."""
    with torch.no_grad():
        true_features, true_v, true_mouth = net.encode_video(truth)
    features, v, mouth = net.encode_video(pred)
    size = features.shape[-1:]
    difference = F.layer_norm(features.float(), size) - F.layer_norm(true_features.float(), size)
    by_frame = difference.square().mean()
    by_embedding = (v - true_v).square().sum(-1).mean()
    by_mouth = ((mouth - true_mouth) / 0.03).square().mean()
    return by_frame + 0.2 * by_embedding + 0.2 * by_mouth


def token_perceptual_loss(net, x0, truth, patch):
    """perceptual_loss of tokens x0 (B, L, N, P) against a rectangle (B, T, S/2, 3S/4, 3) in [-1, 1]
    in half of the clips: so it costs a tenth of a training step."""
    half = math.ceil(len(x0) / 2)
    return perceptual_loss(net, to_pixels(x0[:half], patch), truth[:half])


def nce(v, a, scale):
    """InfoNCE over a clip's moments, both ways. v, a (B, n, E) -> the loss, the share of hits."""
    logits = scale * v @ a.mT  # B n n
    target = torch.arange(v.shape[1], device=v.device).expand(v.shape[0], -1)
    loss = (F.cross_entropy(logits.mT, target) + F.cross_entropy(logits, target)) / 2
    return loss, (logits.argmax(2) == target).float().mean()


def sync(v, a):
    """Embeddings (B, n, E) -> Sync-C, Sync-D, offset, each (B,). Of the mean distances at offsets
    -15..15 Sync-D is the least, and Sync-C the median less the least (Chung and Zisserman 2016).
    Offset in video frames, positive where the sound comes late."""
    n = v.shape[1]
    reach = min(REACH, n - 1)
    distances = []
    for offset in range(-reach, reach + 1):
        picture = v[:, max(0, -offset) : n - max(0, offset)]
        sound = a[:, max(0, offset) : n - max(0, -offset)]
        distances.append((picture - sound).norm(dim=-1).mean(1))
    distances = torch.stack(distances, 1)  # B, offsets
    least, where = distances.min(1)
    return distances.median(1).values - least, least, where - reach


@torch.no_grad()
def score(net, rectangle, mel):
    """`sync` of rectangles (B, T, S/2, 3S/4, 3), uint8 or in [-1, 1], and their mel (B, 4 T, MELS).
    T is at least 12, .48 s."""
    assert rectangle.shape[1] >= 12, "too few frames to judge lip-sync"
    if rectangle.dtype == torch.uint8:
        rectangle = to_float(rectangle)
    with autocast(net):
        _, v, _ = net.encode_video(rectangle)
        a = net.encode_audio(mel)
    return sync(v, a)


@torch.no_grad()
def reward_weights(expert, rectangle, mel, beta):
    """-> weights (B,), exp(beta Sync-C) over its mean in the batch, and the mean Sync-C. Clips in
    sync count for more. No gradient flows: it would teach the student to please the expert with any
    pixels.

    Sync-C of unit vectors is a tenth of the paper's: beta 20 here is what 2 is there. (The paper's
    weights are not over their mean, so there a batch in better sync has a larger gradient.)"""
    sync_c, _, _ = score(expert, rectangle, mel)
    weight = (beta * sync_c).exp()
    return weight / weight.mean(), sync_c.mean()


@torch.no_grad()
def report(net, val):
    """How an expert does on faces.Pairs: words that say how often it finds the offset, and its
    Sync-C of the right sound and of another clip's."""
    rectangle = mouth_rectangle(val.truth)
    right, _, offset = score(net, rectangle, val.mel)
    wrong, _, _ = score(net, rectangle, val.mel.roll(1, 0))
    found = (offset.abs() <= 1).float().mean()
    return (
        f"held-out: offset within a frame {found:.0%}, Sync-C {right.mean():.3f}, "
        f"wrong sound {wrong.mean():.3f}"
    )


def train(cfg, clips, steps, seed, val, name="expert"):
    """Train an expert on data.Clips, and print how it does on faces.Pairs -> SyncNet."""
    start = time.time()
    device = clips.video.device
    torch.manual_seed(seed)
    rng = torch.Generator(device).manual_seed(seed)
    net = SyncNet(cfg).to(device)
    drawn = clips.mouth.isfinite().all()
    if not drawn:  # nobody measured recorded mouths: let perceptual_loss see none either
        nn.init.zeros_(net.mouth_head.weight)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, steps, pct_start=0.11)
    T = min(48, clips.video.shape[1])
    log_every = max(1, steps // 5)
    for step in range(1, steps + 1):
        video, mel, mouth = clips.moments(BATCH, T, rng)
        # Another equalizer and brightness each time: timing is what counts.
        light = torch.randn(BATCH, 1, 1, 1, 1, generator=rng, device=device)
        rectangle = to_float(video.chunk(2, 2)[1]) * (1 + 0.1 * light)
        with autocast(net):
            _, v, read = net.encode_video(rectangle)
            a = net.encode_audio(equalize(mel, rng))
        loss, hits = nce(v, a, net.log_scale.exp().clamp(max=100))
        if drawn:
            loss = loss + ((read - mouth) / 0.03).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

        if step % log_every == 0 or step == 1:
            assert loss.isfinite(), f"{name} step {step}: the loss is not finite"
            words = f"loss {loss:.3f} | right moment {hits:.1%} | {report(net, val)}"
            elapsed = time.time() - start
            left = elapsed / step * (steps - step)
            print(
                f"{name:8} step {step:5d}/{steps} | {words} | {elapsed:.0f} s, {left:.0f} left",
                flush=True,
            )
    return net
