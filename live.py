"""A page to speak to: you talk, and the lips of a drawn person follow, chunk by chunk.

    python live.py                # prints an address on this machine; open it in a browser
    python live.py --weights out/small/student.pt

The page, live.html, records 480 ms of sound at a time and posts it. The answer holds the 12
frames that go with them, and what the student did for them: its guesses, the latent frames that it
looked back at, and how long each pass took. The page shows the frames by the clock of the sound.
"""

import base64
import contextlib
import copy
import dataclasses
import io
import ipaddress
import json
import os
import secrets
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch
from PIL import Image

import runtime
import voices
from data import AUDIO_AHEAD, FPS, HOP, MEL_REACH, RATE, middle, to_float
from faces import SPLITS, render_clip
from flow import STEPS, euler
from model import DiT, attention_window
from runtime import Precision, UserError, autocast, find_weights, load_net
from sample import FACE_SECONDS
from stream import Streamer, chunk_mel, to_frames

PAGE = Path(__file__).with_name("live.html")
AHEAD = HOP * AUDIO_AHEAD + MEL_REACH  # samples that a chunk hears beyond its own
GUIDANCE = 2.0  # of the teacher
STEP_CHOICES = "1", "2", "4", "teacher"  # denoising steps of the student, or the teacher
LOCAL = "127.0.0.1", "::1", "localhost"  # hosts that only this machine reaches
ANY = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # all its addresses: one of them
MAX_BODY = 1 << 20  # bytes of a request
MAX_TEXT = 300  # characters
# The page needs nothing but this server, and no other page may frame it.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' blob:; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; frame-ancestors 'none'"
)


class Refused(Exception):
    """A request that is not answered: its HTTP status, and a line for the page."""

    def __init__(self, status, line):
        super().__init__(line)
        self.status = status


class Recording:
    """The sound of a stream so far, (n,) float32: slices and has a length as if all were there, but
    holds the last two seconds alone."""

    def __init__(self):
        self.first = 0  # the number of the first sample that is held
        self.samples = np.zeros(0, np.float32)

    def append(self, samples):
        samples = np.concatenate([self.samples, samples])
        kept = samples[-2 * RATE :]
        self.first += len(samples) - len(kept)
        self.samples = kept

    def __len__(self):
        return self.first + len(self.samples)

    def __getitem__(self, where):
        return self.samples[where.start - self.first : where.stop - self.first]


class TeacherStreamer:
    """The guided teacher in a Streamer's place: 50 passes a chunk, each of a doubled batch. It sees
    the chunk alone; on a whole clip, as in its training, the delay would be longer."""

    def __init__(self, net):
        self.net = net
        self.reference = None
        self.x0 = None

    @torch.no_grad()
    def step(self, pixels, mel):
        """See Streamer.step."""
        device = self.net.final_layer.weight.device
        pixels = pixels.to(device)
        video = to_float(middle(pixels))
        if self.reference is None:
            self.reference = video[:, :1].expand_as(video)
        with autocast(self.net):
            cond = self.net.embed(video, self.reference, mel.to(device))
            x0 = euler(self.net, cond, STEPS, GUIDANCE)
        frames = to_frames(self.net, x0, pixels, self.x0)
        self.reference = video
        self.x0 = x0
        return frames[0].cpu()


@contextlib.contextmanager
def watched(net):
    """Inside this `with`, each pass of the network appends (t, milliseconds, x0) to a list. In the
    cache pass t is 0 and x0 is None."""
    passes = []
    device = net.final_layer.weight.device
    start = 0.0

    def before(net, arguments):
        nonlocal start
        runtime.synchronize(device)
        start = time.perf_counter()

    def after(net, arguments, x0):
        runtime.synchronize(device)
        ms = 1000 * (time.perf_counter() - start)
        passes.append((float(arguments[1]), ms, x0))

    hooks = [net.register_forward_pre_hook(before), net.register_forward_hook(after)]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def strip_url(frames):
    """Frames (n, S, S, 3) uint8, side by side in one picture -> a data URL, which an <img> takes as
    it is."""
    strip = torch.cat(list(frames.cpu()), 1).numpy()
    file = io.BytesIO()
    Image.fromarray(strip).save(file, "JPEG", quality=92, subsampling=0)
    encoded = base64.b64encode(file.getvalue()).decode()
    return f"data:image/jpeg;base64,{encoded}"


