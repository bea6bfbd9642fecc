"""What makes the stages' folders one base: its index and its model card."""

import json
from pathlib import Path

from embedded.pretrain.latents import CHANNELS, SCALING_FACTOR, SPREAD
from models.base import load_base

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.0",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderDC"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
}
MODEL_CARD = """# The embedded base

A Stable Diffusion in small, so that everything runs where there is no model hub and no GPU. {megabytes:.1f} MB in half
precision: UNet {unet:.1f} M parameters on 32x32x{channels} latents of 256x256 pictures, autoencoder {vae:.1f} M, text
encoder {text_encoder:.1f} M, image encoder {image_encoder:.1f} M, a byte-level BPE of the prompts' own words.

A latent is linear in its 8x8 block of pixels: the three channels' means (deviation 1), then the principal components of
what the means leave, the largest first (deviation {detail}). The encoder (`AutoencoderDC`) is these weights and nothing
more. The decoder began as their pseudo-inverse and learned what lies across blocks.

`StableDiffusionPipeline` loads this folder. It hands `generator` to `vae.decode`, which `AutoencoderDC` does not take,
so let it stop at the latents:

```python
pipeline = StableDiffusionPipeline.from_pretrained("embedded/base", torch_dtype=torch.float32)
latents = pipeline(prompt, output_type="latent").images
pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample  # (B, 3, 256, 256) in [-1, 1]
```

Trained from nothing by `python -m embedded.pretrain` on {renders} captioned pictures, a quarter of them renders of
procedurally dressed bodies (Anny), the rest textures of such bodies in {layouts} UV layouts that are not Anny's own
(captions end with ", uv 0" to ", uv 11"); for the image encoder on {outfits} further outfits in {views} poses each; for
the autoencoder on patchworks of fabric and on painted noise, strokes, letters and blobs too. It never saw a texture in
the layout that joint training teaches. The text encoder learned to tell from captions, in many words and forms, what
the outfits are; the image encoder to tell it from pictures, where each region is and which colour it has, and to find
the caption. It is no use for anything but this project's demonstration and tests.

| stage | steps | batch, times its own | on | seconds | first loss | last loss |
| --- | --- | --- | --- | --- | --- | --- |
{stages}

The UNet's loss, by quarter of the timesteps from little noise to much: {losses}.
"""
STAGE_ROW = "| {name} | {steps} | {batch_scale} | {device} | {seconds} | {first_loss:.3f} | {last_loss:.3f} |"


def write_index_and_card(out: Path, facts: dict, summaries: dict[str, dict]) -> None:
    """Writes model_index.json and README.md into a base whose folders are all there.

    facts: renders, outfits, views, layouts. summaries: by stage, as `run_stage` writes them.
    """
    (out / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
    base = load_base(str(out))
    sizes = {name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in base.modules().items()}
    facts = {**facts, "channels": CHANNELS, "detail": float(SPREAD[-1] * SCALING_FACTOR)}
    megabytes = sum(path.stat().st_size for path in out.rglob("*.safetensors")) / 1e6
    stages = "\n".join(STAGE_ROW.format(name=name, **summary) for name, summary in summaries.items())
    quarters = summaries["unet"]["loss_of_groups"].items()
    losses = "; ".join(
        f"{group} {' / '.join(f'{loss:.3f}' for loss in of_quarters)}" for group, of_quarters in quarters
    )
    (out / "README.md").write_text(
        MODEL_CARD.format(megabytes=megabytes, stages=stages, losses=losses, **sizes, **facts)
    )
