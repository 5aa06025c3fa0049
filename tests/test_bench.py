import numpy as np
import pytest

import bench
import runtime
from metrics import COLUMNS

ENDS = "first", "last"


def test_speed_ends_in_json(run):
    found = run("speed", "--rounds=1")
    assert found["bound"] == pytest.approx(100 / 3) and found["peak_gflops"] > 0
    assert found["ratio"] == found["student"]["fps"] / found["teacher_guided"]["fps"] > 1
    for row in (found["student"], found["teacher"], found["teacher_guided"]):
        assert row["ttff_s"] > 0 and row["ms_per_chunk"] == pytest.approx(12_000 / row["fps"])
    assert set(found["train"]) == {"teacher_step_s", "student_step_s"}
    assert min(found["train"].values()) > 0


def test_quality_ends_in_json(run):
    found = run("quality")
    rows = found["rows"]
    assert {"truth", "teacher", "teacher, guidance 1.5", "student"} < set(rows) and found[
        "clips"
    ] == 2
    assert rows["truth"]["psnr"] > 70 and rows["truth"]["sharpness"] == 1
    for worse in (rows["teacher"], rows["student"]):
        assert worse["sync_c"] < rows["truth"]["sync_c"] and worse["psnr_ci"] >= 0
        assert worse["landmark"] > rows["truth"]["landmark"] and worse["frechet"] > 1e-3
    assert rows["student"]["psnr"] < rows["truth, other detail"]["psnr"] < 40
    assert set(found["minus"]) == set(rows)
    for base, differences in found["minus"].items():
        assert set(differences) == set(rows) - {base}
        for name, measures in differences.items():
            assert set(measures) == set(COLUMNS)
            for measure, (difference, low, high) in measures.items():
                apart = rows[name][measure] - rows[base][measure]
                assert low <= high and difference == pytest.approx(apart)


def test_long_ends_in_json(run, monkeypatch):
    """An untrained student: its first ten seconds are as good as its last."""
    monkeypatch.setattr(bench, "LONG_SECONDS", 20)
    rows = run("long")["rows"]
    assert set(rows) == {f"{name}, {end}" for name in ("truth", "student") for end in ENDS}
    assert rows["student, first"] != rows["student, last"]
    assert rows["student, first"]["psnr"] == pytest.approx(rows["student, last"]["psnr"], abs=1.5)
    assert rows["truth, last"]["psnr"] > 70 and rows["truth, last"]["sharpness"] == 1


def test_what_a_folder_lacks_is_taken_from_the_bundled_ones(tmp_path):
    """But never the student, which would be another teacher's."""
    options = bench.Options(source=str(tmp_path))
    for name in ("teacher", "judge"):
        assert bench.checkpoint(options, name) == runtime.BUNDLED / f"small/{name}.pt"
        (tmp_path / f"{name}.pt").touch()
        assert bench.checkpoint(options, name).parent == tmp_path
    with pytest.raises(runtime.UserError, match="no student.pt"):
        bench.checkpoint(options, "student")


def test_json_holds_what_numpy_counts():
    found = bench.json_ready({"a": np.float32(0.5), "b": [np.int64(2), (float("nan"),)], "c": "x"})
    assert found == {"a": 0.5, "b": [2, [None]], "c": "x"} and type(found["a"]) is float
