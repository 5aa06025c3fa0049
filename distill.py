"""The main job: train a slow bidirectional teacher, then distil it into a two-step causal student.

    python distill.py                       # tiny, from nothing to out/tiny/sample.mp4, minutes
    python distill.py --config small        # a student of the teacher in weights/small
    python distill.py --config small --fresh --stage teacher    # a teacher of your own

Stages: judge and syncnet (the judge of dubs and the reward expert), teacher (flow matching), init
(diffusion forcing), student (distribution matching distillation with the guidance band and the
reward). Each saves its checkpoint to out/CONFIG/. One that is there already is used, and a line
says so; --fresh makes everything anew.
"""

import copy
import dataclasses
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import data
import faces
import media
import metrics
import model
import runtime
import syncnet
from data import to_float, to_pixels, to_tokens
from flow import (
    add_noise,
    denoising_loss,
    denoising_times,
    flow_loss,
    grid_time,
    guided,
    noise_like,
    shift_time,
)
from model import DiT, network_of
from runtime import (
    Muon,
    Precision,
    Training,
    UserError,
    adam_w,
    autocast,
    compiled,
    learning_rate,
    load_net,
    optimizer_step,
    step_seed,
    update_ema,
)
from stream import dub_stream, dub_student, dub_teacher, in_chunks, rollout
from syncnet import SyncNet, reward_weights, token_perceptual_loss

AUDIO_DROP = 0.12  # share of the teacher's clips whose sound is withheld, for guidance
LOWEST = 0.02  # the smallest t in the teacher's training and in DMD (paper: .001)
JUDGE_CLIPS = 800  # people at most that the judge learns from
TABLE_CLIPS = 16  # people in the last table
LATER = {"teacher": ("init", "student"), "init": ("student",)}  # what is made from a stage


@dataclasses.dataclass
class Config(model.Config):
    config: Literal["tiny", "small"] = "tiny"  # the preset that the options start from
    stage: Literal["teacher", "init", "all"] = "all"  # the last stage to run
    out: str = ""  # the folder of results; out/CONFIG if not given
    source: str = ""  # the folder whose judge, syncnet and teacher serve where --out has none
    fresh: bool = False  # train every stage, even where a checkpoint is there
    folder: str = ""  # a folder of mp4s to train on, instead of drawn people
    device: str = ""  # cuda, mps or cpu; the best that there is if not given
    precision: Precision = "auto"  # number type of matrix products; auto: the device's fastest
    compile: Literal["on", "off", "auto"] = "auto"  # torch.compile; auto: in long stages on a GPU
    seed: int = 0  # the number that weights, noise and batches are drawn from

    # Data.
    clips: int = 400  # training clips in memory; more people make a better network
    latents: int = 12  # latent frames of a training sample, .16 s each (paper: 21)
    batch: int = 16  # samples in a step of the teacher and of init

    # The lip-sync experts and the teacher.
    sync_steps: int = 500  # training steps of the judge and of the reward expert
    teacher_steps: int = 1200  # training steps of the teacher
    start: str = ""  # the checkpoint of a teacher to train on, keeping its audio encoder
    teacher_lr: float = 3e-3  # learning rate of AdamW, for the teacher's other weights
    muon_lr: float = 0.02  # learning rate of Muon, for the matrices of the teacher's blocks
    t_shift: float = 5.0  # shift of the teacher's training times; more: nearer to noise
    weight_clip: float = 2.0  # highest weight of the loss, which is 1 / t^2 below that
    edges: float = 2.0  # weight of differences between neighbouring pixels; more: crisper
    perceptual_weight: float = 0.05  # of the perceptual loss; more: more in sync (paper: 0)

    # Init: diffusion forcing.
    init_steps: int = 100  # training steps of init (paper: 5,000)
    init_lr: float = 5e-4  # learning rate of init (paper: 1e-5)

    # DMD.
    dmd_steps: int = 45  # updates of the student; more: sharper, then too sharp (paper: 600)
    dmd_batch: int = 8  # clips that the student dubs in an update
    student_lr: float = 1e-4  # learning rate of the student (paper: 2e-6)
    critic_lr: float = 2e-4  # learning rate of the critic (paper: 2e-6)
    critic_updates: int = 5  # updates of the critic to one of the student (paper: 5)
    dmd_shift: float = 1.5  # shift of the times in DMD; less: sharper (paper: 5)
    guidance_scale: float = 2.0  # of the teacher in DMD; more: in sync, less real (paper: 4.5)
    # Where the teacher is guided: in the band, nowhere, outside it, at all times.
    guidance_band: Literal["on", "off", "reversed", "all"] = "on"
    band_first: int = 20  # step j, of 50, at which the band begins (paper: 20)
    band_last: int = 40  # step j, of 50, at which the band ends (paper: 40)
    beta: float = 20.0  # a clip weighs exp(beta Sync-C), on whose scale the paper's 2 is 20 here


