"""Several processes: each draws its own samples, all take one step."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import data
import distill
import runtime
import syncnet

ROOT = Path(__file__).parent.parent


def one_of_two(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    rng = torch.Generator().manual_seed(runtime.step_seed(seed=0, step=1))
    drawn = torch.rand(8, 3, generator=rng)
    net = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    net(drawn).mean().backward()
    norm = runtime.optimizer_step(net, {torch.optim.SGD(net.parameters()): 1.0})
    torch.manual_seed(0)
    expert = syncnet.SyncNet(syncnet.Config(size=32))
    clip = 2 * torch.rand(2, 48, 16, 24, 3) - 1, torch.randn(2, 192, data.MELS)
    reward, _ = syncnet.reward_weights(expert, *(x[rank : rank + 1] for x in clip), beta=5.0)
    made = dict(drawn=drawn, norm=norm, weight=net.weight.detach(), reward=reward)
    torch.save(made, f"{folder}/{rank}.pt")
    dist.barrier()  # so that neither ends while the other still talks to it
    dist.destroy_process_group()


def test_gradients_and_rewards_are_averaged_over_two_processes(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert not torch.isclose(a["drawn"], b["drawn"]).any()
    gradient = torch.cat([a["drawn"], b["drawn"]]).mean(0, keepdim=True)
    assert a["reward"] + b["reward"] == pytest.approx(2) and abs(a["reward"] - 1) > 1e-4
    for one in (a, b):
        torch.testing.assert_close(one["weight"], -gradient)
        torch.testing.assert_close(one["norm"], gradient.norm())


def test_some_of_torchruns_variables_are_not_torchrun(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    runtime.join_others()
    assert not dist.is_initialized()


HOLD = "import runtime, sys, time; lock = runtime.lock(sys.argv[1]); print('held', flush=True)"


def test_one_training_at_a_time_in_a_folder(tmp_path, capsys):
    """And none that was killed stands in the way."""
    command = [sys.executable, "-c", HOLD + "; time.sleep(200)", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(runtime.UserError, match="another training writes there"):
                distill.main([f"--out={tmp_path}"])
        finally:
            other.kill()
    assert not capsys.readouterr().out
    for _ in range(2):  # let go at its end
        with runtime.lock(tmp_path):
            pass


def test_torchrun_trains_and_one_process_speaks(tmp_path):
    few = "--clips 4 --latents 6 --batch 4 --sync_steps 1 --teacher_steps 2 --stage teacher"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "distill.py"]
    command += [*few.split(), "--device=cpu", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("results in") == done.stdout.count("teacher  step     2/2") == 1
    assert {p.name for p in tmp_path.glob("*.pt")} == {"judge.pt", "syncnet.pt", "teacher.pt"}
