"""The page that one speaks to: what its server answers, whom it refuses, and the page itself in a
real browser (skipped where there is none)."""

import base64
import contextlib
import http.client
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import bench
import data
import flow
import live
import model
import runtime
import stream
import voices
from faces import SPLITS, render_clip
from syncnet import SyncNet

CHUNK = 12 * data.RATE // data.FPS  # samples
NOISE = np.random.default_rng(0).standard_normal(8 * CHUNK).astype(np.float32) / 10


@contextlib.contextmanager
def serving(**options):
    server = live.serve(live.Options(port=0, **options))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def server(student_file, tmp_path_factory):
    teacher_file = tmp_path_factory.mktemp("live") / "teacher.pt"
    state = torch.load(student_file, weights_only=True)
    torch.save(state | {"stage": "teacher"}, teacher_file)
    with serving(weights=str(student_file), teacher=str(teacher_file)) as server:
        yield server


def request(server, method, path, body=b"", **headers):
    """-> status, body; a dict where it is JSON."""
    address = f"127.0.0.1:{server.server_port}"
    connection = http.client.HTTPConnection(address, timeout=60)
    headers = {"Origin": f"http://{address}"} | headers
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    connection.request(method, path, body, {k: v for k, v in headers.items() if v is not None})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    is_json = answer.headers["Content-Type"] == "application/json"
    return answer.status, json.loads(content) if is_json else content


def opened(server, **wishes):
    status, page = request(server, "POST", "/open", wishes)
    assert status == 200, page
    return page


def post_chunk(server, page, c, sound=NOISE):
    """Chunk c's samples, as the page sends them -> the answer."""
    begin = CHUNK * c + live.AHEAD if c else 0
    part = sound[begin : CHUNK * (c + 1) + live.AHEAD]
    return request(server, "POST", f"/chunk?page={page['page']}", part.tobytes())


def frames_of(strip, size):
    """A data URL of frames side by side -> (n, S, S, 3) uint8."""
    picture = Image.open(io.BytesIO(base64.b64decode(strip.partition(",")[2])))
    strip = torch.from_numpy(np.array(picture.convert("RGB")))
    return torch.stack(strip.split(size, 1))


def test_a_recording_is_as_good_as_the_whole_file(tiny):
    recording = live.Recording()
    for c in range(6):
        begin = CHUNK * c + live.AHEAD if c else 0
        recording.append(NOISE[begin : CHUNK * (c + 1) + live.AHEAD])
        heard = stream.chunk_mel(recording, c, tiny.cfg)
        assert heard.equal(stream.chunk_mel(NOISE, c, tiny.cfg))
    assert len(recording.samples) == 2 * data.RATE


def test_its_frames_are_those_of_a_file(server):
    page = opened(server, face=5)
    net = server.studio.nets["2"]
    size = net.cfg.size
    source = render_clip(SPLITS["held-out"] + 10, live.FACE_SECONDS * data.FPS, size).video
    there_and_back = torch.cat([source, source[1:-1].flip(0)])
    dub = torch.cat(list(stream.dub_stream(net, there_and_back[:48], NOISE)))
    for c in range(3):
        status, answer = post_chunk(server, page, c)
        assert status == 200, answer
        frames = frames_of(answer["frames"], size)
        expected = dub[12 * c : 12 * (c + 1)]
        assert (frames.float() - expected.float()).abs().mean() < 4  # as exact as JPEG
        assert (frames.float() - dub[24:36].float()).abs().mean() > 4 or c == 2


