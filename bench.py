"""The speed numbers in the README. The last line is one JSON object, for other programs; figures go to out/bench/.

    python bench.py speed --config tiny         # frames a second, time to the first frame, each pass, training steps, memory
    python bench.py speed --config small --threads 1
    python bench.py attention --config small    # the causal clip: a call a chunk, against one call with a mask, and flex_attention
    python bench.py cost --config base          # parameters, memory and arithmetic, counted, not timed
    python bench.py quality --config small      # the judge's table, see quality.py; --front 0: fewer rows of the teacher, --teacher 0: none
    python bench.py long --config small         # three minutes streamed
    python bench.py ablate --config small       # the distillation with one thing changed at a time

FPS: frames out over wall time, everything from raw pixels and samples to uint8 frames in host memory included. TTFF: from the
moment the first chunk's pixels and samples are in memory to its first frame as uint8. One stream, batch 1. Speed does not depend
on what the weights have learned, so they are random here.
"""
import contextlib
import copy
import dataclasses
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import data
import distill
import model as nn_model
import runtime
import sample
import syncnet
from data import Fail, patchify, to_float, to_uint8
from model import Cache, Config, DiT
from quality import Ablate, Long, Quality, ablate, about, long, quality, start
from runtime import mixed


@dataclasses.dataclass
class Speed:
    config: str = "tiny"
    size: int = 0           # side of the square in pixels; 0: the config's
    patch: int = 0          # and of a token
    device: str = ""
    threads: int = 0        # CPU threads; 0: as many as torch takes
    rounds: int = 5         # times that each row is measured, taking turns
    seconds: float = 3.84   # of video in each
    training: bool = True   # time training steps too
    compile: bool = False   # a row for the student under torch.compile, with CUDA graphs on a GPU
    memory: bool = True     # and the peak memory of dubbing 30 and 180 seconds
    chunks: int = 300       # in the figure, at least 104
    seed: int = 0
    zero = ("seed", "threads", "size", "patch")
    out: str = "out/bench"


def seconds_of(work, device):
    """-> seconds that work() takes, what it returned."""
    runtime.synchronize(device)
    begun = time.perf_counter()
    result = work()
    runtime.synchronize(device)
    return time.perf_counter() - begun, result


def peak_gflops(device):
    """The best rate that a square matrix product reaches here, in the precision that the network runs in."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=runtime.fast_dtype(device)) for _ in range(2))
    return 2 * n ** 3 / min(seconds_of(lambda: a @ b, device)[0] for _ in range(12)) / 1e9


def flops(cfg, latents, keys=None):
    """Multiply-adds times two over `latents` latent frames, each attending to `keys` (default: all) -> one pass; of it, its input
    layer; of it, its head; and apart from it, embedding the conditions, once for any number of passes."""
    N, D, P, S = nn_model.tokens(cfg), cfg.width, 12 * cfg.patch ** 2, nn_model.SEEN
    blocks = cfg.depth * (12 * D * D + 2 * D * N * (keys or latents))
    return [2 * latents * N * x for x in (blocks + D * P * (1 + 2.25), D * P, D * P * 2.25, 4 * S * (P + D))]


def chunk_flops(cfg):
    """A streamed chunk: three passes, of the one that writes the cache no head and of its last block only keys, values and queries, and the conditions."""
    N, D, keys = nn_model.tokens(cfg), cfg.width, cfg.sink + cfg.window
    one, _, head, conditions = flops(cfg, cfg.chunk, keys)
    return 3 * one - head - 2 * cfg.chunk * N * (9 * D * D + 2 * D * N * keys) + conditions


def teacher_flops(cfg, latents):
    """A teacher step, of one sample. Backward is twice forward, less the gradient of what is not trained: the pixels that go into the input
    layer and the conditions."""
    one, entry, _, conditions = flops(cfg, latents)
    return 3 * one - entry + 2 * conditions


def muon_flops(muon):
    """An update of Muon, beside the model's own work: five Newton-Schulz steps of X (n, m), n <= m, each A = X X^T, A A and a product with X."""
    return sum(5 * (4 * n * n * m + 2 * n ** 3) for group in muon.param_groups for n, m in (sorted(x.shape) for x in group["params"]))


