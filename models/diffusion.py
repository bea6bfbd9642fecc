"""Latents and diffusion maths: the one place that knows pixel ranges, latent scaling and the noise schedule.

Pixels are in [-1, 1] everywhere in the project; only PNG files and renders are in [0, 1].
"""

import inspect
from collections.abc import Callable

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.training_utils import compute_snr
from torch import Tensor

SAMPLERS = {
    "dpmsolver++": DPMSolverMultistepScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "unipc": UniPCMultistepScheduler,
}


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (elsewhere bf16 is emulated and slower than fp32)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_precision(mixed_precision: str, device: torch.device) -> torch.dtype | None:
    """Autocast dtype for "no", "bf16", "fp16" or "auto" (bf16 where the hardware has it); None means none."""
    if mixed_precision == "auto":
        has_bf16 = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else device.type == "cpu" and cpu_has_bf16()
        )
        return torch.bfloat16 if has_bf16 else (torch.float16 if device.type == "cuda" else None)
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]


def frozen_dtype(precision: torch.dtype | None, device: torch.device) -> torch.dtype:
    """Dtype of the frozen weights: cast down on CUDA alone, where it saves memory and time."""
    return precision if precision and device.type == "cuda" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype | None):
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


@torch.no_grad()
def encode_posterior(vae, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """pixel_values: (B, 3, H, W) in [-1, 1] → mean and deviation of the posterior: (B, 4, H/8, W/8), float32."""
    encoded = vae.encode(pixel_values.to(vae.dtype))
    if not hasattr(
        encoded, "latent_dist"
    ):  # an autoencoder that is sure of its latents: AutoencoderTiny, AutoencoderDC
        latents = encoded[0].float()
        return latents, torch.zeros_like(latents)
    posterior = encoded.latent_dist
    return posterior.mean.float(), posterior.std.float()


def sample_posterior(vae, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """latents of unit scale from a posterior and unit noise of its shape."""
    return (mean + std * noise) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae, latents: Tensor) -> Tensor:
    """latents: (B, 4, h, w) → pixel_values: (B, 3, 8h, 8w) in [-1, 1], float32."""
    return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample.float().clamp(-1, 1)


def training_target(noise_scheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet is to predict, by the base's own scheduler config; the shape of latents.

    epsilon: the noise (Ho et al. 2020). v_prediction: sqrt(ā)·noise - sqrt(1-ā)·latents (Salimans & Ho 2022).
    """
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(f"unknown prediction type {prediction_type!r}")


def min_snr_weight(noise_scheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """(B,) weights min(SNR, gamma) / SNR for epsilon, over SNR + 1 for v-prediction (Hang et al. 2023, eq. 6)."""
    snr = compute_snr(noise_scheduler, timesteps)
    if noise_scheduler.config.prediction_type == "epsilon":
        return snr.clamp(max=gamma) / snr
    return snr.clamp(max=gamma) / (snr + 1)


def inference_scheduler(noise_scheduler, sampler: str = "auto"):
    """A sampler of SAMPLERS on the base's schedule. "auto" is DPM-Solver++ 2M (Lu et al. 2022), and DDIM where the
    schedule ends in pure noise.

    At zero terminal SNR the first step starts at log-SNR minus infinity, where a multistep solver has no slope.
    Timesteps are spaced from the last one downwards ("trailing", Lin et al. 2024).
    """
    if sampler == "auto":
        sampler = "ddim" if noise_scheduler.config.get("rescale_betas_zero_snr") else "dpmsolver++"
    options = dict(timestep_spacing="trailing", clip_sample=False, thresholding=False)
    if sampler == "pndm":
        options["skip_prk_steps"] = True
    return SAMPLERS[sampler].from_config(noise_scheduler.config, **options)


@torch.no_grad()
def sample_latents(
    unet,
    noise_scheduler,
    conditions: list[tuple[Tensor, float]],
    negative_hidden_states: Tensor,
    noise: Tensor,
    num_inference_steps: int,
    sampler: str = "auto",
    eta: float = 0.0,
    seeds: list[int] | None = None,
    init_latents: Tensor | None = None,
    strength: float = 1.0,
    mask: Tensor | None = None,
    on_step: Callable[[], None] = lambda: None,
    shares: tuple[float, ...] | None = None,
    on_clean: Callable[[Tensor], None] | None = None,
    partial: Tensor | None = None,
) -> Tensor:
    """Denoises with classifier-free guidance from one condition or several (Ho & Salimans 2022; composed as in Liu et
    al. 2022): negative + sum of the pulls scale · (condition - negative), all in one UNet batch.

    conditions: encoder_hidden_states (B, L, D) and guidance scale of each; negative_hidden_states: (B, L, D); noise:
    (B, 4, h, w) of unit scale → latents (B, 4, h, w). A single scale of 1 runs the UNet once a step. shares: of several
    conditions, which add up to 1, for `blended` instead of the sum; None: the sum. eta: DDIM's share of fresh
    noise; seeds: of the noise that DDIM with eta and Euler ancestral add, one a row. init_latents: (B, 4, h, w) to
    start from, of which `strength` in (0, 1] is made anew (SDEdit, Meng et al. 2022). mask: (h, w) or (B, 1, h, w)
    in [0, 1], 1 where they are made anew; elsewhere each step starts from init_latents with its noise (Lugmayr et
    al. 2022). on_clean: told after each step where it leads, (B, 4, h, w) of `predicted_clean`. partial:
    (B, 4 + 1, h, w) of models/partial.py, for a UNet that has channels for it.
    """
    scheduler = inference_scheduler(noise_scheduler, sampler)
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    timesteps = scheduler.timesteps
    latents = noise * scheduler.init_noise_sigma
    if init_latents is not None and strength < 1:
        first_step = len(timesteps) - max(1, round(strength * len(timesteps)))
        timesteps = timesteps[first_step:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first_step)
        latents = scheduler.add_noise(init_latents, noise, timesteps[:1].expand(len(noise)))
    step_options: dict[str, object] = {}
    accepted = inspect.signature(scheduler.step).parameters
    if "eta" in accepted:
        step_options["eta"] = eta
    if "generator" in accepted and seeds is not None:
        step_options["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    scales = [scale for _, scale in conditions]
    guided = scales != [1]
    states = [states for states, _ in conditions]
    context = torch.cat([negative_hidden_states, *states] if guided else states)
    for timestep in timesteps:
        if mask is not None:
            noisy_start = scheduler.add_noise(init_latents, noise, timestep[None].expand(len(noise)))
            latents = mask * latents + (1 - mask) * noisy_start
        noisy_latents = scheduler.scale_model_input(latents, timestep)
        model_input = noisy_latents if partial is None else torch.cat([noisy_latents, partial], dim=1)
        model_input = model_input.repeat(len(context) // len(latents), 1, 1, 1)
        noise_pred = unet(model_input.to(unet.dtype), timestep, context.to(unet.dtype)).sample.float()
        if guided:
            negative, *positives = noise_pred.split(len(latents))
            pulls = [scale * (positive - negative) for scale, positive in zip(scales, positives)]
            noise_pred = negative + (sum(pulls) if shares is None else blended(pulls, shares))
        latents = scheduler.step(noise_pred, timestep, latents, **step_options).prev_sample
        on_step()
        if on_clean is not None:
            on_clean(predicted_clean(noise_scheduler, noisy_latents, noise_pred, timestep))
    return latents if mask is None else mask * latents + (1 - mask) * init_latents


def predicted_clean(noise_scheduler, noisy_latents: Tensor, noise_pred: Tensor, timestep: Tensor) -> Tensor:
    """The latents without noise that a prediction stands for: `training_target` solved for latents.

    noisy_latents: as the UNet was given them, of unit variance, whatever the sampler. At zero terminal SNR an epsilon
    tells nothing of the latents: zeros there.
    """
    signal = noise_scheduler.alphas_cumprod[int(timestep)].sqrt().item()
    noise_level = (1 - signal**2) ** 0.5
    if noise_scheduler.config.prediction_type == "v_prediction":
        return signal * noisy_latents - noise_level * noise_pred
    return (noisy_latents - noise_level * noise_pred) / signal if signal else torch.zeros_like(noisy_latents)


def blended(pulls: list[Tensor], shares: tuple[float, ...]) -> Tensor:
    """The mean of pulls (B, C, h, w) weighted by their shares, each first brought to the weighted mean of the lengths.

    Without this the surer condition wins: once a texture leans its way, the other's pull fades, and at equal shares of
    prompt and picture the prompt had its way in 89 % of what they disagree on (docs/log.md).
    """
    lengths = [torch.linalg.vector_norm(pull, dim=(1, 2, 3), keepdim=True) for pull in pulls]
    common_length = sum(share * length for share, length in zip(shares, lengths))
    units = (pull / length.clamp(min=1e-12) for pull, length in zip(pulls, lengths))
    return common_length * sum(share * unit for share, unit in zip(shares, units))
