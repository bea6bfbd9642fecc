"""The one training loop. A task is a list of conditions; everything else is the same for all three.

A batch flows: texture → latents → noisy_latents → noise_pred → a loss for each condition → one optimiser step.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers.optimization import get_scheduler
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from atlas_dataset.building import build_dataset
from atlas_dataset.dataset import ATLASLarge, ProceduralTextures, fingerprint
from base_model import BaseModel, load_base, pick_device
from checkpoints import TrainedModel, save_checkpoint
from conditioning import drop_conditions, encode_images, encode_prompts, make_aligner
from configuration import Config, Schedule, dump_config
from diffusion import (
    autocast,
    encode_posterior,
    frozen_dtype,
    resolve_precision,
    sample_posterior,
    training_target,
)
from errors import UserError
from files import check_writable
from generation import condition, generate
from images import image_from_pixels
from lora_utils import add_lora
from render.bodies import Body
from render.utils import load_body, orbit_cameras, render_views

CONDITIONS = {"t2uv": ("text",), "i2uv": ("image",), "joint": ("text", "image")}
POSTERIORS_KEPT = 1024  # in memory; 0.3 MB each at 512 pixels
LOSS_NAME = {"text": "loss/t2uv", "image": "loss/i2uv"}


def train(cfg: Config, task: str, dry_run: bool = False) -> Path | None:
    """Trains LoRA and aligner on one task and returns the last checkpoint (None after a dry run).

    task: "t2uv", "i2uv" or "joint". Raises UserError for what the configuration or its files have wrong.
    """
    schedule = getattr(cfg.training, task)
    device = pick_device(cfg.training.device)
    precision = resolve_precision(cfg.training.mixed_precision, device)
    weight_dtype = frozen_dtype(precision, device)

    # What is trained: LoRA and aligner in float32, on a frozen base.
    torch.manual_seed(cfg.training.seed)
    base = load_base(cfg.model.pretrained_model, cfg.model.image_encoder, device, weight_dtype, cfg.model.attention)
    parameters = add_lora(base.unet, cfg.model.lora)
    aligner = make_aligner(cfg.model.aligner, base) if "image" in CONDITIONS[task] else None
    groups = [{"params": list(parameters)}]
    if aligner:
        rate = schedule.aligner_learning_rate or schedule.learning_rate
        groups.append({"params": list(aligner.parameters()), "lr": rate})
        parameters += aligner.parameters()
    if cfg.model.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
        base.unet.train()  # diffusers checkpoints in training mode alone; these UNets have no dropout but LoRA's
    elif cfg.model.lora.dropout:
        base.unet.train()

    # What it is trained on.
    dataset = open_dataset(cfg, task, base)
    cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"body": cfg.data.body or dataset.body})})
    body = load_body(cfg.data.body)
    accumulation = schedule.effective_batch_size // schedule.batch_size
    if len(dataset) < schedule.batch_size:
        raise UserError(f"training.{task}.batch_size is {schedule.batch_size} but the data set has {len(dataset)} rows")
    total_steps = schedule.max_steps or max(1, schedule.num_epochs * len(dataset) // schedule.effective_batch_size)
    batches = iter(
        DataLoader(
            dataset,
            batch_sampler=shuffled_batches(len(dataset), schedule.batch_size, cfg.training.seed),
            num_workers=cfg.data.num_workers,
            pin_memory=device.type == "cuda",
        )
    )

    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    kind = "constant_with_warmup" if schedule.lr_scheduler == "constant" else schedule.lr_scheduler
    lr_scheduler = get_scheduler(
        kind, optimizer, num_warmup_steps=schedule.lr_warmup_steps, num_training_steps=total_steps
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    run_dir = Path(cfg.output.out_dir) / task
    print(dump_config(cfg))
    print(report(cfg, task, base, aligner, parameters, len(dataset), total_steps, device, precision))
    if dry_run:
        print(estimate(next_batch(batches), cfg, task, base, aligner, parameters, total_steps, precision))
        return None
    check_writable(run_dir)
    check_writable(cfg.output.log_dir)
    writer = SummaryWriter(Path(cfg.output.log_dir) / f"{task}-{time.strftime('%Y%m%d-%H%M%S')}")
    writer.add_text("config", "```\n" + cfg.model_dump_json(indent=2) + "\n```")

    checkpoint = None
    running, samples, clock = defaultdict(float), 0, time.perf_counter()
    progress = tqdm(range(1, total_steps + 1), desc=task, unit="step")
    for global_step in progress:
        for micro_step in range(accumulation):
            batch = next_batch(batches)
            generator = step_generator(cfg.training.seed, global_step, micro_step)
            for losses in batch_losses(batch, task, cfg, base, aligner, precision, generator):
                # Backward before the next condition's forward: one UNet graph is alive at a time.
                scaler.scale(losses["loss/combined"] / accumulation).backward()
                for name, loss in losses.items():
                    running[name] += loss.item() / accumulation
                samples += len(batch["texture"])
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, schedule.max_grad_norm)
        if not scaler.is_enabled() and not norm.isfinite():  # with fp16 the scaler skips such a step and goes on
            raise diverged(task, global_step, checkpoint)
        scaler.step(optimizer)
        scaler.update()
        learning_rate = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        optimizer.zero_grad(set_to_none=True)

        if global_step % cfg.output.log_every == 0 or global_step == total_steps:
            steps = (global_step - 1) % cfg.output.log_every + 1
            averages = {name: value / steps for name, value in running.items()}
            if not all(math.isfinite(value) for value in averages.values()):
                raise diverged(task, global_step, checkpoint)
            for name, value in averages.items():
                writer.add_scalar(name, value, global_step)
            writer.add_scalar("learning_rate", learning_rate, global_step)
            writer.add_scalar("samples_per_second", samples / (time.perf_counter() - clock), global_step)
            progress.set_postfix({name.removeprefix("loss/"): f"{value:.3f}" for name, value in averages.items()})
            running, samples, clock = defaultdict(float), 0, time.perf_counter()
        if global_step % cfg.output.save_every == 0 or global_step == total_steps:
            checkpoint = run_dir / f"step-{global_step:06d}"
            save_checkpoint(checkpoint, cfg, task, global_step, base.unet, aligner)
        if global_step % cfg.output.sample_every == 0 or global_step == total_steps:
            paused = time.perf_counter()
            grid = sample_grid(TrainedModel(base, aligner, cfg), dataset, body, task, precision)
            writer.add_image("samples", grid, global_step)
            clock += time.perf_counter() - paused
    writer.close()
    print(f"checkpoint: {checkpoint}")
    return checkpoint


def batch_losses(
    batch: dict, task: str, cfg: Config, base: BaseModel, aligner, precision: torch.dtype | None, generator
) -> Iterator[dict[str, torch.Tensor]]:
    """A batch → the losses of each condition of the task in turn; "loss/combined" is the one to differentiate.

    batch: texture (B, 3, H, W) in [-1, 1], prompt, and for images image (B, 3, S, S) in [-1, 1]. Noise, timesteps
    and dropped conditions come from `generator`, on the CPU, so that a step is the same on every device.
    """
    device, noise_scheduler = base.device, base.noise_scheduler
    schedule = getattr(cfg.training, task)
    weights = {"text": schedule.alpha, "image": schedule.beta} if task == "joint" else {"text": 1.0, "image": 1.0}
    with autocast(device, precision):
        mean, std = posteriors(base, batch)
        latents = sample_posterior(base.vae, mean, std, generator)  # (B, 4, H/8, W/8)
        null_states = encode_prompts(base, [""])  # (1, L, D)
        if "text" in CONDITIONS[task] or schedule.gamma:
            prompts = [cfg.model.prompt_template.format(prompt=prompt) for prompt in batch["prompt"]]
            text_states = encode_prompts(base, prompts)  # (B, L, D)
    for kind in CONDITIONS[task]:
        noise = torch.randn(latents.shape, generator=generator).to(device)
        last_timestep = noise_scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, last_timestep, (len(latents),), generator=generator).to(device)
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        losses = {}
        with autocast(device, precision):
            if kind == "text":
                encoder_hidden_states = text_states
            else:
                encoder_hidden_states = aligner(encode_images(base, batch["image"])).float()
                if schedule.gamma:
                    losses["loss/align"] = F.mse_loss(encoder_hidden_states, text_states)
            encoder_hidden_states = drop_conditions(
                encoder_hidden_states, null_states, schedule.condition_dropout, generator
            )
            dtype = base.unet.dtype
            noise_pred = base.unet(noisy_latents.to(dtype), timesteps, encoder_hidden_states.to(dtype)).sample
        loss = F.mse_loss(noise_pred.float(), training_target(noise_scheduler, latents, noise, timesteps))
        combined = weights[kind] * loss
        if losses:
            combined = combined + schedule.gamma * losses["loss/align"]
        yield {LOSS_NAME[kind]: loss, **losses, "loss/combined": combined}


def posteriors(base: BaseModel, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each texture's latents, (B, 4, H/8, W/8); the last POSTERIORS_KEPT are remembered.

    A texture comes back with each of its renders and each epoch, and its posterior does not change.
    """
    known, ids = base.posteriors, batch["texture_id"].tolist()
    missing = {texture_id: row for row, texture_id in enumerate(ids) if texture_id not in known}
    if missing:
        encoded = encode_posterior(base.vae, batch["texture"][list(missing.values())].to(base.device))
        known.update(zip(missing, zip(*encoded)))
    mean, std = (torch.stack(part) for part in zip(*(known[texture_id] for texture_id in ids)))
    while len(known) > POSTERIORS_KEPT:
        del known[next(iter(known))]
    return mean, std


