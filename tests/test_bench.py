import functools
import json
import shutil

import pytest
import torch

import bench
import distill
import faces
import model
import runtime
import sample

ENDS = "first", "last"


@pytest.fixture
def run(tmp_path, tiny, expert_file, capsys, cfg, monkeypatch):
    """run("speed") -> the JSON object at the end, of networks that have learned nothing."""
    for name in ("teacher", "student"):
        model.save_dit(tmp_path / f"{name}.pt", tiny, name, world=faces.world())
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


def test_speed_and_attention_end_in_json(run):
    (row,) = run("attention")["rows"].values()
    assert set(row) == {"dense"} and row["dense"] > 0  # the others need a GPU
    found = run("speed")
    assert found["bound"] == pytest.approx(100 / 3) and found["peak_gflops"] > 0
    assert found["ratio"] == found["student"]["fps"] / found["teacher_guided"]["fps"] > 1
    for row in (found["student"], found["teacher"], found["teacher_guided"]):
        assert row["ttff_s"] > 0 and row["ms_per_chunk"] == pytest.approx(12_000 / row["fps"])
    assert set(found["train"]) == {"teacher_step_s", "student_step_s"}
    assert min(found["train"].values()) > 0


def test_quality_ends_in_json(run):
    found = run("quality")
    rows = found["rows"]
    assert {"truth", "teacher", "teacher_guided", "student"} < set(rows) and found["clips"] == 2
    assert rows["truth"]["psnr"] > 70 and rows["truth"]["sharp"] == 1
    for worse in (rows["teacher"], rows["student"]):
        assert worse["sync_c"] < rows["truth"]["sync_c"] and worse["psnr_ci"] >= 0
        assert worse["landmark"] > rows["truth"]["landmark"] and worse["frechet"] > 1e-3
    assert rows["student"]["psnr"] < found["ceiling"]["psnr"] < 40


def test_trajectory_ends_in_json(run, tmp_path, monkeypatch):
    monkeypatch.setattr(faces, "held_out", functools.partial(faces.held_out, latents=12))
    monkeypatch.setattr(bench, "LANDINGS", (20, 40))
    found = run("trajectory")
    rows = found["rows"]
    for name in ("guidance 1", "guidance 2"):
        assert rows[name]["x"] == list(range(50)) and len(rows[name]["sync_c_ci"]) == 50
    fixed = rows["50 steps: 1, 1.5, 2, 3, 4.5"]
    for i, name in ((0, "guidance 1"), (2, "guidance 2")):
        assert fixed["psnr"][i] == rows[name]["psnr"][49] != rows[name]["psnr"][0]
    assert rows["1, then 2"]["psnr"] != rows["2, then 2"]["psnr"] != rows["2, then 1"]["psnr"]
    assert rows["student"]["psnr"][0] != rows["student"]["psnr"][1] < rows["truth"]["psnr"][0]
    advice = found["recommended"]
    assert 0 <= advice["band_first"] <= advice["band_last"] < 50
    assert advice["landing"] in bench.LANDINGS
    for name in ("guidance", "two-steps", "ends", "mouths"):
        assert (tmp_path / f"out/trajectory-tiny-{name}.png").is_file()


def near(a, b):
    """The same pictures but for rounding."""
    return (a.int() - b.int()).abs().max() <= 1


def test_trajectories_by_hand(tiny, float32):
    """They end where the teacher dubs; and two steps, written out."""
    pairs = faces.held_out(2, 32, "held-out", torch.device("cpu"), latents=6)
    frames = dict(bench.looked_at(tiny, tiny, pairs, 2.0, range(30, 31), latents=3))
    how = dict(net=tiny, source=pairs.source, mel=pairs.mel)
    for guidance in (1.0, 2.0):
        dub = sample.dub_teacher(**how, guidance=guidance, latents=3)
        assert near(frames[f"guidance {guidance:g}", 49], dub)
        assert near(frames["50 steps: 1, 1.5, 2, 3, 4.5", guidance], dub)
    assert not near(frames["guidance 1", 49], dub)
    assert not near(frames["50 steps: 2 in the band, else 1", 2.0], dub)
    one_step = sample.dub_teacher(**how, steps=1, latents=3)
    assert near(frames["guidance 1", 0], one_step) and not near(frames["guidance 1", 30], one_step)
    assert near(frames["student", 2], sample.dub_student(**how))
    assert not near(frames["student", 1], frames["student", 2])

    rng, x0, t = torch.Generator().manual_seed(0), [], sample.tau(30)
    for start in (0, 3):
        cond = sample.embed_clip(tiny, pairs.source, pairs.mel, start, start + 3)
        noise = torch.randn(cond.known.shape, generator=rng)
        with torch.no_grad():
            x_t = noise + (t - 1) * (noise - tiny(noise, 1.0, cond))
            x0.append(sample.guided(tiny, x_t, t, cond, 2.0))
    by_hand = sample.to_frames(tiny, torch.cat(x0, 1), pairs.source)
    assert near(frames["1, then 2", 30], by_hand)
    for line, j in (("1, then 1", 30), ("2, then 2", 30), ("1, then 2", 35)):
        assert not near(frames[line, j], by_hand)


def test_the_rule_finds_a_band_and_a_landing():
    """Guidance buys most sync at 18 to 36, and costs as much everywhere."""
    flat, inside = torch.zeros(50).tolist(), [float(18 <= j <= 36) for j in range(50)]
    plain, guided = dict(sync_c=flat, frechet=flat), dict(sync_c=inside, frechet=[2.0] * 50)
    near_30 = [-((j - 30) ** 2) for j in bench.LANDINGS]
    two = dict(x=list(bench.LANDINGS), sync_c=near_30, frechet=[1.0] * len(near_30))
    found = bench.recommend(plain, guided, two)
    assert found == dict(band_first=18, band_last=36, landing=30)
    # Where it costs as much as it buys, it is not worth it; nor is a landing far from the truth.
    guided["frechet"] = [float(18 <= j < 27) for j in range(50)]
    two["frechet"] = [float(j < 35) for j in bench.LANDINGS]
    found = bench.recommend(plain, guided, two)
    assert found == dict(band_first=27, band_last=36, landing=35)


def test_long_ends_in_json(run):
    """An untrained student: its first ten seconds are as good as its last."""
    found = run("long", "--seconds=20")
    rows = found["rows"]
    assert set(rows) == {f"{name}, {end}" for name in ("truth", "student") for end in ENDS}
    assert found["first"] == rows["student, first"] != found["last"]
    assert found["first"]["psnr"] == pytest.approx(found["last"]["psnr"], abs=1.5)
    assert rows["truth, last"]["psnr"] > 70 and rows["truth, last"]["sharp"] == 1


def test_ablate_ends_in_json_and_goes_on(run, monkeypatch):
    how = "ablate", "--only=1 step,init alone", "--seeds=1"
    rows = run(*how)["rows"]
    assert [(row["name"], row["seed"]) for row in rows] == [("init alone", 0), ("1 step", 0)]
    assert all(0 < row["psnr"] < 40 and row["landmark"] > 0 for row in rows)
    assert rows[0]["psnr"] != rows[1]["psnr"]
    for stage in ("init", "dmd"):
        monkeypatch.setattr(distill, f"train_{stage}", None)  # what is there is not trained again
    assert run(*how)["rows"] == rows


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
