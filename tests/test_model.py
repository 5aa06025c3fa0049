import copy

import pytest
import torch
import torch.nn.functional as F

import data
import model as nn_model
import sample
from model import Cache, Cond, visible


def chunks(latents, chunk=3):
    return [slice(a, a + chunk) for a in range(0, latents, chunk)]


def streamed(tiny, x, cond, audio, t):
    """Chunk by chunk: what the network says at t, each chunk then cached by the pass at t = 0 that also the clip below makes."""
    cache, outputs = Cache(tiny, len(x)), []
    for s in chunks(x.shape[1]):
        part = Cond(*(c[:, s] for c in cond)), audio[:, s]
        outputs.append(tiny(x[:, s], t, *part, cache=cache))
        tiny(x[:, s], t, *part, cache=cache, store="finished")
        cache.advance()
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("latents", [3, 6, 18])          # shorter than, equal to, three times the window
@torch.no_grad()
def test_streaming_equals_the_causal_clip(tiny, parts, latents):
    x, cond, audio = parts(latents)
    clip = tiny(x, 0., cond, audio, causal=True)
    torch.testing.assert_close(streamed(tiny, x, cond, audio, 0.), clip, atol=1e-5, rtol=0)


def test_window():
    cfg = nn_model.Config()
    assert visible(0, cfg) == [0, 1, 2] and visible(1, cfg) == [0, 1, 2, 3, 4, 5]
    assert visible(2, cfg) == [0, 3, 4, 5, 6, 7, 8] and visible(9, cfg) == [0, 24, 25, 26, 27, 28, 29]


@torch.no_grad()
def test_the_sink_is_read(tiny, parts):
    """One block, so that the first latent frame reaches chunk 5 by attention alone; the second one does not."""
    net = copy.deepcopy(tiny)
    net.blocks = net.blocks[:1]
    x, cond, audio = parts(18, 1)
    before = net(x, 0., cond, audio, causal=True)
    for frame, reaches in ((0, True), (1, False)):
        changed = x.clone()
        changed[:, frame] += 1
        assert torch.equal(net(changed, 0., cond, audio, causal=True)[:, 15:], before[:, 15:]) != reaches


@torch.no_grad()
def test_causality(tiny, parts):
    x, cond, audio = parts(12)
    for k in (1, 2):
        changed = x.clone()
        changed[:, 3 * k:3 * k + 3] += 1
        a, b = (tiny(z, .5, cond, audio, causal=True) for z in (x, changed))
        assert torch.equal(a[:, :3 * k], b[:, :3 * k])
        assert not torch.allclose(a[:, 3 * k + 3:], b[:, 3 * k + 3:], atol=1e-4)
        assert not torch.allclose(tiny(x, .5, cond, audio)[:, :3 * k], tiny(changed, .5, cond, audio)[:, :3 * k], atol=1e-4)


@torch.no_grad()
def test_300_chunks_in_constant_memory(tiny, parts):
    x, cond, audio = parts(3, 1)
    cache = Cache(tiny, 1)
    where, shape, seen = cache.kv.data_ptr(), cache.kv.shape, {}
    for c in range(300):
        tiny(x, 0., cond, audio, cache=cache, store="finished")
        cache.advance()
        if c in (9, 299):
            seen[c] = tiny(x, .5, cond, audio, cache=cache)
    torch.testing.assert_close(seen[9], seen[299], atol=1e-5, rtol=0)                        # nothing depends on how late it is
    assert (cache.kv.data_ptr(), cache.kv.shape) == (where, shape)
    assert cache.chunks == 300 and len(cache.frames) == 4 and len(visible(300, tiny.cfg)) == 7    # positions 0..6, for ever


def test_a_compiled_stream_runs_the_same_graphs_for_ever(tiny, parts):
    """What CUDA graphs need: once the window is full there are two graphs, with or without the last chunk's cache pass, and no more. The numbers
    are those of the eager pass."""
    from torch._dynamo.testing import CompileCounter
    given, counter, graphs, outputs = [parts(3, 1)[1:] for _ in range(9)], CompileCounter(), [], []
    net = copy.copy(tiny)
    net.compile(backend=counter, dynamic=False)
    for x0 in sample.generate(net, given, noise=sample.seeded(1)):
        outputs.append(x0)
        graphs.append(counter.frame_count)
    assert graphs == [0, 0, 0, 0, 2, 2, 2, 2, 2]
    eager = list(sample.generate(tiny, given, noise=sample.seeded(1)))
    torch.testing.assert_close(torch.stack(outputs), torch.stack(eager), atol=1e-5, rtol=0)


