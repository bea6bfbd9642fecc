"""What a person sees of a run: the report at its start, TensorBoard, sampled textures, and what it will take."""

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

from common import processes
from common.errors import reason
from common.pictures import image_from_pixels
from config.configuration import dump_config
from models.checkpoints import TrainedModel
from models.diffusion import autocast
from models.generation import generate, picture_condition, prompt_condition
from render.cameras import orbit_cameras
from render.shading import render_views
from training.objective import RowDraws, batch_losses
from training.run import Run
from training.tasks import CONDITIONS

PEAK_TFLOPS = {  # of bf16 matrix products without sparsity, by the makers' data sheets; the longer names first
    **{"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121},
    **{"A10": 125, "RTX 4090": 165, "RTX 3090": 71, "V100": 125, "T4": 65},
}
BLOCK_GROUPS = ("down_blocks", "mid_block", "up_blocks")
VIEW_SIZE = 256  # of each view in the grid of samples, in pixels


class RunLog:
    """TensorBoard scalars of a run, averaged between two `flush`es. All processes call it, the main one writes."""

    def __init__(self, run: Run):
        self.run, self.writer = run, None
        if processes.is_main():
            name = f"{run.task}-{time.strftime('%Y%m%d-%H%M%S')}"
            self.writer = SummaryWriter(Path(run.cfg.output.log_dir) / name)
            text = "```\n" + dump_config(run.cfg) + "\n```"
            self._write(lambda writer: writer.add_text("config", text))
        self.latest: dict[str, float] = {}
        self.flops = 0  # of a step in this process, on CUDA
        self._restart()

    def _restart(self) -> None:
        self.since_flush = defaultdict(list)  # name → a value a step
        self.steps, self.waited = 0, 0.0
        self.clock = time.perf_counter()

    @contextmanager
    def paused(self):
        """What takes time but is no training."""
        began = time.perf_counter()
        yield
        self.clock += time.perf_counter() - began

    @contextmanager
    def waiting(self):
        """Time spent on waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextmanager
    def counting_flops(self):
        """Counts the arithmetic of the first step on CUDA, unless the UNet is compiled: counting would prevent it."""
        if self.flops or self.run.base.device.type != "cuda" or self.run.cfg.model.compile:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self.flops = counter.get_total_flops()

    def step(self, losses: dict[str, float]) -> None:
        self.steps += 1
        for name, value in losses.items():
            self.since_flush[name].append(value)

    def flush(self, global_step: int) -> dict[str, float]:
        """Writes and returns the means since the last time."""
        run, device = self.run, self.run.base.device
        seconds = time.perf_counter() - self.clock
        samples = self.steps * run.schedule.effective_batch_size * len(CONDITIONS[run.task])
        means = {name: sum(values) / len(values) for name, values in self.since_flush.items()}
        means |= {"samples_per_second": samples / seconds, "data_wait_share": self.waited / seconds}
        if memory := peak_memory(device):
            means["peak_memory_gb"] = memory / 1e9
        means |= lora_norms(run.base.unet)
        if self.flops and (peak := peak_flops(device)):
            means["mfu"] = self.flops * self.steps / seconds / peak
        self.scalars(means, global_step)
        self._restart()
        return means

    def scalars(self, values: dict[str, float], global_step: int) -> None:
        self.latest |= values
        for name, value in values.items():
            self._write(partial(_add_scalar, name=name, value=value, global_step=global_step))

    def image(self, name: str, picture: Tensor, global_step: int) -> None:
        self._write(lambda writer: writer.add_image(name, picture, global_step))

    def _write(self, write: Callable[[SummaryWriter], None]) -> None:
        """In the main process. A log on a full disk costs no run: it goes on without one, which is said once."""
        if self.writer is None:
            return
        try:
            write(self.writer)
        except OSError as error:
            text = f"cannot write TensorBoard's log ({reason(error)}): training goes on without it"
            print(f"warning: {text}", file=sys.stderr)
            self.writer = None

    def close(self) -> None:
        """Writes the settings beside the last losses, to compare runs by."""
        losses = {name: value for name, value in self.latest.items() if name.startswith(("loss/", "val/", "eval/"))}
        final_losses = {f"final/{name}": value for name, value in losses.items()}
        settings = flat_settings(self.run.cfg.model_dump())
        self._write(lambda writer: writer.add_hparams(settings, final_losses, run_name="."))
        self._write(lambda writer: writer.close())


def _add_scalar(writer: SummaryWriter, name: str, value: float, global_step: int) -> None:
    writer.add_scalar(name, value, global_step)


def flat_settings(settings: dict, prefix: str = "") -> dict:
    """Nested settings → {dotted key: number, truth value or text}."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flat_settings(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of CUDA allocations, or of this process; None on Windows, which does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(device: torch.device) -> float | None:
    """FLOP a second that the card can do in bf16; None for a card that is not listed."""
    device_name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for card, peak in PEAK_TFLOPS.items() if card in device_name), None)


def lora_norms(unet) -> dict[str, float]:
    """Norm of the LoRA weights in each group of the UNet's blocks."""
    weights_of = defaultdict(list)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            group = next((group for group in BLOCK_GROUPS if name.startswith(group)), "rest")
            weights_of[group].append(parameter.detach())
    norms = {}
    for group, weights in weights_of.items():
        norms[f"lora_norm/{group}"] = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(weights)))
    return {name: norm.item() for name, norm in norms.items()}


