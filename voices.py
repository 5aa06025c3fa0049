"""What the drawn people say: speech by eSpeak NG (espeak.py), and the lips that go with it.

eSpeak NG speaks many languages in many voices, and tells which phone begins at which sample.
`speak` gives it words invented from a language's syllables and turns the phones into tracks of the
lips by one table, so that a dub's exact answer is known. (The same table turns the aligned phones
of a human recording into the lips that it asks for: `lip_tracks`.)
"""

import functools
import re
import sys
import unicodedata

import numpy as np

import espeak
from data import RATE
from runtime import UserError

LIPS_FPS = 200  # rows of the lips' tracks a second
LEAD = 8  # rows (40 ms) that the lips are ahead of the sound: one shapes the mouth, then speaks
SIGMA = 8.0  # rows (40 ms): how far one phone's shape reaches into its neighbours'

# A language's syllables as it spells them (onsets, vowels, codas; - is none), and some of its
# commonest words, for the rhythm. eSpeak's own rules say how they sound.
LANGUAGES = {
    "en-us": (
        "b d f g h j k l m n p r s t v w z sh ch th bl br cl dr fl gr pl pr st str tr sw qu",
        "a e i o u ee ea oo ou ow ai ay oa igh ar er or air",
        "- - n t d s l m p b k ck ng nd st th sh ff ve mp lt",
        "the a and of to in is that it was for you he with as are but my we be from what",
    ),
    "en-gb-x-rp": (
        "b d f g h j k l m n p r s t v w y sh ch th bl br cr dr fr gl pl pr sp st tw wh",
        "a e i o u ee ea oo ou oy ai ay oa igh ar er or ure",
        "- - n t d s l m p b k ck ng nt st th sh ff ve mb rk",
        "the a and of to in is that it was for you he with as are but my we be from what",
    ),
    "de": (
        "b d f g h j k l m n p r s t v w z sch st sp br fl gr kl kn pf pl schw tr zw",
        "a e i o u ä ö ü ei au eu ie ah oh",
        "- - n r s t l m ch ck ng nd st f b p ff cht en er",
        "der die und in den von zu das mit sich ist im nicht ein für auf es wir aber",
    ),
    "fr": (
        "b c d f g j l m n p r s t v ch qu gn bl br cl cr fl gr pl pr tr vr",
        "a e é è i o u ou eu au ai oi an en in on un ui",
        "- - - r l s t m p be me ve che ge ne que lle",
        "le la de et les des un une est pas que qui dans pour je tu il nous vous mais",
    ),
    "es": (
        "b c d f g j l m n p r s t v ch ll ñ qu bl br cl dr fl gr pl pr tr",
        "a e i o u ie ue ai au ei",
        "- - - n s r l d z m",
        "el la de que y en un ser se no por con su para como pero más yo muy",
    ),
    "it": (
        "b c d f g l m n p r s t v z gl gn ch sc sp st br fr gr pr tr qu",
        "a e i o u ie uo ai ia io",
        "- - - n r l s m tt pp bb mm ll",
        "il la di che è un una per non con sono ma come se lo anche più mi questo",
    ),
    "nl": (
        "b d f g h j k l m n p r s t v w z sch st br bl gr kl kn pl sl tr zw",
        "a e i o u aa ee oo uu ie oe ui ij eu ou",
        "- - n r s t l m p k f g ng nd cht st ft",
        "de het een en van in is dat op te zijn met voor niet aan er maar om ook wij",
    ),
    "pl": (
        "b c d f g h j k l ł m n p r s t w z sz cz ż ś ć dz br kr pr st sp trz",
        "a e i o u y ą ę ie ia",
        "- - - m n k j ł ć sz st p b w",
        "i w na z do się nie to że jest jak ale o po co tak za od przez był",
    ),
    "pt": (
        "b c d f g j l m n p r s t v z ch lh nh br cr fr gr pr tr qu",
        "a e i o u ã õe ão ei ou ai é ó",
        "- - - r s l m n z",
        "o a de que e do da em um para é com não uma os no se na por mais mas eu",
    ),
    "cs": (
        "b c d f h j k l m n p r s t v z č š ž ř ch br hl kr mn pr st tr vl",
        "a e i o u á é í ů y ou ě",
        "- - - k l m n s t v ch š m st",
        "a je se na v to že s z do by ale jsem jak pro co tak po když už",
    ),
    "fi": (
        "h j k l m n p r s t v",
        "a e i o u y ä ö aa ee ii uu ai ei oi au uo yö ie ää",
        "- - - n s t l r kk pp tt mm",
        "ja on ei se että hän oli en mutta niin kun minä mitä jos nyt kuin ole sitä",
    ),
    "tr": (
        "b c ç d f g h k l m n p r s ş t v y z",
        "a e ı i o ö u ü",
        "- - n r l k m t ş p z s y",
        "bir ve bu da ne için çok ben o gibi ama daha var mı en sen kadar sonra",
    ),
    "hu": (
        "b c d f g h j k l m n p r s t v z cs gy ny sz zs ty",
        "a á e é i í o ó ö ő u ú ü",
        "- - n r l k t m sz s z p b gy",
        "a az és hogy nem is egy ez meg de csak van azt már mint ha vagy mi én",
    ),
    "ro": (
        "b c d f g h j l m n p r s ș t ț v z ch gh br cr pl pr st tr",
        "a e i o u ă â ea oa ie au",
        "- - n r l t m s c p șt b",
        "și de la în a cu pe un o nu este ca mai din ce care dar sau lui fi",
    ),
    "sv": (
        "b d f g h j k l m n p r s t v sj tj sk st bl br fr gr kl kr pr tr",
        "a e i o u y å ä ö",
        "- - n r l t m s k p ng st v mm nn",
        "och att det i en jag som på är av för med den inte har de om ett men",
    ),
}
UNHEARD = "sv"  # the language that nobody is trained on
# eSpeak's voices: men, women, and some that filter pulses as Klatt's synthesizer does. Left out are
# whispers and robots, and f2, f3, f5 and Alicia, whose breath is noise that no seed decides.
VARIANTS = (
    "m1 m2 m3 m4 m5 m6 m7 m8 adam Alex david edward Gene iven Lee max Michael pedro "
    "f1 f4 shelby Andrea Annie anika aunty belinda grandma linda steph steph2 "
    "klatt klatt3 klatt4"
).split()
CLOSURE = 0.05  # s: eSpeak's p, t and k begin with the burst, the lips shut so long before
SHORTEST_PAUSE = 0.08  # s: what is shorter belongs to the phone before

