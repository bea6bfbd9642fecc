"""The one training loop. A task is a list of conditions; everything else is the same for all three.

A batch flows: texture → latents → noisy_latents → noise_pred → a loss for each condition (objective.py) → one
optimiser step → checkpoint.
"""

import gc
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from atlas_dataset.dataset import ATLASLarge
from common import processes
from common.errors import STOPPED, UserError, one_line_errors, reason
from common.files import check_can_be_made, check_writable, owned
from common.progress import progress
from config.configuration import Config, dump_config
from models.checkpoints import check_resumable, drop_old_checkpoints, load_state, newest_state, save_checkpoint
from models.diffusion import autocast
from training.evaluating import evaluation_figures
from training.monitoring import RunLog, estimate, report, sample_grid
from training.objective import RowDraws, batch_losses, row_generator, validation_losses
from training.personal import adapter_of
from training.run import Run, set_up
from training.stopping import StopRequest, before_the_first_step, leave_signals_to_the_main_process

MEASURED_STEPS = 6
TRAINING_SHARE = 0.95  # of a run's time; validation, samples and checkpoints take the others
LAST_PLACE = 2**32 - 2  # in a step, for what is drawn once and not for a row


def train(
    cfg: Config,
    task: str,
    dry_run: bool = False,
    resume: str | None = None,
    cache_only: bool = False,
    rebuild_cache: bool = False,
) -> Path | None:
    """Trains LoRA and aligner on one task and returns the last checkpoint (None after a dry run).

    task: "t2uv", "i2uv" or "joint". resume: a checkpoint's folder, or "auto" for the newest of this task, if there is
    one: the run goes on as if it had never stopped. SIGTERM and Ctrl-C save and raise SystemExit(STOPPED); before the
    first step Ctrl-C raises SystemExit(INTERRUPTED). Raises UserError for what the configuration or its files have
    wrong.
    """
    with before_the_first_step():
        for folder in (Path(cfg.output.out_dir) / task, cfg.output.log_dir):
            check_can_be_made(folder)
        if resume not in (None, "auto"):
            check_resumable(Path(resume))
        run = set_up(cfg, task, rebuild_cache)
        cfg, output = run.cfg, run.cfg.output
        if cache_only:
            processes.say(report(run))
            return None
        checkpoint = go_on_from(run, resume)
        processes.say(dump_config(cfg))
        processes.say(report(run))
        processes.say(f"resume    {f'{checkpoint} at step {run.global_step}' if checkpoint else 'no: from the start'}")
        batches = open_batches(run)
        if dry_run:
            with one_line_errors():
                processes.say(estimate(next(batches), run))
            return None
        check_writable(run.folder)
        check_writable(output.log_dir)
        gc.collect()
        gc.freeze()  # models and data set live to the end: what is collected later need not walk through them

    alone = owned(run.folder) if processes.is_main() else nullcontext()
    with alone, StopRequest(says_so=processes.is_main()) as stop:
        log, steps = RunLog(run), steps_to_go(run)
        began, first_step = time.perf_counter(), run.global_step + 1
        for global_step in steps:
            with log.counting_flops():
                losses, prompts = optimizer_step(run, global_step, batches, log)
            if run.skipped > cfg.training.max_skipped_steps:
                raise diverged(run, global_step, checkpoint, prompts)
            run.global_step = global_step
            log.step(losses)
            if cfg.model.compile and global_step == first_step:
                processes.say(f"\ncompiled, and a first step taken, in {time.perf_counter() - began:.0f} s")

            is_last = global_step == run.total_steps
            is_stopping = processes.any_process(stop.requested, run.base.device)
            if is_last or global_step % output.log_every == 0:
                steps.set_postfix(shown_losses(log.flush(global_step)))
            if run.validation and (is_last or global_step % output.validate_every == 0):
                with log.paused(), run.averaged(), run.evaluating():
                    log.scalars(validation_losses(run), global_step)
            if output.evaluate_every and (is_last or global_step % output.evaluate_every == 0):
                evaluate(run, log, global_step)
            is_best = False
            if run.watch and (is_last or global_step % cfg.personal.measure_every == 0):
                with log.paused(), run.averaged(), run.evaluating(), autocast(run.base.device, run.precision):
                    measure = run.watch.measure(global_step)
                log.scalars({"personal/identity": measure.identity, "personal/prior": measure.prior}, global_step)
                is_best, is_last = measure is run.watch.best, is_last or run.watch.is_over
            if is_last or is_stopping or is_best or global_step % output.save_every == 0:
                checkpoint = save(run)
            if is_stopping and not is_last:
                log.close()
                goes_on = "the same command" if run.watch else "--resume auto"
                processes.say(f"stopped at step {global_step}, saved in {checkpoint}; {goes_on} goes on")
                raise SystemExit(STOPPED)
            if processes.is_main() and (is_last or global_step % output.sample_every == 0):
                with log.paused(), run.averaged(), run.evaluating():
                    log.image("samples", sample_grid(run), global_step)
            if is_last:
                break
    steps.close()
    log.close()
    if run.watch:
        checkpoint = run.watch.finish(run.folder)
    processes.say(f"checkpoint: {checkpoint}")
    return checkpoint


