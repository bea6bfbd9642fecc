"""One joint training step, ours against the structure of the seed's trainer and of diffusers' LoRA script.

    python benchmarks/bench_train.py                          # the embedded base on the CPU
    python benchmarks/bench_train.py                          # on CUDA: SD 1.5's shape, with the table for a card
    python benchmarks/bench_train.py --architecture sd21      # on CUDA: SD 2.1's
    python benchmarks/bench_train.py --batch-sizes 4 8 16 32  # ours, paired, at these; on CUDA: those of the table

The table for a card, some ten minutes: ours at growing batches until the memory is full, eager, compiled, with CUDA
graphs (reduce-overhead) and tuned (max-autotune), with the share of the card's peak; and which attention kernels ran.

seed: VAE, text encoder and CLIP in each step, two UNet passes with gradient checkpointing, one AdamW step. diffusers:
the structure of its text-to-image LoRA script once a task: VAE and encoder in each pass, no checkpointing, an AdamW
step each. Their arithmetic is right, and each reads a row once. Every variant takes a step in turn, in one process on
the same rows; medians. The last line is JSON.

    python benchmarks/bench_train.py --shared                 # alone, and beside a process that keeps one core busy
"""

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import torch
from sd_shapes import ARCHITECTURES, make_sd_shape, sd_settings
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from common.errors import exit_on_user_error
from common.files import PROJECT_ROOT
from config.configuration import DEFAULT_CONFIG, load_config
from models.conditioning import encode_images, encode_prompts
from models.diffusion import autocast, encode_posterior, sample_posterior, training_target
from training.loop import open_batches, optimizer_step, save, shuffled_batches
from training.monitoring import RunLog, peak_flops, peak_memory
from training.run import Run, set_up

WARM_UP = 3
COMPILER_MODES = ("false", "true", "reduce-overhead", "max-autotune")
CARD_BATCHES = [8, 16, 32, 64]
ATTENTION_KERNELS = ("flash", "fmha", "attention", "cudnn_generated_fort_native_sdpa")
OURS = {
    "ours, alternate": ["training.joint.schedule=alternate"],
    "ours, paired": ["training.joint.schedule=paired"],
    "ours, paired, compiled": ["training.joint.schedule=paired", "model.compile=true"],
}


class Plain:
    """Steps that encode everything each time, with the models of a run and rows that are not cached."""

    def __init__(self, run: Run, checkpointing: bool, steps_together: bool):
        self.run, self.steps_together = run, steps_together
        self.optimizer = torch.optim.AdamW(run.parameters, lr=1e-4)
        if checkpointing:
            run.base.unet.enable_gradient_checkpointing()
            run.base.unet.train()
        self.rows = shuffled_batches(run.dataset, run.schedule.batch_size, run.cfg.training.seed)

    def step(self) -> None:
        batch, latents = default_collate([self.run.dataset[row] for row in next(self.rows)]), None
        for kind in ("text", "image"):
            if latents is None or not self.steps_together:
                latents = self.encode(batch)
            self.loss(batch, latents, kind).backward()
            if kind == "image" or not self.steps_together:
                torch.nn.utils.clip_grad_norm_(self.run.parameters, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)

    def encode(self, batch: dict) -> torch.Tensor:
        base = self.run.base
        with autocast(base.device, self.run.precision):
            mean, std = encode_posterior(base.vae, batch["texture"].to(base.device))
        return sample_posterior(base.vae, mean, std, torch.randn_like(mean))

    def loss(self, batch: dict, latents: torch.Tensor, kind: str) -> torch.Tensor:
        base = self.run.base
        with autocast(base.device, self.run.precision):
            if kind == "text":
                with torch.no_grad():
                    states = encode_prompts(base, batch["prompt"])
            else:
                states = self.run.aligner(encode_images(base, batch["image"])).float()
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
            noisy_latents = base.noise_scheduler.add_noise(latents, noise, timesteps)
            noise_pred = base.unet(noisy_latents.to(base.unet.dtype), timesteps, states.to(base.unet.dtype)).sample
        return F.mse_loss(noise_pred.float(), training_target(base.noise_scheduler, latents, noise, timesteps))


class Ours:
    def __init__(self, run: Run):
        self.run, self.batches, self.log, self.number = run, open_batches(run), RunLog(run), 0

    def step(self) -> None:
        self.number += 1
        losses, _ = optimizer_step(self.run, self.number, self.batches, self.log)
        self.log.step(losses)


