import math

import cv2
import numpy as np
import pytest
import torch

from cosmos_mp.evaluate.metrics import band_energy, diversity, edge_f1, frechet, mse_to, sharpness


def with_moments(mean, cov, samples=200, seed=0):
    """Samples whose mean and unbiased covariance are exactly these."""
    x = np.random.default_rng(seed).normal(size=(samples, len(mean)))
    x = (x - x.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(x, rowvar=False)))).T
    return x @ np.linalg.cholesky(np.asarray(cov)).T + np.asarray(mean)


def video(luma, frames=3):
    return np.repeat(np.repeat((np.asarray(luma).clip(0, 1) * 255).round().astype(np.uint8)[None, ..., None], 3, axis=-1), frames, axis=0)


def stripes(axis, period, amplitude=0.09, side=64, gradient=0.0):
    position = np.mgrid[:side, :side][axis]
    return video(0.4 + amplitude * np.sin(2 * np.pi * position / period + 0.7) + gradient * np.mgrid[:side, :side][1 - axis] / side)


def square(top, left, side=64):
    frame = np.zeros((side, side))
    frame[top : top + 20, left : left + 20] = 1.0
    return video(frame)


def edges(clip):
    return np.stack([np.repeat(cv2.Canny(frame, 100, 200)[..., None], 3, axis=-1) for frame in clip])


def test_mse_to_is_per_sample():
    a = torch.zeros(2, 16, 3, 4, 4)
    b = a.clone()
    b[1, 0] = 2.0
    assert mse_to(a, b).dtype == np.float64
    np.testing.assert_allclose(mse_to(a, b), [0.0, 4.0 / 16])


def test_mse_to_refuses_other_shapes():
    with pytest.raises(ValueError, match="shapes"):
        mse_to(torch.zeros(2, 3), torch.zeros(1, 3))


def test_frechet_of_diagonal_gaussians():
    x, y = with_moments([0, 1], np.diag([1.0, 4.0])), with_moments([3, 1], np.diag([9.0, 1.0]), samples=90, seed=1)
    assert frechet(x, y) == pytest.approx(9 + (1 - 3) ** 2 + (2 - 1) ** 2)


def test_frechet_of_gaussians_that_do_not_commute():
    cov_x, cov_y = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[1.0, -0.6], [-0.6, 3.0]])
    # tr M^½ of a 2×2 matrix: sqrt(tr M + 2 sqrt(det M))
    product = cov_x @ cov_y
    expected = np.trace(cov_x + cov_y) - 2 * math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    assert frechet(with_moments([0, 0], cov_x), with_moments([0, 0], cov_y, seed=1)) == pytest.approx(expected)


def test_frechet_of_the_same_is_zero_and_it_is_symmetric():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 8)), rng.normal(size=(40, 8)) + 0.3
    assert frechet(x, x) == pytest.approx(0, abs=1e-12)
    assert frechet(x, y) == pytest.approx(frechet(y, x))
    few = rng.normal(size=(5, 8))  # a covariance without full rank
    assert 0 <= frechet(few, few) < 1e-6


def test_frechet_of_single_features_and_tensors():
    x, y = with_moments([1], [[4.0]]), with_moments([0], [[1.0]], seed=1)
    assert frechet(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(1 + 1)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((1, 3)), np.zeros((4, 3)), "at least 2"),
        (np.zeros((4, 3)), np.zeros((1, 3)), "at least 2"),
        (np.zeros((4, 3)), np.zeros((4, 2)), "one extractor"),
        (np.zeros(4), np.zeros(4), "one extractor"),
        (np.full((4, 3), np.nan), np.zeros((4, 3)), "NaN"),
    ],
)
def test_frechet_refuses(x, y, message):
    with pytest.raises(ValueError, match=message):
        frechet(x, y)


def test_edge_f1_allows_one_pixel_and_no_more():
    control = edges(square(20, 20))
    assert edge_f1(square(20, 20), control, 100, 200) == (1.0, 1.0, 1.0)
    assert edge_f1(square(21, 21), control, 100, 200) == (1.0, 1.0, 1.0)
    assert edge_f1(square(21, 21), control, 100, 200, tolerance=0)[2] < 0.2
    assert edge_f1(square(23, 23), control, 100, 200)[2] < 0.2
    assert edge_f1(square(23, 23), control, 100, 200, tolerance=3)[2] == 1.0


def test_edge_f1_tells_precision_from_recall():
    both = np.maximum(square(4, 4), square(36, 36))
    precision, recall, f1 = edge_f1(both, edges(square(4, 4)), 100, 200)  # drew twice what was asked
    assert (precision, recall) == pytest.approx((0.5, 1.0), abs=0.02)
    assert f1 == pytest.approx(2 / 3, abs=0.02)
    precision, recall, _ = edge_f1(square(4, 4), edges(both), 100, 200)
    assert (precision, recall) == pytest.approx((1.0, 0.5), abs=0.02)


