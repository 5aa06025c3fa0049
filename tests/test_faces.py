import numpy as np
import torch

import data
import faces


def test_drawing_is_seeded_and_people_differ():
    a, b, c = (
        faces.render_clip(5, 12, 32),
        faces.render_clip(5, 12, 32),
        faces.render_clip(6, 12, 32),
    )
    assert torch.equal(a.video, b.video) and np.array_equal(a.audio, b.audio)
    assert not torch.equal(a.video, c.video) and a.video.shape == (12, 32, 32, 3)
    assert a.audio.shape == (12 * 640,) and np.abs(a.audio).max() <= 1


def test_a_dub_pair_differs_in_the_mouth_and_the_sound_only():
    source, truth = faces.dub_pair(3, 48, 64)
    mask = data.mouth_mask(64) > 0
    assert torch.equal(source.video[:, ~mask], truth.video[:, ~mask])
    assert not torch.equal(source.video[:, mask], truth.video[:, mask])
    assert not np.array_equal(source.audio, truth.audio)
