"""Personal adapters: a new word and a second, small LoRA on top of a checkpoint, as personalise.py trains them.

A folder holds diffusers' LoRA file (lora_utils.py); WORD.safetensors, one tensor (1, D) under the word's own name,
which diffusers' `load_textual_inversion` and the embedding folders of A1111 and ComfyUI read; and adapter.json.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import CLIPTokenizer

from common.errors import UserError, reason
from common.files import content_hash, is_hidden
from common.text import parse_json
from lora_utils import ADAPTED, ADAPTER_FILE, FAST_FOLDER, LORA_FILE, all_finite, bake_lora, lora_layers, read_tensors
from models.base import BaseModel
from models.lora_files import load_lora

LARGEST_HASHED = 1 << 30  # bytes
# Numbers of tokens below which a whole word is a common one. Merges, and so tokens, are numbered in the order of their
# frequency: of CLIP's 49,408 the last are rare.
COMMON_TOKENS = 40_000
WORD = re.compile("[a-z0-9]{2,}")
SUGGESTED_WORDS = ("sks", "ohwx", "zwx", "qxv")  # as DreamBooth's users have them


@dataclass(frozen=True)
class Adapter:
    """What adapter.json says. base_weights: `weights_hash` of the checkpoint that it was trained on."""

    word: str
    class_prompt: str
    base_checkpoint: str
    base_weights: str


class NewWords(nn.Module):
    """A frozen table of token embeddings, and vectors (W, D) for the tokens that were added after its last one."""

    def __init__(self, table: nn.Module, count: int, vectors: Tensor):
        """count: of the tokens before the new ones."""
        super().__init__()
        self.table, self.count = table, count
        self.vectors = nn.Parameter(vectors)

    @property
    def weight(self) -> Tensor:
        """Of the frozen table, whose dtype and device the text encoder takes for its own."""
        return self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: (B, L) → (B, L, D)"""
        is_new = input_ids >= self.count
        embedded = self.table(input_ids.clamp(max=self.count - 1))
        new = self.vectors[(input_ids - self.count).clamp(min=0)].to(embedded.dtype)
        return torch.where(is_new[..., None], new, embedded)


def check_word(tokenizer: CLIPTokenizer, word: str) -> None:
    """Raises UserError unless a word can be given a meaning of its own without taking that of others."""
    if not WORD.fullmatch(word):
        raise UserError(f"--name {word!r}: give one word of letters a-z and digits, such as {SUGGESTED_WORDS[0]}")
    if not _is_free(tokenizer, word):
        suggestions = [word + ending for ending in ("x", "1", "zx")] + list(SUGGESTED_WORDS)
        free = next(suggestion for suggestion in suggestions if _is_free(tokenizer, suggestion))
        raise UserError(
            f"--name {word!r} is a word that the text encoder knows already, and other prompts would change with it; "
            f"take a rare one, such as {free}"
        )


def _is_free(tokenizer: CLIPTokenizer, word: str) -> bool:
    """Whether a word is no token of its own, or a rare one, and no piece of other words."""
    tokens = tokenizer(word, add_special_tokens=False).input_ids
    is_common = len(tokens) == 1 and tokens[0] < COMMON_TOKENS
    return not is_common and word not in tokenizer.get_vocab()


def noun_vector(base: BaseModel, class_prompt: str) -> Tensor:
    """The embedding (1, D) float32 of a class's last token, where a new word starts: "a man" gives man's."""
    tokens = base.tokenizer(class_prompt, add_special_tokens=False).input_ids
    if not tokens:
        raise UserError("--class is empty; say what the name is one of, such as 'a man'")
    input_ids = torch.tensor([tokens[-1:]], device=base.device)
    return base.text_encoder.get_input_embeddings()(input_ids)[0].detach().float().clone()


def add_word(base: BaseModel, word: str, vector: Tensor) -> nn.Parameter:
    """Gives the tokenizer a word and the text encoder its embedding → the parameter (W, D) with the new words' ones.

    vector: (1, D). In prompts the word counts as a whole word alone, in capitals too. Raises UserError for a word that
    cannot be added, and for a vector of another width.
    """
    check_word(base.tokenizer, word)
    table = base.text_encoder.get_input_embeddings()
    if vector.shape != (1, table.weight.shape[1]):
        raise UserError(
            f"the embedding of {word!r} is of shape {list(vector.shape)}, but this text encoder's are of width "
            f"{table.weight.shape[1]}; was it made for another base?"
        )
    vector = vector.float().to(base.device)
    count = len(base.tokenizer)
    added = base.tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True)])
    assert added == 1 and base.tokenizer.convert_tokens_to_ids(word) == count, word
    if isinstance(table, NewWords):
        table.vectors = nn.Parameter(torch.cat([table.vectors.detach(), vector]), requires_grad=False)
    else:
        base.text_encoder.set_input_embeddings(NewWords(table, count, vector).requires_grad_(False))
    return base.text_encoder.get_input_embeddings().vectors


