"""Losses, by hand and against torch's own."""

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal

from common.draws import draw_exits, score_range, score_timesteps
from common.losses import consistency_loss, dmd_gradient, dmd_loss, fake_score_loss
from common.solvers import renoise, roll_out


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Latent consistency
# ---------------------------------------------------------------------------------------------------------------------


def test_the_consistency_loss_is_l2_or_huber():
    prediction, target = noise(3, 50, seed=1), noise(3, 50, seed=2)
    l2 = consistency_loss(prediction, target, "l2", 0.5)
    torch.testing.assert_close(l2, torch.nn.functional.mse_loss(prediction, target), rtol=1e-6, atol=0)
    # sqrt(3^2 + 4^2) - 4 = 1, and 0 where nothing differs
    assert consistency_loss(torch.tensor([3.0, -3.0, 0.0]), torch.zeros(3), "huber", 4.0).item() == pytest.approx(2 / 3)
    # A small c makes it the L1 distance.
    l1 = torch.nn.functional.l1_loss(prediction, target)
    torch.testing.assert_close(consistency_loss(prediction, target, "huber", 1e-5), l1, rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss_type", ["l2", "huber"])
def test_the_consistency_loss_is_fp32(loss_type):
    prediction, target = noise(3, 50, seed=1).bfloat16(), noise(3, 50, seed=2)
    loss = consistency_loss(prediction, target, loss_type, 1e-3)
    assert loss.dtype == torch.float32
    assert loss == consistency_loss(prediction.float(), target, loss_type, 1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# DMD
# ---------------------------------------------------------------------------------------------------------------------

MEANS, DEVIATIONS = torch.tensor([-1.5, 0.2, 1.4]).double(), torch.tensor([0.3, 0.2, 0.4]).double()
WEIGHTS = torch.tensor([0.5, 0.2, 0.3]).double()


def noisy(means, deviations, weights, sigma) -> MixtureSameFamily:
    """The density of x_t where x0 is this mixture."""
    spread = ((1 - sigma) ** 2 * deviations**2 + sigma**2).sqrt()
    return MixtureSameFamily(Categorical(weights), Normal((1 - sigma) * means, spread))


def score(density, x):
    """d log p / dx, by autograd through torch's own density."""
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    return gradient


def ideal_velocity(density, x, sigma):
    """Of E[eps | x_t] = -sigma * score: v = (eps - x_t) / (1 - sigma)."""
    return (-sigma * score(density, x) - x) / (1 - sigma)


# ---------------------------------------------------------------------------------------------------------------------
# The gradient
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.02, 0.3, 0.9])
def test_the_gradient_is_that_of_the_divergence_in_closed_form(sigma):
    """d KL(fake || real) / dx0 of the noised densities is (1 - sigma) * (score_fake - score_real)."""
    sigma = torch.tensor(sigma).double()
    rng = torch.Generator().manual_seed(0)
    x_g = torch.randn(64, 1, generator=rng).double()
    eps = torch.randn(64, 1, generator=rng).double()
    x_t = (1 - sigma) * x_g + sigma * eps
    real = noisy(MEANS, DEVIATIONS, WEIGHTS, sigma)
    fake = noisy(torch.zeros(1).double(), torch.ones(1).double(), torch.ones(1).double(), sigma)
    g, gap = dmd_gradient(ideal_velocity(real, x_t, sigma), ideal_velocity(fake, x_t, sigma), x_g, eps)
    divergence = (1 - sigma) * (score(fake, x_t) - score(real, x_t))
    weight = sigma / (1 - sigma) ** 2  # of velocities
    torch.testing.assert_close(g * gap[:, None], weight * divergence, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma", [0.02, 0.5, 0.98])
def test_velocities_give_the_gradient_of_clean_samples(sigma):
    """DMD's own form, equations 7 and 8 of DMD2's appendix, in float64."""
    rng = torch.Generator().manual_seed(1)
    x_g, eps, v_real, v_fake = torch.randn(4, 3, 2, 5, 4, 4, generator=rng).double()
    x_t = renoise(x_g, torch.full((3,), sigma, dtype=torch.float64), eps)
    x0_real, x0_fake = x_t - sigma * v_real, x_t - sigma * v_fake
    expected = (x0_fake - x0_real) / (x_g - x0_real).abs().mean((1, 2, 3, 4), keepdim=True)
    g, gap = dmd_gradient(v_real, v_fake, x_g, eps)
    torch.testing.assert_close(g, expected, rtol=1e-9, atol=1e-12)
    assert gap.shape == (3,)


def test_velocities_keep_their_digits_in_bf16_where_clean_samples_lose_them():
    rng = torch.Generator().manual_seed(2)
    x_g, eps, v_real = torch.randn(3, 1, 4096, generator=rng).double()
    v_fake = v_real + 0.1 * torch.randn(1, 4096, generator=rng).double()
    truth, _ = dmd_gradient(v_real, v_fake, x_g, eps)
    real, fake = v_real.bfloat16(), v_fake.bfloat16()
    ours, _ = dmd_gradient(real.float(), fake.float(), x_g.float(), eps.float())
    x_t = (0.98 * x_g + 0.02 * eps).bfloat16()
    x0_real, x0_fake = x_t - 0.02 * real, x_t - 0.02 * fake
    theirs = (x0_fake - x0_real) / (x_g.bfloat16() - x0_real).abs().mean()

    def error(g):
        return ((g.double() - truth).norm() / truth.norm()).item()

    assert error(ours) < 0.03 < 5 * error(ours) < error(theirs)


def test_a_sample_that_the_teacher_leaves_as_it_is_has_no_gradient():
    """Its gap is 0. Other samples stay as they are, and so does a teacher's NaN, which has to be found."""
    x_g, eps, v_fake = torch.full((3, 2), 0.5), torch.ones(3, 2), torch.full((3, 2), 2.0)
    v_real = torch.tensor([[0.5, 0.5], [1.5, 0.5], [float("nan"), 0.5]])
    g, gap = dmd_gradient(v_real, v_fake, x_g, eps)
    assert gap[:2].tolist() == [0.0, 0.5] and g[:2].tolist() == [[0.0, 0.0], [-1.0, -3.0]]
    assert g[2].isnan().all() and dmd_loss(x_g[:2], g[:2]) == 0.5 * (1 + 9) / 4


def test_the_loss_has_that_gradient_and_no_other():
    rng = torch.Generator().manual_seed(3)
    x_g = torch.randn(2, 3, 4, generator=rng, requires_grad=True)
    g = torch.randn(2, 3, 4, generator=rng)
    loss = dmd_loss(x_g, g)
    loss.backward()
    torch.testing.assert_close(x_g.grad, g / 24)
    torch.testing.assert_close(loss.detach(), 0.5 * g.square().mean())


def test_the_fake_score_of_least_loss_is_the_ideal_velocity():
    """A linear network fitted to the loss on Gaussian samples finds E[v | x_t], which is linear there."""
    sigma, mean, deviation = 0.6, 0.7, 0.5
    rng = torch.Generator().manual_seed(4)
    x_g = mean + deviation * torch.randn(200_000, generator=rng).double()
    eps = torch.randn(200_000, generator=rng).double()
    x_t = renoise(x_g, sigma, eps)
    line = torch.zeros(2).double().requires_grad_(True)
    optimizer = torch.optim.LBFGS([line])

    def closure():
        optimizer.zero_grad()
        loss = fake_score_loss(line[0] * x_t + line[1], x_g, eps)
        loss.backward()
        return loss

    optimizer.step(closure)
    one = torch.ones(1).double()
    density = noisy(mean * one, deviation * one, one, torch.tensor(sigma).double())
    points = torch.linspace(-1, 1, 9).double()
    torch.testing.assert_close(
        (line[0] * points + line[1]).detach(), ideal_velocity(density, points, sigma), atol=0.02, rtol=0
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training on an ideal teacher
# ---------------------------------------------------------------------------------------------------------------------


NUMBERS = 16  # of a sample, independent: the gap that divides a sample's gradient is a mean over them


def mixture_velocity(x, sigma):
    """The ideal teacher's, by hand: x [B, 1, 1, 1, NUMBERS], sigma [B]."""
    means, deviations, sigma = MEANS.float(), DEVIATIONS.float(), sigma.repeat_interleave(NUMBERS)
    keep = 1 - sigma[:, None]
    variance = keep**2 * deviations**2 + sigma[:, None] ** 2
    offset = x.flatten()[:, None] - keep * means
    share = (WEIGHTS.float().log() - 0.5 * variance.log() - offset**2 / (2 * variance)).softmax(1)
    clean = (share * (means + keep * deviations**2 / variance * offset)).sum(1)
    return (x.flatten() - clean).div(sigma).reshape(x.shape)


class Velocity(torch.nn.Module):
    """The teacher's plus a small network that starts at zero."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, 96), torch.nn.SiLU(), torch.nn.Linear(96, 96), torch.nn.SiLU(), torch.nn.Linear(96, 1)
        )
        torch.nn.init.zeros_(self.layers[-1].weight)
        torch.nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x, sigma):
        points, sigma = x.flatten(), sigma.expand(len(x))
        inputs = [points, sigma.repeat_interleave(NUMBERS)]
        inputs += [f(k * points) for k in (1.0, 2.0, 4.0) for f in (torch.sin, torch.cos)]
        return mixture_velocity(x, sigma) + self.layers(torch.stack(inputs, 1)).reshape(x.shape)


def test_the_ideal_teacher_is_the_score_s():
    x, sigma = torch.linspace(-3, 3, 3 * NUMBERS), torch.tensor([0.4, 0.1, 0.9]).double()
    by_sample = zip(x.double().chunk(3), sigma, strict=True)
    expected = [ideal_velocity(noisy(MEANS, DEVIATIONS, WEIGHTS, each), points, each) for points, each in by_sample]
    ours = mixture_velocity(x.reshape(3, 1, 1, 1, NUMBERS), sigma.float()).flatten()
    torch.testing.assert_close(ours, torch.cat(expected).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps, last_only, start, end",
    [
        ([1000.0], False, 1.0, 0.12),
        ([1000.0, 757.0, 522.0], True, 0.4, 0.12),
        # The critic sees samples of all exits alike: it is their mixture that has to fit
        ([1000.0, 757.0, 522.0], False, 0.4, 0.2),
    ],
)
def test_training_on_an_ideal_teacher_converges_to_its_distribution(steps, last_only, start, end):
    """Wasserstein distance of the student's samples from the teacher's data: above `start` untrained, below `end`.

    Of five seeds it ends at 0.16 to 0.18 where exits are drawn. With samples of a single number, whose gap can be as
    small as any, gradients have heavy tails, and it ended at 0.16 to 0.23.
    """
    torch.manual_seed(0)
    student, fake = Velocity(), Velocity()
    optimizers = [torch.optim.Adam(student.parameters(), 1e-3), torch.optim.Adam(fake.parameters(), 4e-3)]
    rng = torch.Generator().manual_seed(1)
    size, iterations = 1024 // NUMBERS, 3000
    decay = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations) for optimizer in optimizers]

    def rollout(exit_step, count, rng=rng):
        noise = torch.randn(len(steps), count, 1, 1, 1, NUMBERS, generator=rng)
        (x,) = roll_out(
            lambda x, t, start, cache: student(x, torch.tensor(t / 1000)), None, noise.__getitem__, steps, [1],
            [exit_step],
        )  # fmt: skip
        return x

    def distance():
        count = 20_000
        with torch.no_grad():
            found = rollout(len(steps) - 1, count // NUMBERS, torch.Generator().manual_seed(2)).flatten()
        truth = noisy(MEANS, DEVIATIONS, WEIGHTS, torch.tensor(0.0)).sample((count,))
        return (found.sort().values - truth.sort().values).abs().mean().item()

    def draw_noise(low, high):
        t = score_timesteps(torch.rand(size, generator=rng), low, high, 1.0, 0.02, 0.98)
        return t, torch.randn(size, 1, 1, 1, NUMBERS, generator=rng)

    before = distance()
    for iteration in range(iterations):
        exits = draw_exits(0, iteration, len(steps), 1, False, last_only)
        x_g = rollout(exits[0], size)
        low, high = score_range(exits, steps, True, False, 0.0)
        for turn in range(2):
            t, eps = draw_noise(low, high)
            if turn == 0:
                with torch.no_grad():
                    x_t = renoise(x_g, t / 1000, eps)
                    g, _ = dmd_gradient(mixture_velocity(x_t, t / 1000), fake(x_t, t / 1000), x_g, eps)
                loss = dmd_loss(x_g, g)
            else:
                x_g = x_g.detach()
                loss = fake_score_loss(fake(renoise(x_g, t / 1000, eps), t / 1000), x_g, eps)
            optimizers[turn].zero_grad()
            loss.backward()
            optimizers[turn].step()
            decay[turn].step()
    after = distance()
    print(f"{len(steps)} steps: distance {before:.3f} -> {after:.3f}")
    assert before > start and after < end