PRESETS = {
    "tiny": {},  # the defaults
    "small": dict(
        size=128,
        width=256,
        depth=6,
        heads=4,
        source=str(runtime.BUNDLED / "small"),
        clips=300,
        sync_steps=700,
        teacher_steps=7400,
        teacher_lr=1.5e-3,
        t_shift=3.5,
        weight_clip=4.0,
        init_steps=60,
        init_lr=2e-4,
        dmd_steps=80,
    ),
}


def sample_times(B, shift, rng):
    """(B, 1) times from LOWEST to .999, uniform, then shifted."""
    u = torch.rand(B, 1, generator=rng, device=rng.device)
    return shift_time(u, shift).clamp(LOWEST, 0.999)


def embed(net, batch, drop=None):
    return net.embed(to_float(batch.source), to_float(batch.reference), batch.heard, drop)


def noise_of(net, batch, rng):
    """Noise (B, L, N, P) for the mouths of a batch."""
    B, T = batch.source.shape[:2]
    return torch.randn(B, T // 4, *net.token_shape, generator=rng, device=rng.device)


def target(batch):
    """The mouth rectangle (B, T, S/2, 3S/4, 3) in [-1, 1]: what is to be generated."""
    _, mouth = batch.source.chunk(2, 2)  # the upper and the lower half of the picture's rows
    return to_float(mouth)


def evaluate_teacher(teacher, val, judge, cfg):
    """The measures of its dubs, guided and in 10 steps."""
    dub = dub_teacher(
        teacher, val.source, val.mel, steps=10, guidance=cfg.guidance_scale, latents=cfg.latents
    )
    return metrics.means(dub, val, judge)


def evaluate_student(student, val, judge):
    """The measures of its dubs."""
    return metrics.means(dub_student(student, val.source, val.mel), val, judge)


def teacher_loss(net, expert, batch, noise, t, drop, cfg, edges, perceptual_weight):
    """flow_loss and, times a weight, the perceptual loss -> a number."""
    truth = target(batch)
    x0 = to_tokens(truth, cfg.patch)
    loss, pred = flow_loss(net, x0, noise, t, embed(net, batch, drop), cfg.weight_clip, edges)
    perceptual = token_perceptual_loss(expert, pred, truth, cfg.patch)
    return loss + perceptual_weight * perceptual


def train_teacher(cfg, clips, expert, judge, val):
    """Flow matching. The audio encoder starts as the reward expert's (the paper: wav2vec 2.0)."""
    device = clips.video.device
    steps = cfg.teacher_steps
    torch.manual_seed(cfg.seed)  # of the weights
    net = DiT(network_of(cfg)).to(device)
    if cfg.start:
        net.load_state_dict(load_net(cfg.start, DiT).state_dict())
    else:
        net.audio_encoder.load_state_dict(expert.audio_encoder.state_dict())
    ema = copy.deepcopy(net).requires_grad_(False)

    # Muon for the matrices of the blocks, where it learns in little over half the time.
    matrices = []
    for name, parameter in net.blocks.named_parameters():
        if parameter.ndim == 2 and "modulation" not in name:
            matrices.append(parameter)
    in_muon = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in net.parameters() if id(parameter) not in in_muon]
    muon = Muon(matrices, cfg.muon_lr)
    adam = adam_w(others, cfg.teacher_lr, betas=(0.9, 0.98))

    loss_of = compiled(teacher_loss, cfg.compile, device, steps)
    parts = dict(net=net, ema=ema, muon=muon, adam=adam)
    run = Training(
        cfg, "teacher", steps, parts, device, lambda: evaluate_teacher(ema, val, judge, cfg)
    )
    for step, rng in run:
        # Timing first: the loss on edges is ramped up over the second half, the perceptual loss
        # over the third quarter. A teacher that is trained on has learned timing already. (Both are
        # tensors, since a compiled step is compiled again for each new number.)
        late = 1.0 if cfg.start else max(0.0, 2 * step / steps - 1)
        edges = torch.full((), late * cfg.edges, device=device)
        perceptual = torch.full((), min(1.0, 2 * late) * cfg.perceptual_weight, device=device)

        batch = clips.sample_batch(cfg.batch, cfg, rng)
        noise = noise_of(net, batch, rng)
        t = sample_times(cfg.batch, cfg.t_shift, rng)
        drop = torch.rand(cfg.batch, generator=rng, device=device) < AUDIO_DROP
        with autocast(net):
            loss = loss_of(net, expert, batch, noise, t, drop, cfg, edges, perceptual)
        loss.backward()
        muon_lr = learning_rate(cfg.muon_lr, step, steps)
        adam_lr = learning_rate(cfg.teacher_lr, step, steps)
        norm = optimizer_step(net, {muon: muon_lr, adam: adam_lr})
        update_ema(ema, net, step)
        run.log(loss=loss, norm=norm)
    return ema