def save_word(folder: Path, adapter: Adapter, vector: Tensor) -> None:
    """Writes what an adapter has beside its LoRA. vector: (1, D). Raises UserError for one that is not finite."""
    vector = vector.detach().float().cpu().contiguous()
    if not all_finite([vector]):
        raise UserError(f"the embedding of {adapter.word!r} is not finite; lower training.personal.word_learning_rate")
    safetensors.torch.save_file({adapter.word: vector}, folder / f"{adapter.word}.safetensors")
    (folder / ADAPTER_FILE).write_text(json.dumps(asdict(adapter), indent=2) + "\n")


def read_adapter(folder: Path) -> Adapter:
    """What a folder says that it is. Raises UserError for a folder that is no adapter."""
    if not (folder / ADAPTER_FILE).is_file():
        raise UserError(f"no adapter in {folder}: it has no {ADAPTER_FILE}; give a folder that personalise.py wrote")
    try:
        adapter = Adapter(**parse_json((folder / ADAPTER_FILE).read_text()))
        if not WORD.fullmatch(adapter.word):
            raise ValueError(f"{adapter.word!r} is no word")
        return adapter
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {folder / ADAPTER_FILE}: {reason(error)}") from None


def refuse_adapter(path: Path) -> None:
    """Raises UserError for an adapter where a whole checkpoint is wanted: alone its LoRA is of no base."""
    folder = path if path.is_dir() else path.parent
    if (folder / ADAPTER_FILE).is_file():
        raise UserError(f"{path} is a personal adapter, which needs its base beside it: give it with --adapter")


def parse_adapter(text: str) -> tuple[Path, float]:
    """ "DIR" or "DIR:weight" → folder and weight, 1 unless it is given."""
    folder, colon, weight = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            return Path(folder), float(weight)
        except ValueError:  # a Windows drive, or a folder that is not there
            pass
    return Path(text), 1.0


def load_adapters(base: BaseModel, adapters: Sequence[tuple[Path, float]], base_weights: str) -> None:
    """Puts adapters on a checkpoint, each with its weight, and merges all: W + Σ weight · alpha / r · up @ down.

    base_weights: `weights_hash` of the checkpoint. Raises UserError for an adapter of another checkpoint, for two that
    have one word, and for weights that do not fit.
    """
    said = [read_adapter(folder) for folder, _ in adapters]
    for (folder, _), adapter in zip(adapters, said):
        if adapter.base_weights != base_weights:
            raise UserError(
                f"adapter {folder} was trained on another base, {adapter.base_checkpoint}; give that with --checkpoint"
            )
        if [other.word for other in said].count(adapter.word) > 1:
            raise UserError(f"two adapters have the word {adapter.word!r}; train one anew with another --name")
    vectors = [_read_vector(folder, adapter.word) for (folder, _), adapter in zip(adapters, said)]
    for (folder, weight), adapter, vector in zip(adapters, said, vectors):
        bake_lora(base)
        add_word(base, adapter.word, vector)
        load_lora(base, folder / LORA_FILE)
        for module in (getattr(base, name) for name in ADAPTED):
            for layer in lora_layers(module).values():
                layer.scale_layer(weight)
    bake_lora(base)


def _read_vector(folder: Path, word: str) -> Tensor:
    file = folder / f"{word}.safetensors"
    tensors, _ = read_tensors(file)
    if list(tensors) != [word] or not all_finite(tensors.values()):
        raise UserError(f"{file} is no embedding of {word!r}: it holds {', '.join(tensors) or 'nothing'}")
    return tensors[word]


def weights_hash(checkpoint: str | Path) -> str:
    """A short hash of the weights in a checkpoint's folder, or in one file; of large ones, of their sizes. A fast
    adapter is not among them: it is made from them; nor is what is hidden: a part of it, not written to its end."""
    path = Path(checkpoint)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    inside = {file: file.relative_to(path) for file in files}
    files = [file for file in files if FAST_FOLDER not in inside[file].parts and not is_hidden(inside[file])]
    weights = [file for file in files if file.suffix in (".safetensors", ".bin", ".pth")]
    sizes = {file: file.stat().st_size for file in weights}
    small = [file.read_bytes() for file in weights if sizes[file] < LARGEST_HASHED]
    return content_hash(str([*sizes.values()]).encode(), *small)[:16]
