"""The paper's figures and ablations, on one's own teacher. The last line is one JSON object.

python analysis.py trajectory --config small    # what the paper saw in its teacher, in this one
python analysis.py ablate --config tiny --weights out/tiny    # the distillation, one thing changed

Figures are written to out/bench/. The README's other tables are made by bench.py.
"""

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import torch

import distill
import faces
import runtime
from bench import LATENTS, CommonOptions, by_parts, checkpoint, networks, run_command
from data import mouth_rectangle
from flow import STEPS, add_noise, euler_guesses, grid_time, guided, seeded
from metrics import COLUMNS, beyond_chance, compare, evaluate, summarize, table
from model import DiT
from runtime import UserError
from stream import dub_student, embed_clip, to_frames
from syncnet import SyncNet

PEOPLE = {"trajectory": 12, "ablate": 256}  # how many there are unless --clips is given
LABELS = {
    "sync_c": "Sync-C",
    "psnr": "PSNR (dB)",
    "landmark": "landmark (%)",
    "gain": "gain",
    "sharpness": "sharpness",
    "frechet": "Fréchet distance",
    "j": "step j (0 noise, 50 clean)",
    "landing": "j at which the second step begins",
}
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.5)  # scales at which 50 steps are walked to their end
GUIDED = 2.0  # the one of them that is looked at step by step and in two steps
BANDS = [range(first, first + 10) for first in range(0, STEPS, 10)]  # j guided alone
LANDINGS = range(5, 50, 5)  # j at which a second step may begin
PICTURED = (0, 4, 19, 49)  # j of the unguided guesses of which a figure shows the mouths

VARIANTS = {  # what is changed of the preset, one thing at a time; options of distill.py
    "as it is": {},
    "init alone": {},  # which is looked at before DMD
    "critic never trained": {"critic_lr": 0.0},
    "1 critic update": {"critic_updates": 1},
    "never guided": {"guidance_band": "off"},
    "guided everywhere": {"guidance_band": "all"},
    "guided outside the band": {"guidance_band": "reversed"},
    "guidance 3": {"guidance_scale": 3.0},
    "guidance 4.5": {"guidance_scale": 4.5},
    "no reward": {"beta": 0.0},
    "beta 5": {"beta": 5.0},
    "beta 40": {"beta": 40.0},
    "landing 30": {"landing": 30},
    "DMD shift 5": {"dmd_shift": 5.0},
    "no perceptual loss in init": {"perceptual_weight": 0.0},
    "1 step": {"num_steps": 1},
    "4 steps": {"num_steps": 4},
}
# What changes DMD alone: rows that change nothing else share the init of their seed.
DMD_OPTIONS = (
    "critic_lr",
    "critic_updates",
    "guidance_band",
    "guidance_scale",
    "beta",
    "dmd_shift",
)
PAPER = {  # Sync-C and FVD of the same change there
    "as it is": "6.88, 119",
    "never guided": "6.14, 121",
    "guided everywhere": "7.13, 138",
    "guided outside the band": "6.98, 127",
    "no reward": "6.81, 120",
}


@dataclasses.dataclass
class Options(CommonOptions):
    config: Literal["tiny", "small"] = "small"  # the preset
    only: str = ""  # words, a comma between: rows of ablate that hold one, and the first row
    seeds: int = 3  # trainings of each row of ablate


class Walks:
    """The teacher's way from noise to clips of LATENTS latent frames, which it sees at once, as in
    stream.dub_teacher. Every walk begins with the same noise."""

    def __init__(self, teacher, pairs):
        self.teacher = teacher
        self.source = pairs.source
        self.cond = embed_clip(teacher, pairs.source, pairs.mel)
        self.noise = seeded(0)(self.cond.masked_source)

    @torch.no_grad()
    def guess(self, x_t, j, guidance):
        """The teacher's x0 at step j of the grid, of all clips at once."""
        with runtime.autocast(self.teacher):
            return guided(self.teacher, x_t, grid_time(j), self.cond, guidance).float()

    def walk(self, scales):
        """Yields the guess of x0 at each Euler step, guided by scales[j] at step j."""
        return euler_guesses(self.teacher, self.cond, self.noise, scales)

    def second_guess(self, first, landing, guidance):
        """The guess after one long Euler step from noise towards the `first` guess, to `landing`.
        (That is the first guess mixed with the noise.)"""
        x_t = add_noise(first, self.noise, grid_time(landing))
        return self.guess(x_t, landing, guidance)

    def frames(self, x0):
        """A guess -> clips (n, T, S, S, 3) uint8."""
        return to_frames(self.teacher, x0, self.source)


