"""The main job: train a slow bidirectional teacher, then distil it into a causal student of two steps.

    python distill.py --config tiny         # from nothing to out/tiny/sample.mp4, minutes on a laptop
    python distill.py --config small        # from a teacher in weights/small/ or --teacher PATH; else trains one first
    python distill.py --config small --stage teacher            # stop after the teacher (or init)
    python distill.py --config small --beta 0 --sync_window off      # every field of Config is an option

Stages: judge and syncnet (the lip-sync experts), teacher (flow matching), init (diffusion forcing), dmd (distribution matching
distillation with the sync window and the reward: student.pt). Each saves to out/CONFIG/ and is skipped when its result is there.
"""
import copy
import dataclasses
import functools
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist

import data
import model as nn_model
import runtime
import syncnet
from data import Fail
from model import SIZES, Cache, Cond, DenoisingLoss, DiT, model_fields, save_dit
from runtime import Log, Progress, ema, mean_over_ranks, mine, mixed, muon_and_adam, noise_like, optimizer_step, part_of, ranks, rate, refresh
from sample import TIMES, add_noise, closing_table, dub_student, dub_teacher, generate, guided, in_chunks, null_audio, shift, side_by_side, tau


@dataclasses.dataclass
class Config(nn_model.Config):
    config: str = "tiny"
    stage: str = "all"              # stop after the teacher, after init, or do all
    out: str = ""                   # out/CONFIG
    teacher: str = ""               # a teacher's checkpoint to distil from
    folder: str = ""                # train on the mp4s in this folder instead of drawn clips
    device: str = ""
    precision: str = ""             # float32 or bfloat16; what the device multiplies fastest if not given
    seed: int = 0
    # data
    clips: int = 700                # drawn clips in memory
    clip_latents: int = 30          # latent frames in each (4.8 s); references come from outside the part being learned
    latents: int = 12               # latent frames in a training sample (1.92 s; paper: 81 frames, 21 latents)
    eval_clips: int = 16            # for the curves
    table_clips: int = 16           # for the closing table
    # lip-sync experts
    sync_steps: int = 500
    sync_batch: int = 16
    judge_clips: int = 2000         # people at most that only the judge learns from
    # teacher
    coarse_steps: int = 0           # before these, with patches twice as large and t_shift's and weight_clip's defaults: timing at half of the price
    teacher_steps: int = 3000
    start: str = ""                 # a teacher's checkpoint to go on from: its weights, where the shapes are the same
    teacher_batch: int = 16
    teacher_lr: float = 1.5e-3      # AdamW's
    muon_lr: float = .02            # Muon's, for the matrices of the blocks
    t_shift: float = 5.             # training times are uniform, then shifted
    weight_clip: float = 2.         # loss in velocity space: 1 / t^2, at most this
    edges: float = 2.               # weight of differences of neighbouring pixels: rises in the second half (--start, after coarse_steps, init: throughout)
    view: float = .05               # weight of how differently the expert sees guess and truth: rises in the third quarter (--start: the first; paper: 0)
    audio_drop: float = .12         # clips told nothing, for guidance
    still: float = .2               # reference chunks that are one frame held still
    teacher_ema: float = .998
    # init (diffusion forcing); paper: 5,000 steps, lr 1e-5
    init_steps: int = 150
    init_batch: int = 16
    landing: int = 40               # j of the student's second step (paper: 30)
    student_steps: int = 2          # denoising calls a chunk (paper: 2); more of them divide the way to the landing
    cache: str = "clean"            # what the student's cache is written from: clean, a pass at t = 0 (paper), or last, the last denoising pass
    student_ema: float = .95
    init_clean: float = .5          # chunks shown as the cache will hold them, clean, for later ones to look back at (paper, and --cache last: 0)
    init_lr: float = 2e-4
    # dmd; paper: 600 student updates
    dmd_steps: int = 60             # student updates
    dmd_batch: int = 8
    student_lr: float = 2e-5        # paper: 2e-6 for both nets
    critic_lr: float = 4e-5
    critic_updates: int = 5         # critic updates to one of the student (paper: 5)
    dmd_shift: float = 1.5          # times at which teacher and critic are asked are uniform, then shifted: the lower, the sharper (paper: 5)
    dmd_edges: float = 6.           # and the same weight in DMD's gradient: the higher, the sharper (paper: 0)
    dmd_view: float = .3            # weight of how differently the expert sees dub and truth: keeps the mouth's shape while DMD sharpens (paper: 0)
    guidance: float = 2.            # teacher's, inside the window (paper: 4.5)
    sync_window: str = "on"         # teacher is guided in the window: on, off (no guidance), reversed, all (guided everywhere)
    band_first: int = 20            # j of the 50-step grid (paper: 20)
    band_last: int = 40             # (paper: 40)
    beta: float = 1.                # reward: weight exp(beta Sync-C) (paper: 2); 0 turns it off
    raw_weights: bool = False       # paper: True; False divides them by their mean over the batch
    save_seconds: int = 30          # between resumable checkpoints
    accumulate: int = 1             # a batch is run in this many parts, for less memory
    compile: str = "auto"           # torch.compile of teacher and critic in training: on, off, or auto: on for a GPU (on 2 CPU cores it does not pay)

    zero = (*nn_model.Config.zero, "coarse_steps")      # may be 0

    @property
    def times(self):
        return (TIMES[0], *(tau(self.landing * i / (self.student_steps - 1)) for i in range(1, self.student_steps)))


