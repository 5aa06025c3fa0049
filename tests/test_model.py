import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

import data
import faces
import flow
import model
import stream
from data import mouth_mask
from model import KVCache, attention_window

pytestmark = pytest.mark.usefixtures("float32")


@pytest.mark.parametrize("latents", [3, 6, 18])  # shorter than, equal to, three times the window
@pytest.mark.parametrize("chunk, sink, window", [(3, 1, 6), (3, 0, 3), (1, 2, 4), (2, 3, 5)])
@torch.no_grad()
def test_streaming_equals_the_causal_clip(tiny, parts, latents, chunk, sink, window):
    net = copy.copy(tiny)
    net.cfg = dataclasses.replace(tiny.cfg, chunk=chunk, sink=sink, window=window)
    x, cond = parts(latents)
    clip = net(x, 0.0, cond, causal=True)
    cache, outputs = KVCache(net, len(x)), []
    where, shape = cache.kv.data_ptr(), cache.kv.shape
    for part, known in zip(x.split(chunk, 1), stream.in_chunks(cond, chunk)):
        outputs.append(net(part, 0.0, known, cache=cache))
        assert net(part, 0.0, known, cache=cache, store=True) is None
        cache.evict()
    torch.testing.assert_close(torch.cat(outputs, 1), clip, atol=1e-5, rtol=0)
    assert (cache.kv.data_ptr(), cache.kv.shape) == (where, shape)  # constant memory


@torch.no_grad()
def test_a_window_longer_than_the_usual_rope_table():
    """Its network takes the weights of one with the usual window, and streams on and on."""
    usual = model.Config(32, 8, 32, depth=1, heads=1)
    net = model.DiT(dataclasses.replace(usual, window=270))
    net.load_state_dict(model.DiT(usual).state_dict())
    x, hidden = torch.randn(2, 1, 279, 6, 768)
    cond = model.Cond(hidden, torch.randn(1, 279, 6, 32), torch.randn(1, 279, 1, 32))
    clip = net(x, 0.0, cond, causal=True)
    cache, outputs = KVCache(net, 1), []
    for part, known in zip(x.split(3, 1), stream.in_chunks(cond, 3)):
        outputs.append(net(part, 0.0, known, cache=cache))
        net(part, 0.0, known, cache=cache, store=True)
        cache.evict()
    assert len(cache.frames) == 268  # the sink and 267, to which the next chunk adds its 3
    torch.testing.assert_close(torch.cat(outputs, 1), clip, atol=1e-5, rtol=0)


def test_the_window():
    cfg = model.Config()
    assert attention_window(0, cfg) == [0, 1, 2] and attention_window(1, cfg) == [0, 1, 2, 3, 4, 5]
    assert attention_window(2, cfg) == [0, 3, 4, 5, 6, 7, 8]
    assert attention_window(9, cfg) == [0, 24, 25, 26, 27, 28, 29]


@pytest.mark.parametrize("k", [1, 2])
@torch.no_grad()
def test_a_change_leaves_earlier_chunks_bit_identical(tiny, parts, k):
    x, cond = parts(12)
    changed = x.clone()
    changed[:, 3 * k : 3 * k + 3] += 1
    a, b = (tiny(z, 0.5, cond, causal=True) for z in (x, changed))
    assert torch.equal(a[:, : 3 * k], b[:, : 3 * k])
    assert not torch.allclose(a[:, 3 * k + 3 :], b[:, 3 * k + 3 :], atol=1e-4)
    a, b = (tiny(z, 0.5, cond) for z in (x, changed))  # the teacher sees everything
    assert not torch.allclose(a[:, : 3 * k], b[:, : 3 * k], atol=1e-4)


