"""The quality numbers in the README, measured by the judge on people and voices that nothing was trained on.

    python bench.py quality --config small              # the table: truth, teacher, student; --set self, cross or all; --clips 16 for less
    python bench.py long --config small                 # three minutes streamed, and other caches
    python bench.py ablate --config small               # the distillation with one thing changed at a time; --only reward,window
"""
import contextlib
import copy
import dataclasses
import json
import shutil
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import data
import distill
import model as nn_model
import runtime
import sample
import syncnet
from data import Fail
from model import Cache


def start(cfg):
    """What all benches begin with -> device."""
    if cfg.config not in nn_model.SIZES:
        raise Fail(f"--config {cfg.config}: one of {', '.join(nn_model.SIZES)}")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    data.free_space(cfg.out, 64 << 20)
    runtime.keep_memory()
    torch.manual_seed(cfg.seed)
    return runtime.find_device(cfg.device)


def about(bench, cfg, device):
    return dict(bench=bench, config=cfg.config, device=str(device), threads=torch.get_num_threads(), torch=torch.__version__, clips=1, seed=cfg.seed)


def checkpoint(cfg, name):
    """NAME.pt in the folder --weights. A teacher and experts that are not there are those that the student there was distilled from: what --teacher named then
    and what lies beside it, else the bundled ones."""
    bundled = Path(__file__).parent / "weights" / cfg.config / f"{name}.pt"
    path = Path(cfg.weights) / bundled.name if cfg.weights else bundled
    if not path.parent.is_dir():
        raise Fail(f"{path.parent}: no such folder; --weights names one that holds a student.pt or teacher.pt, out/tiny for instance")
    if name != "student" and not path.is_file():
        student = path.with_name("student.pt")
        named = student.is_file() and runtime.load(student, "dit")["made_with"]["teacher"]
        if named and name == "teacher":
            path = Path(named)
        elif named and (beside := Path(named).with_name(path.name)).is_file():
            path = beside
        elif bundled.is_file():
            path = bundled
    if path.is_file():
        print(f"{name}: {path}", file=sys.stderr, flush=True)
    return path


def ssim(video, truth):
    """SSIM (Wang et al. 2004; 7 x 7 windows, each colour for itself), mean over the mouth mask. video, truth (T, S, S, 3) uint8 -> float."""
    x, y = (v.permute(0, 3, 1, 2).cpu().double() / 255 for v in (video, truth))
    mean = lambda z: F.avg_pool2d(z, 7, 1, 3, count_include_pad=False)       # noqa: E731
    a, b = mean(x), mean(y)
    c1, c2 = .01 ** 2, .03 ** 2
    index = (2 * a * b + c1) * (2 * (mean(x * y) - a * b) + c2) / ((a * a + b * b + c1) * (mean(x * x) - a * a + mean(y * y) - b * b + c2))
    mask = data.mouth_mask(video.shape[1])
    return ((index.mean((0, 1)) * mask).sum() / mask.sum()).item()


def measures(dub, pairs, judge, patch):
    """Everything that is measured of the dubs (n, T, S, S, 3) uint8 of data.Pairs, a clip each -> dict of (n,) tensors:

    sync_c, sync_d; psnr (dB) and ssim in the mouth mask; landmark: mean error of the mouth's opening and width as the judge reads them off
    the picture, in percent of the picture's side; opening, width: their correlation with the truth over time; gain: the slope of the opening
    over the truth's, 1 if the mouth opens as far, less if it mumbles; silence: the opening, in percent, where the truth's has been shut for 0.2 s
    around (NaN without such a pause); seams, sharp: see syncnet.edges."""
    c, d, _ = syncnet.score(judge, dub, pairs.mel)
    error = syncnet.landmark_error(dub, pairs, judge)
    read, centre = error + pairs.mouth, lambda x: x - x.mean(1, keepdim=True)
    agree = F.cosine_similarity(centre(read), centre(pairs.mouth), dim=1)    # n 2
    gain = (centre(read) * centre(pairs.mouth)).sum(1) / centre(pairs.mouth).square().sum(1)
    shut = F.avg_pool1d((pairs.mouth[..., 0] < .01).float(), 5, 1, 2) > .99
    rows = []
    for v, t in zip(dub, pairs.truth):
        (border, inside), (true_border, true_inside) = syncnet.edges(v, patch), syncnet.edges(t, patch)
        rows.append((ssim(v, t), border / inside / (true_border / true_inside), inside / true_inside))
    similar, seams, sharp = torch.tensor(rows).unbind(1)
    return dict(sync_c=c, sync_d=d, psnr=data.mouth_psnr(dub, pairs.truth), ssim=similar,
                landmark=100 * error.abs().mean((1, 2)), opening=agree[:, 0], width=agree[:, 1], gain=gain[:, 0],
                silence=100 * (read[..., 0] * shut).sum(1) / shut.sum(1), seams=seams, sharp=sharp)


