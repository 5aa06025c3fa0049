"""Every number and figure in the README. The last line is one JSON object; figures in out/bench/.

    python bench.py speed --config tiny         # frames a second, time to the first one, training
    python bench.py quality --config small      # the judge's table: truth, teacher, student
    python bench.py trajectory --config small   # what the paper saw in its teacher, in this one
    python bench.py ablate --config tiny        # the distillation with one thing changed at a time
    python bench.py long --config small         # three minutes streamed, and without a sink
    python bench.py attention --config small    # three ways to attend causally over a clip

FPS: frames out over wall time, from raw pixels and samples to uint8 frames in host memory. TTFF:
from the moment the first chunk's are in memory to its first frame. One stream, batch 1. Quality is
measured on held-out people by the judge.
"""

import copy
import dataclasses
import itertools
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
from faces import FPS, RATE, SPLITS, draw, dub_pair
from model import load_dit
from runtime import Fail, opt
from sample import STEPS, dub_student, dub_teacher, tau
from syncnet import features, frechet, load_syncnet, measures

COLUMNS = dict(sync_c=3, psnr=2, landmark=2, gain=2, sharp=2, frechet=2)  # and their digits
AXES = dict(sync_c="Sync-C", psnr="PSNR in the mask (dB)", landmark="landmark error (% of side)")
AXES |= dict(sharp="sharp (1: as the truth)", frechet="Fréchet distance to the truth")
CLIPS = dict(quality=64, ablate=64, trajectory=12, long=4)  # people, if --clips is not given


@dataclasses.dataclass
class Options:
    config: str = opt("small", "preset", ("tiny", "small"))
    weights: str = opt("", "folder of teacher, student, judge; weights/CONFIG if not given")
    out: str = opt("out/bench", "folder of the figures")
    device: str = opt("", "cuda, mps or cpu; the best there is if not given")
    precision: str = opt("", *runtime.PRECISIONS)
    seed: int = opt(0, least=0)
    rounds: int = opt(5, "speed, attention: times that each row is measured, taking turns")
    compile: str = opt("off", "speed: the compiled student, too", ("on", "off"))
    clips: int = opt(0, "people; if not given 64, trajectory 12, long 4", least=2)
    seconds: int = opt(180, "long: of each stream")
    only: str = opt("", "ablate: rows whose names hold one of these words, with commas between")
    seeds: int = opt(3, "ablate: trainings of each row")


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


def networks(cfg, device, *names):
    """judge, student, teacher: those of these names."""
    found, dtype = [load_syncnet(checkpoint(cfg, "judge"), device)], runtime.fast_dtype(device)
    return found + [load_dit(checkpoint(cfg, name), device, dtype) for name in names]


