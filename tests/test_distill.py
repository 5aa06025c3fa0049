import copy
import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parameters_to_vector

import data
import distill
import flow
import model
import runtime
import stream
from distill import dmd_gradient, dmd_loss, teacher_guidance
from syncnet import reward_weights


@pytest.fixture
def train(cfg, clips, val, expert, student_file):
    """train(stage, out) -> the weights after four steps."""

    def run(stage, out, clips=clips, **fields):
        out.mkdir(exist_ok=True)
        four = dict(teacher_steps=4, init_steps=4, dmd_steps=4, start=student_file)
        c = dataclasses.replace(cfg, out=str(out), **four | fields)
        nets = [runtime.load_net(student_file, model.DiT)] * ["teacher", "init", "dmd"].index(stage)
        net = getattr(distill, f"train_{stage}")(c, *nets, clips, expert, expert, val)
        return parameters_to_vector(net.parameters())

    return run


def test_dmds_gradient_by_hand():
    numbers = torch.tensor([[1, 2, 0, 4], [0, 0, 4, 4], [3, 0, 4, 0]]).float()
    X, real, fake = numbers.view(3, 2, 1, 1, 2)
    g = dmd_gradient(fake, real, X)  # |X - r| has the means 1.5 and 2
    torch.testing.assert_close(g.flatten(), torch.tensor([2.0, 0.0, 0.0, -2.0]))
    X.requires_grad_()
    dmd_loss(X, g, torch.tensor([1.0, 3.0])).backward()  # mean of 2 pixels, 2 samples, weighted
    torch.testing.assert_close(X.grad.flatten(), torch.tensor([0.5, 0.0, 0.0, -1.5]))


def test_a_toy_student_moves_to_the_teacher():
    """In one dimension: teacher N(3, 1), student N(mu, 1). E[x0 | x_t] is known for both."""
    mu = torch.zeros(1, requires_grad=True)
    for _ in range(200):
        X, t = mu + torch.randn(64, 1, 1, 1), torch.rand(64, 1)
        x_t = flow.add_noise(X.detach(), torch.randn(64, 1, 1, 1), t)
        t = t[..., None, None]
        share = (1 - t) / ((1 - t) ** 2 + t**2)
        fake, real = (m + share * (x_t - (1 - t) * m) for m in (mu.detach(), 3.0))
        dmd_loss(X, dmd_gradient(fake, real, X.detach()), torch.ones(64)).backward()
        mu.data -= 0.3 * mu.grad
        mu.grad = None
    assert abs(mu.item() - 3) < 0.2


@pytest.mark.parametrize("where", ["on 01110", "off 00000", "all 11111", "reversed 10001"])
def test_the_teacher_is_guided_exactly_inside_the_band(cfg, where):
    """How much each sample then is: test_sample.py."""
    switch, inside = where.split()
    cfg = dataclasses.replace(cfg, guidance_band=switch)
    t = torch.tensor([[0.5555], [0.5556], [0.7], [0.8823], [0.8824]])  # .55556 to .88235
    assert teacher_guidance(t, cfg).tolist() == [(1, cfg.guidance_scale)[int(i)] for i in inside]


