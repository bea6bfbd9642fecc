"""What training minimises: a batch → the losses of its conditions; and the same on held-out rows, with fixed noise."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from common import processes
from lora_utils import without_lora
from models.conditioning import drop_conditions, encode_images, encode_prompts
from models.diffusion import autocast, encode_posterior, min_snr_weight, sample_posterior, training_target
from training.run import Run
from training.tasks import CONDITIONS, LOSS_NAME, LOSS_WEIGHT

QUANTILES = 4  # of the timesteps, in validation


class RowDraws:
    """Random numbers for rows, each row's from (seed, step, its place in the step) alone.

    So a step is the same however its rows are cut into micro-batches and shared among processes, and on every device:
    the numbers are drawn on the CPU.
    """

    def __init__(self, seed: int, global_step: int, places: list[int] | range):
        self.generators = [row_generator(seed, global_step, place) for place in places]

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape)"""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])

    def uniform(self) -> Tensor:
        """(B,) in [0, 1)"""
        return torch.cat([torch.rand(1, generator=generator) for generator in self.generators])

    def integers(self, end: int) -> Tensor:
        """(B,) of 0 .. end - 1"""
        return torch.cat([torch.randint(0, end, (1,), generator=generator) for generator in self.generators])


def row_generator(*numbers: int) -> torch.Generator:
    """A generator seeded by these numbers; each must be there, since trailing zeros would not count."""
    seeds = np.random.SeedSequence([len(numbers), *(number + 1 for number in numbers)])
    word = seeds.generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word >> 1))


def batch_losses(run: Run, batch: dict, draws: RowDraws) -> Iterator[dict[str, Tensor]]:
    """A batch → its losses, "loss/combined" to be differentiated; each dictionary before the next one's forward.

    batch: prompt, and texture (B, 3, H, W) in [-1, 1] or its posterior (B, 2, 4, H/8, W/8); for images image
    (B, 3, S, S) in [-1, 1] or its image_tokens (B, T, D'); text_states (B, L, D) may be given. With the schedule
    "alternate" each condition comes by itself, so that one UNet graph is alive at a time; "paired" puts all of them
    through the UNet at once.
    """
    base, schedule, conditions = run.base, run.schedule, CONDITIONS[run.task]
    if run.lessons:
        conditions = run.lessons.kinds(conditions)
    needs_text = "text" in conditions or schedule.gamma or schedule.both_share
    with autocast(base.device, run.precision):
        mean, std = posterior(run, batch)  # (B, 4, H/8, W/8) each
        posterior_noise = draws.normal(mean.shape[1:]).to(mean)
        latents = sample_posterior(base.vae, mean, std, posterior_noise)  # (B, 4, H/8, W/8)
        text_states = prompt_states(run, batch) if needs_text else None  # (B, L, D)
    forwards = [conditions] if schedule.schedule == "paired" else [(kind,) for kind in conditions]
    for kinds in forwards:
        yield forward_losses(run, batch, draws, kinds, latents, text_states)