def diverged(task: str, global_step: int, checkpoint: Path | None) -> UserError:
    return UserError(
        f"the loss or its gradient is not finite at step {global_step}; lower training.{task}.learning_rate. "
        f"The last checkpoint is {checkpoint or 'not yet written'}"
    )


def next_batch(batches: Iterator[dict]) -> dict:
    """The next batch; a worker's UserError loses the traceback that the DataLoader puts into its message."""
    try:
        return next(batches)
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("errors.UserError: ")) from None


def step_generator(seed: int, global_step: int, micro_step: int) -> torch.Generator:
    """Random numbers of one micro-batch, from these three numbers alone."""
    words = np.random.SeedSequence([seed, global_step, micro_step]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> 1))


def shuffled_batches(rows: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Batches of row numbers without end: each epoch its own order, a remainder goes on into the next epoch.

    Epoch e has the numbers e * rows .. (e + 1) * rows - 1: the data set takes them for the same rows again.
    """
    queue, epoch = [], 0
    while True:
        while len(queue) < batch_size:
            queue += (epoch * rows + np.random.default_rng([seed, epoch]).permutation(rows)).tolist()
            epoch += 1
        yield queue[:batch_size]
        queue = queue[batch_size:]


def open_dataset(cfg: Config, task: str, base: BaseModel) -> ATLASLarge:
    """The configured data set; procedural:COUNT is built into data.cache_dir the first time."""
    datasets.disable_progress_bars()
    root, cache_dir = Path(cfg.data.dataset), Path(cfg.data.cache_dir)
    kind, _, count = cfg.data.dataset.partition(":")
    resolution = cfg.data.resolution or base.native_resolution
    if resolution % base.vae_scale:
        raise UserError(f"data.resolution {resolution} is not a multiple of {base.vae_scale}")
    if kind == "procedural":
        if not count.isdigit() or int(count) == 0:
            raise UserError(f"data.dataset {cfg.data.dataset!r}: write procedural:COUNT, the number of textures")
        if cfg.data.body not in (None, "anny"):
            raise UserError(f"data.body is {cfg.data.body!r}, but procedural textures are painted on anny")
        views = cfg.data.views_per_texture if cfg.data.views == "stored" else 0
        source = ProceduralTextures(int(count), resolution, cfg.training.seed)
        key = fingerprint(source.fingerprint(), views, resolution, cfg.data.render.model_dump())
        root = cache_dir / f"procedural-{count}-{key}"
        build_dataset(source, "anny", views, root, resolution, resolution * 3 // 4, cfg.training.seed, cfg.data.render)
    image_size = base.image_encoder.config.image_size if base.image_encoder else 224
    dataset = ATLASLarge(root, task, resolution, image_size, str(cache_dir / "datasets"))
    body = cfg.data.body or dataset.body
    if body is None:
        raise UserError(f"data set {cfg.data.dataset} does not say which body it is for; set data.body")
    if "image" in CONDITIONS[task]:
        if cfg.data.views == "online":
            dataset.render_online(cfg.data.render, body, cfg.data.views_per_texture, cfg.training.seed)
        elif dataset.renders is None:
            raise UserError(f"data set {cfg.data.dataset} holds no renders; set data.views to online")
    return dataset


def report(cfg, task, base, aligner, parameters, rows, total_steps, device, precision) -> str:
    """The run in a few lines: what is trained, on what, for how long."""
    count = {name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in base.modules().items()}
    trained = sum(p.numel() for p in parameters) / 1e6
    in_aligner = sum(p.numel() for p in aligner.parameters()) / 1e6 if aligner else 0.0
    schedule: Schedule = getattr(cfg.training, task)
    return "\n".join([
        f"base      {cfg.model.pretrained_model}: " + ", ".join(f"{name} {size:.1f} M" for name, size in count.items()),
        f"trained   {trained:.2f} M parameters: LoRA {trained - in_aligner:.2f} M, aligner {in_aligner:.2f} M",
        f"data      {cfg.data.dataset}: {rows} rows",
        f"steps     {total_steps} of {schedule.effective_batch_size} rows "
        f"({total_steps * schedule.effective_batch_size / rows:.1f} epochs)",
        f"device    {device}, autocast {precision or 'off'}",
    ])  # fmt: skip


def estimate(batch: dict, cfg: Config, task: str, base: BaseModel, aligner, parameters, total_steps, precision) -> str:
    """Memory and disk of a run, counted: weights, optimiser, and what the backward of one and of two rows keeps."""

    def kept_by(rows: int) -> int:
        kept: dict[int, int] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        part, largest = {key: value[:rows] for key, value in batch.items()}, 0
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            generator = step_generator(cfg.training.seed, 1, 0)
            for losses in batch_losses(part, task, cfg, base, aligner, precision, generator):
                losses["loss/combined"].backward()
                largest = max(largest, sum(kept.values()))
                kept.clear()
        return largest

    schedule: Schedule = getattr(cfg.training, task)
    one = kept_by(1)
    a_row = kept_by(2) - one if schedule.batch_size > 1 else 0  # what weights keep does not grow with the rows
    frozen = sum(p.numel() * p.element_size() for module in base.modules().values() for p in module.parameters())
    trained = sum(p.numel() * p.element_size() for p in parameters)
    memory = {
        "frozen weights": frozen,
        "trained weights, gradients and AdamW": 4 * trained,
        f"activations of {schedule.batch_size} rows": one + a_row * (schedule.batch_size - 1),
    }
    checkpoints = math.ceil(total_steps / cfg.output.save_every)
    parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in memory.items())
    return "\n".join([
        f"memory    {sum(memory.values()) / 1e9:.2f} GB: {parts}",
        f"disk      {checkpoints * trained / 1e6:.1f} MB: {checkpoints} checkpoints of {trained / 1e6:.1f} MB",
        "dry run: one batch went through; nothing was trained",
    ])  # fmt: skip


@torch.no_grad()
def sample_grid(
    trained: TrainedModel, dataset: ATLASLarge, body: Body, task: str, precision: torch.dtype | None
) -> torch.Tensor:
    """Textures for the configured prompts and two rows of the data set, each with four views → (3, H, W) in [0, 1]."""
    cfg, base = trained.cfg, trained.base
    was_training = base.unet.training
    base.unet.eval()
    rows = [dataset[index] for index in range(0, len(dataset), max(1, len(dataset) // 2))][:2]
    conditions = []
    with autocast(base.device, precision):
        if "text" in CONDITIONS[task]:
            prompts = [*cfg.output.sample_prompts, *(row["prompt"] for row in rows)]
            conditions += [condition(trained, prompt, None, 0) for prompt in prompts]
        if "image" in CONDITIONS[task]:
            conditions += [condition(trained, None, image_from_pixels(row["image"]), 1) for row in rows]
        textures = generate(
            trained, torch.cat(conditions), cfg.inference.negative_prompt, list(range(len(conditions))),
            cfg.inference.num_inference_steps, cfg.inference.guidance_scale,
        ).cpu()  # fmt: skip
    base.unet.train(was_training)
    size = 256
    cameras = orbit_cameras(
        body, torch.tensor([0.0, 90.0, 180.0, 270.0]), torch.full((4,), 8.0), torch.full((4,), 30.0)
    )
    lines = []
    for texture in textures:
        views = render_views(body, (texture[None] + 1) / 2, cameras, size, size)
        thumbnail = F.interpolate((texture[None] + 1) / 2, size=(size, size), mode="area")
        lines.append(torch.cat([*thumbnail, *views], dim=-1))
    return torch.cat(lines, dim=-2)
