"""What a prompt of ATLAS's form asks for, told from renders by a CLIP model that is asked which of all words fits best.

Zero-shot, as CLIP's authors classify pictures (Radford et al. 2021, 3.1): of the texts that name each word of a kind,
the nearest to the mean of the four views, in CLIP's space. By chance it is one in as many as there are words. How far
such an answer is to be trusted is the model's affair: the true textures' row is what it can tell.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from embedded.captions import with_article
from embedded.grammar import ETHNICITIES, HAIR, LEGS, PERSONS, STYLES, TOP_CUTS, Outfit
from evaluation.extractors import Extractor, text_features_of, unit

ATLAS_FORM = "white, woman, black shirt, striped jeans, black hair"
WORDS = {  # an attribute of Outfit → the words for it
    "ethnicity": tuple(ETHNICITIES), "person": PERSONS, "top_style": STYLES, "top": tuple(TOP_CUTS),
    "bottom_style": STYLES, "bottom": tuple(LEGS), "hair": tuple(HAIR),
}  # fmt: skip
TEXTS: dict[str, Callable[[Outfit], str]] = {
    "ethnicity": lambda outfit: f"a render of {with_article(outfit.ethnicity)} person",
    "person": lambda outfit: f"a render of {with_article(outfit.person)}",
    "top_style": lambda outfit: f"a render of a person wearing {with_article(f'{outfit.top_style} {outfit.top}')}",
    "top": lambda outfit: f"a render of a person wearing {with_article(outfit.top)}",
    "bottom_style": lambda outfit: f"a render of a person wearing {outfit.bottom_style} {outfit.bottom}",
    "bottom": lambda outfit: f"a render of a person wearing {outfit.bottom}",
    "hair": lambda outfit: f"a render of a person with {outfit.hair} hair",
}


def parse_prompt(prompt: str) -> Outfit | None:
    """A prompt of ATLAS's form in the grammar's words → what it asks for, its hair "" where a bald head leaves the
    colour open; None for any other."""
    fields = prompt.strip().strip('"').split(", ")
    if len(fields) < 4:
        return None
    ethnicity, person, *clothes = fields
    of_kind = {"hair": "", "sneakers": "", "beard": ""}
    is_bald, has_beard = "bald" in clothes, any(field == "beard" or field.endswith(" beard") for field in clothes)
    clothes = [field for field in clothes if field not in ("bald", "beard")]
    for noun in of_kind:
        described = [field for field in clothes if field.endswith(f" {noun}")]
        if described:
            clothes.remove(described[0])
            of_kind[noun] = described[0].removesuffix(f" {noun}")
    of_beard, (cut, _, colour) = of_kind.pop("beard"), of_kind["hair"].rpartition(" ")
    of_kind |= {"hair": of_beard if is_bald else colour, "hair_cut": "bald" if is_bald else cut, "beard": has_beard}
    garments = [field.partition(" ")[::2] for field in clothes] + [("", "")]
    (top_style, top), (bottom_style, bottom) = garments[:2]
    outfit = Outfit(ethnicity, person, top_style, top, bottom_style, bottom, **of_kind)
    named = {kind: getattr(outfit, kind) for kind in WORDS}
    is_known = all(word in WORDS[kind] or not word for kind, word in named.items())
    return outfit if is_known and ", ".join(fields) == outfit.prompt else None


def told_attributes(extractor: Extractor, features: Tensor, prompts: list[str]) -> dict[str, Tensor] | str:
    """Whether a network finds in each texture what its prompt names: a kind of WORDS → (N,) of 0 and 1, NaN where the
    prompt names none; or what it needs. features: (N, V, D) of the textures' renders by extractor."""
    outfits = [parse_prompt(prompt) for prompt in prompts]
    if not any(outfits):
        return f"attributes need prompts of ATLAS's form, as {ATLAS_FORM!r}"
    asked = {}  # (kind, number of the sample) → the texts of all its words
    for number, outfit in enumerate(outfits):
        for kind, words in WORDS.items():
            if outfit and getattr(outfit, kind):
                asked[kind, number] = [TEXTS[kind](replace(outfit, **{kind: word})) for word in words]
    texts = list(dict.fromkeys(text for texts in asked.values() for text in texts))
    keys = text_features_of(extractor, texts)
    if isinstance(keys, str):
        return keys
    row_of = {text: row for row, text in enumerate(texts)}
    similarity = unit(unit(features).mean(1)) @ unit(keys.cpu()).T  # (N, texts)
    hits = {kind: torch.full((len(prompts),), torch.nan) for kind in WORDS}
    for (kind, number), options in asked.items():
        nearest = similarity[number, [row_of[text] for text in options]].argmax()
        hits[kind][number] = float(WORDS[kind][nearest] == getattr(outfits[number], kind))
    return hits
