"""What the scripts run on: options, devices, optimizers, checkpoints, and the training loop."""

import argparse
import ctypes
import dataclasses
import json
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch.nn.utils import clip_grad_norm_

BUNDLED = Path(__file__).parent / "weights"
Precision = Literal["auto", "float32", "bfloat16"]
precision = "auto"  # what --precision says, for the whole process; auto: what the device does fast
# Options that change a result by rounding at most.
WHERE = "stage", "out", "fresh", "device", "precision", "compile"
SAVE_SECONDS = 30  # between two states of a training that a stopped run goes on from


class UserError(Exception):
    """An error that the user can fix. Printed as one line; exit code 2."""


def options(cls, argv, usage, presets={}):
    """Command line -> cls, a dataclass whose fields are the options (`--beta 0`) and the comments
    beside them their help. With presets, {name: fields}, `--config NAME` picks the defaults."""
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--config")
    chosen, _ = chooser.parse_known_args(argv)
    default = cls(**presets.get(chosen.config, {}))
    style = (tyro.conf.FlagCreatePairsOff,)  # --fresh, and no --no-fresh
    return tyro.cli(
        cls, args=argv, default=default, description=usage, use_underscores=True, config=style
    )


def stop(number, frame):
    """End as Ctrl-C does: nothing half-written is left, and no child."""
    signal.signal(number, signal.SIG_IGN)  # clearing up takes a moment
    sys.exit(128 + number)


def run(main):
    """Run a script's main: a UserError, and what the system refuses (a disk that is full, a GPU
    without memory), is one line on stderr and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):  # neither closed nor a notebook's
        sys.stdout.reconfigure(errors="replace")  # what it cannot show, such as ± in ASCII, is ?
    for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(number) == signal.SIG_DFL:  # not under nohup
            signal.signal(number, stop)
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # whoever read our frames has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError, torch.OutOfMemoryError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def find_device(name="", dtype="auto"):
    """The named device, or the best there is. `dtype` is what --precision says: from here on it
    is what the whole process multiplies in."""
    global precision
    if dtype != "auto":
        precision = dtype
    if not name:
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    try:
        device = torch.zeros(1, device=name.lower()).device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name}: {str(e).splitlines()[0]}") from None
    if device.type not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device {name}: choose cuda, mps or cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where Triton and CUDA graphs run
    return device


def fast_dtype(device):
    """What --precision says, else what the device multiplies fastest: bf16 on recent GPUs and on
    CPUs with AVX-512 BF16 or AMX, else float32 (a CPU with AVX2 alone needs 150 times as long for
    bf16)."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        fast = has.get("avx512_bf16") or has.get("amx_tile")
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    return torch.bfloat16 if fast else torch.float32


def autocast(net):
    """Autocast to fast_dtype, unless the weights are in it. Its cache is off: weights that were
    cast without gradient would be used again where a gradient is needed."""
    weight = next(net.parameters())
    on = weight.dtype == torch.float32 and fast_dtype(weight.device) == torch.bfloat16
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=on, cache_enabled=False)


def synchronize(device):
    """Wait until the device has done what it was told, as a clock must."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def clock(frames_of, device):
    """Time an iterable of uint8 frames (n, S, S, 3): (frames a second, seconds to the first frame).
    Pixels and samples are in memory when the clock starts; everything from there to uint8 frames in
    host memory is included."""
    synchronize(device)
    start = time.perf_counter()
    first = None
    count = 0
    for frames in frames_of:
        frames.cpu()
        if first is None:
            first = time.perf_counter() - start
        count += len(frames)
    return count / (time.perf_counter() - start), first


def compiled(function, switch, device, steps):
    """torch.compile of a training step: on, or auto where that pays: a long stage on a GPU."""
    pays = device.type == "cuda" and steps >= 3000
    if switch == "on" or (switch == "auto" and pays):
        return torch.compile(function)
    return function


def keep_memory():
    """Let glibc keep freed memory: to ask for it again takes a quarter of a CPU's training step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def step_seed(seed, stage, step):
    """The seed of the random numbers of one step of a stage, a word. Since a step's do not depend
    on those of the steps before, a stopped run needs no generator's state to go on."""
    stage = int.from_bytes(stage.encode(), "big")
    return int(np.random.SeedSequence([seed, stage, step]).generate_state(1)[0])


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
            matrices = group["params"]
            lr = group["lr"]
            gradient = torch.stack([matrix.grad for matrix in matrices])
            state = self.state[matrices[0]]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            momentum = state["momentum"].lerp_(gradient, 0.05)
            change = newton_schulz(gradient.lerp(momentum, 0.95))  # Nesterov
            rows, columns = matrices[0].shape
            torch._foreach_mul_(matrices, 1 - 0.01 * lr)  # weight decay
            scale = lr * max(1, rows / columns) ** 0.5
            torch._foreach_add_(matrices, list(change.unbind()), alpha=-scale)