# Lips of a phone, about 0..1: how far they open, how wide, how rounded, how much of the upper teeth
# and of the tongue shows; dominance: how little the neighbours may bend the shape. Lips that press
# on each other aim beyond closed (Löfqvist and Gracco 1997), so that even a short p shuts them.
# fmt: off
PHONES = {
    #    open  wide round teeth tongue dominance
    "":  ( .00, .50, .05, .00, .00, 1.5),  # silence
    "a": (1.00, .55, .00, .30, .10, 1.0),
    "ɑ": (1.00, .45, .05, .20, .05, 1.0),
    "æ": ( .90, .75, .00, .45, .15, 1.0),
    "ɐ": ( .70, .52, .00, .30, .10, 0.9),
    "ʌ": ( .65, .50, .05, .30, .10, 0.9),
    "ɒ": ( .80, .30, .45, .10, .05, 1.1),
    "ɔ": ( .65, .25, .70, .05, .05, 1.2),
    "o": ( .55, .18, .85, .05, .05, 1.3),
    "ɛ": ( .60, .80, .00, .50, .20, 1.0),
    "e": ( .50, .88, .00, .55, .25, 1.0),
    "ɜ": ( .45, .45, .20, .30, .15, 0.9),
    "ə": ( .40, .50, .10, .30, .15, 0.6),
    "ɪ": ( .32, .80, .00, .60, .30, 0.9),
    "i": ( .25, 1.0, .00, .70, .30, 1.0),
    "ɨ": ( .30, .70, .00, .60, .25, 0.9),
    "ɯ": ( .28, .70, .00, .55, .20, 0.9),
    "y": ( .25, .10, .95, .05, .10, 1.4),
    "ø": ( .40, .15, .85, .05, .10, 1.3),
    "œ": ( .55, .30, .70, .10, .10, 1.2),
    "u": ( .30, .05, 1.0, .00, .05, 1.4),
    "ʊ": ( .35, .15, .85, .05, .05, 1.2),
    "m": (-.50, .50, .10, .00, .00, 5.0),
    "b": (-.50, .50, .10, .00, .00, 5.0),
    "p": (-.50, .50, .10, .00, .00, 5.0),
    "β": ( .06, .50, .10, .10, .00, 2.0),
    "f": ( .08, .60, .00, .90, .00, 3.5),
    "v": ( .08, .60, .00, .90, .00, 3.5),
    "ʋ": ( .12, .55, .10, .70, .00, 2.5),
    "θ": ( .20, .65, .00, .60, .95, 1.2),
    "ð": ( .20, .65, .00, .60, .95, 1.2),
    "t": ( .22, .65, .00, .65, .40, 0.9),
    "d": ( .22, .65, .00, .60, .40, 0.9),
    "n": ( .24, .60, .00, .45, .60, 0.8),
    "ɲ": ( .26, .75, .00, .50, .40, 0.8),
    "s": ( .14, .80, .00, .95, .05, 1.6),
    "z": ( .14, .80, .00, .95, .05, 1.6),
    "ɕ": ( .18, .50, .35, .85, .05, 1.8),
    "ʑ": ( .18, .50, .35, .85, .05, 1.8),
    "ʃ": ( .22, .20, .70, .70, .05, 2.0),
    "ʒ": ( .22, .20, .70, .70, .05, 2.0),
    "l": ( .38, .60, .00, .35, .90, 0.8),
    "r": ( .28, .58, .05, .40, .60, 0.7),  # rolled or tapped
    "ɹ": ( .24, .20, .60, .20, .10, 1.2),
    "ʁ": ( .36, .50, .05, .20, .05, 0.5),
    "j": ( .25, .92, .00, .65, .30, 0.9),
    "k": ( .32, .55, .05, .30, .10, 0.6),
    "ŋ": ( .32, .55, .05, .30, .10, 0.5),
    "x": ( .32, .55, .05, .30, .10, 0.5),
    "h": ( .40, .50, .05, .30, .10, 0.2),  # says nothing of the lips: the neighbours decide
    "w": ( .14, .00, 1.0, .00, .00, 2.2),
}
# fmt: on
# Phones whose lips are another's, which comes first in its group.
GROUPS = "ɜɚɝɞ əɘ ɨᵻ ʌɤ yʏɥ øɵ œɶ uʉ pʘ βɸ fɱ tʈ dɖ kcɟɡgq xɣç jʝ ʁχʀ ʃɧʂ ʒʐ nɳ lɫɭʎ rɾɽ ɹɻ wʍ hɦʔ"
ALIKE = {phone: group[0] for group in GROUPS.split() for phone in group[1:]}
ARPABET = {  # as speech recognizers write English phones
    "AA": "ɑ", "AE": "æ", "AH": "ʌ", "AO": "ɔ", "AW": "aʊ", "AY": "aɪ", "B": "b", "CH": "tʃ",
    "D": "d", "DH": "ð", "EH": "ɛ", "ER": "ɜ", "EY": "eɪ", "F": "f", "G": "k", "HH": "h",
    "IH": "ɪ", "IY": "i", "JH": "dʒ", "K": "k", "L": "l", "M": "m", "N": "n", "NG": "ŋ",
    "OW": "oʊ", "OY": "ɔɪ", "P": "p", "R": "ɹ", "S": "s", "SH": "ʃ", "T": "t", "TH": "θ",
    "UH": "ʊ", "UW": "u", "V": "v", "W": "w", "Y": "j", "Z": "z", "ZH": "ʒ", "SIL": "",
}  # fmt: skip


