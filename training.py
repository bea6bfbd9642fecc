"""The one training loop. A task is a list of conditions; everything else is the same for all three.

A batch flows: texture → latents → noisy_latents → noise_pred → a loss for each condition → one optimiser step.
"""

import itertools
import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
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
from checkpoints import TrainedModel, drop_old_checkpoints, load_state, newest_state, save_checkpoint
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
from errors import STOPPED, UserError
from files import check_writable
from generation import condition, generate
from images import image_from_pixels
from lora_utils import add_lora
from render.bodies import Body
from render.utils import load_body, orbit_cameras, render_views

CONDITIONS = {"t2uv": ("text",), "i2uv": ("image",), "joint": ("text", "image")}
POSTERIORS_KEPT = 1024  # in memory; 0.3 MB each at 512 pixels
LOSS_NAME = {"text": "loss/t2uv", "image": "loss/i2uv"}


@dataclass
class Run:
    """One training run: a frozen base, what is trained on it, and on what. Everything a checkpoint must bring back is
    in `parameters`, `optimizer`, `lr_scheduler`, `scaler` and `global_step`; all else follows from the configuration.
    """

    cfg: Config
    task: str
    base: BaseModel
    aligner: torch.nn.Module | None
    parameters: list[torch.nn.Parameter]  # of LoRA and aligner, float32
    dataset: ATLASLarge
    body: Body
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    precision: torch.dtype | None
    total_steps: int
    global_step: int = 0
    skipped: int = 0  # steps in a row whose gradient was not finite

    @property
    def schedule(self) -> Schedule:
        return getattr(self.cfg.training, self.task)

    @property
    def accumulation(self) -> int:
        """Micro-batches in one optimiser step."""
        return self.schedule.effective_batch_size // self.schedule.batch_size

    @property
    def folder(self) -> Path:
        return Path(self.cfg.output.out_dir) / self.task

    def state(self) -> dict:
        """What `restore` needs, in types that torch.load(weights_only=True) reads."""
        return {
            "parameters": [parameter.detach().cpu() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(), "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(), "global_step": self.global_step, "skipped": self.skipped,
        }  # fmt: skip

    def restore(self, state: dict) -> None:
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        rates = self.lr_scheduler.base_lrs  # the configuration's: they may be lowered
        for name in ("optimizer", "lr_scheduler", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.lr_scheduler.base_lrs = rates
        for group, rate, factor in zip(self.optimizer.param_groups, rates, self.lr_scheduler.lr_lambdas):
            group["initial_lr"], group["lr"] = rate, rate * factor(self.lr_scheduler.last_epoch)
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.global_step, self.skipped = state["global_step"], state["skipped"]


def set_up(cfg: Config, task: str) -> Run:
    """Everything for a run at step 0. Raises UserError for what the configuration or its files have wrong."""
    schedule = getattr(cfg.training, task)
    device = pick_device(cfg.training.device)
    precision = resolve_precision(cfg.training.mixed_precision, device)

    # What is trained: LoRA and aligner in float32, on a frozen base.
    torch.manual_seed(cfg.training.seed)
    dtype = frozen_dtype(precision, device)
    base = load_base(cfg.model.pretrained_model, cfg.model.image_encoder, device, dtype, cfg.model.attention)
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
    if len(dataset) < schedule.batch_size:
        raise UserError(f"training.{task}.batch_size is {schedule.batch_size} but the data set has {len(dataset)} rows")
    total_steps = schedule.max_steps or max(1, schedule.num_epochs * len(dataset) // schedule.effective_batch_size)

    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    kind = "constant_with_warmup" if schedule.lr_scheduler == "constant" else schedule.lr_scheduler
    lr_scheduler = get_scheduler(
        kind, optimizer, num_warmup_steps=schedule.lr_warmup_steps, num_training_steps=total_steps
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    return Run(
        cfg, task, base, aligner, parameters, dataset, load_body(cfg.data.body), optimizer, lr_scheduler, scaler,
        precision, total_steps,
    )  # fmt: skip


def train(cfg: Config, task: str, dry_run: bool = False, resume: str | None = None) -> Path | None:
    """Trains LoRA and aligner on one task and returns the last checkpoint (None after a dry run).

    task: "t2uv", "i2uv" or "joint". resume: a checkpoint's folder, or "auto" for the newest of this task, if there is
    one: the run goes on as if it had never stopped. SIGTERM and Ctrl-C save and raise SystemExit(STOPPED). Raises
    UserError for what the configuration or its files have wrong.
    """
    run = set_up(cfg, task)
    cfg, schedule, checkpoint = run.cfg, run.schedule, None
    if resume:
        checkpoint = newest_state(run.folder) if resume == "auto" else Path(resume)
        if checkpoint:
            run.restore(load_state(checkpoint, cfg, task))
    print(dump_config(cfg))
    print(report(run))
    print(f"resume    {checkpoint} at step {run.global_step}" if checkpoint else "resume    no: from the start")
    batches = iter(
        DataLoader(
            run.dataset,
            batch_sampler=shuffled_batches(
                run.dataset, schedule.batch_size, cfg.training.seed, start=run.global_step * run.accumulation
            ),
            num_workers=cfg.data.num_workers,
            worker_init_fn=ignore_ctrl_c,
            pin_memory=run.base.device.type == "cuda",
        )
    )
    if dry_run:
        print(estimate(next_batch(batches), run))
        return None
    check_writable(run.folder)
    check_writable(cfg.output.log_dir)
    writer = SummaryWriter(Path(cfg.output.log_dir) / f"{task}-{time.strftime('%Y%m%d-%H%M%S')}")
    writer.add_text("config", "```\n" + cfg.model_dump_json(indent=2) + "\n```")

    running, samples, clock = defaultdict(list), 0, time.perf_counter()
    progress = tqdm(range(run.global_step + 1, run.total_steps + 1), desc=task, unit="step",
                    initial=run.global_step, total=run.total_steps)  # fmt: skip
    with StopRequest() as stop:
        for global_step in progress:
            losses, prompts = optimizer_step(run, global_step, batches)
            if run.skipped > cfg.training.max_skipped_steps:
                raise diverged(run, global_step, checkpoint, prompts)
            run.global_step = global_step
            samples += schedule.effective_batch_size * len(CONDITIONS[task])
            for name, value in losses.items():
                running[name].append(value)

            is_last = global_step == run.total_steps
            if global_step % cfg.output.log_every == 0 or is_last:
                running["samples_per_second"] = [samples / (time.perf_counter() - clock)]
                averages = {name: sum(values) / len(values) for name, values in running.items()}
                for name, value in averages.items():
                    writer.add_scalar(name, value, global_step)
                progress.set_postfix({
                    name.removeprefix("loss/"): f"{value:.3f}" for name, value in averages.items() if "loss/" in name
                })  # fmt: skip
                running, samples, clock = defaultdict(list), 0, time.perf_counter()
            if global_step % cfg.output.save_every == 0 or is_last or stop.requested:
                checkpoint = run.folder / f"step-{global_step:06d}"
                save_checkpoint(checkpoint, cfg, task, global_step, run.base.unet, run.aligner, run.state())
                drop_old_checkpoints(run.folder, cfg.output.keep_last)
            if stop.requested and not is_last:
                writer.close()
                print(f"stopped at step {global_step}, saved in {checkpoint}; --resume auto goes on")
                raise SystemExit(STOPPED)
            if global_step % cfg.output.sample_every == 0 or is_last:
                paused = time.perf_counter()
                grid = sample_grid(TrainedModel(run.base, run.aligner, cfg), run.dataset, run.body, task, run.precision)
                writer.add_image("samples", grid, global_step)
                clock += time.perf_counter() - paused
    writer.close()
    print(f"checkpoint: {checkpoint}")
    return checkpoint


def optimizer_step(run: Run, global_step: int, batches: Iterator[dict]) -> tuple[dict[str, float], list[str]]:
    """One step over `accumulation` micro-batches → the mean of each loss, and the prompts that were trained on.

    A gradient that is not finite changes nothing and is counted in run.skipped.
    """
    losses, prompts = defaultdict(float), []
    whole_step = step_generator(run.cfg.training.seed, global_step, run.accumulation)
    torch.manual_seed(whole_step.initial_seed())  # LoRA's dropout draws from there
    for micro_step in range(run.accumulation):
        batch = next_batch(batches)
        prompts += batch["prompt"]
        generator = step_generator(run.cfg.training.seed, global_step, micro_step)
        for found in batch_losses(batch, run.task, run.cfg, run.base, run.aligner, run.precision, generator):
            # Backward before the next condition's forward: one UNet graph is alive at a time.
            run.scaler.scale(found["loss/combined"] / run.accumulation).backward()
            for name, loss in found.items():
                losses[name] += loss.item() / run.accumulation
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, run.schedule.max_grad_norm)
    losses["learning_rate"] = run.lr_scheduler.get_last_lr()[0]
    if norm.isfinite():
        losses["gradient_norm"], run.skipped = norm.item(), 0
        run.scaler.step(run.optimizer)
    else:
        losses, run.skipped = {"learning_rate": losses["learning_rate"]}, run.skipped + 1
    losses["skipped_steps"] = float(run.skipped > 0)
    run.scaler.update()
    run.lr_scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    return losses, prompts


def ignore_ctrl_c(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal and is the main one's to answer. SIGTERM is left alone: it is how
    Python ends the loader's workers at exit, which would wait for ever for one that ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class StopRequest:
    """Notes the first SIGTERM or Ctrl-C instead of ending at once; a second Ctrl-C ends at once."""

    requested = False

    def __enter__(self):
        self.earlier = {}
        if threading.current_thread() is threading.main_thread():  # only there can signals be handled
            for number in (signal.SIGTERM, signal.SIGINT):
                self.earlier[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        for number, handler in self.earlier.items():
            signal.signal(number, handler)


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

    A texture comes back with each of its renders and each epoch, and its posterior does not change. Each is encoded
    by itself: beside others its last bits could differ, and a resumed run would not equal an undisturbed one.
    """
    known, ids = base.posteriors, batch["texture_id"].tolist()
    missing = {texture_id: row for row, texture_id in enumerate(ids) if texture_id not in known}
    for texture_id, row in missing.items():
        mean, std = encode_posterior(base.vae, batch["texture"][row : row + 1].to(base.device))
        known[texture_id] = mean[0], std[0]
    mean, std = (torch.stack(part) for part in zip(*(known[texture_id] for texture_id in ids)))
    while len(known) > POSTERIORS_KEPT:
        del known[next(iter(known))]
    return mean, std


def diverged(run: Run, global_step: int, checkpoint: Path | None, prompts: list[str]) -> UserError:
    shown = "; ".join(prompts[:4]) + ("; ..." if len(prompts) > 4 else "")
    return UserError(
        f"the gradient was not finite in {run.skipped} steps in a row, up to step {global_step} on the rows {shown!r}; "
        f"lower training.{run.task}.learning_rate. The last good checkpoint is {checkpoint or 'not yet written'}"
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


def shuffled_batches(dataset: ATLASLarge, batch_size: int, seed: int, start: int = 0) -> Iterator[list[int]]:
    """Batches start, start + 1, ... of row numbers without end: each epoch its own order (ATLASLarge.shuffled), a
    remainder goes on into the next epoch.

    Epoch e has the numbers e * rows .. (e + 1) * rows - 1: the data set takes them for the same rows again.
    """
    order, known, rows = None, None, len(dataset)
    for batch in itertools.count(start):
        numbers = []
        for position in range(batch * batch_size, (batch + 1) * batch_size):
            epoch, place = divmod(position, rows)
            if epoch != known:
                order, known = dataset.shuffled(np.random.default_rng([seed, epoch])), epoch
            numbers.append(epoch * rows + int(order[place]))
        yield numbers


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


def report(run: Run) -> str:
    """The run in a few lines: what is trained, on what, for how long."""
    cfg, rows, step_rows = run.cfg, len(run.dataset), run.schedule.effective_batch_size
    count = {name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in run.base.modules().items()}
    trained = sum(p.numel() for p in run.parameters) / 1e6
    in_aligner = sum(p.numel() for p in run.aligner.parameters()) / 1e6 if run.aligner else 0.0
    return "\n".join([
        f"base      {cfg.model.pretrained_model}: " + ", ".join(f"{name} {size:.1f} M" for name, size in count.items()),
        f"trained   {trained:.2f} M parameters: LoRA {trained - in_aligner:.2f} M, aligner {in_aligner:.2f} M",
        f"data      {cfg.data.dataset}: {rows} rows",
        f"steps     {run.total_steps} of {step_rows} rows ({run.total_steps * step_rows / rows:.1f} epochs)",
        f"device    {run.base.device}, autocast {run.precision or 'off'}",
    ])  # fmt: skip


def estimate(batch: dict, run: Run) -> str:
    """Memory and disk of a run, counted: weights, optimiser, and what the backward of one and of two rows keeps."""

    def kept_by(rows: int) -> int:
        kept: dict[int, int] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        part, largest = {key: value[:rows] for key, value in batch.items()}, 0
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            generator = step_generator(run.cfg.training.seed, 1, 0)
            for losses in batch_losses(part, run.task, run.cfg, run.base, run.aligner, run.precision, generator):
                losses["loss/combined"].backward()
                largest = max(largest, sum(kept.values()))
                kept.clear()
        return largest

    schedule, one = run.schedule, kept_by(1)
    a_row = kept_by(2) - one if schedule.batch_size > 1 else 0  # what weights keep does not grow with the rows
    frozen = sum(p.numel() * p.element_size() for module in run.base.modules().values() for p in module.parameters())
    trained = sum(p.numel() * p.element_size() for p in run.parameters)
    memory = {
        "frozen weights": frozen,
        "trained weights, gradients and AdamW": 4 * trained,
        f"activations of {schedule.batch_size} rows": one + a_row * (schedule.batch_size - 1),
    }
    checkpoints = math.ceil(run.total_steps / run.cfg.output.save_every)
    checkpoints = min(checkpoints, run.cfg.output.keep_last or checkpoints)
    parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in memory.items())
    return "\n".join([
        f"memory    {sum(memory.values()) / 1e9:.2f} GB: {parts}",
        f"disk      {checkpoints * 4 * trained / 1e6:.1f} MB: {checkpoints} checkpoints of {4 * trained / 1e6:.1f} MB",
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
