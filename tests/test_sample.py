import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
import torch

import data
import model as nn_model
import runtime
import sample

ROOT = Path(__file__).parent.parent


def test_time_grid():
    assert [round(sample.tau(j), 3) for j in (0, 20, 30, 40, 50)] == [1, .882, .769, .556, 0]
    assert sample.shift(.5, 1) == .5 and round(sample.TIMES[1], 3) == round(sample.tau(40), 3)


@pytest.mark.parametrize("t", [.3, torch.tensor([[.2], [.9]], dtype=torch.float64)])
def test_velocity_is_noise_less_picture(t):
    x0, eps = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    x_t = sample.add_noise(x0, eps, t)
    torch.testing.assert_close(sample.to_velocity(x_t, x0, t), eps - x0)


@torch.no_grad()
def test_guidance_one_is_the_conditional_prediction(tiny, parts):
    x, cond, audio = parts(3)
    null = sample.null_audio(tiny, 3, 2)
    plain = tiny(x, .7, cond, audio)
    assert torch.equal(sample.guided(tiny, x, .7, cond, audio, null, 1), plain)
    without = tiny(x, .7, cond, null)
    torch.testing.assert_close(sample.guided(tiny, x, .7, cond, audio, null, 3.), without + 3 * (plain - without), atol=1e-5, rtol=0)
    torch.testing.assert_close(sample.guided(tiny, x, torch.tensor([[.7], [.2]]), cond, audio, null, 1.000001)[:1], plain[:1], atol=1e-4, rtol=0)


def test_null_audio_is_what_training_drops_to(tiny):
    heard = data.hearing(torch.randn(2, 48, data.MELS), tiny.cfg)
    dropped = tiny.embed_audio(heard, torch.tensor([True, False]))
    torch.testing.assert_close(dropped[:1], sample.null_audio(tiny, 3, 1))


@torch.no_grad()
def test_euler_with_a_perfect_network_lands_on_x0(parts):
    _, cond, audio = parts(3)

    class Perfect(torch.nn.Module):
        null_audio, cfg = torch.zeros(96), nn_model.Config(**nn_model.SIZES["tiny"])
        audio_to_blocks = torch.nn.Linear(96, 4 * 96)

        def forward(self, x_t, t, cond, audio):
            return cond.known

    torch.testing.assert_close(sample.euler(Perfect(), cond, audio, 10), cond.known)


def test_the_stream_equals_the_batch(tiny):
    """Frame by frame from raw pixels and samples, and the whole clip at once, on the same noise: to a grey level of bf16."""
    clip = data.draw(11, 48, 32)
    streamed = torch.cat(list(sample.stream(tiny, clip.video, clip.audio, seed=4)))
    whole = sample.dub_student(tiny, clip.video[None], data.log_mel(clip.audio)[None], seed=4)[0]
    assert streamed.shape == whole.shape and (streamed.int() - whole.int()).abs().float().mean() < .5


@torch.no_grad()
def test_two_calls_a_chunk_equal_the_three_passes(tiny, parts):
    """The cache pass rides with the next chunk's first pass; done one by one as in the paper, the same numbers come out."""
    _, cond, audio = parts(15, 1)
    chunks, noise, cache, separate = sample.in_chunks(cond, audio, 3), sample.seeded(2), nn_model.Cache(tiny, 1), []
    for part, heard in chunks:
        x0 = tiny(noise(part.known), sample.TIMES[0], part, heard, cache=cache)
        x0 = tiny(sample.add_noise(x0, noise(x0), sample.TIMES[1]), sample.TIMES[1], part, heard, cache=cache)
        tiny(x0, 0., part, heard, cache=cache, store="finished")
        cache.advance()
        separate.append(x0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "fast_dtype", lambda device: torch.float32)
        together = list(sample.generate(tiny, chunks, noise=sample.seeded(2)))
    torch.testing.assert_close(torch.cat(together), torch.cat(separate), atol=1e-5, rtol=0)


def test_mel_of_a_chunk_is_that_of_the_file(tiny):
    audio = data.draw(12, 60, 32).audio
    mel = data.log_mel(audio)[None]
    features = tiny.embed_audio(data.hearing(mel, tiny.cfg))
    for c in range(5):
        heard = sample.chunk_mel(audio, c, tiny.cfg)
        assert torch.equal(heard, data.hearing(mel, tiny.cfg, 3 * c, 3 * c + 3))
        torch.testing.assert_close(tiny.embed_audio(heard), features[:, 3 * c:3 * c + 3], atol=1e-5, rtol=0)


def test_the_stream_looks_no_further_than_it_says(tiny):
    """120 ms of sound after the chunk (and 7.5 of the mel's own window) and no frame after it decide the chunk."""
    clip, other = data.draw(13, 36, 32), data.draw(14, 36, 32)
    n = 640 * 12 + 16 * 120 + 120
    audio = np.concatenate([clip.audio[:n], other.audio[n:]])
    video = torch.cat([clip.video[:12], other.video[12:]])
    a, b = (next(iter(sample.stream(tiny, v, s))) for v, s in ((clip.video, clip.audio), (video, audio)))
    assert torch.equal(a, b)


def test_a_stream_of_any_length(tiny):
    clip = data.draw(15, 31, 32)
    lengths = [len(f) for f in sample.stream(tiny, iter(clip.video), clip.audio)]
    assert lengths == [12, 12, 7]
    for frames in (torch.zeros(12, 64, 64, 3, dtype=torch.uint8), torch.zeros(12, 32, 32, 3)):
        with pytest.raises(data.Fail, match="where the model needs"):
            list(sample.stream(tiny, frames, clip.audio))


