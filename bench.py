"""The numbers and figures of the README. The last line is one JSON object; figures in out/bench/.

python bench.py speed --config tiny         # frames a second, time to the first one, training
python bench.py quality --config small      # the judge's table: truth, teacher, student
python bench.py speech --config small       # do the lips follow people's speech, and a new language
python bench.py trajectory --config small   # what the paper saw in its teacher, in this one
python bench.py ablate --config tiny --weights out/tiny    # the distillation, one thing changed
python bench.py long --config small         # three minutes streamed, the last against the first
python bench.py attention --config small    # the stream's: dense, and by kernels.py
"""

import copy
import dataclasses
import itertools
import json
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import soundfile
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.benchmark import Timer

import data
import distill
import faces
import model
import runtime
import sample
import syncnet
import voices
from data import FPS, RATE, mouth_rectangle, to_float
from faces import SPLITS, draw, dub_pair
from model import load_dit
from runtime import Fail, opt
from sample import STEPS, dub_student, dub_teacher, tau
from syncnet import features, frechet, load_syncnet, measures, table

COLUMNS = dict(sync_c=3, psnr=2, landmark=2, gain=2, sharp=2, frechet=2)  # and their digits
LABELS = dict(zip(COLUMNS, ("Sync-C", "PSNR (dB)", "landmark (%)", "gain", "sharp", "Fréchet")))
CLIPS = dict(quality=64, speech=3, ablate=64, trajectory=12, long=4)  # people, if not --clips
SPEECH = Path(__file__).parent / "tests" / "speech"  # recorded sentences, which train nothing
SOUNDS = {  # groups of ARPAbet phones
    "bilabials": ("M", "B", "P"), "open vowels": ("AA", "AE", "AW", "AY"), "silence": ("SIL",),
}  # fmt: skip
LAGS = range(-8, 9)  # video frames that lips may be late
SPEAKERS = 2500  # from here on, held-out people whom no other bench has seen


@dataclasses.dataclass
class Options:
    config: str = opt("small", "preset; 1.3B: speed and attention alone", ("tiny", "small", "1.3B"))
    weights: str = opt("", "folder of teacher, student, judge; weights/CONFIG if not given")
    out: str = opt("out/bench", "folder of the figures")
    device: str = opt("", "cuda, mps or cpu; the best there is if not given")
    precision: str = opt("", *runtime.PRECISIONS)
    seed: int = opt(0, least=0)
    rounds: int = opt(5, "speed: times that each row is measured, taking turns")
    clips: int = opt(0, "people; if not given 64, trajectory 12, long 4", least=2)
    seconds: int = opt(180, "long: of each stream", least=20)
    only: str = opt("", "ablate: rows whose names hold one of these words, with commas between")
    seeds: int = opt(3, "ablate: trainings of each row")


def checkpoint(cfg, name):
    """NAME.pt in the folder --weights. A teacher or judge that is not there is the one that the
    student there was distilled beside: where its --teacher lies, or bundled."""
    bundled = runtime.BUNDLED / cfg.config
    folder = Path(cfg.weights or bundled)
    student, places = folder / "student.pt", [folder]
    if name != "student":
        options = runtime.load(student, "dit").get("options", {}) if student.is_file() else {}
        places += [Path(options.get("teacher") or student).parent, bundled]
    for path in [place / f"{name}.pt" for place in places]:
        if path.is_file():
            print(f"{name}: {path}", file=sys.stderr, flush=True)
            return path
    raise Fail(f"{folder}: no {name}.pt; --weights names a folder that holds one, out/tiny say")


def networks(cfg, device, *names):
    """judge, student, teacher: those of these names."""
    found, dtype = [load_syncnet(checkpoint(cfg, "judge"), device)], runtime.fast_dtype(device)
    return found + [load_dit(checkpoint(cfg, name), device, dtype) for name in names]


def judged(dub, pairs, judge):
    """Means over people, and the Fréchet distance, with half their 95% intervals."""
    row, n = {}, len(dub)
    for key, values in measures(dub, pairs, judge).items():
        row[key] = values.mean().item()
        row[key + "_ci"] = 1.96 * values.std().item() / n**0.5
    sets = [features(judge, x).unflatten(0, (n, -1)).cpu() for x in (dub, pairs.truth)]
    some = ~torch.eye(n + 1, n, dtype=torch.bool)  # jackknife; in the last row all
    *without, row["frechet"] = [frechet(*(x[who].flatten(0, 1) for x in sets)) for who in some]
    row["frechet_ci"] = 1.96 * ((n - 1) * np.var(without)) ** 0.5
    return row


