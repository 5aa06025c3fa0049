import copy
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import data
import distill
import model as nn_model
import runtime
import sample
from distill import dmd_gradient, dmd_loss, in_window, real_score, reward_weights, rollout, sharpen

CPU = torch.device("cpu")


def test_gradient_by_hand():
    X, real, fake = torch.tensor([[1., 2.], [0., 4.]]), torch.tensor([[0., 0.], [4., 4.]]), torch.tensor([[3., 0.], [4., 0.]])
    g = dmd_gradient(fake, real, X)                        # |X - r| has the means 1.5 and 2
    torch.testing.assert_close(g, torch.tensor([[2., 0.], [0., -2.]]))
    X.requires_grad_()
    dmd_loss(X, g, torch.tensor([1., 3.])).backward()      # mean over 2 pixels and 2 samples, weighted
    torch.testing.assert_close(X.grad, torch.tensor([[.5, 0.], [0., -1.5]]))


def test_a_toy_student_moves_to_the_teacher():
    """In one dimension: teacher N(3, 1), student N(mu, 1). E[x0 | x_t] is known for both, so the scores are exact."""
    torch.manual_seed(0)
    mu = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([mu], lr=.3)
    expected = lambda x_t, t, mean: mean + (1 - t) / ((1 - t) ** 2 + t ** 2) * (x_t - (1 - t) * mean)     # noqa: E731
    for _ in range(200):
        X, t = mu + torch.randn(64, 1), torch.rand(64, 1)
        x_t = sample.add_noise(X.detach()[..., None, None], torch.randn(64, 1, 1, 1), t)[..., 0, 0]
        g = dmd_gradient(expected(x_t, t, mu.detach()), expected(x_t, t, 3.), X.detach())
        optimizer.zero_grad()
        dmd_loss(X, g, torch.ones(64)).backward()
        optimizer.step()
    assert abs(mu.item() - 3) < .2


@pytest.mark.parametrize("where, inside", [("on", [0, 1, 1, 1, 0]), ("off", [0] * 5), ("all", [1] * 5), ("reversed", [1, 0, 0, 0, 1])])
@torch.no_grad()
def test_guided_exactly_inside_the_window(tiny, parts, cfg, where, inside):
    cfg = dataclasses.replace(cfg, sync_window=where)
    t = torch.tensor([[.5555], [.5556], [.7], [.8823], [.8824]])                          # the band is .55556 to .88235
    assert in_window(t[:, 0], cfg).int().tolist() == inside
    x, cond, audio = parts(3, 5)
    got = real_score(tiny, x, t, cond, audio, cfg)
    null = sample.null_audio(tiny, 3, 5)
    for i, guided in enumerate(inside):
        want = sample.guided(tiny, x, t, cond, audio, null, cfg.guidance if guided else 1)
        torch.testing.assert_close(got[i], want[i], atol=1e-5, rtol=0)
        other = sample.guided(tiny, x, t, cond, audio, null, 1 if guided else cfg.guidance)
        assert not torch.allclose(got[i], other[i], atol=1e-4)


