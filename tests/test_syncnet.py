import numpy as np
import pytest
import torch

import data
import faces
import syncnet
from data import log_mel, mouth_rectangle, to_float

SEED = faces.SPLITS["held-out"] + 500  # people whom the expert has never seen


@pytest.mark.parametrize("shift", [-5, 0, 3])
def test_a_known_shift_is_found_to_the_frame_and_right_sound_beats_wrong(expert, shift):
    clip, other = faces.render_clip(SEED, 96, 32), faces.render_clip(SEED + 102, 96, 32)
    mels = [log_mel(np.roll(sound, shift * 640)) for sound in (clip.audio, other.audio)]
    both = mouth_rectangle(clip.video).expand(2, -1, -1, -1, -1)
    (right, wrong), _, offset = syncnet.score(expert, both, torch.stack(mels))
    assert offset[0].item() == shift and right > 0.1 and right > 2 * wrong


def test_the_view_of_a_late_mouth_is_another(expert):
    """Nothing for the same video, less if half corrected, and a gradient for the guess alone."""
    video = to_float(mouth_rectangle(faces.render_clip(SEED + 200, 48, 32).video))[None]
    early, late = video[:, :24], video[:, 3:27]
    views = [syncnet.perceptual_loss(expert, x, early) for x in (early, (early + late) / 2, late)]
    assert views[0] == 0 < views[1] < 0.7 * views[2]
    guess, truth = late.clone().requires_grad_(), early.clone().requires_grad_()
    syncnet.perceptual_loss(expert, guess, truth).backward()
    assert truth.grad is None and guess.grad[:, :, :, 4:20].abs().mean() > 0


def test_sync_and_nce_by_hand():
    """Embeddings that agree at offset 2 only: distance 0 there, sqrt 2 elsewhere."""
    v = torch.eye(40)[None]
    c, d, offset = syncnet.sync(v, v.roll(2, 1))
    assert offset.item() == 2 and d.item() == pytest.approx(0, abs=1e-6)
    assert c.item() == pytest.approx(2**0.5)
    loss, accuracy = syncnet.nce(v[:, :4, :4], v[:, :4, :4], torch.tensor(2.0))
    assert loss.item() == pytest.approx(np.log(np.exp(2) + 3) - 2, abs=1e-5) and accuracy == 1


def test_nobody_measured_recorded_mouths(cfg, val):
    """An expert that has seen none reads none: a teacher is not shown what it makes up."""
    people = faces.drawn_clips("train", cfg.size, 24, "cpu")
    few = data.Clips(people, 2, cfg.size, "cpu", latents=6)
    few.mouth[:] = torch.nan
    net = syncnet.train(syncnet.Config(size=32), few, 2, 0, val)
    assert torch.equal(*net.encode_video(torch.randn(2, 12, 16, 24, 3))[2])
