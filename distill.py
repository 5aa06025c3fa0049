"""The main job: train a slow bidirectional teacher, then distil it into a two-step causal student.

    python distill.py --config tiny         # from nothing to out/tiny/sample.mp4, minutes
    python distill.py --config small        # a student of the teacher in weights/small
    python distill.py --config small --fresh --stage teacher    # a teacher of your own

Stages: judge and syncnet (the lip-sync experts), teacher (flow matching), init (diffusion forcing),
dmd (distribution matching distillation with the sync window and the reward -> student.pt). Each
saves to out/CONFIG/. What is there already is used, and said so; --fresh makes everything anew.
"""

import copy
import dataclasses
import functools
import os
import time

import numpy as np
import torch
import torch.distributed as dist

import data
import faces
import media
import model as nn_model
import runtime
import sample
import syncnet
from data import to_float, to_pixels, to_tokens
from faces import same_world
from model import DiT, denoising_loss, load_dit, network_of, save_dit, seconds_a_pass
from runtime import Fail, Progress, adam_w, compiled, ema, mixed, opt, ranks, rate, update
from sample import add_noise, dub_student, guided, noise_like, rollout, shift, student_times, tau
from syncnet import means, reward_weights

AUDIO_DROP = 0.12  # of the teacher's clips are told nothing, for guidance
INIT_CLEAN = 0.5  # of init's chunks are clean, as the cache will hold them (paper: 0)
LOWEST = 0.02  # time that the teacher learns from, and is asked at in DMD (paper: .001)
JUDGE_CLIPS, TABLE_CLIPS = 800, 16  # people at most that the judge learns from; in the last table


@dataclasses.dataclass
class Config(nn_model.Config):
    config: str = opt("tiny", "preset", ("tiny", "small"))
    stage: str = opt("all", "stop after this one", ("teacher", "init", "all"))
    out: str = opt("", "folder; out/CONFIG if not given")
    fresh: bool = opt(False, "use no result that is there, in out/ or weights/")
    teacher: str = opt("", "a teacher's checkpoint to distil from")
    folder: str = opt("", "train on the mp4s in this folder instead of drawn clips")
    device: str = opt("", "cuda, mps or cpu; the best there is if not given")
    precision: str = opt("", *runtime.PRECISIONS)
    compile: str = opt("auto", "training; auto: long stages on a GPU", ("on", "off", "auto"))
    seed: int = opt(0, "of weights, noise and batches", least=0)
    clips: int = opt(700, "drawn clips in memory")
    latents: int = opt(12, "latent frames of a sample, 1.92 s (paper: 21)")
    batch: int = opt(16, "the teacher's and init's")
    sync_steps: int = opt(500, "of each lip-sync expert")
    teacher_steps: int = opt(3000, "of flow matching")
    start: str = opt("", "a teacher's checkpoint to go on from, with the new expert's ears")
    teacher_lr: float = opt(1.5e-3, "AdamW's")
    muon_lr: float = opt(0.02, "Muon's, for the matrices of the blocks")
    t_shift: float = opt(5.0, "training times are uniform, then shifted")
    weight_clip: float = opt(2.0, "loss in velocity space: 1 / t^2, at most this")
    edges: float = opt(2.0, "weight of differences between pixels; rises in the second half")
    view: float = opt(0.05, "weight of the expert's view; rises in the third quarter (paper: 0)")
    init_steps: int = opt(150, "of diffusion forcing (paper: 5,000)")
    init_lr: float = opt(2e-4, "(paper: 1e-5)")
    dmd_steps: int = opt(60, "student updates (paper: 600)")
    dmd_batch: int = opt(8, "clips that the student dubs at a time")
    student_lr: float = opt(2e-5, "(paper: 2e-6)")
    critic_lr: float = opt(1e-4, "(paper: 2e-6)")
    critic_updates: int = opt(5, "to one of the student (paper: 5)")
    dmd_shift: float = opt(1.5, "as t_shift: the lower, the sharper (paper: 5)")
    dmd_view: float = opt(0.3, "weight of the expert's view: keeps the mouth's shape (paper: 0)")
    guidance: float = opt(2.0, "the teacher's in DMD, where --sync_window says (paper: 4.5)")
    sync_window: str = opt("on", "where it is guided", ("on", "off", "reversed", "all"))
    band_first: int = opt(20, "j of the 50-step grid where the window begins (paper: 20)", least=0)
    band_last: int = opt(40, "and ends (paper: 40)")
    beta: float = opt(20.0, "reward: a clip weighs exp(beta Sync-C); 0: off (paper: 2, at 10 x C)")