@dataclasses.dataclass
class Quality:
    config: str = "small"
    weights: str = ""       # folder of student.pt, or teacher.pt, or both; what is not there, and the experts, are else those in weights/CONFIG
    set: str = "dub"        # dub: other words, same voice; self: its own; cross: another person's voice and tempo; all of them
    clips: int = 64
    teacher: bool = True    # measure it, not the student alone, which takes a tenth of the time
    front: bool = True      # the teacher at other guidance and fewer steps too (dub only)
    device: str = ""
    threads: int = 0
    seed: int = 0
    zero = ("seed", "threads")
    out: str = "out/bench"


def clips_of(kind, n, size, frames=96):
    """n held-out (source, truth, ceiling): ceiling is the truth drawn again, with only that changed which the sound does not decide."""
    for i in range(n):
        seed = data.SPLITS["held-out"] + 2 * i
        how = dict(dub=dict(text=seed + 1), self={}, cross=dict(text=seed + 1, voice=seed + 2))[kind]
        yield [data.draw(seed, frames, size, **extra) for extra in ({}, how, dict(how, detail=seed + 1_000_000))]


def best_blur(i, size, frames=96, draws=16):
    """The dub of clip i averaged over what the sound does not decide -> (T, S, S, 3) uint8: what a perfect guess in one step would be."""
    seed = data.SPLITS["held-out"] + 2 * i
    total = sum(data.draw(seed, frames, size, text=seed + 1, detail=seed + 1_000_000 + k).video.float() for k in range(draws))
    return data.to_uint8(total / draws / 127.5 - 1)


def robustness(net, size, n, device):
    """Share of held-out clips of 2 s whose sound, moved by a known -10..10 frames, is found there to within a frame: as it is, with white
    noise of 10 dB below it, 20% louder and softer, spoken 20% faster and slower."""
    rng, found = np.random.default_rng(0), {}
    for name, speed, gain, noise in (("clean", 1, 1, 0), ("10 dB noise", 1, 1, 10 ** -.5), ("level +20%", 1, 1.2, 0), ("level -20%", 1, .8, 0),
                                     ("speed +20%", 1.2, 1, 0), ("speed -20%", .8, 1, 0)):
        right = 0
        for i in range(n):
            clip, move = data.draw(data.SPLITS["held-out"] + 2 * i, 80, size, speed=speed), int(rng.integers(-10, 11))
            audio = gain * (clip.audio + noise * clip.audio.std() * rng.standard_normal(len(clip.audio)).astype(np.float32))
            mel = data.log_mel(audio[(15 - move) * 640:(65 - move) * 640])
            right += abs(syncnet.score(net, clip.video[None, 15:65].to(device), mel[None].to(device))[2].item() - move) <= 1
        found[name] = right / n
    return found


def contrast(net, size, n, device):
    """Sync-C of n held-out people, 3.84 s each, over that of the same pictures with the next one's sound."""
    _, truth, mel, _ = data.held_out(n, size, "held-out", device)
    right, wrong = (syncnet.score(net, truth, sound)[0].mean().item() for sound in (mel, mel.roll(1, 0)))
    return right / wrong


