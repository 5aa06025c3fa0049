"""On a GPU the numbers are those of a CPU: `pytest tests/test_device.py`. Needs no ffmpeg."""

import copy
import dataclasses

import pytest
import torch

import data
import distill
import faces
import runtime
import stream
import syncnet

CUDA = torch.device("cuda")
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
pytestmark = [no_gpu, pytest.mark.usefixtures("float32")]


def apart(a, b):
    return (a.cpu().int() - b.cpu().int()).abs().max().item()


def test_drawing_is_the_same():
    here, there = (faces.render_clip(5, 12, 64, device=where) for where in ("cpu", CUDA))
    assert there.video.is_cuda and apart(here.video, there.video) <= 1


@torch.no_grad()
def test_passes_and_dubs_are_the_same(tiny, val):
    here = tiny, val.source, val.mel
    sides = here, (copy.deepcopy(tiny).to(CUDA), val.source.to(CUDA), val.mel.to(CUDA))
    conds = [stream.embed_clip(*side) for side in sides]
    x0 = [net(c.masked_source, 0.7, c, causal=True).cpu() for (net, *_), c in zip(sides, conds)]
    torch.testing.assert_close(*x0, atol=1e-4, rtol=0)
    assert apart(*(stream.dub_student(*side) for side in sides)) <= 1
    assert apart(*(stream.dub_teacher(*side, 4, 2.0, 6) for side in sides)) <= 1


def test_the_kernel_and_the_graph_stream_the_same(tiny):
    """Nine chunks, of which the last six are replayed."""
    net, (source, truth) = copy.deepcopy(tiny).to(CUDA), faces.dub_pair(3, 108, 32)
    eager = torch.cat(list(stream.dub_stream(net, source.video, truth.audio)))
    assert apart(eager, source.video) > 1
    for fused, graph in ((True, False), (False, True), (True, True)):
        how = dict(fused=fused, cuda_graph=graph)
        again = torch.cat(list(stream.dub_stream(net, source.video, truth.audio, **how)))
        assert again.shape == eager.shape and apart(again, eager) <= 1


def test_a_compiled_training_step_is_the_eager_one(tiny, cfg):
    people = faces.drawn_clips("train", cfg.size, 64, CUDA)
    clips, rng = data.Clips(people, 4, cfg.size, CUDA, latents=16), torch.Generator(CUDA)
    batch, one = clips.sample_batch(4, cfg, rng), torch.tensor(1.0, device=CUDA)
    noise = torch.randn(4, cfg.latents, *tiny.token_shape, device=CUDA)
    t = torch.rand(4, 1, device=CUDA).clamp(0.1)
    expert = syncnet.SyncNet(syncnet.Config(size=cfg.size)).to(CUDA).requires_grad_(False)
    drop, losses, gradients = torch.arange(4, device=CUDA) < 1, [], []
    for switch in ("off", "on"):
        net = copy.deepcopy(tiny).to(CUDA).requires_grad_(True)
        step = runtime.compiled(distill.teacher_loss, switch, CUDA, 1)
        losses.append(step(net, expert, batch, noise, t, drop, cfg, one, one))
        losses[-1].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert all(x.isfinite().all() for x in losses + gradients)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    assert (gradients[1] - gradients[0]).norm() < 1e-3 * gradients[0].norm()


@pytest.mark.parametrize("first, then", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_training_goes_on_on_another_device(tiny, cfg, tmp_path, first, then):
    """Its optimizers' state, too."""
    cfg = dataclasses.replace(cfg, out=str(tmp_path))

    def make(device):
        net = copy.deepcopy(tiny).to(device).requires_grad_(True)
        muon = runtime.Muon([block.qkv.weight for block in net.blocks], 0.02)
        adam = runtime.adam_w([net.final_layer.weight, net.pos_embed], 1e-3, betas=(0.9, 0.98))
        return dict(net=net, muon=muon, adam=adam)

    def training(parts, device):
        return runtime.Training(cfg, "teacher", 9, parts, device, dict)

    def step(net, muon, adam):
        for p in net.parameters():
            p.grad = p.detach().cos()
        runtime.optimizer_step(net, {muon: 0.02, adam: 1e-3})

    here, there = make(first), make(then)
    run = training(here, first)
    next(iter(run))
    step(**here)
    run.save()
    assert training(there, then).first == 2
    step(**here)
    step(**there)
    for a, b in zip(here["net"].parameters(), there["net"].parameters()):
        torch.testing.assert_close(a.cpu(), b.cpu(), atol=1e-4, rtol=0)
    assert not torch.equal(here["net"].pos_embed.cpu(), tiny.pos_embed)
