import contextlib
import copy
import dataclasses
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

import data
import media
import model
import runtime
import sample
import voices
from data import RATE, mouth_mask
from faces import render_clip
from media import paste_box

pytestmark = pytest.mark.usefixtures("float32")


def test_the_time_grid(cfg):
    grid = [round(sample.grid_time(j), 3) for j in (0, 20, 30, 40, 50)]
    assert grid == [1, 0.882, 0.769, 0.556, 0] and sample.shift_time(0.5, 1) == 0.5
    assert sample.denoising_times(cfg) == pytest.approx([0.999, sample.grid_time(40)])
    three = dataclasses.replace(cfg, num_steps=3, landing=30)
    assert sample.denoising_times(three) == pytest.approx(
        [0.999, sample.grid_time(15), sample.grid_time(30)]
    )


@pytest.mark.parametrize("t", [0.3, torch.tensor([[0.2], [0.9]], dtype=torch.float64)])
def test_velocity_is_noise_less_picture(t):
    x0, eps = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    x_t, share = sample.add_noise(x0, eps, t), torch.as_tensor(t).view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, (1 - share) * x0 + share * eps)
    torch.testing.assert_close(sample.to_velocity(x_t, x0, t), eps - x0)


@torch.no_grad()
def test_guidance_1_is_the_conditional_prediction_and_each_sample_may_have_its_own(tiny, parts):
    x, cond = parts(3)
    plain, without = tiny(x, 0.7, cond), tiny(x, 0.7, tiny.null_cond(cond))
    assert torch.equal(sample.cfg_predict(tiny, x, 0.7, cond, 1), plain)
    assert not torch.allclose(plain, without, atol=1e-3)
    scale, t = torch.tensor([3.0, 1.0]), torch.full((2, 1), 0.7)
    expected = without + scale.view(2, 1, 1, 1) * (plain - without)
    each, both = (sample.cfg_predict(tiny, x, t, cond, s) for s in (scale, 3.0))
    torch.testing.assert_close(each, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(both[:1], expected[:1], atol=1e-5, rtol=0)


def test_withheld_sound_is_what_training_drops_to(tiny):
    rectangle = torch.rand(2, 12, 32, 24, 3)
    heard = data.hearing(torch.randn(2, 48, data.MELS))
    dropped = tiny.embed(rectangle, rectangle, heard, torch.tensor([True, False]))
    told = tiny.embed(rectangle, rectangle, heard)
    torch.testing.assert_close(dropped.audio[0], tiny.null_cond(told).audio[0])
    assert torch.equal(dropped.audio[1], told.audio[1])


def test_euler_with_a_perfect_network_lands_on_x0(parts):
    _, cond = parts(3)
    torch.testing.assert_close(
        sample.euler(lambda x, t, c: c.masked_source, cond, 10), cond.masked_source
    )


def test_the_stream_equals_the_batch(tiny):
    """Frame by frame from raw pixels and samples, and the whole clip at once, on the same noise."""
    clip = render_clip(11, 48, 32)
    streamed = torch.cat(list(sample.stream(tiny, clip.video, clip.audio, seed=4)))
    whole = sample.dub_student(tiny, clip.video[None], data.log_mel(clip.audio)[None], seed=4)[0]
    assert streamed.shape == whole.shape and (streamed.int() - whole.int()).abs().max() <= 1
    assert (streamed != clip.video).any()


def test_mel_of_a_chunk_is_bit_for_bit_that_of_the_file(tiny):
    audio = render_clip(12, 60, 32).audio
    mel = data.log_mel(audio)[None]
    for c in range(5):
        heard = sample.chunk_mel(audio, c, tiny.cfg)
        assert torch.equal(heard, data.hearing(mel, 3 * c, 3 * c + 3))


def test_the_stream_looks_no_further_than_it_says(tiny):
    """120 ms of sound behind the chunk, 7.5 of the mel's window, and no frame behind it."""
    clip, other = render_clip(13, 36, 32), render_clip(14, 36, 32)
    n = 640 * 12 + 16 * 120 + 120
    audio = np.concatenate([clip.audio[:n], other.audio[n:]])
    video = torch.cat([clip.video[:12], other.video[12:]])
    a, b = (next(sample.stream(tiny, v, s)) for v, s in ((clip.video, clip.audio), (video, audio)))
    assert torch.equal(a, b)


def test_a_stream_of_any_length(tiny):
    clip = render_clip(15, 31, 32)
    assert [len(x) for x in sample.stream(tiny, iter(clip.video), clip.audio)] == [12, 12, 7]
    for frames in (torch.zeros(12, 64, 64, 3, dtype=torch.uint8), torch.zeros(12, 32, 32, 3)):
        with pytest.raises(runtime.UserError, match="where the model needs"):
            list(sample.stream(tiny, frames, clip.audio))


def test_a_stream_hears_one_channel_in_floats(tiny):
    clip = render_clip(15, 24, 32)
    audio = clip.audio
    expected = torch.cat(list(sample.stream(tiny, clip.video, audio)))
    for same in (audio.astype(np.float64), torch.from_numpy(audio)):
        assert torch.equal(torch.cat(list(sample.stream(tiny, clip.video, same))), expected)
    hole = audio.copy()
    hole[9000] = np.nan
    wrong = {
        "int16 sound": (32767 * audio).astype(np.int16),
        r"sound of \(9720, 2\)": np.stack([audio, audio], 1),
        r"sound of \(2, 15360\)": np.stack([audio, audio]),
        "sound with NaN": hole,
        "far louder than 1": 32767 * audio,
    }
    for said, sound in wrong.items():
        with pytest.raises(runtime.UserError, match=f"{said}.* where the model needs"):
            list(sample.stream(tiny, clip.video, sound))


def test_first_frames_lean_towards_the_ones_before():
    """By hand: token l shows 10 l everywhere. Only its first frame moves, and only in the mask;
    joined chunk by chunk is joined whole."""
    x0 = 10.0 * torch.arange(7).view(1, -1, 1, 1).expand(2, -1, 6, 768)
    mask = torch.ones(6, 768)
    mask[3] = 0
    whole = sample.blend_seams(x0, mask, 3)
    inside, start = sample.TOKEN_LEAN, sample.CHUNK_LEAN
    moved = -10 * torch.tensor([0, inside, inside, start, inside, inside, start])
    torch.testing.assert_close((whole - x0)[0, :, 0, 0], moved)
    assert torch.equal(whole[..., 192:], x0[..., 192:]) and torch.equal(whole[:, :, 3], x0[:, :, 3])
    before = [None, *x0.split(3, 1)]
    parts = [sample.blend_seams(part, mask, 3, b) for part, b in zip(x0.split(3, 1), before)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


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


def test_a_checkpoint_keeps_the_weights_and_the_landing(tmp_path, tiny):
    net, clip, seen = copy.copy(tiny), render_clip(1, 24, 32), []
    net.cfg = dataclasses.replace(tiny.cfg, landing=20)
    model.save_dit(tmp_path / "a.pt", net, "student")
    student = model.load_dit(tmp_path / "a.pt")
    assert student.cfg == net.cfg and student.stage == "student"
    for name, weight in tiny.state_dict().items():
        assert torch.equal(student.state_dict()[name], weight.half().float())
    modulation = student.modulation
    student.modulation = lambda t: (seen.append(t), modulation(t))[1]
    list(sample.stream(student, clip.video, clip.audio))
    two_steps = [0.999, sample.grid_time(20)]
    assert seen == pytest.approx([*two_steps, 0, *two_steps])


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


def test_the_soft_mask_blends_once(tiny):
    """By hand: a black mouth over white. In a square, and in a file of its own size."""
    white = torch.full((1, 12, 32, 32, 3), 255, dtype=torch.uint8)
    black = (1 - 2 * tiny.mask).expand(1, 3, -1, -1)
    soft = mouth_mask(32)[:, :, None]
    shown = sample.to_frames(tiny, black, white)
    assert (shown - 255 * (1 - soft)).abs().max() <= 0.51
    hard = sample.to_frames(tiny, black, white, blend=False)
    assert torch.equal(hard, (255 * (soft == 0)).to(torch.uint8).expand_as(hard))
    pasted = paste_box(white[0, 0], hard[0, 0], (0, 0, 32), soft)
    assert (pasted - 255 * (1 - soft)).abs().max() <= 0.51


def test_a_dubbed_file_is_blended_once(tmp_path, student_file, monkeypatch):
    """By hand: a student that paints black, and a white recording."""

    def black(net, cond, cache, noise):
        return (1 - 2 * net.mask).expand(1, net.cfg.chunk, -1, -1)

    with media.write_video(tmp_path / "a.mp4", (32, 32), np.zeros(640 * 12, np.float32)) as put:
        list(map(put, np.full((12, 32, 32, 3), 255, np.uint8)))
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(buffer=shown))
    monkeypatch.setattr(sample, "denoise_chunk", black)
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


SCRIPTS = ["voices", "faces", "syncnet", "sample", "distill", "bench", "analysis"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_help(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with contextlib.suppress(SystemExit):
        runtime.run(importlib.import_module(script).main)
    assert f"python {script}.py" in capsys.readouterr().out
