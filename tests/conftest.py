"""Shared pieces: a real tiny network, a few drawn clips, a small expert. Everything runs on a CPU:
layers in float32, whole jobs in what the CPU multiplies fastest (PRECISION=float32 pytest: all)."""

import json
import os
import shutil
import sys

if not any("test_device" in word for word in sys.argv):  # the only one for GPUs
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported, and so Triton
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

import analysis
import bench
import data
import distill
import faces
import metrics
import model
import runtime
import syncnet

CPU = torch.device("cpu")
runtime.precision = os.environ.get("PRECISION", "auto")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def float32(monkeypatch):
    """Everything in float32: only the order of additions differs."""
    monkeypatch.setattr(runtime, "precision", "float32")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(scope="session")
def cfg(tmp_path_factory):
    """tiny, with next to no steps."""
    few = dict(clips=6, latents=6, batch=2, sync_steps=2, teacher_steps=4, init_steps=2)
    few.update(dmd_steps=2, dmd_batch=2, critic_updates=2)
    out = str(tmp_path_factory.mktemp("run"))
    return distill.Config(**distill.PRESETS["tiny"] | few, config="tiny", out=out)


@pytest.fixture(scope="session")
def tiny(cfg):
    """A tiny DiT in which every weight matters."""
    torch.manual_seed(1)
    net = model.DiT(model.network_of(cfg)).eval()
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return net


@pytest.fixture(scope="session")
def clips(cfg):
    people = faces.drawn_clips("train", cfg.size, 64, CPU)
    return data.Clips(people, cfg.clips, cfg.size, CPU, latents=16)


@pytest.fixture(scope="session")
def val(cfg):
    return faces.make_pairs(2, cfg.size, "val", CPU, 6)


@pytest.fixture(scope="session")
def expert_file(tmp_path_factory, cfg):
    """A SyncNet trained for seconds on drawn clips: enough to find an offset."""
    path = tmp_path_factory.mktemp("sync") / "judge.pt"
    people = faces.drawn_clips("train", cfg.size, 96, CPU)
    few = data.Clips(people, 60, cfg.size, CPU, latents=24)
    held_out = faces.make_pairs(4, cfg.size, "val", CPU, 12)
    net = syncnet.train(syncnet.Config(size=cfg.size), few, 320, 3, held_out)
    runtime.save_net(path, net)
    return path


@pytest.fixture(scope="session")
def expert(expert_file):
    return runtime.load_net(expert_file, syncnet.SyncNet)


@pytest.fixture(scope="session")
def student_file(tiny, cfg):
    path = f"{cfg.out}/a_student.pt"
    runtime.save_net(path, tiny, stage="student")
    return path


@pytest.fixture
def parts(tiny):
    """make(L, batch) -> x_t and a Cond of L latent frames."""

    def make(latents, batch=2):
        rectangle = torch.rand(batch, 4 * latents, 32, 24, 3) * 2 - 1
        heard = data.hearing(torch.randn(batch, 16 * latents, data.MELS))
        with torch.no_grad():
            cond = tiny.embed(rectangle, rectangle.roll(1, 1), heard)
        return torch.randn_like(cond.masked_source), cond

    return make


@pytest.fixture
def run(tmp_path, tiny, expert_file, capsys, cfg, monkeypatch):
    """run("speed") -> the JSON object at the end of a command of bench.py or analysis.py, of
    networks that have learned nothing."""
    for name in ("teacher", "student"):
        runtime.save_net(tmp_path / f"{name}.pt", tiny, stage=name)
    for name in ("judge", "syncnet"):
        shutil.copy(expert_file, tmp_path / f"{name}.pt")
    few = ("clips", "latents", "batch", "init_steps", "dmd_steps", "dmd_batch", "critic_updates")
    few = {name: getattr(cfg, name) for name in few}
    monkeypatch.setitem(distill.PRESETS, "tiny", distill.PRESETS["tiny"] | few)
    monkeypatch.setattr(distill, "TABLE_CLIPS", 2)
    monkeypatch.setattr(metrics, "FRECHET_RESAMPLES", 20)  # as good as 400, of two people

    def result(name, *more):
        where = [f"--source={tmp_path}", f"--out={tmp_path}/out", "--config=tiny"]
        main = analysis.main if name in ("trajectory", "ablate") else bench.main
        main([name, *where, "--clips=2", *more])
        last = capsys.readouterr().out.splitlines()[-1]
        found = json.loads(last, parse_constant=pytest.fail)  # which a NaN would be
        assert found["bench"] == name and found["config"] == "tiny" and found["device"] == "cpu"
        return found

    return result
