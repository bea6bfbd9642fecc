"""Examples of one person or one garment: a few UV textures of a body, with captions or without."""

import re
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from atlas_dataset.prompts import prompts_in_folder, read_prompts
from atlas_dataset.tables import fingerprint
from common.errors import UserError
from common.files import content_hash
from common.pictures import open_image, picture_files, pixels_from_image
from render.rigs import load_body
from render.uv_space import uv_mask

MOST_EXAMPLES = 20
LAYOUT_SIDE = 256  # texels at which layouts are compared
LEAST_OVERLAP = 0.8  # of a texture's texels with the body's; SMPL's own are 0.96, Anny's and SMPL's 0.60
FLAT = 6 / 127.5  # a colour that differs by less from the corner's, of [-1, 1], is background
LEAST_BACKGROUND = 0.02  # share of a picture that is flat, or nothing is known of its layout


class Examples(Dataset):
    """The textures of a folder as rows for `build_dataset`: encoded picture and prompt, which has the new word in it.

    captions: NAME.txt beside each NAME.png, or metadata, as `read_prompts` has it; None of them: the word alone.
    Raises UserError for no examples, for more than MOST_EXAMPLES (unless `limit` is None), and for a texture of another
    layout than the body's.
    """

    def __init__(self, folder: str | Path, body: str, word: str, class_prompt: str, limit: int | None = MOST_EXAMPLES):
        self.body, self.files = body, picture_files(folder)
        if limit and len(self.files) > limit:
            raise UserError(f"{folder} holds {len(self.files)} pictures; give 1 to {limit} examples")
        names = [file.name for file in self.files]
        captions = prompts_in_folder(Path(folder), names)
        self.captions = read_prompts(captions, names, len(names), Path(folder)) if captions else [word] * len(names)
        self.prompts = [with_word(caption, word, class_prompt) for caption in self.captions]
        for file in self.files:
            check_layout(open_image(file), uv_mask(load_body(body), LAYOUT_SIDE), file)

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        return fingerprint(content_hash(*(file.read_bytes() for file in self.files)), self.prompts)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def pair(self, index: int) -> str:
        return f"{self.files[index].name}: {self.prompts[index]}"

    def __getitem__(self, index: int) -> tuple[bytes, str]:
        return self.files[index].read_bytes(), self.prompts[index]


def with_word(caption: str, word: str, class_prompt: str) -> str:
    """A caption that says the word: in its own place, in that of the class ("a man in red" → "sks in red"), or before
    it."""
    if re.search(rf"\b{re.escape(word)}\b", caption, re.IGNORECASE):
        return caption
    named = re.compile(rf"\b{re.escape(class_prompt)}\b", re.IGNORECASE)
    return named.sub(word, caption, count=1) if named.search(caption) else f"{word}, {caption}"


def check_layout(image: Image.Image, mask: Tensor, file: Path) -> None:
    """Raises UserError unless a texture covers the texels of mask (S, S) bool. What it covers is told by its alpha, or
    by the flat colour round it; of a texture that has neither nothing is known, which is said on stderr."""
    if image.width != image.height:
        raise UserError(
            f"{file} is {image.width} x {image.height}, no square texture; say --pictures if these show a person"
        )
    covered = covered_texels(image, len(mask))
    if covered is None:
        print(f"note: {file} covers the whole square: it is taken for a texture of this body", file=sys.stderr)
        return
    overlap = float((covered & mask).sum() / (covered | mask).sum())
    if overlap < LEAST_OVERLAP:
        raise UserError(
            f"{file} is of another UV layout: it shares {overlap:.0%} of its texels with this body; convert it, or say "
            "--pictures if these show a person"
        )


def covered_texels(image: Image.Image, side: int) -> Tensor | None:
    """Which texels a texture has colours for → (side, side) bool; None where it does not tell."""
    pixels = pixels_from_image(image.resize((side, side), Image.Resampling.BOX))
    if image.mode == "RGBA" and bool((pixels[3] < 0).any()):
        return pixels[3] > 0
    is_flat = ((pixels[:3] - pixels[:3, :1, :1]).abs() < FLAT).all(0)
    return ~is_flat if float(torch.mean(is_flat.float())) > LEAST_BACKGROUND else None
