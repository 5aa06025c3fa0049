"""eSpeak NG does not end the process that speaks, whatever a user gives it to say."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import espeak
import runtime
import voices

# On these eSpeak NG writes past its buffers, or reads past their end.
DEADLY = [
    ("'-你" * 20, "vi"),
    ("s'" * 80, "en-us"),
    ("i" * 170, "ro"),
]


def in_a_process(code, **environment):
    environment = dict(os.environ, PYTHONPATH=str(Path(espeak.__file__).parent)) | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("text, voice", DEADLY)
def test_a_text_that_would_kill_espeak_is_said_or_refused_in_one_line(text, voice):
    try:
        assert len(voices.say(text, voice)) > 1000
    except runtime.UserError as e:
        assert "eSpeak NG died of this text" in str(e) and "\n" not in str(e)


def test_the_death_of_the_child_is_one_line():
    with pytest.raises(runtime.UserError, match="died of this text in the voice vi .*--voice$"):
        voices.say("'-你" * 20, "vi")
    assert len(voices.say("xin chào", "vi")) > 1000  # the next one is said


def test_words_longer_than_60_letters_are_split():
    (sentence,) = espeak.split_sentences("i" * 170 + " end")
    assert [len(word) for word in sentence.split()] == [60, 60, 50, 3]
    assert espeak.split_sentences("One two. Three?  Four") == ["One two.", "Three?", "Four"]
    assert espeak.split_sentences(" \n") == []


@pytest.mark.parametrize(
    "voice",
    ["!v/f2", "de+", "de+" + 38 * "x", "de+f99", "xx", "", "\udcff", "de+../../lang/gmw/de"],
)
def test_a_voice_that_is_not_in_the_list_is_refused(voice):
    with pytest.raises(runtime.UserError, match="^--voice .*eSpeak has no "):
        voices.say("hi", voice)


@pytest.mark.parametrize("voice", ["de", "en-us+f2", "EN-US", "de+Mr serious"])
def test_a_voice_of_the_list_speaks(voice):
    assert len(voices.say("hi", voice)) > 1000


def test_a_text_that_is_not_utf_8_is_one_line():
    with pytest.raises(runtime.UserError, match="^--text: .*UTF-8"):
        voices.say("Gr\udcfc\udcdfe", "de")


def test_all_that_follows_a_nul_or_a_bracket_is_said():
    whole = len(voices.say("eins zwei drei vier", "de"))
    assert len(voices.say("eins\0zwei drei vier", "de")) == whole
    assert len(voices.say("eins < zwei & drei <b> vier", "de")) > whole


def test_a_long_text_takes_as_much_longer_as_it_is_longer(monkeypatch):
    """Four times the text in less than 8 times the time, and no transform of all of it."""
    longest = []
    resample = voices.resample
    monkeypatch.setattr(
        voices, "resample", lambda samples, n: longest.append(n) or resample(samples, n)
    )
    seconds = []
    for sentences in (40, 160):
        start = time.perf_counter()
        audio = voices.say("this is a sentence with so many words. " * sentences, "en-us")
        seconds.append(time.perf_counter() - start)
    assert len(audio) > 200 * 16000 and max(longest) < 10 * 16000
    assert seconds[1] < 8 * seconds[0]
    voices.say("words without a full stop " * 200, "en-us")
    assert max(longest) < 60 * 16000


def test_each_sentence_is_said_as_if_alone():
    """So the order does not matter, and the child says what our own process says."""
    (first, second), rate = espeak.say_apart("Guten Tag. Wie geht es?", "de+f4")
    alone, same_rate, _ = espeak.synthesize("Wie geht es?", "de+f4")
    assert rate == same_rate and second == alone and first != second


def test_the_child_starts_without_numpy_and_torch():
    done = in_a_process("import sys, espeak; print({'numpy', 'torch'} & set(sys.modules))")
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["x" * 200, "ü", "\udcfc"])
def test_data_in_a_folder_of_any_name(name, tmp_path, monkeypatch):
    """A path that is too long does not end the process; letters may be any bytes."""
    library, data = espeak.paths()
    link = tmp_path / name
    link.symlink_to(data)
    code = f"""
import espeak
espeak.paths = lambda: ({library!r}, {str(link)!r})
try:
    print(len(espeak.synthesize("hallo", "de")[0]))
except espeak.EspeakError as e:
    print(e)
"""
    done = in_a_process(code, LC_ALL="C", PYTHONIOENCODING="utf-8:backslashreplace")
    assert done.returncode == 0, done.stderr
    if len(name) > 100:
        assert "too long a path for eSpeak NG; install" in done.stdout
    else:
        assert int(done.stdout) > 1000


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    espeak.paths.cache_clear()
    with pytest.raises(runtime.UserError, match="pip install espeakng-loader"):
        voices.speak(0, 0, 1.0)
    with pytest.raises(runtime.UserError, match="pip install espeakng-loader"):
        voices.say("hi", "de")


def test_samples_are_one_line_of_json_and_int16():
    """What a user of espeak.py in a pipe gets."""
    command = [sys.executable, espeak.__file__, "de"]
    done = subprocess.run(command, input="Grüße. Hallo.".encode(), capture_output=True)
    header, _, data = done.stdout.partition(b"\n")
    assert done.returncode == 0 and header.startswith(b'{"rate": 22050, "counts": [')
    assert np.frombuffer(data, np.int16).std() > 500