def newton_schulz(x):
    """(n, rows, columns) -> all singular values brought near 1, by five Newton-Schulz steps."""
    if x.shape[1] > x.shape[2]:
        return newton_schulz(x.mT).mT
    x = x.to(fast_dtype(x.device))
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.float()


def adam_w(parameters, lr, betas):
    return torch.optim.AdamW(parameters, lr, betas=betas, weight_decay=0.01, fused=True)


def learning_rate(peak, step, steps):
    """Warm-up to `peak` over a twentieth of the steps, then a cosine to a tenth of it."""
    warm_up = min(1, 20 * step / steps)
    return peak * warm_up * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def optimizer_step(net, learning_rates):
    """Step each optimizer ({optimizer: its learning rate}) by the gradient, clipped at 1 -> its
    norm, a tensor: nothing here waits for the device."""
    norm = clip_grad_norm_(net.parameters(), 1.0)
    for optimizer, lr in learning_rates.items():
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    net.zero_grad()
    return norm


@torch.no_grad()
def update_ema(ema, net, step):
    """ema follows net, as the mean of its weights over about the last ninth of the steps so far."""
    share = min(1, 9 / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), share)


def need_file(path):
    if not os.path.isfile(path):
        what = "a folder; name a file in it" if os.path.isdir(path) else "no such file"
        if "://" in str(path):
            what = "an address; only files of this computer are read, so download it first"
        raise UserError(f"{path}: {what}")