def student_of(net, cfg):
    """A network of the same weights, with this config's chunk, window and times."""
    student = DiT(network_of(cfg)).to(net.final_layer.weight.device)
    student.load_state_dict(net.state_dict())
    return student


def init_loss(net, expert, batch, noise, t, cfg):
    """The loss at the student's times, t (B, L) -> a number. In x0, not in velocity: the times are
    few, and all predictions count alike (1 / t^2 would weigh the landing three times the start).
    """
    truth = target(batch)
    x0 = to_tokens(truth, cfg.patch)
    pred = net(add_noise(x0, noise, t), t, embed(net, batch), causal=True)
    loss = denoising_loss(net, pred, x0, torch.ones_like(t), cfg.edges)
    perceptual = token_perceptual_loss(expert, pred, truth, cfg.patch)
    return loss + cfg.perceptual_weight * perceptual


def train_init(cfg, teacher, clips, expert, judge, val):
    """Diffusion forcing: the teacher's weights under causal attention, where every chunk has its
    own noise level, one of the student's."""
    device = clips.video.device
    steps = cfg.init_steps
    net = student_of(teacher, cfg)
    ema = copy.deepcopy(net).requires_grad_(False)
    adam = adam_w(net.parameters(), cfg.init_lr, betas=(0.9, 0.98))
    loss_of = compiled(init_loss, cfg.compile, device, steps)
    levels = torch.tensor(denoising_times(cfg), device=device)
    parts = dict(net=net, ema=ema, adam=adam)
    run = Training(cfg, "init", steps, parts, device, lambda: evaluate_student(ema, val, judge))
    for step, rng in run:
        batch = clips.sample_batch(cfg.batch, cfg, rng)
        noise = noise_of(net, batch, rng)
        shape = cfg.batch, cfg.latents // cfg.chunk
        level = levels[torch.randint(len(levels), shape, generator=rng, device=device)]
        t = level.repeat_interleave(cfg.chunk, 1)  # B L
        with autocast(net):
            loss = loss_of(net, expert, batch, noise, t, cfg)
        loss.backward()
        norm = optimizer_step(net, {adam: learning_rate(cfg.init_lr, step, steps)})
        update_ema(ema, net, step)
        run.log(loss=loss, norm=norm)
    return ema


def teacher_guidance(t, cfg):
    """Times (B, 1) -> the scale (B,) by which the teacher is guided there.

    The guidance band (the paper's sync window, Eq. 6) is j in [20, 40] of the grid, t in [.556,
    .882]. The paper's reason: nearer to noise guidance distorts, nearer to the picture the lips are
    settled. (What it does in this world: analysis.py trajectory, and the rows of ablate.)"""
    inside = ((t >= grid_time(cfg.band_last)) & (t <= grid_time(cfg.band_first)))[:, 0]
    if cfg.guidance_band == "off":
        inside = torch.zeros_like(inside)
    elif cfg.guidance_band == "all":
        inside = torch.ones_like(inside)
    elif cfg.guidance_band == "reversed":
        inside = ~inside
    return torch.where(inside, cfg.guidance_scale, 1.0)


