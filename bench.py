"""The numbers in the README: speed and quality. The last line of output is one JSON object.

python bench.py speed --config tiny         # frames a second, time to the first one, training
python bench.py quality --config small      # the judge's table: truth, teacher, student
python bench.py speech --config small       # do the lips follow people's speech, and a new language
python bench.py long --config small         # three minutes streamed, the last against the first

The paper's figures and ablations are in analysis.py.
"""

import dataclasses
import functools
import itertools
import json
import math
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import torch
from torch.utils.benchmark import Timer

import data
import distill
import faces
import model
import runtime
import syncnet
import voices
from data import FPS, RATE, mouth_rectangle, to_float
from faces import SPLITS, dub_pair, render_clip
from flow import STEPS
from metrics import COLUMNS, beyond_chance, compare, evaluate, summarize, table
from model import DiT
from runtime import Precision, UserError
from stream import dub_stream, dub_student, dub_teacher
from syncnet import SyncNet

PEOPLE = {"quality": 64, "speech": 3, "long": 4}  # how many there are unless --clips is given
LONG_SECONDS = 180  # of a stream that long measures
LATENTS = 12  # of each person, 48 frames: more people tell more than more frames of the same
SPEECH = Path(__file__).parent / "tests" / "speech"  # recorded sentences, which train nothing
SOUNDS = {  # groups of ARPAbet phones
    "bilabials": ("M", "B", "P"),
    "open vowels": ("AA", "AE", "AW", "AY"),
    "silence": ("SIL",),
}
LAGS = range(-8, 9)  # video frames by which the lips may be late
SPEAKERS = 2500  # from this number on, held-out people whom no other bench has seen


@dataclasses.dataclass
class CommonOptions:
    """The options that bench.py and analysis.py share."""

    config: Literal["tiny", "small", "1.3B"] = "small"  # the preset; 1.3B is for speed alone
    source: str = ""  # the folder of teacher, student and judge; weights/CONFIG if not given
    out: str = "out/bench"  # the folder that figures are written to
    device: str = ""  # cuda, mps or cpu; the best that there is if not given
    precision: Precision = "auto"  # number type of matrix products; auto: the device's fastest
    seed: int = 0  # the number that random choices are drawn from
    clips: int = 0  # number of people; each command has its own if not given


@dataclasses.dataclass
class Options(CommonOptions):
    rounds: int = 5  # times that speed measures each row, taking turns


def checkpoint(cfg, name):
    """The path of NAME.pt in the folder --source. A folder that has a student of the bundled
    teacher and no teacher, reward expert or judge of its own is completed by the bundled ones."""
    bundled = runtime.BUNDLED / cfg.config
    source = cfg.source or bundled
    path = runtime.find(name, source, "" if name == "student" else bundled)
    if path is None:
        raise UserError(f"{source}: no {name}.pt; --source names a folder that holds one")
    return path


def networks(cfg, device, *names):
    """The judge, then the networks of these names, "student" or "teacher"."""
    dtype = runtime.fast_dtype(device)
    found = [runtime.load_net(checkpoint(cfg, "judge"), SyncNet, device)]
    for name in names:
        found.append(runtime.load_net(checkpoint(cfg, name), DiT, device, dtype))
    return found


def by_parts(dub, net, pairs, **options):
    """dub(net, source, mel) of all pairs, 8 at a time to save memory, with a seed each."""
    dubs = []
    for seed, (source, mel) in enumerate(zip(pairs.source.split(8), pairs.mel.split(8))):
        dubs.append(dub(net, source, mel, seed=seed, **options))
    return torch.cat(dubs)


