"""What a person sees of a run: the report at its start, TensorBoard, sampled textures, and what it will take."""

import json
import math
import resource
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

from common import processes
from common.pictures import image_from_pixels
from config.configuration import dump_config
from models.checkpoints import TrainedModel
from models.diffusion import autocast
from models.generation import condition, generate
from render.cameras import orbit_cameras
from render.shading import render_views
from training.objective import RowDraws, batch_losses
from training.run import Run
from training.tasks import CONDITIONS

PEAK_TFLOPS = {  # of bf16 matrix products without sparsity, by the makers' data sheets
    "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "RTX 4090": 165,
    "RTX 3090": 71, "V100": 125, "T4": 65,
}  # fmt: skip
BLOCK_GROUPS = ("down_blocks", "mid_block", "up_blocks")


class RunLog:
    """TensorBoard scalars of a run, averaged between two `flush`es. All processes call it, the main one writes."""

    def __init__(self, run: Run):
        self.run, self.writer = run, None
        if processes.is_main():
            name = f"{run.task}-{time.strftime('%Y%m%d-%H%M%S')}"
            self.writer = SummaryWriter(Path(run.cfg.output.log_dir) / name)
            self.writer.add_text("config", "```\n" + dump_config(run.cfg) + "\n```")
        self.latest: dict[str, float] = {}
        self.flops = 0  # of a step in this process, on CUDA
        self._restart()

    def _restart(self) -> None:
        self.running, self.steps, self.waited, self.clock = defaultdict(list), 0, 0.0, time.perf_counter()

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
            self.running[name].append(value)

    def flush(self, global_step: int) -> dict[str, float]:
        """Writes and returns the means since the last time."""
        seconds, device, run = time.perf_counter() - self.clock, self.run.base.device, self.run
        samples = self.steps * run.schedule.effective_batch_size * len(CONDITIONS[run.task])
        found = {name: sum(values) / len(values) for name, values in self.running.items()}
        found |= {"samples_per_second": samples / seconds, "data_wait_share": self.waited / seconds}
        found["peak_memory_gb"] = peak_memory(device) / 1e9
        found |= lora_norms(run.base.unet)
        if self.flops and (peak := peak_flops(device)):
            found["mfu"] = self.flops * self.steps / seconds / peak
        self.scalars(found, global_step)
        self._restart()
        return found

    def scalars(self, values: dict[str, float], global_step: int) -> None:
        self.latest |= values
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, global_step)

    def image(self, name: str, picture: Tensor, global_step: int) -> None:
        if self.writer:
            self.writer.add_image(name, picture, global_step)

    def close(self) -> None:
        """Writes the settings beside the last losses, to compare runs by."""
        if self.writer is None:
            return
        final = {f"final/{name}": value for name, value in self.latest.items() if name.startswith(("loss/", "val/"))}
        self.writer.add_hparams(flat_settings(self.run.cfg.model_dump()), final, run_name=".")
        self.writer.close()


def flat_settings(settings: dict, prefix: str = "") -> dict:
    """Nested settings → {dotted key: number, truth value or text}."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flat_settings(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat


def peak_memory(device: torch.device) -> int:
    """Bytes: of CUDA allocations, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device: torch.device) -> float | None:
    """FLOP a second that the card can do in bf16; None for a card that is not listed."""
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def lora_norms(unet) -> dict[str, float]:
    """Norm of the LoRA weights in each group of the UNet's blocks."""
    groups = defaultdict(list)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            groups[next((group for group in BLOCK_GROUPS if name.startswith(group)), "rest")].append(parameter.detach())
    norms = {group: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(part))) for group, part in groups.items()}
    return {f"lora_norm/{group}": norm.item() for group, norm in norms.items()}