def synthesize(text, voice, seconds=np.inf, **parameters):
    """espeak.synthesize with samples (n,) float32 in [-1, 1]. UserError instead of EspeakError."""
    try:
        samples, rate, phones = espeak.synthesize(text, voice, seconds, **parameters)
    except espeak.EspeakError as e:
        raise UserError(str(e)) from None
    return to_float(samples), rate, phones


def to_float(samples):
    """int16 -> float32 in [-1, 1]"""
    return np.array(samples, np.float32) / 32768


def resample(samples, count):
    """samples (n,) -> (count,): the same seconds at another rate, by the spectrum."""
    padded = np.pad(samples, (0, -len(samples) % 1024))  # a length that the FFT likes
    padded_count = round(len(padded) * count / len(samples))
    spectrum = np.fft.rfft(padded)[: padded_count // 2 + 1]
    return np.fft.irfft(spectrum, padded_count)[:count] * (padded_count / len(padded))


def invent_text(rng, language, words):
    """About so many words of a language, in phrases: small ones as they are, others invented."""
    onsets, vowels, codas, small = (part.split() for part in LANGUAGES[language])
    text = ""
    while words > 0:
        length = rng.integers(2, 10)
        phrase = []
        for _ in range(length):
            word = ""
            for _ in range(rng.choice([1, 2, 3, 4], p=[0.3, 0.4, 0.2, 0.1])):
                syllable = rng.choice(onsets) + rng.choice(vowels) + rng.choice(codas)
                word += syllable.replace("-", "")
            phrase.append(rng.choice(small) if rng.random() < 0.35 else word)
        text += " ".join(phrase) + rng.choice([",", ",", ".", "?", "!"]) + " "
        if rng.random() < 0.3:
            text += f'<break time="{rng.integers(100, 900)}ms"/> '
        words -= length
    return text


@functools.cache
def lips_of(phone):
    """A letter of the IPA -> the letter of PHONES whose lips it has. The rarest, which are in no
    table, have those of the Latin letter that they are made from; if they are from none, the
    neighbours decide. A line on stderr says so, once."""
    known = ALIKE.get(phone, phone)
    if known in PHONES:
        return known
    # Unicode calls ɬ LATIN SMALL LETTER L WITH BELT.
    name = unicodedata.name(phone, "")
    latin = re.search(r"SMALL (?:LETTER|CAPITAL) ([A-Z])(?: WITH|$)", name)
    letter = latin[1].lower() if latin else "h"
    lips = ALIKE.get(letter, letter)
    print(f"the phone {phone} is in no table: it gets the lips of {lips}", file=sys.stderr)
    return lips


def split_phones(phones):
    """eSpeak's phones [(second at which it begins, IPA)] -> the same as letters of PHONES:
    diphthongs and affricates are two, sharing the time; marks of stress, length and the like are
    dropped; p, t and k begin when the mouth shuts."""
    single = []
    ends = [start for start, _ in phones[1:]] + [np.inf]
    for (start, ipa), end in zip(phones, ends):
        letters = [lips_of(c) for c in ipa if unicodedata.category(c) in ("Ll", "Lo")]
        if not letters:
            if end - start < SHORTEST_PAUSE:
                continue
            letters = [""]
        if letters[0] in ("p", "t", "k") and single:
            start -= min(CLOSURE, (start - single[-1][0]) / 2)
        each = min(end - start, 1.0) / len(letters)
        single += [(start + i * each, letter) for i, letter in enumerate(letters)]
    return single


def smooth(x, sigma):
    """Gaussian along axis 0 of x (K, C) float; sigma in rows; the ends are held."""
    n = max(1, int(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-n, n + 1) / sigma) ** 2)
    padded = np.pad(x, ((n, n), (0, 0)), mode="edge")
    return np.stack([np.convolve(c, kernel / kernel.sum(), mode="valid") for c in padded.T], 1)