def quality(cfg, device):
    """The judge's table, and in what any two of its rows differ: all pairs in the JSON, those with
    the teacher and the student also in words."""
    judge, student, teacher = networks(cfg, device, "student", "teacher")
    size = student.cfg.size
    pairs = faces.make_pairs(cfg.clips, size, "held-out", device, LATENTS)
    found = {"truth": evaluate(pairs.truth, pairs, judge)}

    # The truth with only that changed which no sound decides: the teeth that show, say. A dub that
    # commits itself to one mouth cannot be closer to the truth than this is.
    other_detail = []
    for i in range(cfg.clips):
        seed = SPLITS["held-out"] + 2 * i  # as dub_pair numbers people and words
        detail = seed + 1_000_000
        clip = render_clip(seed, 4 * LATENTS, size, text=seed + 1, detail=detail, device=device)
        other_detail.append(clip.video)
    found["truth, other detail"] = evaluate(torch.stack(other_detail), pairs, judge)

    teacher_rows = {  # name -> steps, guidance
        "teacher": (50, 1.0),
        "teacher, guidance 1.5": (50, 1.5),
        "teacher, guidance 2": (50, 2.0),
        "teacher, guidance 3": (50, 3.0),
        "teacher, 1 step": (1, 1.0),
    }
    for name, (steps, guidance) in teacher_rows.items():
        dub = by_parts(dub_teacher, teacher, pairs, steps=steps, guidance=guidance)
        found[name] = evaluate(dub, pairs, judge)
    found["student"] = evaluate(by_parts(dub_student, student, pairs), pairs, judge)

    rows = {name: summarize(evaluation) for name, evaluation in found.items()}
    table("dub", rows, COLUMNS)
    minus = {name: {} for name in found}  # {subtracted: {row: differences}}
    for base, name in itertools.combinations(found, 2):
        differences = compare(found[name], found[base])
        minus[base][name] = differences
        minus[name][base] = {key: (-d, -high, -low) for key, (d, low, high) in differences.items()}
    for base in ("teacher", "student"):
        print(f"\nMinus the {base}'s row, beyond chance (95 %, paired bootstrap over people):")
        for name, differences in minus[base].items():
            if name != "truth":
                print(f"- {name}: {beyond_chance(differences)}")
    return {"rows": rows, "minus": minus}


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
    T = len(asked)
    correlations = []
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
    return {"correlation": curve[best], "lag": LAGS[best], "at_0": curve[LAGS.index(0)]}


@torch.no_grad()
def mouth_opening(judge, video):
    """How far the mouth of video (T, S, S, 3) uint8 opens, read by the judge -> (T,) numpy."""
    with runtime.autocast(judge):
        _, _, mouth = judge.encode_video(to_float(mouth_rectangle(video[None])))
    return mouth[0, :, 0].double().cpu().numpy()


def read_openings(judge, student, source, truth):
    """What the judge reads: {"drawn lips": the truth's opening (T,), "student": its dub's}."""
    dub = torch.cat(list(dub_stream(student, source.video, truth.audio)))
    device = next(student.parameters()).device
    return {
        "drawn lips": mouth_opening(judge, truth.video.to(device)),
        "student": mouth_opening(judge, dub.to(device)),
    }


def follow_a_reader(people, judge, student):
    """Drawn people dubbed with a person's recorded sentences -> the rows of a table."""
    size = student.cfg.size
    curves = {"drawn lips": [], "student": []}
    sounds = {name: {group: [] for group in SOUNDS} for name in curves}
    for i in range(people):
        person = SPLITS["held-out"] + 2 * (SPEAKERS + i)
        for audio, lips, phones in recorded_sentences():
            T = len(audio) * FPS // RATE
            source = render_clip(person, T, size)
            truth = render_clip(person, T, size, speech=(audio, lips))
            for name, opening in read_openings(judge, student, source, truth).items():
                curves[name].append(follow(opening, truth.mouth[:, 0]))
                for group, values in openings_by_sound(opening, phones).items():
                    sounds[name][group] += values
    rows = {}
    for name in curves:
        rows[name] = best_lag(curves[name])
        for group, values in sounds[name].items():
            rows[name][group] = 100 * np.mean(values)
    return rows


def follow_languages(people, judge, student):
    """Drawn people dubbed with drawn voices -> the rows of a table."""
    rows = {}
    for title, language in (("the training's", None), ("never heard", voices.UNHEARD)):
        curves = {"drawn lips": [], "student": []}
        for i in range(people):
            source, truth = dub_pair(SPEAKERS + i, 96, student.cfg.size, language=language)
            for name, opening in read_openings(judge, student, source, truth).items():
                curves[name].append(follow(opening, truth.mouth[:, 0]))
        for name in curves:
            rows[f"{title}, {name}"] = best_lag(curves[name])
    return rows