def test_back_and_forth(tmp_path):
    with data.write_video(tmp_path / "a.mp4", (32, 32)) as put:
        for i in range(5):
            put(np.full((32, 32, 3), 40 * i + 20, np.uint8))
    seen = [round((f.float().mean().item() - 20) / 40) for f in sample.play(tmp_path / "a.mp4", 14)]
    assert seen == [0, 1, 2, 3, 4, 3, 2, 1, 0, 1, 2, 3, 4, 3]


def test_sound_that_outlasts_the_picture_of_its_own_file(tmp_path):
    """1 s of picture in a file of 3 s: the picture is played back and forth, whatever the container says."""
    with data.write_video(tmp_path / "a.mp4", (32, 32), np.zeros(3 * data.RATE, np.float32)) as put:
        for i in range(25):
            put(np.full((32, 32, 3), 8 * i + 20, np.uint8))
    assert data.probe(tmp_path / "a.mp4")[0] > 2.9
    seen = [round((f.float().mean().item() - 20) / 8) for f in sample.play(tmp_path / "a.mp4", 50)]
    assert seen == [*range(25), *range(23, 0, -1), 0, 1]


def test_a_student_keeps_its_own_times(tmp_path, tiny, cfg):
    nn_model.save_dit(str(tmp_path / "a.pt"), tiny, dataclasses.replace(cfg, landing=20), "student", 0)
    student, clip, seen = nn_model.load_dit(str(tmp_path / "a.pt")), data.draw(1, 12, 32), []
    assert student.times == pytest.approx((.999, sample.tau(20)))
    student.modulation = lambda t, original=student.modulation: (seen.append(t), original(t))[1]
    list(sample.stream(student, clip.video, clip.audio))
    assert seen[:2] == pytest.approx([.999, sample.tau(20)])


def test_dubbing_a_recording(tmp_path, student_file):
    """29.97 fps, 176x144, stereo 44.1 kHz, shorter than the sound: sized, timed and sounding as asked, untouched outside the box."""
    video, sound, out = tmp_path / "in.mp4", tmp_path / "in.wav", tmp_path / "out.mp4"
    writer = imageio_ffmpeg.write_frames(str(video), (176, 144), fps=30000 / 1001, codec="libx264", quality=10, macro_block_size=2, ffmpeg_log_level="error")
    writer.send(None)
    still = np.random.default_rng(0).integers(0, 255, (9, 11, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    for _ in range(45):
        writer.send(np.ascontiguousarray(still))
    writer.close()
    t = np.arange(int(3.1 * 44100)) / 44100
    clicks = .8 * ((t % 1) < .002)
    soundfile.write(sound, np.stack([clicks, clicks], 1), 44100)
    sample.main(["--video", str(video), "--audio", str(sound), "--out", str(out), "--box", "40,30,100", "--weights", student_file])
    frames = torch.stack(list(data.read_video(out)))
    assert frames.shape == (78, 144, 176, 3)                                              # 3.1 s is 77.5 frames
    before = torch.from_numpy(still).int()
    outside = torch.ones(144, 176, dtype=torch.bool)
    outside[80:132, 50:132] = False
    assert (frames.int() - before)[:, outside].abs().float().mean() < 4
    assert (frames.int() - before)[:, 95:120, 65:115].abs().float().mean() > 8
    heard = np.flatnonzero(np.abs(data.read_audio(out)) > .2) / data.RATE
    assert all(np.abs(heard - second).min() < .01 for second in range(4)) and np.abs(heard - heard.round()).max() < .04    # in step


def test_frames_to_a_pipe(tmp_path, student_file):
    """`--out -`: raw frames on standard output and nothing else; a reader that leaves early is no error."""
    clip = data.draw(21, 24, 32)
    with data.write_video(tmp_path / "a.mp4", (32, 32), clip.audio) as put:
        for frame in clip.video:
            put(frame.numpy())
    command = f"{sys.executable} {ROOT / 'sample.py'} --video {tmp_path / 'a.mp4'} --out - --weights {student_file}"
    done = subprocess.run(command.split(), capture_output=True)
    frames = -(-len(data.read_audio(tmp_path / "a.mp4")) // 640)
    assert done.returncode == 0 and len(done.stdout) == frames * 32 * 32 * 3 and b"frames a second" in done.stderr
    early = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | head -c 100 | wc -c"], capture_output=True, text=True)
    assert early.stdout.strip() == "100" and "Traceback" not in early.stderr


@pytest.mark.parametrize("script", ["data", "model", "syncnet", "sample", "distill", "bench"])
def test_every_script_has_help(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    code = 0
    try:
        data.run(importlib.import_module(script).main)
    except SystemExit as end:
        code = end.code
    assert code == 0 and f"python {script}.py" in capsys.readouterr().out


def test_first_frames_lean_towards_the_ones_before(tiny):
    """By hand: token l shows 10 l everywhere. Only its first frame moves, in the mask, and a stream that is joined chunk by chunk is the whole clip joined."""
    x0 = (10. * torch.arange(7))[None, :, None, None].expand(2, -1, 8, 768).contiguous()
    mask = torch.ones(8, 768)
    mask[3] = 0
    whole = sample.join(x0, mask, 3)
    moved = (whole - x0)[:, :, 0, 0]
    torch.testing.assert_close(moved[0], -10 * torch.tensor([0., .2, .2, .3, .2, .2, .3]))
    assert torch.equal(whole[..., 192:], x0[..., 192:]) and torch.equal(whole[:, :, 3], x0[:, :, 3])
    parts = [sample.join(x0[:, a:a + 3], mask, 3, x0[:, a - 3:a] if a else None) for a in (0, 3, 6)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
