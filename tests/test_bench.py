import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import bench
import data
import distill
import model as nn_model
import quality
import runtime
import syncnet


def test_speed_ends_in_json(capsys, tmp_path):
    bench.main(["speed", "--config", "tiny", "--rounds", "1", "--seconds", "1.92", "--memory", "0", "--chunks", "120", "--patch", "16", "--out", str(tmp_path)])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["tokens"] == 2 and result["student"]["fps"] > 0
    assert result["student"]["passes_per_chunk"] == 3 and {"pass 1", "cache pass"} <= set(result["student"]["ms"])
    assert result["bound"] == pytest.approx(100 / 3) and result["ratio"] == pytest.approx(result["student"]["fps"] / result["teacher_guided"]["fps"])
    assert 0 < result["train"]["mfu"] < result["train"]["mfu_counting_muon"] < 1 and result["train"]["student_update_s"] > result["train"]["teacher_step_s"] > 0
    bench.main(["attention", "--config", "tiny", "--rounds", "1", "--flex", "0", "--out", str(tmp_path)])
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    assert [r["latents"] for r in rows] == [12, 48, 192] and all(r["a call a chunk"] > 0 for r in rows)


def test_quality_ends_in_json(capsys, tmp_path, tiny, expert, cfg):
    """On a teacher that has learned nothing and an expert that has learned a little: the truth scores, the dubs do not."""
    nn_model.save_dit(tmp_path / "teacher.pt", tiny, cfg, "teacher", 0)
    nn_model.save_dit(tmp_path / "student.pt", tiny, cfg, "student", 0)
    for name in ("judge", "syncnet"):
        runtime.save(tmp_path / f"{name}.pt", kind="syncnet", config=dataclasses.asdict(expert.cfg), model=expert.state_dict())
    bench.main(["quality", "--config", "tiny", "--clips", "2", "--front", "0", "--weights", str(tmp_path), "--out", str(tmp_path)])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    rows = result["rows"]
    assert result["set"] == "dub" and result["clips"] == 2 and set(rows) == {"truth", "teacher", "teacher_guided", "student"}
    assert rows["student"]["fps"] > rows["teacher_guided"]["fps"] > 0
    assert rows["truth"]["psnr"] > 70 and rows["truth"]["ssim"] == pytest.approx(1) and rows["truth"]["seams"] == pytest.approx(1)
    for worse in ("teacher", "student"):
        assert rows[worse]["sync_c"] < rows["truth"]["sync_c"] and rows[worse]["ssim"] < .95 and rows[worse]["landmark"] > rows["truth"]["landmark"]
    assert rows["student"]["psnr"] < result["ceiling"]["psnr"] < 40 and rows["truth"]["opening"] > .5
    assert set(result["offsets"]) == {"judge", "syncnet"} and result["offsets"]["judge"]["clean"] == 1          # with the sign wrong: 0
    assert result["contrast"]["judge"] > 1.5
    assert (tmp_path / "quality-tiny-dub.png").is_file()
    bench.main(["quality", "--config", "tiny", "--clips", "2", "--teacher", "0", "--weights", str(tmp_path), "--out", str(tmp_path)])
    alone = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    assert set(alone) == {"truth", "student"} and alone["student"]["psnr"] == pytest.approx(rows["student"]["psnr"], abs=.01)


def test_seams_and_blur_are_seen():
    video = data.draw(3, 8, 64).video
    mean = video.float().mean()
    brighter = torch.arange(64) // 16 % 2 * 20.
    seamed = data.to_uint8((video + brighter[:, None, None] - mean) / 127.5)
    smooth = data.to_uint8((video - mean) / 127.5)
    ratio = lambda v: syncnet.edges(v, 16)[0] / syncnet.edges(v, 16)[1]      # noqa: E731
    assert ratio(seamed) > 2 * ratio(smooth)
    blurred = F.avg_pool2d(video.permute(0, 3, 1, 2).float(), 3, 1, 1).permute(0, 2, 3, 1).to(torch.uint8)
    assert syncnet.edges(blurred, 16)[1] < .7 * syncnet.edges(video, 16)[1]


def test_a_perfect_blur_is_closer_than_a_perfect_dub():
    _, truth, other = (clip.video[None] for clip in next(quality.clips_of("dub", 1, 32)))
    blur = quality.best_blur(0, 32, draws=6)[None]
    assert data.mouth_psnr(blur, truth).item() > data.mouth_psnr(other, truth).item() + .5
    assert syncnet.edges(blur[0], 8)[1] < .9 * syncnet.edges(other[0], 8)[1]


def test_ssim_by_hand():
    """Constant pictures: only the luminance term is left."""
    a, b = torch.full((2, 32, 32, 3), 51, dtype=torch.uint8), torch.full((2, 32, 32, 3), 102, dtype=torch.uint8)
    assert quality.ssim(a, b) == pytest.approx((2 * .2 * .4 + 1e-4) / (.04 + .16 + 1e-4), abs=1e-6) and quality.ssim(a, a) == pytest.approx(1)


def test_summary_leaves_out_what_is_not_there():
    mean, half = quality.summary(torch.tensor([1., 2., 3., float("nan")]))
    assert mean == 2 and half == pytest.approx(1.96 / 3 ** .5)