def lip_tracks(phones, seconds):
    """Phones [(second at which it begins, letter of PHONES)] -> (seconds * LIPS_FPS, 5) float:
    opening, width, rounding, upper teeth, tongue, each about 0..1. Dominance-weighted smoothing,
    after Cohen and Massaro 1993."""
    rows = round(seconds * LIPS_FPS) + LEAD
    starts = [-1.0] + [start for start, _ in phones]
    letters = [""] + [letter for _, letter in phones]
    times = np.arange(rows) / LIPS_FPS
    which = np.searchsorted(starts, times, side="right") - 1
    shapes = np.array([PHONES[letters[i]] for i in which])
    dominance = shapes[:, 5:]
    lips = smooth(shapes[:, :5] * dominance, SIGMA) / smooth(dominance, SIGMA)
    lips[:, 0] = lips[:, 0].clip(0)
    return lips[LEAD:]


def record(samples, rng):
    """What a microphone makes of a voice (n,): a room, an equalizer, noise, its level."""
    n = len(samples)
    spectrum = np.fft.rfft(samples)
    frequency = np.fft.rfftfreq(n, 1 / RATE)
    octaves = np.log2(frequency / 1000 + 0.05)
    if rng.random() < 0.6:  # a room: an echo that fades by 60 dB in 0.1 to 0.6 s
        seconds = rng.uniform(0.1, 0.6)
        t = np.arange(int(RATE * seconds)) / RATE
        echo = rng.standard_normal(len(t)) * np.exp(-6.9 * t / seconds)
        echo *= rng.uniform(0.05, 0.5) / np.linalg.norm(echo)
        echo[0] += 1
        spectrum = spectrum * np.fft.rfft(echo, n)
    bends = rng.normal(0, 4, 6)  # dB, at 6 points over the octaves
    gain = np.interp(octaves, np.linspace(-4, 3, 6), bends)
    voice = np.fft.irfft(spectrum * 10 ** (gain / 20), n)
    voice /= voice.std() + 1e-6
    # Noise between white and brown, 8 to 45 dB below the voice.
    slope = rng.uniform(0, 1)
    colour = np.fft.rfft(rng.standard_normal(n)) / (frequency + 50) ** slope
    noise = np.fft.irfft(colour, n)
    noise *= 10 ** (-rng.uniform(8, 45) / 20) / noise.std()
    level = 0.08 * 10 ** (rng.uniform(-25, 6) / 20)
    return ((voice + noise) * level).clip(-1, 1).astype(np.float32)