class Looker:
    """Measures dubs of the same people, and keeps pictures of three people's mouths, at the moment
    when the truth's is open widest."""

    def __init__(self, pairs, judge):
        self.pairs = pairs
        self.judge = judge
        self.moments = pairs.mouth[:3, :, 0].argmax(1)
        self.pictures = []  # (title, the mouths one above the other)
        self.evaluations = {}  # those to be compared, by name

    def look(self, name, video, title="", keep=False, **place):
        """-> a row: the measures and `place`. With a title, the mouths are kept under it; with
        `keep`, the evaluation under the name, for `minus`."""
        evaluation = evaluate(video, self.pairs, self.judge)
        if keep:
            self.evaluations[name] = evaluation
        row = summarize(evaluation)
        print(f"{name}: Sync-C {row['sync_c']:.3f}", file=sys.stderr, flush=True)
        if title:
            people = range(len(self.moments))
            mouths = mouth_rectangle(video)[people, self.moments]
            picture = mouths.flatten(0, 1).cpu().numpy()
            self.pictures.append((f"{title}\nsharp {row['sharpness']:.2f}", picture))
        return place | row

    def minus(self, name, base):
        """What was looked at under a name, less what was under another: see bench.compare."""
        return compare(self.evaluations[name], self.evaluations[base])


def step_name(guidance, j):
    return f"guidance {guidance:g}, step {j}"


def look_at_steps(walks, looker):
    """The teacher's 50 steps -> {guidance: a row for each step}, of no guidance and of GUIDED, and
    a row for the end at each of GUIDANCES."""
    steps = {1.0: [], GUIDED: []}
    ends = []
    for guidance in GUIDANCES:
        for j, x0 in enumerate(walks.walk([guidance] * STEPS)):
            if guidance not in steps and j < STEPS - 1:
                continue
            pictured = guidance == 1.0 and j in PICTURED
            title = f"teacher, j = {j}" if pictured else ""
            name = step_name(guidance, j)
            row = looker.look(name, walks.frames(x0), title, keep=j == STEPS - 1, j=j)
            if guidance in steps:
                steps[guidance].append(row)
        ends.append(row | {"guidance": guidance})
    return steps, ends


def look_at_bands(walks, looker, preset_band):
    """Where 50 steps end that are guided at the j of one band alone, of BANDS or the preset's ->
    {band: a row}, and what it has more than no guidance, {band: differences}."""
    rows = {}
    differences = {}
    for band in (*BANDS, preset_band):
        scales = [GUIDED if j in band else 1.0 for j in range(STEPS)]
        for x0 in walks.walk(scales):
            pass
        name = f"guided at j {band[0]} to {band[-1]}"
        rows[name] = looker.look(name, walks.frames(x0), keep=True)
        differences[name] = looker.minus(name, step_name(1.0, STEPS - 1))
    return rows, differences


def landing_name(first_guidance, guidance, landing):
    return f"{first_guidance:g}, then {guidance:g} at {landing}"


def look_at_two_steps(walks, looker, preset_landing):
    """Two steps -> {guidance in the first: {guidance in the second: a row for each landing}}, and,
    where both are guided, what a landing has more than the preset's, {landing: differences}."""
    landings = sorted({*LANDINGS, preset_landing})
    rows = {}
    for first_guidance in (1.0, GUIDED):
        rows[first_guidance] = {}
        first = walks.guess(walks.noise, 0, first_guidance)
        for guidance in (1.0, GUIDED):
            curve = []
            for landing in landings:
                video = walks.frames(walks.second_guess(first, landing, guidance))
                name = landing_name(first_guidance, guidance, landing)
                keep = first_guidance == guidance == GUIDED
                curve.append(looker.look(name, video, keep=keep, landing=landing))
            rows[first_guidance][guidance] = curve
    base = landing_name(GUIDED, GUIDED, preset_landing)
    differences = {}
    for landing in landings:
        if landing != preset_landing:
            differences[landing] = looker.minus(landing_name(GUIDED, GUIDED, landing), base)
    return rows, differences


def one_step(student):
    """The student that stops at its first call, in every chunk."""
    net = copy.copy(student)
    net.cfg = dataclasses.replace(student.cfg, num_steps=1)
    return net