@pytest.mark.parametrize("call", [0, 1])
def test_only_the_drawn_call_carries_gradient(tiny, samples, cfg, call):
    student = copy.deepcopy(tiny).train()
    batch, seen = samples.draw(2, torch.Generator().manual_seed(0)), []
    fast = copy.deepcopy(tiny).to(distill.runtime.fast_dtype(CPU))           # its weights ask for gradient: it must not get any all the same
    for net in (student, fast):
        net.register_forward_hook(lambda module, args, out: seen.append(None if out is None else out.requires_grad))
    with distill.mixed(CPU):
        cond, audio = student.embed_cond(batch.source, batch.reference), student.embed_audio(batch.heard)
    X = rollout(student, fast, cond, audio, call, cfg.times, CPU)
    assert seen == ([False] * call + [True, None]) * (cfg.latents // cfg.chunk)
    X.square().mean().backward()
    assert all(p.grad is None for p in fast.parameters())
    assert [n for n, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == ["null_audio"]


@pytest.mark.parametrize("call, cache", [(0, "clean"), (1, "clean"), (1, "last")])
def test_rollout_is_what_streaming_does(tiny, samples, cfg, call, cache):
    """The same noise through the training rollout and the inference loop: the same clip."""
    batch = samples.draw(1, torch.Generator().manual_seed(0))
    fast = copy.deepcopy(tiny).to(runtime.fast_dtype(CPU))
    fast.cache_from = cache
    with torch.no_grad(), distill.mixed(CPU):
        cond, audio = fast.embed_cond(batch.source, batch.reference), fast.embed_audio(batch.heard)
    torch.manual_seed(5)
    trained = rollout(tiny, fast, cond, audio, call, cfg.times, CPU).detach()
    streamed = torch.cat(list(sample.generate(fast, sample.in_chunks(cond, audio, 3), cfg.times[: call + 1], sample.seeded(5))), 1)
    assert (trained - streamed).abs().mean() < 5e-3                              # bf16: calls of 24 rows and of 48 may round differently


def test_compiled_training_is_the_same_training(cfg, samples, expert, tmp_path, monkeypatch):
    """The switch that is on for GPUs. aot_eager: the same capture of forward and backward, without a minute of code generation."""
    watch, ends = data.held_out(1, cfg.size, "watch", CPU, latents=6), []
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(distill.DiT, "compile", lambda self: torch.nn.Module.compile(self, backend=counter))
    for switch in ("off", "on"):
        c = dataclasses.replace(cfg, out=str(tmp_path / switch), compile=switch, teacher_steps=2)
        Path(c.out).mkdir()
        distill.train_teacher(c, samples, expert, expert, watch, CPU)
        ends.append(nn_model.load_dit(f"{c.out}/teacher.pt"))
    torch.manual_seed(cfg.seed)
    start = nn_model.DiT(ends[0].cfg)
    start.hear.load_state_dict(expert.sound.state_dict())
    start, off, on = (torch.cat([p.detach().flatten() for p in net.parameters()]) for net in (start, *ends))
    assert (off - on).norm() < .01 * (off - start).norm() and off.isfinite().all()
    assert counter.frame_count == 1                              # one graph, no break


def test_student_loss_leaves_critic_and_teacher_alone(tiny, parts, cfg):
    critic, teacher = (copy.deepcopy(tiny).requires_grad_(True) for _ in range(2))
    x, cond, audio = parts(3)
    X = torch.randn_like(x, requires_grad=True)
    t = torch.tensor([[.7], [.3]])
    x_t = sample.add_noise(X, torch.randn_like(X), t)
    with torch.no_grad():
        g = dmd_gradient(critic(x_t, t, cond, audio), real_score(teacher, x_t, t, cond, audio, cfg), X)
    dmd_loss(X, g, torch.ones(2)).backward()
    torch.testing.assert_close(X.grad, g / g[0].numel() / 2)
    assert all(p.grad is None for net in (critic, teacher) for p in net.parameters())


def test_reward_weights(expert, cfg):
    video, mel = torch.rand(4, 24, 32, 32, 3, requires_grad=True) * 2 - 1, torch.randn(4, 96, 40)
    weight, c = reward_weights(expert, video, mel, dataclasses.replace(cfg, beta=2.))
    assert not weight.requires_grad and weight.mean().item() == pytest.approx(1, abs=1e-6) and weight.std() > 0
    raw, _ = reward_weights(expert, video, mel, dataclasses.replace(cfg, beta=2., raw_weights=True))
    torch.testing.assert_close(raw, (2 * c).exp())
    assert (reward_weights(expert, video, mel, dataclasses.replace(cfg, beta=0.))[0] == 1).all()


def test_references_come_from_outside_the_sample(samples, cfg):
    """Number every latent frame of every clip, then look where samples and references came from."""
    spy = copy.copy(samples)
    spy.patches = torch.arange(16, dtype=torch.uint8)[None, :, None, None].expand(6, -1, 2, 2 * 48).contiguous()
    spy.cfg = dataclasses.replace(cfg, still=0.)
    batch = spy.draw(64, torch.Generator().manual_seed(1))
    number = lambda x: (x[:, :, 0, 0] * 127.5 + 127.5).round().int()                      # noqa: E731
    source, reference = number(batch.source), number(batch.reference)
    assert (source.diff(dim=1) == 1).all() and (reference.unflatten(1, (-1, 3)).diff(dim=2) == 1).all()
    assert all(not set(a.tolist()) & set(b.tolist()) for a, b in zip(source, reference))


def test_the_whole_job_then_again_then_with_other_settings(cfg, capsys, tmp_path):
    """Every stage for a few steps; the second time nothing is trained; a result of other settings is refused, not used."""
    cfg = dataclasses.replace(cfg, coarse_steps=2)
    argv = ["--out", str(tmp_path), "--config", "tiny"]
    base = distill.PRESETS["tiny"]
    argv += [x for f in dataclasses.fields(cfg) if f.name not in ("config", "out") and getattr(cfg, f.name) != base.get(f.name, f.default)
             for x in (f"--{f.name}", str(getattr(cfg, f.name)))]
    distill.main(argv)
    said = capsys.readouterr().out
    assert "student, 2 steps a chunk" in said and "inf" not in said
    assert {"sample.mp4", "curves.png", "log.jsonl", "student.pt"} <= {p.name for p in tmp_path.iterdir()} and not list(tmp_path.glob("*.resume.pt"))
    rows = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert "weights are those of" in said and nn_model.load_dit(tmp_path / "coarse.pt").cfg.patch == 16
    assert {r["stage"] for r in rows} == {"coarse", "teacher", "init", "dmd"} and any("critic_loss" in r and "psnr" in r for r in rows)
    distill.main(argv)
    assert "step" not in capsys.readouterr().out.split("Sync-C")[0]
    with pytest.raises(distill.Fail, match="--beta 1.0, not 0.5"):
        distill.main(argv + ["--beta", ".5"])
    with pytest.raises(distill.Fail, match="--teacher , not"):
        distill.main(argv + ["--teacher", str(tmp_path / "teacher.pt")])
    with pytest.raises(distill.Fail, match="width is 96 there and 48"):
        distill.main(["--config", "tiny", "--out", str(tmp_path / "other"), "--teacher", str(tmp_path / "teacher.pt"), "--width", "48", "--clips", "2"])


@pytest.mark.parametrize("patch", [8, 16])
def test_a_teacher_starts_from_another(cfg, samples, tiny, expert, tmp_path, patch):
    """--start: all of its weights, or all that have the same shape here. Two small steps do not lead far away from them."""
    nn_model.save_dit(str(tmp_path / "first.pt"), tiny, cfg, "teacher", 1)
    c = dataclasses.replace(cfg, out=str(tmp_path), start=str(tmp_path / "first.pt"), patch=patch, teacher_steps=2, muon_lr=1e-4, teacher_lr=1e-5)
    if patch != cfg.patch:
        samples = data.Samples(data.Bank(c.size, 4 * c.clip_latents, 2), c, CPU)
    distill.train_teacher(c, samples, expert, expert, data.held_out(1, cfg.size, "watch", CPU, latents=6), CPU)
    first, end = (nn_model.load_dit(tmp_path / name).state_dict() for name in ("first.pt", "teacher.pt"))
    kept = [name for name in first if first[name].shape == end[name].shape]
    assert len(first) - len(kept) in ((0,) if patch == 8 else range(2, 7)) and "blocks.0.qkv.weight" in kept
    first, end = (torch.cat([w[name].flatten() for name in kept]) for w in (first, end))
    assert 0 < (end - first).norm() < .01 * first.norm()


def test_edges_and_view_come_in_when_they_should(cfg, samples, tiny, expert, tmp_path, monkeypatch):
    """From nothing the edges rise in the second half and the view in the third quarter; from another teacher the edges are there at once and the view
    rises in the first quarter; after coarse steps the edges are there at once."""
    nn_model.save_dit(str(tmp_path / "first.pt"), tiny, cfg, "teacher", 1)
    watch, loss, edges, views = data.held_out(1, cfg.size, "watch", CPU, latents=6), distill.flow_loss, [], []

    def view(reward, x0_hat, batch):
        views[-1] = torch.zeros((), requires_grad=True)          # its gradient will be the weight that it was given
        return views[-1]
    monkeypatch.setattr(distill, "flow_loss", lambda *a: (edges.append(a[-1]), views.append(None), loss(*a))[2])
    monkeypatch.setattr(distill, "seen_differently", view)
    first = str(tmp_path / "first.pt")
    for given, coarse, edges_then, views_then in (("", "", [0, 0, 0, 0, .5, 1, 1.5, 2], [0, 0, 0, 0, .5, 1, 1, 1]), (first, "", [2] * 8, [.5] + [1] * 7),
                                                  ("", first, [2] * 8, [0, 0, 0, 0, .5, 1, 1, 1])):
        edges.clear(), views.clear()
        distill.train_teacher(dataclasses.replace(cfg, out=str(tmp_path), start=given, teacher_steps=8), samples, expert, expert, watch, CPU, start=coarse)
        assert edges == edges_then
        assert [0 if v is None else v.grad.item() / cfg.view for v in views] == pytest.approx(views_then)


def test_dmd_looks_with_the_experts_eyes(cfg, samples, tiny, expert, tmp_path, monkeypatch):
    """Once an update, at the student's own clip and with gradient; not at all without --dmd_view."""
    watch, seen, look = data.held_out(1, cfg.size, "watch", CPU, latents=6), [], distill.seen_differently
    monkeypatch.setattr(distill, "seen_differently", lambda reward, X, batch: (seen.append(X.requires_grad), look(reward, X, batch))[1])
    for weight, expected in ((0., []), (.3, [True, True])):
        c = dataclasses.replace(cfg, out=str(tmp_path), dmd_view=weight)
        distill.train_dmd(c, copy.deepcopy(tiny), copy.deepcopy(tiny), samples, expert, expert, watch, CPU)
        assert seen == expected


def test_samples_are_cut_anew(cfg):
    bank = data.Bank(cfg.size, 4 * cfg.clip_latents, 2)
    video = bank.video.clone()
    samples = data.Samples(bank, cfg, CPU)
    for patch in (16, 16, 8):
        assert torch.equal(samples.cut(patch).patches, data.patchify(video, patch))


def test_base_takes_its_steps(expert, tmp_path):
    """The config for a GPU, at a small batch: 128 pixels, 24 tokens a latent frame."""
    cfg = distill.Config(**dict(distill.PRESETS["base"], config="base", out=str(tmp_path), clips=2, clip_latents=18, teacher_steps=2, teacher_batch=2))
    samples = data.Samples(data.Bank(cfg.size, 4 * cfg.clip_latents, cfg.clips), cfg, CPU, runtime.fast_dtype(CPU))
    watch = data.held_out(1, cfg.size, "watch", CPU, latents=12)
    distill.train_teacher(cfg, samples, expert, expert, watch, CPU)
    teacher = nn_model.load_dit(f"{cfg.out}/teacher.pt")
    frames = torch.cat(list(sample.stream(teacher, watch.source[0, :20], torch.zeros(20 * 640))))
    assert sum(p.numel() for p in teacher.parameters()) > 28e6 and frames.shape == (20, 128, 128, 3)


def test_nothing_is_taken_that_was_made_from_something_else(tmp_path):
    """Half a student of an older init is not gone on with; bundled experts do not stand in for those of other settings."""
    cfg = distill.Config(**dict(distill.PRESETS["small"], config="small", out=str(tmp_path)))
    for age, name in enumerate(("init.pt", "student.resume.pt")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    with pytest.raises(distill.Fail, match="student.resume.pt was distilled from another init"):
        distill.locate("student", cfg)
    os.utime(tmp_path / "student.resume.pt", (2e9, 2e9))
    assert distill.locate("student", cfg) is None                # go on
    assert distill.locate("judge", cfg) == distill.locate("judge", dataclasses.replace(cfg, dmd_steps=1)) is not None
    for other in (dict(judge_clips=7), dict(sync_steps=7)):
        assert distill.locate("judge", dataclasses.replace(cfg, **other)) is None


@pytest.mark.parametrize("stage", ["teacher", "dmd"])
def test_a_stopped_stage_goes_on_to_the_same_end(stage, cfg, samples, tiny, expert, tmp_path):
    """Stop after half, go on: bit for bit the weights of the run that was not stopped."""
    watch = data.held_out(1, cfg.size, "watch", CPU, latents=6)
    ends = []
    for halves in (False, True):
        c = dataclasses.replace(cfg, out=str(tmp_path / str(halves)), save_seconds=-1)
        Path(c.out).mkdir()
        train = ((lambda: distill.train_teacher(c, samples, expert, expert, watch, CPU)) if stage == "teacher" else
                 lambda: distill.train_dmd(c, copy.deepcopy(tiny), copy.deepcopy(tiny), samples, expert, expert, watch, CPU))
        if halves:
            original, steps = runtime.Progress.save, []

            def stop(self, step):
                original(self, step)
                steps.append(step)
                if len(steps) == 2:
                    raise KeyboardInterrupt
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(runtime.Progress, "save", stop)
                train()
        train()
        ends.append(torch.load(f"{c.out}/{'teacher' if stage == 'teacher' else 'student'}.pt", weights_only=True)["model"])
        assert not list(Path(c.out).glob("*.resume.pt"))
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values()))


def test_sharpen_pulls_harder_at_edges(tiny):
    """Without edges, the masked gradient itself. With them still downhill, and the more so the finer the pattern: (1 + 2 x 3 x 4) for one that changes its sign
    with every pixel and frame, but for the mask's rim and the picture's, and 1 for an even one."""
    p, inside = tiny.cfg.patch, tiny.mask
    even = inside.expand(1, 3, *inside.shape)
    f, y, x = torch.meshgrid(torch.arange(4), torch.arange(p), torch.arange(p), indexing="ij")
    fine = even * (1 - 2. * ((f + y + x) % 2))[..., None].expand(-1, -1, -1, 3).flatten()
    torch.testing.assert_close(sharpen(fine, 0., tiny), fine * inside, rtol=1e-2, atol=1e-2)                   # in bf16
    steeper = lambda g: ((sharpen(g, 2., tiny) * g).sum() / (g * g).sum()).item()           # noqa: E731
    assert 20 < steeper(fine) < 30 and 1 <= steeper(even) < 2


def test_what_a_stopped_stage_goes_on_with(cfg, tmp_path):
    """A lower rate, as is advised after a gradient that is not finite; no other batch. What drew noise there may be missing here."""
    c, rng = dataclasses.replace(cfg, out=str(tmp_path), save_seconds=-1), torch.Generator()
    go_on = lambda **fields: runtime.Progress(dataclasses.replace(c, **fields), "teacher", distill.DEPENDS["teacher"], rng, net=torch.nn.Linear(1, 1))  # noqa: E731
    first = go_on()
    first.save(3)
    assert go_on(teacher_lr=1e-4, muon_lr=1e-3).step == 3
    with pytest.raises(distill.Fail, match="--teacher_batch"):
        go_on(teacher_batch=3)
    state = torch.load(first.path, weights_only=True)
    torch.save(dict(state, torch_rng={"elsewhere": state["torch_rng"]["cpu"]}), first.path)
    assert go_on().step == 3


def test_denoising_loss_is_that_of_the_picture(tiny, parts, monkeypatch):
    """Token by token, its value and its own backward must be what autograd finds on the whole lower half of the picture; a clean chunk (weight 0) takes
    no part."""
    x, _, _ = parts(4)
    y, weight = x + tiny.mask * torch.randn_like(x), torch.tensor([[1., .25, 0., 2.], [4., 4., 4., 4.]])
    x.requires_grad_()
    picture = lambda z: data.unpatchify(torch.cat([torch.zeros_like(z), z], -1), 8)[:, :, 16:]              # noqa: E731  B T 16 32 3
    e = (x - y) * weight[..., None, None].sqrt()
    plain = (e.square() * tiny.mask).mean() / tiny.mask.mean()
    whole = plain + 2 * sum(picture(e).diff(dim=d).square().mean() for d in (1, 2, 3)) / tiny.mask.mean()
    for edges, expected in ((0., plain), (2., whole)):
        for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, .02)):
            monkeypatch.setattr(runtime, "fast_dtype", lambda device, dtype=dtype: dtype)
            loss = nn_model.DenoisingLoss.apply(x, y, weight, edges, tiny)
            assert loss.item() == pytest.approx(expected.item(), rel=close)
            a, b = (torch.autograd.grad(3 * z, x, retain_graph=True)[0] for z in (loss, expected))
            assert (a - b).norm() < close * b.norm() and not a[0, 2].any()