def forward_losses(
    run: Run, batch: dict, draws: RowDraws, kinds: tuple[str, ...], latents: Tensor, text_states: Tensor | None
) -> dict[str, Tensor]:
    """The losses of one forward of the UNet, of K kinds of conditions for each row. Arguments as in `batch_losses`."""
    schedule, noise_scheduler = run.schedule, run.base.noise_scheduler
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    null_states = run.null_states  # (1, L, D)
    if null_states is None:  # being trained: a graph for each backward
        with autocast(run.base.device, run.precision):
            null_states = encode_prompts(run.base, [""])

    noise, timesteps, encoder_hidden_states, losses = [], [], [], {}
    scales = []  # of the task "fast"
    rows_of_kinds = []  # of the task "personal"
    partials = []  # of pictures that show a part of the texture
    for kind in kinds:
        noise.append(draws.normal(latents.shape[1:]).to(latents))  # (B, 4, H/8, W/8)
        if run.shortcuts:
            timesteps.append(run.shortcuts.timesteps_of(draws, num_train_timesteps))  # (B,)
            scales.append(torch.full((len(latents),), run.shortcuts.scales[kind], device=latents.device))  # (B,)
        else:
            timesteps.append(draws.integers(num_train_timesteps).to(latents.device))  # (B,)
        states = text_states  # (B, L, D)
        if run.lessons:
            with autocast(run.base.device, run.precision):
                rows_of_kinds.append(run.lessons.rows(kind, text_states, latents, draws))
            states = rows_of_kinds[-1].states
        elif kind != "text":
            with autocast(run.base.device, run.precision):
                states = STATES_OF[kind](run, batch)  # (B, L, D)
            if schedule.gamma:
                losses["loss/align"] = F.mse_loss(states, text_states.detach())
            if schedule.both_share:
                states = blend_rows(text_states.detach(), states, schedule.both_share, draws)
        is_dropped = draws.uniform() < schedule.condition_dropout  # (B,)
        encoder_hidden_states.append(drop_conditions(states, null_states, is_dropped))
        if run.partials:
            partials.append(run.partials.rows(kind, latents, draws))

    noise, timesteps = torch.cat(noise), torch.cat(timesteps)  # (K B, 4, H/8, W/8), (K B,)
    encoder_hidden_states = torch.cat(encoder_hidden_states)  # (K B, L, D)
    teacher = None
    if run.lessons:
        latents = torch.cat([rows.latents for rows in rows_of_kinds])  # (K B, 4, H/8, W/8)
        teacher_states = torch.cat([rows.teacher_states for rows in rows_of_kinds])  # (K B, L, D)
        teacher = teacher_states, torch.cat([rows.share for rows in rows_of_kinds])
    else:
        latents = latents.repeat(len(kinds), 1, 1, 1)  # (K B, 4, H/8, W/8)
    if run.shortcuts:
        with autocast(run.base.device, run.precision):
            latents, noise = run.shortcuts.straightened(
                latents, noise, timesteps, encoder_hidden_states, torch.cat(scales)
            )
    partial = torch.cat(partials) if partials else None  # (K B, 4 + 1, h, w)
    errors = denoising_errors(run, latents, noise, timesteps, encoder_hidden_states, teacher, partial)  # (K B,)
    if min_snr_gamma := run.cfg.training.min_snr_gamma:
        errors = errors * min_snr_weight(noise_scheduler, timesteps, min_snr_gamma)

    has_several = len(CONDITIONS[run.task]) > 1
    combined = schedule.gamma * losses["loss/align"] if "loss/align" in losses else 0.0
    for kind, kind_errors in zip(kinds, errors.chunk(len(kinds))):
        loss = kind_errors.mean()
        losses[f"loss/{LOSS_NAME[kind]}"] = loss
        weight = getattr(schedule, LOSS_WEIGHT[kind]) if has_several else 1.0
        combined = combined + weight * loss
    return {**losses, "loss/combined": combined}


def blend_rows(text_states: Tensor, image_states: Tensor, share: float, draws: RowDraws) -> Tensor:
    """A share of the rows at a random point between text and image, the others of the image alone: (B, L, D)."""
    is_blended = draws.uniform() < share  # (B,)
    image_weight = torch.where(is_blended, draws.uniform(), torch.ones(()))  # (B,)
    return torch.lerp(text_states, image_states, image_weight.to(image_states.device)[:, None, None])


def posterior(run: Run, batch: dict) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each texture's latents, (B, 4, H/8, W/8) each."""
    if "posterior" in batch:
        return batch["posterior"].to(run.base.device).unbind(1)
    return encode_posterior(run.base.vae, batch["texture"].to(run.base.device))


def prompt_states(run: Run, batch: dict) -> Tensor:
    """encoder_hidden_states (B, L, D) of the batch's prompts."""
    if "text_states" in batch:
        return batch["text_states"].to(run.base.device)
    template = run.cfg.model.prompt_template
    return encode_prompts(run.base, [template.format(prompt=prompt) for prompt in batch["prompt"]])


def picture_states(run: Run, batch: dict) -> Tensor:
    """encoder_hidden_states (B, L, D) of the batch's pictures, float32."""
    if "image_tokens" in batch:
        image_tokens = batch["image_tokens"].to(run.base.device).float()
    else:
        image_tokens = encode_images(run.base, batch["image"])
    return run.aligner(image_tokens).float()