@pytest.mark.parametrize("steps", live.STEP_CHOICES)
def test_it_tells_what_was_computed(server, steps):
    page = opened(server, steps=steps)
    net = server.studio.nets[steps]
    for c in range(4):
        _, answer = post_chunk(server, page, c)
        times = [a_pass["t"] for a_pass in answer["passes"]]
        if steps == "teacher":
            assert len(times) == 50 and len(answer["guesses"]) == 1
        else:
            cache_pass = [0.0] if c else []
            assert times == pytest.approx(cache_pass + flow.denoising_times(net.cfg))
            assert len(answer["guesses"]) == int(steps)
            assert answer["window"] == model.attention_window(c, net.cfg)
        assert answer["latents"] == [3 * c, 3 * c + 1, 3 * c + 2]
        assert sum(a_pass["ms"] for a_pass in answer["passes"]) < answer["compute_ms"]


def test_text(server):
    status, body = request(server, "POST", "/say", {"text": "Guten <Tag> & Abend", "voice": "de"})
    assert status == 200
    assert np.array_equal(np.frombuffer(body, "<f4"), voices.say("Guten <Tag> & Abend", "de"))


REFUSED = """
GET /../live.py: 404: nothing but /
GET /judge.pt: 404: nothing but /
POST /nowhere {}: 404: no such place
POST /open []: 400: no JSON object
POST /open {"face": "\\ud800", "steps": "\\ud800"}: 400: steps: one of 1, 2, 4, teacher
POST /open {"face": -1}: 400: face: a whole number
POST /open {"face": "../../etc/passwd"}: 400: face: a whole number
POST /open {"steps": "3"}: 400: steps: one of 1, 2, 4, teacher
POST /open {"steps": ["2"]}: 400: steps: one of 1, 2, 4, teacher
POST /say {"text": "", "voice": "de"}: 400: 1 to 300 characters
POST /say {"text": "a", "voice": "../de"}: 400: the languages are
POST /say {"text": "a", "voice": ["de"]}: 400: the languages are
POST /say {"text": "...", "voice": "de"}: 400: nothing to say
POST /say {"text": "one \\u0000 two", "voice": "de"}: 400: half a character
POST /say {"text": "one \\ud800 two", "voice": "de"}: 400: half a character
POST /say {"text": "one", "voice": "\\ud800"}: 400: the languages are
"""


@pytest.mark.parametrize("case", REFUSED.strip().splitlines())
def test_refused(server, case):
    words, status, line = re.fullmatch(r"(.*?): (4\d\d): (.*)", case).groups()
    method, path, *body = words.split(" ", 2)
    answered, answer = request(server, method, path, "".join(body).encode())
    assert (answered, line in answer["error"]) == (int(status), True), answer


def test_only_our_own_pages(server):
    port = server.server_port
    ours = f"http://127.0.0.1:{port}"
    assert request(server, "GET", "/", Origin=None)[0] == 200
    assert request(server, "GET", "/", Host=f"localhost:{port}", Origin=None)[0] == 200
    for headers in (
        dict(Host=f"evil.example:{port}", Origin=f"http://evil.example:{port}"),
        dict(Origin="http://evil.example"),
        dict(Origin="null"),
        dict(Origin=ours.replace("http", "https")),
        dict(Origin=None),
        dict(Host="["),
    ):
        status, answer = request(server, "POST", "/open", {}, **headers)
        assert status in (400, 403) and "error" in answer, headers
    assert server.socket.getsockname()[0] == "127.0.0.1"
    server.host = "0.0.0.0"
    assert server.is_ours("192.168.1.5") and not server.is_ours("evil.example")
    server.host = "127.0.0.1"
    assert not server.is_ours("192.168.1.5")


def test_large_and_wrong_bodies(server):
    page = opened(server)
    length = {"Content-Length": str(live.MAX_BODY + 1)}
    assert request(server, "POST", "/open", b"", **length)[0] == 413
    assert request(server, "POST", "/open", b"", **{"Content-Length": "-1"})[0] == 411
    endless = {"Content-Length": 5000 * "9"}
    assert request(server, "POST", "/open", b"", **endless)[0] == 413
    for path in ("/open", "/say"):
        status, answer = request(server, "POST", path, 200_000 * b"[")
        assert status == 400 and "no JSON object" in answer["error"]
    assert "1000 samples" in post_chunk(server, page, 0, NOISE[:1000])[1]["error"]
    bad = NOISE.copy()
    bad[100] = np.nan
    assert "NaN" in post_chunk(server, page, 0, bad)[1]["error"]
    assert post_chunk(server, page, 0)[0] == 200  # it was none the worse