def summary(values):
    """Clips' values -> mean and half its 95% interval; NaN clips (without a pause) do not count."""
    values = values[values.isfinite()].cpu().double()
    return values.mean().item(), (1.96 * values.std() / len(values) ** .5).item()


def quality(cfg):
    """The judge's table, on people and voices that nothing was trained on."""
    device = start(cfg)
    sets = ["dub", "self", "cross"] if cfg.set == "all" else [cfg.set]
    if not set(sets) <= {"dub", "self", "cross"} or cfg.clips < 2:
        raise Fail(f"--set {cfg.set}, --clips {cfg.clips}: dub, self, cross or all, and at least 2")
    networks = {name: nn_model.load_dit(path, device, runtime.fast_dtype(device))
                for name in ("teacher", "student") if (path := checkpoint(cfg, name)).is_file() or name == "teacher"}
    experts = {name: syncnet.load_syncnet(checkpoint(cfg, name), device) for name in ("judge", "syncnet")}
    first, *others = [dict(set=kind, **quality_of(kind, cfg, networks, experts["judge"], device)) for kind in sets]
    results = dict(about("quality", cfg, device), **first, others=others)
    results["clips"] = cfg.clips
    results["offsets"] = {name: robustness(net, networks["teacher"].cfg.size, cfg.clips, device) for name, net in experts.items()}
    results["contrast"] = {name: contrast(net, networks["teacher"].cfg.size, cfg.clips, device) for name, net in experts.items()}
    print("\n| offset found to within a frame | " + " | ".join(results["offsets"]["judge"]) + " | Sync-C over a wrong sound's |\n|---" + "|---" * 7 + "|")
    for name, found in results["offsets"].items():
        print(f"| {name} | " + " | ".join(f"{v:.1%}" for v in found.values()) + f" | {results['contrast'][name]:.1f} |")
    print(json.dumps(results).replace("NaN", "null"))


def quality_of(kind, cfg, networks, judge, device):
    """One set: prints its table, draws its sheet -> its rows."""
    teacher, student = networks["teacher"], networks.get("student")
    size, latents, steps = teacher.cfg.size, distill.PRESETS[cfg.config].get("latents", distill.Config.latents), sample.STEPS
    clips = list(clips_of(kind, cfg.clips, size))
    pairs, audio = data.Pairs.of([c[:2] for c in clips], device), [c[1].audio for c in clips]
    source, truth, mel, _ = pairs
    rows, many, frames = {}, cfg.teacher and cfg.front and kind == "dub", 4 * latents

    def add(name, dub, speed=(None, None), **settings):
        rows[name] = dict(settings, fps=speed[0], ttff_s=speed[1])
        for key, values in measures(dub, pairs, judge, teacher.cfg.patch).items():
            rows[name][key], rows[name][key + "_ci"] = summary(values)
        print(f"{kind}: {name}, {cfg.clips} clips measured", file=sys.stderr, flush=True)

    name_of = lambda steps, scale: f"teacher, {steps} step{'s' * (steps > 1)}, guidance {scale:g}"          # noqa: E731

    def dubbed_by(work):                                             # in batches that fit into any memory
        return torch.cat([work(s, m) for s, m in zip(source.split(16), mel.split(16))])

    def teach(steps, scale):
        run = lambda s, m: sample.dub_teacher(teacher, s, m, steps, scale, latents)          # noqa: E731
        speed = sample.clock(sample.once(lambda: run(source[:1, :frames], mel[:1, :4 * frames])), device)
        dub = dubbed_by(run)
        add(name_of(steps, scale), dub, speed, steps=steps, guidance=scale)
        return dub

    add("truth", truth)
    add("truth, other detail", torch.stack([c[2].video for c in clips]).to(device))
    if many:
        add("truth, mean of 16 details", torch.stack([best_blur(i, size) for i in range(cfg.clips)]).to(device))
    named, videos = dict(truth="truth"), [source]
    if cfg.teacher:
        front = {scale: teach(steps, scale) for scale in ((1., 1.5, 2., 3., 4.5, 6.) if many else (1., 1.5, 2.))}
        best = max(front, key=lambda scale: rows[name_of(steps, scale)]["sync_c"])
        for few in (1, 2, 5, 10) if many else ():
            teach(few, 1.)
        named.update(teacher=name_of(steps, 1), teacher_guided=name_of(steps, best))
        videos += [front[1.], front[best]]
    if student is not None:
        dub, one = dubbed_by(lambda s, m: sample.dub_student(student, s, m)), source[0].cpu()
        list(sample.stream(student, one[:frames], audio[0]))
        videos.append(dub)
        add("student", dub, sample.clock(sample.stream(student, one, audio[0]), device), steps=len(student.times or sample.TIMES), guidance=1.)
        named["student"] = "student"
    table(kind, rows)
    sheet(f"{cfg.out}/quality-{cfg.config}-{kind}.png", [v.cpu() for v in videos + [truth]])
    if many:
        front_figure(f"{cfg.out}/front-{cfg.config}.png", rows)
    return dict(rows={name: rows[row] for name, row in named.items()}, ceiling=rows["truth, other detail"], all=rows)


