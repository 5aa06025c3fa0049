"""What the drawn people say, and whether the bundled student hears a person."""

import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch

import bench
import data
import faces
import flow
import runtime
import stream
import voices
from model import DiT
from runtime import load_net
from syncnet import SyncNet

SMALL = runtime.BUNDLED / "small"


def phones_of(text, voice):
    samples, rate, phones = voices.synthesize(text, voice)
    return samples, rate, voices.split_phones([(start / rate, ipa) for start, ipa in phones])


def test_a_known_word_has_its_phones_at_their_times():
    """Hissing is where an s is said to be, and nowhere else; a diphthong is two phones."""
    samples, rate, phones = phones_of("sasa", "es")
    assert [letter for _, letter in phones if letter] == ["s", "a", "s", "a"]
    starts = [start for start, _ in phones]
    assert starts == sorted(starts) and 0.2 < starts[-1] < 1
    hiss = []
    for start, end in zip(starts[:4], starts[1:5]):
        part = samples[int(start * rate) : int(end * rate)]
        power = np.abs(np.fft.rfft(part)) ** 2
        hiss.append(power[len(power) // 3 :].sum() / power.sum())  # above 3.7 kHz
    assert min(hiss[0], hiss[2]) > 0.5 and max(hiss[1], hiss[3]) < 0.1
    assert [letter for _, letter in phones_of("my", "en-us")[2]][:3] == ["m", "a", "ɪ"]


@pytest.mark.parametrize("language", voices.LANGUAGES)
def test_the_lips_close_at_every_bilabial(language):
    text = voices.invent_text(np.random.default_rng(7), language, words=40)
    _, _, phones = phones_of(text, f"{language}+m3")
    end = phones[-1][0] + 0.5
    lips = voices.lip_tracks(phones, end)
    assert lips.shape == (round(end * voices.LIPS_FPS), 5) and -0.01 < lips.min()
    assert lips.max() < 1.01 and lips[:, 0].max() > 0.6 and lips[-20:, 0].max() < 0.05
    bilabials = 0
    for (start, letter), (end, _) in zip(phones, phones[1:]):
        if letter in ("m", "b", "p"):
            rows = slice(int(start * voices.LIPS_FPS) - voices.LEAD, int(end * voices.LIPS_FPS))
            assert lips[max(0, rows.start) : rows.stop, 0].min() < 0.02
            bilabials += 1
    assert bilabials > 5


def test_a_phone_of_no_table_ends_nothing_and_is_said_once(capsys):
    """eSpeak makes ɬ of some invented words, in one sample of ten thousand."""
    voices.lips_of.cache_clear()
    _, _, phones = phones_of("mishlayshjuret", "en-gb-x-rp")
    assert "l" in [letter for _, letter in phones]
    assert phones == phones_of("mishlayshjuret", "en-gb-x-rp")[2]
    assert capsys.readouterr().err == "the phone ɬ is in no table: it gets the lips of l\n"
    rare = {"ɓ": "b", "ʙ": "b", "ɠ": "k", "ɴ": "n", "ʕ": "h", "ǂ": "h", "ю": "h", "ɸ": "β"}
    for phone, lips in rare.items():
        assert voices.split_phones([(0.0, phone)]) == [(0.0, lips)]


def test_phones_that_are_alike_lead_to_lips_that_are_known():
    assert set(voices.ALIKE.values()) <= set(voices.PHONES) and len(voices.ALIKE) > 30
    assert not set(voices.ALIKE) & set(voices.PHONES)


SUMS = """
import zlib, voices
for seed in (3, 1, 2):
    audio, lips = voices.speak(seed, seed + 10, 2.0)
    print(zlib.crc32(audio.tobytes() + lips.tobytes()))
"""


def test_the_same_seeds_say_the_same_in_any_order_and_process():
    """eSpeak remembers what it said before, if it is let."""

    def checksum(seed):
        audio, lips = voices.speak(seed, seed + 10, 2.0)
        assert audio.shape == (32000,) and audio.dtype == np.float32 and np.abs(audio).max() <= 1
        return zlib.crc32(audio.tobytes() + lips.tobytes())

    sums = [checksum(seed) for seed in range(24)]
    assert len(set(sums)) == 24
    shuffled = np.random.default_rng(0).permutation(24)
    assert [checksum(seed) for seed in shuffled] == [sums[seed] for seed in shuffled]
    done = subprocess.run([sys.executable, "-c", SUMS], capture_output=True, text=True, check=True)
    assert [int(line) for line in done.stdout.split()] == [sums[3], sums[1], sums[2]]


def test_nobody_in_training_speaks_the_unheard_language(monkeypatch):
    heard = set()

    def spy(text, voice, *given, **parameters):
        heard.add(voice.split("+")[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(voices, "synthesize", spy)
    for seed in range(300):
        with pytest.raises(KeyboardInterrupt):
            voices.speak(seed, seed, 2.0)
    assert heard == set(voices.LANGUAGES) - {voices.UNHEARD} and len(heard) >= 10
    with pytest.raises(KeyboardInterrupt):
        voices.speak(0, 0, 2.0, voices.UNHEARD)
    assert voices.UNHEARD in heard


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    voices.espeak.paths.cache_clear()
    with pytest.raises(runtime.UserError, match="pip install espeakng-loader"):
        faces.render_clip(0, 12, 32)


def test_the_bundled_student_moves_its_mouth_for_a_person():
    """One recorded sentence; the opening as the judge reads it against what the phones ask for."""
    student, judge = load_net(SMALL / "student.pt", DiT), load_net(SMALL / "judge.pt", SyncNet)
    audio, lips, phones = next(bench.recorded_sentences())
    person, T = faces.SPLITS["held-out"], len(audio) * 25 // data.RATE
    truth = faces.render_clip(person, T, student.cfg.size, speech=(audio, lips))
    source = faces.render_clip(person, T, student.cfg.size)
    dub = torch.cat(list(stream.dub_stream(student, source.video, audio)))
    opening = bench.mouth_opening(judge, dub)
    assert bench.follow(opening, truth.mouth[:, 0])[bench.LAGS.index(0)] > 0.5
    found = bench.openings_by_sound(opening, phones)
    assert np.mean(found["open vowels"]) > 2 * np.mean(found["bilabials"])


def test_the_bundled_student_keeps_silent_for_the_hum_of_the_mains():
    student, judge = load_net(SMALL / "student.pt", DiT), load_net(SMALL / "judge.pt", SyncNet)
    seconds = np.arange(2 * data.RATE) / data.RATE
    hum = 10 ** (-30 / 20) * np.sin(2 * np.pi * 50 * seconds).astype(np.float32)
    source = faces.render_clip(faces.SPLITS["held-out"], 48, student.cfg.size).video
    for audio in (np.zeros_like(hum), hum):
        dub = torch.cat(list(stream.dub_stream(student, source, audio)))
        assert bench.mouth_opening(judge, dub).mean() < 0.01  # of the side; open vowels: .08


@torch.no_grad()
def test_the_bundled_teacher_does_not_know_the_words_unless_it_hears():
    """Its first prediction, shown one clip's picture: without sound the mouth opens neither as
    there nor as in the truth; with sound as in the truth. (One person's correlation is .3 by
    chance, so 32 are asked.)"""
    teacher, judge = load_net(SMALL / "teacher.pt", DiT), load_net(SMALL / "judge.pt", SyncNet)

    def correlation(cond, source, clip):
        noise = flow.seeded(0)(cond.masked_source)
        dub = stream.to_frames(teacher, teacher(noise, 0.999, cond), source.video[None])[0]
        return np.corrcoef(bench.mouth_opening(judge, dub), clip.mouth[:, 0])[0, 1]

    deaf, hearing = [], []
    for i in range(32):
        source, truth = faces.dub_pair(60 + i, 48, teacher.cfg.size)
        cond = stream.embed_clip(teacher, source.video[None], data.log_mel(truth.audio)[None])
        null = teacher.null_cond(cond)
        deaf.append([correlation(null, source, clip) for clip in (source, truth)])
        if i < 8:
            hearing.append(correlation(cond, source, truth))
    of_source, of_truth = np.mean(deaf, axis=0)
    assert abs(of_source) < 0.1 and abs(of_truth) < 0.1 and np.mean(hearing) > 0.5