def dmd_gradient(pred_fake, pred_real, X):
    """g = (pred_fake - pred_real) / mean |X - pred_real|, the mean per sample. All (B, L, N, P).

    Why this moves the student's distribution to the teacher's: the KL divergence KL(student ||
    teacher) of noisy samples x_t has, with respect to the student's weights w, the gradient
    E[(s_student(x_t) - s_teacher(x_t)) dx_t/dw], the difference of two scores s = grad log p(x_t).
    A score is known from the best guess of x0 at x_t: s = ((1 - t) E[x0 | x_t] - x_t) / t^2
    (Tweedie's formula). In the difference x_t cancels, and (1 - t) / t^2 (pred_fake - pred_real) is
    left. Nobody knows the student's own score; the critic, trained on what the student makes,
    stands for it.

    The factor is replaced by one over the mean, as in DMD: else samples at some noise levels would
    drown the others. (Both this mean and that of the loss go over all pixels; outside the mask both
    differences are 0.)"""
    distance = (X - pred_real).abs().flatten(1).mean(1).clamp(min=1e-6)
    return (pred_fake - pred_real) / distance.view(-1, 1, 1, 1)


def dmd_loss(X, g, weight):
    """1/2 |X - stop_gradient(X - g)|^2, a sample at a time, weighted (B,). Its value means nothing;
    its gradient is what counts. X - g is held constant, so d/dX of half the square is X - (X - g) =
    g: a descent step moves X along -g = pred_real - pred_fake, from what the critic expects towards
    what the teacher expects, as if g were the derivative of a loss."""
    goal = (X - g).detach()
    half_squares = 0.5 * (X - goal).square().flatten(1).mean(1)  # B
    return (half_squares * weight).mean()


def student_loss(cfg, X, batch, teacher, critic, expert, rng):
    """The student's output X (B, L, N, P) -> the loss, and X's mean Sync-C. The loss has DMD's
    gradient with respect to X, from what critic and teacher predict from the same noisy X."""
    with torch.no_grad():
        t = sample_times(len(X), cfg.dmd_shift, rng)
        x_t = add_noise(X, noise_like(X, rng), t)
        scale = teacher_guidance(t, cfg)
        pred_real = guided(teacher, x_t, t, embed(teacher, batch), scale).float()
        # The critic must go on learning: it tells where the student's dubs are too common. One that
        # stays a copy of the teacher would differ from it by the guidance alone, and push for ever
        # in that direction (a row of analysis.py ablate). It is not guided: it is to know what the
        # student makes of this sound, not to exaggerate it. So it never learns without sound.
        pred_fake = critic(x_t, t, embed(critic, batch)).float()
        g = dmd_gradient(pred_fake, pred_real, X)
        # The expert is shown X as the network made it. Seams are blended for viewers alone; the
        # expert was trained on faces that have none, and a blend would hide what is to be mended.
        weight, sync_c = reward_weights(expert, to_pixels(X, cfg.patch), batch.mel, cfg.beta)
    return dmd_loss(X, g, weight), sync_c


def train_dmd(cfg, teacher, init, clips, expert, judge, val):
    """Distribution matching -> the EMA of the student. An update takes `critic_updates` batches. On
    each the student generates X and the critic takes a step of flow matching on X, so that it knows
    what the student makes now. On the last one the student is updated first, by student_loss. A
    clip is restored from its own sound; other words come in evaluation only. The learning rates are
    constant."""
    device = clips.video.device
    steps = cfg.dmd_steps
    student = student_of(init, cfg)
    critic = copy.deepcopy(teacher).requires_grad_(True)
    ema = copy.deepcopy(student).requires_grad_(False)
    # Without momentum (beta1 = 0), as two networks that learn from each other mostly are: what was
    # the right direction for the student some steps ago is not, once the critic has moved.
    adam = adam_w(student.parameters(), cfg.student_lr, betas=(0.0, 0.999))
    critic_adam = adam_w(critic.parameters(), cfg.critic_lr, betas=(0.0, 0.999))

    critic_loss_of = compiled(flow_loss, cfg.compile, device, steps * cfg.critic_updates)
    parts = dict(student=student, critic=critic, ema=ema, adam=adam, critic_adam=critic_adam)
    # Evaluated more often than in the other stages: it changes fast.
    run = Training(
        cfg,
        "student",
        steps,
        parts,
        device,
        lambda: evaluate_student(ema, val, judge),
        evaluate_every=4,
    )
    for step, rng in run:
        exit_rng = np.random.default_rng(step_seed(cfg.seed, "exit", step))
        for update in range(1, cfg.critic_updates + 1):
            trains_student = update == cfg.critic_updates
            batch = clips.sample_batch(cfg.dmd_batch, cfg, rng)

            # After which call the student stops is drawn at random, on the CPU, where it is needed.
            exit_step = int(exit_rng.integers(cfg.num_steps))
            with torch.set_grad_enabled(trains_student), autocast(student):
                chunks = in_chunks(embed(student, batch), cfg.chunk)
                made = rollout(student, chunks, lambda x: noise_like(x, rng), exit_step)
                X = torch.cat(list(made), 1)  # B L N P

            # The last of these batches trains the student ...
            if trains_student:
                with autocast(student):
                    loss, sync_c = student_loss(cfg, X, batch, teacher, critic, expert, rng)
                loss.backward()
                norm = optimizer_step(student, {adam: cfg.student_lr})
                update_ema(ema, student, step)

            # ... and every one the critic.
            X = X.detach()
            t = sample_times(cfg.dmd_batch, cfg.dmd_shift, rng)
            noise = noise_like(X, rng)
            with autocast(critic):
                cond = embed(critic, batch)
                critic_loss, _ = critic_loss_of(critic, X, noise, t, cond, cfg.weight_clip)
            critic_loss.backward()
            optimizer_step(critic, {critic_adam: cfg.critic_lr})
        run.log(critic_loss=critic_loss, loss=loss, norm=norm, reward_c=sync_c)
    return ema