def front_figure(path, rows):
    """Mouth PSNR against Sync-C: the teacher over its guidance and over its steps, the student, the truth's Sync-C."""
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    taught = [row for name, row in rows.items() if name.startswith("teacher")]
    for key, line in (("guidance", [r for r in taught if r["steps"] == sample.STEPS]),
                      ("steps", sorted((r for r in taught if r["guidance"] == 1), key=lambda r: r["steps"]))):
        axis.plot([r["sync_c"] for r in line], [r["psnr"] for r in line], marker="o", ms=4, label=f"teacher, by {key}")
        for row in line:
            axis.annotate(f"{row[key]:g}", (row["sync_c"], row["psnr"]), (5, -9 if key == "guidance" else 4), textcoords="offset points", fontsize=8)
    if "student" in rows:
        axis.plot(rows["student"]["sync_c"], rows["student"]["psnr"], "r*", ms=12, label="student")
    axis.axvline(rows["truth"]["sync_c"], color="gray", lw=.8, label="the truth's Sync-C")
    axis.set(xlabel="Sync-C (judge)", ylabel="mouth PSNR (dB)")
    axis.legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)


@dataclasses.dataclass
class Long:
    config: str = "small"
    weights: str = ""       # folder of student.pt; weights/CONFIG if not given
    seconds: int = 180      # whole windows
    people: int = 4         # as many streams, averaged: what is left are differences of time, not of words
    window: int = 10        # seconds, measured one by one
    ablate: bool = True     # the same student with other caches too
    device: str = ""
    threads: int = 0
    seed: int = 0
    zero = ("seed", "threads")
    out: str = "out/bench"


class Absolute(Cache):
    """An ablation: RoPE by the place in the video, which grows beyond anything seen in training."""

    def table(self, rope, n, c):
        self.far = self.far if hasattr(self, "far") else nn_model.rope_table(self.cfg, 4096).to(rope.device)
        return self.far[nn_model.visible(self.chunks + c, self.cfg)[:n]]


def drift(dub, truth):
    """How far the mean picture of a window (T, S, S, 3) is from the truth's -> largest mean difference of a colour in the mouth mask, the same
    outside it, and the root mean square difference of the pixels in the mask (identity); all in levels of 255."""
    mask, off = data.mouth_mask(dub.shape[1]).to(dub.device)[..., None], dub.float().mean(0) - truth.float().mean(0)
    colour = [((off * m).sum((0, 1)) / m.sum()).abs().max().item() for m in (mask, (mask == 0).float())]
    return [*colour, ((off ** 2 * mask).sum() / 3 / mask.sum()).sqrt().item()]


def border_jump(video, n):
    """Frame difference energy in the mask at the borders of chunks of n frames over that inside them."""
    energy = ((video[1:].float() - video[:-1].float()) ** 2 * data.mouth_mask(video.shape[1]).to(video.device)[..., None]).mean((1, 2, 3))
    border = torch.arange(1, len(video)) % n == 0
    return (energy[border].mean() / energy[~border].mean()).item()


