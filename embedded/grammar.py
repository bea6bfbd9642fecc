"""What a dressed person wears: the words of the ATLAS prompts and some more, as attributes. captions.py says them."""

import zlib
from dataclasses import dataclass, replace

import numpy as np

ETHNICITIES = {
    "white": (226, 178, 150),
    "Asian": (222, 182, 136),
    "African American": (98, 62, 43),
    "Latino": (182, 126, 90),
    "Middle Eastern": (196, 145, 104),
    "Mixed race": (152, 102, 72),
}
PERSONS = ("man", "woman", "young boy", "young girl", "elder man", "elder woman")
FEMALE = ("woman", "young girl", "elder woman")
HAIR = {
    "black": (24, 22, 24),
    "brown": (84, 52, 30),
    "blonde": (214, 172, 98),
    "auburn": (138, 54, 30),
    "white": (226, 224, 220),
}
COLOURS = {
    "white": (238, 238, 234),
    "black": (30, 30, 33),
    "gray": (132, 134, 136),
    "blue": (38, 82, 176),
    "green": (40, 122, 62),
    "pink": (236, 140, 172),
    "orange": (236, 122, 32),
    "khaki": (178, 158, 112),
    "red": (196, 30, 38),
    "yellow": (242, 204, 48),
    "purple": (112, 52, 144),
    "navy": (26, 36, 78),
    "brown": (104, 66, 40),
    "beige": (222, 204, 172),
}
PATTERNS = ("denim", "striped", "plaid", "floral")
STYLES = (*COLOURS, *PATTERNS)
TOP_CUTS = {  # share of the way from shoulder to wrist that the sleeve covers; height of the hem in metres
    "shirt": (0.36, 0.88),
    "long sleeve shirt": (0.96, 0.88),
    "polo shirt": (0.38, 0.88),
    "button-down shirt": (0.97, 0.91),
    "blouse": (0.68, 0.9),
    "sweater": (0.99, 0.85),
    "jacket": (0.98, 0.87),
    "blazer": (0.97, 0.8),
    "hoodie": (0.99, 0.84),
    "t-shirt": (0.3, 0.89),
    "dress": (0.22, 0.52),
    "tuxedo": (0.97, 0.8),
}
SLEEVES = {top: sleeve for top, (sleeve, _) in TOP_CUTS.items()}
HEMS = {top: hem for top, (_, hem) in TOP_CUTS.items()}
LEGS = {"jeans": 0.078, "pants": 0.078, "shorts": 0.49, "skirt": 0.54}  # height of a bottom's hem in metres
TOPS = tuple(top for top in TOP_CUTS if top not in ("dress", "tuxedo"))  # worn with a bottom
BOTTOMS = ("jeans", "pants", "shorts")  # for everyone; skirts and dresses for FEMALE, tuxedos for the others

HAIR_CUTS = ("short", "long", "bald")


@dataclass(frozen=True)
class Outfit:
    """The attributes of an ATLAS prompt, and coloured sneakers, a haircut and a beard.

    A dress or a tuxedo is a top without a bottom. hair_cut: one of HAIR_CUTS; "" is what the person has where nothing
    is said: long for FEMALE, short for the others. hair colours eyebrows and beard too.
    """

    ethnicity: str
    person: str
    top_style: str
    top: str
    bottom_style: str
    bottom: str
    hair: str
    sneakers: str = ""
    hair_cut: str = ""
    beard: bool = False

    @property
    def prompt(self) -> str:
        """In the form of ATLAS's prompts: "white, woman, red blouse, navy skirt, black hair"."""
        clothes = [f"{self.top_style} {self.top}", f"{self.bottom_style} {self.bottom}"]
        clothes = clothes if self.bottom else clothes[:1]
        shoes = [f"{self.sneakers} sneakers"] if self.sneakers else []
        beard = [f"{self.hair} beard" if self.hair_cut == "bald" else "beard"] if self.beard else []
        return ", ".join([self.ethnicity, self.person, *clothes, self.hair_words, *beard, *shoes])

    @property
    def hair_words(self) -> str:
        """ "brown hair", "long brown hair" or "bald"."""
        if self.hair_cut == "bald":
            return "bald"
        return f"{self.hair_cut} {self.hair} hair".strip()

    @property
    def has_long_hair(self) -> bool:
        return self.hair_cut == "long" or (not self.hair_cut and self.person in FEMALE)

    @property
    def sleeve_length(self) -> str:
        """ "long" or "short"."""
        return "long" if SLEEVES[self.top] > 0.5 else "short"

    @property
    def leg_length(self) -> str:
        """ "long" or "short", of what covers the legs: a tuxedo's trousers, a dress's skirt, or the bottom."""
        hem = LEGS[self.bottom] if self.bottom else {"dress": HEMS["dress"], "tuxedo": LEGS["pants"]}[self.top]
        return "long" if hem < 0.2 else "short"

    @property
    def held_out(self) -> bool:
        """One combination in ten is never trained on, whatever its shoes, haircut and beard."""
        return zlib.crc32(replace(self, sneakers="", hair_cut="", beard=False).prompt.encode()) % 10 == 0


def sample_outfit(rng: np.random.Generator, held_out: bool = False) -> Outfit:
    """An outfit of the training combinations, or of those that are held out."""

    def choose(options) -> str:
        return str(rng.choice(list(options)))

    while True:
        ethnicity, person, hair = choose(ETHNICITIES), choose(PERSONS), choose(HAIR)
        top_style, bottom_style, chance = choose(STYLES), choose(STYLES), rng.uniform()
        top, bottom, female = choose(TOPS), choose(BOTTOMS), person in FEMALE
        if female and chance < 0.14:
            top, bottom_style, bottom = "dress", "", ""
        elif female and chance < 0.28:
            bottom = "skirt"
        elif not female and chance < 0.06:
            top, bottom_style, bottom = "tuxedo", "", ""
            top_style = choose(("black", "navy", "white", "gray", "red"))
        sneakers = choose(COLOURS) if rng.uniform() < 0.2 else ""
        hair_cut, beard, chance = "", False, rng.uniform()
        if female:
            hair_cut = "short" if chance < 0.2 else "long" if chance < 0.3 else ""
        elif person != "young boy":
            hair_cut = "bald" if chance < 0.12 else "long" if chance < 0.24 else "short" if chance < 0.34 else ""
            beard = rng.uniform() < 0.2
        worn = (top_style, top, bottom_style, bottom)
        outfit = Outfit(ethnicity, person, *worn, hair, sneakers, hair_cut, beard)
        if outfit.held_out == held_out:
            return outfit