def test_the_newest_page_takes_over(server):
    server.studio.newest = None
    status, answer = post_chunk(server, {"page": "before"}, 0)
    assert status == 410 and "started again" in answer["error"]
    older = opened(server)
    assert post_chunk(server, older, 0)[0] == 200
    newer = opened(server)
    status, answer = post_chunk(server, older, 1)
    assert status == 410 and "a newer page has taken over" in answer["error"]
    assert post_chunk(server, newer, 0)[0] == 200


def test_of_many_pages_asked_for_at_once_few_are_rendered(server, monkeypatch):
    rendered = []

    def render(seed, *rest):
        rendered.append(seed)
        return render_clip(seed, *rest)

    monkeypatch.setattr(live, "render_clip", render)
    busy = threading.Event()
    server.studio.worker.submit(busy.wait)
    answers = []

    def ask(face):
        answers.append(request(server, "POST", "/open", {"face": face}))

    askers = [threading.Thread(target=ask, args=(face,)) for face in range(15)]
    for asker in askers:
        asker.start()
    while server.studio.worker._work_queue.qsize() < 15:
        time.sleep(0.01)
    busy.set()
    for asker in askers:
        asker.join()
    assert len(rendered) == 1
    assert sorted(status for status, _ in answers) == [200] + 14 * [410]


def test_what_cannot_be_served(server, student_file):
    with pytest.raises(runtime.UserError, match="--port .* try another"):
        live.serve(live.Options(port=server.server_port, weights=str(student_file)))
    for options in (dict(port=70_000), dict(port=0, host=70 * "a")):
        with pytest.raises(runtime.UserError, match="try another"):
            live.serve(live.Options(weights=str(student_file), **options))
    with pytest.raises(runtime.UserError, match="where a teacher is needed"):
        live.serve(live.Options(weights=str(student_file), teacher=str(student_file)))


@pytest.mark.parametrize(
    ("host", "address", "ours", "foreign"),
    [
        ("::1", "http://[::1]:", ["[::1]", "localhost"], ["[::2]", "evil.example"]),
        ("", "http://127.0.0.1:", ["127.0.0.1", "192.168.1.5", "localhost"], ["evil.example", ""]),
        ("0.0.0.0", "http://127.0.0.1:", ["127.0.0.1"], ["evil.example"]),
    ],
)
def test_other_hosts(host, address, ours, foreign):
    try:
        server = live.Server(host, 0, None)
    except OSError as e:
        pytest.skip(f"no such address on this machine: {e}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        assert server.url() == f"{address}{server.server_port}"
        for name in ours + foreign:
            url = urlsplit(server.url())
            connection = http.client.HTTPConnection(url.hostname, url.port, timeout=60)
            connection.request("GET", "/", headers={"Host": f"{name}:{url.port}"})
            assert connection.getresponse().status == (200 if name in ours else 403), name
            connection.close()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_on_windows_a_second_server_cannot_share_the_port(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(live.os, "name", "nt")
        server = live.Server("127.0.0.1", 0, None)
    assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 0
    server.server_close()


# ---- In a browser, by the bundled student ----

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-fake-device-for-media-stream"
).split()
# Keeps what is painted, as it is shown.
WATCH = """() => {
  window.frames_shown = []
  const small = Object.assign(document.createElement("canvas"), {width: 128, height: 128})
  const picture = document.getElementById("picture")
  picture.addEventListener("frame", (event) => {
    small.getContext("2d").drawImage(picture, 0, 0, 128, 128)
    frames_shown.push({...event.detail, url: small.toDataURL("image/png")})
  })
}"""
DROP = """([base64, type, name]) => {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))
  const dataTransfer = new DataTransfer()
  dataTransfer.items.add(new File([bytes], name, {type}))
  document.body.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true}))
}"""


@pytest.fixture(scope="module")
def sentence(tmp_path_factory):
    """A recorded sentence: its samples, and a file of it for the browser's microphone. (The second:
    correlations of single ones lie between .4, the first, and .7; their mean is bench.py's.)"""
    _, (audio, lips, _), *_ = bench.recorded_sentences()
    path = tmp_path_factory.mktemp("microphone") / "sentence.wav"
    soundfile.write(path, np.pad(audio, (2 * data.RATE, 20 * data.RATE)), data.RATE)
    return audio, lips, path


@pytest.fixture(scope="module")
def browser(sentence):
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    microphone = f"--use-file-for-fake-audio-capture={sentence[2]}%noloop"
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=[*FLAGS, microphone])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def bundled(browser):
    with serving() as server:
        yield server