def test_long_ends_in_json(capsys, tmp_path, tiny, expert, cfg):
    """An untrained student: its first window is as good as its last, since nothing depends on how late it is."""
    nn_model.save_dit(tmp_path / "student.pt", tiny, cfg, "student", 0)
    runtime.save(tmp_path / "judge.pt", kind="syncnet", config=dataclasses.asdict(expert.cfg), model=expert.state_dict())
    options = ["--weights", str(tmp_path), "--seconds", "12", "--window", "2", "--people", "2", "--out", str(tmp_path)]
    bench.main(["long", "--config", "tiny", *options])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(result["rows"]) == {"truth", "student", "started anew", "no sink", "window 3", "absolute positions"}
    assert len(result["rows"]["student"]["psnr"]) == 6
    assert result["first"]["psnr"] == pytest.approx(result["last"]["psnr"], abs=1.5) and result["last"]["colour_outside"] < .01
    assert result["rows"]["student"]["psnr"] != result["rows"]["no sink"]["psnr"] != result["rows"]["absolute positions"]["psnr"]
    with pytest.raises(data.Fail, match="--window"):
        bench.main(["long", "--seconds", "25"])


def test_a_mumbler_has_half_the_gain(expert, monkeypatch):
    """Read as opening half as far as the truth, always in step with it: correlation 1, gain 1/2."""
    pairs = data.held_out(2, 32, "watch", torch.device("cpu"), latents=6)
    monkeypatch.setattr(quality.syncnet, "landmark_error", lambda dub, pairs, judge: -.5 * pairs.mouth)
    q = quality.measures(pairs.truth, pairs, expert, 8)
    torch.testing.assert_close(q["gain"], torch.full((2,), .5))
    torch.testing.assert_close(q["opening"], torch.ones(2))


def test_drift_and_border_jump_by_hand():
    truth = torch.full((24, 32, 32, 3), 100, dtype=torch.uint8)
    redder = truth.clone()
    redder[..., 0] += 6
    assert quality.drift(redder, truth) == pytest.approx([6, 6, 12 ** .5], abs=1e-3)
    moving = (torch.arange(24)[:, None, None, None] * 2 + (torch.arange(24) >= 12)[:, None, None, None] * 2).expand(-1, 32, 32, 3).to(torch.uint8)
    assert quality.border_jump(moving, 12) == pytest.approx(4)


def test_a_folder_with_a_student_alone_can_be_measured(tmp_path, tiny, cfg):
    """Against the teacher that it names, the experts beside that one, or else what is bundled."""
    (tmp_path / "mine").mkdir()
    for name in ("teacher", "judge"):
        (tmp_path / "mine" / f"{name}.pt").touch()
    nn_model.save_dit(tmp_path / "student.pt", tiny, dataclasses.replace(cfg, teacher=str(tmp_path / "mine" / "teacher.pt")), "student", 0)
    found = lambda name: quality.checkpoint(quality.Quality(weights=str(tmp_path)), name).parent.name                       # noqa: E731
    assert [found(name) for name in ("teacher", "judge", "syncnet")] == ["mine", "mine", "small"]
    nn_model.save_dit(tmp_path / "student.pt", tiny, cfg, "student", 0)
    paths = {name: quality.checkpoint(quality.Quality(weights=str(tmp_path)), name) for name in ("student", "teacher", "judge", "syncnet")}
    assert paths.pop("student").parent == tmp_path and all(p.is_file() and p.parent.name == "small" for p in paths.values())
    (tmp_path / "student.pt").rename(tmp_path / "teacher.pt")
    assert quality.checkpoint(quality.Quality(weights=str(tmp_path)), "teacher").parent == tmp_path
    assert not quality.checkpoint(quality.Quality(weights=str(tmp_path)), "student").is_file()           # the bundled one is another teacher's


def test_cross_is_another_voice():
    (source, truth, other), = quality.clips_of("cross", 1, 32)
    dub = data.dub_pair(0, 96, 32)[1]
    assert torch.equal(source.video[:, :8], truth.video[:, :8]) and not (truth.audio == dub.audio).all()
    assert (other.audio == truth.audio).all() and (other.mouth == truth.mouth).all() and not torch.equal(other.video, truth.video)


def test_ablate_ends_in_json(capsys, tmp_path, tiny, expert, cfg, monkeypatch):
    monkeypatch.setitem(distill.PRESETS["tiny"], "init_steps", 4)
    nn_model.save_dit(tmp_path / "teacher.pt", tiny, cfg, "teacher", 0)
    for name in ("judge", "syncnet"):
        runtime.save(tmp_path / f"{name}.pt", kind="syncnet", config=dataclasses.asdict(expert.cfg), model=expert.state_dict())
    bench.main(["ablate", "--config", "tiny", "--weights", str(tmp_path), "--out", str(tmp_path), "--only", "1 step", "--updates", "1",
                "--train_clips", "6", "--clips", "2"])
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    assert [r["name"] for r in rows] == ["init alone, steps 1, landing 40, cache clean, clean 0.5", "1 step"]
    assert all(0 < r["psnr"] < 40 and r["landmark"] > 0 for r in rows)
    with pytest.raises(data.Fail, match="no row is called love"):
        bench.main(["ablate", "--only", "love"])


def test_cost_counts_what_is_there(capsys):
    bench.main(["cost", "--config", "tiny"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    net = nn_model.DiT(nn_model.Config(**nn_model.SIZES["tiny"]))
    assert result["parameters"] == sum(p.numel() for p in net.parameters()) and result["tokens"] == 8
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        net(torch.randn(1, 12, 8, 768), .5, net.embed_cond(*torch.randn(2, 1, 12, 8, 1536)), torch.randn(1, 12, 4, 96))
    forward = sum(bench.flops(net.cfg, 12)[i] for i in (0, 3))
    assert forward == pytest.approx(counted.get_total_flops(), rel=.1)       # less the sound and the time
    muon, _ = runtime.muon_and_adam(net, distill.Config())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with FlopCounterMode(display=False) as counted:
        muon.step()
    assert bench.muon_flops(muon) == counted.get_total_flops()