def evaluate(run: Run, log: RunLog, global_step: int) -> None:
    """The small fixed evaluation of the weights to keep, into TensorBoard and onto the terminal, with its cost."""
    began = time.perf_counter()
    with log.paused(), run.averaged(), run.evaluating():
        figures = evaluation_figures(run)
    log.scalars(figures, global_step)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    seconds = time.perf_counter() - began
    processes.say(f"\nstep {global_step}: {shown}; {seconds:.1f} s")


def optimizer_step(
    run: Run, global_step: int, batches: Iterator[dict], log: RunLog
) -> tuple[dict[str, float], list[str]]:
    """One step over the micro-batches of all processes → the mean of each loss, and this process's prompts.

    A gradient that is not finite changes nothing and is counted in run.skipped.
    """
    seed, rank, batch_size = run.cfg.training.seed, processes.rank(), run.schedule.batch_size
    mean_losses, prompts = defaultdict(float), []
    # LoRA's dropout draws from torch's own stream.
    torch.manual_seed(row_generator(seed, global_step, LAST_PLACE - rank).initial_seed())
    for micro_step in range(run.accumulation):
        with log.waiting(), one_line_errors():
            batch = next(batches)
        prompts += batch["prompt"]
        first_place = (micro_step * processes.world_size() + rank) * batch_size
        draws = RowDraws(seed, global_step, range(first_place, first_place + batch_size))
        for losses in batch_losses(run, batch, draws):
            # Backward before the next condition's forward: one UNet graph is alive at a time.
            run.scaler.scale(losses["loss/combined"] / run.accumulation).backward()
            for name, loss in losses.items():
                mean_losses[name] = mean_losses[name] + loss.detach() / run.accumulation

    gradients = [parameter.grad for parameter in run.parameters if parameter.grad is not None]
    processes.mean_over_processes([*gradients, *(loss.view(1) for loss in mean_losses.values())])
    run.scaler.unscale_(run.optimizer)
    gradient_norm = torch.nn.utils.clip_grad_norm_(run.parameters, run.schedule.max_grad_norm)
    is_finite = bool(gradient_norm.isfinite())
    scalars = {"learning_rate": run.lr_scheduler.get_last_lr()[0], "skipped_steps": float(not is_finite)}
    if is_finite:
        scalars |= {name: loss.item() for name, loss in mean_losses.items()}
        scalars["gradient_norm"] = gradient_norm.item()
        run.skipped = 0
        run.scaler.step(run.optimizer)
        if run.ema:
            run.ema.step(run.parameters)
    elif run.scaler.get_scale() <= 1:  # an fp16 overflow lowers the scale and is no divergence until that is down
        run.skipped += 1
    run.scaler.update()
    run.lr_scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    return scalars, prompts


def go_on_from(run: Run, resume: str | None) -> Path | None:
    """Restores the run from the checkpoint that `train` is told to resume from → that checkpoint, None without one.

    With training.<task>.max_minutes the run's length is measured once: a resumed run keeps it, so that it ends as an
    undisturbed one would; other minutes than the checkpoint's begin where that stands.
    """
    checkpoint = newest_state(run.folder) if resume == "auto" else Path(resume) if resume else None
    state = load_state(checkpoint, run.cfg, run.task) if checkpoint else {"global_step": 0}
    try:
        if minutes := run.schedule.max_minutes:
            is_measured = state.get("max_minutes") == minutes
            run.train_until(state["total_steps"] if is_measured else state["global_step"] + steps_in(run, minutes))
        if checkpoint:
            run.restore(state)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if not checkpoint:
            raise
        text = f"{checkpoint} does not hold what this run needs ({reason(error)}); resume from an earlier checkpoint"
        raise UserError(text) from error
    return checkpoint


