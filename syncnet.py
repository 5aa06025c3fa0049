"""The lip-sync expert: do this mouth and this sound belong together? And how a dub is judged.

    python syncnet.py --video CLIP.mp4                  # Sync-C, Sync-D and offset of a clip
    python syncnet.py --video CLIP.mp4 --audio X.wav    # with other sound; --box where the face is

Two towers (after SyncNet, Chung and Zisserman 2016) make unit vectors of 5 frames of the mouth
rectangle and of the 20 mel frames that go with them. They are trained by InfoNCE over the moments
of a clip, where only timing tells right from wrong. They look at the mouth rectangle alone, since
that is what a dub changes: eyes and pose, which it keeps, could tell nothing but the wrong words.

distill.py trains two experts, on different people: `syncnet` gives the reward and the perceptual
loss, `judge` only judges. Of recorded faces their score says nothing.
"""

import dataclasses
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import runtime
from data import FPS, RATE, mouth_mask, mouth_rectangle, to_float, to_pixels
from media import Sound, parse_box, read_video, square
from model import make_audio_encoder
from runtime import UserError, opt

SPAN = 5  # video frames that one decision looks at
REACH = 15  # offsets -15..15 video frames
BATCH = 16


@dataclasses.dataclass
class Config:
    size: int = 64  # side of the pictures it was trained on; others are resized
    channels: int = 32
    embed: int = 64


class SyncNet(nn.Module):
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
    UserError: under 12 frames."""
    T = rectangle.shape[1]
    if T < 12:
        raise UserError(f"{T} frames are too few to judge lip-sync; give at least 12 (0.48 s)")
    if rectangle.dtype == torch.uint8:
        rectangle = to_float(rectangle)
    with runtime.autocast(net):
        _, v, _ = net.encode_video(rectangle)
        a = net.encode_audio(mel)
    return sync(v, a)


def mouth_psnr(dub, truth):
    """PSNR in dB inside the mask. dub, truth (n, T, S, S, 3) uint8 -> (n,)."""
    mask = mouth_mask(dub.shape[2]).to(dub.device)[:, :, None]
    error = ((dub.float() - truth.float()) ** 2 * mask).mean((1, 2, 3, 4)) / mask.mean()
    return 10 * (255**2 / error.clamp(min=1e-3)).log10()


def gradient_energy(video):
    """Mean squared difference of neighbouring pixels' brightness in the mask: how sharp it is.
    video (n, T, S, S, 3) uint8 -> (n,)."""
    mask = mouth_mask(video.shape[2]).to(video.device)
    gray = video.float().mean(-1)
    across = (gray.diff(dim=3).square() * mask[:, 1:] * mask[:, :-1]).sum((2, 3))
    down = (gray.diff(dim=2).square() * mask[1:] * mask[:-1]).sum((2, 3))
    return (across + down).mean(1)


@torch.no_grad()
def reward_weights(expert, rectangle, mel, beta):
    """-> weights (B,), exp(beta Sync-C) over its mean in the batch, and the mean Sync-C. Clips in
    sync count for more. No gradient flows: it would teach the student to please the expert with any
    pixels.

    Sync-C of unit vectors is a tenth of the paper's: beta 20 here is what 2 is there. (The paper's
    weights are not over their mean, so there a batch in better sync has a larger gradient.)"""
    sync_c, _, _ = score(expert, rectangle, mel)
    weight = (beta * sync_c).exp()
    return weight / runtime.shared_mean(weight.mean()), sync_c.mean()


def centred_opening(mouth):
    """Mouths (n, T, 2) -> their opening less its mean over the clip, (n, T)."""
    opening = mouth[..., 0]
    return opening - opening.mean(1, keepdim=True)


@torch.no_grad()
def compute_metrics(dub, pairs, judge):
    """Dubs (n, T, S, S, 3) uint8 of faces.Pairs -> a dict of (n,) tensors: sync_c; psnr in the
    mask; landmark: mean error of the mouth's opening and width, in percent of the side; gain: slope
    of the opening over the truth's, under 1 for a mumbler; sharpness: 1 if as sharp as the truth.
    """
    rows = []
    for i in range(len(dub)):  # one by one: whatever the batch, it fits
        video = dub[i : i + 1]
        truth = pairs.truth[i : i + 1]
        drawn_mouth = pairs.mouth[i : i + 1]
        rectangle = mouth_rectangle(video)
        with runtime.autocast(judge):
            _, _, mouth = judge.encode_video(to_float(rectangle))
        opening = centred_opening(mouth)
        drawn_opening = centred_opening(drawn_mouth)
        sync_c, _, _ = score(judge, rectangle, pairs.mel[i : i + 1])
        row = dict(
            sync_c=sync_c,
            psnr=mouth_psnr(video, truth),
            landmark=100 * (mouth - drawn_mouth).abs().mean((1, 2)),
            gain=(opening * drawn_opening).sum(1) / drawn_opening.square().sum(1),
            sharpness=gradient_energy(video) / gradient_energy(truth),
        )
        rows.append(row)
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def features(judge, dub):
    """The judge's features of each frame of each clip (n, T, S, S, 3) uint8 -> (n T, features)."""
    found = []
    for video in dub:
        with runtime.autocast(judge):
            of_frames, _, _ = judge.encode_video(to_float(mouth_rectangle(video[None])))
        found.append(of_frames[0])
    return torch.cat(found)