def test_patches_round_trip():
    video = torch.randint(256, (2, 8, 64, 64, 3), dtype=torch.uint8)
    x = data.patchify(video, 16)
    assert x.shape == (2, 2, 8, 2 * 3072) and torch.equal(data.unpatchify(x, 16), video)
    assert torch.equal(data.picture(x[..., 3072:], x, 16), video)
    assert torch.equal(x[0, 0, 0, 3072:].view(4, 16, 16, 3), video[0, :4, 32:48, :16])


@pytest.mark.parametrize("size, patch, count", [(32, 8, 8), (64, 16, 8), (64, 8, 24), (128, 16, 24), (96, 8, 60)])
def test_tokens_are_where_the_mask_is(size, patch, count):
    """No column of patches that the mask touches is left out, and none that it does not touch is a token. The picture is put together again."""
    video, p = torch.randint(256, (1, 4, size, size, 3), dtype=torch.uint8), 12 * patch * patch
    x, n = data.patchify(video, patch), size // patch
    own = data.inner(x)[..., p:]
    assert own.shape[2] == nn_model.tokens(nn_model.Config(size=size, patch=patch)) == count
    touched = data.mouth_mask(size).view(size, n, patch).amax((0, 2)) > 0
    assert touched.tolist() == [i in range(n)[data.columns(n)] for i in range(n)]
    assert torch.equal(data.picture(own, x, patch), video)
    assert (data.picture(own + 1, x, patch) != video).any((0, 1, 2, 4)).view(n, patch).all(1).tolist() == touched.tolist()


def test_overlap_add_is_fold():
    """Against torch's own fold: squares of 12 pixels on a grid of 8."""
    p, m, rows, columns = 8, 2, 2, 4
    q = p + 2 * m
    squares = torch.randn(2, rows, columns, 4, q, q, 3, dtype=torch.float64)
    cuts = {-1: slice(0, m), 0: slice(m, m + p), 1: slice(m + p, q)}
    order = [(0, 0), (-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]
    stored = torch.cat([squares[..., cuts[dy], cuts[dx], :].flatten(3) for dy, dx in order], -1).requires_grad_()
    out = nn_model.OverlapAdd.apply(stored, p, m)
    folded = F.fold(squares.permute(0, 3, 6, 4, 5, 1, 2).reshape(2, 12 * q * q, -1), (rows * p, columns * p), q, stride=p, padding=m)
    torch.testing.assert_close(out.permute(0, 3, 6, 1, 4, 2, 5).reshape(2, 12, rows * p, columns * p), folded)
    small = torch.randn(1, 2, 2, 12 * 36, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: nn_model.OverlapAdd.apply(z, 4, 1), small)


@pytest.mark.parametrize("size", [32, 64])              # without and with columns of patches that are no tokens
@torch.no_grad()
def test_outside_the_mask_the_source_is_kept(tiny, size):
    net = tiny if size == tiny.cfg.size else nn_model.DiT(nn_model.Config(size=size, patch=8, width=32, depth=1, heads=1))
    video = torch.rand(1, 12, size, size, 3) * 2 - 1
    patches = data.patchify(video, 8)
    cond = net.embed_cond(patches, patches)
    audio = net.embed_audio(data.hearing(torch.randn(1, 48, data.MELS), net.cfg))
    out = data.picture(net(torch.randn_like(cond.known), .9, cond, audio), patches, 8)
    outside = (data.mouth_mask(size) == 0)[None, None, :, :, None].expand_as(video)
    assert torch.equal(out[outside], video[outside]) and not torch.allclose(out, video, atol=.05)


@torch.no_grad()
def test_what_the_source_says_under_the_mask_is_not_read(tiny, parts):
    video = torch.rand(1, 12, 32, 32, 3) * 2 - 1
    hidden = torch.where((data.mouth_mask(32) == 1)[:, :, None], torch.rand_like(video), video)
    reference = data.patchify(video, 8)
    a, b = (tiny.embed_cond(data.patchify(v, 8), reference) for v in (video, hidden))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.known, b.known)


def test_training_attention_is_the_fused_one():
    q, k, v = (torch.randn(2, 3, n, 16, requires_grad=True) for n in (24, 56, 56))
    torch.testing.assert_close(nn_model.dense(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_checkpoints(tmp_path, tiny, cfg, student_file):
    again = nn_model.load_dit(student_file)
    assert all(torch.equal(a.bfloat16().float(), b) for a, b in zip(tiny.state_dict().values(), again.state_dict().values()))
    assert again.cfg == tiny.cfg
