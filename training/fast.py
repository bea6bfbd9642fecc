"""What the task "fast" trains on: a teacher's way through a few windows of the timesteps, made straight.

The teacher is the checkpoint with classifier-free guidance, in small steps. From the noise of a window's start it goes
to the window's end; the pair of clean latents and noise that leads from the one to the other in a single DDIM step is
what the student learns to predict everywhere in that window (piecewise rectified flow, Yan et al. 2024, in the
coordinates of DDIM). So as many steps as there are windows, or a multiple of it, end where the teacher ends, without
guidance.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config.configuration import Config, LoRA
from lora_utils import add_lora, bake_lora, without_lora
from models.base import BaseModel
from models.checkpoints import ALIGNER_FILE, load_aligner
from models.conditioning import encode_prompts
from models.diffusion import inference_scheduler
from models.lora_files import image_encoder_lora_file, load_image_encoder_lora, load_lora
from models.settings import GenerationSettings

AT_THE_START = 0.7  # share of the rows trained at their window's start, where sampling with few steps is


def add_fast(cfg: Config, base: BaseModel) -> tuple[torch.nn.Module, list[dict]]:
    """Makes the checkpoint's LoRA one with the base and adds the fast one → the frozen aligner, and the optimiser's
    groups."""
    folder, settings = Path(cfg.fast.checkpoint), cfg.fast
    load_lora(base, folder)
    aligner = load_aligner(folder / ALIGNER_FILE, cfg.model.aligner, base)
    if lora_of_encoder := image_encoder_lora_file(folder):
        load_image_encoder_lora(base, lora_of_encoder)
    bake_lora(base)
    lora = LoRA(r=settings.r, alpha=settings.alpha, target_modules=cfg.model.lora.target_modules)
    return aligner, [{"params": add_lora(base.unet, lora)}]


@dataclass
class Shortcuts:
    """The teacher and its windows.

    timesteps: (windows · substeps,) descending, as inference spaces them; scales: guidance of each kind of condition.
    """

    base: BaseModel
    timesteps: Tensor
    substeps: int
    alphas_cumprod: Tensor  # of each timestep; the last is that of the end, which no timestep has
    negative_states: Tensor  # (1, L, D)
    scales: dict[str, float]

    @classmethod
    def of(cls, cfg: Config, base: BaseModel) -> "Shortcuts":
        windows, substeps = cfg.fast.windows, cfg.fast.teacher_steps
        scheduler = inference_scheduler(base.noise_scheduler, "ddim")
        scheduler.set_timesteps(windows * substeps)
        end = torch.as_tensor(scheduler.final_alpha_cumprod).reshape(1)
        alphas_cumprod = torch.cat([base.noise_scheduler.alphas_cumprod.cpu(), end.cpu()]).to(base.device)
        settings = GenerationSettings.of(cfg.inference)
        scales = {"text": settings.text_guidance, "image": settings.image_guidance}
        negative_states = encode_prompts(base, [settings.negative_prompt])
        return cls(base, scheduler.timesteps.to(base.device), substeps, alphas_cumprod, negative_states, scales)

    def windows_of(self, timesteps: Tensor) -> Tensor:
        """(B,) → the number of each one's window, 0 the noisiest."""
        starts = self.timesteps[:: self.substeps]
        return (timesteps[:, None] <= starts).sum(1) - 1

    def timesteps_of(self, kind_draws, num_train_timesteps: int) -> Tensor:
        """(B,) of any timestep, or of a window's start. kind_draws: `objective.RowDraws`."""
        timesteps = kind_draws.integers(num_train_timesteps).to(self.timesteps.device)
        starts = self.timesteps[:: self.substeps][self.windows_of(timesteps)]
        is_start = (kind_draws.uniform() < AT_THE_START).to(starts.device)
        return torch.where(is_start, starts, timesteps)

    @torch.no_grad()
    def straightened(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, states: Tensor, scales: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise, (B, 4, h, w) each, between which the window of each timestep is straight.

        latents, noise: (B, 4, h, w), of which the window's start is mixed; states: (B, L, D); scales: (B,) of guidance.
        """
        windows = self.windows_of(timesteps)
        grid = torch.cat([self.timesteps, self.timesteps.new_tensor([-1])])  # -1: the end, in alphas_cumprod too
        first = windows * self.substeps
        start = end = self._mixed(latents, noise, grid[first])
        earlier = None  # clean latents, noise and timesteps of the step before
        for substep in range(self.substeps):
            here, there = grid[first + substep], grid[first + substep + 1]
            clean, remaining = self._predicted(end, here, states, scales)
            end = self._stepped(end, (clean, remaining, here), there, earlier)
            earlier = clean, remaining, here
        (alpha, sigma), (alpha_end, sigma_end) = self._rates(grid[first]), self._rates(grid[first + self.substeps])
        determinant = alpha * sigma_end - sigma * alpha_end
        clean = (sigma_end * start - sigma * end) / determinant
        return clean, (alpha * end - alpha_end * start) / determinant

    def _rates(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of clean latents and of noise, (B, 1, 1, 1) each."""
        alphas_cumprod = self.alphas_cumprod[timesteps][:, None, None, None]
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def _stepped(self, noisy_latents: Tensor, now: tuple, there: Tensor, earlier: tuple | None) -> Tensor:
        """The noisy latents at the timesteps `there`: a step of DDIM, and from the second on of second order.

        now, earlier: clean latents, noise and timesteps. Clean latents and noise change along the way, which DDIM takes
        for constant; they are taken on to the middle of the step, by the angle whose cosine and sine mix them
        (Adams-Bashforth). 3 such steps a window come nearer to the way itself than 5 of DDIM do (docs/log.md).
        """
        clean, remaining, here = now
        if earlier is not None:
            earlier_clean, earlier_remaining, before = earlier
            ahead = (self._angles(here) - self._angles(there)) / (self._angles(before) - self._angles(here)) / 2
            clean = torch.lerp(earlier_clean, clean, 1 + ahead)
            remaining = torch.lerp(earlier_remaining, remaining, 1 + ahead)
        (alpha, sigma), (alpha_there, sigma_there) = self._rates(here), self._rates(there)
        return noisy_latents + (alpha_there - alpha) * clean + (sigma_there - sigma) * remaining

    def _angles(self, timesteps: Tensor) -> Tensor:
        """Of clean latents and noise on a quarter circle, (B, 1, 1, 1)."""
        alpha, sigma = self._rates(timesteps)
        return torch.atan2(sigma, alpha)

    def _mixed(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = self._rates(timesteps)
        return alpha * latents + sigma * noise

    def _predicted(self, noisy_latents: Tensor, timesteps: Tensor, states: Tensor, scales: Tensor):
        """The teacher's clean latents and noise, guided."""
        unet = self.base.unet
        context = torch.cat([self.negative_states.expand_as(states), states]).to(unet.dtype)
        doubled = noisy_latents.repeat(2, 1, 1, 1).to(unet.dtype)
        with without_lora(unet):
            negative, positive = unet(doubled, timesteps.repeat(2), context).sample.float().chunk(2)
        prediction = negative + scales[:, None, None, None] * (positive - negative)
        alpha, sigma = self._rates(timesteps)
        if self.base.noise_scheduler.config.prediction_type == "v_prediction":
            return alpha * noisy_latents - sigma * prediction, sigma * noisy_latents + alpha * prediction
        return (noisy_latents - sigma * prediction) / alpha, prediction
