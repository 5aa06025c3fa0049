"""Shared pieces: a real tiny network, a few drawn clips, a small expert. Everything runs on a CPU: layers in
float32, whole jobs in what the CPU multiplies fastest (bf16 if it can)."""
import os
import sys

if not any("test_device" in word for word in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""      # before torch is imported; only test_device.py, if it is asked for by name, is for a GPU

import pytest
import torch

import data
import distill
import model as nn_model
import runtime
import syncnet


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny():
    """A tiny DiT whose gates are open, so that every weight matters."""
    torch.manual_seed(1)
    net = nn_model.DiT(nn_model.Config(**nn_model.SIZES["tiny"])).eval()
    for p in net.parameters():
        p.data += .05 * torch.randn_like(p)
    return net


@pytest.fixture(scope="session")
def cfg(tmp_path_factory):
    fields = dict(distill.PRESETS["tiny"], clips=6, clip_latents=16, latents=6, eval_clips=2, table_clips=2, sync_steps=2, teacher_steps=4, teacher_batch=2,
                  init_steps=2, init_batch=2, dmd_steps=2, dmd_batch=2, critic_updates=2)
    return distill.Config(**fields, config="tiny", out=str(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="session")
def samples(cfg):
    return data.Samples(data.Bank(cfg.size, 4 * cfg.clip_latents, cfg.clips), cfg, torch.device("cpu"), runtime.fast_dtype(torch.device("cpu")))


@pytest.fixture(scope="session")
def expert(tmp_path_factory):
    """A SyncNet trained for seconds on drawn clips: enough to find an offset."""
    path, device = str(tmp_path_factory.mktemp("sync") / "syncnet.pt"), torch.device("cpu")
    syncnet.train(path, syncnet.Config(size=32), data.Bank(32, 60, 96), 160, 12, 3, device, data.Bank(32, 48, 4, "watch"))
    return syncnet.load_syncnet(path)


@pytest.fixture(scope="session")
def student_file(tiny, cfg):
    path = f"{cfg.out}/a_student.pt"
    nn_model.save_dit(path, tiny, cfg, "student", 0)
    return path


@pytest.fixture
def parts(tiny):
    """make(L, batch) -> x, cond, audio of L latent frames."""
    def make(latents, batch=2):
        video = torch.rand(batch, 4 * latents, 32, 32, 3) * 2 - 1
        patches = data.patchify(video, 8)
        cond = tiny.embed_cond(patches, patches.roll(1, 1))
        heard = data.hearing(torch.randn(batch, 16 * latents, data.MELS), tiny.cfg)
        return torch.randn_like(cond.known), nn_model.Cond(*(c.detach() for c in cond)), tiny.embed_audio(heard).detach()
    return make