def load_like(cfg, path, device="cpu"):
    """A checkpoint -> DiT. UserError: its network is not of the shape that cfg says."""
    net = load_net(path, DiT, device)
    for key in ("size", "patch", "width", "depth", "heads"):
        there = getattr(net.cfg, key)
        here = getattr(cfg, key)
        if there != here:
            what = f"{key} is {there} there and {here} here"
            raise UserError(f"{path}: {what}; use that option, or another checkpoint")
    return net


def load_clips(cfg, split, device):
    """Clips to train on; of real people only if there is a --folder, and never for the judge."""
    start = time.time()
    frames = 4 * data.CLIP_LATENTS
    n = cfg.clips
    if split == "judge":
        n = min(n, JUDGE_CLIPS)
    if cfg.folder and split != "judge":
        found = media.recorded(cfg.folder, cfg.size, frames)
    else:
        found = faces.drawn_clips(split, cfg.size, frames, device)
    clips = data.Clips(found, n, cfg.size, device)
    print(f"data: {len(clips.video)} clips ({split}), {time.time() - start:.0f} s", flush=True)
    return clips


def find_made(cfg, stage, source=""):
    """The path of the checkpoint of a stage that need not be trained, in --out or in `source`; None
    if it is to be trained, or gone on with."""
    path = runtime.resume_path(cfg, stage)
    if cfg.fresh:
        path.unlink(missing_ok=True)
    if cfg.fresh or path.is_file():
        return None
    return runtime.find(stage, cfg.out, source)


def save_stage(cfg, stage, net):
    """Save what a stage has made -> its path. What was made from a former one is deleted."""
    for later in LATER.get(stage, ()):
        for stale in (Path(cfg.out, f"{later}.pt"), runtime.resume_path(cfg, later)):
            if stale.is_file():
                print(f"{later}: {stale} was made from a former {stage}: deleted")
            stale.unlink(missing_ok=True)
    path = Path(cfg.out, f"{stage}.pt")
    runtime.save_net(path, net, stage=stage, options=runtime.result_options(cfg))
    runtime.resume_path(cfg, stage).unlink(missing_ok=True)
    print(f"{stage}: {path}", flush=True)
    return path


