"""Every number and figure in the README. The last line is one JSON object; figures in out/bench/.

    python bench.py speed --config tiny         # frames a second, time to the first one, training
    python bench.py quality --config small      # the judge's table: truth, teacher, student
    python bench.py long --config small         # three minutes streamed, and other caches
    python bench.py ablate --config tiny        # the distillation with one thing changed at a time
    python bench.py attention --config small    # three ways to attend causally over a clip

FPS: frames out over wall time, everything from raw pixels and samples to uint8 frames in host
memory included. TTFF: from the moment the first chunk's pixels and samples are in memory to its
first frame as uint8. One stream, batch 1. Quality is measured on held-out people by the judge.
"""

import copy
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import data
import distill
import model
import runtime
import sample
import syncnet
from faces import FPS, RATE, SPLITS, Clip, draw, dub_pair, mouth_mask
from model import load_dit
from runtime import Fail, opt
from syncnet import features, frechet, load_syncnet, measures

COLUMNS = dict(sync_c=3, psnr=2, landmark=2, gain=2, sharp=2, frechet=2)  # and their digits
WINDOW = 10  # seconds of a long stream that are measured together


@dataclasses.dataclass
class Options:
    config: str = opt("small", "preset", ("tiny", "small"))
    weights: str = opt(
        "", "folder of teacher.pt, student.pt, judge.pt; weights/CONFIG if not given"
    )
    out: str = opt("out/bench", "folder of the figures")
    device: str = opt("", "cuda, mps or cpu; the best there is if not given")
    precision: str = opt("", *runtime.PRECISIONS)
    seed: int = opt(0, least=0)
    rounds: int = opt(5, "speed, attention: times that each row is measured, taking turns")
    compile: str = opt("off", "speed: the compiled student, too", ("on", "off"))
    set: str = opt(
        "dub", "quality: other words, own, or in another voice", ("dub", "self", "cross")
    )
    clips: int = opt(64, "quality, ablate: people", least=2)
    teacher: str = opt("all", "quality: of its rows, guidance 1, 1.5, 2", ("all", "few", "none"))
    seconds: int = opt(180, "long: of each stream")
    people: int = opt(4, "long: streams, averaged: what is left are differences of time, not words")
    only: str = opt("", "ablate: rows whose names hold one of these words, with commas between")
    seeds: int = opt(1, "ablate: trainings of each row")


def checkpoint(cfg, name):
    """NAME.pt in the folder --weights. A teacher or judge that is not there is the one that the
    student there was distilled beside: where its --teacher lies, or bundled."""
    bundled = Path(__file__).parent / "weights" / cfg.config
    folder = Path(cfg.weights or bundled)
    places = [folder]
    if name != "student" and (folder / "student.pt").is_file():
        options = runtime.load(folder / "student.pt", "dit").get("options", {})
        places += [Path(options["teacher"]).parent] if options.get("teacher") else []
    for path in [place / f"{name}.pt" for place in (*places, bundled)]:
        if path.is_file() and (name != "student" or path.parent == folder):
            print(f"{name}: {path}", file=sys.stderr, flush=True)
            return path
    raise Fail(f"{folder}: no {name}.pt; --weights names a folder that holds one, out/tiny say")


def network(cfg, name, device):
    return load_dit(checkpoint(cfg, name), device, runtime.fast_dtype(device))


