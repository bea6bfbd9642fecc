import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from models.diffusion import (
    decode_latents,
    encode_posterior,
    min_snr_weight,
    resolve_precision,
    sample_latents,
    sample_posterior,
    training_target,
)


class PerfectUNet:
    """Predicts exactly what leads to one picture; counts its calls."""

    dtype = torch.float32

    def __init__(self, noise_scheduler, clean, by_context=False):
        self.noise_scheduler, self.clean, self.by_context, self.batches = noise_scheduler, clean, by_context, []

    def __call__(self, noisy, timestep, context):
        self.batches.append(len(noisy))
        clean = self.clean.expand_as(noisy)
        if self.by_context:
            clean = clean * context[:, :1, :1, None]
        alpha = self.noise_scheduler.alphas_cumprod[timestep]
        noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        steps = torch.full((len(noisy),), int(timestep))
        output = training_target(self.noise_scheduler, clean, noise, steps)
        return type("Output", (), {"sample": output})


@pytest.mark.parametrize(
    "prediction_type,zero_snr", [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_sampling_undoes_what_training_does(prediction_type, zero_snr):
    scheduler_class = DDIMScheduler if zero_snr else DDPMScheduler
    noise_scheduler = scheduler_class(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        clip_sample=False,
    )
    clean, context = torch.randn(2, 4, 8, 8), torch.zeros(2, 3, 5)
    unet = PerfectUNet(noise_scheduler, clean)
    latents = sample_latents(unet, noise_scheduler, [(context, 1.0)], context, torch.randn(2, 4, 8, 8), 10)
    assert torch.allclose(latents, clean, atol=2e-2)
    assert unet.batches == [2] * 10, "without guidance the UNet runs once a step on the batch alone"


def test_guidance_extrapolates_from_negative_to_positive():
    noise_scheduler = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False)
    clean = torch.randn(1, 4, 8, 8)
    positive, negative = torch.full((1, 2, 3), 1.0), torch.full((1, 2, 3), 0.25)
    unet = PerfectUNet(noise_scheduler, clean, by_context=True)
    latents = sample_latents(unet, noise_scheduler, [(positive, 3.0)], negative, torch.randn(1, 4, 8, 8), 5)
    assert torch.allclose(latents, clean * (0.25 + 3 * 0.75), atol=1e-3)
    assert unet.batches == [2] * 5


def test_targets():
    noise_scheduler = DDPMScheduler(prediction_type="v_prediction")
    latents, noise, timesteps = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    alpha = noise_scheduler.alphas_cumprod[timesteps].view(3, 1, 1, 1)
    expected = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    assert torch.allclose(training_target(noise_scheduler, latents, noise, timesteps), expected, atol=1e-6)
    epsilon = DDPMScheduler(prediction_type="epsilon")
    assert training_target(epsilon, latents, noise, timesteps) is noise
    with pytest.raises(ValueError, match="sample"):
        training_target(DDPMScheduler(prediction_type="sample"), latents, noise, timesteps)


def test_latents_have_one_scale_and_decode_undoes_it(base):
    pixel_values = torch.rand(2, 3, 16, 16) * 2 - 1
    posterior = base.vae.encode(pixel_values).latent_dist
    mean, std = encode_posterior(base.vae, pixel_values)
    noise = torch.randn(mean.shape)
    latents = sample_posterior(base.vae, mean, std, noise)
    assert latents.shape == (2, 4, 8, 8)
    assert torch.allclose(latents, (posterior.mean + posterior.std * noise) * 0.9, atol=1e-6)
    decoded = decode_latents(base.vae, latents)
    assert decoded.shape == (2, 3, 16, 16) and decoded.abs().max() <= 1
    assert torch.allclose(decoded, base.vae.decode(latents / 0.9).sample.clamp(-1, 1))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights(prediction_type):
    noise_scheduler, timesteps = DDPMScheduler(prediction_type=prediction_type), torch.tensor([5, 300, 900])
    alpha = noise_scheduler.alphas_cumprod[timesteps]
    snr = alpha / (1 - alpha)
    assert snr[0] > 5 > snr[2]
    expected = torch.minimum(snr, torch.tensor(5.0)) / (snr + (prediction_type == "v_prediction"))
    assert torch.allclose(min_snr_weight(noise_scheduler, timesteps, 5.0), expected, rtol=1e-4)


def test_precision():
    cpu = torch.device("cpu")
    assert resolve_precision("no", cpu) is None
    assert resolve_precision("bf16", cpu) is torch.bfloat16
    assert resolve_precision("auto", cpu) in (None, torch.bfloat16)
