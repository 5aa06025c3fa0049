import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
import torch

import data
import faces
import model as nn_model


def ffprobe(path):
    """What ffmpeg says of a file."""
    return subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)], capture_output=True, text=True).stderr


def test_drawing_is_seeded_and_people_differ():
    a, b, c = data.draw(5, 12, 32), data.draw(5, 12, 32), data.draw(6, 12, 32)
    assert torch.equal(a.video, b.video) and np.array_equal(a.audio, b.audio) and not torch.equal(a.video, c.video)
    assert a.video.shape == (12, 32, 32, 3) and a.audio.shape == (12 * 640,) and np.abs(a.audio).max() <= 1


def test_a_dub_pair_differs_in_the_mouth_and_the_sound_only():
    source, truth = data.dub_pair(3, 48, 64)
    mask = data.mouth_mask(64) > 0
    assert torch.equal(source.video[:, ~mask], truth.video[:, ~mask])
    assert not torch.equal(source.video[:, mask], truth.video[:, mask]) and not np.array_equal(source.audio, truth.audio)


def test_lips_close_in_silence_and_open_with_vowels():
    audio, lips = faces.speak(1, 1, 8.)
    level = np.abs(audio).reshape(-1, data.RATE // faces.SPEECH_FPS).mean(1)
    quiet = np.convolve(level < np.quantile(level, .05) * 2, np.ones(30), "same") > 29      # pauses of at least 150 ms
    assert quiet.any() and lips[quiet, 0].mean() < .15 < lips[~quiet, 0].mean()


def test_written_video_reads_back(tmp_path):
    clip = data.draw(7, 50, 64)
    path = tmp_path / "clip.mp4"
    with data.write_video(path, (64, 64), clip.audio) as put:
        for frame in clip.video:
            put(frame.numpy())
    frames = torch.stack(list(data.read_video(path)))
    assert frames.shape == clip.video.shape and data.mouth_psnr(frames[None], clip.video[None]) > 30
    said = ffprobe(path)
    assert "h264" in said and "yuv420p" in said and "25 fps" in said and "aac" in said
    sound = data.read_audio(path)
    assert abs(len(sound) - 50 * 640) <= 2048                                              # AAC comes in blocks of 1024
    lag = np.correlate(sound[:30000], clip.audio[:30000], "full").argmax() - 29999
    assert abs(lag) <= 16                                                                  # a millisecond
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    assert data.picture_seconds(path, 9) == pytest.approx(2, abs=.05) and data.picture_seconds(path, 1) == pytest.approx(1, abs=.05)


def test_an_odd_size_grows_by_a_pixel_and_is_not_resampled(tmp_path):
    rows = torch.zeros(33, 35, 3, dtype=torch.uint8)
    rows[16:] = 255
    with data.write_video(tmp_path / "a.mp4", (35, 33)) as put:
        for _ in range(3):
            put(rows.numpy())
    frame = next(data.read_video(tmp_path / "a.mp4"))
    assert frame.shape == (34, 36, 3) and (frame[:33, :35].int() - rows.int()).abs().float().mean() < 3


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), data.write_video(tmp_path / "x.mp4", (32, 32)) as put:
        put(np.zeros((32, 32, 3), np.uint8))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rate, shape", [(8000, 1), (16000, 2), (44100, 2), (48000, 1)])
def test_any_rate_and_channels(tmp_path, rate, shape):
    t = np.arange(2 * rate) / rate
    soundfile.write(tmp_path / "a.wav", np.stack([.5 * np.sin(2 * np.pi * 440 * t)] * shape, 1), rate)
    audio = data.read_audio(tmp_path / "a.wav")
    assert len(audio) == 2 * data.RATE and abs(np.abs(np.fft.rfft(audio)).argmax() / 2 - 440) < 1


def test_sound_slices_like_an_array(tmp_path):
    x = np.random.default_rng(0).uniform(-.5, .5, 5000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", x, data.RATE, subtype="FLOAT")
    sound = data.Sound(tmp_path / "a.wav")
    assert len(sound) == 5000 and np.array_equal(sound[:], x) and np.array_equal(sound[4000:9000], x[4000:]) and len(sound[6000:7000]) == 0


def test_29_97_fps_does_not_drift(tmp_path):
    """A picture that counts seconds, at 29.97 fps for 20 s: frame n at 25 fps shows second n / 25, to within a frame."""
    path = tmp_path / "ntsc.mp4"
    writer = imageio_ffmpeg.write_frames(str(path), (64, 32), fps=30000 / 1001, codec="libx264", macro_block_size=2, ffmpeg_log_level="error")
    writer.send(None)
    for i in range(599):
        picture = np.full((32, 64, 3), 16, np.uint8)
        picture[:, : 1 + int(i / 599 * 62)] = 235
        writer.send(picture)
    writer.close()
    frames = list(data.read_video(path))
    assert abs(len(frames) - 599 / 29.97 * 25) <= 1
    for n in (100, 250, 480):
        bright = (frames[n][16, :, 0] > 128).sum().item()
        assert abs(bright - (1 + int(n / 25 * 29.97 / 599 * 62))) <= 1


def test_hearing_reaches_back_and_ahead():
    cfg = nn_model.Config()
    mel = torch.arange(160.).view(1, 160, 1).expand(-1, -1, data.MELS)
    heard = data.hearing(mel, cfg)
    assert heard.shape == (1, 16 + 160 + 12, data.MELS) and torch.equal(heard[:, 16:-12], mel)
    assert (heard[0, :16] == data.SILENCE).all() and (heard[0, -12:] == data.SILENCE).all()
    part = data.hearing(mel, cfg, 4, 7)
    assert part.shape == (1, 16 + 48 + 12, data.MELS) and part[0, 0, 0] == 64 - 16 and part[0, -1, 0] == 111 + 12
    assert torch.equal(part, heard[:, 64:140])


def test_square_and_box():
    frame = torch.arange(100 * 160 * 3).reshape(100, 160, 3).to(torch.uint8)
    assert torch.equal(data.square(frame, 32, (10, 20, 32)), frame[20:52, 10:42])
    assert data.square(frame, 64).shape == (64, 64, 3) and data.centred(100, 160) == (30, 0, 100)
    assert data.parse_box("1,2,30", frame) == (1, 2, 30)
    for bad in ("1,2", "a,b,c", "150,0,50", "-1,0,20"):
        with pytest.raises(data.Fail):
            data.parse_box(bad, frame)


def test_mouth_psnr():
    a = torch.full((1, 4, 32, 32, 3), 100, dtype=torch.uint8)
    b = a.clone()
    b[:, :, :8] = 200                                                                      # above the mask: does not count
    assert data.mouth_psnr(a, b) > 70
    torch.testing.assert_close(data.mouth_psnr(a, a + 10), torch.tensor([28.1308]))


def test_a_folder_of_mp4s_is_a_bank(tmp_path):
    clip = data.draw(9, 60, 48)
    with data.write_video(tmp_path / "a.mp4", (48, 48), clip.audio) as put:
        for frame in clip.video:
            put(frame.numpy())
    (tmp_path / "a.mp4").rename(tmp_path / "a.MP4")
    bank = data.Bank(32, 24, 10, folder=str(tmp_path))
    assert bank.video.shape == (2, 24, 32, 32, 3) and bank.mel.shape == (2, 96, data.MELS)