PRESETS = {
    "tiny": dict(
        size=32, width=96, heads=3, clips=192, sync_steps=500, teacher_steps=1200, teacher_lr=3e-3,
        init_steps=100, init_lr=5e-4, dmd_steps=45, dmd_view=0.0, student_lr=1e-4, critic_lr=2e-4,
    ),
    "small": dict(
        size=128, depth=6, clips=300, sync_steps=700, teacher_steps=7400, t_shift=3.5,
        weight_clip=4.0, init_steps=60, dmd_steps=24, dmd_view=0.1, student_lr=4e-5,
        critic_lr=1.5e-4, guidance=1.5, sync_window="all",
    ),
}  # fmt: skip


def times_like(batch, s, rng, lowest):
    """(B, 1) times from `lowest` to .999, uniform, then shifted by s."""
    u = torch.rand(len(batch.source), 1, generator=rng, device=rng.device)
    return shift(u, s).clamp(lowest, 0.999)


def embed(net, batch, drop=None):
    return net.embed(to_float(batch.source), to_float(batch.reference), batch.heard, drop)


def target(batch):
    """The mouth rectangle (B, T, S/2, 3S/4, 3) in [-1, 1]: what is to be generated."""
    return to_float(batch.source.chunk(2, 2)[1])


def look_at(student, watch, judge):
    return means(dub_student(student, watch.source, watch.mel), watch, judge)


def minutes(cfg, device):
    """Roughly what the job takes here: a clip drawn and a pass are timed, and passes counted, with
    factors for what goes backward that came out right. The experts are left out."""
    bundled = f"{runtime.BUNDLED}/{cfg.config}/teacher.pt"
    anew = cfg.folder or cfg.start or os.path.exists(f"{cfg.out}/begun-fresh")
    found = map(os.path.isfile, (f"{cfg.out}/teacher.pt", "" if anew else bundled))
    teacher_too = not cfg.teacher and (cfg.fresh or not any(found))
    passes = 3 * cfg.batch * cfg.teacher_steps if teacher_too else 0
    if cfg.stage != "teacher":
        passes += 5 * cfg.batch * cfg.init_steps
    if cfg.stage == "all":
        passes += 7 * (cfg.critic_updates + 1) * cfg.dmd_batch * cfg.dmd_steps
        passes += 24 / cfg.latents * sample.STEPS * TABLE_CLIPS
    n = 4 if device.type == "cpu" else min(32, cfg.batch)
    one = seconds_a_pass(network_of(cfg), cfg.latents, device, n)
    begun = time.time()
    faces.draw(0, 4 * data.CLIP_LATENTS, cfg.size, device=device)
    return (cfg.clips * (time.time() - begun) + passes * one) / 60