@pytest.fixture
def tab(browser, bundled):
    """A loaded page; a script's error on it fails the test."""
    context = browser.new_context(permissions=["microphone"])
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(f"http://127.0.0.1:{bundled.server_port}/")
    wait_for(page, "Ready")
    page.evaluate(WATCH)
    yield page
    context.close()
    assert not errors


def wait_for(page, words, seconds=60):
    page.wait_for_function(
        "words => document.getElementById('status').textContent.includes(words)",
        arg=words,
        timeout=1000 * seconds,
    )


def wait_for_frames(page, n):
    """Skips the test where the page had to leave chunks out: a slow machine is no fault."""
    page.wait_for_function("n => frames_shown.length >= n || skipped", arg=n, timeout=60_000)
    if page.evaluate("skipped"):
        pytest.skip("this machine is too slow for real time")


def test_speaking_to_it(tab, bundled, sentence):
    """The lips on the screen follow the voice at the microphone."""
    audio, lips, _ = sentence
    posted = []

    def keep(request):
        if "/chunk" in request.url:
            posted.append(np.frombuffer(request.post_data_buffer, "<f4"))

    tab.on("request", keep)
    tab.click("#microphone")
    seconds = len(audio) / data.RATE + 4
    wait_for_frames(tab, int(data.FPS * seconds))
    tab.click("#microphone")
    shown = tab.evaluate("frames_shown")
    steps = data.FPS * np.diff([frame["captured"] for frame in shown])
    assert steps == pytest.approx(steps.round(), abs=0.01) and steps.min() > 0.9
    assert steps.mean() < 2, "every other frame was not shown"

    # Where in what was posted does the sentence begin?
    heard = np.concatenate(posted)
    n = len(heard) + len(audio)
    match = np.fft.irfft(np.fft.rfft(heard, n) * np.fft.rfft(audio, n).conj(), n)
    begin = match.argmax() / data.RATE
    if begin >= 3:
        pytest.skip("this machine is too slow: the browser has lost the sentence's start")

    times = np.array([frame["captured"] for frame in shown]) - begin
    inside = (times > 0) & (times < len(audio) / data.RATE - 0.1)
    video = torch.cat([frames_of(frame["url"], 128) for frame in shown])
    judge = runtime.load_net(runtime.find_weights("judge"), SyncNet)
    opening = bench.mouth_opening(judge, video)

    def follows(late):
        """How the opening goes with the lips that the sound asked for `late` seconds before."""
        rows = ((times[inside] - late) * voices.LIPS_FPS).astype(int).clip(0, len(lips) - 1)
        return np.corrcoef(opening[inside], lips[rows, 0])[0, 1]

    # Which frames are shown depends on how busy the machine is, and the correlation with them.
    assert follows(0) > 0.3 and follows(0) > max(follows(-0.4), follows(0.4)) + 0.1
    after = times > len(audio) / data.RATE + 0.5
    assert opening[after].mean() < 0.5 * opening[inside].mean()  # shut in silence