def panels(path, caption, curves, axes, span=None):
    """Save a figure of `curves`, {name: rows}, with a panel for each (x, y) of `axes`, two keys of
    the rows; y is a measure, shown with its standard error. Next to a row stands its "label", if it
    has one. span: (from, to) on the x axis that is grey."""
    height = -(-len(axes) // 3)
    size = (13, 3.2 * height + 0.9)
    figure, grid = plt.subplots(height, 3, figsize=size, layout="constrained")
    for panel, (x, y) in zip(grid.flat, axes):
        panel.set(xlabel=LABELS[x], ylabel=LABELS[y])
        panel.margins(x=0.08)
        if span:
            panel.axvspan(*span, color="0.85")
        for name, rows in curves.items():
            along = [row[x] for row in rows]
            mean = np.array([row[y] for row in rows])
            error = np.array([row[y + "_ci"] for row in rows]) / 1.96
            (line,) = panel.plot(along, mean, ".-", label=name)
            panel.vlines(along, mean - error, mean + error, line.get_color(), alpha=0.2, lw=4)
            for row in rows:
                panel.annotate(
                    row.get("label", ""),
                    (row[x], row[y]),
                    (4, -10),
                    textcoords="offset points",
                    fontsize="small",
                    color=line.get_color(),
                )
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(caption, fontsize="medium")
    runtime.save_figure(figure, path, dpi=80)
    plt.close(figure)


def draw_curves(path, rows, recipe, people):
    """Three figures of what `trajectory` found; grey in the first two is what the preset has."""
    bars = f"\n{people}; bars: one standard error (all curves are of the same people, so their"
    bars += " differences are surer)."
    band = (recipe.band_first, recipe.band_last)
    caption = f"What guidance {GUIDED:g} buys and costs: the guess of x0 at each of 50 steps."
    caption += f" Grey, j = {band[0]} to {band[1]}: the guidance band of the preset.{bars}"
    curves = {f"guidance {guidance:g}": curve for guidance, curve in rows["steps"].items()}
    axes = [("j", measure) for measure in COLUMNS]
    panels(f"{path}-guidance.png", caption, curves, axes, span=band)

    caption = "Two Euler steps of the teacher from noise: guided where, landing where? Grey line,"
    caption += f" j = {recipe.landing}: where the preset's student lands.{bars}"
    curves = {}
    for first, by_second in rows["two_steps"].items():
        for second, curve in by_second.items():
            curves[f"guidance {first:g} in the first step, {second:g} in the second"] = curve
    axes = [("landing", "sync_c"), ("landing", "frechet"), ("landing", "psnr")]
    around = (recipe.landing - 0.3, recipe.landing + 0.3)
    panels(f"{path}-two-steps.png", caption, curves, axes, span=around)

    ends = [row | {"label": f"{row['guidance']:g}"} for row in rows["ends"]]
    two_steps = [row | {"label": f"{row['landing']}"} for row in rows["two_steps"][GUIDED][GUIDED]]
    for row in two_steps[1:-1]:
        row["label"] = ""  # those between the first and the last lie close together
    of_one_step, of_two_steps = rows["student"]
    in_the_band = list(rows["bands"].values())[-1]
    curves = {
        "teacher, 50 steps; its guidance": ends,
        f"teacher, 50 steps, {GUIDED:g} in the band, else 1": [in_the_band],
        f"teacher, 2 steps, guided by {GUIDED:g}; its landing": two_steps,
        "student": [of_one_step | {"label": "1 step"}, of_two_steps],
        "truth": [rows["truth"]],
    }
    caption = f"Sync-C against three costs.{bars}"
    axes = [("frechet", "sync_c"), ("landmark", "sync_c"), ("sharpness", "sync_c")]
    panels(f"{path}-ends.png", caption, curves, axes)


def draw_bands(path, differences, people):
    """Save a figure of what guidance changes, {name: differences} of look_at_bands: in each of
    BANDS, in the preset's, and in all steps."""
    figure, grid = plt.subplots(2, 3, figsize=(13, 7.2), layout="constrained")
    names = list(differences)
    colors = ["C0"] * len(BANDS) + ["C1", "C2"]
    for panel, measure in zip(grid.flat, COLUMNS):
        panel.axhline(0, color="0.7")
        for place, (name, color) in enumerate(zip(names, colors, strict=True)):
            difference, low, high = differences[name][measure]
            panel.plot([place, place], [low, high], color=color)
            panel.plot(place, difference, "o", color=color)
        labels = [name.removeprefix("guided at j ").replace(" to ", "–") for name in names]
        panel.set(xticks=range(len(names)), xticklabels=labels, xlabel="j that are guided")
        panel.set_ylabel(f"{LABELS[measure]}, minus unguided")
    caption = f"How the dub changes if only some of the 50 steps are guided, by {GUIDED:g}."
    caption += (
        f" {people}; bars: 95 %, paired.\nOrange: the guidance band of the preset; green: all."
    )
    figure.suptitle(caption, fontsize="medium")
    runtime.save_figure(figure, path, dpi=80)
    plt.close(figure)


def draw_mouths(path, looker, people):
    """Save the pictures of three people's mouths side by side."""
    columns = len(looker.pictures)
    figure, axes = plt.subplots(1, columns, figsize=(14, 4.6), layout="constrained")
    for axis, (title, picture) in zip(axes, looker.pictures):
        axis.imshow(picture)
        axis.set(xticks=[], yticks=[], title=title)
    shown = len(looker.moments)
    middles = [(i + 0.5) * len(picture) / shown for i in range(shown)]
    axes[0].set_yticks(middles, [f"person {i + 1}" for i in range(shown)])
    figure.supxlabel(f"The moment when the truth opens widest. Sharp: mean of {people}.")
    runtime.save_figure(figure, path, dpi=90)
    plt.close(figure)


def trajectory(cfg, device):
    """What the paper saw in its teacher (its figures 2, 3, 4, 7 to 9): where along 50 steps
    guidance pays, where they end, and two steps; beside them the student and the truth."""
    judge, student, teacher = networks(cfg, device, "student", "teacher")
    recipe = distill.Config(**distill.PRESETS[cfg.config])
    pairs = faces.make_pairs(cfg.clips, teacher.cfg.size, "held-out", device, LATENTS)
    walks = Walks(teacher, pairs)
    looker = Looker(pairs, judge)
    steps, ends = look_at_steps(walks, looker)
    preset_band = range(recipe.band_first, recipe.band_last + 1)
    bands, of_bands = look_at_bands(walks, looker, preset_band)
    two_steps, of_landings = look_at_two_steps(walks, looker, recipe.landing)
    of_one_step = by_parts(dub_student, one_step(student), pairs)
    of_two_steps = by_parts(dub_student, student, pairs)
    rows = {
        "steps": steps,
        "ends": ends,
        "bands": bands,
        "two_steps": two_steps,
        "student": [
            looker.look("student, 1 step", of_one_step, "student, 1 step"),
            looker.look("student", of_two_steps, f"{student.cfg.num_steps} steps"),
        ],
        "truth": looker.look("truth", pairs.truth, "truth"),
    }
    path = f"{cfg.out}/trajectory-{cfg.config}"
    people = f"{cfg.clips} held-out people"
    draw_curves(path, rows, recipe, people)
    draw_mouths(f"{path}-mouths.png", looker, people)
    table("50 steps", {f"guidance {row['guidance']:g}": row for row in ends} | bands, COLUMNS)
    print("\nMore than unguided, beyond chance (95 %, paired bootstrap over people):")
    of_ends = {}
    for guidance in GUIDANCES[1:]:
        of_ends[guidance] = looker.minus(step_name(guidance, STEPS - 1), step_name(1.0, STEPS - 1))
        print(f"- guidance {guidance:g}: {beyond_chance(of_ends[guidance])}")
    for name, differences in of_bands.items():
        print(f"- {name}: {beyond_chance(differences)}")
    every_step = {f"guided at j 0 to {STEPS - 1}": of_ends[GUIDED]}
    draw_bands(f"{path}-bands.png", of_bands | every_step, people)
    table(
        "two guided steps",
        {f"landing {row['landing']}": row for row in two_steps[GUIDED][GUIDED]},
        COLUMNS,
    )
    print(f"\nTwo guided steps, more than with landing {recipe.landing}, beyond chance:")
    for landing, differences in of_landings.items():
        print(f"- landing {landing}: {beyond_chance(differences)}")
    minus = {"ends": of_ends, "bands": of_bands, "landings": of_landings}
    return {"rows": rows, "minus": minus}


def trained(stage, train, recipe, *parts):
    """train(recipe, *parts), saved in the recipe's folder; if it is there already, made with the
    same options, it is not trained again."""
    runtime.make_folder(recipe.out)
    path = runtime.find(stage, recipe.out)
    options = runtime.result_options(recipe)
    if path is None or runtime.load(path, "dit")["options"] != options:
        net = train(recipe, *parts)
        path = Path(recipe.out, f"{stage}.pt")
        runtime.save_net(path, net, stage=stage, options=options)
        runtime.resume_path(recipe, stage).unlink(missing_ok=True)
    return runtime.load_net(path, DiT, recipe.device)


def train_row(name, recipe, folder, teacher, *parts):
    """The distillation with one thing changed -> the student. parts: clips, expert, judge, val."""
    of_init = {}
    for option, value in VARIANTS[name].items():
        if option not in DMD_OPTIONS:
            of_init[option] = value
    init_name = "-".join(["init", *(f"{option}-{value}" for option, value in of_init.items())])
    out = f"{folder}/{init_name}-{recipe.seed}"
    init_recipe = dataclasses.replace(recipe, out=out, **of_init)
    init = trained("init", distill.train_init, init_recipe, teacher, *parts)
    if name == "init alone":
        return init
    out = f"{folder}/{name.replace(' ', '-')}-{recipe.seed}"
    recipe = dataclasses.replace(recipe, out=out, **VARIANTS[name])
    return trained("student", distill.train_dmd, recipe, teacher, init, *parts)


def over_seeds(found):
    """{row: [what metrics.compare found, one for each seed]} -> {row: {measure: (difference, low,
    high)}}: the mean over seeds, and how low and how high a seed's 95 % interval over people
    reaches. All rows share the trainings of the first one."""
    merged = {}
    for name, seeds in found.items():
        merged[name] = {}
        for measure in COLUMNS:
            differences, low, high = np.array([seed[measure] for seed in seeds]).T
            merged[name][measure] = (differences.mean(), low.min(), high.max())
    return merged


def ablate(cfg, device):
    """The distillation with one thing changed at a time, each from the same teacher and on the
    same clips, then the judge, on the same people."""
    words = [word.strip() for word in cfg.only.split(",") if word.strip()]
    wanted = []
    for name in VARIANTS:
        if not words or any(word in name for word in words):
            wanted.append(name)
    if not wanted:
        raise UserError(f"--only {cfg.only}: no such row; they are {'; '.join(VARIANTS)}")
    base = next(iter(VARIANTS))
    wanted = [base] + [name for name in wanted if name != base]  # which all are compared with
    (judge,) = networks(cfg, device)
    recipe = distill.Config(**distill.PRESETS[cfg.config], config=cfg.config, device=str(device))
    recipe = dataclasses.replace(recipe, source=cfg.source)
    teacher = distill.load_like(recipe, checkpoint(cfg, "teacher"), device)
    expert = runtime.load_net(checkpoint(cfg, "syncnet"), SyncNet, device)
    clips = distill.load_clips(recipe, "train", device)
    val = faces.make_pairs(2, recipe.size, "val", device)  # for the log alone
    pairs = faces.make_pairs(cfg.clips, recipe.size, "held-out", device, LATENTS)
    folder = f"{cfg.out}/ablate-{cfg.config}"
    rows = []
    differences = {name: [] for name in wanted[1:]}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        of_seed = dataclasses.replace(recipe, seed=seed)
        for name in wanted:
            net = train_row(name, of_seed, folder, teacher, clips, expert, judge, val)
            net = net.to(runtime.fast_dtype(device))
            found = evaluate(by_parts(dub_student, net, pairs), pairs, judge)
            row = summarize(found)
            line = ", ".join(f"{key} {row[key]:.{digits}f}" for key, digits in COLUMNS.items())
            print(f"{name}, seed {seed}: {line}", file=sys.stderr, flush=True)
            rows.append(row | {"name": name, "seed": seed})
            if name == base:
                of_base = found
            else:
                differences[name].append(compare(found, of_base))

    minus = over_seeds(differences)
    shown = {}
    for name in wanted:
        title = f"{name} (paper: {PAPER[name]})" if name in PAPER else name
        shown[title] = {}
        for measure in COLUMNS:
            values = [row[measure] for row in rows if row["name"] == name]
            shown[title][measure] = np.mean(values)
            shown[title][measure + "_ci"] = np.ptp(values) / 2
            if name != base:
                _, low, high = minus[name][measure]
                shown[title][measure + "_bold"] = low > 0 or high < 0
    table(f"mean ± half the range of {cfg.seeds} seeds (paper: Sync-C, FVD)", shown, COLUMNS)
    print(f'\nBold: beyond chance over people (95 %) with each of the seeds. Minus "{base}":')
    for name in differences:
        print(f"- {name}: {beyond_chance(minus[name])}")
    return {"rows": rows, "minus": minus}


def main(argv):
    commands = {"trajectory": trajectory, "ablate": ablate}
    run_command(argv, commands, Options, PEOPLE, __doc__)


if __name__ == "__main__":
    runtime.run(main)
