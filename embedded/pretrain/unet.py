"""The UNet (v-prediction, zero terminal SNR: Lin et al. 2024), first on pictures of half the size."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoModel, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from embedded.pretrain.latents import PATCH
from embedded.pretrain.scenes import CAPTIONS, RESOLUTION, load_scenes
from embedded.pretrain.stage import Run, train_stage
from embedded.pretrain.tokenizer import tokenize
from models.diffusion import autocast, encode_posterior, training_target

BATCH = 24  # pictures
SMALL_SHARE = 0.75  # of the steps: pictures of half the size, and twice as many
COLOURS = 3  # of the latents' channels: they count for as much in the loss as all the detail channels together
BLOCKS = dict(
    block_out_channels=(64, 96, 128),
    norm_num_groups=16,
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=128,
    attention_head_dim=4,
)
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ZERO_TERMINAL_SNR = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")


# Latents and states are joined outside autocast, which on a CPU does not join float16.
@torch.no_grad()
def encode_pictures(vae, pictures: np.ndarray, resolution: int, precision) -> torch.Tensor:
    """pictures: (N, 3, H, W) uint8, scaled to `resolution` → latents: (N, C, resolution/8, resolution/8) float16."""
    latents = []
    for start in tqdm(range(0, len(pictures), 50), f"latents of {resolution}"):
        pixel_values = torch.from_numpy(pictures[start : start + 50].copy()).to(vae.device) / 127.5 - 1
        pixel_values = F.interpolate(pixel_values, size=(resolution,) * 2, mode="bilinear", antialias=True)
        with autocast(vae.device, precision):
            mean, _ = encode_posterior(vae, pixel_values)
        latents.append((mean * vae.config.scaling_factor).half().cpu())
    return torch.cat(latents)


@torch.no_grad()
def encode_captions(text_encoder: CLIPTextModel, tokenizer, captions: list[str], precision) -> torch.Tensor:
    """N captions → (N, 77, 128) float16."""
    states = []
    for start in tqdm(range(0, len(captions), 100), "text states"):
        input_ids = tokenize(tokenizer, captions[start : start + 100]).to(text_encoder.device)
        with autocast(text_encoder.device, precision):
            encoded = text_encoder(input_ids)
        states.append(encoded.last_hidden_state.half().cpu())
    return torch.cat(states)


def group_errors(noise_pred: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean square error of each row's colour and of its detail channels. (B, C, H, W) each → (B,) and (B,)."""
    error = (noise_pred - target).square()
    return error[:, :COLOURS].mean((1, 2, 3)), error[:, COLOURS:].mean((1, 2, 3))


@torch.no_grad()
def loss_table(unet, noise_scheduler, latents: torch.Tensor, states: torch.Tensor, run: Run, rows=64) -> dict:
    """The loss of "colour" and of "detail" in each quarter of the timesteps, from little noise to much."""
    table: dict[str, list[float]] = {"colour": [], "detail": []}
    latents, states = latents[:rows].to(run.device).float(), states[:rows].to(run.device).float()
    quarter = noise_scheduler.config.num_train_timesteps // 4
    generator = torch.Generator().manual_seed(0)
    for start in range(0, 4 * quarter, quarter):
        noise = torch.randn(latents.shape, generator=generator).to(run.device)
        timesteps = torch.randint(start, start + quarter, (len(latents),), generator=generator).to(run.device)
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        with autocast(run.device, run.precision):
            noise_pred = unet(noisy_latents, timesteps, states).sample
        errors = group_errors(noise_pred.float(), training_target(noise_scheduler, latents, noise, timesteps))
        for name, error in zip(table, errors):
            table[name].append(round(float(error.mean()), 4))
    return table


def train_unet(run: Run, steps: int) -> dict:
    """Needs out/vae (its encoder), out/tokenizer and out/text_encoder; writes out/unet and out/scheduler."""
    device = run.device
    pictures, labels = load_scenes(run)
    vae = AutoModel.from_pretrained(str(run.out / "vae"), dtype=torch.float32).to(device).eval()
    tokenizer = CLIPTokenizer.from_pretrained(run.out / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(run.out / "text_encoder", dtype=torch.float32).to(device).eval()
    noise_scheduler = DDPMScheduler(**BETAS, **ZERO_TERMINAL_SNR, steps_offset=1, clip_sample=False)
    DDIMScheduler.from_config(noise_scheduler.config, set_alpha_to_one=True).save_pretrained(run.out / "scheduler")
    small_latents = encode_pictures(vae, pictures, RESOLUTION // 2, run.precision).to(device)
    large_latents = encode_pictures(vae, pictures, RESOLUTION, run.precision).to(device)
    captions = [caption for label in labels for caption in label["captions"]]
    states = encode_captions(text_encoder, tokenizer, captions, run.precision).unflatten(0, (-1, CAPTIONS)).to(device)
    empty_state = encode_captions(text_encoder, tokenizer, [""], run.precision)[0].to(device)

    torch.manual_seed(2)
    channels = vae.config.latent_channels
    unet = UNet2DConditionModel(RESOLUTION // PATCH, in_channels=channels, out_channels=channels, **BLOCKS)
    unet.to(device, memory_format=torch.channels_last)
    ema = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)

    batch = BATCH * run.batch_scale

    def loss_fn(step):
        rng = np.random.default_rng([4, step])
        all_latents, count = (small_latents, 2 * batch) if step < SMALL_SHARE * steps else (large_latents, batch)
        count = min(count, len(all_latents))
        rows = torch.from_numpy(rng.choice(len(all_latents), count, replace=False)).to(device)
        latents = all_latents[rows].float()
        encoder_hidden_states = states[rows, torch.from_numpy(rng.integers(0, CAPTIONS, count)).to(device)].float()
        encoder_hidden_states[torch.rand(count) < 0.1] = empty_state.float()
        noise = torch.randn(latents.shape, device=device)
        timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (count,), device=device)
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        noisy_latents = noisy_latents.contiguous(memory_format=torch.channels_last)
        with autocast(device, run.precision):
            noise_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
        target = training_target(noise_scheduler, latents, noise, timesteps)
        colour, detail = group_errors(noise_pred.float(), target)
        return (colour.mean() + detail.mean()) / 2

    summary = train_stage("unet", run.work, {"unet": unet}, loss_fn, steps, lr=8e-4, ema=ema)
    ema.copy_to(unet.parameters())
    summary["loss_of_groups"] = loss_table(unet, noise_scheduler, large_latents, states[:, 0], run)
    unet.half().save_pretrained(run.out / "unet")
    return summary
