import numpy as np
import pytest
import torch
import torch.nn.functional as F

import metrics
import runtime
from data import mouth_rectangle, to_float


@torch.no_grad()
def test_measures_of_the_truth_of_a_mumbler_and_of_a_blur(expert, val):
    """A mumbler, in step with the truth, opens half as far: gain 1/2."""
    with runtime.autocast(expert):
        read = torch.cat(
            [expert.encode_video(to_float(mouth_rectangle(x[None])))[2] for x in val.truth]
        )
    found = metrics.compute_metrics(val.truth, val._replace(mouth=2 * read), expert)
    torch.testing.assert_close(found["gain"], torch.full((2,), 0.5))
    torch.testing.assert_close(found["landmark"], 100 * read.abs().mean((1, 2)))
    assert (found["sharpness"] == 1).all() and (found["psnr"] > 70).all()
    pixels = val.truth.flatten(0, 1).permute(0, 3, 1, 2).float()
    blurred = F.avg_pool2d(pixels, 3, 1, 1).permute(0, 2, 3, 1).view(val.truth.shape)
    found = metrics.compute_metrics(blurred.to(torch.uint8), val, expert)
    assert (found["sharpness"] < 0.7).all() and (found["psnr"] < 40).all()


def test_a_table_is_markdown(capsys):
    metrics.table("set", dict(a=dict(x=1.234, x_ci=0.05, y=2.0, y_bold=True)), dict(x=2, y=0))
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines == ["| set | x | y |", "|---|---|---|", "| a | 1.23 ± 0.05 | **2** |"]


def evaluation(dub, truth, **values):
    """Features (n, T, E) of dubs and truths, and measures (n,) -> an Evaluation."""
    dub = metrics.moments_of(dub)
    truth = metrics.moments_of(truth)
    return metrics.Evaluation(values, dub, truth, metrics.frechet_of_all(dub, truth))


def test_frechet_of_two_known_gaussians():
    """|m - m'|^2 + sum (s - s')^2 where both are spread along the axes."""
    a, b = torch.randn(2, 100_000, 3) * torch.tensor([[[1.0, 2.0, 3.0]], [[2.0, 2.0, 1.0]]])
    a, b = (metrics.moments_of(x[None]) for x in (a, b + torch.tensor([1.0, 0.0, 2.0])))
    one = torch.ones(1).double()
    assert metrics.frechet(a, b, one) == pytest.approx(10, rel=0.02)
    assert metrics.frechet(a, a, one) == pytest.approx(0, abs=1e-6)


def test_a_paired_difference_shows_what_the_spread_of_people_hides():
    """One dub is better by .2 for everyone, give or take; people differ by 3."""
    rng = np.random.default_rng(0)
    people = rng.normal(24, 3, 64)
    a = people + 0.2 + rng.normal(0, 0.3, 64)
    unpaired = 1.96 * ((a.var(ddof=1) + people.var(ddof=1)) / 64) ** 0.5
    assert abs(a.mean() - people.mean()) < unpaired
    difference, low, high = metrics.paired_difference(a, people, rng)
    assert difference == pytest.approx(a.mean() - people.mean())
    assert 0 < low < 0.2 < high < 0.4
    assert high - low == pytest.approx(2 * 1.96 * 0.3 / 8, rel=0.3)  # as the normal interval
    _, low, high = metrics.paired_difference(people, a, rng)
    assert low < high < 0
    _, low, high = metrics.paired_difference(people + rng.normal(0, 0.3, 64), people, rng)
    assert low < 0 < high


def test_sums_by_person_give_the_frechet_distance_of_all_frames():
    dub = torch.randn(4, 30, 5) + 0.3
    truth = torch.randn(4, 30, 5)
    found = evaluation(dub, truth)
    for times in ([1, 1, 1, 1], [2, 0, 1, 1], [0, 0, 1, 0]):
        people = torch.arange(4).repeat_interleave(torch.tensor(times))
        gaussians = []
        for frames in (dub[people].flatten(0, 1).double(), truth[people].flatten(0, 1).double()):
            gaussians += [frames.mean(0), frames.T.cov()]
        whole = metrics.gaussian_distance(*gaussians)
        times = torch.tensor(times).double()
        assert metrics.frechet(found.dub, found.truth, times) == pytest.approx(whole)


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
    plain = metrics.frechet(found.dub, found.truth, torch.ones(people).double())
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
    difference, low, high = metrics.frechet_difference(far, near)
    assert 0 < low < difference < high and low < 0.6**2 < high
    backwards, low, high = metrics.frechet_difference(near, far)
    assert low < backwards < high < 0 and backwards == pytest.approx(-difference)
    assert metrics.frechet_difference(near, near) == (0, 0, 0)


def test_what_is_beyond_chance_is_told_in_words():
    found = dict(sync_c=(0.004, -0.001, 0.009), psnr=(0.16, 0.01, 0.3), gain=(-0.2, -0.3, -0.1))
    told = metrics.beyond_chance(found)
    assert told == "psnr +0.16 [+0.01, +0.30], gain -0.20 [-0.30, -0.10]"
    assert metrics.beyond_chance(dict(sync_c=found["sync_c"])) == "nothing"
