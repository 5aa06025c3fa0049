import numpy as np
import pytest
import torch

import bench
import distill
import model
import runtime
import syncnet

ENDS = "first", "last"


def test_speed_and_attention_end_in_json(run):
    (row,) = run("attention", "--rounds=1")["rows"].values()
    assert set(row) == {"dense"} and row["dense"] > 0  # the others need a GPU
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
            assert set(measures) == set(bench.COLUMNS)
            for measure, (difference, low, high) in measures.items():
                apart = rows[name][measure] - rows[base][measure]
                assert low <= high and difference == pytest.approx(apart)


def test_long_ends_in_json(run):
    """An untrained student: its first ten seconds are as good as its last."""
    found = run("long", "--seconds=20")
    rows = found["rows"]
    assert set(rows) == {f"{name}, {end}" for name in ("truth", "student") for end in ENDS}
    assert found["first"] == rows["student, first"] != found["last"]
    assert found["first"]["psnr"] == pytest.approx(found["last"]["psnr"], abs=1.5)
    assert rows["truth, last"]["psnr"] > 70 and rows["truth, last"]["sharpness"] == 1


def test_what_a_folder_lacks_is_where_its_student_had_it_from(tmp_path, tiny):
    """From --teacher, --weights, or bundled; but never the student, which would be another
    teacher's."""
    (tmp_path / "mine").mkdir()
    for name in ("teacher", "judge"):
        (tmp_path / f"mine/{name}.pt").touch()
    options = bench.Options(weights=str(tmp_path))
    mine = tmp_path / "mine"
    for teacher, weights, expected in (
        (f"{mine}/teacher.pt", "", "mine"),
        ("", str(mine), "mine"),
        ("", "", "small"),
    ):
        cfg = distill.Config(teacher=teacher, weights=weights)
        model.save_dit(tmp_path / "student.pt", tiny, "student", **distill.remembered(cfg))
        for name, folder in (("teacher", expected), ("judge", expected), ("syncnet", "small")):
            assert bench.checkpoint(options, name).parent.name == folder
    (tmp_path / "student.pt").rename(tmp_path / "teacher.pt")
    assert bench.checkpoint(options, "teacher").parent == tmp_path
    with pytest.raises(runtime.UserError, match="no student.pt"):
        bench.checkpoint(options, "student")


def test_a_table_is_markdown(capsys):
    bench.table("set", dict(a=dict(x=1.234, x_ci=0.05, y=2.0, y_bold=True)), dict(x=2, y=0))
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines == ["| set | x | y |", "|---|---|---|", "| a | 1.23 ± 0.05 | **2** |"]


def evaluation(dub, truth, **values):
    """Features (n, T, E) of dubs and truths, and measures (n,) -> an Evaluation."""
    dub = bench.moments_of(dub)
    truth = bench.moments_of(truth)
    return bench.Evaluation(values, dub, truth, bench.frechet_of_all(dub, truth))


def test_a_paired_difference_shows_what_the_spread_of_people_hides():
    """One dub is better by .2 for everyone, give or take; people differ by 3."""
    rng = np.random.default_rng(0)
    people = rng.normal(24, 3, 64)
    a = people + 0.2 + rng.normal(0, 0.3, 64)
    unpaired = 1.96 * ((a.var(ddof=1) + people.var(ddof=1)) / 64) ** 0.5
    assert abs(a.mean() - people.mean()) < unpaired
    difference, low, high = bench.paired_difference(a, people, rng)
    assert difference == pytest.approx(a.mean() - people.mean())
    assert 0 < low < 0.2 < high < 0.4
    assert high - low == pytest.approx(2 * 1.96 * 0.3 / 8, rel=0.3)  # as the normal interval
    _, low, high = bench.paired_difference(people, a, rng)
    assert low < high < 0
    _, low, high = bench.paired_difference(people + rng.normal(0, 0.3, 64), people, rng)
    assert low < 0 < high


def test_sums_by_person_give_the_frechet_distance_of_all_frames():
    dub = torch.randn(4, 30, 5) + 0.3
    truth = torch.randn(4, 30, 5)
    found = evaluation(dub, truth)
    for times in ([1, 1, 1, 1], [2, 0, 1, 1], [0, 0, 1, 0]):
        people = torch.arange(4).repeat_interleave(torch.tensor(times))
        whole = syncnet.frechet(dub[people].flatten(0, 1), truth[people].flatten(0, 1))
        assert bench.frechet_of(
            found.dub, found.truth, torch.tensor(times).double()
        ) == pytest.approx(whole)


SPREAD = 1 / torch.arange(1, 129).sqrt()  # of 128 features: the first ones vary most, as usual


def features_of_gaussians(more, shift, people=64):
    """Features (people, 48, 128) of dubs and of truths, and the distance of their distributions.
    The dubs vary more with the person, by `more`, and are off by `shift` in one feature. The
    frames of a person are nearly the same."""
    person = torch.randn(people, 1, 128)
    other = torch.randn(people, 1, 128)
    truth = SPREAD * (person + 0.3 * torch.randn(people, 48, 128))
    dub = SPREAD * (person + more * other + 0.3 * torch.randn(people, 48, 128))
    dub[..., 0] += shift
    wider = (1.09 + more**2) ** 0.5 - 1.09**0.5
    return dub, truth, shift**2 + (wider * SPREAD).square().sum().item()


@pytest.mark.parametrize("people", [32, 64, 256])
def test_the_jackknife_removes_most_of_the_frechet_distances_bias(people):
    """And with more people than features nearly all of it."""
    dub, truth, distance = features_of_gaussians(0.5, 0.3, people)
    found = evaluation(dub, truth)
    plain = bench.frechet_of(found.dub, found.truth, torch.ones(people).double())
    corrected, half_interval = found.frechet
    # Few people always seem farther off.
    assert plain - distance > (0.1 if people == 256 else 0.4)
    assert abs(corrected - distance) < 0.6 * (plain - distance)
    assert 0 < half_interval < plain
    if people == 256:
        assert abs(corrected - distance) < 0.07
    nothing, _ = evaluation(truth, truth).frechet
    assert nothing == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("people", [32, 256])
def test_frechet_distances_of_the_same_people_are_compared_in_pairs(people):
    """A known difference is found even with so few people that each distance has a bias."""
    dub, truth, _ = features_of_gaussians(0.5, 0.0, people)
    worse = dub.clone()
    worse[..., 0] += 0.6
    near = evaluation(dub, truth)
    far = evaluation(worse, truth)
    difference, low, high = bench.frechet_difference(far, near)
    assert 0 < low < difference < high and low < 0.6**2 < high
    backwards, low, high = bench.frechet_difference(near, far)
    assert low < backwards < high < 0 and backwards == pytest.approx(-difference)
    assert bench.frechet_difference(near, near) == (0, 0, 0)


def test_what_is_beyond_chance_is_told_in_words():
    found = dict(sync_c=(0.004, -0.001, 0.009), psnr=(0.16, 0.01, 0.3), gain=(-0.2, -0.3, -0.1))
    told = bench.beyond_chance(found)
    assert told == "psnr +0.16 [+0.01, +0.30], gain -0.20 [-0.30, -0.10]"
    assert bench.beyond_chance(dict(sync_c=found["sync_c"])) == "nothing"


def test_json_holds_what_numpy_counts():
    found = bench.json_ready({"a": np.float32(0.5), "b": [np.int64(2), (float("nan"),)], "c": "x"})
    assert found == {"a": 0.5, "b": [2, [None]], "c": "x"} and type(found["a"]) is float