def test_a_text_is_said(tab):
    tab.select_option("#voice", "de")
    tab.fill("#text", "Guten Tag.")
    tab.click("#say button")
    wait_for(tab, "Speaking")
    wait_for(tab, "Ready")
    assert tab.evaluate("frames_shown.length") > 5  # 40 where there is time to draw
    assert tab.locator("#guesses canvas").count() == 2
    numbers = tab.inner_text("#numbers")
    assert "step at t = 0.56" in numbers and "= the delay that you see" in numbers
    tab.fill("#text", "...")
    tab.click("#say button")
    wait_for(tab, "nothing to say")


def test_a_sound_file_is_dropped(tab, sentence):
    sound = base64.b64encode(sentence[2].read_bytes()[: 3 * 32000]).decode()
    tab.evaluate(DROP, [sound, "audio/wav", "sound.wav"])
    wait_for_frames(tab, 12)
    tab.evaluate(DROP, ["AAAA", "audio/wav", "broken.wav"])
    wait_for(tab, "broken.wav: this browser cannot")


def test_an_older_page_is_told_that_a_newer_one_has_taken_over(browser, bundled, tab):
    tab.click("#microphone")
    wait_for(tab, "Listening")
    context = browser.new_context()
    newer = context.new_page()
    newer.goto(f"http://127.0.0.1:{bundled.server_port}/")
    wait_for(tab, "a newer page has taken over")
    assert tab.inner_text("#microphone") == "Microphone"
    wait_for(newer, "Ready")
    context.close()


# Every microphone that the page is given, to see whether it is on.
COUNT = """() => {
  window.microphones = []
  const devices = navigator.mediaDevices
  const ask = devices.getUserMedia.bind(devices)
  devices.getUserMedia = async (wish) => {
    const stream = await ask(wish)
    microphones.push(stream)
    return stream
  }
}"""
ON = "microphones.flatMap(m => m.getTracks()).filter(t => t.readyState == 'live').length"


@pytest.mark.parametrize("what", ["the server is gone", "the server is busy", "the sound fails"])
def test_the_microphone_does_not_stay_on_when_something_fails(tab, what):
    tab.evaluate(COUNT)
    if what == "the server is gone":
        tab.route("**/open", lambda route: route.abort())
    elif what == "the server is busy":
        tab.route("**/open", lambda route: route.fulfill(status=503, body='{"error": "busy"}'))
    else:
        broken = "AudioContext.prototype.createMediaStreamSource = () => { throw Error('no') }"
        tab.evaluate(f"() => {{ {broken} }}")
    tab.click("#microphone")
    tab.wait_for_function("() => document.getElementById('status').className == 'wrong'")
    assert tab.evaluate("microphones.length") == 1 and tab.evaluate(ON) == 0
    assert tab.inner_text("#microphone") == "Microphone"


def test_two_quick_clicks_start_one_microphone(tab):
    tab.evaluate(COUNT)
    tab.evaluate(
        "() => { for (let i = 0; i < 2; i++) document.getElementById('microphone').click() }"
    )
    wait_for(tab, "Listening")
    assert tab.evaluate("microphones.length") == 1
    tab.click("#microphone")
    assert tab.evaluate(ON) == 0


def test_a_sound_that_the_browser_stops_or_does_not_start(tab):
    tab.click("#microphone")
    wait_for(tab, "Listening")
    tab.evaluate("context.suspend()")
    wait_for(tab, "The browser has stopped its sound")
    assert tab.inner_text("#microphone") == "Microphone"
    tab.evaluate("() => { context.resume = () => new Promise(() => {}) }")
    tab.click("#microphone")
    wait_for(tab, "connect a loudspeaker")


