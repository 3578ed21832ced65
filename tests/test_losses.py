"""Losses, by hand and against torch's own."""

import pytest
import torch

from common.losses import consistency_loss


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