def plot_long(path, rows, window):
    """The measures of long over time; rows as in its JSON, a value each `window` seconds."""
    figure, axes = plt.subplots(1, 4, figsize=(17, 3), layout="constrained")
    for axis, (key, title) in zip(axes, dict(sync_c="Sync-C (judge)", psnr="mouth PSNR (dB)", colour="colour (levels of 255)",
                                             identity="identity (levels of 255)").items()):
        for i, (name, row) in enumerate(rows.items()):
            if name != "truth" or key == "sync_c":
                axis.plot([window * (j + .5) for j in range(len(row[key]))], row[key], f"C{i}", label=name, lw=2 if name == "student" else 1)
        axis.set(title=title, xlabel="seconds")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=60)
    plt.close(figure)


def long(cfg):
    """Minutes of streaming: is the last one as good as the first, and what holds it up?"""
    if cfg.seconds % cfg.window or cfg.seconds < 2 * cfg.window:
        raise Fail(f"--seconds {cfg.seconds} must be two or more times --window {cfg.window}")
    if cfg.ablate and cfg.seconds > 640:
        raise Fail(f"--seconds {cfg.seconds}: absolute positions end at 640; --ablate 0 leaves the other caches out")
    device = start(cfg)
    student, judge = nn_model.load_dit(checkpoint(cfg, "student"), device, runtime.fast_dtype(device)), syncnet.load_syncnet(checkpoint(cfg, "judge"), device)
    n, per = 4 * student.cfg.chunk, cfg.window * data.FPS
    cut = lambda clip: [data.Clip(clip.video[a:a + per], clip.audio[a * 640:(a + per) * 640], clip.mouth[a:a + per])      # noqa: E731
                        for a in range(0, len(clip.video), per)]
    # The truth says which words are hard to judge, the student started anew in every window which ones are hard to say.
    kinds = {"truth": ({}, None), "student": ({}, Cache), "started anew": ({}, Cache)}
    if cfg.ablate:
        kinds.update({"no sink": (dict(sink=0), Cache), "window 3": (dict(window=3), Cache), "absolute positions": ({}, Absolute)})
    measured = {name: [] for name in kinds}
    for i in range(cfg.people):
        source, truth = data.dub_pair(cfg.seed + i, cfg.seconds * data.FPS, student.cfg.size)
        pairs = data.Pairs.of(list(zip(cut(source), cut(truth))), device)
        for name, (fields, cache) in kinds.items():
            net = copy.copy(student)
            net.cfg = dataclasses.replace(student.cfg, **fields)
            parts = list(zip(cut(source), cut(truth))) if name == "started anew" else [(source, truth)]
            dubs = [torch.cat(list(sample.stream(net, s.video, t.audio, seed=cfg.seed, make_cache=cache))) if cache else t.video for s, t in parts]
            windows = torch.cat(dubs).view(-1, per, *source.video.shape[1:]).to(device)
            q = {k: v.tolist() for k, v in measures(windows, pairs, judge, student.cfg.patch).items()}
            q["offset"] = syncnet.score(judge, windows, pairs.mel)[2].tolist()
            q["colour"], q["colour_outside"], q["identity"] = zip(*map(drift, windows, pairs.truth))
            q["border_jump"] = [statistics.mean(border_jump(d, n) for d in dubs) / statistics.mean(border_jump(t.video, n) for _, t in parts)]
            measured[name].append(q)
            print(f"{name}: {len(windows) * per} frames of person {i}", file=sys.stderr, flush=True)
    rows = {name: {k: [statistics.mean(x) for x in zip(*(q[k] for q in people))] for k in people[0]} for name, people in measured.items()}
    minute = 60 // cfg.window if cfg.seconds >= 120 else 1
    keys = ["sync_c", "psnr", "offset", "colour", "colour_outside", "identity", "opening"]
    mean_of = lambda row, part: {k: statistics.mean(row[k][part]) for k in keys}         # noqa: E731
    ends = {name: dict(first=mean_of(row, slice(minute)), last=mean_of(row, slice(-minute, None))) for name, row in rows.items()}
    print(f"\nfirst -> last {minute * cfg.window} s of {cfg.seconds}, mean of {cfg.people} people\n\n"
          "| cache | Sync-C | PSNR dB | offset | colour | outside | identity | opening | jump at borders |\n|---" + "|---" * 8 + "|")
    for name, end in ends.items():
        print(f"| {name} | " + " | ".join(f"{end['first'][k]:.{d}f} -> {end['last'][k]:.{d}f}" for k, d in zip(keys, (3, 2, 1, 1, 1, 1, 3)))
              + f" | {rows[name]['border_jump'][0]:.2f} |")
    plot_long(f"{cfg.out}/long-{cfg.config}.png", rows, cfg.window)
    first, last = ends["student"]["first"], ends["student"]["last"]
    print(json.dumps(dict(about("long", cfg, device), first=first, last=last, border_jump=rows["student"]["border_jump"][0],
                          colour_drift=last["colour"] - first["colour"], rows=rows)))


