"""eSpeak NG: a text becomes samples, and the phones that begin at them.

    echo "Guten Tag" | python espeak.py de+f2       # for say_apart: a line of JSON, then samples

eSpeak NG (PyPI espeakng-loader: the library and its data for Linux, macOS and Windows) is written
in C and runs inside our process, called by ctypes. `synthesize` does that, for our own words. Some
texts make it write past its buffers, which would end us, too. So a user's text is said by a child
process, `say_apart`, whose program is this file, too. It needs Python's own library alone, so that
the child starts in some 50 ms. eSpeak NG is GPL-3; nothing of it is copied here.
"""

import _ctypes
import array
import ctypes
import functools
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

LONGEST_WORD = 60  # letters: the rest is another word, since eSpeak's buffers are short
LONGEST_SENTENCE = 500  # letters: the rest is another sentence
LONGEST_PATH = 150  # bytes of the path to the data that surely fit into eSpeak's buffer


class EspeakError(Exception):
    """What eSpeak NG cannot do, in one line that says what to do."""


class Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # ms
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),  # of a phoneme its IPA, in UTF-8
    ]


Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event)
)
LAST_EVENT, PHONEME_EVENT = 0, 7
SYNCHRONOUS = 2
PHONEME_EVENTS, IN_IPA, DONT_EXIT = 1, 2, 0x8000
UTF8, SSML = 1, 16
PARAMETERS = {"rate": 1, "pitch": 3, "range": 4}  # words a minute; 0..100; 0..100


@functools.cache
def paths():
    """(library, data folder) of espeakng-loader. EspeakError: it is not installed."""
    try:
        import espeakng_loader
    except ImportError:
        raise EspeakError("eSpeak NG is missing; pip install espeakng-loader") from None
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


def synthesize(text, voice, seconds=math.inf, markup=SSML, **parameters):
    """Speak a text with an eSpeak voice, "de" or "de+f2", up to about `seconds` s.

    markup: SSML, or 0 for a text without. parameters: rate, pitch and range, see PARAMETERS.
    -> samples, an array of int16, their rate in Hz, and the phones [(sample at which it begins, its
    IPA; "" for a pause)]. EspeakError: eSpeak is missing, or has no such voice."""
    library_path, data_path = paths()
    folder = os.fsencode(data_path)
    # eSpeak keeps state from one utterance to the next in static variables that no call resets. So
    # that the same seed always sounds the same, the library is loaded anew each time.
    library = ctypes.CDLL(library_path)
    samples = array.array("h")
    phones = []

    @Callback
    def receive(wave, count, events):
        if wave and count > 0:
            samples.frombytes(ctypes.string_at(wave, 2 * count))
        i = 0
        while events[i].type != LAST_EVENT:
            if events[i].type == PHONEME_EVENT:
                ipa = events[i].id.decode("utf-8", "ignore")
                phones.append((events[i].sample, ipa))
            i += 1
        return int(len(samples) >= seconds * rate)  # 1: stop

    try:
        how = PHONEME_EVENTS | IN_IPA | DONT_EXIT
        rate = library.espeak_Initialize(SYNCHRONOUS, 0, folder, how)
        if rate <= 0 and len(folder) > LONGEST_PATH:
            cure = "install espeakng-loader in a folder nearer to the root"
            raise EspeakError(f"{data_path}: too long a path for eSpeak NG; {cure}")
        if rate <= 0:
            raise EspeakError(f"eSpeak NG finds no data in {data_path}; reinstall espeakng-loader")
        library.espeak_SetSynthCallback(receive)
        if library.espeak_SetVoiceByName(voice.encode()):
            raise EspeakError(f"--voice {voice}: eSpeak has no such voice; de, fr or en-us+f2, say")
        for name, value in parameters.items():
            library.espeak_SetParameter(PARAMETERS[name], int(value), 0)
        encoded = text.encode()
        library.espeak_Synth(encoded, len(encoded) + 1, 0, 0, 0, UTF8 | markup, None, None)
        library.espeak_Synchronize()
        library.espeak_Terminate()
    finally:
        unload(library)
    return samples, rate, phones


def unload(library):
    if hasattr(_ctypes, "dlclose"):
        _ctypes.dlclose(library._handle)
    else:  # Windows
        _ctypes.FreeLibrary(library._handle)


def check_voice(voice):
    """EspeakError unless the data has a file for the voice's language, and one for its variant.
    eSpeak itself would copy a long name past its buffer, and say nothing of a wrong variant."""
    _, data_path = paths()
    languages = {path.name.lower() for path in Path(data_path, "lang").rglob("*") if path.is_file()}
    variants = {path.name for path in Path(data_path, "voices", "!v").iterdir()}
    language, plus, variant = voice.partition("+")
    if language.lower() not in languages:
        raise EspeakError(f"--voice {voice}: eSpeak has no such voice; de, fr or en-us+f2, say")
    if plus and variant not in variants:
        what = f"--voice {voice}: eSpeak has no variant {variant}"
        raise EspeakError(f"{what}; f1 to f5, m1 to m8, Annie or Michael, say")


def split_sentences(text):
    """A text -> its sentences, in pieces that eSpeak can hold. What is said of each does not depend
    on the others, so a long text takes as much longer as it is longer."""
    sentences = []
    words = []
    length = 0
    for word in text.replace("\0", " ").split():
        for part in textwrap.wrap(word, LONGEST_WORD, break_on_hyphens=False):
            words.append(part)
            length += len(part) + 1
        if word[-1] in ".?!。？！" or length > LONGEST_SENTENCE:
            sentences.append(" ".join(words))
            words = []
            length = 0
    if words:
        sentences.append(" ".join(words))
    return sentences


def say_apart(text, voice):
    """Say a user's text, without markup, in a child process -> [samples of a sentence, int16], and
    their rate in Hz. EspeakError: there is no such voice, or eSpeak died of the text."""
    try:
        given = text.encode()
    except UnicodeEncodeError:
        raise EspeakError("--text: not in UTF-8; give it in that encoding") from None
    check_voice(voice)
    command = [sys.executable, __file__, voice]
    done = subprocess.run(command, input=given, capture_output=True)
    if done.returncode == 2:
        raise EspeakError(done.stderr.decode(errors="replace").strip())
    if done.returncode:
        how = f"eSpeak NG died of this text in the voice {voice} (code {done.returncode})"
        raise EspeakError(f"{how}; change the text, or take another --voice")
    header, _, data = done.stdout.partition(b"\n")
    header = json.loads(header)
    samples = array.array("h", data)
    sentences = []
    start = 0
    for count in header["counts"]:
        sentences.append(samples[start : start + count])
        start += count
    return sentences, header["rate"]


def main(voice):
    """The child: standard input is the text, in UTF-8. Standard output: {"rate": Hz, "counts":
    samples of each sentence}, and then the samples."""
    rate = 0
    said = []
    try:
        for sentence in split_sentences(sys.stdin.buffer.read().decode()):
            samples, rate, _ = synthesize(sentence, voice, markup=0)
            said.append(samples)
    except EspeakError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
    header = dict(rate=rate, counts=[len(samples) for samples in said])
    sys.stdout.buffer.write(json.dumps(header).encode() + b"\n")
    for samples in said:
        sys.stdout.buffer.write(samples.tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