def steps_in(run: Run, minutes: float) -> int:
    """Optimiser steps that this machine does in that time, by the median of a few that change nothing."""
    batches, seconds = open_batches(run), []
    draws = RowDraws(run.cfg.training.seed, 0, range(run.schedule.batch_size))
    for _ in range(MEASURED_STEPS):
        began = time.perf_counter()
        with one_line_errors():
            batch = next(batches)
        for losses in batch_losses(run, batch, draws):
            losses["loss/combined"].backward()
        torch.stack([parameter.grad.sum() for parameter in run.parameters if parameter.grad is not None]).tolist()
        seconds.append(time.perf_counter() - began)
    run.optimizer.zero_grad(set_to_none=True)
    a_step = statistics.median(seconds[1:]) * run.accumulation  # the first one compiles and allocates
    steps = torch.tensor(max(1, int(60 * minutes * TRAINING_SHARE / a_step)), device=run.base.device)
    processes.copy_from_main([steps])
    return int(steps)


def steps_to_go(run: Run) -> tqdm:
    """The numbers of the optimiser steps that are left, under a progress bar."""
    done = run.global_step
    total = done if run.watch and run.watch.is_over else run.total_steps  # killed between its end and its result
    return progress(range(done + 1, total + 1), run.task, unit="step", initial=done, total=total)


def shown_losses(scalars: dict[str, float]) -> dict[str, str]:
    """The losses among what was logged, for the progress bar."""
    return {name.removeprefix("loss/"): f"{value:.3f}" for name, value in scalars.items() if "loss/" in name}


def save(run: Run) -> Path:
    """Writes a checkpoint, in the main process, and drops old ones."""
    folder = run.folder / f"step-{run.global_step:06d}"
    if processes.is_main():
        state = run.state()
        with run.averaged():
            adapter = adapter_of(run.cfg) if run.task == "personal" else None
            aligner = None if run.task == "fast" else run.aligner  # the checkpoint's own, which stays as it is
            save_checkpoint(
                folder, run.cfg, run.task, run.global_step, run.base, aligner, state, adapter, run.partial_input
            )
        drop_old_checkpoints(run.folder, run.cfg.output.keep_last)
    processes.wait()
    return folder


def diverged(run: Run, global_step: int, checkpoint: Path | None, prompts: list[str]) -> UserError:
    rows = "; ".join(prompts[:4]) + ("; ..." if len(prompts) > 4 else "")
    return UserError(
        f"the gradient was not finite in {run.skipped} steps in a row, up to step {global_step} on the rows {rows!r}; "
        f"lower training.{run.task}.learning_rate. The last good checkpoint is {checkpoint or 'not yet written'}"
    )


def open_batches(run: Run) -> Iterator[dict]:
    """This process's batches from run.global_step on."""
    cfg, rank, count = run.cfg, processes.rank(), processes.world_size()
    start = run.global_step * run.accumulation * count + rank
    loader = DataLoader(
        run.dataset,
        batch_sampler=shuffled_batches(run.dataset, run.schedule.batch_size, cfg.training.seed, start, count),
        num_workers=cfg.data.num_workers,
        worker_init_fn=leave_signals_to_the_main_process,
        pin_memory=run.base.device.type == "cuda",
    )
    return iter(loader)


def shuffled_batches(
    dataset: ATLASLarge, batch_size: int, seed: int, start: int = 0, stride: int = 1
) -> Iterator[list[int]]:
    """Batches start, start + stride, ... of row numbers without end: each epoch its own order (ATLASLarge.shuffled), a
    remainder goes on into the next epoch.

    Epoch e has the numbers e * rows .. (e + 1) * rows - 1: the data set takes them for the same rows again.
    """
    rows = len(dataset)
    order, order_epoch = None, None
    for batch in itertools.count(start, stride):
        numbers = []
        for position in range(batch * batch_size, (batch + 1) * batch_size):
            epoch, place = divmod(position, rows)
            if epoch != order_epoch:
                order, order_epoch = dataset.shuffled(np.random.default_rng([seed, epoch])), epoch
            numbers.append(epoch * rows + int(order[place]))
        yield numbers