def down_to(last):
    """The fields of Config down to `last`, less those that say where, not what."""
    names = [f.name for f in dataclasses.fields(Config)]
    return [n for n in names[: names.index(last) + 1] if n not in ("stage", "out", "device", "precision", "teacher", "eval_clips", "table_clips")]


# The fields that a result depends on.
EXPERT = "size", "config", "folder", "seed", "clips", "clip_latents", "sync_steps", "sync_batch", "judge_clips"
DEPENDS = {"syncnet": EXPERT, "judge": EXPERT, "teacher": down_to("teacher_ema"), "init": ["teacher", *down_to("init_lr")],
           "student": ["teacher", *down_to("raw_weights")]}
DEPENDS["coarse"] = DEPENDS["teacher"]
# Fields that are a stage's own: with other values than the preset's, its bundled result is not used.
OWN = {"syncnet": ["sync_steps", "sync_batch"], "judge": ["sync_steps", "sync_batch", "judge_clips"],
       "teacher": "coarse_steps teacher_steps start teacher_batch teacher_lr muon_lr t_shift weight_clip audio_drop teacher_ema".split()}
PRESETS = {
    "tiny": dict(SIZES["tiny"], clips=192, table_clips=16, eval_clips=8, sync_steps=260, teacher_steps=1400, teacher_lr=3e-3, teacher_ema=.995,
                 init_steps=100, init_lr=5e-4, dmd_steps=30, dmd_view=0., student_lr=1e-4, critic_lr=2e-4, student_ema=.9),
    "small": dict(SIZES["small"], clips=5000, clip_latents=18, sync_steps=900, coarse_steps=3500, teacher_steps=4500, t_shift=3.5,
                  weight_clip=4., teacher_ema=.999, init_steps=400, dmd_steps=80),
    "base": dict(SIZES["base"], teacher_steps=40000, teacher_batch=32, teacher_lr=3e-4, teacher_ema=.9995, init_steps=1500,
                 dmd_steps=400, dmd_batch=16),
}


# -------------------------------------------------------------------------------------------------------------- teacher
def flow_loss(model, x0, cond, audio, t, weight_clip, edges=0.):
    """Flow matching with an x0 network, loss in velocity space: |v' - v|^2 = |x0' - x0|^2 / t^2, clipped. t (B, 1) -> the loss, and x0'."""
    x0_hat = model(add_noise(x0, noise_like(x0), t), t, cond, audio)
    return DenoisingLoss.apply(x0_hat, x0, (1 / t ** 2).clamp(max=weight_clip), edges, model), x0_hat


