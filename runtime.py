"""What the scripts run on: processes, devices, checkpoints that are never half-written, runs that go on where they stopped, logs."""
import ctypes
import dataclasses
import datetime
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist

import data
from data import Fail

PRECISION = os.environ.get("PRECISION", "")          # float32 or bfloat16; "": what the device multiplies fastest

# ------------------------------------------------------------------------------------------------- one process or several
def ranks():
    """(this process's number, how many there are): torchrun starts several, else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_others(device=""):
    """If torchrun started several processes: meet them, each with a GPU of its own unless `device` says cpu. Only the first one speaks."""
    if "LOCAL_RANK" in os.environ:
        gpu, local = torch.cuda.is_available() and device != "cpu", int(os.environ["LOCAL_RANK"])
        if gpu and local >= torch.cuda.device_count():
            raise Fail(f"process {local + 1} of {torch.cuda.device_count()} GPUs: lower --nproc_per_node, or --device cpu")
        dist.init_process_group("nccl" if gpu else "gloo", timeout=datetime.timedelta(hours=2))      # the first one reads a folder, trains the experts
        if gpu:
            torch.cuda.set_device(local)
        if ranks()[0]:
            sys.stdout = open(os.devnull, "w")


def wait():
    """Until all processes are here."""
    if ranks()[1] > 1:
        dist.barrier()


def mine(x):
    """This process's share of a batch. All draw the whole from the same seed, so that any number of them takes the same step."""
    rank, world = ranks()
    return x[rank::world]


def noise_like(x):
    """Gaussian noise like x (B, ...), which is a share of a batch: likewise a share."""
    return mine(torch.randn(len(x) * ranks()[1], *x.shape[1:], device=x.device))


def mean_over_ranks(x):
    """The mean of a tensor over the processes, in place."""
    if ranks()[1] > 1:
        dist.all_reduce(x)
        x /= ranks()[1]
    return x


def part_of(batch, cfg):
    """Samples in one part of a batch, over all processes."""
    parts = cfg.accumulate * ranks()[1]
    if batch % parts:
        raise Fail(f"a batch of {batch} does not split into {parts} equal parts (--accumulate x processes)")
    return batch // cfg.accumulate


# ------------------------------------------------------------------------------------------------------------ optimizers
class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by five Newton-Schulz steps (Jordan 2024). torch.optim.Muon takes one matrix at a time and multiplies in bf16, which a CPU
    without bf16 does 150 times slower than float32; this one takes all matrices of a shape in one batched product, in what the device multiplies fastest."""

    def __init__(self, matrices, lr, weight_decay=.01):
        shapes = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        super().__init__([dict(params=group) for group in shapes.values()], dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices, lr = group["params"], group["lr"]
            gradient = torch.stack([matrix.grad for matrix in matrices])
            state = self.state[matrices[0]]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            state["momentum"].lerp_(gradient, .05)
            update = orthogonal(gradient.lerp(state["momentum"], .95))             # Nesterov
            rows, across = matrices[0].shape
            torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
            torch._foreach_add_(matrices, list(update.unbind(0)), alpha=-lr * max(1, rows / across) ** .5)


def orthogonal(matrices):
    """(n, rows, columns) float32 -> the same with all singular values near 1, by a quintic Newton-Schulz iteration."""
    x = matrices.to(fast_dtype(matrices.device))
    if x.shape[1] > x.shape[2]:
        return orthogonal(matrices.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.float()


def muon_and_adam(net, cfg):
    """Muon for the matrices of the blocks, where it learns in little over half the time; AdamW for the rest."""
    matrices = [p for block in net.blocks for name, p in block.named_parameters() if p.ndim == 2 and name != "modulation"]
    others = [p for p in net.parameters() if not any(p is m for m in matrices)]
    return Muon(matrices, cfg.muon_lr), torch.optim.AdamW(others, cfg.teacher_lr, betas=(.9, .98), weight_decay=.01, fused=True)


def rate(step, steps):
    """Warm-up over a twentieth, then a cosine to a tenth."""
    return min(1, step / (.05 * steps)) * (.55 + .45 * torch.tensor(step / steps * torch.pi).cos().item())


def optimizer_step(net, rates):
    """Average the gradient over the processes, clip it at 1, step each optimizer at its rate ({optimizer: rate}), clear. -> gradient norm.
    Fail, before any weight is touched: not finite."""
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    if ranks()[1] > 1:
        together = mean_over_ranks(torch.cat([g.flatten() for g in grads]))
        for g, part in zip(grads, together.split([g.numel() for g in grads])):
            g.copy_(part.view_as(g))
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.)
    if not norm.isfinite():
        raise Fail("the gradient is not finite; go on from the last checkpoint by running the same again, with a lower learning rate if it comes back")
    for optimizer, lr in rates.items():
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    net.zero_grad()
    return norm.item()


@torch.no_grad()
def ema(average, net, decay, step):
    """average <- decay average + (1 - decay) net; shorter at the beginning, when the weights are still far off."""
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - min(decay, (1 + step) / (10 + step)))


@torch.no_grad()
def refresh(fast, student):
    """fast <- student, cast."""
    torch._foreach_copy_(list(fast.parameters()), list(student.parameters()))


# -------------------------------------------------------------------------------------------------- devices, checkpoints
def find_device(name="", precision=""):
    """The named device, or the best there is (of several processes: a GPU each, or the CPU). A GPU becomes the current one. precision: float32 or
    bfloat16, to run in that instead of what the device multiplies fastest."""
    global PRECISION
    if precision not in ("", "float32", "bfloat16"):
        raise Fail(f"--precision {precision}: float32 or bfloat16")
    PRECISION = precision or PRECISION
    if name:
        try:
            device = torch.zeros(1, device=name).device
        except (RuntimeError, AssertionError) as e:
            raise Fail(f"--device {name}: {str(e).splitlines()[0]}") from None
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() and not dist.is_initialized() else "cpu")


def synchronize(device):
    """Until the device has done what it was told: what a clock must wait for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def fast_dtype(device):
    """What the hardware multiplies fastest: bf16 on any recent GPU and on CPUs with AVX-512 BF16 or AMX, else float32. --precision, or PRECISION in
    the environment, overrules it."""
    if PRECISION:
        return getattr(torch, PRECISION)
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_tile") else torch.float32
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32


