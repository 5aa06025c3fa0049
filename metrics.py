"""How a dub is measured: by a judge, which trains nothing, against the exact answer.

`means` is what a training log shows. `evaluate`, `summarize` and `compare` make the tables: means
over people with their intervals, the Fréchet distance without its bias, and the differences between
two rows that are beyond chance.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
import torch

from data import mouth_mask, mouth_rectangle, to_float
from runtime import autocast
from syncnet import score

# The columns of the tables and their digits. The first five are means over people, see
# compute_metrics. The last is the Fréchet distance between the dubs and the truths of all people; a
# plain one grows as the number of people falls, so its bias is removed by the jackknife, see
# frechet_of_all. What is left may lie a little below zero.
COLUMNS = {"sync_c": 3, "psnr": 2, "landmark": 2, "gain": 2, "sharpness": 2, "frechet": 2}
RESAMPLES = 1000  # of the people, for the interval of a difference between two rows
FRECHET_RESAMPLES = 400  # fewer for the Fréchet distance, since one takes 15 ms


def mouth_psnr(dub, truth):
    """PSNR in dB inside the mask. dub, truth (n, T, S, S, 3) uint8 -> (n,)."""
    mask = mouth_mask(dub.shape[2]).to(dub.device)[:, :, None]
    error = ((dub.float() - truth.float()) ** 2 * mask).mean((1, 2, 3, 4)) / mask.mean()
    return 10 * (255**2 / error.clamp(min=1e-3)).log10()


def gradient_energy(video):
    """Mean squared difference of neighbouring pixels' brightness in the mask: how sharp it is.
    video (n, T, S, S, 3) uint8 -> (n,)."""
    mask = mouth_mask(video.shape[2]).to(video.device)
    gray = video.float().mean(-1)
    across = (gray.diff(dim=3).square() * mask[:, 1:] * mask[:, :-1]).sum((2, 3))
    down = (gray.diff(dim=2).square() * mask[1:] * mask[:-1]).sum((2, 3))
    return (across + down).mean(1)


def centred_opening(mouth):
    """Mouths (n, T, 2) -> their opening less its mean over the clip, (n, T)."""
    opening = mouth[..., 0]
    return opening - opening.mean(1, keepdim=True)


@torch.no_grad()
def compute_metrics(dub, pairs, judge):
    """Dubs (n, T, S, S, 3) uint8 of faces.Pairs -> a dict of (n,) tensors: sync_c; psnr in the
    mask; landmark: mean error of the mouth's opening and width, in percent of the side; gain: slope
    of the opening over the truth's, under 1 for a mumbler; sharpness: 1 if as sharp as the truth.
    """
    rows = []
    for i in range(len(dub)):  # one by one: whatever the batch, it fits
        video = dub[i : i + 1]
        truth = pairs.truth[i : i + 1]
        drawn_mouth = pairs.mouth[i : i + 1]
        rectangle = mouth_rectangle(video)
        with autocast(judge):
            _, _, mouth = judge.encode_video(to_float(rectangle))
        opening = centred_opening(mouth)
        drawn_opening = centred_opening(drawn_mouth)
        sync_c, _, _ = score(judge, rectangle, pairs.mel[i : i + 1])
        row = dict(
            sync_c=sync_c,
            psnr=mouth_psnr(video, truth),
            landmark=100 * (mouth - drawn_mouth).abs().mean((1, 2)),
            gain=(opening * drawn_opening).sum(1) / drawn_opening.square().sum(1),
            sharpness=gradient_energy(video) / gradient_energy(truth),
        )
        rows.append(row)
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def features(judge, dub):
    """The judge's features of each frame of each clip (n, T, S, S, 3) uint8 -> (n, T, E)."""
    found = []
    for video in dub:
        with autocast(judge):
            of_frames, _, _ = judge.encode_video(to_float(mouth_rectangle(video[None])))
        found.append(of_frames[0])
    return torch.stack(found)


class Moments(NamedTuple):
    """Sums over the frames of each person, from which the mean and the covariance of the features
    of any choice of people follow without going over the frames again."""

    frames: int  # of each person
    sums: torch.Tensor  # (n, E) of the features
    products: torch.Tensor  # (n, E, E) of their outer products


def moments_of(seen):
    """Features (n, T, E) of T frames of each of n people -> Moments."""
    seen = seen.cpu().double()
    return Moments(frames=seen.shape[1], sums=seen.sum(1), products=seen.mT @ seen)


def mean_and_covariance(moments, weights):
    """Of the features of all frames, if each person's are there weights (n,) times."""
    count = moments.frames * weights.sum()
    mean = weights @ moments.sums / count
    products = torch.einsum("n,nef->ef", weights, moments.products)
    return mean, (products - count * mean.outer(mean)) / (count - 1)


