import json
import shutil

import pytest
import torch

import bench
import data
import distill
import model
import runtime


@pytest.fixture
def run(tmp_path, tiny, expert_file, capsys, cfg, monkeypatch):
    """run("speed") -> the JSON object at the end, of networks that have learned nothing."""
    for name in ("teacher", "student"):
        model.save_dit(tmp_path / f"{name}.pt", tiny, name, world=data.world())
    for name in ("judge", "syncnet"):
        shutil.copy(expert_file, tmp_path / f"{name}.pt")
    few = ("clips", "latents", "batch", "init_steps", "dmd_steps", "dmd_batch", "critic_updates")
    few = {name: getattr(cfg, name) for name in few}
    monkeypatch.setitem(distill.PRESETS, "tiny", distill.PRESETS["tiny"] | few)
    monkeypatch.setattr(distill, "TABLE_CLIPS", 2)

    def result(name, *more):
        where = [f"--weights={tmp_path}", f"--out={tmp_path}/out", "--config=tiny"]
        bench.main([name, *where, "--clips=2", "--rounds=1", *more])
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["bench"] == name and found["config"] == "tiny" and found["device"] == "cpu"
        return found

    return result


def test_speed_and_attention_end_in_json(run, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)  # a minute
    for latents, row in run("attention")["rows"].items():
        assert latents in [f"{n} latent frames" for n in (12, 48, 192)]
        assert set(row) == {"a call a chunk", "mask", "flex_attention"} and min(row.values()) > 0
    found = run("speed")
    assert found["bound"] == pytest.approx(100 / 3) and found["peak_gflops"] > 0
    assert found["ratio"] == found["student"]["fps"] / found["teacher_guided"]["fps"] > 1
    for row in (found["student"], found["teacher"], found["teacher_guided"]):
        assert row["ttff_s"] > 0 and row["ms_per_chunk"] == pytest.approx(12_000 / row["fps"])
    assert set(found["train"]) == {"teacher_step_s", "student_update_s", "teacher_gflops"}
    assert min(found["train"].values()) > 0


def test_quality_ends_in_json(run, tmp_path):
    found = run("quality", "--teacher=few")
    rows = found["rows"]
    assert set(rows) == {"truth", "teacher", "teacher_guided", "student"}
    assert found["set"] == "dub" and found["clips"] == 2
    assert rows["truth"]["psnr"] > 70 and rows["truth"]["sharp"] == 1
    for worse in (rows["teacher"], rows["student"]):
        assert worse["sync_c"] < rows["truth"]["sync_c"] and worse["psnr_ci"] >= 0
        assert worse["landmark"] > rows["truth"]["landmark"] and worse["frechet"] > 1e-3
    assert rows["student"]["psnr"] < found["ceiling"]["psnr"] < 40
    assert (tmp_path / "out/quality-tiny-dub.png").is_file()
    alone = run("quality", "--teacher=none")["rows"]
    assert set(alone) == {"truth", "student"}
    assert alone["student"]["psnr"] == pytest.approx(rows["student"]["psnr"], abs=0.01)


def test_long_ends_in_json(run):
    """An untrained student: its first window is as good as its last."""
    found = run("long", "--seconds=20", "--people=1")
    rows = {name: row["psnr"] for name, row in found["rows"].items()}
    assert set(rows) == {"truth", "student", "started anew", "no sink", "window 3"}
    assert found["first"]["psnr"] == pytest.approx(found["last"]["psnr"], abs=1.5)
    assert rows["student"][:1] == pytest.approx(rows["started anew"][:1], abs=0.01)
    assert rows["student"] != rows["started anew"] and len(rows["student"]) == 2
    assert rows["student"] != rows["no sink"] != rows["window 3"]
    assert found["rows"]["truth"]["colour"] == [0, 0] and found["rows"]["truth"]["jump"] == [1, 1]


def test_ablate_ends_in_json(run):
    rows = run("ablate", "--only=1 step")["rows"]
    assert [row["name"] for row in rows] == ["1 step, init alone", "1 step"]
    assert all(0 < row["psnr"] < 40 and row["landmark"] > 0 for row in rows)


def test_what_a_folder_lacks_is_beside_the_teacher_that_its_student_names(tmp_path, tiny):
    """Or else bundled; but never the student, which would be another teacher's."""
    (tmp_path / "mine").mkdir()
    for name in ("teacher", "judge"):
        (tmp_path / f"mine/{name}.pt").touch()
    options = bench.Options(weights=str(tmp_path))
    for teacher, expected in ((f"{tmp_path}/mine/teacher.pt", "mine"), ("", "small")):
        model.save_dit(tmp_path / "student.pt", tiny, "student", options=dict(teacher=teacher))
        for name, folder in (("teacher", expected), ("judge", expected), ("syncnet", "small")):
            assert bench.checkpoint(options, name).parent.name == folder
    (tmp_path / "student.pt").rename(tmp_path / "teacher.pt")
    assert bench.checkpoint(options, "teacher").parent == tmp_path
    with pytest.raises(runtime.Fail, match="no student.pt"):
        bench.checkpoint(options, "student")


def test_a_table_is_markdown(capsys):
    bench.table("set", dict(a=dict(x=1.234, x_ci=0.05, y=2.0)), dict(x=2, y=0))
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines == ["| set | x | y |", "|---|---|---|", "| a | 1.23 ± 0.05 | 2 |"]
