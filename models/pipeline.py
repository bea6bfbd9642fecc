"""TexturePipeline: from a prompt, pictures, or both to finished UV textures. infer_uv.py is its command line.

from infer_uv import TexturePipeline

pipeline = TexturePipeline.from_pretrained()
texture, = pipeline(prompt="a woman in a yellow dress")       # a 1024x1024 RGBA picture
texture.save("texture.png")
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageChops
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError
from common.pictures import image_from_pixels, open_image, pixels_from_image
from config.configuration import DEFAULT_CONFIG, load_config
from lora_utils import merge_lora
from models.adapters import load_adapters, parse_adapter, weights_hash
from models.base import resolve_source
from models.body_map import BodyMap, load_body_map
from models.checkpoints import TrainedModel, load_trained, newest_checkpoint
from models.diffusion import autocast, decode_latents, encode_posterior, resolve_precision
from models.fast import load_fast
from models.generation import conditions_of, finish_texture, generate_guided, joined, shares_of
from models.interchange import load_any
from models.partial import attach, partial_channels
from models.settings import MASKED_STRENGTH, GenerationSettings
from render.projection import Fit, Sighting, aligned, blend_in, merge, sight_fit
from render.regions import BODY_REGIONS, region_mask
from render.rigs import load_body
from render.uv_space import body_pixels, fill_outside, uv_mask

FINEST = 2  # pixels of a picture's side for each texel of a texture's
LEAST_SEEN = 0.02  # of the body's texels, that a fitted picture is to show


class TexturePipeline:
    """A trained model and the body whose UV layout its textures have."""

    def __init__(self, trained: TrainedModel, origin: str = ""):
        self.trained, self.origin = trained, origin
        merge_lora(trained.base)
        if trained.partial_input is not None:
            attach(trained.base.unet, trained.partial_input)
        self.body_spec = trained.cfg.data.body or "anny"
        self.body = load_body(self.body_spec)
        self.settings = GenerationSettings.of(trained.cfg.inference)
        self.body_map: BodyMap | None = None  # read when it is first wanted

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path | None = None,
        config: str | Path = DEFAULT_CONFIG,
        overrides: Sequence[str] = (),
        lora: str | Path | None = None,
        aligner: str | Path | None = None,
        adapters: Sequence[str] = (),
        fast: int | None = None,
    ) -> "TexturePipeline":
        """A checkpoint of any layout that interchange.py knows; None is the newest of your own, or the embedded one.

        config, overrides: name the base for weights that do not say theirs. lora, aligner: two files instead of a
        checkpoint. adapters: personal ones on its top, DIR or DIR:weight each. fast: so many steps without guidance, by
        the checkpoint's fast adapter. Raises UserError for what cannot be loaded.
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
        if fast:
            trained = load_fast(trained, origin, fast)
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
        partial: Image.Image | Sequence[Image.Image] | None = None,
        on_preview: Callable[[Tensor], None] | None = None,
        **asked,
    ) -> list[Image.Image]:
        """A texture for each seed: size x size RGBA, alpha the UV mask, colours running on past the islands' edges.

        prompt of any length; images: views of one person. A list of prompts, or of lists of images, has one for each
        seed; all are made at once. init_texture is edited: `strength` in (0, 1] of it is made anew, everywhere or
        where `mask` (a name of BODY_REGIONS, or a picture: white is made anew) says. partial: of `own_pixels`, one or
        one a seed, in place of these two: what it shows is kept. settings: None is the checkpoint's own; asked: fields
        of GenerationSettings to change (img_weight, guidance_scale, size, ...). Larger sizes than the model's own are
        interpolated (bicubic). on_preview: told after each step the latents it leads to, for `preview`. Raises
        UserError for what does not fit together.
        """
        if partial is not None and init_texture is not None:
            raise UserError("give init_texture or partial, not both")
        if settings is None and (mask is not None or partial is not None) and asked.get("strength") is None:
            asked["strength"] = MASKED_STRENGTH
        settings = (settings or self.settings).changed(**asked)
        device, seeds = self.trained.base.device, list(seeds)
        prompts = [prompt] * len(seeds) if prompt is None or isinstance(prompt, str) else prompt
        people = [images] * len(seeds) if not images or isinstance(images[0], Image.Image) else images
        if not len(prompts) == len(people) == len(seeds):
            raise UserError(f"{len(prompts)} prompts and {len(people)} people for {len(seeds)} seeds")
        edits, partials = [], []  # one for all rows, or one a row
        if init_texture is not None:
            edits = [(init_texture, mask)]
        elif partial is not None:
            partials = [partial] if isinstance(partial, Image.Image) else list(partial)
            if len(partials) not in (1, len(seeds)):
                raise UserError(f"{len(partials)} partial textures for {len(seeds)} seeds")
            edits = [self._edit_of(partial_texture) for partial_texture in partials]
        textures = {}
        with autocast(device, resolve_precision(self.trained.cfg.training.mixed_precision, device)):
            for rows, conditions in self._alike(prompts, people, settings):
                editing = {}
                if edits:
                    edits_of_rows = edits if len(edits) == 1 else [edits[row] for row in rows]
                    is_soft = partial is not None
                    editing = self._editing(edits_of_rows, settings.strength, len(rows), is_soft)
                pixel_values = generate_guided(
                    self.trained,
                    conditions,
                    settings.negative_prompt,
                    [seeds[row] for row in rows],
                    settings.num_inference_steps,
                    sampler=settings.sampler,
                    eta=settings.eta,
                    on_step=on_step,
                    on_clean=on_preview,
                    shares=shares_of(conditions, settings),
                    **editing,
                )
                textures |= zip(rows, pixel_values)
        if partial is not None:
            textures = {row: self._blended(texture, partials[row % len(partials)]) for row, texture in textures.items()}
        edits = edits or [(None, None)]
        return [self._finished(textures[row], *edits[row % len(edits)], settings) for row in range(len(seeds))]

    def preview(self, latents: Tensor) -> Image.Image:
        """Latents (1, 4, h, w) of a step as a picture, the colours running on past the islands."""
        pixel_values = decode_latents(self.trained.base.vae, latents)[0].cpu()
        return image_from_pixels(fill_outside(pixel_values, uv_mask(self.body, pixel_values.shape[-1])))

    def own_pixels(
        self,
        images: Sequence[Image.Image],
        sightings: Sequence[Sighting | Fit],
        size: int | None = None,
        relight: bool | None = None,
        mirror_fill: bool | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> Image.Image:
        """What pictures of one person show of the texture → size x size RGBA, alpha how sure each texel is.

        sightings: for each picture where it shows the body, of `read_fit`, `read_iuv` or `find_body`; a fit that stands
        a little off is moved to where the picture has an outline. on_step: called after each picture. Raises UserError
        when they show next to nothing of the body.
        """
        settings = self.settings.changed(size=size, relight=relight, mirror_fill=mirror_fill)
        if len(images) != len(sightings):
            raise UserError(f"{len(sightings)} fits for {len(images)} pictures: give one for each")
        pixels, sighted = [], []
        for image, sighting in zip(images, sightings):
            image = image.convert("RGB")
            if isinstance(sighting, Fit):  # finer pixels than these say nothing more of a texel
                image.thumbnail((FINEST * settings.size,) * 2, Image.Resampling.LANCZOS)
                fit = aligned(self.body, sighting, pixels_from_image(image))
                sighting = sight_fit(self.body, fit, image.height, image.width, settings.size)
            pixels.append(pixels_from_image(image))
            sighted.append(sighting)
            on_step()
        for number, sighting in enumerate(sighted, 1):
            share = len(sighting.texel) / uv_mask(self.body, settings.size).sum().item()
            if share < LEAST_SEEN:
                raise UserError(f"picture {number} shows {share:.1%} of the body that its fit describes; give its own")
        colours, sure = merge(self.body, pixels, sighted, settings.relight, settings.mirror_fill)
        return image_from_pixels(torch.cat([colours, sure[None] * 2 - 1]))

    def find_body(self, image: Image.Image, size: int) -> Sighting:
        """Where a picture shows the texels of a size x size texture, by the base's body map. Raises UserError for a
        base without one, and for another body than Anny."""
        if self.body_spec != "anny":
            raise UserError(f"--fit auto knows Anny alone, not the body {self.body_spec!r}: give a file with --fit")
        if self.body_map is None:
            base = self.trained.cfg.model.pretrained_model
            self.body_map = load_body_map(resolve_source(base), self.trained.base.device)
        return self.body_map.sight(image, self.body, size)

    def _edit_of(self, partial: Image.Image) -> tuple[Image.Image, Image.Image]:
        """A partial texture as a texture to start from, and a mask of what is made anew: what it does not show."""
        size = partial.width
        pixels, inside = body_pixels(partial, self.body, size), uv_mask(self.body, size)
        whole = image_from_pixels(torch.cat([pixels[:3], inside[None] * 2.0 - 1]))
        return whole, ImageChops.invert(partial.getchannel("A"))

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

    def _editing(self, edits: list[tuple], strength: float, rows: int, is_soft: bool) -> dict:
        """The options of sample_latents that start from textures, one for all rows or one a row. edits: texture, and
        mask or None. is_soft: a latent whose texels are remade in part is held in part, not remade altogether."""
        base = self.trained.base
        side = (self.trained.cfg.data.resolution or base.native_resolution) // base.vae_scale
        pixels = torch.stack([body_pixels(texture, self.body, side * base.vae_scale) for texture, _ in edits])
        mean, _ = encode_posterior(base.vae, pixels.to(base.device))
        latents = (mean * base.vae.config.scaling_factor).expand(rows, -1, -1, -1)
        options = {"init_latents": latents, "strength": strength}
        if edits[0][1] is not None:
            shares = torch.stack([self.mask(mask, side * base.vae_scale)[None] for _, mask in edits])
            pool = F.avg_pool2d if is_soft else F.max_pool2d
            options["mask"] = pool(shares, base.vae_scale).to(base.device)
            if is_soft and self.trained.partial_input is not None:
                options["partial"] = partial_channels(latents, (1 - options["mask"]).expand(rows, -1, -1, -1))
        return options

    def _finished(
        self, texture: Tensor, init_texture: Image.Image | None, mask, settings: GenerationSettings
    ) -> Image.Image:
        """A generated texture (3, R, R); with a mask, the one it was made from outside it, to the bit."""
        size = settings.size
        if init_texture is None or mask is None:
            return finish_texture(texture, self.body, size, settings.seam_fix)
        original, remade = init_texture, self.mask(mask, size)
        if (original.mode, original.size) != ("RGBA", (size, size)):
            original = finish_texture(body_pixels(init_texture, self.body, size), self.body, size)
        kept = (pixels_from_image(original)[:3], 1 - remade)
        finished = finish_texture(texture, self.body, size, settings.seam_fix, kept)
        share = Image.fromarray((remade * 255).byte().numpy())
        return Image.composite(finished, original, share)

    def _blended(self, texture: Tensor, partial: Image.Image) -> Tensor:
        side = texture.shape[-1]
        pixels = body_pixels(partial, self.body, side)
        sure = pixels_from_image(partial.getchannel("A").convert("RGB").resize((side, side), Image.Resampling.BOX))
        return blend_in(self.body, texture.float().cpu(), pixels, (sure[0] + 1) / 2)

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