def seen_differently(reward, x0_hat, batch):
    """syncnet.view_loss of the guess against the truth, in the first half of the clips: that costs a tenth of a step."""
    half, p = slice(-(-len(x0_hat) // 2)), math.isqrt(x0_hat.shape[-1] // 12)
    return syncnet.view_loss(reward, *(data.picture(x[half], batch.source[half], p) for x in (x0_hat, batch.x0)))


def train_teacher(cfg, samples, reward, judge, watch, device, name="teacher", start=""):
    """Flow matching, from the ears of the reward network, or from what fits of `start`, or --start."""
    start = start or cfg.start
    torch.manual_seed(cfg.seed)
    rng = torch.Generator().manual_seed(cfg.seed)
    model = DiT(nn_model.Config(**model_fields(cfg))).to(device)
    model.hear.load_state_dict(reward.sound.state_dict())        # as the paper starts from an encoder of speech, wav2vec 2.0
    if start:
        own, theirs = model.state_dict(), nn_model.load_dit(start, device).state_dict()
        fits = {name: w for name, w in theirs.items() if name in own and w.shape == own[name].shape}
        model.load_state_dict({**own, **fits})
        print(f"teacher: {len(fits)} of {len(own)} weights are those of {start}", flush=True)
    average = copy.deepcopy(model).requires_grad_(False)
    muon, adam = muon_and_adam(model, cfg)
    progress = Progress(cfg, name, DEPENDS[name], rng, model=model, average=average, muon=muon, adam=adam)
    log, n = Log(cfg.out, name, cfg.teacher_steps, progress.step), part_of(cfg.teacher_batch, cfg)
    runtime.compile_in_place(model, cfg.compile, device)
    for step in range(progress.step + 1, cfg.teacher_steps + 1):
        for _ in range(cfg.accumulate):
            batch = samples.draw(n, rng, *ranks())
            t = mine(shift(torch.rand(n, 1, generator=rng), cfg.t_shift).clamp(min=.02)).to(device)
            drop = mine(torch.rand(n, generator=rng) < cfg.audio_drop).to(device)
            with mixed(device):
                cond, audio = model.embed_cond(batch.source, batch.reference), model.embed_audio(batch.heard, drop)
                late = min(1, max(0, 2 * step / cfg.teacher_steps - (not cfg.start)))     # 0 to 1 over the second half (--start: the first)
                loss, x0_hat = flow_loss(model, batch.x0, cond, audio, t, cfg.weight_clip, (1 if start else late) * cfg.edges)
                if late * cfg.view:
                    loss = loss + min(1, 2 * late) * cfg.view * seen_differently(reward, x0_hat, batch)
            (loss / cfg.accumulate).backward()
        pace = rate(step, cfg.teacher_steps)
        norm = optimizer_step(model, {muon: pace * cfg.muon_lr, adam: pace * cfg.teacher_lr})
        ema(average, model, cfg.teacher_ema, step)
        if step % max(1, cfg.teacher_steps // 4) == 0 and not ranks()[0]:
            dub = dub_teacher(average, watch.source, watch.mel, steps=10, guidance=cfg.guidance, latents=cfg.latents)
            log(step, loss=loss.item(), norm=norm, **syncnet.judged(dub, watch, judge, cfg.patch))
            log.curves()
        elif step % max(1, cfg.teacher_steps // 40) == 0 or step == progress.step + 5:
            log(step, loss=loss.item(), norm=norm)
        progress.save(step)
    save_dit(f"{cfg.out}/{name}.pt", average, cfg, "teacher", cfg.teacher_steps)
    log.curves(now=True)
    progress.done()


# ------------------------------------------------------------------------------------------------ init: diffusion forcing
def train_init(cfg, teacher, samples, reward, judge, watch, device):
    """The teacher's weights under causal attention; every chunk has its own noise level, one of the two of inference, or is clean."""
    torch.manual_seed(cfg.seed + 1)
    rng = torch.Generator().manual_seed(cfg.seed + 1)
    model, average = copy.deepcopy(teacher).train().requires_grad_(True), copy.deepcopy(teacher)
    model.cache_from = average.cache_from = cfg.cache
    optimizer = torch.optim.AdamW(model.parameters(), cfg.init_lr, betas=(.9, .98), weight_decay=.01, fused=True)
    progress = Progress(cfg, "init", DEPENDS["init"], rng, model=model, average=average, optimizer=optimizer)
    log, n, grid = Log(cfg.out, "init", cfg.init_steps, progress.step), part_of(cfg.init_batch, cfg), torch.tensor(cfg.times)
    for step in range(progress.step + 1, cfg.init_steps + 1):
        for _ in range(cfg.accumulate):
            batch = samples.draw(n, rng, *ranks())
            size = n, cfg.latents // cfg.chunk
            level, clean = mine(torch.randint(len(grid), size, generator=rng)), mine(torch.rand(size, generator=rng) < cfg.init_clean * (cfg.cache == "clean"))
            t = torch.where(clean, 0., grid[level]).repeat_interleave(cfg.chunk, 1).to(device)                 # B L
            with mixed(device):
                cond, audio = model.embed_cond(batch.source, batch.reference), model.embed_audio(batch.heard)
                x0_hat = model(add_noise(batch.x0, noise_like(batch.x0), t), t, cond, audio, causal=True)
                loss = DenoisingLoss.apply(x0_hat, batch.x0, (t > 0).float(), cfg.edges, model)
                if cfg.view:
                    loss = loss + cfg.view * seen_differently(reward, torch.where(t[..., None, None] > 0, x0_hat, batch.x0), batch)
            (loss / cfg.accumulate).backward()
        norm = optimizer_step(model, {optimizer: cfg.init_lr * rate(step, cfg.init_steps)})
        ema(average, model, cfg.student_ema, step)
        if step % max(1, cfg.init_steps // 4) == 0 and not ranks()[0]:
            log(step, loss=loss.item(), norm=norm, **syncnet.judged(dub_student(average, watch.source, watch.mel, cfg.times), watch, judge, cfg.patch))
            log.curves()
        progress.save(step)
    save_dit(f"{cfg.out}/init.pt", average, cfg, "init", cfg.init_steps)
    log.curves(now=True)
    progress.done()


# ------------------------------------------------------------------------------------------------------------------ dmd
def rollout(model, fast, cond, audio, call, times, device):
    """Self-forcing: the student's own clip (B, L, N, P), chunk by chunk as at inference, stopped at the drawn `call` in every
    chunk. Only that call carries gradient; all others run on `fast`, the same weights cast once, as at inference. cond, audio: the
    whole clip's, with gradient. (Where none is needed, `sample.generate` with times[: call + 1] does the same in fewer calls.)"""
    cache, outputs = Cache(model, len(cond.known), runtime.fast_dtype(device)), []
    for part, heard in in_chunks(cond, audio, model.cfg.chunk):
        still = Cond(*(c.detach() for c in part)), heard.detach()
        x = noise_like(part.known.float())
        for i in range(call):
            with torch.no_grad():
                x0 = fast(x, times[i], *still, cache=cache).float()
            x = add_noise(x0, noise_like(x0), times[i + 1])
        with mixed(device):
            x0 = model(x, times[call], part, heard, cache=cache).float()
        outputs.append(x0)
        kept, t = x0.detach(), 0.
        if fast.cache_from == "last":            # what goes into the last call; if the rollout stops earlier, this guess, noised as for that call
            if call < len(times) - 1:
                x = add_noise(kept, noise_like(x0), times[-1])
            kept, t = x, times[-1]
        with torch.no_grad():
            fast(kept, t, *still, cache=cache, store="finished")
        cache.advance()
    return torch.cat(outputs, 1)


def in_window(t, cfg):
    """(B,) times -> bool: is the teacher guided here? Paper Eq. 6: for j in [20, 40] of the grid, t in [.556, .882]."""
    inside = (t >= tau(cfg.band_last)) & (t <= tau(cfg.band_first))
    return {"on": inside, "off": torch.zeros_like(inside), "reversed": ~inside, "all": torch.ones_like(inside)}[cfg.sync_window]


@torch.no_grad()
def real_score(teacher, x_t, t, cond, audio, cfg):
    """The teacher's x0 (B, L, N, P), guided in the window only. t (B, 1)."""
    r, inside = torch.empty_like(x_t), in_window(t[:, 0], cfg)
    null = null_audio(teacher, audio.shape[1], len(audio))
    for rows, scale in ((inside, cfg.guidance), (~inside, 1.)):
        if rows.any():
            r[rows] = guided(teacher, x_t[rows], t[rows], Cond(*(c[rows] for c in cond)), audio[rows], null[rows], scale).float()
    return r


def dmd_gradient(fake, real, X):
    """g = (f - r) / mean |X - r|, the mean per sample. All (B, ...). Pixels outside the mask are equal in all three: they shrink this
    mean and the loss's by the same factor, which cancels."""
    return (fake - real) / (X - real).abs().flatten(1).mean(1).clamp(min=1e-6).view(-1, *[1] * (X.ndim - 1))


def sharpen(g, edges, model):
    """g (B, L, N, P) and, times `edges`, what its differences between neighbouring pixels and frames pull at, in the mask: DenoisingLoss's gradient at g. The
    fixed point stays where it was, at g = 0, but lips and teeth, which are small, are reached sooner."""
    with torch.enable_grad():
        g = g.detach().requires_grad_()
        loss = DenoisingLoss.apply(g, torch.zeros_like(g), g.new_ones(len(g), 1), edges, model)
    return torch.autograd.grad(loss, g)[0] * (g.numel() * model.mask.mean() / 2)         # so that without edges it is g


def dmd_loss(X, g, weight):
    """1/2 |X - sg(X - g)|^2, a sample at a time, weighted (B,).

    Its value means nothing; its gradient is what counts. X - g is held constant, so d/dX of half the square is
    X - (X - g) = g: the loss hands g to the student exactly as if g were the derivative of a loss in X,
    and a descent step moves X along -g = r - f, from what the critic expects towards what the teacher expects."""
    return (.5 * ((X - (X - g).detach()) ** 2).flatten(1).mean(1) * weight).mean()


@torch.no_grad()
def reward_weights(net, video, mel, cfg):
    """exp(beta Sync-C(video, audio)) of the reward network, without gradient -> weights (B,), Sync-C (B,)."""
    c, _, _ = syncnet.score(net, video, mel)
    w = (cfg.beta * c).exp()
    return (w if cfg.raw_weights else w / mean_over_ranks(w.mean())), c


def train_dmd(cfg, teacher, student, samples, reward, judge, watch, device):
    """Each iteration: the student dubs a batch, up to one of its calls, drawn by chance. Every `critic_updates`-th time the student is moved, by g, from the
    critic's guess towards the teacher's. And the critic, at first the teacher's copy, learns (flow matching) what the student makes now."""
    torch.manual_seed(cfg.seed + 2)
    rng = torch.Generator().manual_seed(cfg.seed + 2)
    student, average = student.train().requires_grad_(True), copy.deepcopy(student).requires_grad_(False)
    critic = copy.deepcopy(teacher).train().requires_grad_(True)
    # Without gradient, networks run on weights that are cast once instead of at every call.
    fast, teacher = (copy.deepcopy(net).to(runtime.fast_dtype(device)).eval().requires_grad_(False) for net in (student, teacher))
    adam = lambda net, lr: torch.optim.AdamW(net.parameters(), lr, betas=(0., .999), weight_decay=.01, fused=True)  # noqa: E731
    optimizer, critic_optimizer = adam(student, cfg.student_lr), adam(critic, cfg.critic_lr)
    iterations = cfg.dmd_steps * cfg.critic_updates
    progress = Progress(cfg, "student", DEPENDS["student"], rng, student=student, average=average, critic=critic,
                        optimizer=optimizer, critic_optimizer=critic_optimizer)
    log, n = Log(cfg.out, "dmd", cfg.dmd_steps, progress.step // cfg.critic_updates), part_of(cfg.dmd_batch, cfg)
    values, critic_losses = {}, []                               # those since the last line: each is of few samples, at times of chance
    draw_t = lambda: mine(shift(torch.rand(n, 1, generator=rng), cfg.dmd_shift).clamp(.001, .999)).to(device)               # noqa: E731
    runtime.compile_in_place(critic, cfg.compile, device)
    refresh(fast, student)
    for i in range(progress.step + 1, iterations + 1):
        student_turn, call = i % cfg.critic_updates == 0, torch.randint(len(cfg.times), (), generator=rng).item()
        for _ in range(cfg.accumulate):
            batch = samples.draw(n, rng, *ranks())
            net = student if student_turn else fast
            with torch.enable_grad() if student_turn else torch.no_grad(), mixed(device):
                cond, audio = net.embed_cond(batch.source, batch.reference), net.embed_audio(batch.heard)
            if not student_turn and cfg.cache == "clean":
                X = torch.cat(list(generate(fast, in_chunks(cond, audio, cfg.chunk), cfg.times[: call + 1], noise_like)), 1)
            else:
                X = rollout(net, fast, cond, audio, call, cfg.times, device)
            if student_turn:
                t = draw_t()
                with torch.no_grad(), mixed(device):
                    x_t = add_noise(X, noise_like(X), t)
                    real = real_score(teacher, x_t, t, teacher.embed_cond(batch.source, batch.reference), teacher.embed_audio(batch.heard), cfg)
                    fake = critic(x_t, t, critic.embed_cond(batch.source, batch.reference), critic.embed_audio(batch.heard)).float()
                weight, c = reward_weights(reward, data.picture(X.detach(), batch.source, cfg.patch), batch.mel, cfg)
                loss = dmd_loss(X, sharpen(dmd_gradient(fake, real, X.detach()), cfg.dmd_edges, student), weight)
                if cfg.dmd_view:                                 # as the first DMD's regression (arXiv 2311.18828), in the expert's eyes
                    with mixed(device):
                        loss = loss + cfg.dmd_view * seen_differently(reward, X, batch)
                (loss / cfg.accumulate).backward()
            t = draw_t()
            with mixed(device):
                cond, audio = critic.embed_cond(batch.source, batch.reference), critic.embed_audio(batch.heard)
                critic_loss, _ = flow_loss(critic, X.detach(), cond, audio, t, cfg.weight_clip)
            (critic_loss / cfg.accumulate).backward()
        if student_turn:
            values.update(loss=loss.item(), norm=optimizer_step(student, {optimizer: cfg.student_lr}), weight=(cfg.beta * c).exp().mean().item())
            ema(average, student, cfg.student_ema, i // cfg.critic_updates)
            refresh(fast, student)
        optimizer_step(critic, {critic_optimizer: cfg.critic_lr})
        critic_losses.append(critic_loss.item())
        step, values["critic_loss"] = i // cfg.critic_updates, sum(critic_losses) / len(critic_losses)
        if student_turn and step % max(1, cfg.dmd_steps // 6) == 0 and not ranks()[0]:
            dub = dub_student(average, watch.source, watch.mel, cfg.times)
            log(step, **values, **syncnet.judged(dub, watch, judge, cfg.patch), reward_c=syncnet.score(reward, dub, watch.mel)[0].mean().item())
            log.curves()
            critic_losses = []
        elif student_turn and step % max(1, cfg.dmd_steps // 30) == 0:
            log(step, **values)
            critic_losses = []
        progress.save(i)
    save_dit(f"{cfg.out}/student.pt", average, cfg, "student", cfg.dmd_steps)
    log.curves(now=True)
    progress.done()


# -------------------------------------------------------------------------------------------------------------- the job
def locate(name, cfg):
    """The checkpoint of a finished stage, or None: made here before; beside --teacher; bundled. Fail: made here with other settings."""
    here = Path(cfg.out) / f"{name}.pt"
    if name == "teacher" and cfg.teacher:
        data.need_file(cfg.teacher)
        return Path(cfg.teacher)
    before = Path(cfg.out) / {"teacher": "coarse.pt", "init": "teacher.pt", "student": "init.pt"}.get(name, "")
    for made in (here, here.with_suffix(".resume.pt")):
        if made.is_file() and before.is_file() and before.stat().st_mtime > made.stat().st_mtime:
            raise Fail(f"{made} was distilled from another {before.stem}; delete it, or choose another --out")
    if here.is_file():
        runtime.check_same(here, runtime.load(here, "syncnet" if name in ("syncnet", "judge") else "dit")["made_with"], cfg, DEPENDS[name])
        return here
    if name in ("teacher", "syncnet", "judge") and cfg.stage != name:
        beside, bundled = [Path(cfg.teacher).parent] if cfg.teacher else [], [Path(__file__).parent / "weights" / cfg.config]
        for folder in beside + (bundled if not cfg.folder or name == "judge" else []):          # which have only ever seen drawn people
            if (folder / f"{name}.pt").is_file():
                other = [f for f in OWN[name] if getattr(cfg, f) != PRESETS[cfg.config].get(f, getattr(Config, f))]
                if name == "teacher" and other:
                    raise Fail(f"--{other[0]} is for training a teacher, and one is there ({folder}/teacher.pt): train yours first, with this option and "
                               "--stage teacher, and name it by --teacher")
                return None if other else folder / f"{name}.pt"          # an expert of other settings is trained
    return None


def load_matching(path, cfg, device):
    """load_dit, and Fail if it is a network of another shape."""
    net = nn_model.load_dit(path, device).requires_grad_(False)
    for f, value in dataclasses.asdict(net.cfg).items():
        if value != getattr(cfg, f):
            raise Fail(f"{path}: {f} is {value} there and {getattr(cfg, f)} here; use the config that it was made with, or train a teacher of your own first "
                       "(--stage teacher)")
    return net


def coarse_config(cfg):
    """The settings of the coarse steps before a teacher's, which draw other samples; None if there are none."""
    return None if cfg.start or not cfg.coarse_steps else dataclasses.replace(
        cfg, patch=2 * cfg.patch, teacher_steps=cfg.coarse_steps, view=0., t_shift=Config.t_shift, weight_clip=Config.weight_clip, seed=cfg.seed + 30)


def set_up(cfg):
    """Check what argparse cannot, and join the other processes if torchrun started several -> device."""
    for name, words in (("stage", ("teacher", "init", "all")), ("cache", ("clean", "last")), ("compile", ("on", "off", "auto")),
                        ("sync_window", ("on", "off", "reversed", "all"))):
        if getattr(cfg, name) not in words:
            raise Fail(f"--{name} {getattr(cfg, name)}: {', '.join(words[:-1])} or {words[-1]}")
    if cfg.latents % cfg.chunk or not 0 < cfg.landing < 50 or not 0 <= cfg.band_first < cfg.band_last <= 50:
        raise Fail(f"--latents {cfg.latents} must be a multiple of --chunk {cfg.chunk}, --landing {cfg.landing} lie in 1..49, and 0 <= --band_first "
                   f"{cfg.band_first} < --band_last {cfg.band_last} <= 50")
    if cfg.clip_latents < cfg.latents + 2 * cfg.chunk - 1:
        raise Fail(f"--clip_latents {cfg.clip_latents}: at least {cfg.latents + 2 * cfg.chunk - 1}, for a reference outside --latents {cfg.latents}")
    cfg.out, cfg.teacher = cfg.out or f"out/{cfg.config}", cfg.teacher and str(Path(cfg.teacher))
    data.free_space(cfg.out, 500 << 20)
    if cfg.folder:
        data.mp4s(cfg.folder)                                    # Fail now
    runtime.keep_memory()
    runtime.join_others(cfg.device)
    with torch.device("meta"):
        for recipe in filter(None, (cfg, coarse_config(cfg))):
            DiT(nn_model.Config(**model_fields(recipe)))         # Fail now, not after the experts
    if cfg.start:
        nn_model.load_dit(cfg.start)
    if cfg.teacher and (was := nn_model.load_dit(cfg.teacher).stage) in ("init", "student"):
        raise Fail(f"--teacher {cfg.teacher}: its stage is {was}, and a causal student cannot teach; name a teacher.pt")
    for batch in (cfg.teacher_batch, cfg.init_batch, cfg.dmd_batch):
        part_of(batch, cfg)
    return runtime.find_device(cfg.device, cfg.precision)


def main(argv):
    cfg = data.options(Config, argv, __doc__, {name: dict(fields, config=name) for name, fields in PRESETS.items()})
    device = set_up(cfg)
    spent, dtype = {"data": 0.}, runtime.fast_dtype(device)
    print(f"{cfg.config} on {device}, {torch.get_num_threads()} threads, {str(dtype)[6:]}; results in {cfg.out}/", flush=True)
    if locate("teacher", cfg) is None and cfg.stage != "teacher":
        print(f"no teacher in weights/{cfg.config}/ and none named by --teacher: one is trained first; each line below says how long is left")

    @functools.cache
    def bank(split):
        begun = time.time()
        n, folder = (cfg.clips, cfg.folder) if split == "train" else (min(cfg.clips, cfg.judge_clips), "")
        clips = data.Bank(cfg.size, 4 * cfg.clip_latents, n, split, folder)
        spent["data"] += time.time() - begun
        print(f"data: {len(clips.video)} clips of {4 * cfg.clip_latents / data.FPS:.1f} s ({split}), {time.time() - begun:.0f} s", flush=True)
        return clips
    @functools.cache
    def samples():
        patches = data.Samples(bank("train"), cfg, device, dtype)
        bank.cache_clear()
        return patches
    def stage(name, train, cfg=cfg):
        """train(path) unless its result is there -> the path of the result."""
        path = locate(name, cfg)
        runtime.wait()
        if path is None:
            path, begun, drawing = f"{cfg.out}/{name}.pt", time.time(), spent["data"]
            train(path)
            runtime.wait()
            spent[name] = time.time() - begun - spent["data"] + drawing
        else:
            print(f"{name}: {path}", flush=True)
        return path
    def expert(name, split, seed):
        def train(path):
            if not ranks()[0]:
                syncnet.train(path, syncnet.Config(size=cfg.size), bank(split), cfg.sync_steps, cfg.sync_batch, seed, device,
                              data.Bank(cfg.size, 96, 32, "watch"), dataclasses.asdict(cfg))
        return syncnet.load_syncnet(stage(name, train), device)
    def network(name, train):
        return load_matching(stage(name, lambda path: train()), cfg, device)
    judge = expert("judge", "judge", cfg.seed + 20)
    bank.cache_clear()
    reward = expert("syncnet", "train", cfg.seed + 10)
    watch = data.held_out(cfg.eval_clips, cfg.size, "watch", device, 8 * cfg.chunk)
    def teach(cfg, **more):
        train_teacher(cfg, samples().cut(cfg.patch), reward, judge, watch, device, **more)
    first, coarse = coarse_config(cfg), ""
    if first and locate("teacher", cfg) is None:
        coarse = stage("coarse", lambda path: teach(first, name="coarse"), first)
    teacher = network("teacher", lambda: teach(cfg, start=coarse))
    if cfg.stage != "teacher":
        init = network("init", lambda: train_init(cfg, teacher, samples(), reward, judge, watch, device))
    if cfg.stage == "all":
        student = network("student", lambda: train_dmd(cfg, teacher, init, samples(), reward, judge, watch, device))
        if not ranks()[0]:
            side_by_side(f"{cfg.out}/sample.mp4", student, [data.dub_pair(i, 96, cfg.size) for i in range(3)], scale=max(1, 256 // cfg.size))
            closing_table(cfg, teacher, student, judge, device, spent)
            print(f"{cfg.out}/sample.mp4: source | dub | truth; {cfg.out}/curves.png, {cfg.out}/log.jsonl: how training went")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run(main)
