"""An outfit in the words of people: synonyms, many forms, some words left out, a letter mistyped at times."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from embedded.grammar import COLOURS, FEMALE, Outfit

CAPTIONER = 2  # to be raised when the same outfit and seed are said differently: data sets are built anew
# What people say for an attribute's word; the word itself stands among them, twice where it should be said more often.
PEOPLE = {
    "man": ("man", "man", "man", "guy", "gentleman", "male", "dad", "father", "adult man"),
    "woman": ("woman", "woman", "woman", "lady", "female", "mother", "mom", "adult woman"),
    "young boy": ("young boy", "young boy", "boy", "little boy", "son", "kid", "child"),
    "young girl": ("young girl", "young girl", "girl", "little girl", "daughter", "kid", "child"),
    "elder man": (
        "elder man",
        "elder man",
        "old man",
        "elderly man",
        "grandfather",
        "grandpa",
        "senior man",
        "older man",
    ),
    "elder woman": (
        "elder woman",
        "elder woman",
        "old woman",
        "elderly woman",
        "grandmother",
        "old lady",
        "older woman",
    ),
}
ETHNICITY_WORDS = {
    "white": ("white", "white", "Caucasian", "European", "light-skinned"),
    "Asian": ("Asian", "Asian", "East Asian", "Chinese"),
    "African American": ("African American", "African American", "Black", "African", "dark-skinned"),
    "Latino": ("Latino", "Latino", "Latina", "Hispanic", "Latin American", "Brazilian"),
    "Middle Eastern": ("Middle Eastern", "Middle Eastern", "Persian", "Turkish"),
    "Mixed race": ("mixed race", "mixed race", "mixed-race", "biracial", "multiracial"),
}
HAIR_WORDS = {
    "black": ("black", "black", "dark"),
    "brown": ("brown", "brown", "brunette", "dark brown", "light brown"),
    "blonde": ("blonde", "blonde", "blond", "golden"),
    "auburn": ("auburn", "auburn", "ginger", "red", "copper", "reddish"),
    "white": ("white", "white", "grey", "gray"),
}
STYLE_WORDS = {
    "white": ("white", "white", "off-white"),
    "black": ("black",),
    "gray": ("gray", "gray", "grey", "light gray", "dark grey"),
    "blue": ("blue", "blue", "royal blue", "bright blue", "azure"),
    "green": ("green", "green", "dark green", "bright green", "olive green"),
    "pink": ("pink", "pink", "light pink", "magenta"),
    "orange": ("orange", "orange", "bright orange"),
    "khaki": ("khaki", "khaki", "tan", "camel"),
    "red": ("red", "red", "crimson", "dark red", "burgundy", "maroon"),
    "yellow": ("yellow", "yellow", "golden", "bright yellow"),
    "purple": ("purple", "purple", "violet", "lavender"),
    "navy": ("navy", "navy", "navy blue", "dark blue"),
    "brown": ("brown", "brown", "chocolate brown"),
    "beige": ("beige", "beige", "cream"),
    "denim": ("denim", "denim", "blue denim", "faded denim"),
    "striped": ("striped", "striped", "stripy"),
    "plaid": ("plaid", "plaid", "checked", "checkered", "tartan"),
    "floral": ("floral", "floral", "flowered", "flowery"),
}
GARMENT_WORDS = {
    "shirt": ("shirt", "shirt", "short-sleeved shirt", "top"),
    "long sleeve shirt": ("long sleeve shirt", "long sleeve shirt", "long-sleeved shirt", "long-sleeved top"),
    "polo shirt": ("polo shirt", "polo shirt", "polo"),
    "button-down shirt": ("button-down shirt", "button-down shirt", "button-up shirt", "formal shirt"),
    "blouse": ("blouse",),
    "sweater": ("sweater", "sweater", "jumper", "pullover", "cardigan"),
    "jacket": ("jacket", "jacket", "coat"),
    "blazer": ("blazer", "blazer", "suit jacket"),
    "hoodie": ("hoodie", "hoodie", "hoody", "sweatshirt", "hooded top"),
    "t-shirt": ("t-shirt", "t-shirt", "tee", "tshirt", "tee shirt"),
    "dress": ("dress", "dress", "gown", "sundress"),
    "tuxedo": ("tuxedo", "tuxedo", "suit"),
    "jeans": ("jeans",),
    "pants": ("pants", "pants", "trousers", "slacks", "chinos", "leggings"),
    "shorts": ("shorts",),
    "skirt": ("skirt",),
    "sneakers": ("sneakers", "sneakers", "trainers", "shoes"),
}
# Words round a sentence that say nothing about the outfit.
OPENINGS = ("", "", "", "", "", "full-body picture of ", "realistic texture of ", "one person: ", "this is ", "make ")
CLOSINGS = ("", "", "", "", "", ", natural light", " standing outdoors", ", smiling", ", high quality", ", please")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LEFT_OUT = {"ethnicity": 0.3, "hair": 0.25, "bottom": 0.1, "sneakers": 0.1}  # how often a sentence does not say it


class Caption(NamedTuple):
    """told: the outfit's attributes that text says, by the names of their fields."""

    text: str
    told: frozenset[str]


