"""How a texture is made: every choice but what it shows, in one place, from the command line to the file and back."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common.errors import UserError, reason
from common.pictures import encode_image
from common.text import parse_json, read_text
from config.configuration import Inference

LARGEST = sys.float_info.max  # JSON has whole numbers beyond it
# Least and greatest of what a user may ask for.
RANGES = {
    "num_inference_steps": (1, LARGEST),
    "eta": (0, 1),
    "guidance_scale": (1, LARGEST),
    "text_guidance": (0, LARGEST),
    "image_guidance": (0, LARGEST),
    "img_weight": (0, 1),
    "strength": (0.01, 1),
    "size": (1, 16_384),
}
BLEND = "pulls of one length"  # how img_weight joins two, see diffusion.blended; changed with the rule
ADDED_LATER = ("relight", "mirror_fill")  # settings that textures made before them do not say
MASKED_STRENGTH = 1.0  # what a mask names is made anew altogether, unless a strength is asked for


@dataclass(frozen=True)
class GenerationSettings:
    """Resolved once, from a checkpoint's configuration and what was asked for; used; and written into the file.

    img_weight: of a picture given with a prompt, 0 text alone to 1 picture alone, by BLEND; None: the two are not
    blended, but their pulls add up. text_guidance and image_guidance are the scales of a prompt and of a picture, alone
    or together; guidance_scale is that of one alone whose own is 0. strength: share of an edited texture that is made
    anew. size: side in texels. relight: the light of a fitted picture is divided out of its pixels; mirror_fill: what
    it hides on one side is taken from the other.
    """

    num_inference_steps: int
    sampler: str
    guidance_scale: float
    text_guidance: float
    image_guidance: float
    negative_prompt: str
    img_weight: float | None = 0.5
    eta: float = 0.0
    strength: float = 0.6
    size: int = 1024
    seam_fix: bool = True
    relight: bool = True
    mirror_fill: bool = False

    def __post_init__(self):
        check_ranges({name: getattr(self, name) for name in RANGES}, str)

    @classmethod
    def of(cls, inference: Inference) -> "GenerationSettings":
        """What a checkpoint says of itself."""
        image_guidance = inference.image_guidance_scale or inference.guidance_scale
        return cls(
            inference.num_inference_steps,
            inference.sampler,
            inference.guidance_scale,
            text_guidance=inference.guidance_scale,
            image_guidance=image_guidance,
            negative_prompt=inference.negative_prompt,
        )

    def changed(
        self,
        guidance_scale: float | None = None,
        text_guidance: float | None = None,
        image_guidance: float | None = None,
        **asked,
    ) -> "GenerationSettings":
        """The same but for what is asked for; None asks for nothing. guidance_scale is for text, picture and blend."""
        changes = {name: value for name, value in asked.items() if value is not None}
        if guidance_scale is not None:
            changes |= dict.fromkeys(("guidance_scale", "text_guidance", "image_guidance"), guidance_scale)
        if text_guidance is not None or image_guidance is not None:
            changes |= {"text_guidance": text_guidance or 0.0, "image_guidance": image_guidance or 0.0}
            changes["img_weight"] = None
        return replace(self, **changes)


def check_ranges(values: dict, called: Callable[[str], str]) -> None:
    """Raises UserError for a value outside RANGES; None is none. called: a setting's name → what the user calls it."""
    for name, (least, greatest) in RANGES.items():
        value = values.get(name)
        if value is not None and not least <= value <= greatest:
            limits = f"{least} or more" if greatest == LARGEST else f"{least} to {greatest}"
            raise UserError(f"{called(name)} {value}: give {limits}")


def encode_described(texture: Image.Image, description: dict) -> bytes:
    """The texture's PNG with how it was made in its text chunks, for `read_description`."""
    chunks = PngInfo()
    chunks.add_text("Software", "TexDreamer Joint")
    chunks.add_itxt("parameters", json.dumps(description, ensure_ascii=False))
    return encode_image(texture, format="PNG", pnginfo=chunks)


def read_description(path: Path) -> dict:
    """What a texture's PNG, or a line of a manifest as a JSON file, says of how it was made. Raises UserError or
    OSError for what cannot be read, ValueError for what says nothing."""
    if path.suffix.lower() == ".json":
        description = parse_json(read_text(path))
    else:
        try:
            with Image.open(path) as image:
                text = image.text["parameters"]
        except (AttributeError, KeyError):
            raise ValueError("it holds no 'parameters'") from None
        except (Image.DecompressionBombError, SyntaxError) as error:  # PIL's, of a damaged PNG
            raise ValueError(reason(error)) from None
        description = parse_json(text)
    if not isinstance(description, dict):
        raise ValueError(f"it holds a {type(description).__name__}")
    return description


def read_settings(path: str | Path) -> dict:
    """The same with "settings" for all that belongs to GenerationSettings. Raises UserError for a file that does not
    say how it was made."""
    try:
        description = read_description(Path(path))
        names = [field.name for field in fields(GenerationSettings)]
        values = {name: description.pop(name) for name in names if name in description or name not in ADDED_LATER}
        texts = (description.get("checkpoint"), description["prompt"], *description["images"])
        if not all(text is None or isinstance(text, str) for text in texts) or "\0" in "".join(filter(None, texts)):
            raise ValueError("its prompt or names of files are no text")
        return {**description, "settings": GenerationSettings(**values)}
    except (UserError, OSError) as error:
        raise UserError(f"--settings {path}: {reason(error)}") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"--settings {path} does not say how it was made ({reason(error)}); give a PNG that infer_uv.py wrote, or "
            "a line of its manifest as a .json file"
        ) from None