class Page:
    """What the server knows of the open page: the person, the stream, and the sound so far."""

    def __init__(self, net, face=0):
        """net: a student, or the teacher. face: the seed of a drawn person."""
        self.net = net
        self.sound = Recording()
        self.chunks = 0
        seed = SPLITS["held-out"] + 2 * face
        video = render_clip(seed, FACE_SECONDS * FPS, net.cfg.size).video
        self.video = torch.cat([video, video[1:-1].flip(0)])  # there and back
        self.streamer = TeacherStreamer(net) if net.stage == "teacher" else Streamer(net)

    def about(self):
        """What the page is told when it opens."""
        return {
            "size": self.net.cfg.size,
            "frames": 4 * self.net.cfg.chunk,  # of a chunk
            "samples": 4 * self.net.cfg.chunk * RATE // FPS,
            "ahead": AHEAD,
            "still": strip_url(self.video[:1]),
        }

    def step(self, samples):
        """The next samples (n,) -> what the page shows of the chunk that they complete."""
        start = time.perf_counter()
        cfg = self.net.cfg
        count = 4 * cfg.chunk
        expected = count * RATE // FPS + (AHEAD if self.chunks == 0 else 0)
        if len(samples) != expected:
            raise Refused(400, f"{len(samples)} samples, where {expected} are needed")
        if not np.isfinite(samples).all():
            raise Refused(400, "some samples are NaN or infinite")
        self.sound.append(samples.clip(-1, 1))
        first = count * self.chunks
        pixels = torch.stack([self.video[(first + i) % len(self.video)] for i in range(count)])
        mel = chunk_mel(self.sound, self.chunks, cfg)
        with watched(self.net) as passes:
            frames = self.streamer.step(pixels[None], mel)
        latents = list(range(cfg.chunk * self.chunks, cfg.chunk * (self.chunks + 1)))
        if self.net.stage == "teacher":
            guesses = [frames]  # fifty would be too many to show
            window = latents
        else:
            source = pixels[None].to(self.net.mask.device)
            predictions = [x0 for _, _, x0 in passes if x0 is not None]
            guesses = [to_frames(self.net, x0, source)[0] for x0 in predictions]
            window = attention_window(self.chunks, cfg)
        answer = {
            "frames": strip_url(frames),
            "guesses": [strip_url(guess) for guess in guesses],
            "passes": [{"t": t, "ms": ms} for t, ms, _ in passes],
            "window": window,
            "latents": latents,
            "compute_ms": 1000 * (time.perf_counter() - start),
        }
        self.chunks += 1
        return answer


class Studio:
    """The networks and the page that is open. All that computes runs in one thread, one job at a
    time: torch makes a team of threads for every thread that calls it."""

    def __init__(self, student, teacher):
        self.nets = {"teacher": teacher}
        for steps in STEP_CHOICES[:-1]:
            net = copy.copy(student)  # the same weights
            net.cfg = dataclasses.replace(student.cfg, num_steps=int(steps))
            self.nets[steps] = net
        self.worker = ThreadPoolExecutor(1)
        self.newest = None  # the name of the page that was asked for last
        self.page = None

    def compute(self, function, *arguments):
        return self.worker.submit(function, *arguments).result()

    def open(self, request):
        """{steps, face} -> the page's name and Page.about. An earlier page is closed."""
        net = self.nets.get(str(request.get("steps", "2")))
        face = request.get("face", 0)
        if net is None or type(face) is not int or not 0 <= face < 1 << 20:
            raise Refused(
                400, f"steps: one of {', '.join(STEP_CHOICES)}; face: a whole number from 0 on"
            )
        name = secrets.token_urlsafe(16)
        self.newest = name
        return self.compute(self.begin, name, net, face)

    def begin(self, name, net, face):
        """Render the person of a new page, unless a still newer one has been asked for."""
        self.check(name)
        self.page = Page(net, face)
        return {"page": name, **self.page.about()}

    def check(self, name):
        if self.newest is None:
            raise Refused(410, "the server has been started again; reload this page")
        if name != self.newest:
            raise Refused(410, "a newer page has taken over; reload this one to speak here again")

    def chunk(self, name, body):
        """The samples of the page's next chunk, as bytes -> Page.step."""
        if len(body) % 4:
            raise Refused(400, "samples come as float32")
        return self.compute(self.step, name, np.frombuffer(body, "<f4"))

    def step(self, name, samples):
        self.check(name)
        return self.page.step(samples)

    def say(self, request):
        """{text, voice} -> samples (n,) float32 at RATE, as bytes."""
        text = request.get("text")
        voice = request.get("voice")
        if type(text) is not str or not text.strip() or len(text) > MAX_TEXT:
            raise Refused(400, f"give a text of 1 to {MAX_TEXT} characters")
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise Refused(400, "the text holds NUL, or half a character")
        if str(voice) not in voices.LANGUAGES:
            raise Refused(400, f"the languages are {', '.join(voices.LANGUAGES)}")
        return self.compute(voices.say, text, voice).astype("<f4").tobytes()


def split(address):
    try:
        return urlsplit(address)
    except ValueError:
        raise Refused(400, "that is no address") from None


