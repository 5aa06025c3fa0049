import dataclasses

import pytest
import torch

import data
import flow

pytestmark = pytest.mark.usefixtures("float32")


def test_the_time_grid(cfg):
    grid = [round(flow.grid_time(j), 3) for j in (0, 20, 30, 40, 50)]
    assert grid == [1, 0.882, 0.769, 0.556, 0] and flow.shift_time(0.5, 1) == 0.5
    assert flow.denoising_times(cfg) == pytest.approx([0.999, flow.grid_time(40)])
    three = dataclasses.replace(cfg, num_steps=3, landing=30)
    assert flow.denoising_times(three) == pytest.approx(
        [0.999, flow.grid_time(15), flow.grid_time(30)]
    )


@pytest.mark.parametrize("t", [0.3, torch.tensor([[0.2], [0.9]], dtype=torch.float64)])
def test_velocity_is_noise_less_picture(t):
    x0, eps = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    x_t, share = flow.add_noise(x0, eps, t), torch.as_tensor(t).view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, (1 - share) * x0 + share * eps)
    torch.testing.assert_close(flow.velocity(x_t, x0, t), eps - x0)


@torch.no_grad()
def test_guidance_1_is_the_conditional_prediction_and_each_sample_may_have_its_own(tiny, parts):
    x, cond = parts(3)
    plain, without = tiny(x, 0.7, cond), tiny(x, 0.7, tiny.null_cond(cond))
    assert torch.equal(flow.guided(tiny, x, 0.7, cond, 1), plain)
    assert not torch.allclose(plain, without, atol=1e-3)
    scale, t = torch.tensor([3.0, 1.0]), torch.full((2, 1), 0.7)
    expected = without + scale.view(2, 1, 1, 1) * (plain - without)
    each, both = (flow.guided(tiny, x, t, cond, s) for s in (scale, 3.0))
    torch.testing.assert_close(each, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(both[:1], expected[:1], atol=1e-5, rtol=0)


def test_withheld_sound_is_what_training_drops_to(tiny):
    rectangle = torch.rand(2, 12, 32, 24, 3)
    heard = data.hearing(torch.randn(2, 48, data.MELS))
    dropped = tiny.embed(rectangle, rectangle, heard, torch.tensor([True, False]))
    told = tiny.embed(rectangle, rectangle, heard)
    torch.testing.assert_close(dropped.audio[0], tiny.null_cond(told).audio[0])
    assert torch.equal(dropped.audio[1], told.audio[1])


class Perfect(torch.nn.Linear):
    def __init__(self):
        super().__init__(1, 1)

    def forward(self, x_t, t, cond):
        return cond.masked_source


def test_euler_with_a_perfect_network_lands_on_x0(parts):
    _, cond = parts(3)
    torch.testing.assert_close(flow.euler(Perfect(), cond, 10), cond.masked_source)