@pytest.mark.parametrize("size, patch", [(32, 8), (64, 8), (64, 16), (96, 8)])
def test_tokens_tile_the_mouth_rectangle(size, patch):
    video = torch.randint(256, (2, 8, size, size, 3), dtype=torch.uint8)
    rectangle = data.mouth_rectangle(video)
    assert torch.equal(rectangle, video[:, :, size // 2 :, size // 8 : -(size // 8)])
    assert torch.equal(data.paste(rectangle, video), video)
    assert not mouth_mask(size)[(data.paste(rectangle + 1, video) == video)[0, 0, :, :, 0]].any()
    tokens, n = data.to_tokens(rectangle, patch), model.n_tokens(model.Config(size, patch))
    assert tokens.shape == (2, 2, n, 12 * patch**2)
    assert torch.equal(data.to_pixels(tokens, patch), rectangle)
    for i in range(n):
        row, column = (patch * place for place in divmod(i, size * 3 // 4 // patch))
        square = rectangle[1, 4:, row : row + patch, column : column + patch]
        assert torch.equal(tokens[1, 1, i], square.flatten())


@pytest.mark.parametrize("size", [32, 64])
@torch.no_grad()
def test_outside_the_mask_the_source_is_kept_and_inside_it_is_not_read(tiny, size):
    net = tiny if size == 32 else model.DiT(model.Config(size, 8, 32, depth=1, heads=1))
    video, mask = torch.rand(1, 12, size, size, 3) * 2 - 1, mouth_mask(size)[:, :, None]
    heard = data.hearing(torch.randn(1, 48, data.MELS))
    reference = torch.rand(1, 12, size, size * 3 // 4, 3)
    cond = net.embed(data.middle(video), reference, heard)
    x0 = net(torch.randn_like(cond.masked_source), 0.9, cond)
    out = data.paste(data.to_pixels(x0, 8), video)
    assert ((out == video) | (mask > 0)).all() and not torch.allclose(out, video, atol=0.05)
    hidden = torch.where(mask > 0, torch.rand_like(video), video)
    again = net.embed(data.middle(hidden), reference, heard)
    assert torch.equal(again.tokens, cond.tokens) and torch.equal(
        again.masked_source, cond.masked_source
    )


@torch.no_grad()
@pytest.mark.parametrize("size", [32, 64, 128])
def test_two_dubs_of_one_person_look_the_same_to_the_network(size):
    """Nothing that it is shown tells the words but the sound, not even the mask's soft edge."""
    net = model.DiT(model.Config(size, 8, 32, depth=1, heads=1))
    source, truth = faces.dub_pair(4, 12, size)
    heard = data.hearing(torch.randn(1, 48, data.MELS))
    conds = []
    for clip in (source, truth):
        video = data.to_float(data.middle(clip.video[None]))
        reference = data.to_float(data.middle(source.video[None]))
        conds.append(net.embed(video, reference, heard))
    edge = (mouth_mask(size) > 0) & (mouth_mask(size) < 1)
    assert (source.video[:, edge] != truth.video[:, edge]).any()
    assert torch.equal(conds[0].tokens, conds[1].tokens)
    assert torch.equal(conds[0].masked_source, conds[1].masked_source)


@torch.no_grad()
def test_squares_are_added_where_they_overlap(tiny):
    """By hand: each token writes 12 x 12 pixels, and its neighbour starts 8 further."""
    x, known = torch.randn(1, 2, 6, 96), torch.randn(1, 2, 6, 768)
    shift, scale = torch.randn(1, 1, 2, 96).unbind(2)
    squares = tiny.final_layer(F.layer_norm(x, (96,)) * scale + shift).view(2, 2, 3, 4, 3, 12, 12)
    canvas = torch.zeros(2, 4, 3, 2 * 8 + 4, 3 * 8 + 4)
    for r, c in itertools.product(range(2), range(3)):
        canvas[..., 8 * r : 8 * r + 12, 8 * c : 8 * c + 12] += squares[:, r, c]
    inner = canvas[..., 2:-2, 2:-2].permute(0, 1, 3, 4, 2).reshape(1, 8, 16, 24, 3)
    mask = (data.mouth_rectangle(mouth_mask(32)[:, :, None]) > 0).float()
    out = tiny.to_x0(x, torch.stack([shift, scale], 2), known)
    torch.testing.assert_close(data.to_pixels(out - known, 8), mask * inner, atol=1e-5, rtol=0)


def test_the_loss_by_hand(tiny):
    x, weight, total = torch.randn(2, 1, 6, 768), torch.tensor([[0.5], [3.0]]), 0
    y = x + tiny.mask * torch.randn(x.shape)
    mask = data.to_pixels(tiny.mask[None, None], 8)[0].numpy()
    error = (weight[..., None, None, None] ** 0.5 * data.to_pixels(x - y, 8)).numpy()
    for b, *at in itertools.product(*map(range, error.shape)):  # B, frame, row, column, colour
        here = error[b][tuple(at)]
        total += mask[tuple(at)] * here**2 / error.size
        for axis, n in enumerate(mask.shape[:3]):
            before = [i - (a == axis) for a, i in enumerate(at)]
            if at[axis]:
                total += 0.7 * (here - error[b][tuple(before)]) ** 2 / (error.size * (n - 1) / n)
    loss = flow.denoising_loss(tiny, x, y, weight, 0.7).item()
    assert loss == pytest.approx(total / mask.mean(), rel=1e-5)