@pytest.mark.parametrize("call", [0, 1])
def test_a_rollout_is_streaming_with_gradient_in_one_call(tiny, clips, cfg, call, float32):
    """From the same noise, the clip of a student whose last call that is."""
    student, seen = copy.deepcopy(tiny), []
    student.register_forward_hook(
        lambda net, given, x0: seen.append(getattr(x0, "requires_grad", None))
    )
    cond = distill.embed(student, clips.sample_batch(2, cfg, torch.Generator().manual_seed(0)))
    rng = torch.Generator().manual_seed(5)
    chunks = stream.in_chunks(cond, cfg.chunk)
    made = stream.rollout(student, chunks, lambda x: flow.noise_like(x, rng), call)
    X = torch.cat(list(made), 1)
    assert seen == ([False] * call + [True, None]) * (cfg.latents // cfg.chunk)
    X.square().mean().backward()
    assert [n for n, p in student.named_parameters() if p.grad is None] == ["null_audio"]
    assert all(p.grad.any() for p in student.parameters() if p.grad is not None)
    student.cfg = dataclasses.replace(tiny.cfg, num_steps=call + 1)
    with torch.no_grad():
        streamed = torch.cat(list(stream.rollout(student, chunks, flow.seeded(5))), 1)
    torch.testing.assert_close(X, streamed, atol=1e-4, rtol=0)


def test_the_student_loss_leaves_critic_and_teacher_alone(tiny, clips, expert, cfg):
    critic, teacher = copy.deepcopy(tiny), copy.deepcopy(tiny)
    critic.final_layer.weight.data *= 2
    batch = clips.sample_batch(2, cfg, torch.Generator().manual_seed(0))
    X = torch.randn(2, cfg.latents, *tiny.token_shape, requires_grad=True)
    rng = torch.Generator().manual_seed(1)
    distill.student_loss(cfg, X, batch, teacher, critic, expert, rng)[0].backward()
    assert all(p.grad is None for net in (critic, teacher) for p in net.parameters())
    with torch.no_grad():
        rng = torch.Generator().manual_seed(1)
        t = distill.sample_times(2, cfg.dmd_shift, rng)
        x_t = flow.add_noise(X, flow.noise_like(X, rng), t)
        cond = distill.embed(teacher, batch)
        real = flow.guided(teacher, x_t, t, cond, teacher_guidance(t, cfg))
        g = dmd_gradient(critic(x_t, t, distill.embed(critic, batch)), real, X)
        weight, _ = reward_weights(expert, data.to_pixels(X, cfg.patch), batch.mel, cfg.beta)
    torch.testing.assert_close(X.grad, g * weight.view(-1, 1, 1, 1) / g.numel())


def test_reward_weights_have_mean_one_and_no_gradient(expert):
    rectangle = (torch.rand(4, 24, 16, 24, 3) * 2 - 1).requires_grad_()
    weight, flat = (reward_weights(expert, rectangle, torch.randn(4, 96, 40), b)[0] for b in (2, 0))
    assert not weight.requires_grad and weight.std() > 0 and (flat == 1).all()
    assert weight.mean().item() == pytest.approx(1, abs=1e-6)


@torch.no_grad()
def test_flow_loss_by_hand(tiny, parts, cfg):
    """|v' - v|^2, its weight clipped at 2, by the loss that test_model.py checks by hand."""
    noise, cond = parts(3)
    x0 = cond.masked_source + tiny.mask * torch.randn_like(noise)
    t = torch.tensor([[0.9], [0.1]])
    loss, guess = flow.flow_loss(tiny, x0, noise, t, cond, cfg.weight_clip, 2.0)
    torch.testing.assert_close(guess, tiny(flow.add_noise(x0, noise, t), t, cond))
    weight = torch.tensor([[0.9**-2], [2.0]])
    torch.testing.assert_close(loss, flow.denoising_loss(tiny, guess, x0, weight, 2.0))


@pytest.mark.parametrize("stage", ["teacher", "init"])
def test_compiled_training_is_the_same(train, stage, student_file, tmp_path, float32, monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    off, on = (train(stage, tmp_path / s, compile=s) for s in ("off", "on"))
    moved = off - parameters_to_vector(runtime.load_net(student_file, model.DiT).parameters())
    assert off.isfinite().all() and (off - on).norm() < 0.01 * moved.norm()
    assert counter.frame_count == 1  # one graph, no break


def stopping(run, save=runtime.Training.save):
    """Stops the run after two steps."""
    save(run)
    if run.step == 2:
        raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["teacher", "init", "dmd"])
def test_a_stopped_stage_goes_on_to_the_same_end(train, clips, stage, tmp_path, monkeypatch):
    """Stopped first by hand, then by a loss that is not finite, which is not saved. Bit for bit,
    though no generator's state is kept and the tensors are told to be a GPU's: any device goes on.
    """
    whole = train(stage, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "SAVE_SECONDS", -1)  # after every step
        patch.setattr(runtime.Training, "save", stopping)
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        with pytest.raises(KeyboardInterrupt):
            train(stage, tmp_path / "halves")
        (path,) = (tmp_path / "halves").glob("*.pt")
        saved, broken = path.read_bytes(), copy.copy(clips)
        broken.mel = torch.full_like(clips.mel, torch.nan)
        with pytest.raises(runtime.UserError, match="step 3: not finite.*lower learning rate$"):
            train(stage, tmp_path / "halves", broken)
    assert [*(tmp_path / "halves").glob("*.pt")] == [path] and path.read_bytes() == saved
    state = torch.load(path, weights_only=True, map_location="cpu")
    nets = dict(teacher={"net", "muon"}, init={"net"}, dmd={"student", "critic", "critic_adam"})
    assert set(state) == {"kind", "step", "options", "ema", "adam"} | nets[stage]
    assert (tmp_path / "halves/curves.png").is_file()
    (tmp_path / "other").mkdir()
    shutil.copy(path, tmp_path / "other")  # of other options: not gone on with
    ends = [train(stage, tmp_path / name, edges=2.5) for name in ("other", "anew")]
    torch.testing.assert_close(*ends)
    assert torch.equal(train(stage, tmp_path / "halves"), whole)
    rows = [json.loads(line) for line in open(tmp_path / "halves/log.jsonl")]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_the_log_keeps_the_last_of_a_step(tmp_path):
    rows = [dict(stage="init", step=step, loss=step) for step in (1, 2, 3)]
    rows += [dict(stage="teacher", step=9), dict(stage="init", step=2, loss=7)]  # gone on after 1
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    stages = runtime.read_log(tmp_path / "log.jsonl")
    assert [row["loss"] for row in stages["init"]] == [1, 7] and len(stages["teacher"]) == 1


def test_a_checkpoint_on_a_full_disk(tmp_path):
    """What was saved before stays whole, and nothing half-written is left."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.pt"
    runtime.save(path, kind="x")
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(runtime.UserError, match="a.pt: could not be saved.*; make room$"):
            runtime.save(path, kind="x", much=torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == before


def test_a_steps_random_numbers_are_its_own():
    """No two of them, whatever the seeds: (0, the third stage) is not (1, the second)."""
    seeds = set()
    for seed in (0, 1, 2):
        for stage in ("teacher", "init", "student", "exit"):
            seeds |= {runtime.step_seed(seed, stage, step) for step in (1, 2)}
    assert len(seeds) == 3 * 4 * 2 and runtime.step_seed(0, "init", 1) in seeds


def test_the_whole_job_then_again_then_anew(cfg, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "TABLE_CLIPS", 2)
    fields = dataclasses.asdict(cfg) | dict(out=tmp_path)
    argv = [f"--{key}={value}" for key, value in fields.items() if value != "" and key != "fresh"]

    def job(*more):
        distill.main([*argv, *more])
        said = "".join(capsys.readouterr())
        return said, {line.split()[0] for line in said.splitlines() if " step " in line}

    stages = {"judge", "syncnet", "teacher", "init", "student"}
    said, trained = job()
    assert trained == stages and "inf" not in said and "nan" not in said
    made = {"sample.mp4", "curves.png", "log.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == made | {f"{name}.pt" for name in stages}
    rows = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert {"critic_loss", "psnr", "seconds"} < set(rows[-1]) and len(rows) == 8
    monkeypatch.setattr(distill, "closing_table", lambda *given: None)  # seconds
    said, trained = job("--beta", ".5")
    assert not trained
    for name in stages:
        assert said.count(f"{name}: {tmp_path}/{name}.pt\n") == 1
    said, trained = job("--fresh", "--stage", "teacher")
    assert trained == {"judge", "syncnet", "teacher"}
    for name in ("init", "student"):  # which the former teacher's were
        assert said.count(f"{name}: {tmp_path}/{name}.pt was made from a former teacher") == 1
        assert not (tmp_path / f"{name}.pt").exists()
    other = "--source", str(tmp_path), "--out", f"{tmp_path}/b"
    with pytest.raises(runtime.UserError, match="width is 96 there and 48 here"):
        job(*other, "--width", "48")
    said, trained = job(*other, "--stage", "init")
    assert trained == {"init"} and f"teacher: {tmp_path}/teacher.pt\n" in said


def test_which_results_are_taken(cfg, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    cfg = dataclasses.replace(cfg, out=str(out), source=str(source))

    def taken(**fields):
        return distill.find_made(dataclasses.replace(cfg, **fields), "teacher", cfg.source)

    def put(folder):
        folder.mkdir()
        (folder / "teacher.pt").touch()

    assert taken() is None
    put(source)
    assert taken() == source / "teacher.pt" and taken(fresh=True) is None
    put(out)
    assert taken() == out / "teacher.pt"
    # A training that was stopped goes on, and not after --fresh.
    resume = runtime.resume_path(cfg, "teacher")
    resume.touch()
    assert taken() is None and resume.exists()
    assert taken(fresh=True) is None and not resume.exists()


def test_the_preset_small_says_where_the_bundled_weights_are():
    folder = runtime.options(distill.Config, ["--config=small"], "", distill.PRESETS).source
    assert all(Path(folder, f"{name}.pt").is_file() for name in ("judge", "syncnet", "teacher"))
    assert runtime.options(distill.Config, [], "", distill.PRESETS).source == ""


@pytest.mark.parametrize("precision, close", [("bfloat16", 0.0), ("float32", 0.05)])
def test_muon_is_torchs_in_batches(monkeypatch, precision, close):
    """Bit for bit in bf16, which torch.optim.Muon multiplies in; else within what that rounds."""
    monkeypatch.setattr(runtime, "precision", precision)
    shapes = (24, 24), (24, 72), (24, 24), (72, 24)
    ours = [torch.randn(shape, requires_grad=True) for shape in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    muons = runtime.Muon(ours, 0.02), torch.optim.Muon(theirs, 0.02, weight_decay=0.01)
    for _ in range(3):
        for mine, torchs in zip(ours, theirs):
            mine.grad = torch.randn_like(mine)
            torchs.grad = mine.grad.clone()
        for muon in muons:
            muon.step()
    for mine, torchs in zip(ours, theirs):
        assert (mine - torchs).abs().max() <= close * 0.02