def closing_table(cfg, teacher, student, judge, device):
    """Held-out people dubbed to other words, by the teacher and by the student."""
    pairs = faces.make_pairs(TABLE_CLIPS, cfg.size, "held-out", device, 24 // cfg.chunk * cfg.chunk)
    teachers = dub_teacher(teacher, pairs.source, pairs.mel, latents=cfg.latents)
    students = dub_student(student, pairs.source, pairs.mel)
    rows = {
        "truth": metrics.means(pairs.truth, pairs, judge),
        "teacher, 50 steps, unguided": metrics.means(teachers, pairs, judge),
        f"student, {cfg.num_steps} steps a chunk": metrics.means(students, pairs, judge),
    }
    print(
        f"\n{TABLE_CLIPS} held-out people, dubbed to other words, and a judge that trains nothing:"
    )
    metrics.table("", rows, dict(sync_c=3, psnr=2, landmark=2, sharpness=2, frechet=2))

    _, clip = faces.dub_pair(0, pairs.source.shape[1], cfg.size)
    for _ in range(2):  # the first warms up
        fps, ttff = runtime.clock(dub_stream(student, clip.video, clip.audio), device)
    print(f"The student streams {fps:.0f} frames a second, the first after {1000 * ttff:.1f} ms.")


def main_job(cfg, device):
    """All stages, one after the other; each takes what those before have made."""
    dtype = runtime.fast_dtype(device)
    where = f"{cfg.config} on {device}, {torch.get_num_threads()} threads, {str(dtype)[6:]}"
    print(f"{where}; results in {cfg.out}/", flush=True)
    val = faces.make_pairs(8, cfg.size, "val", device, 24 // cfg.chunk * cfg.chunk)
    expert_cfg = syncnet.Config(size=cfg.size)

    # 1. The judge. It learns from people whom nothing else sees.
    path = find_made(cfg, "judge", cfg.source)
    if path is None:
        clips = load_clips(cfg, "judge", device)
        seed = step_seed(cfg.seed, "judge", 0)
        net = syncnet.train(expert_cfg, clips, cfg.sync_steps, seed, val, "judge")
        path = save_stage(cfg, "judge", net)
        del clips  # its memory is needed for the others
    judge = load_net(path, SyncNet, device)

    # All that follows learns from the same clips. They are drawn once something is to be trained.
    clips = None

    # 2. The reward expert. One of --source has not seen the people in --folder.
    path = find_made(cfg, "syncnet", "" if cfg.folder else cfg.source)
    if path is None:
        clips = load_clips(cfg, "train", device)
        seed = step_seed(cfg.seed, "syncnet", 0)
        net = syncnet.train(expert_cfg, clips, cfg.sync_steps, seed, val, "syncnet")
        path = save_stage(cfg, "syncnet", net)
    expert = load_net(path, SyncNet, device)

    # 3. The teacher.
    path = find_made(cfg, "teacher", "" if cfg.folder or cfg.start else cfg.source)
    if path is None:
        clips = clips or load_clips(cfg, "train", device)
        path = save_stage(cfg, "teacher", train_teacher(cfg, clips, expert, judge, val))
    teacher = load_like(cfg, path, device)

    # 4. The student's first weights.
    if cfg.stage in ("init", "all"):
        path = find_made(cfg, "init")
        if path is None:
            clips = clips or load_clips(cfg, "train", device)
            path = save_stage(cfg, "init", train_init(cfg, teacher, clips, expert, judge, val))
        init = load_like(cfg, path, device)

    # 5. The student.
    if cfg.stage == "all":
        path = find_made(cfg, "student")
        if path is None:
            clips = clips or load_clips(cfg, "train", device)
            net = train_dmd(cfg, teacher, init, clips, expert, judge, val)
            path = save_stage(cfg, "student", net)
        student = load_like(cfg, path, device).to(dtype)
        pairs = [faces.dub_pair(i, 96, cfg.size) for i in range(3)]
        rows = []
        for source, truth in pairs:
            dub = torch.cat(list(dub_stream(student, source.video, truth.audio)))
            rows.append([source.video, dub, truth.video])
        sound = np.concatenate([truth.audio for _, truth in pairs])
        media.write_side_by_side(f"{cfg.out}/sample.mp4", rows, sound)
        closing_table(cfg, teacher.to(dtype), student, judge, device)
        print(f"{cfg.out}/sample.mp4: source | dub | truth; curves.png: how training went")


def main(argv):
    cfg = runtime.options(Config, argv, __doc__, PRESETS)
    cfg.out = cfg.out or f"out/{cfg.config}"
    most = data.CLIP_LATENTS - 2 * cfg.chunk  # which leaves room for a reference
    assert cfg.latents % cfg.chunk == 0 and cfg.latents <= most, "choose another --latents"
    for path in (cfg.source, cfg.start, cfg.folder):
        if path and not Path(path).exists():
            raise UserError(f"{path}: no such file or folder")
    runtime.keep_memory()
    device = runtime.find_device(cfg.device, cfg.precision)
    runtime.make_folder(cfg.out)
    main_job(cfg, device)


if __name__ == "__main__":
    runtime.run(main)
