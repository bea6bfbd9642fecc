"""Seconds a texture against a plain diffusers pipeline: same LoRA, steps, guidance and size, one run, in turn.

    python benchmarks/bench_infer.py                 # the embedded checkpoint
    python benchmarks/bench_infer.py --compile       # both UNets compiled
    python benchmarks/bench_infer.py --fast 4        # against diffusers at 20 steps with guidance, and the command
    python benchmarks/bench_infer.py --architecture sd15 --compile max-autotune    # for a card: random weights, at 512

Medians of --rounds; what is compared is UNet and autoencoder alone, without the finishing at 1024 texels, which is
given beside it. The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import StableDiffusionPipeline
from sd_shapes import ARCHITECTURES, make_sd_checkpoint

from common.files import PROJECT_ROOT
from common.processes import keep_freed_memory
from config.configuration import FAST_STEPS, load_config
from models.base import resolve_source
from models.checkpoints import CONFIG_FILE, EMBEDDED_CHECKPOINT
from models.diffusion import autocast, inference_scheduler, resolve_precision
from models.generation import finish_texture, generate, prompt_condition
from models.pipeline import TexturePipeline
from training.monitoring import peak_memory

PROMPT = "a woman in a yellow dress"


def seconds(function, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def seconds_of_the_command(checkpoint: str, fast: int | None) -> float:
    """From the command to the written PNG of 1024 texels, a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(PROJECT_ROOT / "infer_uv.py"), "--checkpoint", str(checkpoint)]
        command += ["--prompt", PROMPT, "--out", str(Path(folder, "texture.png"))]
        command += ["--fast", str(fast)] if fast else []
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=EMBEDDED_CHECKPOINT)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of --architecture (default: %(default)s)")
    parser.add_argument("--architecture", choices=ARCHITECTURES, help="its shape instead of a checkpoint")
    parser.add_argument("--compile", nargs="?", const="default", metavar="MODE", help="of torch.compile")
    parser.add_argument("--fast", type=int, choices=FAST_STEPS, help="ours by the fast adapter, theirs as without")
    args = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as work:
        if args.architecture:
            args.checkpoint = make_sd_checkpoint(args.architecture, Path(work), args.steps)
        compare(args)


def compare(args: argparse.Namespace) -> None:
    pipeline = TexturePipeline.from_pretrained(args.checkpoint, fast=args.fast)
    trained, theirs_cfg = pipeline.trained, load_config(Path(args.checkpoint) / CONFIG_FILE)
    settings, base, device = trained.cfg.inference, trained.base, trained.base.device
    plain = StableDiffusionPipeline.from_pretrained(resolve_source(trained.cfg.model.pretrained_model))
    plain.load_lora_weights(args.checkpoint)
    plain.scheduler = inference_scheduler(base.noise_scheduler, theirs_cfg.inference.sampler)
    plain.set_progress_bar_config(disable=True)
    plain.to(device, base.unet.dtype)
    if args.compile:
        base.unet.compile(dynamic=False, mode=args.compile)
        plain.unet.compile(dynamic=False, mode=args.compile)
    side = trained.cfg.data.resolution or base.native_resolution
    precision = resolve_precision(trained.cfg.training.mixed_precision, device)
    steps, guidance_scale = settings.num_inference_steps, settings.guidance_scale
    slow = theirs_cfg.inference
    sampling = dict(num_inference_steps=slow.num_inference_steps, guidance_scale=slow.guidance_scale)
    sampling.update(height=side, width=side)
    result, prefix = {}, "fast_" if args.fast else ""

    for rows in (1, 8):

        def ours(rows=rows):
            with torch.no_grad(), autocast(device, precision):
                states = prompt_condition(trained, PROMPT).expand(rows, -1, -1)
                seeds = list(range(rows))
                return generate(trained, states, settings.negative_prompt, seeds, steps, guidance_scale)

        def theirs(rows=rows):
            latents = plain([PROMPT] * rows, output_type="latent", **sampling).images
            with torch.no_grad():  # by hand, for AutoencoderDC does not take the generator that the pipeline gives it
                plain.vae.decode(latents / plain.vae.config.scaling_factor)

        ours(), theirs()
        pairs = [(seconds(ours, device), seconds(theirs, device)) for _ in range(args.rounds)]
        mine, other = (statistics.median(times) / rows for times in zip(*pairs))
        ratio = statistics.median(there / here for here, there in pairs)
        result[prefix + ("speedup" if rows == 1 else "batch_speedup")] = round(ratio, 2)
        print(f"{rows} at once: {mine:.2f} s a texture, plain diffusers {other:.2f} s, {ratio:.2f} times as fast")
    texture = ours(1)[0]
    print(f"finishing at 1024 texels: {seconds(lambda: finish_texture(texture, pipeline.body), device):.2f} s")
    command_seconds = [seconds_of_the_command(args.checkpoint, args.fast) for _ in range(args.rounds)]
    result["seconds_command"] = round(statistics.median(command_seconds), 2)
    print(f"the whole command, to a PNG of 1024 texels: {result['seconds_command']:.2f} s")
    print(f"peak memory {(peak_memory(device) or 0) / 1e9:.2f} GB, both models loaded")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
