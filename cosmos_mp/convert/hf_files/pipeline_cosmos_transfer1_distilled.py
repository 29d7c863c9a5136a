"""One-call pipeline of a distilled Cosmos-Transfer1 student. Load with `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`."""

import types

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCosmos, CosmosTransformer3DModel, DiffusionPipeline, EDMEulerScheduler
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers import transformer_cosmos
from diffusers.pipelines.cosmos.pipeline_output import CosmosPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor

QK_NORM_EPS = 1e-6
PIXELS_PER_LATENT = 8


def _nearest(image: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
    return F.interpolate(image, size=tuple(size), mode=interpolation)


if not hasattr(transformer_cosmos, "transforms"):
    # diffusers resizes the padding mask with torchvision and with nothing else of it; where torchvision is not installed, torch does it.
    transformer_cosmos.transforms = types.SimpleNamespace(
        functional=types.SimpleNamespace(resize=_nearest), InterpolationMode=types.SimpleNamespace(NEAREST="nearest")
    )


class CosmosTransfer1DistilledPipeline(DiffusionPipeline):
    """From noise, text and a control video to a clip in one network call, without guidance.

    Args:
        transformer: the base network.
        controlnet: the control branch, `CosmosTransfer1ControlNetModel`.
        scheduler: EDM preconditioning, with `final_sigmas_type="zero"`.
        vae: the tokenizer between video and latent; without it the pipeline takes and returns latents.
        is_distilled: always true.
        distilled_sigmas: the noise levels of the calls, one here.
    """

    model_cpu_offload_seq = "controlnet->transformer->vae"
    _optional_components = ["vae"]

    def __init__(
        self,
        transformer: CosmosTransformer3DModel,
        controlnet: ModelMixin,
        scheduler: EDMEulerScheduler,
        vae: AutoencoderKLCosmos | None = None,
        is_distilled: bool = True,
        distilled_sigmas: list[float] = (80.0,),
    ) -> None:
        super().__init__()
        if not is_distilled or len(distilled_sigmas) != 1:
            raise ValueError(f"this pipeline runs distilled one-call students, got {is_distilled=}, {distilled_sigmas=}")
        self.register_modules(transformer=transformer, controlnet=controlnet, scheduler=scheduler, vae=vae)
        self.register_to_config(is_distilled=is_distilled, distilled_sigmas=list(distilled_sigmas))
        self.video_processor = VideoProcessor(vae_scale_factor=PIXELS_PER_LATENT)
        for block in transformer.transformer_blocks:
            for attention in (block.attn1, block.attn2):
                # The network was trained with this value; diffusers' layers say 1e-5 and have no option for it.
                attention.norm_q.eps = attention.norm_k.eps = QK_NORM_EPS

    @torch.no_grad()
    def __call__(
        self,
        prompt_embeds: torch.Tensor,
        fps: float,
        control_latents: torch.Tensor | None = None,
        control_video: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        controlnet_conditioning_scale: float = 1.0,
        output_type: str | None = None,
        return_dict: bool = True,
    ) -> CosmosPipelineOutput | tuple:
        """Make clips.

        Args:
            prompt_embeds: caption embedding (B, L, text_embed_dim), zero-padded to the length that the student was trained with.
            fps: frames per second of the clips.
            control_latents: latent of the control video (B, C, T, H, W), normalised: (encoded - mean) / std * sigma_data.
            control_video: in its place the control video itself (B, 3, frames, height, width) in [-1, 1]; needs the vae.
            padding_mask: (1, 1, 8H, 8W) in pixels, 1 on padding, shared by the batch; None = no padding.
            noise: unit noise (B, C, T, H, W); None = drawn from `generator`.
            generator: source of the noise.
            controlnet_conditioning_scale: strength of the control.
            output_type: "latent", or "np", "pt", "pil" with a vae; None = "np" with a vae, else "latent".

        Raises:
            ValueError: inputs that are missing or exclude each other, or shapes that do not fit; the message names them.
        """
        output_type = output_type or ("latent" if self.vae is None else "np")
        if (control_latents is None) == (control_video is None):
            raise ValueError("give control_latents or control_video, one of them")
        if self.vae is None and (control_video is not None or output_type != "latent"):
            raise ValueError("control_video and output_type other than 'latent' need a vae: from_pretrained(..., vae=...)")
        device, dtype = self._execution_device, self.transformer.dtype
        control = self.encode(control_video) if control_latents is None else control_latents.to(device)
        batch, channels, frames, height, width = control.shape
        if len(prompt_embeds) != batch:
            raise ValueError(f"{len(prompt_embeds)} prompts for {batch} control videos")
        if channels != self.transformer.config.out_channels:
            raise ValueError(f"the control latent has {channels} channels, expected {self.transformer.config.out_channels}")
        if padding_mask is None:
            padding_mask = control.new_zeros(1, 1, PIXELS_PER_LATENT * height, PIXELS_PER_LATENT * width)
        elif padding_mask.dim() != 4 or padding_mask.shape[:2] != (1, 1):
            raise ValueError(f"padding_mask is {tuple(padding_mask.shape)}, expected (1, 1, height, width): one mask for the batch")
        if noise is None:
            noise = randn_tensor(control.shape, generator=generator, device=device, dtype=torch.float32)
        elif noise.shape != control.shape:
            raise ValueError(f"noise is {tuple(noise.shape)}, the control latent {tuple(control.shape)}: they must agree")

        self.scheduler.set_timesteps(1, device=device)
        timestep, sigma = self.scheduler.timesteps[0], self.config.distilled_sigmas[0]
        if abs(self.scheduler.sigmas[0].item() - sigma) > 1e-4 * sigma:
            raise ValueError(f"the scheduler starts at sigma {self.scheduler.sigmas[0].item():g}, this student was made for {sigma:g}")
        # Starts at exactly sigma * noise; the scheduler's init_noise_sigma is another number.
        sample = noise.to(device=device, dtype=torch.float32) * sigma
        latents = self.scheduler.scale_model_input(sample, timestep).to(dtype)
        shared = {
            "timestep": timestep.expand(batch),
            "encoder_hidden_states": prompt_embeds.to(device=device, dtype=dtype),
            "condition_mask": latents.new_zeros(batch, 1, frames, height, width),
            "padding_mask": padding_mask.to(device=device, dtype=dtype),
            "fps": fps,
        }
        residuals = self.controlnet(
            controls_latents=control.to(dtype), latents=latents, conditioning_scale=controlnet_conditioning_scale, **shared
        ).control_block_samples
        # The base asks for an entry per block.
        residuals = residuals + [None] * (len(self.transformer.transformer_blocks) - len(residuals))
        output = self.transformer(hidden_states=latents, block_controlnet_hidden_states=residuals, **shared).sample
        # pred_original_sample is x0 itself; prev_sample reaches it through a cancellation.
        latents = self.scheduler.step(output.float(), timestep, sample).pred_original_sample

        frames = latents if output_type == "latent" else self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return CosmosPipelineOutput(frames=frames) if return_dict else (frames,)

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Video (B, 3, frames, height, width) in [-1, 1] -> normalised latent (B, C, T, H, W)."""
        latents = self.vae.encode(video.to(device=self._execution_device, dtype=self.vae.dtype)).latent_dist.mode().float()
        mean, std = self._latent_statistics(latents)
        return (latents - mean) / std * self.scheduler.config.sigma_data

    def decode(self, latents: torch.Tensor, output_type: str) -> object:
        """Normalised latent -> video, as `output_type` says."""
        mean, std = self._latent_statistics(latents)
        video = self.vae.decode((latents / self.scheduler.config.sigma_data * std + mean).to(self.vae.dtype)).sample
        return self.video_processor.postprocess_video(video.float(), output_type=output_type)

    def _latent_statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation per channel and latent frame, (1, C, T, 1, 1)."""
        values = []
        for numbers, neutral in ((self.vae.config.latents_mean, 0.0), (self.vae.config.latents_std, 1.0)):
            if numbers is None:
                values.append(latents.new_full((1, 1, 1, 1, 1), neutral))
                continue
            table = torch.tensor(numbers, dtype=latents.dtype, device=latents.device).view(1, latents.shape[1], -1, 1, 1)
            if table.shape[2] < latents.shape[2]:
                raise ValueError(f"the vae knows latent statistics of {table.shape[2]} frames, the clip has {latents.shape[2]}")
            values.append(table[:, :, : latents.shape[2]])
        return values[0], values[1]