def speak(voice_seed, text_seed, seconds, language=None):
    """A voice says a text: audio (seconds * RATE,) float32 in [-1, 1] and its `lip_tracks`.

    The voice's seed decides the language (if none is given), the speaker, pitch and tempo; the
    text's the words and how they are recorded. The same seeds give the same, bit for bit."""
    voice = np.random.default_rng([voice_seed, 1])
    text = np.random.default_rng([text_seed, 2])
    own = voice.choice([name for name in LANGUAGES if name != UNHEARD])
    language = language or own
    variant = voice.choice(VARIANTS)
    # Resampling by up to an eighth makes the vocal tract shorter or longer, and the voice faster or
    # slower. So eSpeak speaks for `tract` times as long, and both its samples and the times of its
    # phones are divided by that, which keeps the lips in step with the sound.
    tract = voice.uniform(0.9, 1.12)
    parameters = dict(
        rate=voice.integers(120, 220), pitch=voice.integers(20, 80), range=voice.integers(20, 90)
    )
    words = invent_text(text, language, words=round(5 * seconds) + 10)
    lead_in = text.uniform(0, 0.5) if text.random() < 0.5 else 0.0
    samples, rate, phones = synthesize(
        words, f"{language}+{variant}", seconds * tract + 1, **parameters
    )
    samples = resample(samples, round(len(samples) * RATE / rate / tract))
    begin = int(lead_in * RATE)
    samples = np.pad(samples, (begin, 0))[: round(seconds * RATE)]
    assert len(samples) == round(seconds * RATE), "eSpeak said too little"
    phones = [(begin / RATE + sample / rate / tract, ipa) for sample, ipa in phones]
    return record(samples, text), lip_tracks(split_phones(phones), seconds)


def say(text, voice):
    """One's own text in an eSpeak voice -> audio (n,) float32 in [-1, 1] at RATE. UserError: there
    is no such voice, or it cannot say the text."""
    try:
        sentences, rate = espeak.say_apart(text, voice)
    except espeak.EspeakError as e:
        raise UserError(str(e)) from None
    parts = [resample(to_float(part), round(len(part) * RATE / rate)) for part in sentences if part]
    audio = np.concatenate([np.zeros(0), *parts])
    if not audio.any():
        raise UserError(f"--text {text[:60]!r}: {voice} finds nothing to say in it")
    return (0.08 * audio / audio.std()).clip(-1, 1).astype(np.float32)


def read_phones(aligned):
    """[(ARPAbet phone, begin, end in s)] of a recording -> the phones that lip_tracks takes."""
    phones = []
    for name, begin, end in aligned:
        letters = ARPABET[name.rstrip("012")]
        for i, letter in enumerate(letters or [""]):
            phones.append((begin + (end - begin) * i / max(1, len(letters)), letter))
    return phones