def test_a_bundled_teacher_does_not_swallow_options(tmp_path):
    small = distill.Config(**distill.PRESETS["small"], config="small", out=str(tmp_path))
    assert distill.locate("teacher", small).parent.name == "small"
    with pytest.raises(data.Fail, match="--teacher_steps"):
        distill.locate("teacher", dataclasses.replace(small, teacher_steps=5))
    with pytest.raises(data.Fail, match="--start"):
        distill.locate("teacher", dataclasses.replace(small, start="other.pt"))
    assert distill.locate("teacher", dataclasses.replace(small, teacher_steps=5, stage="teacher")) is None
    assert distill.coarse_config(small).patch == 16 and distill.coarse_config(dataclasses.replace(small, start="other.pt")) is None
    own = dataclasses.replace(small, folder="clips")             # recorded people: only the judge stays
    assert [distill.locate(name, own) is None for name in ("teacher", "syncnet", "judge")] == [True, True, False]


@pytest.mark.parametrize("precision, close", [("bfloat16", 1e-6), ("float32", .05)])
def test_muon_is_torchs_in_batches(monkeypatch, precision, close):
    """The same updates as torch.optim.Muon, which multiplies in bf16; in float32 within what bf16 rounds."""
    monkeypatch.setattr(runtime, "PRECISION", precision)
    ours = [torch.randn(shape, requires_grad=True) for shape in ((24, 24), (24, 72), (72, 24), (24, 24))]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    muons = runtime.Muon(ours, .02), torch.optim.Muon(theirs, .02, weight_decay=.01)
    for _ in range(3):
        for mine, torchs in zip(ours, theirs):
            mine.grad = torch.randn_like(mine)
            torchs.grad = mine.grad.clone()
        for muon in muons:
            muon.step()
    for mine, torchs in zip(ours, theirs):
        assert (mine - torchs).abs().max() < close * .02
