import dataclasses
import json

import pytest
import torch

import bench
import data
import model as nn_model
import quality
import runtime


def test_speed_ends_in_json(capsys, tmp_path):
    bench.main(["speed", "--config", "tiny", "--rounds", "1", "--seconds", "1.92", "--memory", "0", "--chunks", "120", "--out", str(tmp_path)])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["student"]["fps"] > 0 and result["student"]["passes_per_chunk"] == 3 and {"pass 1", "cache pass"} <= set(result["student"]["ms"])
    assert result["bound"] == pytest.approx(100 / 3) and result["ratio"] == pytest.approx(result["student"]["fps"] / result["teacher_guided"]["fps"])
    assert 0 < result["train"]["mfu"] < 1 and result["train"]["student_update_s"] > result["train"]["teacher_step_s"] > 0
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
    rows = result["sets"][0]["rows"]
    assert set(rows) == {"truth", "teacher", "teacher_guided", "student"} and rows["student"]["fps"] > rows["teacher_guided"]["fps"] > 0
    assert rows["truth"]["psnr"] > 70 and rows["truth"]["ssim"] == pytest.approx(1) and rows["truth"]["seams"] == pytest.approx(1)
    for worse in ("teacher", "student"):
        assert rows[worse]["sync_c"] < rows["truth"]["sync_c"] and rows[worse]["ssim"] < .95 and rows[worse]["landmark"] > rows["truth"]["landmark"]
    assert rows["student"]["psnr"] < result["sets"][0]["ceiling"]["psnr"] < 40 and rows["truth"]["opening"] > .5
    assert result["offsets"]["judge"]["clean"] in (0, .5, 1) and (tmp_path / "quality-tiny-dub.png").is_file()


def test_seams_are_seen():
    video = data.draw(3, 8, 64).video
    mean = video.float().mean()
    brighter = torch.arange(64) // 16 % 2 * 20.
    seamed = data.to_uint8((video + brighter[:, None, None] - mean) / 127.5)
    smooth = data.to_uint8((video - mean) / 127.5)
    assert quality.border_energy(seamed, 16) > 2 * quality.border_energy(smooth, 16)


def test_ssim_by_hand():
    """Constant pictures: only the luminance term is left."""
    a, b = torch.full((2, 32, 32, 3), 51, dtype=torch.uint8), torch.full((2, 32, 32, 3), 102, dtype=torch.uint8)
    assert quality.ssim(a, b) == pytest.approx((2 * .2 * .4 + 1e-4) / (.04 + .16 + 1e-4), abs=1e-6) and quality.ssim(a, a) == pytest.approx(1)


def test_summary_leaves_out_what_is_not_there():
    mean, half = quality.summary(torch.tensor([1., 2., 3., float("nan")]))
    assert mean == 2 and half == pytest.approx(1.96 / 3 ** .5)
