import copy
import dataclasses

import numpy as np
import pytest
import torch

import data
import flow
import model
import runtime
import stream
from data import mouth_mask
from faces import render_clip
from media import paste_box

pytestmark = pytest.mark.usefixtures("float32")


def test_the_stream_equals_the_batch(tiny):
    """Frame by frame from raw pixels and samples, and the whole clip at once, on the same noise."""
    clip = render_clip(11, 48, 32)
    streamed = torch.cat(list(stream.dub_stream(tiny, clip.video, clip.audio, seed=4)))
    whole = stream.dub_student(tiny, clip.video[None], data.log_mel(clip.audio)[None], seed=4)[0]
    assert streamed.shape == whole.shape and (streamed.int() - whole.int()).abs().max() <= 1
    assert (streamed != clip.video).any()


def test_mel_of_a_chunk_is_bit_for_bit_that_of_the_file(tiny):
    audio = render_clip(12, 60, 32).audio
    mel = data.log_mel(audio)[None]
    for c in range(5):
        heard = stream.chunk_mel(audio, c, tiny.cfg)
        assert torch.equal(heard, data.hearing(mel, 3 * c, 3 * c + 3))


def test_the_stream_looks_no_further_than_it_says(tiny):
    """120 ms of sound behind the chunk, 7.5 of the mel's window, and no frame behind it."""
    clip, other = render_clip(13, 36, 32), render_clip(14, 36, 32)
    n = 640 * 12 + 16 * 120 + 120
    audio = np.concatenate([clip.audio[:n], other.audio[n:]])
    video = torch.cat([clip.video[:12], other.video[12:]])
    a, b = (
        next(stream.dub_stream(tiny, v, s)) for v, s in ((clip.video, clip.audio), (video, audio))
    )
    assert torch.equal(a, b)


def test_a_stream_of_any_length(tiny):
    clip = render_clip(15, 31, 32)
    assert [len(x) for x in stream.dub_stream(tiny, iter(clip.video), clip.audio)] == [12, 12, 7]
    for frames in (torch.zeros(12, 64, 64, 3, dtype=torch.uint8), torch.zeros(12, 32, 32, 3)):
        with pytest.raises(AssertionError):
            list(stream.dub_stream(tiny, frames, clip.audio))


def test_a_stream_hears_one_channel_in_floats(tiny):
    clip = render_clip(15, 24, 32)
    audio = clip.audio
    expected = torch.cat(list(stream.dub_stream(tiny, clip.video, audio)))
    for same in (audio.astype(np.float64), torch.from_numpy(audio)):
        assert torch.equal(torch.cat(list(stream.dub_stream(tiny, clip.video, same))), expected)
    for wrong in ((32767 * audio).astype(np.int16), np.stack([audio, audio], 1)):
        with pytest.raises(AssertionError, match="one channel of floats"):
            list(stream.dub_stream(tiny, clip.video, wrong))


def test_first_frames_lean_towards_the_ones_before():
    """By hand: token l shows 10 l everywhere. Only its first frame moves, and only in the mask;
    joined chunk by chunk is joined whole."""
    x0 = 10.0 * torch.arange(7).view(1, -1, 1, 1).expand(2, -1, 6, 768)
    mask = torch.ones(6, 768)
    mask[3] = 0
    whole = stream.blend_seams(x0, mask, 3)
    inside, start = stream.TOKEN_LEAN, stream.CHUNK_LEAN
    moved = -10 * torch.tensor([0, inside, inside, start, inside, inside, start])
    torch.testing.assert_close((whole - x0)[0, :, 0, 0], moved)
    assert torch.equal(whole[..., 192:], x0[..., 192:]) and torch.equal(whole[:, :, 3], x0[:, :, 3])
    before = [None, *x0.split(3, 1)]
    parts = [stream.blend_seams(part, mask, 3, b) for part, b in zip(x0.split(3, 1), before)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_a_checkpoint_keeps_the_weights_and_the_landing(tmp_path, tiny):
    net, clip, seen = copy.copy(tiny), render_clip(1, 24, 32), []
    net.cfg = dataclasses.replace(tiny.cfg, landing=20)
    runtime.save_net(tmp_path / "a.pt", net, stage="student")
    student = runtime.load_net(tmp_path / "a.pt", model.DiT)
    assert student.cfg == net.cfg and student.stage == "student"
    for name, weight in tiny.state_dict().items():
        assert torch.equal(student.state_dict()[name], weight.half().float())
    modulation = student.modulation
    student.modulation = lambda t: (seen.append(t), modulation(t))[1]
    list(stream.dub_stream(student, clip.video, clip.audio))
    two_steps = [0.999, flow.grid_time(20)]
    assert seen == pytest.approx([*two_steps, 0, *two_steps])


def test_the_soft_mask_blends_once(tiny):
    """By hand: a black mouth over white. In a square, and in a file of its own size."""
    white = torch.full((1, 12, 32, 32, 3), 255, dtype=torch.uint8)
    black = (1 - 2 * tiny.mask).expand(1, 3, -1, -1)
    soft = mouth_mask(32)[:, :, None]
    shown = stream.to_frames(tiny, black, white)
    assert (shown - 255 * (1 - soft)).abs().max() <= 0.51
    hard = stream.to_frames(tiny, black, white, blend=False)
    assert torch.equal(hard, (255 * (soft == 0)).to(torch.uint8).expand_as(hard))
    pasted = paste_box(white[0, 0], hard[0, 0], (0, 0, 32), soft)
    assert (pasted - 255 * (1 - soft)).abs().max() <= 0.51