def mixed(device):
    """Autocast to fast_dtype, where that is not float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_dtype(device) == torch.bfloat16)


def compile_in_place(net, switch, device):
    """torch.compile for training: on, off, or auto, for a GPU only, and only where there is what it needs."""
    if switch == "auto" and device.type == "cuda" and not (importlib.util.find_spec("triton") and any(map(shutil.which, ("cc", "gcc", "clang")))):
        print("torch.compile is left out: it needs Triton and a C compiler", flush=True)
    elif switch == "on" or switch == "auto" and device.type == "cuda":
        net.compile()


def keep_memory():
    """Let glibc keep freed memory. By default every large tensor is mapped anew and its pages are faulted in one by one: a
    quarter of a training step on a CPU."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        for option, value in ((-4, 0), (-1, 2 ** 31 - 1)):       # M_MMAP_MAX, M_TRIM_THRESHOLD
            libc.mallopt(option, value)


def save(path, **state):
    """torch.save under another name, then rename: never half a checkpoint."""
    data.free_space(os.path.dirname(path) or ".", 64 << 20)
    partial = f"{path}.writing"
    try:
        torch.save(state, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:
        raise Fail(f"{path}: could not be saved ({str(e).splitlines()[0]}); make room or choose another --out") from None
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def half(net):
    """A network's state as checkpoints keep it: in bf16, as it is run wherever the hardware can."""
    return {name: value.bfloat16() for name, value in net.state_dict().items()}


def load(path, kind):
    """A checkpoint of this project -> dict. Fail: missing, broken, or of another kind."""
    data.need_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["kind"]
    except Exception as e:  # torch.load raises anything from KeyError to UnpicklingError on a file that is none of ours
        what = "delete it and run again" if kind == "resume" else "make one with distill.py"
        raise Fail(f"{path}: not a checkpoint of this project ({type(e).__name__}); {what}") from None
    if found != kind:
        whose = {"dit": "a teacher or student", "syncnet": "a lip-sync expert", "resume": "half a training"}
        raise Fail(f"{path}: {whose.get(found, found)}, where {whose[kind]} is needed")
    return state


def restore(path, build, weights):
    """The network that build() makes, with these weights. Fail: they are of another version of this code."""
    try:
        net = build()
        net.load_state_dict({name: value.float() for name, value in weights.items()})
    except (TypeError, RuntimeError) as e:
        raise Fail(f"{path}: made by another version of this code ({str(e).splitlines()[-1].strip()[:150]}); make it again with distill.py") from None
    return net


class Progress:
    """What a stage needs to go on where it was stopped: networks, optimizers, step, random states. It depends on these fields of cfg."""

    def __init__(self, cfg, stage, fields, rng, **parts):
        self.path, self.rng, self.parts, self.cfg = Path(cfg.out) / f"{stage}.resume.pt", rng, parts, cfg
        self.saved, self.step = time.time(), 0
        if self.path.is_file():
            state = load(self.path, "resume")
            check_same(self.path, state["made_with"], cfg, [f for f in fields if not f.endswith("_lr")])     # a rate may have been too high
            for name, part in parts.items():
                part.load_state_dict(state[name])
            rng.set_state(state["rng"])
            for name, random in self.generators().items():       # all processes draw the same numbers, each on its own GPU
                if name in state["torch_rng"]:                   # else it was stopped on another kind of device
                    random.set_rng_state(state["torch_rng"][name])
            self.step = state["step"]
            print(f"{stage}: going on after step {self.step}")

    @staticmethod
    def generators():
        """What draws noise here: {name: module with get_rng_state and set_rng_state}."""
        every = dict(cpu=(torch, True), cuda=(torch.cuda, torch.cuda.is_available()), mps=(torch.mps, torch.backends.mps.is_available()))
        return {name: module for name, (module, here) in every.items() if here}

    def save(self, step):
        if time.time() - self.saved > self.cfg.save_seconds and not ranks()[0]:
            states = {name: random.get_rng_state() for name, random in self.generators().items()}
            save(self.path, kind="resume", step=step, made_with=dataclasses.asdict(self.cfg), rng=self.rng.get_state(), torch_rng=states,
                 **{name: part.state_dict() for name, part in self.parts.items()})
            self.saved = time.time()

    def done(self):
        if not ranks()[0]:
            self.path.unlink(missing_ok=True)


def check_same(path, was, cfg, fields):
    """Fail if what is in `path` was made with other settings in these fields of cfg."""
    for f in fields:
        if was.get(f) != getattr(cfg, f):
            raise Fail(f"{path} was made with --{f} {was.get(f)}, not {getattr(cfg, f)}; delete it, or choose another --out")


class Log:
    """One fixed-width line on the screen, one JSON object in log.jsonl, and curves.png."""

    def __init__(self, folder, stage, steps, first=0):
        self.path, self.folder, self.stage, self.steps, self.first, self.start = Path(folder) / "log.jsonl", folder, stage, steps, first, time.time()
        self.drawn = self.start
        if self.path.is_file() and not ranks()[0]:               # what an earlier run said of the steps to come is forgotten, and a line cut short
            rows = [r for r in map(json.loads, filter(lambda line: line.endswith("}\n"), open(self.path))) if r["stage"] != stage or r["step"] <= first]
            self.path.write_text("".join(json.dumps(r) + "\n" for r in rows))

    def __call__(self, step, **values):
        if ranks()[0]:
            return
        spent = time.time() - self.start
        left = spent / max(1, step - self.first) * (self.steps - step)
        with open(self.path, "a") as f:
            f.write(json.dumps(dict(stage=self.stage, step=step, seconds=round(spent, 4), **{k: round(v, 5) for k, v in values.items()})) + "\n")
        if not all(abs(v) < float("inf") for v in values.values()):
            raise Fail(f"{self.stage} step {step}: a value is not finite ({values}); lower the learning rate. The last good checkpoint is kept.")
        print(f"{self.stage:8} step {step:5d}/{self.steps} | " + " | ".join(f"{k} {v:8.4g}" for k, v in values.items())
              + f" | {spent:5.0f} s, {left:5.0f} s left", flush=True)

    def curves(self, now=False):
        """Draw curves.png anew, `now` or if it has not been for 20 seconds: it takes one."""
        if ranks()[0] or time.time() - self.drawn < 20 and not now:
            return
        self.drawn = time.time()
        rows = [json.loads(line) for line in open(self.path)]
        figure, axes = plt.subplots(2, 4, figsize=(16, 6), layout="constrained")
        titles = dict(loss="loss", norm="gradient norm", critic_loss="critic's loss", sharp="sharp (the truth: 1)",
                      sync_c="Sync-C by the judge", reward_c="Sync-C by the reward network", psnr="mouth PSNR (dB)", landmark="landmark error (%)")
        for axis, key in zip(axes.flat, titles):
            for i, stage in enumerate(dict.fromkeys(r["stage"] for r in rows)):
                points = [(r["step"] / max(q["step"] for q in rows if q["stage"] == stage), r[key]) for r in rows if r["stage"] == stage and key in r]
                if points:
                    axis.plot(*zip(*points), label=stage, color=f"C{i}", marker="." if len(points) < 40 else None)
            axis.set(title=titles[key], xlabel="share of the stage")
            if axis.lines:
                axis.legend()
        figure.savefig(Path(self.folder) / "curves.png", dpi=60)
        plt.close(figure)