def recipe_of(config):
    """1.3B: the shape of the paper's network, at 512 pixels; 384 tokens a latent frame (1,024)."""
    large = dict(size=512, patch=16, width=1536, depth=30, heads=12)
    return distill.Config(**dict(distill.PRESETS, **{"1.3B": large})[config])


def seconds_of(work, rounds):
    """The mean after a warm-up; the timer waits for the device."""
    how = dict(globals=dict(work=work), num_threads=torch.get_num_threads())
    return Timer("work()", **how).timeit(rounds).mean


def training(recipe, device):
    """Seconds of a teacher step, and of a student's with its critic updates."""
    expert = syncnet.SyncNet(syncnet.Config(recipe.size)).to(device).requires_grad_(False)
    watch, seconds = faces.held_out(1, recipe.size, "watch", device), {}
    people = faces.drawn_clips("train", recipe.size, 4 * data.CLIP_LATENTS, device)
    world = data.Clips(people, 8, recipe.size, device), expert, expert, watch
    with tempfile.TemporaryDirectory() as folder:
        recipe = dataclasses.replace(recipe, out=folder, teacher_steps=24, dmd_steps=12)
        switch = "on" if device.type == "cuda" else "auto"  # as if there were more steps
        teacher = distill.train_teacher(dataclasses.replace(recipe, compile=switch), *world)
        distill.train_dmd(recipe, teacher, teacher, *world)
        for row in map(json.loads, open(f"{folder}/log.jsonl")):
            seconds.setdefault(row["stage"], []).append(row["seconds"])
    return {f"{stage}_step_s": np.median(np.diff(spent[3:])) for stage, spent in seconds.items()}