def timed(step, device: torch.device) -> float:
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def medians(variants: dict, steps: int, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds a step of each variant, which step in turn; and on CUDA the peak memory of each in GB."""
    times, peaks = {name: [] for name in variants}, {}
    for number in range(steps + WARM_UP):
        for name, variant in variants.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds = timed(variant.step, device)
            if number >= WARM_UP:
                times[name].append(seconds)
                peaks[name] = max(peaks.get(name, 0.0), (peak_memory(device) or 0) / 1e9)
    return {name: statistics.median(values) for name, values in times.items()}, peaks


def seconds_to_first_step(settings: list[str]) -> float:
    """From the command to the end of the first optimiser step of a run of its own."""
    began = time.perf_counter()
    command = [sys.executable, str(PROJECT_ROOT / "joint.py"), *(f"--{setting}" for setting in settings)]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, **pipes, start_new_session=True)
    text, seconds = "", None
    while seconds is None and (character := process.stderr.read(1)):
        text += character
        if text.endswith(" 1/100 "):
            seconds = time.perf_counter() - began
    process.send_signal(signal.SIGTERM)
    process.communicate()
    if seconds is None:
        raise SystemExit(text)
    return seconds


def seconds_of_a_step(settings: list[str], threads: int | None, is_shared: bool) -> float:
    """Median of a run of its own, alone or beside a process that never rests. threads: None is what joint.py
    chooses."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, __file__, "--own-steps", *settings]
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if is_shared else None
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(result.stdout.splitlines()[-1])
    finally:
        if busy:
            busy.kill()


def shared_machine(settings: list[str], rounds: int) -> dict[str, float]:
    """How a step slows down beside one busy process, with a thread for each core and as joint.py chooses; and what the
    choice costs alone. Medians of rounds, in turn."""
    cases = {(threads, is_shared): [] for threads in (os.cpu_count(), None) for is_shared in (False, True)}
    for _ in range(rounds):
        for (threads, is_shared), seconds in cases.items():
            seconds.append(seconds_of_a_step(settings, threads, is_shared))
    step = {case: statistics.median(seconds) for case, seconds in cases.items()}
    for (threads, is_shared), seconds in step.items():
        where = "beside a busy process" if is_shared else "alone"
        print(f"{f'{threads} threads' if threads else 'as joint.py chooses'}, {where}: {seconds:.3f} s")
    alone = step[os.cpu_count(), False]
    return {
        "contended_slowdown": round(step[None, True] / alone, 2),
        "contended_slowdown_all_threads": round(step[os.cpu_count(), True] / alone, 2),
        "idle_cost": round(step[None, False] / alone - 1, 3),
    }


def overhead(ours: Ours, step_seconds: float, device: torch.device) -> float:
    """Share of a run that logging and checkpointing take at the configured intervals."""
    output = ours.run.cfg.output
    flush, checkpoint = [], []
    for _ in range(5):
        ours.step()
        flush.append(timed(lambda: ours.log.flush(ours.number), device))
        checkpoint.append(timed(lambda: save(ours.run), device))
    extra = statistics.median(flush) / output.log_every + statistics.median(checkpoint) / output.save_every
    return extra / (step_seconds + extra)


def card_table(open_run: Callable[..., Run], device: torch.device, steps: int, batch_sizes: list[int]) -> dict:
    """Prints ours, paired, by compiler mode and batch size until the memory is full → the fastest row."""
    peak, best, flop_per_row = peak_flops(device) if device.type == "cuda" else None, {}, 0.0
    print("\n| compiler | batch | samples/s | share of the peak | GB | first step s |\n" + "| --- " * 6 + "|")
    for mode in COMPILER_MODES:
        for batch_size in batch_sizes:
            torch.compiler.reset()
            try:
                ours = Ours(open_run(batch_size, "training.joint.schedule=paired", f"model.compile={mode}"))
                if not flop_per_row:  # eager: compiled kernels are not counted
                    with FlopCounterMode(display=False) as counter:
                        ours.step()
                    flop_per_row = counter.get_total_flops() / (2 * batch_size)
                first = timed(ours.step, device)
                seconds, peaks = medians({"ours": ours}, steps, device)
            except torch.OutOfMemoryError:
                print(f"| {mode} | {batch_size} | out of memory | | | |", flush=True)
                break
            finally:
                ours = None
                gc.collect()
                torch.cuda.empty_cache()
            rate = 2 * batch_size / seconds["ours"]
            mfu = f"{rate * flop_per_row / peak:.1%}" if peak else "not known"
            row = [mode, batch_size, f"{rate:.1f}", mfu, f"{peaks['ours']:.1f}", f"{first:.0f}"]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
            if rate > best.get("samples_per_second", 0):
                best = {"compiler": mode, "batch_size": batch_size, "samples_per_second": round(rate, 1), "share": mfu}
    return best


def kernels_of_a_step(ours: Ours, device: torch.device) -> dict:
    """How many kernels (operators on the CPU) a step launches, and which of them are attention's."""
    on_card = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        timed(ours.step, device)
    counts = {event.key: event.count for event in profiler.key_averages()}
    names = [name for name in counts if any(word in name.lower() for word in ATTENTION_KERNELS)]
    return {"kernels": sum(counts.values()), "attention_kernels": sorted(name[:80] for name in names)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each variant")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[], help="also ours, paired, at each of these")
    parser.add_argument("--shared", action="store_true", help="only: beside a busy process, on the CPU")
    parser.add_argument("--rounds", type=int, default=3, help="of --shared")
    parser.add_argument("--own-steps", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument(
        "--architecture", choices=("embedded", *ARCHITECTURES), help="default: sd15 where there is CUDA"
    )
    parser.add_argument("--table", action="store_true", help="the table for a card, also without one")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    architecture = args.architecture or ("sd15" if device.type == "cuda" else "embedded")
    is_table = args.table or device.type == "cuda"
    datasets.disable_progress_bars()
    if args.own_steps is not None:
        one = {"ours": Ours(set_up(load_config(DEFAULT_CONFIG, args.own_steps), "joint"))}
        print(medians(one, args.steps, device)[0]["ours"])
        return

    with exit_on_user_error(), tempfile.TemporaryDirectory() as work:
        settings = [
            f"data.cache_dir={work}/cache",
            f"output.log_dir={work}/logs",
            f"output.out_dir={work}/checkpoints",
            "data.dataset=procedural:48",
            "data.views_per_texture=2",
            "data.validation_textures=0",
            "training.joint.gamma=0",
        ]
        if architecture in ARCHITECTURES:
            settings += sd_settings(make_sd_shape(architecture, Path(work, "base")))

        if args.shared:
            batch = [f"training.joint.{key}={args.batch_size}" for key in ("batch_size", "effective_batch_size")]
            set_up(load_config(DEFAULT_CONFIG, [*settings, *batch]), "joint")  # builds what all of them read
            print(json.dumps(shared_machine([*settings, *batch], args.rounds)))
            return

        def open_run(batch_size: int, *overrides: str) -> Run:
            batch = [f"training.joint.{key}={batch_size}" for key in ("batch_size", "effective_batch_size")]
            return set_up(load_config(DEFAULT_CONFIG, [*settings, *batch, *overrides]), "joint")

        plain = ["data.cache=none", "model.channels_last=false"]
        variants = {
            "seed": Plain(open_run(args.batch_size, *plain), checkpointing=True, steps_together=True),
            "diffusers": Plain(open_run(args.batch_size, *plain), checkpointing=False, steps_together=False),
            **{name: Ours(open_run(args.batch_size, *overrides)) for name, overrides in OURS.items()},
        }
        seconds, peaks = medians(variants, args.steps, device)
        speed = {name: 2 * args.batch_size / value for name, value in seconds.items()}  # both conditions of a row
        paired = variants["ours, paired"]
        threads, precision = torch.get_num_threads(), paired.run.precision or "off"
        print(f"{architecture}, batch {args.batch_size}, {device}, {threads} threads, autocast {precision}")
        for name in variants:
            milliseconds, speedup = 1000 * seconds[name], speed[name] / speed["seed"]
            memory = f"{peaks[name]:8.1f} GB" if device.type == "cuda" else ""
            rates = f"{milliseconds:8.0f} ms {speed[name]:8.1f} samples/s {speedup:6.2f} times the seed's"
            print(f"{name:<24}{rates}{memory}")
        best = max(OURS, key=speed.get)
        result = {
            "speedup_vs_seed": round(speed[best] / speed["seed"], 2),
            "speedup_vs_diffusers": round(speed[best] / speed["diffusers"], 2),
            "paired_vs_seed": round(speed["ours, paired"] / speed["seed"], 2),
            "overhead": round(overhead(paired, seconds["ours, paired"], device), 4),
        }
        with FlopCounterMode(display=False) as counter:
            paired.step()
        result["tflop_per_step"] = round(counter.get_total_flops() / 1e12, 3)
        if device.type == "cuda":
            reached = counter.get_total_flops() / seconds[best]
            result["mfu"] = round(reached / peak_flops(device), 3) if peak_flops(device) else None
        result |= kernels_of_a_step(paired, device)
        for batch_size in args.batch_sizes if not is_table else ():
            one = {"paired": Ours(open_run(batch_size, *OURS["ours, paired"]))}
            step_seconds, peak_gb = medians(one, args.steps, device)
            samples_per_second = 2 * batch_size / step_seconds["paired"]
            peak = f"{peak_gb['paired']:6.1f} GB"
            print(f"ours, paired, batch {batch_size:<4}{samples_per_second:8.1f} samples/s {peak}")
        del variants, paired
        if is_table:
            batch_sizes = args.batch_sizes or CARD_BATCHES
            result["fastest"] = card_table(open_run, device, args.steps, batch_sizes)
        result["seconds_to_first_step"] = round(seconds_to_first_step([*settings, "training.joint.max_steps=100"]), 1)
        result["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
