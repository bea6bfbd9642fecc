"""Makes UV textures from a prompt, a picture, or both.

python infer_uv.py --prompt "a woman in a green sweater and blue jeans"
python infer_uv.py --image person.jpg --turntable
python infer_uv.py --prompt "..." --image person.jpg --img-weight 0.5
"""

import argparse
import json
import re
from pathlib import Path

from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from checkpoints import TrainedModel, load_checkpoint, load_trained, newest_checkpoint
from configuration import DEFAULT_CONFIG, dotted_overrides, load_config
from diffusion import autocast, resolve_precision
from errors import UserError, exit_on_user_error
from files import check_writable, write_whole
from generation import ROWS_AT_ONCE, condition, finish_texture, generate
from images import encode_image, open_image, texture_pixels
from processes import keep_freed_memory
from render.turntable import save_turntable, turntable_frames
from render.utils import load_body


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", help="what the person looks like")
    parser.add_argument("--image", help="picture of a person")
    parser.add_argument("--img-weight", type=float, help="with both: 0 is text alone, 1 image alone (default: 0.5)")
    parser.add_argument("--checkpoint", help="checkpoint folder (default: the newest under output.out_dir)")
    parser.add_argument("--lora", help="instead of --checkpoint: a LoRA file or a PEFT folder, with --config")
    parser.add_argument("--aligner", help="with --lora: the aligner's .safetensors or .pth file")
    parser.add_argument("--config", help=f"with --lora, and for output.out_dir (default: {DEFAULT_CONFIG.name})")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the checkpoint's)")
    parser.add_argument("--guidance-scale", type=float, help="1 is none (default: the checkpoint's)")
    parser.add_argument("--negative-prompt", help="what to keep away from (default: the checkpoint's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first texture; the next ones count up")
    parser.add_argument("--num", type=int, default=1, help="how many textures")
    parser.add_argument("--out", default="outputs", help="folder, or a .png file for one texture (default: outputs)")
    parser.add_argument("--turntable", action="store_true", help="also write a GIF of the turning body")
    args, unknown = parser.parse_known_args()
    return args, dotted_overrides(unknown)


def check(args: argparse.Namespace) -> None:
    if args.prompt is not None and not args.prompt.strip():
        args.prompt = None
    if args.prompt is None and args.image is None:
        raise UserError("nothing to make a texture from: give --prompt, --image or both")
    if args.img_weight is not None and (args.prompt is None or args.image is None):
        raise UserError("--img-weight blends a prompt with a picture: give both --prompt and --image")
    if args.img_weight is not None and not 0 <= args.img_weight <= 1:
        raise UserError(f"--img-weight {args.img_weight} is outside 0 to 1")
    if args.checkpoint and (args.lora or args.aligner):
        raise UserError("give --checkpoint, or --lora and --aligner, not both")
    if args.aligner and not args.lora:
        raise UserError("--aligner needs --lora; a --checkpoint brings its own aligner")
    if args.num < 1 or (args.steps is not None and args.steps < 1):
        raise UserError("--num and --steps must be 1 or more")
    if args.guidance_scale is not None and args.guidance_scale < 1:
        raise UserError(f"--guidance-scale {args.guidance_scale} is below 1 (1 is no guidance)")
    if not 0 <= args.seed < 2**62:
        raise UserError(f"--seed {args.seed} is outside 0 to 2**62")
    if args.out.endswith(".png") and args.num > 1:
        raise UserError("--out names one file but --num asks for more; give a folder")
    if not args.out.endswith(".png") and Path(args.out).is_file():
        raise UserError(f"--out {args.out} is a file; give a folder or a name that ends in .png")


def load_model(args: argparse.Namespace, overrides: list[str]) -> tuple[TrainedModel, str]:
    """The model to run and where it came from."""
    cfg = load_config(args.config or DEFAULT_CONFIG, overrides)
    if args.lora:
        return load_trained(cfg, Path(args.lora), Path(args.aligner) if args.aligner else None), args.lora
    checkpoint = Path(args.checkpoint) if args.checkpoint else newest_checkpoint(cfg.output.out_dir)
    return load_checkpoint(checkpoint, overrides), str(checkpoint)


def output_paths(args: argparse.Namespace) -> list[Path]:
    """One PNG a texture: --out itself, or names in that folder made from the prompt or picture and the seed."""
    if args.out.endswith(".png"):
        return [Path(args.out)]
    source = args.prompt or Path(args.image).stem
    stem = re.sub(r"[^a-z0-9]+", "-", source.lower()).strip("-")[:60].strip("-") or "texture"
    if args.prompt and args.image:
        stem = f"{stem}-with-{Path(args.image).stem}"
    return [Path(args.out) / f"{stem}-{args.seed + index}.png" for index in range(args.num)]


def main():
    with exit_on_user_error():
        args, overrides = parse_args()
        check(args)
        keep_freed_memory()
        image = open_image(args.image) if args.image else None
        trained, origin = load_model(args, overrides)
        paths = output_paths(args)
        check_writable(paths[0].parent)

        defaults = trained.cfg.inference
        steps = args.steps or defaults.num_inference_steps
        guidance_scale = args.guidance_scale or defaults.guidance_scale
        negative_prompt = defaults.negative_prompt if args.negative_prompt is None else args.negative_prompt
        img_weight = 0.5 if args.img_weight is None else args.img_weight
        device, seeds = trained.base.device, [args.seed + index for index in range(args.num)]
        if steps > trained.base.noise_scheduler.config.num_train_timesteps:
            raise UserError(f"--steps {steps} is more than the base's noise schedule has")
        body_spec = trained.cfg.data.body or "anny"
        body = load_body(body_spec)
        precision = resolve_precision(trained.cfg.training.mixed_precision, device)
        with (
            autocast(device, precision),
            tqdm(total=steps * -(-args.num // ROWS_AT_ONCE), desc="denoising", unit="step") as progress,
        ):
            encoder_hidden_states = condition(trained, args.prompt, image, img_weight)
            textures = generate(
                trained, encoder_hidden_states.expand(args.num, -1, -1), negative_prompt, seeds, steps,
                guidance_scale, on_step=progress.update,
            )  # fmt: skip

        settings = {
            "prompt": args.prompt, "image": args.image, "negative_prompt": negative_prompt, "steps": steps,
            "guidance_scale": guidance_scale, "checkpoint": origin, "body": body_spec,
            "base": trained.cfg.model.pretrained_model,
            "img_weight": img_weight if args.prompt and args.image else None,
        }  # fmt: skip
        for path, texture, seed in zip(paths, textures, seeds):
            finished = finish_texture(texture, body)
            chunks = PngInfo()
            chunks.add_text("Software", "TexDreamer Joint")
            chunks.add_itxt("parameters", json.dumps({**settings, "seed": seed}, ensure_ascii=False))
            write_whole(path, encode_image(finished, format="PNG", pnginfo=chunks))
            print(path)
            if args.turntable:
                frames = turntable_frames(body, (texture_pixels(finished, finished.width) + 1) / 2)
                save_turntable(frames, path.with_suffix(".gif"))
                print(path.with_suffix(".gif"))


if __name__ == "__main__":
    main()