def with_article(words: str) -> str:
    is_vowel = words[0] in "aeioAEIO" and not words.startswith("European")
    return f"{'an' if is_vowel else 'a'} {words}"


def strange_word(rng: np.random.Generator) -> str:
    """Of no language, so that a word that training never saw does not upset what the others say."""
    consonants, vowels = list("bcdfghklmnprstvw"), list("aeiou")
    syllables = [str(rng.choice(consonants) + rng.choice(vowels)) for _ in range(rng.integers(1, 4))]
    return "".join(syllables) + str(rng.choice(consonants))


def mistyped(text: str, rng: np.random.Generator) -> str:
    """One letter of one word of four letters or more is left out, doubled, swapped with the next or another."""
    words = text.split(" ")
    long_words = [index for index, word in enumerate(words) if len(word) >= 4 and word.isalpha()]
    if not long_words:
        return text
    index = long_words[rng.integers(len(long_words))]
    word, kind = words[index], rng.integers(4)
    at = int(rng.integers(1, len(word) - 1))
    changed = ("", word[at] * 2, word[at + 1] + word[at], LETTERS[rng.integers(26)])[kind]
    words[index] = word[:at] + changed + word[at + (2 if kind == 2 else 1) :]
    return " ".join(words)


@dataclass(frozen=True)
class Phrases:
    """What a sentence is put together from; "" is what it leaves out."""

    adjectives: str  # "young Black"
    noun: str
    is_female: bool
    hair: str  # "long brown hair"
    haired: str  # "brown-haired"
    beard: str
    garments: list[str]  # "red hoodie" or "hoodie in red", top first
    colours_and_nouns: list[tuple[str, str]]  # the same apart: "red", "hoodie"

    @property
    def person(self) -> str:
        """ "a young Black woman"."""
        return with_article(f"{self.adjectives} {self.noun}".strip())

    @property
    def haired_person(self) -> str:
        """ "a brown-haired young Black woman"; without the hair where nothing is said of it."""
        return with_article(" ".join(filter(None, (self.haired, self.adjectives, self.noun))))

    @property
    def hair_and_beard(self) -> str:
        return " and ".join(filter(None, (self.hair, self.beard)))

    @property
    def person_with_hair(self) -> str:
        return f"{self.person} with {self.hair_and_beard}" if self.hair_and_beard else self.person

    @property
    def pronoun(self) -> str:
        return "She" if self.is_female else "He"

    def clothes(self, reverse: bool = False) -> str:
        """ "a red hoodie, black jeans and white shoes"; reverse: from the feet up."""
        nouns = [noun for _, noun in self.colours_and_nouns]
        worn = [words if noun.endswith("s") else with_article(words) for words, noun in zip(self.garments, nouns)]
        worn = worn[::-1] if reverse else worn
        return worn[0] if len(worn) == 1 else ", ".join(worn[:-1]) + " and " + worn[-1]

    def tags(self) -> list[str]:
        return list(filter(None, (f"{self.adjectives} {self.noun}".strip(), *self.garments, self.hair, self.beard)))

    def with_copula(self) -> str:
        """ "his hoodie is red, his jeans are black"."""
        whose = "her" if self.is_female else "his"
        return ", ".join(
            f"{whose} {noun} {'are' if noun.endswith('s') else 'is'} {colour}"
            for colour, noun in self.colours_and_nouns
        )


def after(separator: str, words: str) -> str:
    return f"{separator}{words}" if words else ""