def seen_differently(reward, x0, batch, cfg):
    """syncnet.view_loss of a guess x0 against the truth, in half of the clips: that costs a tenth
    of a step."""
    half = slice(-(-len(x0) // 2))
    return syncnet.view_loss(reward, to_pixels(x0[half], cfg.patch), target(batch)[half])


def flow_loss(net, x0, noise, t, cond, cfg, edges=None):
    """Flow matching by a network that predicts x0, loss in velocity space: |v' - v|^2 =
    |x0' - x0|^2 / t^2, clipped. t (B, 1) -> the loss, and x0'."""
    guess = net(add_noise(x0, noise, t), t, cond)
    weight = (1 / t**2).clamp(max=cfg.weight_clip)
    return denoising_loss(net, guess, x0, weight, edges), guess


def teacher_loss(net, reward, batch, noise, t, drop, cfg, edges, view):
    x0 = to_tokens(target(batch), cfg.patch)
    loss, guess = flow_loss(net, x0, noise, t, embed(net, batch, drop), cfg, edges)
    if view is not None:
        loss = loss + view * seen_differently(reward, guess, batch, cfg)
    return loss


def train_teacher(cfg, clips, reward, judge, watch):
    """Flow matching, starting from the ears of the lip-sync expert (the paper: wav2vec 2.0)."""
    device, steps, B = clips.video.device, cfg.teacher_steps, cfg.batch // ranks()[1]
    rng = runtime.generator(cfg.seed, device)
    net = DiT(network_of(cfg)).to(device)
    if cfg.start:
        net.load_state_dict(load_dit(cfg.start).state_dict())
    net.hear.load_state_dict(reward.sound.state_dict())
    average = copy.deepcopy(net).requires_grad_(False)
    # Muon for the matrices of the blocks, where it learns in little over half the time.
    matrices = [p for n, p in net.blocks.named_parameters() if p.ndim == 2 and "mod" not in n]
    others = [p for p in net.parameters() if not any(p is matrix for matrix in matrices)]
    muon, adam = runtime.Muon(matrices, cfg.muon_lr), adam_w(others, cfg.teacher_lr, (0.9, 0.98))
    parts = dict(net=net, average=average, muon=muon, adam=adam)
    progress = Progress(cfg, "teacher", steps, rng, **parts)
    loss_of = compiled(teacher_loss, cfg.compile, device, steps)

    def look():
        how = dict(steps=10, guidance=cfg.guidance, latents=cfg.latents)
        return means(sample.dub_teacher(average, watch.source, watch.mel, **how), watch, judge)

    for step in progress:
        # Timing first. What the expert sees comes in from 0 to 1 in the third quarter, edges in the
        # second half; half the training earlier if it starts from another teacher's weights.
        late = min(1.0, max(0.0, 2 * step / steps - (not cfg.start)))
        edges = torch.full((), late * cfg.edges, device=device)
        view = torch.full((), min(1.0, 2 * late) * cfg.view, device=device)
        if late == 0 and loss_of is teacher_loss:
            view = None  # spares a tenth of a step; a second graph would take as long to compile

        batch = clips.draw(B, cfg, rng)
        noise = torch.randn(B, cfg.latents, *net.mask.shape, generator=rng, device=device)
        t = times_like(batch, cfg.t_shift, rng, LOWEST)
        drop = torch.rand(B, generator=rng, device=device) < AUDIO_DROP
        with mixed(net):
            loss = loss_of(net, reward, batch, noise, t, drop, cfg, edges, view)
        loss.backward()
        pace = rate(step, steps)
        norm = update(net, {muon: pace * cfg.muon_lr, adam: pace * cfg.teacher_lr})
        ema(average, net, step, steps / 6)
        progress(step, look, loss=loss, norm=norm)
    return average


def student_of(net, cfg):
    """A network of the same weights, with this config's chunk, window and times."""
    student = DiT(network_of(cfg)).to(net.head.weight.device)
    student.load_state_dict(net.state_dict())
    return student


def init_loss(net, reward, batch, noise, t, cfg):
    """In x0, not in velocity: only two noise levels are left, and both guesses count alike (1 / t^2
    would weigh the landing three times the start, and the clean chunks infinitely)."""
    x0 = to_tokens(target(batch), cfg.patch)
    guess = net(add_noise(x0, noise, t), t, embed(net, batch), causal=True)
    noisy = (t > 0).float()
    loss = denoising_loss(net, guess, x0, noisy, cfg.edges)
    guess = torch.where(noisy[..., None, None] > 0, guess, x0)
    return loss + cfg.view * seen_differently(reward, guess, batch, cfg)


def train_init(cfg, teacher, clips, reward, judge, watch):
    """The teacher's weights under causal attention: every chunk has its own noise level, one of the
    student's two, or is clean, as the cache will hold it."""
    device, steps, B = clips.video.device, cfg.init_steps, cfg.batch // ranks()[1]
    rng = runtime.generator(cfg.seed + 1, device)
    net = student_of(teacher, cfg)
    average = copy.deepcopy(net).requires_grad_(False)
    adam = adam_w(net.parameters(), cfg.init_lr, (0.9, 0.98))
    progress = Progress(cfg, "init", steps, rng, net=net, average=average, adam=adam)
    look = functools.partial(look_at, average, watch, judge)
    loss_of = compiled(init_loss, cfg.compile, device, steps)
    levels = torch.tensor(student_times(cfg), device=device)

    for step in progress:
        batch = clips.draw(B, cfg, rng)
        noise = torch.randn(B, cfg.latents, *net.mask.shape, generator=rng, device=device)
        shape = B, cfg.latents // cfg.chunk
        level = levels[torch.randint(len(levels), shape, generator=rng, device=device)]
        clean = torch.rand(shape, generator=rng, device=device) < INIT_CLEAN
        t = torch.where(clean, 0.0, level).repeat_interleave(cfg.chunk, 1)  # B L
        with mixed(net):
            loss = loss_of(net, reward, batch, noise, t, cfg)
        loss.backward()
        norm = update(net, {adam: cfg.init_lr * rate(step, steps)})
        ema(average, net, step, steps / 12)
        progress(step, look, loss=loss, norm=norm)
    return average


def teacher_guidance(t, cfg):
    """(B, 1) times -> (B,): how far the teacher is guided there. The window (paper Eq. 6): j in
    [20, 40] of the grid, t in [.556, .882]. Nearer to noise there is no mouth yet to be moved,
    nearer to the picture it is settled: guidance there would only exaggerate it."""
    inside = ((t >= tau(cfg.band_last)) & (t <= tau(cfg.band_first)))[:, 0]
    guide = dict(on=inside, off=inside & False, reversed=~inside, all=inside | True)
    return torch.where(guide[cfg.sync_window], cfg.guidance, 1.0)


def dmd_gradient(fake, real, X):
    """g = (f - r) / mean |X - r|, the mean per sample. All (B, L, N, P). The mean here and the
    one in the loss both count the known pixels, where all is 0: the count cancels."""
    size = (X - real).abs().flatten(1).mean(1).clamp(min=1e-6)
    return (fake - real) / size.view(-1, 1, 1, 1)


def dmd_loss(X, g, weight):
    """1/2 |X - sg(X - g)|^2, a sample at a time, weighted (B,). Its value means nothing; its
    gradient is what counts. X - g is held constant, so d/dX of half the square is X - (X - g) = g:
    a descent step moves X along -g = r - f, from what the critic expects towards what the teacher
    expects, as if g were the derivative of a loss."""
    return (0.5 * (X - (X - g).detach()).square().flatten(1).mean(1) * weight).mean()


def student_loss(cfg, X, batch, teacher, critic, reward, rng):
    """Move the dubs X by what the critic and the teacher, shown the same noisy X, differ in -> the
    loss, and X's mean Sync-C."""
    with torch.no_grad():
        t = times_like(batch, cfg.dmd_shift, rng, LOWEST)
        x_t = add_noise(X, noise_like(X, rng), t)
        real = guided(teacher, x_t, t, embed(teacher, batch), teacher_guidance(t, cfg)).float()
        fake = critic(x_t, t, embed(critic, batch)).float()
        g = dmd_gradient(fake, real, X)
        weight, c = reward_weights(reward, to_pixels(X, cfg.patch), batch.mel, cfg.beta)
    loss = dmd_loss(X, g, weight)
    if cfg.dmd_view:  # as the first DMD's regression (arXiv 2311.18828), in the expert's eyes
        loss = loss + cfg.dmd_view * seen_differently(reward, X, batch, cfg)
    return loss, c


def train_dmd(cfg, teacher, init, clips, reward, judge, watch):
    """Distribution matching: the student dubs; every `critic_updates`-th time it is moved from the
    critic's guess towards the teacher's; the critic learns (flow matching) what it makes now."""
    device, steps, B = clips.video.device, cfg.dmd_steps, cfg.dmd_batch // ranks()[1]
    rng = runtime.generator(cfg.seed + 2, device)
    student, critic = student_of(init, cfg), copy.deepcopy(teacher).train().requires_grad_(True)
    average = copy.deepcopy(student).requires_grad_(False)
    adam = adam_w(student.parameters(), cfg.student_lr, (0.0, 0.999))
    critic_adam = adam_w(critic.parameters(), cfg.critic_lr, (0.0, 0.999))
    parts = dict(student=student, critic=critic, adam=adam, critic_adam=critic_adam)
    progress = Progress(cfg, "student", steps, rng, average=average, **parts)
    look = functools.partial(look_at, average, watch, judge)
    critic_loss_of = compiled(flow_loss, cfg.compile, device, steps * cfg.critic_updates)

    for step in progress:
        for turn in range(1, cfg.critic_updates + 1):
            students_turn = turn == cfg.critic_updates
            batch = clips.draw(B, cfg, rng)

            # The student dubs the batch, up to one of its calls, drawn by chance.
            chance = np.random.default_rng([cfg.seed, step, turn])
            call = int(chance.integers(cfg.student_steps))
            with torch.set_grad_enabled(students_turn), mixed(student):
                X = rollout(student, embed(student, batch), call, rng)

            # The last of these turns trains the student ...
            if students_turn:
                with mixed(student):
                    loss, c = student_loss(cfg, X, batch, teacher, critic, reward, rng)
                loss.backward()
                norm = update(student, {adam: cfg.student_lr})
                ema(average, student, step, steps / 4)

            # ... and every turn the critic.
            X = X.detach()
            t = times_like(batch, cfg.dmd_shift, rng, LOWEST)
            with mixed(critic):
                cond = embed(critic, batch)
                critic_loss, _ = critic_loss_of(critic, X, noise_like(X, rng), t, cond, cfg)
            critic_loss.backward()
            update(critic, {critic_adam: cfg.critic_lr})
        progress(step, look, critic_loss=critic_loss, loss=loss, norm=norm, reward_c=c)
    return average


def set_up(cfg):
    """Check what argparse cannot, and meet the other processes -> device."""
    most = data.CLIP_LATENTS - 2 * cfg.chunk  # which leaves room for a reference
    if cfg.latents % cfg.chunk or cfg.latents > most:
        raise Fail(f"--latents {cfg.latents}: a multiple of --chunk {cfg.chunk}, at most {most}")
    if not 0 < cfg.landing < 50 or not cfg.band_first < cfg.band_last <= 50:
        raise Fail("--landing must lie in 1..49, and --band_first before --band_last, up to 50")
    cfg.out = cfg.out or f"out/{cfg.config}"
    runtime.free_space(cfg.out, 500 << 20)
    DiT(network_of(cfg))  # Fail now, not after the experts
    if cfg.folder:
        media.mp4s(cfg.folder)
    for path in filter(None, (cfg.teacher, cfg.start)):
        if load_dit(path, like=cfg).stage != "teacher":
            raise Fail(f"{path}: a causal student cannot teach; name a teacher.pt")
    runtime.keep_memory()
    runtime.join_others(cfg.device)
    if cfg.batch % ranks()[1] or cfg.dmd_batch % ranks()[1]:
        raise Fail(f"{ranks()[1]} processes do not share a batch of {cfg.batch} or {cfg.dmd_batch}")
    return runtime.find_device(cfg.device, cfg.precision)


def closing_table(cfg, teacher, student, judge, device):
    """Held-out people dubbed to other words, by the teacher and by the student."""
    pairs = faces.held_out(TABLE_CLIPS, cfg.size, "held-out", device, 24 // cfg.chunk * cfg.chunk)
    how = dict(source=pairs.source, mel=pairs.mel)
    dubs = {"truth": pairs.truth}
    dubs["teacher, 50 steps, unguided"] = sample.dub_teacher(teacher, latents=cfg.latents, **how)
    dubs[f"student, {cfg.student_steps} steps a chunk"] = dub_student(student, **how)
    print(
        f"\n{TABLE_CLIPS} held-out people, dubbed to other words, and a judge that trains nothing:"
    )
    rows = {name: means(dub, pairs, judge) for name, dub in dubs.items()}
    syncnet.table("", rows, dict(sync_c=3, psnr=2, landmark=2, sharp=2, frechet=2))
    clip = faces.dub_pair(0, pairs.source.shape[1], cfg.size)[1]
    for _ in range(2):  # the first warms up
        fps, ttff = sample.clock(sample.stream(student, clip.video, clip.audio), device)
    print(f"The student streams {fps:.0f} frames a second, the first after {1000 * ttff:.1f} ms.")


def main(argv):
    cfg = runtime.options(Config, argv, __doc__, PRESETS)
    device = set_up(cfg)
    dtype = runtime.fast_dtype(device)
    where = f"{cfg.config} on {device}, {torch.get_num_threads()} threads, {str(dtype)[6:]}"
    about = f"about {max(1, minutes(cfg, device)):.0f} minutes in all"
    print(f"{where}; results in {cfg.out}/; {about}", flush=True)
    keep = dict(world=faces.world(), options=dataclasses.asdict(cfg))
    watch = faces.held_out(8, cfg.size, "watch", device, 24 // cfg.chunk * cfg.chunk)

    @functools.cache
    def clips(split):
        n = min(cfg.clips, JUDGE_CLIPS) if split == "judge" else cfg.clips
        begun, folder = time.time(), "" if split == "judge" else cfg.folder
        frames = 4 * data.CLIP_LATENTS
        if folder:
            found = media.recorded(folder, cfg.size, frames)
        else:
            found = faces.drawn_clips(split, cfg.size, frames, device)
        made = data.Clips(found, n, cfg.size, device)
        print(f"data: {len(made.video)} clips ({split}), {time.time() - begun:.0f} s", flush=True)
        return made

    def expert(name, split, seed):
        def train(path):
            if ranks()[0] == 0:
                expert_cfg = syncnet.Config(size=cfg.size)
                syncnet.train(path, expert_cfg, clips(split), cfg.sync_steps, seed, watch, **keep)

        return syncnet.load_syncnet(runtime.result(name, cfg, same_world, train), device)

    def network(name, train, *nets):
        def make(path):
            net = train(cfg, *nets, clips("train"), reward, judge, watch)
            save_dit(path, net, name, **keep)

        return load_dit(runtime.result(name, cfg, same_world, make), device, like=cfg)

    judge = expert("judge", "judge", cfg.seed + 20)
    clips.cache_clear()  # nothing else may see the judge's people
    reward = expert("syncnet", "train", cfg.seed + 10)
    teacher = network("teacher", train_teacher)
    if cfg.stage != "teacher":
        init = network("init", train_init, teacher)
    if cfg.stage == "all":
        student = network("student", train_dmd, teacher, init).to(dtype)
        if ranks()[0] == 0:
            pairs = [faces.dub_pair(i, 96, cfg.size) for i in range(3)]
            sample.side_by_side(f"{cfg.out}/sample.mp4", student, pairs)
            closing_table(cfg, teacher.to(dtype), student, judge, device)
            print(f"{cfg.out}/sample.mp4: source | dub | truth; curves.png: how training went")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    runtime.run(main)