def report(run: Run) -> str:
    """The run in a few lines: what is trained, on what, for how long."""
    cfg, rows, step_rows = run.cfg, len(run.dataset), run.schedule.effective_batch_size
    sizes = {name: millions(module.parameters()) for name, module in run.base.modules().items()}
    modules = ", ".join(f"{name} {size:.1f} M" for name, size in sizes.items())
    trained = millions(run.parameters)
    in_aligner = millions(run.aligner.parameters()) if run.aligner else 0.0
    held_out = f", {len(run.validation)} held out" if run.validation else ""
    cached = ", ".join(run.dataset.cached) or "nothing"
    epochs = run.total_steps * step_rows / rows
    lines = [
        f"base      {cfg.model.pretrained_model}: {modules}",
        f"trained   {trained:.2f} M parameters: LoRA {trained - in_aligner:.2f} M, aligner {in_aligner:.2f} M",
        f"data      {cfg.data.dataset}: {rows} rows{held_out}; {cached} cached on disk",
        f"steps     {run.total_steps} of {step_rows} rows ({epochs:.1f} epochs)",
        f"device    {run.base.device}, autocast {run.precision or 'off'}, {processes.world_size()} processes",
    ]
    return "\n".join(lines)


def millions(parameters) -> float:
    return sum(parameter.numel() for parameter in parameters) / 1e6


def total_bytes(parameters) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def estimate(batch: dict, run: Run) -> str:
    """Memory and disk of a run, counted: weights, optimiser, and what the backward of one and of two rows keeps."""

    schedule, cfg = run.schedule, run.cfg
    one_row = bytes_kept(batch, run, 1)
    next_row = bytes_kept(batch, run, 2) - one_row if schedule.batch_size > 1 else 0  # weights keep theirs once
    frozen = sum(total_bytes(module.parameters()) for module in run.base.modules().values())
    trained = total_bytes(run.parameters)
    copies = 5 if run.ema else 4
    memory = {
        "frozen weights": frozen,
        "trained weights, gradients and optimiser": copies * trained,
        f"activations of {schedule.batch_size} rows": one_row + next_row * (schedule.batch_size - 1),
    }
    memory_items = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in memory.items())
    checkpoints = math.ceil(run.total_steps / cfg.output.save_every)
    checkpoints = min(checkpoints, cfg.output.keep_last or checkpoints)
    megabytes = copies * trained / 1e6
    lines = [
        f"memory    {sum(memory.values()) / 1e9:.2f} GB: {memory_items}",
        f"disk      {checkpoints * megabytes:.1f} MB: {checkpoints} checkpoints of {megabytes:.1f} MB",
        "dry run: one batch went through; nothing was trained",
    ]
    return "\n".join(lines)


def bytes_kept(batch: dict, run: Run, rows: int) -> int:
    """Bytes that the backward of the batch's first rows keeps, of the condition that keeps the most."""
    kept: dict[int, int] = {}  # address → bytes
    largest = 0

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    first_rows = {key: value[:rows] for key, value in batch.items()}
    draws = RowDraws(run.cfg.training.seed, 1, range(rows))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        for losses in batch_losses(run, first_rows, draws):
            losses["loss/combined"].backward()
            largest = max(largest, sum(kept.values()))
            kept.clear()
    return largest


@torch.no_grad()
def sample_grid(run: Run) -> Tensor:
    """Textures for the configured prompts and two rows of the data set, each with four views → (3, H, W) in [0, 1]."""
    cfg, dataset, conditions = run.cfg, run.validation or run.dataset, CONDITIONS[run.task]
    trained = TrainedModel(run.base, run.aligner, cfg)
    rows = list(range(0, len(dataset), max(1, len(dataset) // 2)))[:2]
    states = []  # (1, L, D) each
    with autocast(run.base.device, run.precision):
        if "text" in conditions:
            prompts = [*cfg.output.sample_prompts, *(dataset[row]["prompt"] for row in rows)]
            states += [prompt_condition(trained, prompt) for prompt in prompts]
        if "image" in conditions:
            pictures = [image_from_pixels(dataset.picture(row)) for row in rows]
            states += [picture_condition(trained, [picture]) for picture in pictures]
        settings = cfg.inference
        textures = generate(
            trained,
            torch.cat(states),
            settings.negative_prompt,
            list(range(len(states))),
            settings.num_inference_steps,
            settings.guidance_scale,
        ).cpu()  # (B, 3, H, W) in [-1, 1]
    azimuth = torch.tensor([0.0, 90.0, 180.0, 270.0])
    cameras = orbit_cameras(run.body, azimuth, torch.full((4,), 8.0), torch.full((4,), 30.0))
    lines = []
    for texture in ((textures + 1) / 2).split(1):  # (1, 3, H, W) in [0, 1]
        views = render_views(run.body, texture, cameras, VIEW_SIZE, VIEW_SIZE)
        thumbnail = F.interpolate(texture, size=(VIEW_SIZE, VIEW_SIZE), mode="area")
        lines.append(torch.cat([*thumbnail, *views], dim=-1))
    return torch.cat(lines, dim=-2)
