"""The same 8x8x8 autoencoder in diffusers' format: `AutoencoderKLCosmos`, its statistics in `config.json`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from cosmos_mp.tokenizers.nvidia import CosmosTokenizer, statistics


class _Encoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net, self.project = model.encoder, model.quant_conv

    def forward(self, video: Tensor) -> Tensor:
        return self.project(self.net(video))


class _Decoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.project, self.net = model.post_quant_conv, model.decoder

    def forward(self, latent: Tensor) -> Tensor:
        return self.net(self.project(latent))


def load(folder: Path) -> CosmosTokenizer:
    """Read a pipeline folder with `vae/` in it, or the vae folder itself. The autoencoder is deterministic: it has no variance.

    Raises:
        FileNotFoundError: no such folder, no config or no weights.
        ValueError: another class, weights that do not fit it, or no statistics of 16 channels and 16 latent frames.
    """
    from diffusers import AutoencoderKLCosmos

    folder = Path(folder)
    vae = folder / "vae" if (folder / "vae").is_dir() else folder
    if not (vae / "config.json").is_file() or not any(vae.glob("diffusion_pytorch_model*.safetensors")):
        raise FileNotFoundError(
            f"{vae}: no config.json with diffusion_pytorch_model*.safetensors; point tokenizer.path at a diffusers folder of an "
            "AutoencoderKLCosmos (or at the pipeline folder above its vae/)"
        )
    name = AutoencoderKLCosmos.load_config(vae, local_files_only=True).get("_class_name")
    if name != "AutoencoderKLCosmos":
        raise ValueError(f"{vae}/config.json: class {name!r}, expected AutoencoderKLCosmos; Cosmos-Transfer1 needs the 8x8x8 autoencoder")
    try:
        model, report = AutoencoderKLCosmos.from_pretrained(
            vae, local_files_only=True, use_safetensors=True, output_loading_info=True, low_cpu_mem_usage=False, torch_dtype=torch.float32
        )
    except Exception as error:
        raise ValueError(f"{vae}: cannot be loaded ({str(error).splitlines()[0]}); fetch the folder again") from error
    complaints = [f"{kind.replace('_', ' ')}: {', '.join(map(str, names))}" for kind, names in report.items() if names]
    if complaints:
        raise ValueError(f"{vae}: weights do not fit AutoencoderKLCosmos ({'; '.join(complaints)}); fetch the folder again")
    config = model.config
    if (config.spatial_compression_ratio, config.temporal_compression_ratio, config.latent_channels) != (8, 8, 16):
        raise ValueError(f"{vae}/config.json: not the 8x8x8 autoencoder with 16 latent channels that Cosmos-Transfer1 was trained on")
    rows = []
    for key in ("latents_mean", "latents_std"):
        if config[key] is None:
            raise ValueError(f"{vae}/config.json: {key} is null; latents cannot be normalised without it, take a config that has it")
        rows.append(statistics(torch.tensor(config[key], dtype=torch.float32), f"{vae}/config.json ({key})"))
    if not (rows[1] > 0).all():
        raise ValueError(f"{vae}/config.json: latents_std must be positive everywhere; fetch the folder again")
    return CosmosTokenizer(_Encoder(model), _Decoder(model), *rows)