def passes(model, clip, device, rounds):
    """Milliseconds of each part of a chunk, once the window is full: {part: median}. The cache pass stands alone here; a stream runs it
    together with the next chunk's pass 1."""
    cfg, spent = model.cfg, {}

    def part(name, work):
        took, result = seconds_of(work, device)
        spent.setdefault(name, []).append(1000 * took)
        return result

    n = 4 * cfg.chunk
    with torch.no_grad(), mixed(device):
        cache = Cache(model, 1, runtime.fast_dtype(device))
        for c in range(3 + 4 * rounds):
            video = part("pixels in", lambda: patchify(to_float(clip.video[None, :n].to(device)), cfg.patch))
            mel = part("mel", lambda c=c: sample.chunk_mel(clip.audio, c % 4, cfg).to(device))
            audio = part("audio features", lambda mel=mel: model.embed_audio(mel))
            cond = part("conditions", lambda video=video: model.embed_cond(video, video))
            x = part("noise", lambda cond=cond: torch.randn(cond.known.shape).to(device))
            for i, t in enumerate(sample.TIMES):
                x0 = part(f"pass {i + 1}", lambda x=x, t=t, cond=cond, audio=audio: model(x, t, cond, audio, cache=cache).float())
            part("cache pass", lambda x0=x0, cond=cond, audio=audio: model(x0, 0., cond, audio, cache=cache, store="finished"))
            cache.advance()
            part("pixels out", lambda x0=x0, video=video: to_uint8(data.picture(x0, video, cfg.patch)).cpu())
    return {name: statistics.median(times[3:]) for name, times in spent.items()}


def kernels(model, device):
    """The attention kernels that one chunk's pass runs, as the profiler names them."""
    patches = patchify(torch.zeros(1, 4 * model.cfg.chunk, model.cfg.size, model.cfg.size, 3, device=device), model.cfg.patch)
    with torch.no_grad(), torch.profiler.profile() as profile:
        cond = model.embed_cond(patches, patches)
        model(cond.known, .5, cond, sample.null_audio(model, model.cfg.chunk, 1))
    return sorted({e.key for e in profile.key_averages() if "attention" in e.key and e.key != "aten::scaled_dot_product_attention"})


