"""Wrong input: one line that says what is wrong, exit code 2, nothing half-written."""

import dataclasses
import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

import analysis
import bench
import data
import distill
import faces
import live
import media
import runtime
import sample


@pytest.fixture(scope="module")
def files(tmp_path_factory, student_file, expert_file):
    """Name -> a file that is good or broken in one way."""
    d = tmp_path_factory.mktemp("files")
    clip = faces.render_clip(1, 24, 32)
    for name, frames, sound in (("good", 24, clip.audio), ("mute", 24, None), ("short", 8, None)):
        with media.write_video(d / f"{name}.mp4", (32, 32), sound) as put:
            for frame in clip.video[:frames]:
                put(frame.numpy())
    soundfile.write(d / "good.wav", clip.audio, data.RATE)
    soundfile.write(d / "empty.wav", np.zeros(0), data.RATE)
    soundfile.write(d / "nan.wav", np.full(16000, np.nan), data.RATE, subtype="FLOAT")
    (d / "broken.mp4").write_bytes((d / "good.mp4").read_bytes()[:900])
    (d / "dir.mp4").mkdir()
    (d / "text.pt").write_text("not a checkpoint")
    torch.save(dict(model={}), d / "other.pt")
    student = torch.load(student_file, weights_only=True)
    torch.save(dict(student, stage="teacher"), d / "teacher.pt")
    student["config"]["width"] = 48
    torch.save(student, d / "shape.pt")
    named = dict(student=student_file, expert=expert_file, out=d / "x/dub.mp4", folder=d)
    return named | {p.name: p for p in d.iterdir()} | dict(missing=d / "no")


CASES = """
sample --video good.mp4 --audio missing --out out --weights student: no such file
sample --video broken.mp4 --audio good.wav --out out --weights student: no picture could be read
sample --video good.wav --out out --weights student: no picture could be read (it has none)
sample --video mute.mp4 --out out --weights student: no sound could be read (it has none)
sample --video good.mp4 --audio empty.wav --out out --weights student: empty
sample --video good.mp4 --audio nan.wav --out out --weights student: NaN
sample --video good.mp4 --out good.mp4 --weights student: choose another name
sample --video good.mp4 --out empty.wav --weights student: ends in .mp4
sample --video good.mp4 --out dir.mp4 --weights student: write to a file
sample --video https://host/a.mp4 --out out --weights student: download it first
sample --video good.mp4 --audio https://host/a.wav --out out --weights student: download it first
sample --video good.mp4 --out out --weights student --box 10,10,40: not inside the picture
sample --video good.mp4 --out out --weights student --box=-1,0,32: not inside the picture
sample --video good.mp4 --out out --weights missing: no such file
sample --video good.mp4 --out out --weights folder: name a file in it
sample --video good.mp4 --out out --weights text.pt: not a checkpoint of this project
sample --video good.mp4 --out out --weights other.pt: not a checkpoint of this project
sample --video good.mp4 --out out --weights teacher.pt: cannot stream
sample --video good.mp4 --out out --weights shape.pt: made by other code (size mismatch
sample --text hi --voice xx --weights student: eSpeak has no such voice
sample --text ... --weights student: finds nothing to say
sample --text hi --audio good.wav --weights student: which of them
sample --device abacus: --device abacus
sample --device meta: choose cuda, mps or cpu
sample --text hi --out /dev/null/x/a.mp4 --weights student: cannot be written
distill --start missing: no such file or folder
distill --folder missing: no such file or folder
distill --source missing: no such file or folder
bench quality --out folder --source missing --config tiny: no judge.pt
analysis ablate --out folder --only love,lending: no such row
"""


@pytest.mark.parametrize("case", CASES.strip().splitlines())
def test_one_line_and_exit_code_2(case, files, capsys, monkeypatch, tmp_path):
    command, expected = case.split(": ", 1)
    script, *argv = [str(files.get(word, word)) for word in command.split()]
    argv += ["--out", str(tmp_path)] if script == "distill" else []
    monkeypatch.setattr(sys, "argv", [script, *argv])
    before = {p: p.stat().st_mtime for p in tmp_path.parent.rglob("*.mp4")}
    with pytest.raises(SystemExit) as end:
        runtime.run(importlib.import_module(script).main)
    *_, said = told = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and said.startswith("error: ") and expected in said
    assert told[:-1] == [] or script in ("bench", "analysis")  # which say what files they take
    assert {p: p.stat().st_mtime for p in tmp_path.parent.rglob("*.mp4")} == before
    assert not list(tmp_path.parent.rglob("*.writing*"))


@pytest.mark.parametrize(
    "case",
    [
        "sample --speed 3: Unrecognized options: --speed",
        "distill --teacher_step 3: --teacher_steps INT",  # perhaps you meant this
        "distill --config large: Expected one of",
        "bench speed --rounds many: invalid",
        "live --port: Missing value",
    ],
)
def test_a_wrong_option_is_told_and_nothing_runs(case, capsys, monkeypatch):
    command, expected = case.split(": ", 1)
    script, *argv = command.split()
    monkeypatch.setattr(sys, "argv", [script, *argv])
    with pytest.raises(SystemExit) as end:
        runtime.run(importlib.import_module(script).main)
    out, said = capsys.readouterr()
    assert end.value.code == 2 and expected in said and not out and "Traceback" not in said


def test_options_have_underscores_or_hyphens_and_a_preset_picks_their_defaults():
    def parse(words):
        return runtime.options(distill.Config, words.split(), "", distill.PRESETS)

    small = parse("--teacher_steps 3 --config small --beta=.5 --fresh")
    assert (small.teacher_steps, small.beta, small.fresh, small.size) == (3, 0.5, True, 128)
    assert parse("--teacher-steps 3") == distill.Config(teacher_steps=3)
    assert parse("--source= --config small").source == "" != parse("--config small").source


def test_every_option_has_help(capsys):
    """The comment beside its field."""
    for script in (analysis, bench, distill, live, sample):
        options = getattr(script, "Options", distill.Config)
        with pytest.raises(SystemExit):
            runtime.options(options, ["--help"], "")
        said = " ".join(capsys.readouterr().out.replace("│", " ").split())
        for field in dataclasses.fields(options):
            after = said.split(f"--{field.name} ", 1)[1].split(" --", 1)[0]
            assert len(after.split("(default")[0].split()) > 2, field.name


def test_output_that_cannot_show_a_sign_shows_another(tmp_path):
    code = "import runtime; runtime.run(lambda argv: print('1 ± 2, ü \\udcfc.mp4'))"
    environment = dict(os.environ, PYTHONIOENCODING="ascii", PYTHONPATH=str(runtime.BUNDLED.parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"1 ? 2, ? ?.mp4\n", b"")


def test_a_device_may_be_written_in_capitals():
    assert runtime.find_device("CPU").type == "cpu"
