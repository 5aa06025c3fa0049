import json
import subprocess
import sys
from pathlib import Path

import torch

import distill
import model
import runtime

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys
import torch
sys.path.insert(0, {root!r})
import distill
import runtime
runtime.fast_dtype = lambda device: torch.float32      # so that only the order of additions differs
distill.main(sys.argv[1:])
"""
TINY = ("--config tiny --stage teacher --clips 4 --clip_latents 16 --latents 6 --sync_steps 1 --sync_batch 2 --eval_clips 1 --teacher_steps 1 "
        "--teacher_batch 4 --teacher_lr 1e-3 --device cpu").split()


def step_of(folder):
    """The teacher after its first step there, and the size of its gradient."""
    norm = json.loads((folder / "log.jsonl").read_text().splitlines()[0])["norm"]
    return torch.load(folder / "teacher.pt", weights_only=True)["model"], norm


def test_two_processes_at_half_batch_take_the_same_step(tmp_path, monkeypatch, capsys):
    """One step of the real command, alone, by torchrun with two processes (the same weights, to rounding), and with --accumulate 2."""
    monkeypatch.setattr(runtime, "fast_dtype", lambda device: torch.float32)
    distill.main([*TINY, "--out", str(tmp_path / "one")])
    distill.main([*TINY, "--out", str(tmp_path / "parts"), "--accumulate", "2"])
    assert capsys.readouterr().out.count("results in") == 2 and distill.ranks() == (0, 1)
    (tmp_path / "run.py").write_text(SCRIPT.format(root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(tmp_path / "run.py"), *TINY, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("results in") == 1                  # of the two, one speaks
    (one, norm), (two, norm_of_two), (parts, norm_of_parts) = (step_of(tmp_path / name) for name in ("one", "two", "parts"))
    torch.manual_seed(0)
    start = model.DiT(model.Config(**model.SIZES["tiny"])).state_dict()
    moved = lambda a, b: torch.cat([(a[k] - b[k]).flatten() for k in start if not k.startswith("hear.")]).norm()       # noqa: E731
    assert moved(one, start) > .01
    # Adam's first step is the gradient's sign: where that is zero to rounding, a weight may go the other way. (What it hears with is the expert's.)
    assert moved(two, one) < .05 * moved(one, start)
    assert abs(norm_of_two / norm - 1) < 1e-3                                             # that step does not depend on the gradient's size
    assert moved(parts, start) > .01 and .5 < norm_of_parts / norm < 2                    # other samples, but a step all the same
