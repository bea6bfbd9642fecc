import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderTiny, AutoModel, DDIMScheduler, DDPMScheduler

from common.errors import UserError
from models.base import load_base
from models.diffusion import (
    blended,
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
        alpha = self.noise_scheduler.alphas_cumprod[int(timestep)]
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


def test_a_blends_middle_is_the_middle_however_hard_each_side_pulls():
    text, picture = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)

    def along(pull, direction):
        return (pull * direction).sum((1, 2, 3)) / direction.flatten(1).norm(dim=1)

    middle = blended([text, 0.1 * picture], (0.5, 0.5))
    assert torch.allclose(along(middle, text), along(middle, picture), rtol=1e-4)
    assert (along(middle, text) > 0).all() and (along(text + 0.1 * picture, picture) < along(middle, picture)).all()
    leaning = [along(blended([text, 0.1 * picture], (1 - share, share)), picture) for share in (0.2, 0.5, 0.8)]
    directions = [value / blended([text, 0.1 * picture], (1 - share, share)).flatten(1).norm(dim=1)
                  for value, share in zip(leaning, (0.2, 0.5, 0.8))]  # fmt: skip
    assert (directions[0] < directions[1]).all() and (directions[1] < directions[2]).all()
    assert torch.allclose(blended([text, text], (0.3, 0.7)), text, atol=1e-6), "two that agree are as one"
    assert torch.allclose(blended([text, picture], (1.0, 0.0)), text, atol=1e-6), "continuous up to its ends"
    assert torch.equal(blended([text * 0, picture * 0], (0.5, 0.5)), text * 0)


def test_a_blend_takes_one_more_row_of_the_unet_a_step():
    noise_scheduler = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False)
    unet = PerfectUNet(noise_scheduler, torch.randn(1, 4, 8, 8), by_context=True)
    states = [torch.full((2, 2, 3), value) for value in (1.0, -0.5, 0.25)]
    arguments = [(states[0], 3.0), (states[1], 1.0)], states[2], torch.randn(2, 4, 8, 8), 5
    latents = sample_latents(unet, noise_scheduler, *arguments, shares=(0.5, 0.5))
    assert unet.batches == [6] * 5 and latents.isfinite().all()
    summed = sample_latents(unet, noise_scheduler, *arguments)
    assert (summed - latents).abs().max() > 0.1


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


@pytest.fixture(params=["tiny", "dc"])
def sure_autoencoder(request, tmp_path):
    """Another autoencoder for the stand-in's latents, 4 channels at half the size, of a class without a deviation."""
    torch.manual_seed(1)
    if request.param == "tiny":
        sizes = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8))
        blocks = dict(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
        vae = AutoencoderTiny(latent_channels=4, scaling_factor=0.7, **sizes, **blocks)
    else:
        layers = dict(encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1))
        sizes = dict(encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16))
        kinds = dict(encoder_block_types="ResBlock", decoder_block_types="ResBlock")
        scales = dict(encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()))
        vae = AutoencoderDC(latent_channels=4, scaling_factor=0.7, **layers, **sizes, **kinds, **scales)
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_other_autoencoders_stand_in(tiny_base, sure_autoencoder):
    base = load_base(str(tiny_base), vae=str(sure_autoencoder))
    plain = AutoModel.from_pretrained(str(sure_autoencoder))
    pixel_values = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = encode_posterior(base.vae, pixel_values)
    assert base.vae_scale == 2 and mean.shape == (2, 4, 8, 8) and not std.any()
    with torch.no_grad():
        assert torch.allclose(mean, plain.encode(pixel_values)[0], atol=1e-6)
        expected = plain.decode(mean).sample.clamp(-1, 1)
    latents = sample_posterior(base.vae, mean, std, torch.randn_like(mean))
    assert torch.allclose(latents, 0.7 * mean)
    assert torch.allclose(decode_latents(base.vae, latents), expected, atol=1e-5)


def test_an_autoencoder_for_other_latents_is_refused(tiny_base, tmp_path):
    blocks = dict(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    sizes = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8))
    AutoencoderTiny(latent_channels=16, **sizes, **blocks).save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="16 latent channels for a UNet of 4"):
        load_base(str(tiny_base), vae=str(tmp_path / "vae"))
    with pytest.raises(UserError, match=r"model\.vae"):
        load_base(str(tiny_base), vae=str(tiny_base / "unet"))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["dpmsolver++", "euler_a", "ddim", "unipc"])
def test_each_step_tells_where_it_leads(prediction_type, sampler):
    """To the picture from the first step on, whatever scale of noise the sampler has."""
    noise_scheduler = DDPMScheduler(prediction_type=prediction_type)
    clean, noise, context = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.zeros(2, 3, 5)
    unet, led_to = PerfectUNet(noise_scheduler, clean), []
    guided = [(context, 1.0)]
    sample_latents(unet, noise_scheduler, guided, context, noise, 5, sampler, seeds=[0, 1], on_clean=led_to.append)
    assert len(led_to) == 5
    for latents in led_to:
        torch.testing.assert_close(latents, clean, rtol=0, atol=2e-2)