@dataclasses.dataclass
class Ablate:
    config: str = "small"
    weights: str = ""       # folder of teacher.pt; weights/CONFIG if not given
    only: str = ""          # rows whose names hold one of these words, with commas between
    updates: int = 0        # of the student; as many as distill.py does if 0
    train_clips: int = 600
    clips: int = 64         # to judge on
    split: str = "held-out"  # the people in them; watch to choose settings by
    seeds: int = 1
    device: str = ""
    threads: int = 0
    seed: int = 0
    zero = ("seed", "threads", "updates")
    out: str = "out/bench"


VARIANTS = {
    "as it is": {},
    "window off: never guided": dict(sync_window="off"),
    "window reversed: guided outside it": dict(sync_window="reversed"),
    "guided everywhere": dict(sync_window="all"),
    "no reward": dict(beta=0.),
    "beta 2": dict(beta=2.),
    "beta 2, raw weights (paper)": dict(beta=2., raw_weights=True),
    "no view in init (paper)": dict(view=0.),
    "guidance 3": dict(guidance=3.),
    "guidance 4.5 (paper)": dict(guidance=4.5),
    "1 critic update to one of the student": dict(critic_updates=1),
    "landing 20": dict(landing=20),
    "landing 30 (paper)": dict(landing=30),
    "dmd shift 5 (paper)": dict(dmd_shift=5.),
    "no edges in dmd (paper)": dict(dmd_edges=0.),
    "no view in dmd (paper)": dict(dmd_view=0.),
    "noisy chunks only in init (paper)": dict(init_clean=0.),
    "cache from the last denoising pass": dict(cache="last"),
    "1 step": dict(student_steps=1),
    "4 steps": dict(student_steps=4),
}


