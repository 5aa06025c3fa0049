import json
import subprocess
import sys
from pathlib import Path

import torch

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


def first_step(launcher, folder, *more):
    script = folder / "run.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    done = subprocess.run([sys.executable, *launcher, str(script), *TINY, "--out", str(folder / "out"), *more], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("results in") == 1                  # of several, one speaks
    norm = json.loads((folder / "out" / "log.jsonl").read_text().splitlines()[0])["norm"]
    return torch.load(folder / "out" / "teacher.pt", weights_only=True)["model"], norm


def test_two_processes_at_half_batch_take_the_same_step(tmp_path):
    """One step of the real command, alone, by torchrun with two processes (the same weights, to rounding), and with --accumulate 2."""
    import distill
    import model
    for name in ("one", "two", "parts"):
        (tmp_path / name).mkdir()
    one, norm = first_step([], tmp_path / "one")
    two, norm_of_two = first_step(["-m", "torch.distributed.run", "--nproc_per_node=2"], tmp_path / "two")
    torch.manual_seed(0)
    start = model.DiT(model.Config(**model.SIZES["tiny"])).state_dict()
    moved = lambda a, b: torch.cat([(a[k] - b[k]).flatten() for k in start if not k.startswith("hear.")]).norm()       # noqa: E731
    assert moved(one, start) > .01
    # Adam's first step is the gradient's sign: where that is zero to rounding, a weight may go the other way. (What it hears with is the expert's.)
    assert moved(two, one) < .05 * moved(one, start)
    assert abs(norm_of_two / norm - 1) < 1e-3                                             # that step does not depend on the gradient's size
    parts, norm_of_parts = first_step([], tmp_path / "parts", "--accumulate", "2")        # other samples, but a step all the same
    assert moved(parts, start) > .01 and .5 < norm_of_parts / norm < 2
    assert distill.ranks() == (0, 1)
