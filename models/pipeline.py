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
from common.pictures import body_pixels, open_image, pixels_from_image
from config.configuration import DEFAULT_CONFIG, load_config
from lora_utils import merge_lora
from models.checkpoints import TrainedModel, load_trained, newest_checkpoint
from models.conditioning import blend, same_length
from models.diffusion import autocast, encode_posterior, resolve_precision
from models.generation import finish_texture, generate_guided, picture_condition, prompt_condition
from models.interchange import load_any
from render.rasteriser import load_body
from render.regions import BODY_REGIONS, region_mask


class TexturePipeline:
    """A trained model and the body whose UV layout its textures have."""

    def __init__(self, trained: TrainedModel, origin: str = ""):
        self.trained, self.origin = trained, origin
        merge_lora(trained.base)
        self.body_spec = trained.cfg.data.body or "anny"
        self.body = load_body(self.body_spec)

    @classmethod
    def from_pretrained(
        cls, checkpoint: str | Path | None = None, config: str | Path = DEFAULT_CONFIG,
        overrides: Sequence[str] = (), lora: str | Path | None = None, aligner: str | Path | None = None,
    ) -> "TexturePipeline":  # fmt: skip
        """A checkpoint of any layout that interchange.py knows; None is the newest of your own, or the embedded one.

        config, overrides: name the base for weights that do not say theirs. lora, aligner: two files instead of a
        checkpoint. Raises UserError for what cannot be loaded.
        """
        overrides = list(overrides)
        cfg = load_config(config, overrides)
        if lora:
            return cls(load_trained(cfg, Path(lora), Path(aligner) if aligner else None), str(lora))
        folder = Path(checkpoint) if checkpoint else newest_checkpoint(cfg.output.out_dir)
        return cls(load_any(folder, cfg, overrides), str(folder))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str | None] | None = None,
        images: Sequence[Image.Image] | Sequence[Sequence[Image.Image]] = (),
        img_weight: float | None = None,
        guidance_scale: float | None = None,
        text_guidance: float | None = None,
        image_guidance: float | None = None,
        negative_prompt: str | None = None,
        steps: int | None = None,
        seeds: Sequence[int] = (0,),
        sampler: str | None = None,
        eta: float = 0.0,
        init_texture: Image.Image | None = None,
        strength: float = 1.0,
        mask: str | Image.Image | None = None,
        size: int = 1024,
        seam_fix: bool = False,
        on_step: Callable[[], None] = lambda: None,
    ) -> list[Image.Image]:
        """A texture for each seed: size x size RGBA, alpha the UV mask, colours running on past the islands' edges.

        prompt of any length; images: views of one person. A list of prompts, or of lists of images, has one for each
        seed; all are made at once. With both, img_weight blends them (0 text alone, 1 image alone), or text_guidance
        and image_guidance pull with a scale each. init_texture is edited: `strength` in (0, 1] of it is made anew,
        everywhere or where `mask` (a name of BODY_REGIONS, or a picture: white is made anew) says. Larger sizes than
        the model's own are interpolated (bicubic). None means the checkpoint's own setting.
        """
        trained, settings = self.trained, self.trained.cfg.inference
        device, seeds = trained.base.device, list(seeds)
        with autocast(device, resolve_precision(trained.cfg.training.mixed_precision, device)):
            prompts = [prompt] * len(seeds) if prompt is None or isinstance(prompt, str) else prompt
            people = [images] * len(seeds) if not images or isinstance(images[0], Image.Image) else images
            if not len(prompts) == len(people) == len(seeds):
                raise UserError(f"{len(prompts)} prompts and {len(people)} people for {len(seeds)} seeds")
            made, rows = {}, []  # each condition is made once, though several seeds have it
            for words, views in zip(prompts, people):
                key = (words, *map(id, views))
                if key not in made:
                    made[key] = self.conditions(words, views, img_weight, guidance_scale, text_guidance, image_guidance)
                rows.append(made[key])
            conditions = [
                (torch.cat(same_length(*states)), scales[0]) for states, scales in (zip(*part) for part in zip(*rows))
            ]
            options = {}
            if init_texture is not None:
                options = self._editing(init_texture, strength, mask, len(seeds))
            textures = generate_guided(
                trained, conditions, settings.negative_prompt if negative_prompt is None else negative_prompt, seeds,
                steps or settings.num_inference_steps, sampler=sampler or settings.sampler, eta=eta, on_step=on_step,
                **options,
            )  # fmt: skip
        finished = [finish_texture(texture, self.body, size, seam_fix) for texture in textures]
        if init_texture is None or mask is None:
            return finished
        kept = init_texture
        if (kept.mode, kept.size) != ("RGBA", (size, size)):
            kept = finish_texture(body_pixels(init_texture, self.body, size), self.body, size)
        share = Image.fromarray((self.mask(mask, size) * 255).byte().numpy())
        return [Image.composite(texture, kept, share) for texture in finished]

    def conditions(
        self, prompt, images, img_weight=None, guidance_scale=None, text_guidance=None, image_guidance=None
    ) -> list[tuple[Tensor, float]]:
        """encoder_hidden_states (1, L, D) and guidance scale of each: one, or two where text and image pull apart."""
        settings = self.trained.cfg.inference
        text = None if prompt is None else prompt_condition(self.trained, prompt)
        picture = picture_condition(self.trained, list(images)) if images else None
        if text is None and picture is None:
            raise UserError("nothing to make a texture from: give a prompt, pictures or both")
        scale = guidance_scale or settings.guidance_scale
        if text is None:
            return [(picture, image_guidance or guidance_scale or settings.image_guidance_scale or scale)]
        if picture is None:
            return [(text, text_guidance or scale)]
        if text_guidance is not None or image_guidance is not None:
            return [(text, text_guidance or 0.0), (picture, image_guidance or 0.0)]
        return [(blend(*same_length(text, picture), 0.5 if img_weight is None else img_weight), scale)]

    def _editing(self, init_texture: Image.Image, strength: float, mask, rows: int) -> dict:
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