def make_folder(folder):
    """Make `folder`; UserError unless it can be written."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        what = f"cannot be written ({e.strerror}); choose another --out"
        raise UserError(f"{folder}: {what}") from None


def save(path, **state):
    """torch.save beside `path`, then rename: never half a file."""
    make_folder(Path(path).parent)
    partial = Path(f"{path}.writing")
    try:
        torch.save(state, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:
        raise UserError(
            f"{path}: could not be saved ({str(e).splitlines()[0]}); make room"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def load(path, kind):
    """A checkpoint of this project -> dict. UserError: missing, broken, or of another kind."""
    need_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["kind"]
    except Exception as e:  # on a file that is none of ours torch.load raises almost anything
        why = f"({type(e).__name__}); delete it, or name another"
        raise UserError(f"{path}: not a checkpoint of this project {why}") from None
    if found != kind:
        raise UserError(f"{path}: a checkpoint of kind {found}, where {kind} is needed")
    return state


def save_net(path, net, **about):
    """A checkpoint of a network, with what is to be remembered of it. Weights in float16: bf16,
    eight times as coarse, rounds away most of what DMD in float32 has moved."""
    weights = {name: value.half() for name, value in net.state_dict().items()}
    config = dataclasses.asdict(net.cfg)
    save(path, kind=type(net).__name__.lower(), config=config, model=weights, **about)


def load_net(path, network, device="cpu", dtype=torch.float32):
    """A checkpoint -> a network of this class, model.DiT or syncnet.SyncNet, in evaluation mode.
    UserError: other code has made it."""
    state = load(path, network.__name__.lower())
    try:
        config = state["model_config"] if "model_config" in state else state["config"]
        net = network(network.Config(**config))
        net.load_state_dict({name: value.float() for name, value in state["model"].items()})
    except (TypeError, AssertionError, KeyError, RuntimeError) as e:
        what = f"made by other code ({str(e).splitlines()[-1].strip()[:150]})"
        raise UserError(f"{path}: {what}; distill.py --fresh makes everything anew") from None
    net.stage = state.get("stage", "")
    return net.to(device, dtype).eval().requires_grad_(False)


def find_weights(name, given=""):
    """The path of a checkpoint: the given one, or the bundled one called `name`."""
    return given or BUNDLED / f"small/{name}.pt"


def find(name, *folders):
    """The path of NAME.pt in the first of these folders that holds one, which is printed; None if
    there is none. A folder that is "" is left out."""
    for folder in folders:
        path = Path(folder, f"{name}.pt")
        if folder and path.is_file():
            print(f"{name}: {path}", file=sys.stderr, flush=True)
            return path
    return None


def result_options(cfg):
    """The options that change a result."""
    return {name: value for name, value in vars(cfg).items() if name not in WHERE}


def resume_path(cfg, stage):
    """Where a stage keeps the state that a stopped run goes on from."""
    return Path(cfg.out, f"{stage}.resume.pt")


class Training:
    """What all training loops share, before and after the step itself:

        run = Training(cfg, "init", steps, parts, device, evaluate)
        for step, rng in run:
            ...
            run.log(loss=loss)

    `parts`, {name: what has a state_dict}, are saved every SAVE_SECONDS to --out, and a stopped run
    goes on from there, if the options are the same. Each step's random numbers are its own. At 40
    of the steps `log` tells the screen and log.jsonl the losses, and at each `evaluate_every`th of
    these 40 and at the end what evaluate() returns, {measure: number}."""

    def __init__(self, cfg, stage, steps, parts, device, evaluate, evaluate_every=10):
        self.cfg = cfg
        self.stage = stage
        self.steps = steps
        self.parts = parts
        self.evaluate = evaluate
        self.log_every = max(1, steps // 40)
        self.evaluate_every = evaluate_every * self.log_every
        self.rng = torch.Generator(device)
        self.first = self.go_on()
        self.start = self.saved = time.time()

    def __iter__(self):
        for step in range(self.first, self.steps + 1):
            self.step = step
            self.rng.manual_seed(step_seed(self.cfg.seed, self.stage, step))
            yield step, self.rng
        draw_curves(self.cfg)

    def log(self, **losses):
        """The end of a step. losses: tensors, which are only waited for where they are told."""
        is_last = self.step == self.steps
        save_now = time.time() - self.saved > SAVE_SECONDS
        if self.step % self.log_every == 0 or is_last or save_now:
            values = self.finite(losses)
            if self.step % self.evaluate_every == 0 or is_last:
                values |= self.evaluate()
            self.tell(values)
        if save_now:
            self.save()
            draw_curves(self.cfg)
            self.saved = time.time()

    def finite(self, losses):
        """Tensors -> the same as numbers. UserError: one of them is not finite."""
        numbers = {name: value.item() for name, value in losses.items()}
        if not all(map(math.isfinite, numbers.values())):
            advice = "run it again to go on from the last checkpoint, or with a lower learning rate"
            what = f"{self.stage} step {self.step}: not finite ({numbers})"
            raise UserError(f"{what}; {advice}")
        return numbers

    def tell(self, values):
        """A line on the screen, and a JSON object at the end of log.jsonl."""
        elapsed = time.time() - self.start
        left = elapsed / (self.step - self.first + 1) * (self.steps - self.step)
        row = dict(stage=self.stage, step=self.step, seconds=elapsed, **values)
        with open(Path(self.cfg.out, "log.jsonl"), "a") as file:
            file.write(json.dumps(row) + "\n")
        words = " | ".join(f"{name} {value:.4g}" for name, value in values.items())
        times = f"{elapsed:.0f} s, {left:.0f} left"
        print(f"{self.stage:8} step {self.step:5d}/{self.steps} | {words} | {times}", flush=True)

    def save(self):
        states = {name: part.state_dict() for name, part in self.parts.items()}
        options = result_options(self.cfg)
        path = resume_path(self.cfg, self.stage)
        save(path, kind="resume", step=self.step, options=options, **states)

    def go_on(self):
        """Put the state that a stopped run has left into the parts -> the step to go on with; 1 if
        there is none, or one of other options."""
        path = resume_path(self.cfg, self.stage)
        if not path.is_file():
            return 1
        state = load(path, "resume")
        if state["options"] != result_options(self.cfg):
            print(f"{self.stage}: {path} is of other options: begun anew", flush=True)
            return 1
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        print(f"{self.stage}: going on after step {state['step']} ({path})", flush=True)
        return state["step"] + 1


def save_figure(figure, path, dpi):
    """Save a figure as a PNG beside `path`, then rename: never half a file."""
    partial = Path(f"{path}.writing")
    try:
        figure.savefig(partial, dpi=dpi, format="png")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_log(path):
    """log.jsonl -> {stage: its rows}. A run that went on from an earlier step, or began anew,
    replaces what was said before of the steps from there on."""
    stages = {}
    with open(path) as file:
        for line in file:
            row = json.loads(line)
            earlier = [old for old in stages.get(row["stage"], []) if old["step"] < row["step"]]
            stages[row["stage"]] = [*earlier, row]
    return stages


def draw_curves(cfg):
    """log.jsonl -> curves.png beside it."""
    import matplotlib.pyplot as plt  # a second, which other commands need not wait

    stages = read_log(Path(cfg.out, "log.jsonl"))
    figure, axes = plt.subplots(2, 4, figsize=(16, 6), layout="constrained")
    keys = "loss critic_loss sync_c reward_c frechet sharpness psnr landmark".split()
    for axis, key in zip(axes.flat, keys):
        axis.set(title=key, xlabel="share of the stage")
        for stage, rows in stages.items():
            rows = [row for row in rows if key in row]
            if rows:
                shares = [row["step"] / rows[-1]["step"] for row in rows]
                axis.plot(shares, [row[key] for row in rows], ".-", label=stage)
                axis.legend()
    save_figure(figure, Path(cfg.out, "curves.png"), dpi=60)
    plt.close(figure)
