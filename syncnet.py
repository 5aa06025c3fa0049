"""The lip-sync expert: do this mouth and this sound belong together, and if not, how many frames apart are they?

    python syncnet.py --video CLIP.mp4                  # Sync-C, Sync-D and offset of a clip with sound
    python syncnet.py --video CLIP.mp4 --audio X.wav    # with other sound; --box X,Y,SIDE where the face is
    python syncnet.py --video CLIP.mp4 --weights out/tiny/judge.pt

Two towers (after SyncNet, Chung and Zisserman 2016): 5 video frames of the lower face, and the 20 mel frames that go with
them, each to a unit vector. Trained by InfoNCE over the moments of one clip, where the only thing that tells right from
wrong is the timing. distill.py trains two, on different people: `syncnet` gives the reward, `judge` only judges. Both have
only seen drawn faces: of a recorded one their score says nothing.
"""
import dataclasses
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import model
import runtime
from data import Fail

SPAN = 5            # video frames that one decision looks at
REACH = 15          # offsets -15..15 video frames


@dataclasses.dataclass
class Config:
    size: int = 64          # side of the pictures it was trained on; others are resized
    channels: int = model.HEARD // 4
    embed: int = 64


class SyncNet(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        c, self.cfg = cfg.channels, cfg
        self.height, self.width = cfg.size // 2, cfg.size * 3 // 4           # the lower half, less an eighth at either side
        self.frame = nn.Sequential(nn.Conv2d(3, c, 5, 2, 2), nn.SiLU(), nn.Conv2d(c, 2 * c, 3, 2, 1), nn.SiLU(),
                                   nn.Conv2d(2 * c, 3 * c, 3, 2, 1), nn.SiLU(), nn.Flatten(1),
                                   nn.Linear(3 * c * -(-self.height // 8) * -(-self.width // 8), 4 * c), nn.SiLU())
        self.span = nn.Sequential(nn.Conv1d(4 * c, 4 * c, SPAN), nn.SiLU(), nn.Conv1d(4 * c, cfg.embed, 1))
        self.sound, self.sound_out = model.sound_tower(4 * c), nn.Conv1d(4 * c, cfg.embed, 1)
        self.mouth = nn.Linear(4 * c, 2)                         # opening and width, off each frame; the lip-sync does not use it
        with torch.no_grad():
            self.mouth.bias.copy_(torch.tensor([.5, 3.4]))       # tenths of the side: what is usual
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def see(self, video):
        """video (B, T, S, S, 3) in [-1, 1] -> what it sees in each frame (B, T, 4 channels)."""
        B, T, S, _, _ = video.shape
        x = video[:, :, S // 2:, S // 8: S - S // 8].reshape(B * T, S - S // 2, -1, 3).permute(0, 3, 1, 2)
        if x.shape[2:] != (self.height, self.width):
            x = F.interpolate(x.float(), size=(self.height, self.width), mode="bilinear", antialias=True, align_corners=False)
        return self.frame(x.contiguous(memory_format=torch.channels_last)).view(B, T, -1)

    def watch(self, video):
        """video (B, T, S, S, 3) in [-1, 1] -> what it sees in each frame (B, T, 4 channels), its embedding of every five (B, T - 4, embed), of unit
        length, and the mouth (B, T, 2): its opening and width as fractions of the picture's side."""
        seen = self.see(video)
        return seen, unit(self.span(seen.transpose(1, 2))), .1 * self.mouth(seen).float()

    def listen(self, mel):
        """mel (B, 4 T, MELS) -> what it hears with every five frames (B, T - 4, embed), of unit length."""
        return unit(self.sound_out(self.sound(mel.transpose(1, 2))))

    def forward(self, video, mel):
        """video (B, T, S, S, 3) in [-1, 1], mel (B, 4 T, MELS) -> two (B, T - 4, embed), of unit length, and the mouth (B, T, 2), as above."""
        _, v, mouth = self.watch(video)
        return v, self.listen(mel), mouth


def unit(x):
    """(B, E, n) -> (B, n, E) of unit length, float32."""
    return F.normalize(x.float().transpose(1, 2), dim=-1)


def view_loss(net, video, truth):
    """How differently the expert sees a guess and the truth, both (B, T, S, S, 3) in [-1, 1] -> a number, with a gradient for the guess: frame by frame
    (a perceptual loss, as LPIPS, Zhang et al. 2018, but by eyes that know mouths), and, a fifth each, in the embedding of five frames and
    in the mouth read off, 3% of the side counting as 1."""
    with torch.no_grad():
        theirs = net.watch(truth)
    (seen, v, mouth), square = net.watch(video), lambda x: x.square().mean()
    level = lambda x: F.layer_norm(x.float(), x.shape[-1:])                      # noqa: E731
    return square(level(seen) - level(theirs[0])) + .2 * (v - theirs[1]).square().sum(-1).mean() + .2 * square((mouth - theirs[2]) / .03)


def nce(v, a, scale):
    """InfoNCE over the moments of each clip, both ways. v, a (B, n, E) -> loss, and how often the right moment wins."""
    logits = scale * v @ a.transpose(1, 2)                                   # B n n
    target = torch.arange(v.shape[1], device=v.device).expand(v.shape[0], -1)
    loss = (F.cross_entropy(logits.transpose(1, 2), target) + F.cross_entropy(logits, target)) / 2
    return loss, (logits.argmax(2) == target).float().mean()


def distances(v, a):
    """Mean distance of the two embeddings (B, n, E) over a clip at each offset -15..15 (fewer if the clip is short) -> (B, 31), offset 0 in the middle."""
    n = v.shape[1]
    reach = min(REACH, n - 1)
    return torch.stack([(v[:, max(0, -o): n - max(0, o)] - a[:, max(0, o): n - max(0, -o)]).norm(dim=-1).mean(1)
                        for o in range(-reach, reach + 1)], 1)


def sync(v, a):
    """Sync-C, Sync-D, offset from the two embeddings (B, n, E) -> three (B,) tensors.

    Sync-D is the least of the distances, Sync-C the median less the least (Chung and Zisserman 2016). Offset in video frames, positive
    where the sound comes late."""
    curve = distances(v, a)
    least, where = curve.min(1)
    return curve.median(1).values - least, least, where - curve.shape[1] // 2


@torch.no_grad()
def score(net, video, mel):
    """net's Sync-C, Sync-D, offset, each (B,). video (B, T, S, S, 3) in [-1, 1] or uint8; mel (B, 4 T, MELS). Fail: under 12 frames."""
    if video.shape[1] < 12:
        raise Fail(f"{video.shape[1]} frames are too few to judge lip-sync; give at least 12 (0.48 s)")
    as_float = lambda part: data.to_float(part) if part.dtype == torch.uint8 else part   # noqa: E731
    decisions, at_once = video.shape[1] - SPAN + 1, 1000         # 40 s: of an hour, what lies between the layers would not fit into memory
    with runtime.mixed(video.device):
        v = [net.watch(as_float(video[:, a:a + at_once + SPAN - 1]))[1] for a in range(0, decisions, at_once)]
        return sync(torch.cat(v, 1), net.listen(mel))


def landmark_error(dub, pairs, judge):
    """The mouth's opening and width as the judge reads them off dub (n, T, S, S, 3) uint8, less the drawn ones -> (n, T, 2)."""
    with torch.no_grad(), runtime.mixed(dub.device):
        return judge(data.to_float(dub), pairs.mel)[2] - pairs.mouth


def edges(video, p):
    """Mean squared difference of neighbouring pixels in the mouth mask: across the borders of the p x p patches, and inside them.
    video (T, S, S, 3) uint8 -> two floats. Their ratio over the truth's is the measure of seams, 1 where there are none; the second alone
    over the truth's says how sharp the picture is: 1 if as sharp as the truth, less where it is blurred."""
    mask, total = data.mouth_mask(video.shape[1]).to(video.device), [0., 0., 0., 0.]
    for v, m in ((video.float().mean(3), mask), (video.float().mean(3).transpose(1, 2), mask.T)):
        jump, weight = ((v[:, 1:] - v[:, :-1]) ** 2).mean(0), m[1:] * m[:-1]
        border = ((torch.arange(1, video.shape[1], device=video.device) % p) == 0).float()[:, None]
        for i, part in enumerate((border, 1 - border)):
            total[2 * i] += (jump * weight * part).sum().item()
            total[2 * i + 1] += (weight * part).sum().item()
    return total[0] / total[1], total[2] / total[3]


def judged(dub, pairs, judge, p):
    """Means over the clips of the dubs (n, T, S, S, 3) uint8 of data.Pairs, of p x p patches: Sync-C, Sync-D, mouth PSNR (dB), landmark error (% of the side),
    sharp."""
    c, d, _ = score(judge, dub, pairs.mel)
    sharp = [edges(v, p)[1] / edges(t, p)[1] for v, t in zip(dub, pairs.truth)]
    return dict(sync_c=c.mean().item(), sync_d=d.mean().item(), psnr=data.mouth_psnr(dub, pairs.truth).mean().item(),
                landmark=100 * landmark_error(dub, pairs, judge).abs().mean().item(), sharp=sum(sharp) / len(sharp))


def train(path, cfg, bank, steps, batch, seed, device, held_out, made_with=None):
    """Train an expert on `bank` (data.Bank) and save it to `path`; `held_out` is a Bank too. Prints held-out accuracy."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    net = SyncNet(cfg).to(device)
    if not bank.mouth.isfinite().any():                      # recorded people, whose mouth nobody measured: let view_loss see none either
        nn.init.zeros_(net.mouth.weight)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=.1)
    T, start = min(48, bank.video.shape[1]), time.time()
    for step in range(1, steps + 1):
        clip = torch.randint(len(bank.video), (batch,), generator=rng)
        first = torch.randint(bank.video.shape[1] - T + 1, (batch,), generator=rng)
        video = torch.stack([bank.video[i, s:s + T] for i, s in zip(clip, first)]).to(device)
        mel = torch.stack([bank.mel[i, 4 * s:4 * (s + T)] for i, s in zip(clip, first)]).to(device)
        mel = mel + .05 * torch.randn(batch, 1, 1, generator=rng).to(device)             # level
        video = data.to_float(video) * (1 + .1 * torch.randn(batch, 1, 1, 1, 1, generator=rng).to(device))
        with runtime.mixed(device):
            v, a, mouth = net(video, mel)
        loss, accuracy = nce(v, a, net.log_scale.exp().clamp(max=100))
        missed = (mouth - torch.stack([bank.mouth[i, s:s + T] for i, s in zip(clip, first)]).to(device)) / .03
        loss = loss + missed[missed.isfinite()].square().sum() / missed.numel()
        if not loss.isfinite():
            raise Fail(f"{Path(path).stem} step {step}: the loss is not finite; is there a clip without picture or sound in the training set?")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 5) == 0 or step == 1:
            right, _, offset = score(net, held_out.video.to(device), held_out.mel.to(device))
            wrong, _, _ = score(net, held_out.video.to(device), held_out.mel.roll(1, 0).to(device))
            print(f"{Path(path).stem:8} step {step:5d}/{steps} | loss {loss:6.3f} | right moment {accuracy:5.1%} | held-out: offset within a "
                  f"frame {(offset.abs() <= 1).float().mean():4.0%}, Sync-C {right.mean():.3f}, wrong audio {wrong.mean():.3f} | "
                  f"{time.time() - start:4.0f} s", flush=True)
    runtime.save(path, kind="syncnet", config=dataclasses.asdict(cfg), model=runtime.half(net), seed=seed, steps=steps, made_with=made_with)


def load_syncnet(path, device="cpu"):
    state = runtime.load(path, "syncnet")
    net = runtime.restore(path, lambda: SyncNet(Config(**state["config"])), state["model"])
    return net.to(device).eval().requires_grad_(False)


@dataclasses.dataclass
class Options:
    video: str = ""  # the clip to judge
    audio: str = ""  # judge it with this sound instead of its own
    box: str = ""  # X,Y,SIDE of the face in pixels; the centred square if not given
    weights: str = ""  # a judge's checkpoint; else the bundled one, else what distill.py made last
    device: str = ""  # cuda, mps or cpu; the best there is if not given


def find_weights(name, given=""):
    """The checkpoint called `name`: as given, bundled, or made here. Fail: none."""
    if given:
        data.need_file(given)
        return Path(given)
    for path in [Path(__file__).parent / f"weights/small/{name}.pt", *sorted(Path().glob(f"out/*/{name}.pt"), key=lambda p: -p.stat().st_mtime)]:
        if path.is_file():
            return path
    raise Fail(f"no {name} yet: run python distill.py --config tiny first (minutes), or name one on the command line")


def main(argv):
    cfg = data.options(Options, argv, __doc__)
    if not cfg.video:
        raise Fail("which clip? --video CLIP.mp4; --help shows examples")
    device = runtime.find_device(cfg.device)
    net = load_syncnet(find_weights("judge", cfg.weights), device)
    mel_of = cfg.audio or cfg.video
    audio = data.read_audio(mel_of)
    box, frames = None, []
    for frame in data.read_video(cfg.video):
        box = box or data.parse_box(cfg.box, frame)
        frames.append(data.square(frame, net.cfg.size, box))
    n = min(len(frames), len(audio) * data.FPS // data.RATE)
    if n < 12:
        raise Fail(f"{n} frames with sound are too few to judge lip-sync; give at least 12 (0.48 s)")
    mel = data.log_mel(audio[: n * data.RATE // data.FPS])
    c, d, offset = (x.item() for x in score(net, torch.stack(frames[:n])[None].to(device), mel[None].to(device)))
    print(f"Sync-C {c:.3f}  Sync-D {d:.3f}  offset {offset:+d} frames ({1000 * offset // data.FPS:+d} ms)  over {n} frames")
    if c < .2:
        print("So low (drawn people who say these words: about .7) means that mouth and sound do not go together, that --box is not on the face,\n"
              "hairline to chin, or that the face is not a drawn one.", file=sys.stderr)


if __name__ == "__main__":
    data.run(main)
