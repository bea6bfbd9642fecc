"""TexturePipeline: from a prompt, pictures, or both to finished UV textures. infer_uv.py is its command line.

from infer_uv import TexturePipeline

pipeline = TexturePipeline.from_pretrained()
texture, = pipeline(prompt="a woman in a yellow dress")       # a 1024x1024 RGBA picture
texture.save("texture.png")
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError
from common.pictures import open_image, pixels_from_image
from config.configuration import DEFAULT_CONFIG, load_config
from lora_utils import merge_lora
from models.adapters import load_adapters, parse_adapter, weights_hash
from models.checkpoints import TrainedModel, load_trained, newest_checkpoint
from models.diffusion import autocast, encode_posterior, resolve_precision
from models.generation import conditions_of, finish_texture, generate_guided, joined, shares_of
from models.interchange import load_any
from models.settings import MASKED_STRENGTH, GenerationSettings
from render.regions import BODY_REGIONS, region_mask
from render.rigs import load_body
from render.uv_space import body_pixels


class TexturePipeline:
    """A trained model and the body whose UV layout its textures have."""

    def __init__(self, trained: TrainedModel, origin: str = ""):
        self.trained, self.origin = trained, origin
        merge_lora(trained.base)
        self.body_spec = trained.cfg.data.body or "anny"
        self.body = load_body(self.body_spec)
        self.settings = GenerationSettings.of(trained.cfg.inference)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path | None = None,
        config: str | Path = DEFAULT_CONFIG,
        overrides: Sequence[str] = (),
        lora: str | Path | None = None,
        aligner: str | Path | None = None,
        adapters: Sequence[str] = (),
    ) -> "TexturePipeline":
        """A checkpoint of any layout that interchange.py knows; None is the newest of your own, or the embedded one.

        config, overrides: name the base for weights that do not say theirs. lora, aligner: two files instead of a
        checkpoint. adapters: personal ones on its top, DIR or DIR:weight each. Raises UserError for what cannot be
        loaded.
        """
        overrides = list(overrides)
        cfg = load_config(config, overrides)
        if lora:
            origin = Path(lora)
            trained = load_trained(cfg, origin, Path(aligner) if aligner else None)
        else:
            origin = Path(checkpoint) if checkpoint else newest_checkpoint(cfg.output.out_dir)
            trained = load_any(origin, cfg, overrides)
        if adapters:
            load_adapters(trained.base, [parse_adapter(adapter) for adapter in adapters], weights_hash(origin))
        return cls(trained, str(origin))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str | None] | None = None,
        images: Sequence[Image.Image] | Sequence[Sequence[Image.Image]] = (),
        seeds: Sequence[int] = (0,),
        init_texture: Image.Image | None = None,
        mask: str | Image.Image | None = None,
        settings: GenerationSettings | None = None,
        on_step: Callable[[], None] = lambda: None,
        **asked,
    ) -> list[Image.Image]:
        """A texture for each seed: size x size RGBA, alpha the UV mask, colours running on past the islands' edges.

        prompt of any length; images: views of one person. A list of prompts, or of lists of images, has one for each
        seed; all are made at once. init_texture is edited: `strength` in (0, 1] of it is made anew, everywhere or
        where `mask` (a name of BODY_REGIONS, or a picture: white is made anew) says. settings: None is the
        checkpoint's own; asked: fields of GenerationSettings to change (img_weight, guidance_scale, size, ...).
        Larger sizes than the model's own are interpolated (bicubic). Raises UserError for what does not fit together.
        """
        if settings is None and mask is not None and asked.get("strength") is None:
            asked["strength"] = MASKED_STRENGTH
        settings = (settings or self.settings).changed(**asked)
        device, seeds = self.trained.base.device, list(seeds)
        prompts = [prompt] * len(seeds) if prompt is None or isinstance(prompt, str) else prompt
        people = [images] * len(seeds) if not images or isinstance(images[0], Image.Image) else images
        if not len(prompts) == len(people) == len(seeds):
            raise UserError(f"{len(prompts)} prompts and {len(people)} people for {len(seeds)} seeds")
        textures = {}
        with autocast(device, resolve_precision(self.trained.cfg.training.mixed_precision, device)):
            for rows, conditions in self._alike(prompts, people, settings):
                editing = {}
                if init_texture is not None:
                    editing = self._editing(init_texture, mask, settings.strength, len(rows))
                pixel_values = generate_guided(
                    self.trained,
                    conditions,
                    settings.negative_prompt,
                    [seeds[row] for row in rows],
                    settings.num_inference_steps,
                    sampler=settings.sampler,
                    eta=settings.eta,
                    on_step=on_step,
                    shares=shares_of(conditions, settings),
                    **editing,
                )
                textures |= zip(rows, pixel_values)
        finished = [
            finish_texture(textures[row], self.body, settings.size, settings.seam_fix) for row in range(len(seeds))
        ]
        if init_texture is None or mask is None:
            return finished
        return self._composited(finished, init_texture, mask, settings.size)

    def _alike(
        self, prompts: Sequence[str | None], people: Sequence[Sequence[Image.Image]], settings: GenerationSettings
    ) -> list[tuple[list[int], list[tuple[Tensor, float]]]]:
        """The rows that are guided alike, by as many conditions of the same scales, with these conditions together:
        encoder_hidden_states (B, L, D) and guidance scale of each."""
        encoded, rows_of_scales = {}, {}  # each condition is encoded once, though several seeds have it
        keys = [(prompt, *map(id, images)) for prompt, images in zip(prompts, people)]
        for row, (prompt, images, key) in enumerate(zip(prompts, people, keys)):
            if key not in encoded:
                encoded[key] = conditions_of(self.trained, prompt, list(images), settings)
            scales = tuple(scale for _, scale in encoded[key])
            rows_of_scales.setdefault(scales, []).append(row)
        return [(rows, joined([encoded[keys[row]] for row in rows])) for rows in rows_of_scales.values()]

    def _editing(self, init_texture: Image.Image, mask, strength: float, rows: int) -> dict:
        """The options of sample_latents that start from a texture, for that many rows."""
        base = self.trained.base
        side = (self.trained.cfg.data.resolution or base.native_resolution) // base.vae_scale
        pixels = body_pixels(init_texture, self.body, side * base.vae_scale)
        mean, _ = encode_posterior(base.vae, pixels[None].to(base.device))
        latents = (mean * base.vae.config.scaling_factor).expand(rows, -1, -1, -1)
        options = {"init_latents": latents, "strength": strength}
        if mask is not None:
            shares = self.mask(mask, side * base.vae_scale)[None, None]
            options["mask"] = F.max_pool2d(shares, base.vae_scale)[0, 0].to(base.device)
        return options

    def _composited(self, textures: list[Image.Image], init_texture: Image.Image, mask, size: int) -> list[Image.Image]:
        """The textures where the mask says, the texture they were made from elsewhere, to the bit."""
        original = init_texture
        if (original.mode, original.size) != ("RGBA", (size, size)):
            original = finish_texture(body_pixels(init_texture, self.body, size), self.body, size)
        share = Image.fromarray((self.mask(mask, size) * 255).byte().numpy())
        return [Image.composite(texture, original, share) for texture in textures]

    def mask(self, mask: str | Image.Image, size: int) -> Tensor:
        """A region's name or a picture → (size, size) in [0, 1], 1 where the texture is made anew.

        Raises UserError for a region that is unknown or that this body has not.
        """
        if isinstance(mask, Image.Image):
            return (pixels_from_image(mask.convert("RGB").resize((size, size))).mean(0) + 1) / 2
        return region_mask(self.body, mask, size)


def read_mask(mask: str | None) -> str | Image.Image | None:
    """What --mask names: a region stays a name, anything else is a picture's file."""
    return mask if mask is None or mask in BODY_REGIONS else open_image(mask)