def table(first, rows, columns):
    """Print {name: {column: value, column_ci: half an interval}} as Markdown."""
    print(f"\n| {first} | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
    for name, row in rows.items():
        print(f"| {name}", end="")
        for key, digits in columns.items():
            error = f" ± {row[key + '_ci']:.{digits}f}" if key + "_ci" in row else ""
            print(f" | {row[key]:.{digits}f}{error}", end="")
        print(" |")


def judged(dub, pairs, judge):
    """The measures' means over people and the Fréchet distance, with half their 95% intervals; the
    last one's by the jackknife: one person after the other left out."""
    row, n = {}, len(dub)
    for key, values in measures(dub, pairs, judge).items():
        row[key] = values.mean().item()
        row[key + "_ci"] = 1.96 * values.std().item() / n**0.5
    sets = [features(judge, video).view(n, -1).cpu() for video in (dub, pairs.truth)]
    E = judge.mouth.in_features
    row["frechet"] = frechet(*(x.view(-1, E) for x in sets))
    others = ~torch.eye(n, dtype=torch.bool)
    without = [frechet(*(x[some].view(-1, E) for x in sets)) for some in others]
    row["frechet_ci"] = 1.96 * ((n - 1) * np.var(without)) ** 0.5
    return row


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
    """Seconds of a teacher step, and of a student update with its critic updates: the median
    leaves out those at which the judge looks."""
    clips = data.Clips(recipe.size, 8, device)
    watch = data.held_out(1, recipe.size, "watch", device)
    expert = syncnet.SyncNet(syncnet.Config(recipe.size)).to(device).requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        recipe = dataclasses.replace(recipe, out=folder, teacher_steps=24, dmd_steps=12)
        teacher = distill.train_teacher(recipe, clips, expert, expert, watch)
        distill.train_dmd(recipe, teacher, teacher, clips, expert, expert, watch)
        rows = [json.loads(line) for line in open(f"{folder}/log.jsonl")]
    teacher, student = (
        statistics.median(np.diff([row["seconds"] for row in rows if row["stage"] == stage][3:]))
        for stage in ("teacher", "student")
    )
    return dict(teacher_step_s=teacher, student_update_s=student)


def speed(cfg, device):
    """The student's stream against its teacher's windows; random weights, speed is the same."""
    recipe = distill.Config(**distill.PRESETS[cfg.config])
    net = model.DiT(model.network_of(recipe)).to(device, runtime.fast_dtype(device)).eval()
    T = 4 * recipe.latents  # frames that the teacher makes at once
    clip = draw(SPLITS["held-out"], 2 * T, recipe.size)
    source = clip.video[None, :T].to(device)
    mel = data.log_mel(clip.audio[: T * RATE // FPS])[None].to(device)

    def teacher(guidance):
        yield dub_teacher(net, source, mel, guidance=guidance, latents=recipe.latents)[0]

    ways = {
        "student": lambda: sample.stream(net, clip.video, clip.audio),
        "teacher_guided": lambda: teacher(recipe.guidance),
        "teacher": lambda: teacher(1.0),
    }
    if cfg.compile == "on":
        compiled = copy.copy(net)
        compiled.compile(mode="reduce-overhead" if device.type == "cuda" else None, dynamic=False)
        # Eight times as long: a stream's first chunks, until the window is full, are not compiled.
        video, audio = clip.video.repeat(8, 1, 1, 1), np.tile(clip.audio, 8)
        ways["student_compiled"] = lambda: sample.stream(compiled, video, audio)
    result = {}
    for name, runs in in_turns(ways, cfg.rounds, lambda work: sample.clock(work(), device)).items():
        fps, ttff = zip(*runs)
        middle = statistics.median(fps)
        row = dict(fps=middle, least=min(fps), most=max(fps), ttff_s=statistics.median(ttff))
        result[name] = dict(row, ms_per_chunk=4000 * recipe.chunk / middle)
    table("", result, dict(fps=1, least=1, most=1, ttff_s=4, ms_per_chunk=1))
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=runtime.fast_dtype(device))
    peak = 2e-9 * n**3 / min(seconds_of(lambda: a @ b, device) for _ in range(12))
    ratio = result["student"]["fps"] / result["teacher_guided"]["fps"]
    bound = 2 * STEPS / (recipe.student_steps + 1)  # by the count of passes
    about = dict(ratio=ratio, bound=bound, train=training(recipe, device), peak_gflops=peak)
    return dict(result, **about)


# ---------------------------------------------------------------------------------------- quality
def by_parts(dub, net, pairs, **how):
    """dub(net, source, mel) of all pairs, 8 at a time, so that they fit into any memory."""
    parts = zip(pairs.source.split(8), pairs.mel.split(8))
    return torch.cat([dub(net, source, mel, **how) for source, mel in parts])


def quality(cfg, device):
    """The judge's table."""
    judge, student, teacher = networks(cfg, device, "student", "teacher")
    pairs, other = data.held_out(cfg.clips, student.cfg.size, "held-out", device), []
    # Truths drawn again with only that changed which no sound decides (teeth, smile): nothing that
    # commits itself to one mouth can be closer.
    for i in range(SPLITS["held-out"], SPLITS["held-out"] + 2 * cfg.clips, 2):
        how = dict(text=i + 1, detail=i + 1_000_000, device=device)
        other.append(draw(i, 96, student.cfg.size, **how).video)
    rows = dict(truth=judged(pairs.truth, pairs, judge))
    rows["truth, other detail"] = judged(torch.stack(other), pairs, judge)
    for steps, scale in ((50, 1.0), (50, 1.5), (50, 2.0), (1, 1.0), (2, 1.0)):
        dub = by_parts(dub_teacher, teacher, pairs, steps=steps, guidance=scale)
        rows[f"teacher, {steps} steps, guidance {scale:g}"] = judged(dub, pairs, judge)
    rows["student"] = judged(by_parts(dub_student, student, pairs), pairs, judge)
    table("dub", rows, COLUMNS)
    teachers = [row for name, row in rows.items() if "50 steps" in name]
    named = dict(truth=rows["truth"], student=rows["student"], teacher=teachers[0])
    named["teacher_guided"] = max(teachers, key=lambda row: row["sync_c"])
    return dict(clips=cfg.clips, rows=named, all=rows, ceiling=rows["truth, other detail"])


# ------------------------------------------------------------------------------------- trajectory
LANDINGS = range(5, 50, 5)  # j at which a second step may begin
MOUTHS = {(1.0, 0): "one step", (1.0, 4): "step 5 of 50", (1.0, 19): "20", (1.0, 49): "50"}
MOUTHS |= {"first guess": "student, 1st guess", "student": "its 2nd", "truth": "truth"}


@torch.no_grad()
def looked_at(teacher, student, pairs, ways, s, latents=12):
    """(name, frames): the truth; the student, its first guess; the teacher's guesses x0: (way, j)
    along 50 steps guided by `ways` (of 1 and s all, else the last); (s0, s1, j1) of two steps, the
    second at j1, guided by s0 and s1. Windows and noise are dub_teacher's."""
    yield "truth", pairs.truth
    early = copy.copy(student)
    early.cfg = dataclasses.replace(student.cfg, student_steps=1)
    yield "first guess", by_parts(dub_student, early, pairs)
    yield "student", by_parts(dub_student, student, pairs)
    starts = range(0, pairs.source.shape[1] // 4, latents)
    conds = [sample.embed_clip(teacher, *pairs[::2], i, i + latents) for i in starts]
    cond = model.Cond(*(torch.cat(windows) for windows in zip(*conds)))
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(cond.known.shape, generator=rng).to(cond.known.device)

    def guess(x_t, j, guidance):
        x0 = []
        for x, *known in zip(x_t.split(16), *(part.split(16) for part in cond)):
            with runtime.mixed(x.device):
                x0.append(sample.guided(teacher, x, tau(j), model.Cond(*known), guidance).float())
        return torch.cat(x0)

    def frames(x0):
        return sample.to_frames(teacher, torch.cat(x0.chunk(len(starts)), 1), pairs.source)

    for way, guidances in ways.items():
        x_t = noise
        for j, guidance in enumerate(guidances):
            x0 = guess(x_t, j, guidance)
            if way in (1.0, s) or j == STEPS - 1:
                yield (way, j), frames(x0)
            x_t = x_t + (tau(j + 1) - tau(j)) * sample.to_velocity(x_t, x0, tau(j))
    for s0 in (1.0, s):
        first = guess(noise, 0, s0)  # one for all landings
        for j1, s1 in itertools.product(LANDINGS, (1.0, s)):
            x_t = sample.add_noise(first, noise, tau(j1))  # a long Euler step
            yield (s0, s1, j1), frames(guess(x_t, j1, s1))


def worth(sync, distance):
    """Sync-C less Fréchet distance, each as a share of its range along the curve."""
    return sync / (np.ptp(sync) or 1) - distance / (np.ptp(distance) or 1)


def recommend(bought, paid, sync, distance):
    """The rule. What guidance has bought in Sync-C and paid in distance by each step; both of two
    steps at each landing -> the band between whose ends the worth rises most, and the landing with
    the highest."""
    value, spans = worth(bought, paid), itertools.combinations(range(len(bought)), 2)
    first, last = max(spans, key=lambda span: value[span[1]] - value[span[0]])
    return first, last, LANDINGS[int(worth(sync, distance).argmax())]


def curves(rows, lines, key, x):
    """{line: names of rows} -> {line: (x, its values, standard errors)}, over a range x, or another
    measure."""
    found = {}
    for line, names in lines.items():
        y, ci = (np.array([rows[name][k] for name in names]) for k in (key, key + "_ci"))
        found[line] = [rows[name][x] for name in names] if x in AXES else x, y, ci / 1.96
    return found


def panels(path, title, caption, drawn, mark=None):
    """Save a figure: a panel for each {(x, y label): {line: (x, y, its standard errors)}}."""
    down = -(-len(drawn) // 3)
    figure, axes = plt.subplots(down, 3, figsize=(13, 3.2 * down + 0.9), layout="constrained")
    for axis, ((x_label, y_label), lines) in zip(axes.flat, drawn.items()):
        axis.set(xlabel=x_label, ylabel=y_label)
        if mark:
            axis.axvspan(*mark, color="0.88")
        for name, (x, y, error) in lines.items():
            axis.errorbar(x, y, error, fmt=".-", elinewidth=0.6, label=name)
        axis.legend(fontsize="small")
    figure.suptitle(title)
    figure.supxlabel(caption, fontsize="medium")
    figure.savefig(path, dpi=80)


def figures(path, rows, s, about):
    """The paper's three figures -> the band and the landing that this teacher recommends."""
    steps, share = range(STEPS), "each as a share of its range"
    along = {f"guidance {way:g}": [(way, j) for j in steps] for way in (1.0, s)}
    two = {}
    for s0, s1 in itertools.product((1.0, s), repeat=2):
        two[f"guidance {s0:g}, then {s1:g}"] = [(s0, s1, j) for j in LANDINGS]
    landed, gaps = [], []
    for key in ("sync_c", "frechet"):
        landed.append(curves(rows, two, key, LANDINGS)[f"guidance 1, then {s:g}"][1])
        (_, plain, _), (_, guided, _) = curves(rows, along, key, steps).values()
        gaps.append(guided - plain)
    first, last, landing = recommend(*gaps, *landed)

    x = "step j (0 noise, 50 clean)"
    drawn = {(x, label): curves(rows, along, key, steps) for key, label in AXES.items()}
    kinds = "Sync-C bought", "Fréchet distance paid", "bought less paid"
    values = *(gap / (np.ptp(gap) or 1) for gap in gaps), worth(*gaps)
    drawn[x, "the gap, as a share of its range"] = {k: (steps, v, 0) for k, v in zip(kinds, values)}
    caption = (
        f"{about}\nGrey: the band recommended, j = {first} to {last}, between whose ends Sync-C"
    )
    caption += f" bought less Fréchet distance paid by guidance, {share}, rises most."
    title = f"What guidance {s:g} buys and costs: the guess of x0 at each of 50 steps"
    panels(f"{path}-guidance.png", title, caption, drawn, (first, last))

    x, keys = "j at which the second step begins", ("sync_c", "frechet", "psnr")
    drawn = {(x, AXES[key]): curves(rows, two, key, LANDINGS) for key in keys}
    caption = f"{about}\nGrey: the landing recommended, j = {landing}, where, guided in the second"
    caption += f" step alone, Sync-C less Fréchet distance, {share}, is highest."
    title = "Two Euler steps from noise: where to guide, where to land"
    panels(f"{path}-two-steps.png", title, caption, drawn, (landing, landing))

    fixed = [name for name in rows if name[1:] == (STEPS - 1,)]
    lines = {"50 steps, guidance " + ", ".join(f"{way:g}" for way, _ in fixed[:-1]): fixed[:-1]}
    lines[f"50 steps, {s:g} in the preset's band"] = fixed[-1:]
    lines[f"2 steps: 1, then {s:g} at j = {landing}"] = [(1.0, s, landing)]
    lines |= {"student": ["student"], "truth": ["truth"]}
    drawn = {}
    for key in ("frechet", "landmark", "sharp"):
        drawn[AXES[key], AXES["sync_c"]] = curves(rows, lines, "sync_c", key)
    panels(f"{path}-ends.png", "Fixed guidance against schedules: where each ends", about, drawn)
    return first, last, landing


def mouths_figure(path, kept, moments, rows, about):
    """What one step loses: the moment at which the truth opens widest."""
    n = len(moments)
    figure, axes = plt.subplots(n, len(MOUTHS), figsize=(14, 1.5 * n + 1), layout="constrained")
    for line, name in zip(axes.T, MOUTHS):
        line[0].set_title(f"{MOUTHS[name]}\nsharp {rows[name]['sharp']:.2f}")
        for i, axis in enumerate(line):
            axis.imshow(kept[name][i, moments[i]].cpu())
            axis.set(xticks=[], yticks=[])
            axes[i, 0].set_ylabel(f"person {i + 1}")
    figure.supxlabel(f"The widest moment of three of {about} Sharp: mean of all, 1 as the truth.")
    figure.savefig(path, dpi=90)


def trajectory(cfg, device):
    """What the paper saw in its teacher (its figures 2, 3, 4, 7 to 9), and what it recommends."""
    judge, student, teacher = networks(cfg, device, "student", "teacher")
    recipe, rows, kept = distill.Config(**distill.PRESETS[cfg.config]), {}, {}
    s, first, last = recipe.guidance, recipe.band_first, recipe.band_last
    ways = {way: [way] * STEPS for way in sorted({1.0, 1.5, s, 3.0, 4.5})}
    ways["band"] = [s if first <= j <= last else 1.0 for j in range(STEPS)]
    pairs = data.held_out(cfg.clips, teacher.cfg.size, "held-out", device)
    for name, frames in looked_at(teacher, student, pairs, ways, s):
        rows[name] = judged(frames, pairs, judge)
        print(name, file=sys.stderr, flush=True)
        if name in MOUTHS:
            kept[name] = data.mouth(frames[:3])  # 3 T S/2 3S/4 3
    path = f"{cfg.out}/trajectory-{cfg.config}"
    about = f"{cfg.clips} held-out people, noise seed 0."
    first, last, landing = figures(path, rows, s, f"{about} Bars: one standard error.")
    mouths_figure(f"{path}-mouths.png", kept, pairs.mouth[:3, :, 0].argmax(1), rows, about)
    ends = [name for name in rows if name in MOUTHS or STEPS - 1 in name]
    table("", {name: rows[name] for name in ends}, COLUMNS)
    print(f"Recommended: --band_first {first} --band_last {last} --landing {landing}")
    advice = dict(band_first=first, band_last=last, landing=landing)
    return dict(clips=cfg.clips, recommended=advice, rows={str(k): row for k, row in rows.items()})


# ----------------------------------------------------------------------------------------- ablate
VARIANTS = {  # and the paper's Sync-C and FVD
    "init alone": dict(stage="init"),
    "as it is (paper: 6.88, 119)": {},
    "never guided (paper: 6.14, 121)": dict(sync_window="off"),
    "guided everywhere (paper: 7.13, 138)": dict(sync_window="all"),
    "window reversed (paper: 6.98, 127)": dict(sync_window="reversed"),
    "no reward (paper: 6.81, 120)": dict(beta=0.0),
    "beta 2 (paper's)": dict(beta=2.0),
    "no view": dict(view=0.0, dmd_view=0.0),
    "1 critic update": dict(critic_updates=1),
    "landing 20": dict(landing=20),
    "landing 30 (paper's)": dict(landing=30),
    "dmd shift 5 (paper's)": dict(dmd_shift=5.0),
    "1 step": dict(student_steps=1),
    "4 steps": dict(student_steps=4),
}


def ablate(cfg, device):
    """The distillation with one thing changed at a time, each from its seed's init and with the
    same budget, then the judge. What is there, in its folder, is not trained again."""
    wanted = [name for name in VARIANTS if any(w.strip() in name for w in cfg.only.split(","))]
    if not wanted:
        raise Fail(f"--only {cfg.only}: no such row; they are {'; '.join(VARIANTS)}")
    teacher, (judge,) = checkpoint(cfg, "teacher"), networks(cfg, device)
    pairs, rows = data.held_out(cfg.clips, load_dit(teacher).cfg.size, "held-out", device), []
    for seed, name in itertools.product(range(cfg.seed, cfg.seed + cfg.seeds), wanted):
        out = f"{cfg.out}/ablate-{cfg.config}/{name.split(' (')[0].replace(' ', '-')}-{seed}"
        how = dict(config=cfg.config, teacher=teacher, seed=seed, out=out, device=device)
        distill.main([f"--{key}={value}" for key, value in (how | VARIANTS[name]).items()])
        made = f"{out}/init.pt" if name == "init alone" else f"{out}/student.pt"
        net = load_dit(made, device, runtime.fast_dtype(device))
        row = judged(by_parts(dub_student, net, pairs), pairs, judge)
        rows.append(dict(row, name=name, seed=seed))
    shown = {name: {} for name in wanted}
    for name, key in itertools.product(wanted, COLUMNS):
        values = [row[key] for row in rows if row["name"] == name]
        shown[name][key], shown[name][key + "_ci"] = np.mean(values), np.std(values)
    table(f"mean ± spread of {cfg.seeds} seeds (paper: Sync-C, FVD)", shown, COLUMNS)
    return dict(clips=cfg.clips, rows=rows)


# ------------------------------------------------------------------------------------------- long
def long(cfg, device):
    """Minutes of streaming: is the last one as good as the first? The truth says which words are
    hard. JSON: every ten seconds, which are measured as clips of their own."""
    if cfg.seconds % 10 or cfg.seconds < 20:
        raise Fail(f"--seconds {cfg.seconds} must be two or more times 10")
    judge, student = networks(cfg, device, "student")
    rows, shown, n = {"truth": [], "student": [], "no sink": []}, {}, min(6, cfg.seconds // 20)
    for i in range(cfg.seed, cfg.seed + cfg.clips):
        source, truth = dub_pair(i, cfg.seconds * FPS, student.cfg.size)
        whole = source.video, truth.video, data.log_mel(truth.audio), torch.from_numpy(truth.mouth)
        pairs = data.Pairs(*(x.unflatten(0, (cfg.seconds // 10, -1)).to(device) for x in whole))
        for name, found in rows.items():
            net, dub = copy.copy(student), truth.video
            net.cfg = dataclasses.replace(student.cfg, sink=int(name != "no sink"))
            if name != "truth":
                dub = torch.cat(list(sample.stream(net, source.video, truth.audio)))
            measured = measures(dub.view(pairs.truth.shape).to(device), pairs, judge)
            found.append(torch.stack(list(measured.values())).cpu())  # measures, tens of seconds
    for name, found in rows.items():
        mean = torch.stack(found).mean(0)
        rows[name] = dict(zip(measured, mean.tolist()))
        shown[f"{name}, first"] = dict(zip(measured, mean[:, :n].mean(1).tolist()))
        shown[f"{name}, last"] = dict(zip(measured, mean[:, -n:].mean(1).tolist()))
    table("minute", shown, dict(sync_c=3, psnr=2, landmark=2, gain=2, sharp=2))
    return dict(first=shown["student, first"], last=shown["student, last"], rows=rows)


# -------------------------------------------------------------------------------------- attention
def attention(cfg, device):
    """The causal clip, forward, batch 4, rotation included: a dense call a chunk (what the student
    does; only it gives each key its place in the stream's window), one call with a mask, and
    flex_attention. Milliseconds, median of the rounds."""
    c = distill.Config(**distill.PRESETS[cfg.config])
    rope, N = model.rope_table(c).to(device), model.n_tokens(c)
    flex, rows = torch.compile(flex_attention), {}
    for latents in (12, 48, 192):
        n, shape = latents * N, (3, 4, c.heads, latents * N, c.width // c.heads)
        q, k, v = torch.randn(shape, device=device, dtype=runtime.fast_dtype(device))
        see = torch.zeros(latents, latents, dtype=torch.bool, device=device)
        for chunk in range(latents // c.chunk):
            see[chunk * c.chunk : (chunk + 1) * c.chunk, model.visible(chunk, c)] = True
        mask = see.repeat_interleave(N, 0).repeat_interleave(N, 1)
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
    benches = dict(speed=speed, quality=quality, trajectory=trajectory, ablate=ablate)
    benches |= dict(long=long, attention=attention)
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
    elif argv[0] not in benches:
        raise Fail(f"{argv[0]}: no such bench; one of {', '.join(benches)}")
    else:
        cfg = runtime.options(Options, argv[1:], __doc__)
        cfg.clips = cfg.clips or CLIPS.get(argv[0], 0)
        runtime.free_space(cfg.out)
        runtime.keep_memory()
        torch.manual_seed(cfg.seed)
        device = runtime.find_device(cfg.device, cfg.precision)
        about = dict(bench=argv[0], config=cfg.config, device=str(device), seed=cfg.seed)
        about.update(threads=torch.get_num_threads(), torch=torch.__version__)
        print(json.dumps(about | benches[argv[0]](cfg, device)))


if __name__ == "__main__":
    runtime.run(main)
