"""Flow matching: the time grid, noise, guidance, Euler steps, and the loss.

A clip x0 is mixed with noise eps: x_t = (1 - t) x0 + t eps, so t = 0 is clean and t = 1 is noise.
The velocity along this line is v = dx_t/dt = eps - x0. The network predicts x0, which tells the
velocity, too: eps = (x_t - (1 - t) x0) / t, so v = (x_t - x0) / t.
"""

import torch

from data import to_pixels
from model import Cond
from runtime import autocast

SHIFT = 5.0  # of the time grid (paper: 5)
STEPS = 50  # of the teacher's grid (paper: 50)


def shift_time(u, s=SHIFT):
    """u in 0..1 -> t in 0..1, more of it near noise for s > 1."""
    return s * u / (1 + (s - 1) * u)


def grid_time(j, steps=STEPS):
    """The time of index j of the grid: j = 0 is noise, j = steps clean.

    The steps are equally long in u = 1 - j / steps, not in t = 5 u / (1 + 4 u): near noise, where
    the mouth as a whole is decided, they are short. So j = 20, 30, 40 of 50 are t = .882, .769,
    .556, and the last ten steps cover more than half of the way."""
    return shift_time(1 - j / steps)


def denoising_times(cfg):
    """The times of the student's calls for a chunk: noise (told as .999, the last time that
    training knows), then on to the landing, the time of index cfg.landing of the teacher's grid.

    The earlier the landing, the less of the first prediction is left in x_t (at j = 40 the share
    1 - t = .44, at the paper's 30 .23), and the more must be predicted again in one call. That
    gives a small network softer mouths, so the preset lands later than the paper."""
    last = cfg.num_steps - 1
    return [0.999] + [grid_time(cfg.landing * i / last) for i in range(1, last + 1)]


def per_latent(t):
    """t, a number or (B, L or 1) -> what broadcasts over tokens (B, L, N, P)."""
    return t[..., None, None] if torch.is_tensor(t) else t


def add_noise(x0, eps, t):
    """x_t = (1 - t) x0 + t eps."""
    return torch.lerp(x0.to(eps.dtype), eps, per_latent(t))


def velocity(x_t, x0, t):
    """v = (x_t - x0) / t, for t > 0."""
    return (x_t - x0) / per_latent(t)


def noise_like(x, rng):
    """Gaussian noise of the shape of x, drawn on its device."""
    return torch.randn(x.shape, generator=rng, device=x.device)


def seeded(seed):
    """Like torch.randn_like, the same numbers on every device."""
    rng = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=rng).to(x.device, non_blocking=True)


def guided(net, x_t, t, cond, scale):
    """Classifier-free guidance: x0_null + s (x0_audio - x0_null), by a forward pass of twice the
    batch; s = 1 is the conditional prediction alone. scale: a number, or one a sample (B,)."""
    if not torch.is_tensor(scale) and scale == 1:
        return net(x_t, t, cond)
    if torch.is_tensor(t):
        t = torch.cat([t, t])
    if torch.is_tensor(scale):
        scale = scale.view(-1, 1, 1, 1)
    both = Cond(*(torch.cat(pair) for pair in zip(cond, net.null_cond(cond))))
    x0_audio, x0_null = net(torch.cat([x_t, x_t]), t, both).chunk(2)
    return x0_null + scale * (x0_audio - x0_null)


@torch.no_grad()
def euler_guesses(net, cond, noise, scales):
    """Walk from noise (B, L, N, P) to a clip along the shifted grid, by Euler steps of the
    velocity, guided by scales[j] at step j. Yields the guess of x0 at each step. The last one is
    where the walk ends, since its step leads to t = 0."""
    steps = len(scales)
    x_t = noise
    for j, scale in enumerate(scales):
        t = grid_time(j, steps)
        next_t = grid_time(j + 1, steps)
        with autocast(net):
            x0 = guided(net, x_t, t, cond, scale).float()
        yield x0
        x_t = x_t + (next_t - t) * velocity(x_t, x0, t)


def euler(net, cond, steps=STEPS, guidance=1.0, rng=None):
    """Noise -> x0 (B, L, N, P), the end of euler_guesses."""
    noise = torch.randn(cond.masked_source.shape, generator=rng).to(cond.masked_source.device)
    for x0 in euler_guesses(net, cond, noise, [guidance] * steps):
        pass
    return x0


def denoising_loss(net, x, y, weight, edges):
    """Mean of weight (x - y)^2 in the mask and, times `edges` (None: without), of the same for the
    differences between neighbouring pixels in time, y and x: lips, teeth and motion, which are few
    pixels, count for more, and the best guess is still E[x0 | x_t], since all is quadratic.
    x, y (B, L, N, P), equal outside the mask; weight (B, L or 1) -> a number."""
    error = (x - y) * weight.sqrt()[..., None, None]
    loss = (error.square() * net.mask).mean()
    if edges is not None:
        error = to_pixels(error, net.cfg.patch)  # B T height width 3
        for axis in (1, 2, 3):
            loss = loss + edges * error.diff(dim=axis).square().mean()
    return loss / net.mask.mean()


def flow_loss(net, x0, noise, t, cond, weight_clip, edges=None):
    """Flow matching by a network that predicts x0, with the loss in velocity space: |v' - v|^2 =
    |x0' - x0|^2 / t^2. t (B, 1) -> the loss, and the prediction x0'.

    The weight 1 / t^2 is clipped: near t = 0 the noisy picture shows all that is to be predicted,
    and unclipped (2,500 at t = .02) those easy samples would be all that counts."""
    pred = net(add_noise(x0, noise, t), t, cond)
    weight = (1 / t**2).clamp(max=weight_clip)
    return denoising_loss(net, pred, x0, weight, edges), pred