def gaussian_distance(mean_a, cov_a, mean_b, cov_b):
    """|m - m'|^2 + tr(C + C' - 2 (C C')^1/2): how far two Gaussians are apart, as in FID.

    With C = R R^T, the eigenvalues of C C' are those of the symmetric R^T C' R, which are found
    many times faster."""
    apart = (mean_a - mean_b).square().sum()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt()
    trace = torch.linalg.eigvalsh(root.T @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (apart + cov_a.trace() + cov_b.trace() - 2 * trace).item()


def frechet(a, b):
    """Frechet distance of two sets of features (n, E), as FID is. What distribution matching is
    for: exaggeration is far, and so is an average of mouths. (A plain blur is not: the truth,
    blurred to sharp .45: .03.) The fewer people, the larger it is: bench.py corrects for that."""
    a = a.cpu().double()  # Apple's GPUs have no float64
    b = b.cpu().double()
    return gaussian_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())


def means(dub, pairs, judge):
    """The metrics' means over the clips, and the Fréchet distance: what a training log shows."""
    metrics = compute_metrics(dub, pairs, judge)
    row = {name: values.mean().item() for name, values in metrics.items()}
    row["frechet"] = frechet(features(judge, dub), features(judge, pairs.truth))
    return row


def table(first, rows, columns):
    """Print {name: {column: value, column_ci: half an interval, column_bold: is it to be seen}} as
    Markdown; all but the value may be missing."""
    print(f"\n| {first} | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
    for name, row in rows.items():
        print(f"| {name}", end="")
        for key, digits in columns.items():
            error = f" ± {row[key + '_ci']:.{digits}f}" if key + "_ci" in row else ""
            value = round(row[key], digits) + 0.0  # + 0.0, since -0.00 is no number to read
            bold = "**" if row.get(key + "_bold") else ""
            print(f" | {bold}{value:.{digits}f}{bold}{error}", end="")
        print(" |")


@torch.no_grad()
def evaluate(net, val):
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


def train(path, cfg, clips, steps, seed, val, **remembered):
    """Train an expert on data.Clips and save it to `path`, with what is to be remembered of it;
    print how it does on faces.Pairs."""
    start = time.time()
    name = Path(path).stem
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
        with runtime.autocast(net):
            _, v, read = net.encode_video(rectangle)
            a = net.encode_audio(data.equalize(mel, rng))
        loss, hits = nce(v, a, net.log_scale.exp().clamp(max=100))
        if drawn:
            loss = loss + ((read - mouth) / 0.03).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

        if step % log_every == 0 or step == 1:
            if not loss.isfinite():
                raise UserError(
                    f"{name} step {step}: not finite; is there a clip without a picture?"
                )
            words = f"loss {loss:.3f} | right moment {hits:.1%} | {evaluate(net, val)}"
            elapsed = time.time() - start
            left = elapsed / step * (steps - step)
            print(
                f"{name:8} step {step:5d}/{steps} | {words} | {elapsed:.0f} s, {left:.0f} left",
                flush=True,
            )
    config = dataclasses.asdict(cfg)
    runtime.save(path, net, kind="syncnet", config=config, seed=seed, steps=steps, **remembered)
    print(f"{name}: {path}", flush=True)


def load_syncnet(path, device="cpu"):
    state = runtime.load(path, "syncnet")
    net = runtime.restore(path, lambda: SyncNet(Config(**state["config"])), state["model"])
    return net.to(device).eval().requires_grad_(False)


def find_weights(name, given=""):
    """The path of a checkpoint: the given one, or the bundled one called `name`."""
    return given or runtime.BUNDLED / f"small/{name}.pt"


@dataclasses.dataclass
class Options:
    video: str = opt("", "the video clip to judge")
    audio: str = opt("", "the sound to judge it with; the clip's own if not given")
    box: str = opt(
        "",
        "X,Y,SIDE of the face in pixels; the centred square if not given",
    )
    weights: str = opt("", "the checkpoint of a judge; the bundled one if not given")
    device: str = opt("", "cuda, mps or cpu; the best that there is if not given")


def main(argv):
    cfg = runtime.options(Options, argv, __doc__)
    if not cfg.video:
        raise UserError("which clip? --video CLIP.mp4; --help shows examples")
    device = runtime.find_device(cfg.device)
    net = load_syncnet(find_weights("judge", cfg.weights), device)
    audio = Sound(cfg.audio or cfg.video)
    box, frames = None, []
    for frame in read_video(cfg.video):
        box = box or parse_box(cfg.box, frame)
        frames.append(mouth_rectangle(square(frame, net.cfg.size, box)))
    n = min(len(frames), len(audio) * FPS // RATE)
    if n < 12:
        raise UserError(f"{n} frames with sound are too few to judge lip-sync; give at least 12")
    mel = data.log_mel(audio[: n * RATE // FPS])[None].to(device)
    c, d, offset = (x.item() for x in score(net, torch.stack(frames[:n])[None].to(device), mel))
    late = f"{offset:+d} frames ({1000 * offset // FPS:+d} ms)"
    print(f"Sync-C {c:.3f}  Sync-D {d:.3f}  offset {late}  over {n} frames")
    if c < 0.12:
        print("So low means that mouth and sound do not go together, that --box is not on the face")
        print("(hairline to chin), or that it is not a drawn one. (Drawn people: about .3.)")


if __name__ == "__main__":
    runtime.run(main)
