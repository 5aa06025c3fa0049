import contextlib
import importlib
import io
import subprocess
import sys
import types

import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
import torch

import media
import runtime
import sample
import stream
import voices
from data import RATE, mouth_mask
from faces import render_clip

pytestmark = pytest.mark.usefixtures("float32")


@pytest.mark.parametrize("seconds", [0, 3])
def test_a_short_picture_is_played_again_from_its_start(tmp_path, seconds, capsys):
    """Also where the file's own sound outlasts it, whatever the container says."""
    sound = np.zeros(seconds * RATE, np.float32) if seconds else None
    path = tmp_path / "a.mp4"
    with media.write_video(path, (32, 32), sound) as put:
        for i in range(25):
            put(np.full((32, 32, 3), 8 * i + 20, np.uint8))
    played = sample.play(path, 76)
    seen = [round((frame.float().mean().item() - 20) / 8) for frame in played]
    assert seen == [*range(25), *range(25), *range(25), 0]
    assert capsys.readouterr().err.count("shorter than the sound; it is played again") == 1
    held = [round((frame.float().mean().item() - 20) / 8) for frame in sample.play(path, 26)]
    assert held == [*range(25), 24] and not capsys.readouterr().err  # but for rounding


def test_dubbing_a_recording(tmp_path, student_file):
    """29.97 fps, 176x144, stereo 44.1 kHz, shorter than the sound: sized, timed and sounding as
    asked, untouched outside the box. A bar at the top counts the recording's frames."""
    video, sound, out = tmp_path / "in.mp4", tmp_path / "in.wav", tmp_path / "out.mp4"
    writer = imageio_ffmpeg.write_frames(
        str(video),
        (176, 144),
        fps=30000 / 1001,
        codec="libx264",
        quality=10,
        macro_block_size=2,
        ffmpeg_log_level="error",
    )
    writer.send(None)
    picture = np.random.default_rng(0).integers(0, 255, (9, 11, 3), np.uint8)
    picture = picture.repeat(16, 0).repeat(16, 1)
    for i in range(45):
        picture[:16] = 255 * (np.arange(176) < 3 * i + 3)[:, None]
        writer.send(picture)
    writer.close()
    clicks = 0.8 * (np.arange(int(3.1 * 44100)) / 44100 % 1 < 0.002)
    soundfile.write(sound, np.stack([clicks, clicks], 1), 44100)
    words = f"--video {video} --audio {sound} --out {out} --box 40,30,100 --weights {student_file}"
    sample.main(words.split())
    frames, heard = torch.stack(list(media.read_video(out))), media.Sound(out)[:]
    assert frames.shape == (78, 144, 176, 3)  # 3.1 s is 77.5 frames
    counted = (frames[:37, 8, :, 0] > 128).sum(1) / 3 - 1  # of those that were not played back
    assert (counted - torch.arange(37) * 29.97 / 25).abs().max() < 1.5
    change = (frames.int() - next(media.read_video(video)).int()).abs().float()[:, 16:]
    inside = torch.zeros(128, 176, dtype=torch.bool)
    inside[64:116, 50:132] = True
    assert change[:, ~inside].mean() < 4 and change[:, 79:104, 65:115].mean() > 8
    heard = np.flatnonzero(np.abs(heard) > 0.2) / RATE
    assert all(np.abs(heard - second).min() < 0.01 for second in range(4))
    assert np.abs(heard - heard.round()).max() < 0.04


def test_a_dubbed_file_is_blended_once(tmp_path, student_file, monkeypatch):
    """By hand: a student that paints black, and a white recording."""

    def black(net, cond, cache, noise, exit_step=None):
        return (1 - 2 * net.mask).expand(1, net.cfg.chunk, -1, -1)

    with media.write_video(tmp_path / "a.mp4", (32, 32), np.zeros(640 * 12, np.float32)) as put:
        list(map(put, np.full((12, 32, 32, 3), 255, np.uint8)))
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(buffer=shown))
    monkeypatch.setattr(stream, "denoise_chunk", black)
    sample.main(f"--video {tmp_path}/a.mp4 --out - --weights {student_file}".split())
    frames = np.frombuffer(shown.getvalue(), np.uint8).reshape(-1, 32, 32, 3)
    once = 255 * (1 - mouth_mask(32)[:, :, None].numpy())
    assert len(frames) >= 12 and np.abs(frames - once).max() <= 2


@pytest.mark.parametrize("stdout", [io.StringIO(), None])
def test_standard_output_that_takes_no_bytes(stdout, tmp_path, student_file, monkeypatch):
    """A notebook's, or a closed one: it is not needed for a file."""
    with media.write_video(tmp_path / "a.mp4", (32, 32), np.zeros(640 * 4, np.float32)) as put:
        list(map(put, np.zeros((4, 32, 32, 3), np.uint8)))
    monkeypatch.setattr(sys, "stdout", stdout)
    words = f"--video {tmp_path}/a.mp4 --weights {student_file} --out".split()
    sample.main([*words, f"{tmp_path}/b.mp4"])
    assert len(list(media.read_video(tmp_path / "b.mp4"))) >= 4
    with pytest.raises(runtime.UserError, match="standard output takes no bytes"):
        sample.main([*words, "-"])


def test_a_drawn_person_says_a_sound_file_or_a_text(tmp_path, student_file, capsys):
    out, wav = tmp_path / "dub.mp4", tmp_path / "a.wav"
    soundfile.write(wav, voices.say("Guten Tag", "de"), RATE)
    spoken = f"--out {out} --weights {student_file}".split()
    videos = []
    for given in (["--audio", str(wav)], ["--text", "Guten Tag", "--voice", "de"]):
        sample.main([*given, *spoken, "--face", "7"])
        videos.append(torch.stack(list(media.read_video(out))))
    seconds = soundfile.info(wav).duration
    assert len(videos[0]) == pytest.approx(25 * seconds, abs=1.5)
    assert videos[0].shape == videos[1].shape and videos[0].shape[1:] == (96, 96, 3)
    assert np.abs(media.Sound(out)[:]).max() > 0.1 and "--face 7" in capsys.readouterr().out


def test_frames_to_a_pipe_whose_reader_may_leave_early(tmp_path, student_file):
    clip, path = render_clip(21, 24, 32), tmp_path / "a.mp4"
    with media.write_video(path, (32, 32), clip.audio) as put:
        list(map(put, clip.video.numpy()))
    command = f"{sys.executable} {sample.__file__} --video {path} --out - --weights {student_file}"
    done = subprocess.run(command.split(), capture_output=True)
    assert done.returncode == 0 and b"frames a second" in done.stderr
    assert len(done.stdout) == -(-len(media.Sound(path)) // 640) * 32 * 32 * 3
    piped = ["bash", "-c", f"set -o pipefail; {command} | head -c 100 | wc -c"]
    early = subprocess.run(piped, capture_output=True, text=True)
    assert early.stdout.strip() == "100" and "Traceback" not in early.stderr


SCRIPTS = ["sample", "distill", "bench", "analysis"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_help(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with contextlib.suppress(SystemExit):
        runtime.run(importlib.import_module(script).main)
    assert f"python {script}.py" in capsys.readouterr().out