STATES_OF = {"text": prompt_states, "image": picture_states}


def denoising_errors(
    run: Run,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    encoder_hidden_states: Tensor,
    teacher: tuple[Tensor, Tensor] | None = None,
    partial: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the UNet's prediction in each row, (B,), texels weighted by `run.texel_weight`; the first
    `training.leading_channels` count for as much as all the others.

    teacher: states (B, L, D) and a share (B, 1, H/8, W/8) of the target that is not the noise's but what the UNet
    predicts for them without its LoRA. partial: (B, 4 + 1, H/8, W/8) of models/partial.py, with channels for it.
    """
    unet, noise_scheduler = run.base.unet, run.base.noise_scheduler
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    if partial is not None:
        noisy_latents = torch.cat([noisy_latents, partial], dim=1)
    noisy_latents = noisy_latents.to(unet.dtype)
    if run.cfg.model.channels_last:
        noisy_latents = noisy_latents.contiguous(memory_format=torch.channels_last)
    encoder_hidden_states = encoder_hidden_states.to(unet.dtype)
    with autocast(run.base.device, run.precision):
        noise_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
    target = training_target(noise_scheduler, latents, noise, timesteps)
    if teacher is not None:
        states, share = teacher
        taught = (share > 0).flatten(1).any(1).nonzero()[:, 0]  # numbers of rows
        with torch.no_grad(), without_lora(unet), autocast(run.base.device, run.precision):
            base_pred = unet(noisy_latents[taught], timesteps[taught], states[taught].to(unet.dtype)).sample
        blended = torch.lerp(target[taught], base_pred.to(target.dtype), share[taught].to(target.dtype))
        target = target.index_copy(0, taught, blended)
    squared_error = (noise_pred.float() - target).square()  # (B, 4, H/8, W/8)
    if leading := run.cfg.training.leading_channels:
        squared_error = (squared_error[:, :leading].mean(1) + squared_error[:, leading:].mean(1)) / 2
    else:
        squared_error = squared_error.mean(1)  # (B, H/8, W/8)
    if run.texel_weight is None:
        return squared_error.mean((1, 2))
    return (squared_error * run.texel_weight).sum((1, 2)) / run.texel_weight.sum()


@torch.no_grad()
def validation_losses(run: Run) -> dict[str, float]:
    """val/t2uv and val/i2uv: the mean error on the held-out rows at the quantiles of the timesteps, with noise that
    depends on the texture alone, so that runs can be compared. Each process takes its share of the rows."""
    base, rows, conditions = run.base, run.validation, CONDITIONS[run.task]
    num_train_timesteps = base.noise_scheduler.config.num_train_timesteps
    totals = torch.zeros(1 + len(conditions), device=base.device)  # of draws; then of each condition's errors
    own_rows = range(processes.rank(), len(rows), processes.world_size())
    for start in range(0, len(own_rows), run.schedule.batch_size):
        numbers = own_rows[start : start + run.schedule.batch_size]
        batch = default_collate([rows[number] for number in numbers])
        draws = RowDraws(0, 0, batch["texture_id"].tolist())
        with autocast(base.device, run.precision):
            mean, std = posterior(run, batch)
            latents = sample_posterior(base.vae, mean, std, torch.zeros_like(mean))
            states = [STATES_OF[kind](run, batch) for kind in conditions]
        for quantile in range(QUANTILES):
            noise = draws.normal(latents.shape[1:]).to(latents)
            timestep = int((quantile + 0.5) / QUANTILES * num_train_timesteps)
            timesteps = torch.full((len(latents),), timestep, device=latents.device)
            totals[0] += len(latents)
            for place, encoder_hidden_states in enumerate(states, 1):
                totals[place] += denoising_errors(run, latents, noise, timesteps, encoder_hidden_states).sum()
    processes.mean_over_processes([totals])
    means = (totals[1:] / totals[0]).tolist()
    return {f"val/{LOSS_NAME[kind]}": mean for kind, mean in zip(conditions, means)}