def speech(cfg, device):
    """Does the mouth open as the phones ask for? For a person's recorded sentences, and for eSpeak
    in the languages of the training and in one that the student never heard."""
    judge, student = networks(cfg, device, "student")
    digits = {"correlation": 2, "lag": 0, "at_0": 2}
    rows = follow_a_reader(cfg.clips, judge, student)
    title = f"a recorded reader, {cfg.clips} people; opening in % of the side"
    table(title, rows, digits | dict.fromkeys(SOUNDS, 1))
    languages = follow_languages(4 * cfg.clips, judge, student)
    table(f"languages, {4 * cfg.clips} people", languages, digits)
    return {"rows": rows, "languages": languages}


def long(cfg, device):
    """Is a stream's last minute as good as its first? Both are judged in pieces of ten seconds.
    (The pieces of one person count as if they were of several: the intervals are a bit narrow.)"""
    judge, student = networks(cfg, device, "student")
    pieces = LONG_SECONDS // 10
    minute = min(6, pieces // 2)
    ends = {"first": slice(0, minute), "last": slice(pieces - minute, pieces)}
    pairs = {end: [] for end in ends}  # of each person
    dubs = {end: [] for end in ends}
    for i in range(cfg.clips):
        source, truth = dub_pair(i, 10 * pieces * FPS, student.cfg.size)
        dub = torch.cat(list(dub_stream(student, source.video, truth.audio)))
        mouth = torch.from_numpy(truth.mouth)
        tracks = faces.Pairs(source.video, truth.video, data.log_mel(truth.audio), mouth)
        for end, where in ends.items():
            pairs[end].append([track.unflatten(0, (pieces, -1))[where] for track in tracks])
            dubs[end].append(dub.unflatten(0, (pieces, -1))[where])

    rows = {}
    for end in ends:
        # From a list of people, each with all fields of Pairs, to fields with all people.
        everyone = faces.Pairs(*(torch.cat(field).to(device) for field in zip(*pairs[end])))
        rows[f"truth, {end}"] = summarize(evaluate(everyone.truth, everyone, judge))
        dub = torch.cat(dubs[end]).to(device)
        rows[f"student, {end}"] = summarize(evaluate(dub, everyone, judge))
    table("minute", rows, COLUMNS)
    return {"rows": rows}


def recipe_of(config):
    """The distill.Config of a preset. 1.3B: the shape of the paper's network, at 512 pixels; 384
    tokens a latent frame, where the paper has 1,024."""
    if config == "1.3B":
        return distill.Config(size=512, patch=16, width=1536, depth=30, heads=12)
    return distill.Config(**distill.PRESETS[config])


def mean_seconds(work, rounds):
    """The mean time of work(), after a warm-up; the timer waits for the device."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.timeit(rounds).mean


def training(recipe, device):
    """Seconds of a teacher step, and of a student's with its critic updates."""
    expert = syncnet.SyncNet(syncnet.Config(recipe.size)).to(device).requires_grad_(False)
    val = faces.make_pairs(1, recipe.size, "val", device)
    people = faces.drawn_clips("train", recipe.size, 4 * data.CLIP_LATENTS, device)
    clips = data.Clips(people, 8, recipe.size, device)
    with tempfile.TemporaryDirectory() as folder:
        recipe = dataclasses.replace(recipe, out=folder, teacher_steps=24, dmd_steps=12)
        # On a GPU a stage of thousands of steps is compiled, so these few are, too.
        switch = "on" if device.type == "cuda" else "auto"
        teacher_recipe = dataclasses.replace(recipe, compile=switch)
        teacher = distill.train_teacher(teacher_recipe, clips, expert, expert, val)
        distill.train_dmd(recipe, teacher, teacher, clips, expert, expert, val)
        lines = Path(folder, "log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    result = {}
    for stage in ("teacher", "student"):
        seconds = [row["seconds"] for row in rows if row["stage"] == stage]
        result[f"{stage}_step_s"] = np.median(np.diff(seconds[3:]))  # the first ones warm up
    return result


def speed(cfg, device):
    """The student's stream against its teacher, who makes a clip at a time; with random weights,
    which are as fast as trained ones."""
    recipe = recipe_of(cfg.config)
    dtype = runtime.fast_dtype(device)
    net = model.DiT(model.network_of(recipe)).to(device, dtype).eval()
    frames = 4 * recipe.latents  # that the teacher makes at once
    clip = render_clip(SPLITS["held-out"], 2 * frames, recipe.size)
    source = clip.video[None, :frames].to(device)
    mel = data.log_mel(clip.audio[: frames * RATE // FPS])[None].to(device)

    def teacher_parts(guidance):
        yield dub_teacher(net, source, mel, guidance=guidance, latents=recipe.latents)[0]

    ways = {
        "student": functools.partial(dub_stream, net, clip.video, clip.audio),
        "teacher_guided": functools.partial(teacher_parts, recipe.guidance_scale),
        "teacher": functools.partial(teacher_parts, 1.0),
    }
    if model.has_kernel(net):
        fused = functools.partial(dub_stream, net, fused=True)
        ways["student_fused"] = functools.partial(fused, clip.video, clip.audio)
        # Eight times as long: until the window is full, a stream's chunks are not in the graph.
        video = clip.video.repeat(8, 1, 1, 1)
        audio = np.tile(clip.audio, 8)
        ways["student_graph"] = functools.partial(fused, video, audio, cuda_graph=True)

    runs = {name: [] for name in ways}
    for _ in range(cfg.rounds + 1):
        for name, way in ways.items():  # taking turns, since a machine's pace changes with time
            runs[name].append(runtime.clock(way(), device))
    result = {}
    for name, run in runs.items():
        fps, ttff = np.array(run[1:]).T  # the first run warmed up
        result[name] = {
            "fps": np.median(fps),
            "least": fps.min(),
            "most": fps.max(),
            "ttff_s": np.median(ttff),
            "ms_per_chunk": 4000 * recipe.chunk / np.median(fps),
        }
    table("", result, {"fps": 1, "least": 1, "most": 1, "ttff_s": 4, "ms_per_chunk": 1})

    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    result["peak_gflops"] = 2e-9 * n**3 / mean_seconds(functools.partial(torch.matmul, a, b), 12)
    result["ratio"] = result["student"]["fps"] / result["teacher_guided"]["fps"]
    # By the count of passes: the guided teacher makes two a step, the student one a call and one
    # for the cache.
    result["bound"] = 2 * STEPS / (recipe.num_steps + 1)
    if cfg.config != "1.3B":
        result["train"] = training(recipe, device)
    return result


def json_ready(value):
    """Plain Python values: JSON knows neither numpy's numbers nor NaN, which becomes null."""
    if isinstance(value, dict):
        return {key: json_ready(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def run_command(argv, commands, options, people, usage):
    """Run the first word of argv, one of `commands`, as function(cfg, device), and print the dict
    that it returns as JSON. `options`: a dataclass; `people`: {command: --clips if not given}."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return
    if argv[0] not in commands:
        raise UserError(f"{argv[0]}: no such command; one of {', '.join(commands)}")
    cfg = runtime.options(options, argv[1:], usage)
    cfg.clips = cfg.clips or people.get(argv[0], 0)
    runtime.make_folder(cfg.out)
    runtime.keep_memory()
    torch.manual_seed(cfg.seed)
    device = runtime.find_device(cfg.device, cfg.precision)
    about = {"bench": argv[0], "device": str(device), "threads": torch.get_num_threads()}
    result = commands[argv[0]](cfg, device)
    print(json.dumps(json_ready(vars(cfg) | about | result), allow_nan=False))


def main(argv):
    commands = {
        "speed": speed,
        "quality": quality,
        "speech": speech,
        "long": long,
    }
    run_command(argv, commands, Options, PEOPLE, __doc__)


if __name__ == "__main__":
    runtime.run(main)
