"""Wrong input: one line that says what is wrong and what to do, exit code 2, no traceback, nothing half-written."""
import sys

import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
import torch

import bench
import data
import distill
import sample
import syncnet

MAIN = dict(data=data.main, sample=sample.main, syncnet=syncnet.main, distill=distill.main, bench=bench.main)


@pytest.fixture(scope="module")
def files(tmp_path_factory, student_file):
    """Name -> a file that is good or broken in one way."""
    d = tmp_path_factory.mktemp("files")
    clip = data.draw(1, 24, 32)
    with data.write_video(d / "good.mp4", (32, 32), clip.audio) as put:
        for frame in clip.video:
            put(frame.numpy())
    with data.write_video(d / "mute.mp4", (32, 32)) as put:
        for frame in clip.video:
            put(frame.numpy())
    soundfile.write(d / "good.wav", clip.audio, data.RATE)
    soundfile.write(d / "empty.wav", np.zeros(0), data.RATE)
    soundfile.write(d / "nan.wav", np.full(16000, np.nan), data.RATE, subtype="FLOAT")
    (d / "broken.mp4").write_bytes((d / "good.mp4").read_bytes()[:900])
    (d / "text.mp4").write_text("not a video")
    (d / "text.pt").write_text("not a checkpoint")
    torch.save(dict(model={}), d / "other.pt")
    student = torch.load(student_file, weights_only=True)
    torch.save(dict(student, stage="teacher"), d / "teacher.pt")
    torch.save(dict(student, model_config=dict(student["model_config"], width=48)), d / "version.pt")
    writer = imageio_ffmpeg.write_frames(str(d / "sound_only.mp4"), (32, 32), audio_path=str(d / "good.wav"), output_params=["-vn"], ffmpeg_log_level="error")
    soundfile.write(d / "sound_only.wav", clip.audio, data.RATE)
    writer.close()
    return dict({p.name: str(p) for p in d.iterdir()}, student=student_file, out=str(d / "result" / "dub.mp4"), folder=str(d), missing=str(d / "nowhere.mp4"))


DUB = "sample --video good.mp4 --audio good.wav --out out --weights student"
CASES = {
    "no video": (DUB.replace("good.mp4", "missing"), "no such file"),
    "no audio file": (DUB.replace("good.wav", "missing"), "no such file"),
    "a cut-off video": (DUB.replace("good.mp4", "broken.mp4"), "no picture could be read"),
    "not a video": (DUB.replace("good.mp4", "text.mp4"), "no picture could be read"),
    "a video with no picture": (DUB.replace("good.mp4", "sound_only.wav"), "no picture could be read (it has none)"),
    "a video with no sound": ("sample --video mute.mp4 --out out --weights student", "no sound could be read (it has none)"),
    "the source for its dub": (DUB.replace("out out", "out good.mp4"), "choose another name"),
    "a box without a video": ("sample --box 1,2,20", "which recording"),
    "sound of length zero": (DUB.replace("good.wav", "empty.wav"), "empty"),
    "NaN": (DUB.replace("good.wav", "nan.wav"), "NaN"),
    "a box outside": (DUB + " --box 10,10,40", "not inside the picture"),
    "half a box": (DUB + " --box 10,10", "three whole numbers"),
    "no checkpoint": (DUB.replace("student", "missing"), "no such file"),
    "a folder of checkpoints": (DUB.replace("student", "folder"), "name a file in it"),
    "not a checkpoint": (DUB.replace("student", "text.pt"), "not a checkpoint"),
    "another program's checkpoint": (DUB.replace("student", "other.pt"), "not a checkpoint"),
    "a teacher as a student": (DUB.replace("student", "teacher.pt"), "cannot stream"),
    "another version's checkpoint": (DUB.replace("student", "version.pt"), "another version"),
    "a student as a judge": ("syncnet --video good.mp4 --weights student", "a teacher or student, where a lip-sync expert is needed"),
    "an unknown option": (DUB + " --speed 3", "unrecognized arguments: --speed"),
    "not a number": (DUB + " --seed x", "invalid int value"),
    "not an mp4": (DUB.replace("out out", "out empty.wav"), "ends in .mp4"),
    "sound without a video": ("sample --audio good.wav", "which recording"),
    "nothing to judge": ("syncnet", "which clip"),
    "an unknown field": ("distill --config tiny --betta 0", "unrecognized arguments: --betta"),
    "an unknown config": ("distill --config huge", "invalid choice"),
    "an unknown stage": ("distill --config tiny --stage sing", "teacher, init or all"),
    "a batch that does not split": ("distill --config tiny --dmd_batch 6 --accumulate 4", "--accumulate"),
    "a band upside down": ("distill --config tiny --band_first 40 --band_last 20", "--band_first"),
    "hyphens": ("distill --config tiny --band-first 40 --band-last 20", "--band_first"),
    "clips too short": ("distill --config tiny --clip_latents 12", "--clip_latents"),
    "a network that does not fit": ("distill --config tiny --size 40", "multiple of twice patch"),
    "an unknown window": ("distill --config tiny --sync_window wide", "on, off, reversed or all"),
    "nothing to start from": ("distill --config tiny --start missing", "no such file"),
    "a folder of nothing": ("distill --config tiny --folder missing", "no mp4 there"),
    "no teacher": ("distill --config tiny --teacher missing", "no such file"),
    "a student as a teacher": ("distill --config tiny --teacher student", "cannot teach"),
    "an unknown bench": ("bench love", "no such bench"),
    "a bench of nothing": ("bench speed --config huge", "one of tiny, small, base"),
    "an unknown set": ("bench quality --set hers", "dub, self, cross or all"),
    "the quality of nothing": ("bench quality --weights missing", "no such folder"),
    "a long run of parts": ("bench long --seconds 25", "two or more times --window"),
    "half a clip": ("distill --config tiny --latents 10", "multiple of --chunk"),
    "no clips": ("distill --config tiny --clips 0", "--clips 0 is too small"),
    "neither yes nor no": ("distill --config tiny --raw_weights yes", "invalid boolean value"),
    "an unknown switch": ("distill --config tiny --compile maybe", "on, off or auto"),
    "a negative seed": ("data --seed -1", "--seed -1 is too small"),
    "an ablation that does not exist": ("bench ablate --config tiny --only reward,lending", "no row is called lending"),
    "too few chunks": ("bench speed --chunks 3", "at least 104"),
    "an odd picture": ("data --size 33", "even"),
    "an unknown device": (DUB + " --device abacus", "--device abacus"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_exit_code_2(name, files, capsys, monkeypatch, tmp_path):
    command, expected = CASES[name]
    script, *argv = [files.get(word, word) for word in command.split()]
    if script == "distill":
        argv += ["--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [script, *argv])
    before = {p: p.stat().st_mtime for p in tmp_path.parent.rglob("*.mp4")}
    with pytest.raises(SystemExit) as end:
        data.run(MAIN[script])
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and expected in said and "\n" not in said and said.startswith("error: ")
    assert {p: p.stat().st_mtime for p in tmp_path.parent.rglob("*.mp4")} == before and not list(tmp_path.parent.rglob(".writing-*"))


def test_too_little_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda folder: type("Usage", (), dict(free=4096)))
    with pytest.raises(data.Fail, match="0 MB free"), data.write_video(tmp_path / "x.mp4", (32, 32)):
        raise AssertionError("not reached")
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    with pytest.raises(data.Fail, match="lower the learning rate"):
        distill.Log(tmp_path, "teacher", 10)(3, loss=float("nan"))
