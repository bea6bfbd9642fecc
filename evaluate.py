"""Measures textures: how near the true ones, how they look on the body, whether they follow prompt and picture.

    python evaluate.py --limit 200                              # the newest checkpoint on held-out procedural outfits
    python evaluate.py --checkpoint DIR --data DIR --task i2uv --extractor clip --extractor inception
    python evaluate.py --limit 200 --base                       # the base alone, before joint training: prompts only
    python evaluate.py --textures DIR --prompts FILE            # what another system made
    python evaluate.py --compare A B                            # two --out folders: differences, samples needed

Textures are made under --out, once: the same command goes on where it stopped, and `accelerate launch --multi_gpu`
shares them. Written there: results.json, results.md, report.html, TensorBoard's scalars. docs/metrics.md defines every
measure; each has its 95 % interval, or says why there is none.

The procedural set is the default: prompts are combinations that training never saw; pictures are renders of such
textures in unseen poses and cameras. A colour is right when, of all the words for it, the nearest to the region's
median (CIELAB) is the prompt's. Patterns are told apart by a linear classifier fitted to true textures; sleeves and
legs are long where elbows and shins look like cloth. `truth` measures the true textures, `autoencoder` those that
have been through it, which bounds what any latents can show. For pictures also PSNR and SSIM inside the UV mask,
and PSNR apart for texels that the picture shows and those it hides, and the distance of the skin's colour in
CIELAB. `sentences` are prompts written by hand: `forms` that no training caption has, and `synonyms`. `both` gives
a prompt and a picture of another person, for a quarter of them, and counts, where the two disagree, whose colour
the texture has. The last line is JSON.
"""

import argparse
import json

from common.errors import UserError, exit_on_user_error
from common.files import check_writable
from config.configuration import DEFAULT_CONFIG, FAST_STEPS, dotted_overrides, load_config


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made = parser.add_argument_group("what is measured")
    made.add_argument("--checkpoint", help="checkpoint folder (default: the newest under output.out_dir)")
    made.add_argument("--fast", type=int, choices=FAST_STEPS, help="so few steps, by the checkpoint's fast adapter")
    made.add_argument("--base", action="store_true", help="the configured base without LoRA and aligner")
    made.add_argument("--textures", help="a folder of textures that another system made, or a table as ATLAS has it")
    made.add_argument(
        "--prompts", help="of --textures: CSV or JSONL with file names, or a line for each in their order"
    )
    made.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two folders that --out named, or results.json")
    against = parser.add_argument_group("against what")
    data = "a data set of build_atlas_large.py, or procedural; --textures need none (default: procedural)"
    against.add_argument("--data", help=data)
    against.add_argument("--task", choices=("t2uv", "i2uv", "both"), default="both", help="default: both")
    against.add_argument("--limit", type=int, default=200, help="samples (default: %(default)s)")
    networks = "embedded (default), clip, clip-336, clip-b32, inception, or a CLIP model's folder; several times"
    against.add_argument("--extractor", action="append", metavar="NAME|FOLDER", help=networks)
    against.add_argument("--face-model", help="a TorchScript file of a face recognition network")
    parser.add_argument("--out", default="outputs/evaluation", help="folder (default: %(default)s)")
    args, unknown = parser.parse_known_args()
    args.extractor = list(dict.fromkeys(args.extractor or ["embedded"]))
    return args, dotted_overrides(unknown)


def check(args: argparse.Namespace) -> None:
    if args.limit < 1:
        raise UserError("--limit must be 1 or more")
    if args.base and args.checkpoint:
        raise UserError("--base measures no checkpoint: give one of the two")
    if args.fast and args.base:
        raise UserError("--base has no fast adapter: give a --checkpoint")
    if args.textures and (args.base or args.checkpoint or args.fast):
        raise UserError("--textures are made already: leave out --checkpoint, --base and --fast")
    if args.prompts and not args.textures:
        raise UserError("--prompts belong to --textures; a checkpoint is measured on the prompts of --data")
    if args.base and args.task == "i2uv":
        raise UserError("--base reads no pictures: give --task t2uv")
    check_writable(args.out)


def main():
    with exit_on_user_error():
        args, overrides = parse_args()
        if args.compare:
            from evaluation.comparison import compare, comparison_table

            rows = compare(*args.compare)
            print(comparison_table(rows), json.dumps(rows, allow_nan=False), sep="\n")
            return
        cfg = load_config(DEFAULT_CONFIG, overrides)  # before `check`, which makes --out's folder
        check(args)
        from common import processes  # takes seconds, as what follows, which --help need not wait for
        from evaluation.report import summary
        from evaluation.running import evaluate_model, evaluate_textures

        processes.keep_freed_memory()
        results = evaluate_textures(args, cfg) if args.textures else evaluate_model(args, cfg, overrides)
    if results is not None:  # the main process's
        print(json.dumps(summary(results), indent=1, ensure_ascii=False))
        print(json.dumps(summary(results), ensure_ascii=False))


if __name__ == "__main__":
    main()
