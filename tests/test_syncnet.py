import dataclasses

import numpy as np
import pytest
import soundfile
import torch

import data
import runtime
import syncnet


@pytest.mark.parametrize("shift", [-5, 0, 3])
def test_a_known_shift_is_found(expert, shift):
    """Sound late by `shift` frames, on people it never saw: the offset to the frame."""
    clip = data.draw(data.SPLITS["held-out"] + 500, 96, 32)
    audio = np.roll(clip.audio, shift * 640)
    c, d, offset = syncnet.score(expert, clip.video[None], data.log_mel(audio)[None])
    assert offset.item() == shift and c > .1


def test_right_audio_beats_wrong(expert):
    a, b = (data.draw(data.SPLITS["held-out"] + i, 72, 32) for i in (600, 602))
    right, wrong = (syncnet.score(expert, a.video[None], data.log_mel(s)[None])[0].item() for s in (a.audio, b.audio))
    assert right > 2 * wrong


def test_the_view_of_a_late_mouth_is_another(expert):
    """Nothing for the same video, less for one that is half corrected, and a gradient where the mouth is, for the guess alone."""
    video = data.to_float(data.draw(data.SPLITS["held-out"] + 700, 48, 32).video[None])
    early, late = video[:, :24], video[:, 3:27]
    same, half, other = (syncnet.view_loss(expert, guess, early) for guess in (early, (early + late) / 2, late))
    assert same == 0 < half < .7 * other
    guess, truth = late.clone().requires_grad_(), early.clone().requires_grad_()
    syncnet.view_loss(expert, guess, truth).backward()
    pull = guess.grad.abs().mean((0, 1, 4))
    assert truth.grad is None and pull[:16].max() == 0 < pull[16:, 8:24].mean()


def test_measures_by_hand():
    """Embeddings that agree at offset 2 only: distance 0 there, sqrt 2 elsewhere."""
    v = torch.eye(40)[None]
    c, d, offset = syncnet.sync(v, v.roll(2, 1))
    assert offset.item() == 2 and d.item() == pytest.approx(0, abs=1e-6) and c.item() == pytest.approx(2 ** .5)


def test_nce_by_hand():
    v = torch.eye(4)[None]
    loss, accuracy = syncnet.nce(v, v, torch.tensor(2.))
    assert loss.item() == pytest.approx(np.log(np.exp(2) + 3) - 2, abs=1e-5) and accuracy == 1


def test_a_judge_from_the_command_line(tmp_path, expert, capsys):
    weights = str(tmp_path / "judge.pt")
    runtime.save(weights, kind="syncnet", config=dataclasses.asdict(expert.cfg), model=expert.state_dict())
    clip = data.draw(data.SPLITS["held-out"] + 700, 72, 64)
    with data.write_video(tmp_path / "a.mp4", (64, 64), clip.audio) as put:
        for frame in clip.video:
            put(frame.numpy())
    soundfile.write(tmp_path / "late.wav", np.roll(clip.audio, 4 * 640), data.RATE)
    syncnet.main(["--video", str(tmp_path / "a.mp4"), "--weights", weights])
    syncnet.main(["--video", str(tmp_path / "a.mp4"), "--audio", str(tmp_path / "late.wav"), "--weights", weights])
    own, late = capsys.readouterr().out.strip().splitlines()[-2:]
    assert "offset +0 frames" in own and "offset +4 frames (+160 ms)" in late


@torch.no_grad()
def test_a_long_clip_is_scored_in_parts(expert):
    """As if it were in one: 41 s, more than a part holds."""
    clip = data.draw(data.SPLITS["held-out"] + 702, 32, 32)
    video, mel = clip.video.repeat(32, 1, 1, 1)[None], data.log_mel(np.tile(clip.audio, 32))[None]
    whole = syncnet.sync(*expert(data.to_float(video), mel)[:2])
    for a, b in zip(syncnet.score(expert, video, mel), whole):
        assert a.item() == pytest.approx(b.item(), abs=.01)


def test_nobody_measured_recorded_mouths(tmp_path):
    """An expert that has seen none reads none, so that a teacher is not shown what it makes up."""
    bank = data.Bank(32, 24, 2, "train")
    bank.mouth[:] = torch.nan
    syncnet.train(str(tmp_path / "a.pt"), syncnet.Config(size=32), bank, 2, 2, 0, torch.device("cpu"), bank)
    net = syncnet.load_syncnet(str(tmp_path / "a.pt"))
    assert torch.equal(*net.watch(torch.randn(2, 12, 32, 32, 3))[2])