def report(run: Run) -> str:
    """The run in a few lines: what is trained, on what, for how long."""
    cfg, rows, step_rows = run.cfg, len(run.dataset), run.schedule.effective_batch_size
    count = {name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in run.base.modules().items()}
    trained = sum(p.numel() for p in run.parameters) / 1e6
    in_aligner = sum(p.numel() for p in run.aligner.parameters()) / 1e6 if run.aligner else 0.0
    held_out = f", {len(run.validation)} held out" if run.validation else ""
    cached = ", ".join(run.dataset.cached) or "nothing"
    return "\n".join([
        f"base      {cfg.model.pretrained_model}: " + ", ".join(f"{name} {size:.1f} M" for name, size in count.items()),
        f"trained   {trained:.2f} M parameters: LoRA {trained - in_aligner:.2f} M, aligner {in_aligner:.2f} M",
        f"data      {cfg.data.dataset}: {rows} rows{held_out}; {cached} cached on disk",
        f"steps     {run.total_steps} of {step_rows} rows ({run.total_steps * step_rows / rows:.1f} epochs)",
        f"device    {run.base.device}, autocast {run.precision or 'off'}, {processes.world_size()} processes",
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
            for losses in batch_losses(run, part, RowDraws(run.cfg.training.seed, 1, range(rows))):
                losses["loss/combined"].backward()
                largest = max(largest, sum(kept.values()))
                kept.clear()
        return largest

    schedule, one = run.schedule, kept_by(1)
    a_row = kept_by(2) - one if schedule.batch_size > 1 else 0  # what weights keep does not grow with the rows
    frozen = sum(p.numel() * p.element_size() for module in run.base.modules().values() for p in module.parameters())
    trained = sum(p.numel() * p.element_size() for p in run.parameters)
    copies = 5 if run.ema else 4
    memory = {
        "frozen weights": frozen,
        "trained weights, gradients and optimiser": copies * trained,
        f"activations of {schedule.batch_size} rows": one + a_row * (schedule.batch_size - 1),
    }
    checkpoints = math.ceil(run.total_steps / run.cfg.output.save_every)
    checkpoints = min(checkpoints, run.cfg.output.keep_last or checkpoints)
    parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in memory.items())
    size = copies * trained / 1e6
    return "\n".join([
        f"memory    {sum(memory.values()) / 1e9:.2f} GB: {parts}",
        f"disk      {checkpoints * size:.1f} MB: {checkpoints} checkpoints of {size:.1f} MB",
        "dry run: one batch went through; nothing was trained",
    ])  # fmt: skip


@torch.no_grad()
def sample_grid(run: Run) -> Tensor:
    """Textures for the configured prompts and two rows of the data set, each with four views → (3, H, W) in [0, 1]."""
    cfg, base, dataset, task = run.cfg, run.base, run.validation or run.dataset, run.task
    trained = TrainedModel(base, run.aligner, cfg)
    rows = list(range(0, len(dataset), max(1, len(dataset) // 2)))[:2]
    conditions = []
    with autocast(base.device, run.precision):
        if "text" in CONDITIONS[task]:
            prompts = [*cfg.output.sample_prompts, *(dataset[row]["prompt"] for row in rows)]
            conditions += [condition(trained, prompt, None, 0) for prompt in prompts]
        if "image" in CONDITIONS[task]:
            conditions += [condition(trained, None, image_from_pixels(dataset.picture(row)), 1) for row in rows]
        textures = generate(
            trained, torch.cat(conditions), cfg.inference.negative_prompt, list(range(len(conditions))),
            cfg.inference.num_inference_steps, cfg.inference.guidance_scale,
        ).cpu()  # fmt: skip
    size = 256
    cameras = orbit_cameras(
        run.body, torch.tensor([0.0, 90.0, 180.0, 270.0]), torch.full((4,), 8.0), torch.full((4,), 30.0)
    )
    lines = []
    for texture in textures:
        views = render_views(run.body, (texture[None] + 1) / 2, cameras, size, size)
        thumbnail = F.interpolate((texture[None] + 1) / 2, size=(size, size), mode="area")
        lines.append(torch.cat([*thumbnail, *views], dim=-1))
    return torch.cat(lines, dim=-2)
