"""What the scripts run on: options, devices, optimizers, checkpoints, logs."""

import argparse
import ctypes
import dataclasses
import datetime
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_, vector_to_parameters

BUNDLED = Path(__file__).parent / "weights"
PRECISION = os.environ.get("PRECISION", "")  # "": what the device multiplies fastest
PRECISIONS = "of products, else what the device does fast", ("float32", "bfloat16")  # an option's
WHERE = "stage", "out", "fresh", "device", "precision", "compile"  # options that change no result


class Fail(Exception):
    """Something that the person at the keyboard can mend. Printed as one line; exit code 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Fail(f"{message}; --help lists the options")


def opt(default, help="", choices=None, least=1):
    """A dataclass field that is an option; `least` is the lowest whole number it may be."""
    metadata = dict(help=help, choices=choices, least=least)
    return dataclasses.field(default=default, metadata=metadata)


def options(cls, argv, usage, presets={}):
    """Command line -> cls, a dataclass whose fields are the options (`--beta 0`; hyphens do for
    underscores). With presets, {name: fields}, `--config NAME` picks one first."""
    parser = Parser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(cls):
        name, default = field.name, [str(field.default)]
        default += [f"{fields[name]} in {key}" for key, fields in presets.items() if name in fields]
        text = f"{field.metadata['help']} (default {', '.join(default)})".replace("%", "%%")
        how = dict(type=field.type, choices=field.metadata["choices"])
        how = dict(action="store_true") if field.type is bool else how
        flags = dict.fromkeys(["--" + name, "--" + name.replace("_", "-")])
        parser.add_argument(*flags, dest=name, default=argparse.SUPPRESS, help=text, **how)
    given = vars(parser.parse_args(argv))
    for field in dataclasses.fields(cls):
        if field.type is int and given.get(field.name, math.inf) < field.metadata["least"]:
            raise Fail(f"--{field.name} {given[field.name]} is too small")
    preset = presets[given.get("config", cls.config)] if presets else {}
    return cls(**preset | given)


def stop(number, frame):
    """End as Ctrl-C does: nothing half-written is left, and no child."""
    signal.signal(number, signal.SIG_IGN)  # clearing up takes a moment
    sys.exit(128 + number)


def run(main):
    """Run a script's main: a Fail is one line on stderr and exit code 2."""
    for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(number) == signal.SIG_DFL:  # not under nohup
            signal.signal(number, stop)
    try:
        main(sys.argv[1:])
    except (Fail, torch.OutOfMemoryError) as e:
        full = "the GPU's memory is full; fewer --clips, or a smaller batch"
        print(f"error: {e if isinstance(e, Fail) else full}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our frames has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def find_device(name="", precision=""):
    """The named device, or the best there is; `precision` overrules the environment's."""
    global PRECISION
    PRECISION = precision or PRECISION
    if not name:
        mac = torch.backends.mps.is_available() and not dist.is_initialized()
        name = "cuda" if torch.cuda.is_available() else "mps" if mac else "cpu"
    if PRECISION not in ("", *PRECISIONS[1]):
        raise Fail(f"PRECISION={PRECISION} in the environment: one of {', '.join(PRECISIONS[1])}")
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise Fail(f"--device {name}: {str(e).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where Triton and CUDA graphs run
    return device


def fast_dtype(device):
    """What the device multiplies fastest: bf16 on recent GPUs and on CPUs with AVX-512 BF16 or AMX,
    else float32 (a CPU with AVX2 alone needs 150 times as long for bf16)."""
    if PRECISION:
        return getattr(torch, PRECISION)
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        fast = has.get("avx512_bf16") or has.get("amx_tile")
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    return torch.bfloat16 if fast else torch.float32


def mixed(net):
    """Autocast to fast_dtype, unless the weights are in it. Its cache would cut off gradients."""
    weight = next(net.parameters())
    on = weight.dtype == torch.float32 and fast_dtype(weight.device) == torch.bfloat16
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=on, cache_enabled=False)


def synchronize(device):
    """Wait until the device has done what it was told, as a clock must."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def compiled(function, switch, device, steps):
    """torch.compile of a training step: on, or auto where that pays: a long stage on a GPU."""
    on = switch == "on" or switch == "auto" and device.type == "cuda" and steps >= 3000
    return torch.compile(function) if on else function


def keep_memory():
    """Let glibc keep freed memory: faulting it in again is a quarter of a CPU's training step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def ranks():
    """(this process's number, how many there are)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def shared_mean(x):
    """The mean of x over the processes; x is used up."""
    if ranks()[1] > 1:
        dist.all_reduce(x)
    return x / ranks()[1]


def generator(seed, device):
    """All random numbers of a stage, on this device; others for each process."""
    torch.manual_seed(seed)
    return torch.Generator(device).manual_seed(seed + 1000 * ranks()[0])


def join_others(device=""):
    """Meet the processes that torchrun started, each with a GPU unless `device` is cpu."""
    if "LOCAL_RANK" in os.environ:
        if gpu := torch.cuda.is_available() and device != "cpu":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        hours = datetime.timedelta(hours=2)  # the others wait while the first trains the experts
        dist.init_process_group("nccl" if gpu else "gloo", timeout=hours)
        if ranks()[0]:
            sys.stdout = open(os.devnull, "w")  # only the first one speaks


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (Jordan 2024): torch.optim.Muon's updates, but all matrices of a
    shape in one batched product, and not in bf16 where that is slow."""

    def __init__(self, matrices, lr):
        shapes = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        super().__init__([dict(params=group) for group in shapes.values()], dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices, lr = group["params"], group["lr"]
            gradient = torch.stack([matrix.grad for matrix in matrices])
            state = self.state[matrices[0]]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            momentum = state["momentum"].lerp_(gradient, 0.05)
            change = orthogonal(gradient.lerp(momentum, 0.95))  # Nesterov
            rows, columns = matrices[0].shape
            torch._foreach_mul_(matrices, 1 - 0.01 * lr)  # weight decay
            scale = lr * max(1, rows / columns) ** 0.5
            torch._foreach_add_(matrices, list(change.unbind()), alpha=-scale)


def orthogonal(x):
    """(n, rows, columns) -> all singular values brought near 1, by five Newton-Schulz steps."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x.to(fast_dtype(x.device))
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.float()


def adam_w(parameters, lr, betas):
    return torch.optim.AdamW(parameters, lr, betas=betas, weight_decay=0.01, fused=True)


def rate(step, steps):
    """Warm-up over a twentieth, then a cosine to a tenth."""
    return min(1, 20 * step / steps) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def update(net, rates):
    """Step each optimizer at its rate ({optimizer: rate}), by the gradient's mean over the
    processes, clipped at 1 -> its norm, a tensor: nothing here waits for the device."""
    if ranks()[1] > 1:
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        total = torch.cat([gradient.flatten() for gradient in gradients])
        vector_to_parameters(shared_mean(total), gradients)
    norm = clip_grad_norm_(net.parameters(), 1.0)
    for optimizer, lr in rates.items():
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    net.zero_grad()
    return norm


@torch.no_grad()
def ema(average, net, step, horizon):
    """average follows net over the last `horizon` steps; at the beginning over fewer."""
    share = min(1, max(1 / horizon, 9 / (10 + step)))
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), share)


def need_file(path):
    if not os.path.isfile(path):
        what = "a folder; name a file in it" if os.path.isdir(path) else "no such file"
        raise Fail(f"{path}: {what}")


def free_space(folder, need=64 << 20, instead="choose another --out"):
    """Make `folder`; Fail unless it can be written and has `need` bytes free."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise Fail(f"{folder}: cannot be written ({e.strerror}); {instead}") from None
    if (free := shutil.disk_usage(folder).free) < need:
        raise Fail(f"{folder}: {free >> 20} MB free, {need >> 20} needed; make room or {instead}")


def save(path, net=None, /, **state):  # a state may hold another `net`
    """torch.save beside `path`, then rename: never half a file. Weights of `net` in float16."""
    free_space(Path(path).parent)
    if net:
        # bf16, eight times as coarse, rounds away most of what DMD in float32 has moved.
        state["model"] = {name: value.half() for name, value in net.state_dict().items()}
    partial = Path(f"{path}.writing")
    try:
        torch.save(state, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:
        raise Fail(f"{path}: could not be saved ({str(e).splitlines()[0]}); make room") from None
    finally:
        partial.unlink(missing_ok=True)


def load(path, kind):
    """A checkpoint of this project -> dict. Fail: missing, broken, or of another kind."""
    need_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["kind"]
    except Exception as e:  # on a file that is none of ours torch.load raises almost anything
        why = f"({type(e).__name__}); delete it, or name another"
        raise Fail(f"{path}: no checkpoint of this project {why}") from None
    if found != kind:
        raise Fail(f"{path}: a checkpoint of kind {found}, where {kind} is needed")
    return state


def restore(path, build, weights):
    """build() with these weights -> a network. Fail: they are of another version of this code."""
    try:
        net = build()
        net.load_state_dict({name: value.float() for name, value in weights.items()})
    except (TypeError, RuntimeError) as e:
        what = f"made by other code ({str(e).splitlines()[-1].strip()[:150]})"
        raise Fail(f"{path}: {what}; distill.py --fresh makes everything anew") from None
    return net


def result(name, cfg, same_world, train):
    """The path of a stage's checkpoint: one that is there (made here before; beside --teacher;
    bundled, if nothing here was begun --fresh), unless of another drawn world or older than what it
    was made from; or train's."""
    here, begun = Path(cfg.out, f"{name}.pt"), time.time()
    resume, mark, places = here.with_suffix(".resume.pt"), here.with_name("begun-fresh"), [here]
    expert, given = name in ("judge", "syncnet"), name == "teacher" and cfg.teacher
    if expert and cfg.teacher:
        places.append(Path(cfg.teacher).with_name(here.name))
    if cfg.fresh:
        mark.touch()  # a run that goes on without --fresh takes nothing bundled either
    # The bundled ones have only seen drawn people; the judge of a --folder has, too.
    drawn = name == "judge" or (expert or name == "teacher") and not cfg.folder
    if drawn and not mark.exists():
        places.append(BUNDLED / cfg.config / here.name)
    made_of = dict(init=cfg.teacher or f"{cfg.out}/teacher.pt", student=f"{cfg.out}/init.pt")
    source = Path(made_of.get(name, "-"))
    since = source.stat().st_mtime if source.is_file() else 0
    if cfg.fresh or resume.is_file() and resume.stat().st_mtime < since:
        resume.unlink(missing_ok=True)
    if name == "teacher" and cfg.start:  # which is to be trained on
        places = [here]
    if cfg.fresh or resume.is_file():
        places = []
    if ranks()[1] > 1:
        dist.barrier()  # so that all see the same files
    for path in [Path(cfg.teacher)] if given else filter(Path.is_file, places):
        state = load(path, "syncnet" if expert else "dit")
        if path.stat().st_mtime < since:
            print(f"{name}: {path} is older than {source}: made anew")
        elif not given and not same_world(state.get("world")):
            print(f"{name}: {path} is of other drawn people or another log_mel: made anew")
        else:
            was = state.get("options", {}) if path == here else {}
            other = {k: v for k, v in was.items() if k not in WHERE and getattr(cfg, k, v) != v}
            made = ", made with" * bool(other) + "".join(f" --{k} {v}" for k, v in other.items())
            print(f"{name}: {path}{made} (--fresh makes everything anew)", flush=True)
            return path
    train(here)
    if ranks()[1] > 1:
        dist.barrier()  # until the file is there
    resume.unlink(missing_ok=True)
    print(f"{name}: {here}, {time.time() - begun:.0f} s", flush=True)
    return here


class Progress:
    """A stage's steps: `for step in progress`. Goes on where it was stopped, from STAGE.resume.pt
    (`parts`, which have a state_dict, and the random generator), and tells how it goes: a line on
    the screen, a JSON object in log.jsonl, curves.png."""

    def __init__(self, cfg, stage, steps, rng, **parts):
        self.stage, self.steps, self.rng, self.parts = stage, steps, rng, parts
        self.log, self.path = Path(cfg.out, "log.jsonl"), Path(cfg.out, f"{stage}.resume.pt")
        self.first, self.start, self.saved = 0, time.time(), time.time()
        self.options = {key: value for key, value in vars(cfg).items() if key not in WHERE}
        state = load(self.path, "resume") if self.path.is_file() else {}
        if state and state["options"] != self.options:
            print(f"{stage}: {self.path} is of other options: begun anew", flush=True)
        elif state:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.first = state["step"]
            rng.set_state(state["rng"])
            if ranks()[0]:  # the state is the first process's: draw others
                rng.manual_seed(cfg.seed + self.first + 1000 * ranks()[0])
            print(f"{stage}: going on after step {self.first} ({self.path})", flush=True)
        lines = self.log.read_text().splitlines() if self.log.is_file() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        # Without what an earlier run said of the steps to come.
        self.rows = [r for r in rows if r["stage"] != stage or r["step"] <= self.first]

    def __iter__(self):
        return iter(range(self.first + 1, self.steps + 1))

    def __call__(self, step, look, **values):
        """Tell `values` (tensors, which only here are waited for) forty times a stage, and look()
        -> more of them, four times (of a student ten times). Every half minute tell, save, and draw
        the curves. Fail: not finite; nothing is saved."""
        stride, due = max(1, self.steps // 40), time.time() - self.saved > 30
        if step % stride and step < self.steps and not due:
            return
        values = {name: value.item() for name, value in values.items()}
        if not all(map(math.isfinite, values.values())):
            advice = "run it again to go on from the last checkpoint, or with a lower learning rate"
            raise Fail(f"{self.stage} step {step}: not finite ({values}); {advice}")
        if ranks()[0]:
            return
        every = 4 if self.stage == "student" else 10
        if step % (every * stride) == 0 or step == self.steps:
            values |= look()
        spent = time.time() - self.start
        self.rows.append(dict(stage=self.stage, step=step, seconds=spent, **values))
        self.log.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        left = spent / (step - self.first) * (self.steps - step)
        words = " | ".join(f"{name} {value:.4g}" for name, value in values.items())
        words += f" | {spent:.0f} s, {left:.0f} left"
        print(f"{self.stage:8} step {step:5d}/{self.steps} | {words}", flush=True)
        if due:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state |= dict(step=step, options=self.options, rng=self.rng.get_state())
            save(self.path, kind="resume", **state)
            self.saved = time.time()
        if due or step == self.steps:
            self.curves()

    def curves(self):
        import matplotlib.pyplot as plt  # a second, which other commands need not wait

        figure, axes = plt.subplots(2, 4, figsize=(16, 6), layout="constrained")
        keys = "loss critic_loss sync_c reward_c frechet sharp psnr landmark".split()
        for axis, key in zip(axes.flat, keys):
            axis.set(title=key, xlabel="share of the stage")
            rows = [row for row in self.rows if key in row]
            for stage in dict.fromkeys(row["stage"] for row in rows):
                steps, values = zip(*((r["step"], r[key]) for r in rows if r["stage"] == stage))
                axis.plot([step / steps[-1] for step in steps], values, ".-", label=stage)
                axis.legend()
        figure.savefig(self.log.with_name("curves.png"), dpi=60)
        plt.close(figure)
