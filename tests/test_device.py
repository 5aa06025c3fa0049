"""On a GPU the numbers are those of a CPU: `pytest tests/test_device.py`. Without one, the same lines run on the CPU."""
import copy
import dataclasses
from pathlib import Path

import pytest
import torch

import data
import distill
import model as nn_model
import sample

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """In float32 on both, so that only the order of additions differs."""
    monkeypatch.setattr("runtime.fast_dtype", lambda device: torch.float32)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield torch.device(request.param)


def test_dubs_are_the_same(tiny, device):
    pairs = data.held_out(2, 32, "watch", CPU, 6)
    there = copy.deepcopy(tiny).to(device)
    for dub in (lambda net, s, m: sample.dub_student(net, s, m), lambda net, s, m: sample.dub_teacher(net, s, m, 4, 2., 6)):
        here, other = dub(tiny, pairs.source, pairs.mel), dub(there, pairs.source.to(device), pairs.mel.to(device)).cpu()
        assert (here.int() - other.int()).abs().max() <= 2 and (here != pairs.source).any()


def test_a_compiled_stream_and_the_next_are_the_eager_one(tiny, device):
    """Two streams one after the other, each with a cache of its own, through the same graphs (CUDA graphs on a GPU)."""
    net = copy.deepcopy(tiny).to(device)
    source, truth = data.dub_pair(3, 96, 32)
    eager = torch.cat(list(sample.stream(net, source.video, truth.audio)))
    compiled = copy.copy(net)
    compiled.compile(dynamic=False, **(dict(mode="reduce-overhead") if device.type == "cuda" else dict(backend="aot_eager")))
    for _ in range(2):
        again = torch.cat(list(sample.stream(compiled, source.video, truth.audio)))
        assert (again.int() - eager.int()).abs().max() <= 2


def test_a_training_goes_the_same_way(cfg, samples, expert, device, tmp_path, monkeypatch):
    """Compiled there, if that is a GPU. Noise is drawn on the CPU for both."""
    monkeypatch.setattr(distill, "noise_like", lambda x: torch.randn(x.shape).to(x.device))
    torch.manual_seed(cfg.seed)
    start, ends = nn_model.DiT(nn_model.Config(**nn_model.model_fields(cfg))), []
    for where in (CPU, device):
        c = dataclasses.replace(cfg, out=str(tmp_path / f"{len(ends)}"), teacher_steps=4, teacher_batch=4)
        Path(c.out).mkdir()
        there = copy.copy(samples)
        there.device, there.patches, there.heard, there.dtype = where, samples.patches.to(where), samples.heard.to(where), torch.float32
        net = copy.deepcopy(expert).to(where)
        distill.train_teacher(c, there, net, net, data.held_out(1, cfg.size, "watch", where, latents=6), where)
        ends.append(nn_model.load_dit(f"{c.out}/teacher.pt"))
    start, here, other = (torch.cat([p.detach().flatten() for name, p in net.named_parameters() if not name.startswith("hear.")]) for net in (start, *ends))
    assert (other - here).norm() < .05 * (here - start).norm()