def gaussian_distance(mean_a, cov_a, mean_b, cov_b):
    """|m - m'|^2 + tr(C + C' - 2 (C C')^1/2): how far two Gaussians are apart, as in FID.

    With C = R R^T, the eigenvalues of C C' are those of the symmetric R^T C' R, which are found
    many times faster."""
    apart = (mean_a - mean_b).square().sum()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt()
    trace = torch.linalg.eigvalsh(root.T @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (apart + cov_a.trace() + cov_b.trace() - 2 * trace).item()


def frechet(dub, truth, weights):
    """The Fréchet distance of two sets of features, given as Moments, as FID is, if each person is
    there weights (n,) times. What distribution matching is for: exaggeration is far, and so is an
    average of mouths. (A plain blur is not. The fewer people, the larger it is: see
    frechet_of_all.)"""
    dub_mean, dub_covariance = mean_and_covariance(dub, weights)
    truth_mean, truth_covariance = mean_and_covariance(truth, weights)
    return gaussian_distance(dub_mean, dub_covariance, truth_mean, truth_covariance)


def frechet_of_all(dub, truth):
    """-> the Fréchet distance of all n people without its bias, and half the width of the 95 %
    interval of the distance with its bias.

    A distance of few people is too large: two small samples differ even where their distributions
    are equal. The bias falls about as 1 / n, so the jackknife, which leaves out one person at a
    time, tells how large it is: n d_all - (n - 1) mean(d_without_one). With fewer people than
    features a part of it remains: compare only distances of the same number of people."""
    n = len(dub.sums)
    everyone = torch.ones(n, dtype=torch.double)
    distance = frechet(dub, truth, everyone)
    without_one = []
    for person in range(n):
        weights = everyone.clone()
        weights[person] = 0
        without_one.append(frechet(dub, truth, weights))
    corrected = n * distance - (n - 1) * np.mean(without_one)
    return corrected, 1.96 * ((n - 1) * np.var(without_one)) ** 0.5


def means(dub, pairs, judge):
    """The metrics' means over the clips, and the Fréchet distance: what a training log shows."""
    metrics = compute_metrics(dub, pairs, judge)
    row = {name: values.mean().item() for name, values in metrics.items()}
    of_dub = moments_of(features(judge, dub))
    of_truth = moments_of(features(judge, pairs.truth))
    row["frechet"] = frechet(of_dub, of_truth, torch.ones(len(dub), dtype=torch.double))
    return row


@dataclasses.dataclass
class Evaluation:
    """What the judge finds in the dubs of n people."""

    values: dict  # {measure: (n,) numpy}, see compute_metrics
    dub: Moments
    truth: Moments
    frechet: tuple  # of all people, see frechet_of_all

    @functools.cached_property
    def frechet_resampled(self):
        """(FRECHET_RESAMPLES,) Fréchet distances of n people who are drawn from the n, with
        replacement: the same draws in all Evaluations of n people, so that they can be compared."""
        n = len(self.dub.sums)
        rng = np.random.default_rng(0)
        distances = []
        for _ in range(FRECHET_RESAMPLES):
            times_drawn = np.bincount(rng.integers(n, size=n), minlength=n)
            weights = torch.from_numpy(times_drawn).double()
            distances.append(frechet(self.dub, self.truth, weights))
        return np.array(distances)


def evaluate(dub, pairs, judge):
    """dub (n, T, S, S, 3) uint8 of faces.Pairs -> Evaluation."""
    values = {}
    for key, value in compute_metrics(dub, pairs, judge).items():
        values[key] = value.cpu().double().numpy()
    of_dub = moments_of(features(judge, dub))
    of_truth = moments_of(features(judge, pairs.truth))
    return Evaluation(values, of_dub, of_truth, frechet_of_all(of_dub, of_truth))


def summarize(evaluation):
    """A row of the table: the means over people and the Fréchet distance, and under NAME_ci half
    of their 95 % intervals."""
    row = {}
    for key, values in evaluation.values.items():
        row[key] = values.mean()
        row[key + "_ci"] = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    row["frechet"], row["frechet_ci"] = evaluation.frechet
    return row


def paired_difference(values_a, values_b, rng):
    """The mean of a - b over people, values (n,) of the same people each -> (difference, low,
    high), a 95 % interval by the bootstrap: people are drawn again, with replacement. What makes
    one person harder to dub than another is in both values and cancels. (Of few people the
    interval is too narrow: by 12 % of 16, by 7 % of 24.)"""
    differences = values_a - values_b
    n = len(differences)
    people = rng.integers(n, size=(RESAMPLES, n))
    low, high = np.quantile(differences[people].mean(axis=1), [0.025, 0.975])
    return differences.mean(), low, high


def frechet_difference(a, b):
    """The Fréchet distance of Evaluation a less that of b -> (difference, low, high), again by
    drawing people anew, the same for both. A resample holds some people twice, which makes its bias
    larger; so only the spread of the resamples is used, around the difference without bias."""
    resampled = a.frechet_resampled - b.frechet_resampled
    low, high = np.quantile(resampled, [0.025, 0.975]) - np.mean(resampled)
    difference = a.frechet[0] - b.frechet[0]
    return difference, difference + low, difference + high


def compare(a, b):
    """Two Evaluations of the same people -> {measure: (a minus b, low, high)}."""
    rng = np.random.default_rng(0)
    differences = {}
    for key in a.values:
        differences[key] = paired_difference(a.values[key], b.values[key], rng)
    differences["frechet"] = frechet_difference(a, b)
    return differences


def beyond_chance(differences):
    """What `compare` found whose 95 % interval does not hold zero, in words. (Of twenty measures
    that do not differ at all, one is expected here.)"""
    words = []
    for key, (difference, low, high) in differences.items():
        if low > 0 or high < 0:
            digits = COLUMNS[key]
            interval = f"[{low:+.{digits}f}, {high:+.{digits}f}]"
            words.append(f"{key} {difference:+.{digits}f} {interval}")
    return ", ".join(words) or "nothing"


def table(first, rows, columns):
    """Print {name: {column: value, column_ci: half an interval, column_bold: is it to be seen}} as
    Markdown; all but the value may be missing."""
    print(f"\n| {first} | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
    for name, row in rows.items():
        print(f"| {name}", end="")
        for key, digits in columns.items():
            error = f" ± {row[key + '_ci']:.{digits}f}" if key + "_ci" in row else ""
            value = round(row[key], digits) + 0.0  # + 0.0, since -0.00 is no number to read
            bold = "**" if row.get(key + "_bold") else ""
            print(f" | {bold}{value:.{digits}f}{bold}{error}", end="")
        print(" |")
