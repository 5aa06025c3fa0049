import numpy as np
import pytest
import torch

import analysis
import distill
import faces
import flow
import stream
from metrics import COLUMNS


def test_trajectory_ends_in_json(run, tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "LANDINGS", (20, 40))
    found = run("trajectory")
    rows = found["rows"]
    plain, guided = rows["steps"]["1.0"], rows["steps"]["2.0"]
    for steps in (plain, guided):
        assert [row["j"] for row in steps] == list(range(50))
        assert all(row["sync_c_ci"] >= 0 for row in steps)
    assert [row["guidance"] for row in rows["ends"]] == [1, 1.5, 2, 3, 4.5]
    for i, steps in ((0, plain), (2, guided)):
        assert rows["ends"][i]["psnr"] == steps[49]["psnr"] != steps[0]["psnr"]
    bands = rows["bands"]
    assert len({row["psnr"] for row in bands.values()} | {plain[49]["psnr"]}) == 7
    for name, differences in found["minus"]["bands"].items():
        assert differences["psnr"][0] == pytest.approx(bands[name]["psnr"] - plain[49]["psnr"])
    (differences,) = found["minus"]["landings"].values()  # of 20, less 40
    at_20, at_40 = (row["psnr"] for row in rows["two_steps"]["2.0"]["2.0"])
    assert differences["psnr"][0] == pytest.approx(at_20 - at_40)
    curves = []
    for first in ("1.0", "2.0"):
        for second in ("1.0", "2.0"):
            curve = rows["two_steps"][first][second]
            assert [row["landing"] for row in curve] == [20, 40]
            curves.append(tuple(row["psnr"] for row in curve))
    assert len(set(curves)) == 4
    first, last = (row["psnr"] for row in rows["student"])
    assert first != last < rows["truth"]["psnr"]
    for name in ("guidance", "bands", "two-steps", "ends", "mouths"):
        assert (tmp_path / f"out/trajectory-tiny-{name}.png").is_file()


def near(a, b):
    """The same pictures but for rounding."""
    return (a.int() - b.int()).abs().max() <= 1


def test_trajectories_by_hand(tiny, float32):
    """They end where the teacher dubs; and two steps, written out."""
    pairs = faces.make_pairs(2, 32, "held-out", torch.device("cpu"), latents=3)
    source, mel = pairs.source, pairs.mel
    walks = analysis.Walks(tiny, pairs)
    ends = {}
    for guidance in (1.0, 2.0):
        guesses = [walks.frames(x0) for x0 in walks.walk([guidance] * 50)]
        assert len(guesses) == 50
        dub = stream.dub_teacher(tiny, source, mel, guidance=guidance)
        assert near(guesses[49], dub)
        ends[guidance] = guesses[49]
        if guidance == 1.0:
            one_step = stream.dub_teacher(tiny, source, mel, steps=1)
            assert near(guesses[0], one_step) and not near(guesses[30], one_step)
    assert not near(ends[1.0], ends[2.0])
    *_, end = walks.walk([2.0 if j == 30 else 1.0 for j in range(50)])
    assert not near(walks.frames(end), ends[2.0])
    last = stream.dub_student(tiny, source, mel)
    first = stream.dub_student(analysis.one_step(tiny), source, mel)
    assert not near(first, last) and tiny.cfg.num_steps == 2

    rng = torch.Generator().manual_seed(0)
    t = flow.grid_time(30)
    cond = stream.embed_clip(tiny, source, mel)
    noise = torch.randn(cond.masked_source.shape, generator=rng)
    with torch.no_grad():
        x_t = noise + (t - 1) * (noise - tiny(noise, 1.0, cond))
        x0 = flow.guided(tiny, x_t, t, cond, 2.0)
    by_hand = stream.to_frames(tiny, x0, source)
    guesses = {}
    for guidance in (1.0, 2.0):
        first = walks.guess(walks.noise, 0, guidance)
        for landing, second in ((30, 1.0), (30, 2.0), (35, 2.0)):
            video = walks.frames(walks.second_guess(first, landing, second))
            guesses[guidance, second, landing] = video
    assert near(guesses[1.0, 2.0, 30], by_hand)
    for case in ((1.0, 1.0, 30), (2.0, 2.0, 30), (1.0, 2.0, 35)):
        assert not near(guesses[case], by_hand)


def test_ablate_ends_in_json_and_goes_on(run, monkeypatch):
    command = "ablate", "--only=1 step,init alone,", "--seeds=2"
    found = run(*command)
    rows = found["rows"]
    names = ["as it is", "init alone", "1 step"]
    assert [(row["seed"], row["name"]) for row in rows] == [(i, n) for i in (0, 1) for n in names]
    assert len({row["psnr"] for row in rows}) == 6 and all(0 < row["psnr"] < 40 for row in rows)
    assert all(row["landmark"] > 0 for row in rows)
    for place, name in enumerate(names[1:], start=1):
        for measure, (difference, low, high) in found["minus"][name].items():
            per_seed = [rows[start + place][measure] - rows[start][measure] for start in (0, 3)]
            assert low <= difference <= high and difference == pytest.approx(np.mean(per_seed))
    for stage in ("init", "dmd"):
        monkeypatch.setattr(distill, f"train_{stage}", None)  # what is there is not trained again
    assert run(*command)["rows"] == rows
    assert len(run("ablate", "--only=as it is", "--seeds=1")["rows"]) == 1
    trained = []

    def train(recipe, *parts):
        trained.append(recipe.out)
        return parts[0]

    monkeypatch.setattr(distill, "train_init", train)
    monkeypatch.setattr(distill, "train_dmd", train)
    monkeypatch.setitem(distill.PRESETS["tiny"], "beta", 10.0)  # another training
    run("ablate", "--only=as it is", "--seeds=1")
    assert len(trained) == 2


def test_a_difference_counts_if_it_is_there_with_each_seed():
    seeds = [(1.0, 0.7, 1.2), (0.4, 0.1, 0.9), (0.7, 0.3, 1.0)]
    found = {"a": [dict.fromkeys(COLUMNS, interval) for interval in seeds]}
    merged = analysis.over_seeds({"a": found["a"]})
    for interval in merged["a"].values():
        assert interval == pytest.approx((0.7, 0.1, 1.2))
    assert analysis.over_seeds({}) == {}
