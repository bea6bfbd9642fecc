"""Measures a checkpoint on the procedural set, where the truth is known: does it follow the prompt and the picture?

    python evaluate.py --limit 200                     # the newest checkpoint, or --checkpoint DIR
    python evaluate.py --limit 200 --base              # the base alone, before joint training: prompts only

Prompts are combinations that training never saw; pictures are renders of such textures in unseen poses and cameras.
A colour is right when, of all the words for it, the nearest to the region's median (CIELAB) is the prompt's. Patterns
are told apart by a linear classifier fitted to true textures; sleeves and legs are long where forearms and shins look
like cloth. The same measures of the true held-out textures are reported as `truth`, and of those that have been
through the autoencoder, which bounds what any latents can show, as `autoencoder`. For pictures also PSNR and SSIM
inside the UV mask, and PSNR apart for texels that the picture shows and those it hides. `both` gives a prompt and a
picture of another person, for a quarter of them, and counts, where the two disagree, whose colour the texture has, by
--img-weight. The last line is JSON.
"""

import argparse
import json
from pathlib import Path

from common.errors import UserError, exit_on_user_error
from common.processes import keep_freed_memory
from config.configuration import DEFAULT_CONFIG, dotted_overrides, load_config
from evaluation.procedural import evaluate
from lora_utils import merge_lora
from models.base import load_configured_base, pick_device
from models.checkpoints import TrainedModel, load_checkpoint, newest_checkpoint
from models.diffusion import frozen_dtype, resolve_precision


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="checkpoint folder (default: the newest under output.out_dir)")
    parser.add_argument("--base", action="store_true", help="the configured base without LoRA and aligner")
    parser.add_argument("--limit", type=int, default=200, help="prompts, and pictures (default: %(default)s)")
    args, unknown = parser.parse_known_args()
    with exit_on_user_error():
        if args.limit < 1:
            raise UserError("--limit must be 1 or more")
        if args.base and args.checkpoint:
            raise UserError("--base measures no checkpoint: give one of the two")
        overrides = dotted_overrides(unknown)
        cfg = load_config(DEFAULT_CONFIG, overrides)
        if args.base:
            device = pick_device(cfg.training.device)
            dtype = frozen_dtype(resolve_precision(cfg.training.mixed_precision, device), device)
            trained = TrainedModel(load_configured_base(cfg.model, device, dtype), None, cfg)
        else:
            folder = Path(args.checkpoint) if args.checkpoint else newest_checkpoint(cfg.output.out_dir)
            trained = load_checkpoint(folder, overrides)
        keep_freed_memory()
        merge_lora(trained.base)
        result = evaluate(trained, args.limit)
    print(json.dumps(result, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
