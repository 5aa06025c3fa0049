import copy

import pytest
import torch

import data


def test_hearing_reaches_back_and_ahead():
    mel = torch.arange(160.0).view(1, 160, 1).expand(-1, -1, data.MELS)
    heard, part = data.hearing(mel), data.hearing(mel, 4, 7)
    assert torch.equal(heard[:, 16:-12], mel) and torch.equal(part, heard[:, 64:140])
    assert (heard[0, :16] == data.SILENCE).all() and (heard[0, -12:] == data.SILENCE).all()
    assert part[0, 0, 0] == 64 - 16 and part[0, -1, 0] == 111 + 12


def test_references_come_from_outside_the_sample(clips, cfg, monkeypatch):
    """Of frames that hold their clip and number, and the true mel."""
    monkeypatch.setattr(data, "EQUALIZER", 0.0)
    n, T = clips.video.shape[:2]
    numbered, frames = copy.copy(clips), torch.cartesian_prod(torch.arange(n), torch.arange(T))
    numbered.video = frames.to(torch.uint8).view(n, T, 1, 1, 2)
    batch = numbered.sample_batch(400, cfg, torch.Generator().manual_seed(0))
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
    bent = data.equalize(mel, torch.Generator().manual_seed(0))
    assert bent.min() >= data.SILENCE and torch.equal(bent[:, 4], bent[:, 7])  # all moments alike
    change = bent[:, 4] - 0.3
    assert change.std(0).max() == pytest.approx(data.EQUALIZER, rel=0.15) and change.mean() < 0.01
    assert change.diff(dim=1).abs().max() < data.EQUALIZER  # smooth over the bands
