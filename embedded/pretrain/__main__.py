"""Trains the embedded base from nothing: a Stable Diffusion in small, in the diffusers folder layout.

    python -m embedded.pretrain --out embedded/base      # an hour and a half on 2 cores; continues where it stopped
    python -m embedded.pretrain --stage autoencoder      # one stage, on what earlier ones wrote to --out

Seven stages, each on captioned renders of procedurally dressed bodies, on their textures in other UV layouts and on
painted pictures of anything; no picture shows a texture in Anny's own layout, so making those is left to the joint
training. `unet` needs the encoder that `latents` fits, not the decoder that `autoencoder` trains: two processes may run
these two stages at once.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from common.errors import UserError, exit_on_user_error, reason
from common.files import check_writable, write_whole
from embedded.pretrain.autoencoder import train_autoencoder
from embedded.pretrain.body_map import train_body_map
from embedded.pretrain.card import write_index_and_card
from embedded.pretrain.image_encoder import train_image_encoder
from embedded.pretrain.latents import build_latents
from embedded.pretrain.scenes import LAYOUTS, VIEWS
from embedded.pretrain.stage import Run
from embedded.pretrain.text_encoder import train_text_encoder
from embedded.pretrain.tokenizer import train_tokenizer
from embedded.pretrain.unet import train_unet
from models.diffusion import resolve_precision


class Stage(NamedTuple):
    """train(run, steps) writes `folder` and returns `train_stage`'s summary. needs: stages that it builds on."""

    train: Callable[[Run, int], dict]
    steps: int
    folder: str
    needs: tuple[str, ...] = ()


def build_tokenizer(run: Run, steps: int) -> dict:
    train_tokenizer(run.out)
    return {}  # no steps, no losses


STAGES = {
    "tokenizer": Stage(build_tokenizer, 0, "tokenizer"),
    "text_encoder": Stage(train_text_encoder, 3000, "text_encoder", ("tokenizer",)),
    "image_encoder": Stage(train_image_encoder, 5000, "image_encoder", ("tokenizer", "text_encoder")),
    "latents": Stage(build_latents, 0, "vae"),
    "unet": Stage(train_unet, 5000, "unet", ("tokenizer", "text_encoder", "latents")),
    "autoencoder": Stage(train_autoencoder, 16000, "vae", ("latents",)),
    "body_map": Stage(train_body_map, 4000, "body_map"),
}


def read_summaries(run: Run) -> dict[str, dict | None]:
    """By stage, of the stages that were begun; None for one that is to be run (again): see `run_stage`."""
    paths = {name: run.work / "stages" / f"{name}.json" for name in STAGES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def write_summary(run: Run, name: str, summary: dict | None) -> None:
    """A file a stage: two processes may run different stages at once."""
    write_whole(run.work / "stages" / f"{name}.json", json.dumps(summary).encode())


def run_stage(name: str, run: Run, steps: int) -> None:
    """Raises UserError, which names the stage to run first, unless all that this one builds on is there."""
    summaries = read_summaries(run)
    for needed in STAGES[name].needs:
        if summaries.get(needed, {}) is None or not (run.out / STAGES[needed].folder).is_dir():
            raise UserError(
                f"stage {name} builds on stage {needed}, which is not finished in {run.out}: "
                f"run `python -m embedded.pretrain --stage {needed}` first"
            )
    check_writable(run.out)
    check_writable(run.work)
    # Two stages may write one folder, so that it is there says nothing about the later one.
    for outdated in [name, *(later for later, stage in STAGES.items() if name in stage.needs)]:
        write_summary(run, outdated, None)
    summary = STAGES[name].train(run, steps)
    if summary:
        summary |= {"batch_scale": run.batch_scale, "device": run.device.type}
    write_summary(run, name, summary)


def parse_args() -> argparse.Namespace:
    name, layout = "python -m embedded.pretrain", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(name, description=__doc__, formatter_class=layout)
    parser.add_argument("--out", type=Path, default=Path("embedded/base"))
    parser.add_argument("--work", type=Path, default=Path("data_cache/pretrain"), help="renders and resumable state")
    parser.add_argument("--stage", choices=STAGES, help="this one alone (default: all)")
    parser.add_argument("--renders", type=int, default=8000)
    parser.add_argument("--outfits", type=int, default=4000, help="outfits rendered in several poses")
    for name, stage in STAGES.items():
        if stage.steps:
            parser.add_argument(f"--{name.replace('_', '-')}-steps", type=int, default=stage.steps)
    parser.add_argument("--batch-scale", type=int, default=1, help="times the batch of every stage, on a card")
    parser.add_argument("--mixed-precision", choices=("auto", "no", "bf16", "fp16"), default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main():
    args = parse_args()
    with exit_on_user_error():
        try:
            device = torch.device(args.device)
        except RuntimeError as error:
            raise UserError(f"--device {args.device}: {reason(error)}") from None
        precision = resolve_precision(args.mixed_precision, device)
        run = Run(args.out, args.work, args.renders, args.outfits, device, precision, args.batch_scale)
        for name in [args.stage] if args.stage else STAGES:
            run_stage(name, run, getattr(args, f"{name}_steps", 0))
        summaries = read_summaries(run)
        summaries = {name: summaries[name] for name in STAGES if summaries.get(name)}
        facts = dict(renders=run.renders, outfits=run.outfits, views=VIEWS, layouts=LAYOUTS)
        facts.update(precision=str(precision or torch.float32))
        if all(name in summaries for name, stage in STAGES.items() if stage.steps):
            write_index_and_card(run.out, facts, summaries)
        print(json.dumps(facts | summaries))


if __name__ == "__main__":
    main()