def speed(cfg, device):
    """The student's stream against its teacher's windows; random weights, speed is the same."""
    recipe, dtype = recipe_of(cfg.config), runtime.fast_dtype(device)
    net, T = model.DiT(model.network_of(recipe)).to(device, dtype).eval(), 4 * recipe.latents
    clip = draw(SPLITS["held-out"], 2 * T, recipe.size)
    source = clip.video[None, :T].to(device)  # as many frames as the teacher makes at once
    mel = data.log_mel(clip.audio[: T * RATE // FPS])[None].to(device)

    def teacher(guidance):
        yield dub_teacher(net, source, mel, guidance=guidance, latents=recipe.latents)[0]

    ways = dict(student=lambda: sample.stream(net, clip.video, clip.audio))
    ways.update(teacher_guided=lambda: teacher(recipe.guidance), teacher=lambda: teacher(1.0))
    if model.has_kernel(net):
        fused = copy.copy(net)
        fused.fused = True
        # Eight times as long: until the window is full, a stream's chunks are not in the graph.
        video, audio = clip.video.repeat(8, 1, 1, 1), np.tile(clip.audio, 8)
        ways["student_fused"] = lambda: sample.stream(fused, clip.video, clip.audio)
        ways["student_graph"] = lambda: sample.stream(fused, video, audio, compile=True)
    runs, result = {name: [] for name in ways}, {}
    for name in [*ways] * (cfg.rounds + 1):  # taking turns
        runs[name].append(sample.clock(ways[name](), device))
    for name, found in runs.items():
        fps, ttff = np.array(found[1:]).T  # the first warmed up
        row = result[name] = dict(fps=np.median(fps), least=min(fps), most=max(fps))
        row.update(ttff_s=np.median(ttff), ms_per_chunk=4000 * recipe.chunk / row["fps"])
    table("", result, dict(fps=1, least=1, most=1, ttff_s=4, ms_per_chunk=1))
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    peak = 2e-9 * n**3 / seconds_of(lambda: a @ b, 12)
    ratio = result["student"]["fps"] / result["teacher_guided"]["fps"]
    bound = 2 * STEPS / (recipe.student_steps + 1)  # by the count of passes
    result.update(ratio=ratio, bound=bound, peak_gflops=peak)
    return result if cfg.config == "1.3B" else result | dict(train=training(recipe, device))


def by_parts(dub, net, pairs, **how):
    """dub(net, source, mel) of all pairs, 8 at a time for memory's sake, each with own noise."""
    parts = enumerate(zip(pairs.source.split(8), pairs.mel.split(8)))
    return torch.cat([dub(net, *part, seed=seed, **how) for seed, part in parts])


def quality(cfg, device):
    """The judge's table."""
    judge, student, teacher = networks(cfg, device, "student", "teacher")
    first, size = SPLITS["held-out"], student.cfg.size
    people = range(first, first + 2 * cfg.clips, 2)
    pairs = faces.held_out(cfg.clips, size, "held-out", device)
    rows = dict(truth=judged(pairs.truth, pairs, judge))
    # Only what no sound decides is changed: nothing that commits itself to one mouth can be closer.
    other = [draw(i, 96, size, i + 1, None, i + 1_000_000, device).video for i in people]
    rows["truth, other detail"] = judged(torch.stack(other), pairs, judge)
    ways = {"teacher": (50, 1.0), "teacher_guided": (50, 1.5), "teacher, guidance 2": (50, 2.0)}
    ways |= {"teacher, guidance 3": (50, 3.0), "teacher, 1 step": (1, 1.0)}
    for name, (steps, scale) in ways.items():
        dub = by_parts(dub_teacher, teacher, pairs, steps=steps, guidance=scale)
        rows[name] = judged(dub, pairs, judge)
    rows["student"] = judged(by_parts(dub_student, student, pairs), pairs, judge)
    table("dub", rows, COLUMNS)
    return dict(rows=rows, all=rows, ceiling=rows["truth, other detail"])


def recorded_sentences():
    """Yields (audio, lips, phones) of each of SPEECH: what was recorded, the lips that its aligned
    phones ask for, see voices.lip_tracks, and those phones, [(ARPAbet, begin, end in s)]."""
    for name, sentence in json.loads((SPEECH / "phones.json").read_text()).items():
        audio, _ = soundfile.read(SPEECH / f"librivox-{name}.flac", dtype="float32")
        frames = len(audio) * FPS // RATE // 4 * 4
        lips = voices.lip_tracks(voices.read_phones(sentence["phones"]), frames / FPS)
        yield audio[: frames * RATE // FPS], lips, sentence["phones"]


def openings_by_sound(opening, phones):
    """A mouth's opening (T,) -> {group of SOUNDS: [one value for each of its phones]}: within a
    frame of the phone's middle the least of a bilabial, the most of a vowel, the mean of silence.
    """
    extreme = {"bilabials": np.min, "open vowels": np.max, "silence": np.mean}
    found = {group: [] for group in SOUNDS}
    for name, begin, end in phones:
        middle = int((begin + end) / 2 * FPS)
        for group, members in SOUNDS.items():
            if name.rstrip("012") in members and middle < len(opening):
                near = opening[max(0, middle - 1) : middle + 2]
                found[group].append(extreme[group](near))
    return found


def follow(opening, asked):
    """Correlation of two tracks (T,) at each of LAGS, those of `opening` being so late -> (17,)."""
    T, correlations = len(asked), []
    for lag in LAGS:
        early = asked[max(0, -lag) : T - max(0, lag)]
        late = opening[max(0, lag) : T - max(0, -lag)]
        correlations.append(np.corrcoef(early, late)[0, 1])
    return np.array(correlations)


def best_lag(curves):
    """What `follow` gave for each clip -> the mean correlation at the best lag, that lag in frames
    (positive: the lips are late), and the one at lag 0."""
    curve = np.mean(curves, axis=0)
    best = curve.argmax()
    return dict(correlation=curve[best], lag=LAGS[best], at_0=curve[LAGS.index(0)])


@torch.no_grad()
def mouth_opening(judge, video):
    """How far the mouth of video (T, S, S, 3) uint8 opens, read by the judge -> (T,) numpy."""
    with runtime.mixed(judge):
        _, _, mouth = judge.watch(to_float(mouth_rectangle(video[None])))
    return mouth[0, :, 0].double().cpu().numpy()


def speech(cfg, device):
    """Does the mouth open as the phones ask for? Drawn people dubbed with a person's recorded
    sentences; and with drawn voices, of the training's languages and of one that it never heard."""
    judge, student = networks(cfg, device, "student")
    size = student.cfg.size

    def videos_of(source, truth):
        dub = torch.cat(list(sample.stream(student, source.video, truth.audio)))
        return {"drawn lips": truth.video.to(device), "student": dub.to(device)}

    rows = {}
    curves = {"drawn lips": [], "student": []}
    sounds = {name: {group: [] for group in SOUNDS} for name in curves}
    for i in range(cfg.clips):
        person = SPLITS["held-out"] + 2 * (SPEAKERS + i)
        for audio, lips, phones in recorded_sentences():
            T = len(audio) * FPS // RATE
            source = draw(person, T, size)
            truth = draw(person, T, size, speech=(audio, lips))
            for name, video in videos_of(source, truth).items():
                opening = mouth_opening(judge, video)
                curves[name].append(follow(opening, truth.mouth[:, 0]))
                for group, found in openings_by_sound(opening, phones).items():
                    sounds[name][group] += found
    for name in curves:
        opening = {group: 100 * np.mean(found) for group, found in sounds[name].items()}
        rows[name] = best_lag(curves[name]) | opening
    columns = dict(correlation=2, lag=0, at_0=2) | dict.fromkeys(SOUNDS, 1)
    table(f"a recorded reader, {cfg.clips} people; opening in % of the side", rows, columns)

    languages = {}
    for title, language in (("the training's", None), ("never heard", voices.UNHEARD)):
        curves = {"drawn lips": [], "student": []}
        for i in range(4 * cfg.clips):
            source, truth = dub_pair(SPEAKERS + i, 96, size, language=language)
            for name, video in videos_of(source, truth).items():
                opening = mouth_opening(judge, video)
                curves[name].append(follow(opening, truth.mouth[:, 0]))
        for name in curves:
            languages[f"{title}, {name}"] = best_lag(curves[name])
    table(f"languages, {4 * cfg.clips} people", languages, dict(correlation=2, lag=0, at_0=2))
    return dict(rows=rows, languages=languages)


LANDINGS = range(5, 50, 5)  # j at which a second step may begin
MOUTHS = {("guidance 1", j): f"step {j + 1} of 50" for j in (0, 4, 19, 49)}  # to look at
MOUTHS |= {("student", 1): "student, 1st guess", ("student", 2): "2nd", ("truth", 0): "truth"}


@torch.no_grad()
def looked_at(teacher, student, pairs, s, band, latents=12):
    """Yields (line, x), frames: the teacher's guesses along 50 steps, and where they end, and two;
    the student's; the truth. Windows are dub_teacher's."""
    starts = range(0, pairs.source.shape[1] // 4, latents)
    conds = [sample.embed_clip(teacher, pairs.source, pairs.mel, i, i + latents) for i in starts]
    cond = model.Cond(*(torch.cat(windows) for windows in zip(*conds)))
    noise = sample.seeded(0)(cond.known)

    def guess(x_t, j, guidance):
        with runtime.mixed(teacher):
            return sample.guided(teacher, x_t, tau(j), cond, guidance).float()

    def frames(x0):
        return sample.to_frames(teacher, torch.cat(x0.chunk(len(starts)), 1), pairs.source)

    fixed, band_only = "50 steps: 1, 1.5, 2, 3, 4.5", f"50 steps: {s:g} in the band, else 1"
    ways = {(fixed, scale): [scale] * STEPS for scale in (1.0, 1.5, 2.0, 3.0, 4.5)}
    ways[band_only, s] = [s if j in band else 1.0 for j in range(STEPS)]
    for way, scales in ways.items():
        x_t = noise
        for j, scale in enumerate(scales):
            x0 = guess(x_t, j, scale)
            if way in ((fixed, 1.0), (fixed, s)):
                yield (f"guidance {scale:g}", j), frames(x0)
            x_t = x_t + (tau(j + 1) - tau(j)) * sample.to_velocity(x_t, x0, tau(j))
        yield way, frames(x0)
    for s0 in (1.0, s):
        first = guess(noise, 0, s0)  # one for all landings
        for s1, j in itertools.product((1.0, s), LANDINGS):
            x_t = sample.add_noise(first, noise, tau(j))  # a long Euler step
            yield (f"{s0:g}, then {s1:g}", j), frames(guess(x_t, j, s1))
    for i, calls in enumerate((1, student.cfg.student_steps), 1):
        net = copy.copy(student)
        net.cfg = dataclasses.replace(student.cfg, student_steps=calls)
        yield ("student", i), by_parts(dub_student, net, pairs)
    yield ("truth", 0), pairs.truth


def worth(sync, distance):
    """Sync-C less Fréchet distance, each as a share of its range along the curve."""
    return np.divide(sync, np.ptp(sync) or 1) - np.divide(distance, np.ptp(distance) or 1)


def recommend(plain, guided, two):
    """The rule, of curves {measure: values}: of guided less plain, the run of steps whose worth is
    above its mean by most in all; of two steps, the landing of the highest worth."""
    gain = worth(*(np.subtract(guided[key], plain[key]) for key in ("sync_c", "frechet")))
    so_far = np.append(0, (gain - gain.mean()).cumsum())
    runs = itertools.combinations(range(len(so_far)), 2)
    first, end = max(runs, key=lambda run: so_far[run[1]] - so_far[run[0]])
    landing = two["x"][worth(two["sync_c"], two["frechet"]).argmax()]
    return dict(band_first=first, band_last=end - 1, landing=landing)


def panels(path, caption, lines, axes, *marks):
    """Save a figure of `lines`, {name: {measure: values}}: a panel for each (x, y) of `axes`, y a
    measure with its standard error, x another one or what to call the x of the lines."""
    down = -(-len(axes) // 3)
    figure, grid = plt.subplots(down, 3, figsize=(13, 3.2 * down + 0.9), layout="constrained")
    for panel, (x, y) in zip(grid.flat, axes):
        panel.set(xlabel=LABELS.get(x, x), ylabel=LABELS[y])
        for span in marks:
            panel.axvspan(*span, color="0.9")
        for name, line in lines.items():
            along, mean = line[x if x in LABELS else "x"], np.array(line[y])
            error = np.array(line[y + "_ci"]) / 1.96
            color = panel.plot(along, mean, ".-", label=name)[0].get_color()
            panel.vlines(along, mean - error, mean + error, color, alpha=0.2, lw=4)
        panel.legend(fontsize="small")
    figure.suptitle(caption, fontsize="medium")
    figure.savefig(path, dpi=80)


def figures(path, rows, s, people):
    """The paper's figures as curves -> what this teacher recommends."""
    along = {name: rows[name] for name in ("guidance 1", f"guidance {s:g}")}
    two = {name: line for name, line in rows.items() if "then" in name}
    first, last, landing = (advice := recommend(*along.values(), two[f"1, then {s:g}"])).values()
    rule = "Sync-C less Fréchet distance, each as a share of its range"
    axes = [("step j (0 noise, 50 clean)", key) for key in COLUMNS]
    caption = f"What guidance {s:g} buys and costs: the guess of x0 at each of 50 steps. {people}\n"
    caption += f"Grey, j = {first} to {last}, the band recommended: the steps where {rule},\n"
    caption += "guided minus unguided, exceeds its mean by most in all."
    panels(f"{path}-guidance.png", caption, along, axes, (first, last))
    axes = [("j at which the second step begins", key) for key in ("sync_c", "frechet", "psnr")]
    caption = f"Two Euler steps from noise: guided where, landing where? {people}\nGrey line, j ="
    caption += f" {landing}, the landing recommended: most {rule}, if guided in the second alone."
    panels(f"{path}-two-steps.png", caption, two, axes, (landing, landing))
    axes = [(key, "sync_c") for key in ("frechet", "landmark", "sharp")]
    lines = {name: rows[name] for name in rows if name.startswith(("50", "student", "truth"))}
    i, line = LANDINGS.index(landing), two[f"1, then {s:g}"]
    lines[f"2 steps: 1, then {s:g} at j = {landing}"] = {key: [x[i]] for key, x in line.items()}
    panels(f"{path}-ends.png", f"Fixed guidance against schedules. {people}", lines, axes)
    return advice


def trajectory(cfg, device):
    """What the paper saw in its teacher (its figures 2, 3, 4, 7 to 9), and what it recommends."""
    judge, student, teacher = networks(cfg, device, "student", "teacher")
    recipe, rows, mouths = distill.Config(**distill.PRESETS[cfg.config]), {}, {}
    s, band = 2.0, range(recipe.band_first, recipe.band_last + 1)
    pairs = faces.held_out(cfg.clips, teacher.cfg.size, "held-out", device)
    moments = pairs.mouth[:3, :, 0].argmax(1)
    for (line, x), frames in looked_at(teacher, student, pairs, s, band):
        row = dict(judged(frames, pairs, judge), x=x)
        print(f"{line}, {x:g}: Sync-C {row['sync_c']:.3f}", file=sys.stderr, flush=True)
        for key, value in row.items():
            rows.setdefault(line, {}).setdefault(key, []).append(value)
        if (line, x) in MOUTHS:
            three = mouth_rectangle(frames)[range(len(moments)), moments]
            three = three.flatten(0, 1).cpu().numpy()
            mouths[f"{MOUTHS[line, x]}\nsharp {row['sharp']:.2f}"] = three
    path = f"{cfg.out}/trajectory-{cfg.config}"
    people = f"{cfg.clips} held-out people"
    advice = figures(path, rows, s, f"{people}; bars: one standard error.")
    figure, axes = plt.subplots(1, len(mouths), figsize=(14, 4.6), layout="constrained")
    for axis, title in zip(axes, mouths):
        axis.imshow(mouths[title])
        axis.set(xticks=[], yticks=[], title=title)
    middles = (np.arange(len(moments)) + 0.5) * len(three) / len(moments)
    axes[0].set_yticks(middles, [f"person {i + 1}" for i in range(len(moments))])
    figure.supxlabel(f"The moment when the truth opens widest. Sharp: mean of {people}.")
    figure.savefig(f"{path}-mouths.png", dpi=90)
    print("Recommended:", *(f"--{key} {j}" for key, j in advice.items()))
    return dict(recommended=advice, rows=rows)


VARIANTS = {  # and the paper's Sync-C and FVD
    "init alone": dict(stage="init"), "as it is (paper: 6.88, 119)": {},
    "never guided (paper: 6.14, 121)": dict(sync_window="off"),
    "guided everywhere (paper: 7.13, 138)": dict(sync_window="all"),
    "window reversed (paper: 6.98, 127)": dict(sync_window="reversed"),
    "no reward (paper: 6.81, 120)": dict(beta=0.0), "beta 2 (paper's)": dict(beta=2.0),
    "no view": dict(view=0.0, dmd_view=0.0), "1 critic update": dict(critic_updates=1),
    "landing 20": dict(landing=20), "landing 30 (paper's)": dict(landing=30),
    "1 step": dict(student_steps=1), "4 steps": dict(student_steps=4),
}  # fmt: skip


def ablate(cfg, device):
    """The distillation with one thing changed at a time, each from the same teacher and with the
    same budget, then the judge. What is there, in its folder, is not trained again."""
    wanted = [name for name in VARIANTS if any(w.strip() in name for w in cfg.only.split(","))]
    if not wanted:
        raise Fail(f"--only {cfg.only}: no such row; they are {'; '.join(VARIANTS)}")
    teacher, (judge,) = checkpoint(cfg, "teacher"), networks(cfg, device)
    pairs, rows = faces.held_out(cfg.clips, load_dit(teacher).cfg.size, "held-out", device), []
    for seed, name in itertools.product(range(cfg.seed, cfg.seed + cfg.seeds), wanted):
        out = f"{cfg.out}/ablate-{cfg.config}/{name.split(' (')[0].replace(' ', '-')}-{seed}"
        how = dict(config=cfg.config, teacher=teacher, seed=seed, out=out, device=device)
        distill.main([f"--{key}={value}" for key, value in (how | VARIANTS[name]).items()])
        made = f"{out}/{VARIANTS[name].get('stage', 'student')}.pt"
        net = load_dit(made, device, runtime.fast_dtype(device))
        row = judged(by_parts(dub_student, net, pairs), pairs, judge)
        rows.append(dict(row, name=name, seed=seed))
    shown = {name: {} for name in wanted}
    for name, key in itertools.product(wanted, COLUMNS):
        values = [row[key] for row in rows if row["name"] == name]
        shown[name][key], shown[name][key + "_ci"] = np.mean(values), np.ptp(values) / 2
    table(f"mean ± half the range of {cfg.seeds} seeds (paper: Sync-C, FVD)", shown, COLUMNS)
    return dict(rows=rows)


def long(cfg, device):
    """Is a stream's last minute as good as its first? In clips of ten seconds."""
    judge, student = networks(cfg, device, "student")
    tens, found, rows = cfg.seconds // 10, [], {}
    minute = min(6, tens // 2)
    for i in range(cfg.clips):
        source, truth = dub_pair(i, 10 * tens * FPS, student.cfg.size)
        dub = torch.cat(list(sample.stream(student, source.video, truth.audio)))
        mel, shape = data.log_mel(truth.audio), torch.from_numpy(truth.mouth)
        clips = [x.unflatten(0, (tens, -1)) for x in (source.video, truth.video, mel, shape, dub)]
        found.append([(x[:minute], x[-minute:]) for x in clips])
    for end, name in enumerate(("first", "last")):
        *pairs, dub = (torch.cat([x[end] for x in many]).to(device) for many in zip(*found))
        pairs = faces.Pairs(*pairs)
        rows[f"truth, {name}"] = judged(pairs.truth, pairs, judge)
        rows[f"student, {name}"] = judged(dub, pairs, judge)
    table("minute", rows, COLUMNS)
    return dict(first=rows["student, first"], last=rows["student, last"], rows=rows)


@torch.no_grad()
def attention(cfg, device):
    """One block's attention in one pass of the stream, the window full, QK-norm and RoPE included:
    dense (gather, turn, attend), flex_attention with a mask of the window, and kernels.py."""
    recipe, dtype = recipe_of(cfg.config), runtime.fast_dtype(device)
    c = dataclasses.replace(model.network_of(recipe), depth=1)
    net, N = model.DiT(c).to(device, dtype), model.n_tokens(c)
    cache, block = model.Cache(net, 1), net.blocks[0]
    cache.frames = list(range(c.sink + c.window - c.chunk))
    held, places = len(cache.frames), c.sink + c.window
    qkv = torch.randn(1, c.chunk * N, 3, c.heads, c.width // c.heads, device=device, dtype=dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    how = dict(rope=net.rope, cfg=c, causal=False, cache=cache, layer=0, store=False)
    how.update(q_scale=block.q_scale, k_scale=block.k_scale)

    def flexible():
        cache.store(model.qk_norm(k, block.k_scale), v, 0)
        turned = model.rotate(model.qk_norm(q, block.q_scale), net.rope[held:places])
        kept = cache.kv[0].flatten(3, 4)
        return flex(turned, model.rotate(kept[0], net.rope[:places]), kept[1], block_mask=seen)

    ways = dict(dense=lambda: model.attention(q, k, v, fused=False, **how))
    if model.has_kernel(net):
        flex, n = torch.compile(flex_attention), places * N
        seen = create_block_mask(lambda b, h, i, j: j < n, None, None, c.chunk * N, n, device)
        ways["flex_attention"] = flexible
        ways["kernels.py"] = lambda: model.attention(q, k, v, fused=True, **how)
    spent = {name: 1000 * seconds_of(way, 20 * cfg.rounds) for name, way in ways.items()}
    table("ms", rows := {cfg.config: spent}, dict.fromkeys(ways, 3))
    return dict(rows=rows)


def main(argv):
    benches = (speed, quality, speech, trajectory, ablate, long, attention)
    benches = {function.__name__: function for function in benches}
    if not argv or argv[0] in ("-h", "--help"):
        return print(__doc__)
    if argv[0] not in benches:
        raise Fail(f"{argv[0]}: no such bench; one of {', '.join(benches)}")
    cfg = runtime.options(Options, argv[1:], __doc__)
    cfg.clips = cfg.clips or CLIPS.get(argv[0], 0)
    runtime.free_space(cfg.out)
    runtime.keep_memory()
    torch.manual_seed(cfg.seed)
    device = runtime.find_device(cfg.device, cfg.precision)
    about = dict(vars(cfg), bench=argv[0], device=str(device), threads=torch.get_num_threads())
    print(json.dumps(about | benches[argv[0]](cfg, device)))


if __name__ == "__main__":
    runtime.run(main)