def ablate(cfg):
    """The distillation again with one thing changed at a time: init (once for all that share its settings), dmd, and the judge."""
    device, home = start(cfg), Path(cfg.out) / "ablate"
    words = [word.strip() for word in cfg.only.split(",")]
    if strange := [word for word in words if not any(word in name for name in VARIANTS)]:
        raise Fail(f"--only: no row is called {', '.join(strange)}; they are {'; '.join(VARIANTS)}")
    wanted = {name: fields for name, fields in VARIANTS.items() if any(word in name for word in words)}
    if cfg.split not in data.SPLITS:
        raise Fail(f"--split {cfg.split}: one of {', '.join(data.SPLITS)}")
    experts = {name: syncnet.load_syncnet(checkpoint(cfg, name), device) for name in ("judge", "syncnet")}
    base = distill.Config(**dict(distill.PRESETS[cfg.config], config=cfg.config, clips=cfg.train_clips))
    base.dmd_steps = cfg.updates or base.dmd_steps
    teacher = nn_model.load_dit(checkpoint(cfg, "teacher"), device).requires_grad_(False)
    samples = data.Samples(data.Bank(base.size, 4 * base.clip_latents, base.clips), base, device, runtime.fast_dtype(device))
    watch, pairs = data.held_out(8, base.size, "watch", device), data.held_out(cfg.clips, base.size, cfg.split, device)
    inits, rows = {}, []

    def judge_row(name, seed, net, times):
        dub = torch.cat([sample.dub_student(net, s, m, times) for s, m in zip(pairs.source.split(16), pairs.mel.split(16))])
        q = {k: v.nanmean().item() for k, v in measures(dub, pairs, experts["judge"], base.patch).items()}
        rows.append(dict(name=name, seed=seed, reward_c=syncnet.score(experts["syncnet"], dub, pairs.mel)[0].mean().item(), **q))
        print(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in rows[-1].items() if k not in ("name", "seed")), file=sys.stderr, flush=True)

    with contextlib.redirect_stdout(sys.stderr):
        for seed in range(cfg.seed, cfg.seed + cfg.seeds):
            for i, (name, fields) in enumerate(wanted.items()):
                c = dataclasses.replace(base, seed=seed, out=str(home / f"{seed}-{i}"), **fields)
                shutil.rmtree(c.out, ignore_errors=True)
                Path(c.out).mkdir(parents=True)
                grid = seed, c.times, c.cache, c.init_clean, c.view
                if grid not in inits:
                    distill.train_init(c, teacher, samples, experts["syncnet"], experts["judge"], watch, device)
                    inits[grid] = nn_model.load_dit(f"{c.out}/init.pt", device).requires_grad_(False)
                    judge_row(f"init alone, steps {len(c.times)}, landing {c.landing}, cache {c.cache}, clean {c.init_clean:g}", seed, inits[grid], c.times)
                distill.train_dmd(c, teacher, copy.deepcopy(inits[grid]), samples, experts["syncnet"], experts["judge"], watch, device)
                judge_row(name, seed, nn_model.load_dit(f"{c.out}/student.pt", device, runtime.fast_dtype(device)), c.times)
    columns = dict(sync_c=("Sync-C", 3), reward_c=("Sync-C by the reward network", 3), psnr=("PSNR dB", 2), landmark=("landmark %", 2),
                   sharp=("sharp", 2))
    print(f"{base.dmd_steps} updates, {cfg.clips} clips of {cfg.split}\n\n| | " + " | ".join(t for t, _ in columns.values()) + " |")
    print("|---" + "|---" * len(columns) + "|")
    for name in dict.fromkeys(r["name"] for r in rows):
        means = {k: statistics.mean(r[k] for r in rows if r["name"] == name) for k in columns}
        print(f"| {name} | " + " | ".join(f"{means[k]:.{n}f}" for k, (_, n) in columns.items()) + " |")
    print(json.dumps(dict(about("ablate", cfg, device), clips=cfg.clips, updates=base.dmd_steps, rows=rows)))


def table(kind, rows):
    """The measures as Markdown, mean ± 95%."""
    columns = dict(sync_c=("Sync-C", 3), sync_d=("Sync-D", 3), psnr=("PSNR dB", 2), ssim=("SSIM", 3), landmark=("landmark %", 2), opening=("opening", 3),
                   width=("width", 3), gain=("gain", 2), sharp=("sharp", 2), seams=("seams", 2), silence=("silence %", 2))
    print(f"\n{kind}\n\n| | " + " | ".join(title for title, _ in columns.values()) + " |\n|---" + "|---" * len(columns) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[k]:.{n}f} ± {row[k + '_ci']:.{n}f}" for k, (_, n) in columns.items()) + " |")


def sheet(path, dubs, clips=2, moments=6, scale=4):
    """Rows of the same moments of a few clips, the lower two thirds of the square: one row for each of `dubs`, (n, T, S, S, 3) uint8."""
    S, T = dubs[0].shape[2], dubs[0].shape[1]
    rows = [torch.cat(list(d[i, T // 16::T // moments][:moments, S // 3:]), 1) for i in range(min(clips, len(dubs[0]))) for d in dubs]
    plt.imsave(path, torch.cat(rows).repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy())
