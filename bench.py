"""Every number in the README. The last line is one JSON object, for other programs.

    python bench.py speed --config tiny         # frames a second, time to the first frame, milliseconds of each pass
    python bench.py speed --config small --threads 1

FPS: frames out over wall time, everything from raw pixels and samples to uint8 frames in host memory included. TTFF: from the
moment the first chunk's pixels and samples are in memory to its first frame as uint8. One stream, batch 1. Speed does not depend
on what the weights have learned, so they are random here.
"""
import dataclasses
import json
import statistics
import time

import torch

import data
import distill
import model as nn_model
import sample
from data import Fail, patchify, to_float, to_uint8
from model import Cache, Config, DiT, mixed


@dataclasses.dataclass
class Speed:
    config: str = "tiny"
    device: str = ""
    threads: int = 0        # CPU threads; 0: as many as torch takes
    rounds: int = 5         # times that each row is measured, taking turns
    seconds: float = 4.8    # of video in each
    seed: int = 0


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_gflops(device):
    """The best rate that a square matrix product reaches here, in the precision that the network runs in."""
    n, dtype = (2048 if device.type == "cpu" else 8192), nn_model.fast_dtype(device)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(12):
        sync(device)
        begun = time.perf_counter()
        a @ b
        sync(device)
        times.append(time.perf_counter() - begun)
    return 2 * n ** 3 / min(times) / 1e9


def passes(model, clip, device, rounds):
    """Milliseconds of each part of a chunk, once the window is full: {part: median}. The cache pass stands alone here; a stream runs it
    together with the next chunk's pass 1."""
    cfg, spent = model.cfg, {}

    def part(name, work):
        sync(device)
        begun = time.perf_counter()
        result = work()
        sync(device)
        spent.setdefault(name, []).append(1000 * (time.perf_counter() - begun))
        return result

    n = 4 * cfg.chunk
    with torch.no_grad(), mixed(device):
        cache = Cache(model, 1, nn_model.fast_dtype(device))
        for c in range(3 + 4 * rounds):
            video = part("pixels in", lambda: patchify(to_float(clip.video[None, :n].to(device)), cfg.patch))
            mel = part("mel", lambda c=c: sample.chunk_mel(clip.audio, c % 4, cfg).to(device))
            audio = part("audio features", lambda mel=mel: model.embed_audio(mel))
            cond = part("conditions", lambda video=video: model.embed_cond(video, video))
            x = part("noise", lambda cond=cond: torch.randn(cond.known.shape).to(device))
            for i, t in enumerate(sample.TIMES):
                x0 = part(f"pass {i + 1}", lambda x=x, t=t, cond=cond, audio=audio: model(x, t, cond, audio, cache=cache).float())
            part("cache pass", lambda x0=x0, cond=cond, audio=audio: model(x0, 0., cond, audio, cache=cache, write=True))
            part("pixels out", lambda x0=x0, video=video: to_uint8(data.picture(x0, video, cfg.patch)).cpu())
    return {name: statistics.median(times[3:]) for name, times in spent.items()}


def speed(cfg):
    device = nn_model.find_device(cfg.device)
    if cfg.config not in nn_model.SIZES:
        raise Fail(f"--config {cfg.config}: one of {', '.join(nn_model.SIZES)}")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    nn_model.keep_memory()
    torch.manual_seed(cfg.seed)
    model = DiT(Config(**nn_model.SIZES[cfg.config])).to(device, nn_model.fast_dtype(device)).eval()
    recipe = distill.Config(**distill.PRESETS[cfg.config])
    window = 4 * recipe.latents                                                     # frames that the teacher makes at once
    T = max(1, round(cfg.seconds * data.FPS / window)) * window
    clip = data.draw(data.SPLITS["held-out"], T, model.cfg.size)
    mel, source = data.log_mel(clip.audio)[None].to(device), clip.video[None]

    def teacher(scale):
        for a in range(0, window if scale != 1 else T, window):                     # one window tells: the next ones are alike
            yield sample.dub_teacher(model, source[:, a:a + window].to(device), mel[:, 4 * a:4 * (a + window)], guidance=scale, latents=recipe.latents)[0]

    rows = {"student": lambda: sample.stream(model, clip.video, clip.audio), "teacher_guided": lambda: teacher(recipe.guidance), "teacher": lambda: teacher(1.)}
    list(rows["student"]())
    measured = {name: [] for name in rows}
    for _ in range(cfg.rounds):
        for name, row in rows.items():
            measured[name].append(sample.clock(row(), device))
    fps = {name: [m[0] for m in runs] for name, runs in measured.items()}
    ttff = {name: statistics.median(m[1] for m in runs) for name, runs in measured.items()}
    middle = {name: statistics.median(values) for name, values in fps.items()}
    parts, peak = passes(model, clip, device, cfg.rounds), peak_gflops(device)
    chunk = model.cfg.chunk
    work = 3 * nn_model.flops(model.cfg, chunk, model.cfg.sink + model.cfg.window)
    ratio, bound = middle["student"] / middle["teacher_guided"], 2 * sample.STEPS / (len(sample.TIMES) + 1)

    print(f"{cfg.config} on {device}, {torch.get_num_threads()} threads, {str(nn_model.fast_dtype(device))[6:]}, torch {torch.__version__}\n\n"
          f"| | FPS, median (least to most) of {cfg.rounds} | TTFF (ms) |\n|---|---|---|")
    for name in rows:
        print(f"| {name.replace('_', ', ')} | {middle[name]:.1f} ({min(fps[name]):.1f} to {max(fps[name]):.1f}) | {1000 * ttff[name]:.1f} |")
    print(f"\nstudent over guided teacher: {ratio:.1f}x; the count of passes bounds it at {bound:.1f}\n\n| part of a chunk | ms |\n|---|---|")
    for name, ms in parts.items():
        print(f"| {name} | {ms:.2f} |")
    print(f"| all | {sum(parts.values()):.2f} |\n")
    print(json.dumps(dict(
        bench="speed", config=cfg.config, device=str(device), threads=torch.get_num_threads(), torch=torch.__version__, clips=1, seed=cfg.seed,
        student=dict(fps=middle["student"], fps_range=[min(fps["student"]), max(fps["student"])], ttff_s=ttff["student"],
                     ms_per_chunk=4000 * chunk / middle["student"], passes_per_chunk=len(sample.TIMES) + 1, ms=parts),
        teacher_guided=dict(fps=middle["teacher_guided"], ttff_s=ttff["teacher_guided"]), teacher=dict(fps=middle["teacher"], ttff_s=ttff["teacher"]),
        ratio=ratio, bound=bound, stream_gflops=work / (4 * chunk / middle["student"]) / 1e9, peak_gflops=peak)))


BENCHES = {"speed": (Speed, speed)}


def main(argv):
    if argv and argv[0] in BENCHES:
        options, bench = BENCHES[argv[0]]
        return bench(data.options(options, argv[1:], __doc__))
    if not argv or argv[0] in ("-h", "--help"):
        return print(__doc__)
    raise Fail(f"{argv[0]}: no such bench; one of {', '.join(BENCHES)}")


if __name__ == "__main__":
    data.run(main)
