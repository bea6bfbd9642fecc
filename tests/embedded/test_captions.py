"""What people say for an outfit."""

import re

import numpy as np
import pytest

from embedded import captions
from embedded.grammar import Outfit, sample_outfit
from evaluation.sentences import FORMS, SYNONYMS

SYNONYM_TABLES = {
    "person": captions.PEOPLE,
    "ethnicity": captions.ETHNICITY_WORDS,
    "hair": captions.HAIR_WORDS,
    "top_style": captions.STYLE_WORDS,
    "bottom_style": captions.STYLE_WORDS,
    "top": captions.GARMENT_WORDS,
    "bottom": captions.GARMENT_WORDS,
}


def without_typos(monkeypatch):
    monkeypatch.setattr(captions, "mistyped", lambda text, rng: text)


def test_what_is_told_is_said(monkeypatch):
    without_typos(monkeypatch)
    rng = np.random.default_rng(0)
    for _ in range(400):
        outfit = sample_outfit(rng)
        caption = captions.sentence(outfit, rng)
        words = caption.text.lower()
        for name in caption.told & SYNONYM_TABLES.keys():
            said = SYNONYM_TABLES[name][getattr(outfit, name)]
            assert any(word.lower() in words for word in said), f"{name} of {caption}"
        if "sneakers" in caption.told:
            assert any(word in words for word in captions.STYLE_WORDS[outfit.sneakers])
        if outfit.hair_cut == "bald":
            assert "hair" not in caption.told and re.search("bald|no hair|shaved", words)
        elif "hair" in caption.told:
            assert not outfit.hair_cut or f"{outfit.hair_cut} " in words


def test_sentences_are_many_and_all_words_are_used(monkeypatch):
    without_typos(monkeypatch)
    rng = np.random.default_rng(1)
    texts = [captions.sentence(sample_outfit(rng), rng).text for _ in range(3000)]
    said = " ".join(texts).lower()
    assert len(set(texts)) > 2950
    for table in SYNONYM_TABLES.values():
        for words in table.values():
            assert all(word.lower() in said for word in words), words
    assert re.search(r"\. (She|He) wears", " ".join(texts)), "several sentences"


def test_atlas_captions_leave_nothing_out():
    outfit = Outfit("white", "man", "red", "shirt", "navy", "jeans", "black", hair_cut="bald")
    text, told = captions.atlas_caption(outfit)
    assert text == outfit.prompt and told == {
        "ethnicity",
        "person",
        "top_style",
        "top",
        "bottom_style",
        "bottom",
        "hair_cut",
    }


@pytest.mark.parametrize("seed", range(20))
def test_a_typo_changes_one_word_by_one_letter(seed):
    text = "a woman wearing a yellow dress"
    changed = captions.mistyped(text, np.random.default_rng(seed))
    pairs = [(old, new) for old, new in zip(text.split(), changed.split()) if old != new]
    assert len(pairs) <= 1 and len(changed.split()) == len(text.split())
    assert all(abs(len(old) - len(new)) <= 1 for old, new in pairs)


def test_articles_follow_sound():
    assert captions.with_article("orange shirt") == "an orange shirt"
    assert captions.with_article("European man") == "a European man"


def test_the_measured_sentences_are_held_out(monkeypatch):
    """60 each; every synonym's sentence has a word that no caption has; no form is a caption."""
    without_typos(monkeypatch)
    rng = np.random.default_rng(2)
    monkeypatch.setattr(captions, "strange_word", lambda rng: "zz")
    texts = {captions.sentence(sample_outfit(rng), rng).text.lower() for _ in range(3000)}
    vocabulary = {word for text in texts for word in re.findall("[a-z]+", text)}
    assert 60 == len({text for text, _ in FORMS}) == len({text for text, _ in SYNONYMS})
    for text, _ in SYNONYMS:
        assert set(re.findall("[a-z]+", text.lower())) - vocabulary, text
    assert not {text.lower() for text, _ in FORMS} & texts