def table(first, rows, columns):
    """Print {name: {column: value, column_ci: half an interval}} as Markdown."""
    print(f"\n| {first} | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
    for name, row in rows.items():
        cells = [f"{row[key]:.{digits}f}" for key, digits in columns.items()]
        for i, (key, digits) in enumerate(columns.items()):
            cells[i] += f" ± {row[key + '_ci']:.{digits}f}" if key + "_ci" in row else ""
        print(f"| {name} | {' | '.join(cells)} |")
    print()


# ------------------------------------------------------------------------------------------ speed
def seconds_of(work, device):
    runtime.synchronize(device)
    begun = time.perf_counter()
    work()
    runtime.synchronize(device)
    return time.perf_counter() - begun


def in_turns(ways, rounds, measure):
    """{name: work} -> {name: [measure(work)] of each round}; a first round only warms up."""
    found = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, work in ways.items():
            found[name].append(measure(work))
    return {name: measured[1:] for name, measured in found.items()}


def training(recipe, device):
    """Seconds of a teacher step, and of a student update with its critic updates, and the rate of
    the first, by the trainings themselves."""
    clips = data.Clips(recipe.size, 8, device)
    watch, found = data.held_out(1, recipe.size, "watch", device), []
    expert = syncnet.SyncNet(syncnet.Config(recipe.size)).to(device).requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        recipe = dataclasses.replace(recipe, out=folder, teacher_steps=24, dmd_steps=12)
        teacher = distill.train_teacher(recipe, clips, expert, expert, watch)
        distill.train_dmd(recipe, teacher, teacher, clips, expert, expert, watch)
        rows = [json.loads(line) for line in open(f"{folder}/log.jsonl")]
    for stage in ("teacher", "student"):
        steps = [row for row in rows if row["stage"] == stage][3:]
        pairs = [(a, b) for a, b in zip(steps, steps[1:]) if "psnr" not in b]
        found.append(statistics.median(b["seconds"] - a["seconds"] for a, b in pairs))
    N, D, P = model.n_tokens(recipe), recipe.width, 12 * recipe.patch**2
    block = 12 * D * D + 2 * D * N * recipe.latents
    step = 6e-9 * recipe.batch * recipe.latents * N * (recipe.depth * block + 3.25 * D * P)
    return dict(teacher_step_s=found[0], student_update_s=found[1], teacher_gflops=step / found[0])


def speed(cfg, device):
    """The student's stream against its teacher's windows; random weights, speed is the same."""
    recipe = distill.Config(**distill.PRESETS[cfg.config] | dict(config=cfg.config))
    net = model.DiT(model.network_of(recipe)).to(device, runtime.fast_dtype(device)).eval()
    T = 4 * recipe.latents  # frames that the teacher makes at once
    clip = draw(SPLITS["held-out"], 2 * T, recipe.size)
    source = clip.video[None, :T].to(device)
    mel = data.log_mel(clip.audio[: T * RATE // FPS])[None].to(device)

    def teacher(guidance):
        yield sample.dub_teacher(net, source, mel, guidance=guidance, latents=recipe.latents)[0]

    ways = {
        "student": lambda: sample.stream(net, clip.video, clip.audio),
        "teacher_guided": lambda: teacher(recipe.guidance),
        "teacher": lambda: teacher(1.0),
    }
    if model.has_kernel(device):
        fused = copy.copy(net)
        fused.fused = True
        # Eight times as long: until the window is full, a stream's chunks are not in the graph.
        video, audio = clip.video.repeat(8, 1, 1, 1), np.tile(clip.audio, 8)
        ways["student_fused"] = lambda: sample.stream(fused, clip.video, clip.audio)
        ways["student_graph"] = lambda: sample.stream(fused, video, audio, compile=True)
    result = {}
    for name, runs in in_turns(ways, cfg.rounds, lambda work: sample.clock(work(), device)).items():
        fps, ttff = ([run[i] for run in runs] for i in (0, 1))
        middle = statistics.median(fps)
        row = dict(fps=middle, least=min(fps), most=max(fps), ttff_s=statistics.median(ttff))
        result[name] = dict(row, ms_per_chunk=4000 * recipe.chunk / middle)
    table("", result, dict(fps=1, least=1, most=1, ttff_s=4, ms_per_chunk=1))
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=runtime.fast_dtype(device))
    peak = 2e-9 * n**3 / min(seconds_of(lambda: a @ b, device) for _ in range(12))
    ratio = result["student"]["fps"] / result["teacher_guided"]["fps"]
    bound = 2 * sample.STEPS / (recipe.student_steps + 1)
    train = training(recipe, device)
    print(f"student over guided teacher {ratio:.1f}; by the count of passes {bound:.1f} at most")
    print(" ".join(f"{key} {value:.3g}" for key, value in dict(train, peak_gflops=peak).items()))
    return dict(result, ratio=ratio, bound=bound, train=train, peak_gflops=peak)


# ---------------------------------------------------------------------------------------- quality
def people(kind, n, size, device):
    """n held-out people: Pairs, and the truth drawn again with only that changed which no sound
    decides (teeth, smile), (n, T, S, S, 3): nothing that commits itself to one mouth can be closer
    than this ceiling."""
    clips, ceiling = [], []
    for seed in range(SPLITS["held-out"], SPLITS["held-out"] + 2 * n, 2):
        words = dict(dub=dict(text=seed + 1), self={}, cross=dict(text=seed + 1, voice=seed + 2))
        how = dict(words[kind], device=device)
        clips.append((draw(seed, 96, size, device=device), draw(seed, 96, size, **how)))
        ceiling.append(draw(seed, 96, size, detail=seed + 1_000_000, **how).video)
    return data.pairs_of(clips, device), torch.stack(ceiling)


def by_parts(dub, pairs):
    """dub(source, mel) of all pairs, 8 at a time, so that they fit into any memory."""
    parts = zip(pairs.source.split(8), pairs.mel.split(8))
    return torch.cat([dub(source, mel) for source, mel in parts])


def judged(dub, pairs, judge):
    """The measures' means over people with half their 95% intervals, and the Frechet distance."""
    row = dict(frechet=frechet(features(judge, dub), features(judge, pairs.truth)))
    for key, values in measures(dub, pairs, judge).items():
        row[key] = values.mean().item()
        row[key + "_ci"] = (1.96 * values.std() / len(values) ** 0.5).item()
    return row


def quality(cfg, device):
    """The judge's table, and a sheet: source, teacher, guided teacher, student, truth."""
    judge = load_syncnet(checkpoint(cfg, "judge"), device)
    student = network(cfg, "student", device)
    pairs, ceiling = people(cfg.set, cfg.clips, student.cfg.size, device)
    dubs = {"truth": pairs.truth, "truth, other detail": ceiling, "source": pairs.source}
    settings = [(50, 1.0), (50, 1.5), (50, 2.0)] if cfg.teacher != "none" else []
    if cfg.teacher == "all":
        settings += [(50, 3.0), (50, 4.5), (1, 1.0), (2, 1.0), (5, 1.0), (10, 1.0)]
    teacher = network(cfg, "teacher", device) if settings else None
    for steps, scale in settings:
        how = dict(steps=steps, guidance=scale)
        dub = by_parts(lambda *parts: sample.dub_teacher(teacher, *parts, **how), pairs)
        dubs[f"teacher, {steps} steps, guidance {scale:g}"] = dub
        print(f"teacher, {steps} steps, guidance {scale:g}: done", file=sys.stderr, flush=True)
    dubs["student"] = by_parts(lambda *parts: sample.dub_student(student, *parts), pairs)
    rows = {name: judged(dub, pairs, judge) for name, dub in dubs.items()}
    table(cfg.set, rows, COLUMNS)
    named = dict(truth="truth", student="student")
    taught = [name for name in rows if name.startswith("teacher, 50")]
    if taught:
        named["teacher"] = taught[0]
        named["teacher_guided"] = max(taught, key=lambda name: rows[name]["sync_c"])
    shown = ["source", *(named[k] for k in ("teacher", "teacher_guided") if k in named)]
    sheet(cfg, [dubs[name] for name in (*shown, "student", "truth")])
    rows_of = {key: rows[name] for key, name in named.items()}
    more = dict(set=cfg.set, clips=cfg.clips, rows=rows_of, all=rows)
    return dict(more, ceiling=rows["truth, other detail"])


def sheet(cfg, dubs):
    """The lower two thirds of six moments of two people, a row for each of `dubs`."""
    S, rows = dubs[0].shape[2], []
    for i in range(2):
        rows += [torch.cat(list(dub[i, 6::16, S // 3 :]), 1) for dub in dubs]
    scale = max(1, 256 // S)
    picture = torch.cat(rows).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    plt.imsave(f"{cfg.out}/quality-{cfg.config}-{cfg.set}.png", picture.cpu().numpy())


# ------------------------------------------------------------------------------------------- long
def windows(clip):
    """A long Clip -> [Clip] of WINDOW seconds each."""
    video, mouth = (x.split(WINDOW * FPS) for x in (clip.video, torch.from_numpy(clip.mouth)))
    audio = torch.from_numpy(clip.audio).split(WINDOW * RATE)
    return [Clip(v, a.numpy(), m.numpy()) for v, a, m in zip(video, audio, mouth)]


def drift(dub, truth):
    """How far the mean picture of windows (n, T, S, S, 3) is off: the largest mean error of a
    colour in the mask (n,), in levels of 255."""
    mask = mouth_mask(dub.shape[2]).to(dub.device)[..., None]
    off = (dub.float().mean(1) - truth.float().mean(1)) * mask
    return (off.sum((1, 2)) / mask.sum()).abs().max(1).values


def border_jump(video, n):
    """Frame differences in the mask at the borders of chunks of n frames over those inside."""
    mask = mouth_mask(video.shape[1]).to(video.device)[..., None]
    energy = (video.float().diff(dim=0).square() * mask).mean((1, 2, 3))
    border = torch.arange(1, len(video)) % n == 0
    return (energy[border].mean() / energy[~border].mean()).item()


def long(cfg, device):
    """Minutes of streaming: is the last one as good as the first? The student started anew in every
    window says which words are hard; other caches, what holds it up."""
    if cfg.seconds % WINDOW or cfg.seconds < 2 * WINDOW:
        raise Fail(f"--seconds {cfg.seconds} must be two or more times {WINDOW}")
    student, judge = network(cfg, "student", device), load_syncnet(checkpoint(cfg, "judge"), device)
    kinds = {"truth": {}, "student": {}, "started anew": {}}
    kinds |= {"no sink": dict(sink=0), "window 3": dict(window=3)}
    rows = {name: [] for name in kinds}
    for i in range(cfg.seed, cfg.seed + cfg.people):
        source, truth = dub_pair(i, cfg.seconds * FPS, student.cfg.size)
        cut = list(zip(windows(source), windows(truth)))
        pairs = data.pairs_of(cut, device)
        for name, fields in kinds.items():
            net, dub = copy.copy(student), [truth.video]
            net.cfg = dataclasses.replace(student.cfg, **fields)
            parts = cut if name == "started anew" else [(source, truth)]
            if name != "truth":
                dub = [frames for s, t in parts for frames in sample.stream(net, s.video, t.audio)]
            dub = torch.cat(dub).view(pairs.truth.shape).to(device)
            jump = [border_jump(v.flatten(0, 1), 4 * net.cfg.chunk) for v in (dub, pairs.truth)]
            found = dict(measures(dub, pairs, judge), colour=drift(dub, pairs.truth))
            found["jump"] = torch.full((len(dub),), jump[0] / jump[1])
            rows[name].append(torch.stack([values.cpu() for values in found.values()]))
            print(f"{name}: person {i}", file=sys.stderr, flush=True)
    minute, ends = 60 // WINDOW if cfg.seconds >= 120 else 1, {}
    mean = {name: dict(zip(found, torch.stack(row).mean(0))) for name, row in rows.items()}
    for name, row in mean.items():
        ends[f"{name}, first"] = {key: x[:minute].mean().item() for key, x in row.items()}
        ends[f"{name}, last"] = {key: x[-minute:].mean().item() for key, x in row.items()}
    table("minute", ends, dict(sync_c=3, psnr=2, landmark=2, gain=2, sharp=2, colour=1, jump=2))
    figure, axes = plt.subplots(1, 4, figsize=(17, 3), layout="constrained")
    for axis, key in zip(axes, ("sync_c", "psnr", "sharp", "colour")):
        for name, row in mean.items():
            axis.plot([WINDOW * (j + 0.5) for j in range(len(row[key]))], row[key], label=name)
        axis.set(title=key, xlabel="seconds")
    axes[0].legend()
    figure.savefig(f"{cfg.out}/long-{cfg.config}.png", dpi=60)
    rows = {name: {key: x.tolist() for key, x in row.items()} for name, row in mean.items()}
    return dict(first=ends["student, first"], last=ends["student, last"], rows=rows)


# ----------------------------------------------------------------------------------------- ablate
VARIANTS = {
    "as it is": {},
    "never guided": dict(sync_window="off"),
    "window reversed": dict(sync_window="reversed"),
    "guided everywhere": dict(sync_window="all"),
    "no reward": dict(beta=0.0),
    "beta 2 (paper)": dict(beta=2.0),
    "no view": dict(view=0.0, dmd_view=0.0),
    "1 critic update": dict(critic_updates=1),
    "landing 20": dict(landing=20),
    "landing 30 (paper)": dict(landing=30),
    "dmd shift 5 (paper)": dict(dmd_shift=5.0),
    "1 step": dict(student_steps=1),
    "4 steps": dict(student_steps=4),
}


def ablate(cfg, device):
    """Init and dmd again with one thing changed at a time, then the judge. A row that is there, in
    its folder, is not trained again."""
    wanted = [name for name in VARIANTS if any(w.strip() in name for w in cfg.only.split(","))]
    if not wanted:
        raise Fail(f"--only {cfg.only}: no such row; they are {'; '.join(VARIANTS)}")
    teacher, judge = checkpoint(cfg, "teacher"), load_syncnet(checkpoint(cfg, "judge"), device)
    pairs, _ = people("dub", cfg.clips, load_dit(teacher).cfg.size, device)
    rows = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for name in wanted:
            out = f"{cfg.out}/ablate-{cfg.config}/{name.replace(' ', '-')}-{seed}"
            how = dict(config=cfg.config, teacher=teacher, seed=seed, out=out, device=device)
            distill.main([f"--{key}={value}" for key, value in (how | VARIANTS[name]).items()])
            for stage in ("init", "student"):
                net = load_dit(f"{out}/{stage}.pt", device, runtime.fast_dtype(device))
                dub = by_parts(lambda *parts: sample.dub_student(net, *parts), pairs)
                label = f"{name}, init alone" if stage == "init" else name
                rows.append(dict(name=label, seed=seed, **judged(dub, pairs, judge)))
    shown = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        same = [row for row in rows if row["name"] == name]
        shown[name] = {key: statistics.mean(row[key] for row in same) for key in COLUMNS}
        for key in COLUMNS if cfg.seeds > 1 else ():
            shown[name][key + "_ci"] = statistics.stdev(row[key] for row in same)
    table(f"{cfg.seeds} seeds, mean ± spread", shown, COLUMNS)
    return dict(clips=cfg.clips, rows=rows)


# -------------------------------------------------------------------------------------- attention
def attention(cfg, device):
    """The causal clip, forward, batch 4, rotation included: a dense call a chunk (what the student
    does; only it gives each key its place in the stream's window), one call with a mask, and
    flex_attention. Milliseconds, median of the rounds."""
    c = distill.Config(**distill.PRESETS[cfg.config])
    rope, N = model.rope_table(c).to(device), model.n_tokens(c)
    flex, rows = torch.compile(flex_attention), {}
    for latents in (12, 48, 192):
        shape = 3, 4, c.heads, latents * N, c.width // c.heads
        q, k, v = torch.randn(shape, device=device, dtype=runtime.fast_dtype(device))
        see = torch.zeros(latents, latents, dtype=torch.bool, device=device)
        for chunk in range(latents // c.chunk):
            see[chunk * c.chunk : (chunk + 1) * c.chunk, model.visible(chunk, c)] = True
        mask = see.repeat_interleave(N, 0).repeat_interleave(N, 1)
        n = latents * N
        blocks = create_block_mask(lambda b, h, i, j: see[i // N, j // N], None, None, n, n, device)

        def turned():
            return model.rotate(q, rope[:latents]), model.rotate(k, rope[:latents]), v

        ways = {
            "a call a chunk": lambda: model.attend_chunks(q, k, v, rope, c),
            "mask": lambda: F.scaled_dot_product_attention(*turned(), attn_mask=mask),
            "flex_attention": lambda: flex(*turned(), block_mask=blocks),
        }
        with torch.no_grad():
            spent = in_turns(ways, cfg.rounds, lambda work: 1000 * seconds_of(work, device))
        rows[f"{latents} latent frames"] = {n: statistics.median(t) for n, t in spent.items()}
    table("ms", rows, dict.fromkeys(ways, 2))
    return dict(rows=rows)


def main(argv):
    benches = dict(speed=speed, quality=quality, long=long, ablate=ablate, attention=attention)
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
    elif argv[0] not in benches:
        raise Fail(f"{argv[0]}: no such bench; one of {', '.join(benches)}")
    else:
        cfg = runtime.options(Options, argv[1:], __doc__)
        runtime.free_space(cfg.out)
        runtime.keep_memory()
        torch.manual_seed(cfg.seed)
        device = runtime.find_device(cfg.device, cfg.precision)
        about = dict(bench=argv[0], config=cfg.config, device=str(device), seed=cfg.seed)
        about.update(threads=torch.get_num_threads(), torch=torch.__version__)
        print(json.dumps(about | benches[argv[0]](cfg, device)))


if __name__ == "__main__":
    runtime.run(main)
