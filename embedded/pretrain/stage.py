"""The one loop that trains every stage, and what all stages are given."""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Run:
    """Where and on what the stages run."""

    out: Path  # the base, in the diffusers folder layout
    work: Path  # renders, and the states that stopped stages go on from
    renders: int  # captioned pictures, for autoencoder and UNet
    outfits: int  # outfits rendered in several poses, for the encoders
    device: torch.device
    precision: torch.dtype | None  # autocast dtype; None is float32
    batch_scale: int = 1  # times the pictures of each step: a card has room for more


def train_stage(
    name: str, work: Path, modules: dict, loss_fn, steps: int, lr: float, ema=None, log_every=50, save_seconds=120
) -> dict:
    """Trains modules on loss_fn(step) for `steps` steps of AdamW with a cosine decay; resumes from work/name.pt.

    modules: by name. ema: an EMAModel of their parameters. Returns steps, seconds, and the mean losses of the first
    and the last `log_every` steps.
    """
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)

    def lr_factor(step: int) -> float:
        return min(1, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)

    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    stateful = {**modules, "optimizer": optimizer, "lr_scheduler": lr_scheduler, **({"ema": ema} if ema else {})}
    saved, start, losses, seconds = work / f"{name}.pt", 0, [], 0.0
    if saved.exists():
        state = torch.load(saved, map_location=parameters[0].device, weights_only=True)
        start, losses, seconds = state["step"], state["losses"], state["seconds"]
        for key, holder in stateful.items():
            holder.load_state_dict(state[key])

    def save(step):
        state = {key: holder.state_dict() for key, holder in stateful.items()}
        torch.save({**state, "step": step, "losses": losses, "seconds": seconds}, saved.with_suffix(".tmp"))
        os.replace(saved.with_suffix(".tmp"), saved)

    progress = tqdm(range(start, steps), name, initial=start, total=steps)
    last_save = clock = time.perf_counter()
    recent_losses = []
    for step in progress:
        torch.manual_seed(1_000_003 * step + 17)  # a resumed step draws what it would have drawn
        loss = loss_fn(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        lr_scheduler.step()
        if ema:
            ema.step(parameters)
        recent_losses.append(float(loss.detach()))
        if (step + 1) % log_every == 0 or step + 1 == steps:
            losses.append([step + 1, float(np.mean(recent_losses))])
            progress.set_postfix(loss=f"{losses[-1][1]:.4f}")
            recent_losses = []
        now = time.perf_counter()
        if now - last_save > save_seconds or step + 1 == steps:
            seconds, clock, last_save = seconds + now - clock, now, now
            save(step + 1)
    return {"steps": steps, "seconds": round(seconds), "first_loss": losses[0][1], "last_loss": losses[-1][1]}
