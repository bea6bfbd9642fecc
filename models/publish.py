"""A checkpoint as a folder for the model hub: weights, and a card with pictures, prompts, data, figures and licence.

python evaluate.py --checkpoint embedded/checkpoint > figures.txt
python -m models.publish --checkpoint embedded/checkpoint --licence mit --metrics figures.txt --out outputs/hub
python -m models.publish --checkpoint embedded/checkpoint --licence mit --push-to-hub OWNER/NAME
"""

import argparse
from pathlib import Path

from diffusers import AutoencoderDC
from huggingface_hub import ModelCardData

from common.errors import UserError, exit_on_user_error, reason
from common.files import check_writable, push_folder, write_whole
from common.pictures import encode_image
from common.text import parse_json
from config.configuration import DEFAULT_CONFIG, load_config
from lora_utils import FAST_FOLDER, IMAGE_ENCODER_LORA_FILE, LORA_FILE
from models.checkpoints import ALIGNER_FILE, CONFIG_FILE, STATE_FILE, newest_checkpoint, read_state
from models.fast import ABOUT_FILE
from models.partial import PARTIAL_FILE
from models.pipeline import TexturePipeline
from render.turntable import contact_sheet
from render.uv_space import texture_pixels

SIZE = 512  # texels, of the card's textures

CARD = """---
{front_matter}
---

# {title}

Human UV textures from a prompt, a picture, or both: a LoRA{aligner} for `{base}`, trained on `{dataset}` in {steps}
steps ({task}).

{pictures}

```python
from infer_uv import TexturePipeline  # TexDreamer Joint

texture, = TexturePipeline.from_pretrained("FOLDER")(prompt="{prompt}")
```

The LoRA file loads in `StableDiffusionPipeline.load_lora_weights` as well; prompts are then to be written as
`{template}`.{decoding} UV layout: `{body}`. Licence: {licence}.

## Figures

{figures}
"""
# Where diffusers' plain call fails: it hands `generator` to `vae.decode`, which this autoencoder does not take.
DECODING = (
    ' With this base let the pipeline stop at `output_type="latent"`, and decode by '
    "`vae.decode(latents / vae.config.scaling_factor)`."
)
FIGURES = "From `evaluate.py`:\n\n| measure | value |\n| --- | --- |\n{rows}"


def read_metrics(path: str | None) -> dict[str, float]:
    """The shares in the last line of what evaluate.py printed → {"t2uv.color.top": 0.9, ...}; {} for None. Figures with
    an interval, reasons and lists are left to its report."""
    if path is None:
        return {}
    figures = {}

    def flatten(section: dict, prefix: str) -> None:
        for name, value in section.items():
            if isinstance(value, dict) and "value" not in value:
                flatten(value, f"{prefix}{name}.")
            elif not isinstance(value, (dict, str, list)):
                figures[prefix + name] = float(value)

    try:
        flatten(parse_json(Path(path).read_text().strip().splitlines()[-1]), "")
    except (OSError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"cannot read metrics {path} ({reason(error)}); give what evaluate.py printed") from None
    return figures


def write_card(
    pipeline: TexturePipeline, folder: Path, out: Path, title: str, licence: str, metrics: dict[str, float]
) -> None:
    """Writes out/README.md and its pictures; folder: the checkpoint."""
    cfg, state = pipeline.trained.cfg, read_state(folder)
    prompts = cfg.output.sample_prompts or ["a woman in a red dress"]
    widget, pictures = [], []
    for number, prompt in enumerate(prompts):
        (texture,) = pipeline(prompt=prompt, size=SIZE)
        sheet = contact_sheet(pipeline.body, (texture_pixels(texture, SIZE) + 1) / 2)
        write_whole(out / f"texture-{number}.png", encode_image(texture, format="PNG"))
        write_whole(out / f"body-{number}.png", encode_image(sheet, format="PNG"))
        widget.append({"text": prompt, "output": {"url": f"texture-{number}.png"}})
        pictures.append(f"*{prompt}*\n\n![texture](texture-{number}.png)\n\n![body](body-{number}.png)")
    base = cfg.model.pretrained_model
    is_hub_name = not Path(base).is_absolute() and base.count("/") == 1
    front_matter = ModelCardData(
        license=licence,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        widget=widget,
        base_model=base if is_hub_name else None,
        tags=["lora", "uv-texture", "human", "text-to-image", "image-to-image"],
    )
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in metrics.items())
    card = CARD.format(
        front_matter=front_matter.to_yaml(),
        title=title,
        aligner=" and an aligner of pictures" if pipeline.trained.aligner else "",
        base=base if is_hub_name else Path(base).name,
        dataset=Path(cfg.data.dataset).name,
        steps=state["global_step"],
        task=state["task"],
        pictures="\n\n".join(pictures),
        prompt=prompts[0],
        template=cfg.model.prompt_template,
        decoding=DECODING if isinstance(pipeline.trained.base.vae, AutoencoderDC) else "",
        body=pipeline.body_spec.partition(":")[0],
        licence=licence,
        figures=FIGURES.format(rows=rows) if rows else "Not measured.",
    )
    write_whole(out / "README.md", card.encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="of this project's layout (default: your newest one)")
    parser.add_argument("--licence", required=True, help="of the weights, by its name on the hub: mit, openrail++")
    parser.add_argument("--metrics", help="a file with what evaluate.py printed")
    parser.add_argument("--out", type=Path, default=Path("outputs/hub"), help="folder (default: %(default)s)")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the folder, OWNER/NAME")
    args = parser.parse_args()
    with exit_on_user_error():
        metrics = read_metrics(args.metrics)
        folder = args.checkpoint or newest_checkpoint(load_config(DEFAULT_CONFIG).output.out_dir)
        needed = (LORA_FILE, CONFIG_FILE, STATE_FILE)
        if not all((folder / name).is_file() for name in needed):
            raise UserError(f"{folder} is no checkpoint of this project: it needs {', '.join(needed)}")
        pipeline = TexturePipeline.from_pretrained(folder)
        check_writable(args.out)
        fast = (f"{FAST_FOLDER}/{name}" for name in (LORA_FILE, ABOUT_FILE))
        for name in (*needed, ALIGNER_FILE, IMAGE_ENCODER_LORA_FILE, PARTIAL_FILE, *fast):
            if (folder / name).is_file():
                write_whole(args.out / name, (folder / name).read_bytes())
        title = Path(args.push_to_hub or args.out).name
        write_card(pipeline, folder, args.out, title, args.licence, metrics)
        print(args.out / "README.md")
        if args.push_to_hub:
            push_folder(args.out, args.push_to_hub, "model")


if __name__ == "__main__":
    main()