def parse(body):
    """The bytes of a JSON object -> dict."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict):
        raise Refused(400, "that is no JSON object")
    return request


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps the connection, which saves a handshake a chunk
    timeout = 30  # s without a byte, after which a connection is closed

    def log_message(self, *words):
        pass

    def do_GET(self):
        self.respond(self.get)

    def do_POST(self):
        self.respond(self.post)

    def respond(self, method):
        try:
            self.check()
            method(split(self.path))
        except Refused as e:
            self.refuse(e.status, str(e))
        except UserError as e:
            self.refuse(400, str(e))

    def get(self, url):
        if url.path != "/":
            raise Refused(404, "there is nothing but /")
        options = "".join(f"<option>{name}</option>" for name in voices.LANGUAGES)
        text = PAGE.read_text("utf-8").replace("<!-- languages -->", options)
        self.answer(200, "text/html; charset=utf-8", text.encode())

    def post(self, url):
        studio = self.server.studio
        name = parse_qs(url.query).get("page", [""])[0]
        body = self.body()
        if url.path == "/chunk":
            self.json(200, studio.chunk(name, body))
        elif url.path == "/open":
            self.json(200, studio.open(parse(body)))
        elif url.path == "/say":
            self.answer(200, "application/octet-stream", studio.say(parse(body)))
        else:
            raise Refused(404, "there is no such place")

    def check(self):
        """Only pages that this server has served may use it. A browser tells which page asks
        (Origin), and by which name it knows the server (Host): a name that somebody else has
        pointed to this machine is not ours."""
        host = self.headers.get("Host", "")
        if not self.server.is_ours(split(f"//{host}").hostname):
            raise Refused(
                403, f"no page has the name {host} here; use the address that was printed"
            )
        origin = self.headers.get("Origin")
        if origin != f"http://{host}" and not (origin is None and self.command == "GET"):
            raise Refused(403, "requests from other pages are refused")

    def body(self):
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(411, "a request needs its Content-Length")
        if len(length) > len(str(MAX_BODY)) or int(length) > MAX_BODY:
            raise Refused(413, f"a request has at most {MAX_BODY} bytes")
        return self.rfile.read(int(length))

    def answer(self, status, kind, body):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def json(self, status, value):
        self.answer(status, "application/json", json.dumps(value).encode())

    def refuse(self, status, line):
        self.close_connection = True  # its body may be unread
        self.json(status, {"error": line})


class Server(ThreadingHTTPServer):
    def __init__(self, host, port, studio):
        self.studio = studio
        self.host = host
        if ":" in host:
            self.address_family = socket.AF_INET6
        # It frees a port that was just given up. On Windows it would let a second server share the
        # port of one that runs.
        self.allow_reuse_address = os.name == "posix"
        super().__init__((host, port), Handler)

    def url(self):
        """An address that a browser on this machine can open."""
        host = ANY.get(self.host, self.host)
        if ":" in host:
            host = f"[{host}]"
        return f"http://{host}:{self.server_port}"

    def is_ours(self, name):
        """Is this a name that our pages know the server by?"""
        if self.host in LOCAL:
            return name in LOCAL
        try:
            ipaddress.ip_address(name or "")  # nobody can point a number elsewhere
        except ValueError:
            return name in ("localhost", self.host)
        return True

    def handle_error(self, request, address):
        """A browser that goes away in the middle of an answer is no error."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, address)


@dataclasses.dataclass
class Options:
    weights: str = ""  # the checkpoint of a student; the bundled one if not given
    teacher: str = ""  # the checkpoint of a teacher; the bundled one if not given
    port: int = 8000  # the number of the port; 0: any that is free
    host: str = "127.0.0.1"  # the address to listen at; another one lets other machines in
    device: str = ""  # cuda, mps or cpu; the best that there is if not given
    precision: Precision = "auto"  # number type of matrix products; auto: the device's fastest


def serve(cfg):
    """Load the networks and bind the port -> Server, ready to serve."""
    device = runtime.find_device(cfg.device, cfg.precision)
    nets = []
    for name, given in (("student", cfg.weights), ("teacher", cfg.teacher)):
        path = find_weights(name, given)
        net = load_net(path, DiT, device, runtime.fast_dtype(device))
        if (net.stage == "teacher") != (name == "teacher"):
            raise UserError(f"{path}: of stage {net.stage}, where a {name} is needed")
        nets.append(net)
    studio = Studio(*nets)
    try:
        server = Server(cfg.host, cfg.port, studio)
    except (OSError, OverflowError, UnicodeError) as e:  # taken; no port; no name
        raise UserError(f"--host {cfg.host} --port {cfg.port}: {e}; try another") from None
    # The first passes of a network are slow, and nobody should wait for them.
    page = Page(studio.nets["2"])
    studio.compute(page.step, np.zeros(page.about()["samples"] + AHEAD, np.float32))
    return server


def main(argv):
    cfg = runtime.options(Options, argv, __doc__)
    server = serve(cfg)
    if cfg.host not in LOCAL:
        print(
            "Everybody who reaches this machine can use the page. (Elsewhere browsers let it play"
            " and record only through an ssh tunnel, or https.)"
        )
    print(f"{server.url()}    (Ctrl-C stops it)", flush=True)
    with server:
        server.serve_forever()


if __name__ == "__main__":
    runtime.run(main)