def test_edge_f1_sees_colour_edges_that_grey_hides():
    frame = np.zeros((64, 64, 3), np.uint8)
    frame[:, :32], frame[:, 32:] = (144, 0, 0), (0, 73, 0)  # equal luma
    control = np.zeros((1, 64, 64, 3), np.uint8)
    control[:, :, 31] = 255
    assert edge_f1(frame[None], control, 100, 200)[2] > 0.9


def test_edge_f1_takes_a_control_edge_in_any_channel():
    control = edges(square(20, 20))
    control[..., 1:] = 0
    assert edge_f1(square(20, 20), control, 100, 200) == (1.0, 1.0, 1.0)


def test_edge_f1_uses_its_thresholds():
    faint = video(np.where(np.mgrid[:64, :64][1] < 32, 0.4, 0.5))
    control = np.zeros_like(faint)
    control[:, :, 31] = 255
    assert edge_f1(faint, control, 100, 200)[2] == 0.0
    assert edge_f1(faint, control, 40, 80)[2] > 0.9


def test_edge_f1_without_edges():
    plain, drawn = video(np.full((32, 32), 0.5)), square(8, 8, side=32)
    assert edge_f1(plain, np.zeros_like(plain), 100, 200) == (1.0, 1.0, 1.0)
    assert edge_f1(plain, edges(drawn), 100, 200) == (0.0, 0.0, 0.0)
    assert edge_f1(drawn, np.zeros_like(drawn), 100, 200) == (0.0, 0.0, 0.0)


def test_edge_f1_refuses_what_is_no_video():
    clip = square(8, 8)
    with pytest.raises(ValueError, match="differ"):
        edge_f1(clip, edges(clip)[:2], 100, 200)
    with pytest.raises(ValueError, match="video must be a uint8"):
        edge_f1(clip.astype(np.float32), edges(clip), 100, 200)
    with pytest.raises(ValueError, match="control must be a uint8"):
        edge_f1(clip, edges(clip)[..., 0], 100, 200)


def test_sharpness_of_a_checkerboard_and_of_a_gradient():
    assert sharpness(video(np.indices((16, 16)).sum(axis=0) % 2)) == pytest.approx(16)  # |Laplacian| is 4 everywhere
    ramp = video(np.mgrid[:16, :16][1] / 255)
    assert sharpness(ramp) == pytest.approx(0, abs=1e-12)


def test_sharpness_weighs_luma():
    green = np.zeros((1, 16, 16, 3), np.uint8)
    green[0, :, :, 1] = 255 * (np.indices((16, 16)).sum(axis=0) % 2)
    assert sharpness(green) == pytest.approx(16 * 0.587**2)


def test_sharpness_falls_with_blur():
    clip = square(20, 20)
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 1.0) for frame in clip])
    assert sharpness(blurred) < 0.5 * sharpness(clip)


@pytest.mark.parametrize("axis", [0, 1])
def test_band_energy_is_that_of_its_stripes(axis):
    assert band_energy(stripes(axis, 64 / 3)) == pytest.approx(0.09**2 / 2, rel=0.02)
    assert band_energy(stripes(axis, 64 / 3, amplitude=0.045)) == pytest.approx(0.045**2 / 2, rel=0.03)  # 8 bits
    assert band_energy(stripes(axis, 64 / 3, gradient=0.3)) == pytest.approx(0.09**2 / 2, rel=0.02)


@pytest.mark.parametrize("axis", [0, 1])
def test_band_energy_of_other_periods_is_small(axis):
    for period in (10.0, 32.0, 64 / 5):
        assert band_energy(stripes(axis, period)) < 0.1 * band_energy(stripes(axis, 64 / 3))
    assert band_energy(stripes(axis, 10.0), period=10.0) == pytest.approx(0.09**2 / 2, rel=0.02)


def test_band_energy_ignores_gradients_and_a_moving_object():
    real = band_energy(stripes(0, 64 / 3))
    assert band_energy(video(0.2 + 0.5 * np.mgrid[:64, :64].sum(axis=0) / 128)) < 1e-3 * real
    assert band_energy(square(22, 30)) < 1e-3 * real
    both = stripes(0, 64 / 3)
    both[:, 22:46, 20:44] = 255
    assert band_energy(both) == pytest.approx(real, rel=0.05)


def test_band_energy_refuses_a_period_that_does_not_fit():
    for period in (2.0, 65.0):
        with pytest.raises(ValueError, match="period"):
            band_energy(stripes(0, 64 / 3), period=period)


def test_diversity_is_the_mean_pairwise_rms():
    assert diversity(torch.tensor([[0.0, 0.0], [3.0, 3.0], [0.0, 0.0]])) == pytest.approx(2.0)
    assert diversity(torch.tensor([[0.0, 0.0], [6.0, 0.0]])) == pytest.approx(math.sqrt(18))
    assert diversity(np.ones((4, 2, 2))) == 0.0
    with pytest.raises(ValueError, match="at least 2"):
        diversity(torch.zeros(1, 5))
