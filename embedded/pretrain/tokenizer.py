"""The tokenizer: a byte-level BPE of the grammar's own words, in CLIP's form."""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from embedded.captions import sentence
from embedded.grammar import sample_outfit

CONTEXT = 77  # tokens of a caption, as CLIP's


def train_tokenizer(out: Path, vocab_size: int = 1280) -> None:
    """CLIP's tokenizer (lower case, byte-level BPE, '</w>' at a word's end) on the grammar's own sentences.

    Writes out/tokenizer.
    """
    rng = np.random.default_rng(0)
    outfits = [sample_outfit(rng) for _ in range(12000)]
    corpus = [text.lower() for outfit in outfits for text in (outfit.prompt, sentence(outfit, rng).text)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splitters = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), byte_level]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splitters)
    alphabet = sorted(byte_level.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, end_of_word_suffix="</w>", initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    # CLIP's own order: bytes, bytes that end a word, merges, then the two markers.
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    folder = out / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merge_list = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    merge_list.write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    clip_tokenizer = CLIPTokenizer(vocab=str(vocabulary), merges=str(merge_list), model_max_length=CONTEXT)
    clip_tokenizer.save_pretrained(folder)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """N captions → (N, CONTEXT) int64, cut or padded with end markers."""
    encoded = tokenizer(captions, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")
    return encoded.input_ids