def steps_of(train, folder, stage, after=0):
    """Run a real training and read from its log how long a step without evaluation takes: median seconds, of those after step `after`."""
    (Path(folder) / "log.jsonl").unlink(missing_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        train()
    rows = [r for line in open(Path(folder) / "log.jsonl") if (r := json.loads(line))["stage"] == stage]
    return statistics.median(b["seconds"] - a["seconds"] for a, b in zip(rows[1:], rows[2:])
                             if "psnr" not in {**a, **b} and b["step"] == a["step"] + 1 and a["step"] >= after)


def training(recipe, device, peak):
    """Seconds of a teacher step, without and with the expert's view, and of a student update (with its critic updates), by the trainings themselves."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = dataclasses.replace(recipe, out=folder, clips=8, teacher_steps=16, dmd_steps=18)
        samples = data.Samples(data.Bank(cfg.size, 4 * cfg.clip_latents, cfg.clips), cfg, device, runtime.fast_dtype(device))
        watch, judge = data.held_out(1, cfg.size, "watch", device), syncnet.SyncNet(syncnet.Config(size=cfg.size)).to(device).eval().requires_grad_(False)
        teacher_s, view_s = (steps_of(lambda: distill.train_teacher(dataclasses.replace(cfg, view=view), samples, judge, judge, watch, device),
                                      folder, "teacher", after=cfg.teacher_steps // 2) for view in (0., cfg.view))
        net = nn_model.load_dit(f"{folder}/teacher.pt", device).requires_grad_(False)
        update_s = steps_of(lambda: distill.train_dmd(cfg, net, copy.deepcopy(net), samples, judge, judge, watch, device), folder, "dmd")
    one, entry, head, conditions = flops(net.cfg, cfg.latents)
    step = teacher_flops(net.cfg, cfg.latents)
    # Per critic update a rollout (one and a half calls on average, the cache pass without its head) and a step of the critic; then
    # the student's backward, the teacher (twice where it is guided) and the critic's guess.
    rollout, guided = .5 * (1 + len(cfg.times)) * one + one - head + conditions, (cfg.band_last - cfg.band_first) / 50
    update = cfg.critic_updates * (rollout + step) + (2 * one - entry + conditions) + (1 + guided) * one + one + 2 * conditions
    rate, muon = step * cfg.teacher_batch / teacher_s / 1e9, muon_flops(runtime.muon_and_adam(net, cfg)[0])
    return dict(teacher_step_s=teacher_s, teacher_view_step_s=view_s, student_update_s=update_s, mfu=rate / peak,
                mfu_counting_muon=(rate + muon / teacher_s / 1e9) / peak, student_update_mfu=update * cfg.dmd_batch / update_s / peak / 1e9)


# The highest resident memory of a process, in kB. (ru_maxrss would do, were it not inherited from whoever started the process.)
MEASURE = """import sys; sys.argv = sys.argv[1:]; import data, sample; data.run(sample.main)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))"""


def peak_memory(model, seconds, device):
    """Peak resident MB of `sample.py` dubbing a drawn video of that many seconds, in a process of its own (Linux only)."""
    with tempfile.TemporaryDirectory() as folder:
        weights, video = f"{folder}/student.pt", f"{folder}/in.mp4"
        runtime.save(weights, kind="dit", stage="student", model_config=dataclasses.asdict(model.cfg), model=model.float().state_dict())
        clip = data.draw(data.SPLITS["held-out"], 250, model.cfg.size)
        with data.write_video(video, (model.cfg.size, model.cfg.size), np.tile(clip.audio, -(-seconds // 10))) as put:
            for i in range(seconds * data.FPS):
                put(clip.video[i % 250].numpy())
        done = subprocess.run([sys.executable, "-c", MEASURE, "sample.py", "--video", video, "--out", f"{folder}/out.mp4", "--weights", weights,
                               "--device", str(device)],
                              capture_output=True, text=True, cwd=Path(__file__).parent)
        if done.returncode:
            raise Fail(f"sample.py failed, whose memory was to be measured ({''.join(done.stderr.splitlines()[-1:])})")
    return int(done.stdout.split()[-1]) / 1024


def flat(model, chunks, device):
    """Milliseconds of each of `chunks` streamed chunks: the same at the end as at the start."""
    clip = data.draw(data.SPLITS["held-out"], 240, model.cfg.size)
    source, audio = (f for _ in range(chunks) for f in clip.video[:12]), np.tile(clip.audio, -(-chunks // 20))
    times, frames = [], sample.stream(model, source, audio)
    for _ in range(chunks):
        times.append(1000 * seconds_of(lambda: next(frames), device)[0])
    return times


def speed(cfg):
    if cfg.chunks < 104:
        raise Fail(f"--chunks {cfg.chunks}: at least 104, to compare the first with the last")
    device = start(cfg)
    recipe = distill.Config(**dict(distill.PRESETS[cfg.config], config=cfg.config))
    recipe.size, recipe.patch = cfg.size or recipe.size, cfg.patch or recipe.patch
    model = DiT(Config(**nn_model.model_fields(recipe))).to(device, runtime.fast_dtype(device)).eval()
    window = 4 * recipe.latents                                                     # frames that the teacher makes at once
    T = max(1, round(cfg.seconds * data.FPS / window)) * window
    clip = data.draw(data.SPLITS["held-out"], T, model.cfg.size)
    source = clip.video[None]

    def teacher(scale):                                                             # one window tells: the next ones are alike
        mel = data.log_mel(clip.audio[: window * data.RATE // data.FPS])[None].to(device)
        yield sample.dub_teacher(model, source[:, :window].to(device), mel, guidance=scale, latents=recipe.latents)[0]

    rows = {"student": lambda: sample.stream(model, clip.video, clip.audio), "teacher_guided": lambda: teacher(recipe.guidance), "teacher": lambda: teacher(1.)}
    if cfg.compile:
        compiled = copy.copy(model)
        compiled.compile(dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)
        # Eight times as long: the first four chunks of a stream, until the window is full, are not compiled.
        rows["student_compiled"] = lambda: sample.stream(compiled, clip.video.repeat(8, 1, 1, 1), np.tile(clip.audio, 8))
        list(rows["student_compiled"]())
    lasting = copy.copy(model)
    lasting.cache_from = "last"
    rows["student_cache_from_last"] = lambda: sample.stream(lasting, clip.video, clip.audio)
    list(rows["student"]())
    measured = {name: [] for name in rows}
    for _ in range(cfg.rounds):
        for name, row in rows.items():
            measured[name].append(sample.clock(row(), device))
    fps = {name: [m[0] for m in runs] for name, runs in measured.items()}
    ttff = {name: statistics.median(m[1] for m in runs) for name, runs in measured.items()}
    middle = {name: statistics.median(values) for name, values in fps.items()}
    parts, peak = passes(model, clip, device, cfg.rounds), peak_gflops(device)
    k = model.cfg.chunk
    ratio, bound = middle["student"] / middle["teacher_guided"], 2 * sample.STEPS / (len(sample.TIMES) + 1)
    work = chunk_flops(model.cfg) / (4 * k / middle["student"]) / 1e9
    teacher_work = 2 * sample.STEPS * flops(model.cfg, recipe.latents)[0] / (window / middle["teacher_guided"]) / 1e9
    result = dict(about("speed", cfg, device), tokens=nn_model.tokens(model.cfg), student=dict(
        fps=middle["student"], fps_range=[min(fps["student"]), max(fps["student"])], ttff_s=ttff["student"], ms_per_chunk=4000 * k / middle["student"],
        passes_per_chunk=len(sample.TIMES) + 1, calls_per_chunk=len(sample.TIMES), ms=parts),
        teacher_guided=dict(fps=middle["teacher_guided"], ttff_s=ttff["teacher_guided"]), teacher=dict(fps=middle["teacher"], ttff_s=ttff["teacher"]),
        attention=kernels(model, device), ratio=ratio, bound=bound, stream_gflops=work, teacher_gflops=teacher_work, peak_gflops=peak)
    for name in middle.keys() - {"student", "teacher", "teacher_guided"}:
        result[name] = dict(fps=middle[name], ttff_s=ttff[name])
    if cfg.training:
        result["train"] = training(recipe, device, peak)
    if cfg.memory and sys.platform == "linux":
        result["peak_rss_mb"] = {f"{s} s": peak_memory(model, s, device) for s in (30, 180)}
        model.to(runtime.fast_dtype(device))
    times = flat(model, cfg.chunks, device)
    report(cfg, result, fps, ttff, times)


def report(cfg, result, fps, ttff, times):
    """The Markdown tables, the figure, the JSON line."""
    dtype = str(runtime.fast_dtype(torch.device(result["device"])))[6:]
    print(f"{cfg.config}, {result['tokens']} tokens to a latent frame, on {result['device']}, {result['threads']} threads, {dtype}, torch {torch.__version__}, "
          f"matrix products at most {result['peak_gflops']:.0f} GFLOP/s\n\n| | FPS, median (least to most) of {cfg.rounds} | TTFF (ms) |\n|---|---|---|")
    for name, values in fps.items():
        name, first = name.replace("_", ", ", 1).replace("_", " "), 1000 * ttff[name]
        print(f"| {name} | {statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f}) | {first:.1f} |")
    print(f"\nstudent over guided teacher: {result['ratio']:.1f}x; the count of passes bounds it at {result['bound']:.1f}\n\n"
          "| part of a chunk | ms |\n|---|---|")
    for name, ms in result["student"]["ms"].items():
        print(f"| {name} | {ms:.2f} |")
    print(f"| all, one by one | {sum(result['student']['ms'].values()):.2f} |\n| as streamed | {result['student']['ms_per_chunk']:.2f} |\n")
    for name, value in {**result.get("train", {}), **{f"peak MB, {s}": mb for s, mb in result.get("peak_rss_mb", {}).items()}}.items():
        print(f"{name}: {value:.3g}" if value < 100 else f"{name}: {value:.0f}")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", width_ratios=(2, 1))
    left.plot(times, lw=.8)
    left.set(xlabel="chunk", ylabel="ms", ylim=(0, 2 * statistics.median(times)), title="time of each chunk (480 ms of video)")
    right.bar_label(right.barh([n.replace("_", " ") for n in reversed(fps)], [statistics.median(v) for v in reversed(fps.values())]), fmt="%.0f", padding=3)
    right.set(xlabel="frames a second", xmargin=.2)
    right.axvline(data.FPS, color="gray", lw=.8)
    figure.savefig(f"{cfg.out}/speed-{cfg.config}.png", dpi=90)
    result["chunk_ms"] = dict(first_100=statistics.median(times[3:100]), last_100=statistics.median(times[-100:]))
    print("attention by", ", ".join(result["attention"]))
    print(f"chunks: median {result['chunk_ms']['first_100']:.2f} ms in the first 100, {result['chunk_ms']['last_100']:.2f} in the last; "
          f"{cfg.out}/speed-{cfg.config}.png")
    print(json.dumps(result))


@dataclasses.dataclass
class Attention:
    config: str = "small"
    device: str = ""
    threads: int = 0
    rounds: int = 7
    flex: bool = True       # flex_attention too (compiles first)
    seed: int = 0
    zero = ("seed", "threads")
    out: str = "out/bench"


def attention(cfg):
    """The causal full clip's attention three ways, forward, batch 4: milliseconds, median of the rounds, taking turns."""
    device = start(cfg)
    c = Config(**nn_model.SIZES[cfg.config])
    rope, N, dtype = nn_model.rope_table(c).to(device), nn_model.tokens(c), runtime.fast_dtype(device)
    rows = []
    for latents in (12, 48, 192):
        q, k, v = (torch.randn(4, c.heads, latents * N, c.width // c.heads, device=device, dtype=dtype) for _ in range(3))
        see = torch.zeros(latents, latents, dtype=torch.bool)
        for chunk in range(latents // c.chunk):
            see[chunk * c.chunk:(chunk + 1) * c.chunk, nn_model.visible(chunk, c)] = True
        mask = see.repeat_interleave(N, 0).repeat_interleave(N, 1).to(device)
        turned = lambda q=q, k=k, t=rope[:latents]: (nn_model.rotate(q, t), nn_model.rotate(k, t))        # noqa: E731
        ways = {"a call a chunk": lambda q=q, k=k, v=v: nn_model.attend_chunks(q, k, v, rope, c),
                "one call, mask": lambda t=turned, v=v, mask=mask: F.scaled_dot_product_attention(*t(), v, attn_mask=mask)}
        if cfg.flex:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention
            compiled = torch.compile(flex_attention)

            def seen(b, h, i, j):
                frame, end = j // N, (i // N // c.chunk + 1) * c.chunk
                return (frame < end) & ((frame < c.sink) | (frame >= end - c.window))
            blocks = create_block_mask(seen, None, None, latents * N, latents * N, device=device)
            ways["flex_attention"] = lambda t=turned, v=v, blocks=blocks: compiled(*t(), v, block_mask=blocks)
        with torch.no_grad():
            spent = {name: [] for name in ways}
            for r in range(cfg.rounds + 1):
                for name, way in ways.items():
                    took = seconds_of(way, device)[0]
                    spent[name] += [1000 * took] if r else []
        rows.append(dict(latents=latents, **{name: statistics.median(t) for name, t in spent.items()}))
    names = [n for n in rows[0] if n != "latents"]
    print("| latent frames | " + " | ".join(f"{n} (ms)" for n in names) + " |\n|---" + "|---" * len(names) + "|")
    for row in rows:
        print(f"| {row['latents']} | " + " | ".join(f"{row[n]:.2f}" for n in names) + " |")
    print(json.dumps(dict(about("attention", cfg, device), rows=rows)))


@dataclasses.dataclass
class Cost:
    config: str = "base"
    seed: int = 0


def cost(cfg):
    """What a config needs, counted and not timed: parameters, FLOPs, and the bytes that a teacher step keeps for its backward."""
    if cfg.config not in nn_model.SIZES:
        raise Fail(f"--config {cfg.config}: one of {', '.join(nn_model.SIZES)}")
    recipe, kept = distill.Config(**dict(distill.PRESETS[cfg.config], config=cfg.config)), {}
    net = DiT(Config(**nn_model.model_fields(recipe)))
    parameters = sum(p.numel() for p in net.parameters())

    def keep(x):
        if not isinstance(x, torch.nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    x0, patches = torch.randn(1, recipe.latents, *net.mask.shape), patchify(torch.zeros(1, 4 * recipe.latents, net.cfg.size, net.cfg.size, 3), net.cfg.patch)
    heard = data.hearing(torch.zeros(1, 16 * recipe.latents, data.MELS), net.cfg)
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        cond, audio = net.embed_cond(patches, patches), net.embed_audio(heard)
        loss, _ = distill.flow_loss(net, x0, cond, audio, torch.full((1, 1), .5), recipe.weight_clip, recipe.edges)
    n, step = recipe.teacher_batch, recipe.teacher_batch * teacher_flops(net.cfg, recipe.latents)
    result = dict(about("cost", cfg, "cpu"), parameters=parameters, tokens=nn_model.tokens(net.cfg), chunk_gflop=chunk_flops(net.cfg) / 1e9,
                  sample_mb=sum(kept.values()) / 1e6, step_gb=n * sum(kept.values()) / 1e9, state_gb=20 * parameters / 1e9,
                  clips_gb=recipe.clips * recipe.clip_latents * 12 * net.cfg.size ** 2 / 1e9, step_tflop=step / 1e12,
                  run_pflop=recipe.teacher_steps * step / 1e15)
    r = {k: f"{v:.3g}" for k, v in result.items() if isinstance(v, float)}
    print(f"{cfg.config}: {parameters / 1e6:.1f}M parameters, {result['tokens']} tokens to a latent frame; a streamed chunk is {r['chunk_gflop']} GFLOP\n"
          f"teacher: a step of batch {n} is {r['step_tflop']} TFLOP, all {recipe.teacher_steps} are {r['run_pflop']} PFLOP\n"
          f"memory: {r['sample_mb']} MB a sample kept for backward, {r['step_gb']} GB a step (loss {loss.item():.2f}); {r['state_gb']} GB for weights,\n"
          f"average, gradients and moments in float32; {r['clips_gb']} GB for {recipe.clips} clips")
    print(json.dumps(result))


BENCHES = {"speed": (Speed, speed), "cost": (Cost, cost), "attention": (Attention, attention), "quality": (Quality, quality), "long": (Long, long),
           "ablate": (Ablate, ablate)}


def main(argv):
    if argv and argv[0] in BENCHES:
        options, bench = BENCHES[argv[0]]
        return bench(data.options(options, argv[1:], sys.modules[bench.__module__].__doc__))
    if not argv or argv[0] in ("-h", "--help"):
        return print(__doc__)
    raise Fail(f"{argv[0]}: no such bench; one of {', '.join(BENCHES)}")


if __name__ == "__main__":
    data.run(main)
