import numpy as np
import pytest
import torch

from cosmos_mp.evaluate.features import LatentPCA, NetworkFeatures, RandomConv, TorchScriptFeatures


def latents(samples, channels=4, seed=0, dtype=torch.float32):
    return torch.randn(samples, channels, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("samples", [40, 400])  # by the Gram matrix and by the covariance
def test_pca_is_the_svd_of_the_centred_latents(samples):
    x = latents(samples) + 3.0
    features = LatentPCA.fit(x, dim=8)(x, [])
    flat = x.double().flatten(1).numpy()
    u, s, _ = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    assert features.shape == (samples, 8) and features.dtype == np.float64
    np.testing.assert_allclose(np.abs(features), np.abs(u[:, :8] * s[:8]), atol=1e-8)
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-10)


def test_pca_transforms_new_latents_as_it_was_fitted():
    real, new = latents(60), latents(5, seed=1)
    pca = LatentPCA.fit(real, dim=6)
    np.testing.assert_allclose(pca.axes_PD.T @ pca.axes_PD, np.eye(6), atol=1e-10)
    expected = (new.double().flatten(1).numpy() - real.double().flatten(1).numpy().mean(axis=0)) @ pca.axes_PD
    np.testing.assert_allclose(pca(new, []), expected)
    np.testing.assert_array_equal(LatentPCA.fit(real, dim=6).axes_PD, pca.axes_PD)


def test_pca_fixes_the_sign_of_its_axes():
    axes = LatentPCA.fit(latents(60), dim=6).axes_PD
    assert (axes[np.abs(axes).argmax(axis=0), np.arange(6)] > 0).all()


def test_pca_refuses_more_axes_than_the_data_have():
    with pytest.raises(ValueError, match="span 9 axes, but dim=10"):
        LatentPCA.fit(latents(10), dim=10)
    with pytest.raises(ValueError, match="span 0 axes"):
        LatentPCA.fit(torch.ones(10, 4, 3, 4, 4), dim=1)
    assert LatentPCA.fit(latents(10), dim=9)(latents(10), []).shape == (10, 9)


def test_pca_refuses_another_latent_size():
    with pytest.raises(ValueError, match="192 numbers, got 48"):
        LatentPCA.fit(latents(30), dim=4)(latents(3, channels=1), [])


def test_random_conv_is_a_function_of_its_seed():
    x = latents(20)
    before = torch.get_rng_state()
    features = RandomConv(seed=0, channels=4)(x, [])
    assert torch.equal(before, torch.get_rng_state())
    assert features.shape == (20, 64) and features.dtype == np.float64
    np.testing.assert_array_equal(features, RandomConv(seed=0, channels=4)(x, []))
    assert not np.allclose(features, RandomConv(seed=1, channels=4)(x, []))


def test_random_conv_samples_do_not_see_each_other():
    x = latents(20)  # more than one batch
    extract = RandomConv(seed=0, channels=4)
    np.testing.assert_allclose(extract(x, [])[17:], extract(x[17:], []), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(extract(x.double(), []), extract(x, []), rtol=1e-4, atol=1e-5)


def test_random_conv_is_not_linear_and_sees_texture():
    extract = RandomConv(seed=0, channels=4)
    x = latents(2)
    assert not np.allclose(extract(-x, [])[:, :32], -extract(x, [])[:, :32], rtol=0.1)  # means: leaky ReLU
    smooth = x.mean(dim=(2, 3, 4), keepdim=True).expand_as(x)
    assert extract(smooth, [])[:, 32:].mean() < 0.5 * extract(x, [])[:, 32:].mean()  # standard deviations


def test_random_conv_keeps_the_input_at_scale():
    features = RandomConv(seed=0, channels=16)(latents(8, channels=16), [])
    assert 0.35 < features[:, 32:].mean() < 1.0  # below one by the zeros around the latent


def test_random_conv_refuses_other_channels():
    with pytest.raises(ValueError, match="channels"):
        RandomConv(channels=16)(latents(2), [])


def test_network_features():
    extract = NetworkFeatures(lambda x: x.mean(dim=(2, 3, 4)))
    x = latents(3, dtype=torch.bfloat16).requires_grad_()
    features = extract(x, [])
    assert extract.name == "teacher" and features.dtype == np.float64 and features.shape == (3, 4)
    for wrong in (lambda x: x, lambda x: x.mean(dim=(2, 3, 4))[:1], lambda x: None):
        with pytest.raises(ValueError, match=r"tensor \(3, D\)"):
            NetworkFeatures(wrong)(x, [])


class Means(torch.nn.Module):
    def forward(self, video):
        return video.mean(dim=(2, 3, 4))


class Unpooled(torch.nn.Module):
    def forward(self, video):
        return video.mean(dim=2)


def script(module, path):
    torch.jit.save(torch.jit.script(module), str(path))
    return path


def test_torchscript_gets_videos_from_minus_one_to_one(tmp_path):
    extract = TorchScriptFeatures(script(Means(), tmp_path / "means.pt"))
    videos = np.zeros((20, 3, 8, 8, 3), np.uint8)
    videos[3, ..., 1] = 255
    features = extract(latents(20), videos)
    assert extract.name == "means" and features.shape == (20, 3)
    np.testing.assert_allclose(features[3], [-1, 1, -1])
    np.testing.assert_array_equal(features, extract(latents(20), list(videos)))


def test_torchscript_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        TorchScriptFeatures(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("not a network")
    with pytest.raises(ValueError, match="text.pt is not TorchScript"):
        TorchScriptFeatures(tmp_path / "text.pt")
    with pytest.raises(ValueError, match=r"unpooled.pt must return a tensor \(2, D\), got \(2, 3, 8, 8\)"):
        TorchScriptFeatures(script(Unpooled(), tmp_path / "unpooled.pt"))(latents(2), np.zeros((2, 3, 8, 8, 3), np.uint8))


def test_torchscript_refuses_mixed_videos(tmp_path):
    extract = TorchScriptFeatures(script(Means(), tmp_path / "means.pt"))
    for videos in ([np.zeros((3, 8, 8, 3), np.uint8), np.zeros((3, 8, 9, 3), np.uint8)], np.zeros((2, 3, 8, 8, 3), np.float32), []):
        with pytest.raises(ValueError, match="uint8 videos"):
            extract(latents(2), videos)