VERBS = ("wearing", "wearing", "in", "dressed in", "who wears", "who is wearing")
FORMS: tuple[Callable[[Phrases, str], str], ...] = (  # of the phrases and one of VERBS
    lambda p, verb: f"{p.person_with_hair} {verb} {p.clothes()}",
    lambda p, verb: f"{p.person_with_hair} {verb} {p.clothes()}",
    lambda p, verb: f"{p.haired_person} {verb} {p.clothes()}",
    lambda p, verb: f"{p.haired_person} {verb} {p.clothes(reverse=True)}",
    lambda p, verb: f"{p.person} {verb} {p.clothes()}{after(', ', p.hair_and_beard)}",
    lambda p, verb: f"{p.person} {verb} {p.clothes()}{after(' and with ', p.hair_and_beard)}",
    lambda p, verb: f"a photo of {p.person_with_hair} in {p.clothes()}",
    lambda p, verb: f"portrait of {p.haired_person} in {p.clothes()}",
    lambda p, verb: f"{p.clothes()} for {p.person_with_hair}",
    lambda p, verb: f"{p.clothes(reverse=True)} on {p.haired_person}",
    lambda p, verb: ", ".join(filter(None, (p.hair_and_beard, p.clothes(), p.person))),
    lambda p, verb: f"{p.person_with_hair}. {p.pronoun} wears {p.clothes()}.",
    lambda p, verb: f"{p.haired_person}. {p.pronoun} is dressed in {p.clothes(reverse=True)}.",
    lambda p, verb: f"{p.person}.{after(f' {p.pronoun} has ', p.hair_and_beard)}. {p.pronoun} wears {p.clothes()}.",
    lambda p, verb: f"{p.person_with_hair}, {p.with_copula()}",
    lambda p, verb: f"{p.person_with_hair}. {p.with_copula().capitalize()}.",
    lambda p, verb: ", ".join(p.tags()),
)


def sentence(outfit: Outfit, rng: np.random.Generator) -> Caption:
    """The outfit in natural words, of which some are left out at times."""

    def choose(words) -> str:
        return str(words[rng.integers(len(words))])

    says = {name: rng.uniform() >= chance for name, chance in LEFT_OUT.items()}
    told = {"ethnicity"} if says["ethnicity"] else set()
    adjectives = [choose(ETHNICITY_WORDS[outfit.ethnicity])] if says["ethnicity"] else []
    if outfit.person in ("man", "woman") and rng.uniform() < 0.25:
        adjectives.insert(0, "young")
    noun = strange_word(rng) if rng.uniform() < 0.08 else choose(PEOPLE[outfit.person])
    if noun in PEOPLE[outfit.person] and noun not in ("kid", "child"):
        told.add("person")

    hair, haired = "", ""
    if outfit.hair_cut == "bald":
        told.add("hair_cut")
        hair, haired = choose(("a bald head", "no hair", "a shaved head")), "bald"
    elif says["hair"]:
        told.add("hair")
        colour = choose(HAIR_WORDS[outfit.hair])
        if outfit.hair_cut:
            told.add("hair_cut")
        hair, haired = (f"{outfit.hair_cut} {colour}{ending}".strip() for ending in (" hair", "-haired"))
        if colour in ("brunette", "blonde", "blond") and not outfit.hair_cut:
            haired = choose((haired, colour))
    beard = choose(("beard", "a beard")) if outfit.beard and rng.uniform() < 0.85 else ""

    # Fields of style and garment, and what is worn; sneakers have no kinds.
    worn = [
        ("top_style", "top", outfit.top),
        ("bottom_style", "bottom", outfit.bottom),
        ("sneakers", "sneakers", "sneakers"),
    ]
    worn = [piece for piece in worn if getattr(outfit, piece[0]) and says.get(piece[1], True)]
    strange_garment = int(rng.integers(len(worn))) if rng.uniform() < 0.08 else None
    colours_and_nouns, garments = [], []
    for index, (style_field, field, kind) in enumerate(worn):
        style = getattr(outfit, style_field)
        colour = choose(STYLE_WORDS[style])
        garment = choose(GARMENT_WORDS[kind])
        if index == strange_garment:
            garment = strange_word(rng)
        told |= {style_field} if index == strange_garment else {style_field, field}
        colours_and_nouns.append((colour, garment))
        is_after = style in COLOURS and rng.uniform() < 0.15
        garments.append(f"{garment} in {colour}" if is_after else f"{colour} {garment}")
    is_female = outfit.person in FEMALE
    phrases = Phrases(" ".join(adjectives), noun, is_female, hair, haired, beard, garments, colours_and_nouns)
    if rng.uniform() < 0.08:
        text = ", ".join(rng.permutation(phrases.tags()))
    else:
        text = FORMS[rng.integers(len(FORMS))](phrases, choose(VERBS))
    text = choose(OPENINGS) + text + choose(CLOSINGS)
    text = text.lower() if rng.uniform() < 0.3 else text
    return Caption(mistyped(text, rng) if rng.uniform() < 0.12 else text, frozenset(told))


def atlas_caption(outfit: Outfit) -> Caption:
    """The outfit as ATLAS's prompts have it, which leave nothing out."""
    told = {field.name for field in fields(outfit) if getattr(outfit, field.name)}
    return Caption(outfit.prompt, frozenset(told - {"hair"} if outfit.hair_cut == "bald" else told))