@pytest.mark.parametrize(
    "error, words",
    [
        ("NotFoundError", "There is no microphone"),
        ("NotAllowedError", "was refused"),
        ("NotReadableError", "Another program"),
        ("OverconstrainedError", "does not work (OverconstrainedError)"),
    ],
)
def test_why_there_is_no_microphone(tab, error, words):
    failing = "async () => { throw new DOMException('', error) }"
    tab.evaluate(f"(error) => {{ navigator.mediaDevices.getUserMedia = {failing} }}", error)
    tab.click("#microphone")
    wait_for(tab, words)


def test_a_microphone_that_is_muted_or_unplugged(tab):
    tab.evaluate(COUNT)
    tab.click("#microphone")
    wait_for(tab, "Listening")
    tab.evaluate("""() => {
      const [track] = microphones[0].getTracks()
      Object.defineProperty(track, "muted", {value: true, configurable: true})
      track.dispatchEvent(new Event("mute"))
    }""")
    wait_for(tab, "microphone is muted")
    tab.evaluate("""() => {
      const [track] = microphones[0].getTracks()
      Object.defineProperty(track, "muted", {value: false})
      track.dispatchEvent(new Event("unmute"))
    }""")
    wait_for(tab, "Listening")
    tab.evaluate("microphones[0].getTracks()[0].dispatchEvent(new Event('ended'))")
    wait_for(tab, "was disconnected")
    assert tab.inner_text("#microphone") == "Microphone"


def test_an_old_browser_and_a_telephones_headset(tab):
    tab.evaluate("() => { window.keep = AudioWorkletNode; window.AudioWorkletNode = undefined }")
    tab.click("#microphone")
    wait_for(tab, "too old")
    tab.evaluate("""() => {
      window.AudioWorkletNode = keep
      const Context = AudioContext
      window.AudioContext = class extends Context {
        constructor(wish) { super(wish ?? {sampleRate: 8000}) }
      }
    }""")
    tab.click("#microphone")
    wait_for(tab, "Listening")
    assert tab.evaluate("context.sampleRate") == 48000


def test_the_same_file_twice(tab, sentence):
    sound = dict(name="a.wav", mimeType="audio/wav", buffer=sentence[2].read_bytes()[:32000])
    for _ in range(2):
        tab.set_input_files("#sound", sound)
        wait_for(tab, "Speaking")
        wait_for(tab, "Ready")


def test_fifteen_clicks_on_another_person(tab, bundled):
    rendered = []
    begin = bundled.studio.begin
    bundled.studio.begin = lambda *given: rendered.append(begin(*given)) or rendered[-1]
    try:
        tab.evaluate(
            "() => { for (let i = 0; i < 15; i++) document.getElementById('another').click() }"
        )
        wait_for(tab, "Ready")
        tab.wait_for_function("() => !opening")
    finally:
        del bundled.studio.begin
    assert tab.input_value("#face") == "18" and 1 <= len(rendered) < 8
    tab.click("#microphone")
    wait_for(tab, "Listening")


def test_the_microphone_is_refused(browser, bundled):
    context = browser.new_context(permissions=[])
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{bundled.server_port}/")
    wait_for(page, "Ready")
    page.click("#microphone")
    wait_for(page, "microphone was refused")
    context.close()


def test_reloads_leave_nothing_behind(tab, bundled):
    for _ in range(20):
        tab.reload()
    wait_for(tab, "Ready")
    assert threading.active_count() < 20


def test_the_server_has_gone(browser):
    command = [sys.executable, "live.py", "--port", "0"]
    process = subprocess.Popen(
        command,
        cwd=live.PAGE.parent,
        stdout=subprocess.PIPE,
        text=True,
        # What a shell runs in the background ignores Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    address = process.stdout.readline().split()[0]
    context = browser.new_context()
    page = context.new_page()
    page.goto(address)
    wait_for(page, "Ready")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    page.click("#another")
    wait_for(page, "The server does not answer")
    context.close()
