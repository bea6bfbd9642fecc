"""Seconds a texture against a plain diffusers pipeline: same LoRA, steps, guidance and size, one run, in turn.

    python benchmarks/bench_infer.py                 # the embedded checkpoint
    python benchmarks/bench_infer.py --compile       # both UNets compiled

Medians of --rounds; what is compared is UNet and autoencoder alone, without the finishing at 1024 texels, which is
given beside it.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import StableDiffusionPipeline

from common.processes import keep_freed_memory
from models.base import resolve_source
from models.checkpoints import EMBEDDED_CHECKPOINT
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=EMBEDDED_CHECKPOINT)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()

    pipeline = TexturePipeline.from_pretrained(args.checkpoint)
    trained = pipeline.trained
    settings, base, device = trained.cfg.inference, trained.base, trained.base.device
    plain = StableDiffusionPipeline.from_pretrained(resolve_source(trained.cfg.model.pretrained_model))
    plain.load_lora_weights(args.checkpoint)
    plain.scheduler = inference_scheduler(base.noise_scheduler, settings.sampler)
    plain.set_progress_bar_config(disable=True)
    plain.to(device, base.unet.dtype)
    if args.compile:
        base.unet.compile(dynamic=False)
        plain.unet.compile(dynamic=False)
    side = trained.cfg.data.resolution or base.native_resolution
    precision = resolve_precision(trained.cfg.training.mixed_precision, device)
    steps, guidance_scale = settings.num_inference_steps, settings.guidance_scale
    sampling = dict(num_inference_steps=steps, guidance_scale=guidance_scale, height=side, width=side)

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
        print(f"{rows} at once: {mine:.2f} s a texture, plain diffusers {other:.2f} s, {ratio:.2f} times as fast")
    texture = ours(1)[0]
    print(f"finishing at 1024 texels: {seconds(lambda: finish_texture(texture, pipeline.body), device):.2f} s")
    print(f"peak memory {(peak_memory(device) or 0) / 1e9:.2f} GB, both models loaded")


if __name__ == "__main__":
    main()
