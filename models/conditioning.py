"""What the UNet is told: prompts through the text encoder, pictures through CLIP vision and the aligner.

Both give encoder_hidden_states of one shape, (B, L, D), L the tokens of a prompt and D the UNet's context width,
so that text and image enter the UNet alike.
"""

import math
import sys

import torch
from torch import Tensor, nn

from common.errors import UserError
from models.base import BaseModel

LONGEST_PROMPT = 10_000  # characters, some 30 pieces: each costs memory in every layer of the UNet
CLASS_TOKEN_NOTE = (
    "this aligner has no attention; it is taken to read CLIP's class token, not the mean of all tokens, which its file "
    "does not tell apart"
)


class QueryAligner(nn.Module):
    """Learned queries read all image tokens by cross-attention (TexDreamer, Liu et al. 2024, with its key names).

    image_tokens: (B, T, image_dim) → encoder_hidden_states: (B, context_tokens, context_dim). feed_forward: width
    inside each layer; None is 4 * context_dim, ours (TexDreamer's is PyTorch's default, 2,048).
    """

    def __init__(
        self,
        image_dim: int,
        context_dim: int,
        context_tokens: int,
        layers: int,
        heads: int,
        feed_forward: int | None = None,
    ):
        super().__init__()
        self.shape = (image_dim, context_tokens, context_dim)
        feed_forward = feed_forward or 4 * context_dim
        self.query = nn.Parameter(torch.randn(1, context_tokens, context_dim) * context_dim**-0.5)
        self.visual_proj = nn.Linear(image_dim, context_dim)
        layer = nn.TransformerDecoderLayer(context_dim, heads, feed_forward, dropout=0.0, batch_first=True)
        self.i2t = nn.TransformerDecoder(layer, layers)

    def forward(self, image_tokens: Tensor) -> Tensor:
        memory = self.visual_proj(image_tokens)  # (B, T, D)
        return self.i2t(self.query.expand(len(memory), -1, -1), memory)


class PooledAligner(nn.Module):
    """The seed's aligner, with its key names: one token of the picture, repeated for each prompt position.

    image_tokens: (B, T, image_dim) → encoder_hidden_states: (B, context_tokens, context_dim). All positions are
    equal, so it can carry what a picture shows but not where. heads: of the attention that pools all tokens; None
    takes CLIP's class token, the first, alone.
    """

    def __init__(self, image_dim: int, context_dim: int, context_tokens: int, heads: int | None):
        super().__init__()
        self.shape = (image_dim, context_tokens, context_dim)
        self.reads_all_tokens = heads is not None
        if self.reads_all_tokens:
            self.cls_token = nn.Parameter(torch.randn(1, 1, image_dim))
            self.attn_pool = nn.MultiheadAttention(image_dim, heads, batch_first=True)
        self.projector = nn.Sequential(nn.Linear(image_dim, image_dim), nn.GELU(), nn.Linear(image_dim, context_dim))

    def forward(self, image_tokens: Tensor) -> Tensor:
        token = image_tokens[:, :1]
        if self.reads_all_tokens:
            token, _ = self.attn_pool(self.cls_token.expand(len(image_tokens), -1, -1), image_tokens, image_tokens)
        return self.projector(token).expand(-1, self.shape[1], -1)


def make_aligner(settings, base: BaseModel) -> nn.Module:
    """A new aligner (configuration.Aligner) that fits the base's image encoder and UNet, float32."""
    if base.image_encoder is None:
        raise UserError("this base has no image encoder; set model.image_encoder to a CLIP vision model")
    image_dim, context_dim = base.image_encoder.config.hidden_size, base.unet.config.cross_attention_dim
    attention_width = context_dim if settings.kind == "query" else image_dim
    if attention_width % settings.heads:
        raise UserError(
            f"model.aligner.heads: {settings.heads} does not divide the {settings.kind} aligner's width "
            f"{attention_width}"
        )
    if settings.kind == "pooled":
        aligner = PooledAligner(image_dim, context_dim, base.context_tokens, settings.heads)
    else:
        aligner = QueryAligner(image_dim, context_dim, base.context_tokens, settings.layers, settings.heads)
    return aligner.to(base.device)


def aligner_from_state(state: dict[str, Tensor], context_tokens: int, heads: int | None) -> nn.Module:
    """The aligner whose state dict this is: every shape is the state's own.

    heads: None, where nothing tells them, is what the makers' code has: 64 channels each in TexDreamer's
    (model_i2t.py), 8 in the seed's. A pooled state without attention does not tell the seed's class token from its
    mean over tokens: it is taken for the class token, the default of the seed's class, said on stderr. Raises
    UserError for a state of neither.
    """
    state = {key: value.float() for key, value in state.items()}
    # Without memory until its shapes are seen to be the state's: a small file may speak of a very wide one.
    with torch.device("meta"):
        aligner = _empty_aligner(state, context_tokens, heads)
    aligner.load_state_dict(state, assign=True)
    return aligner


def _empty_aligner(state: dict[str, Tensor], context_tokens: int, heads: int | None) -> nn.Module:
    if "projector.2.weight" in state:
        context_dim, image_dim = state["projector.2.weight"].shape
        if "cls_token" not in state:
            print(f"note: {CLASS_TOKEN_NOTE}", file=sys.stderr)
        return PooledAligner(image_dim, context_dim, context_tokens, (heads or 8) if "cls_token" in state else None)
    if "visual_proj.weight" in state:
        context_dim, image_dim = state["visual_proj.weight"].shape
        layers = {key.split(".")[2] for key in state if key.startswith("i2t.layers.")}
        if not layers or "query" not in state:
            raise UserError(
                "it has no decoder layers (TexDreamer's num_layers=0): it hands on all of a picture's tokens, of which "
                "there are not as many as in a prompt, so that guidance cannot pair the two"
            )
        feed_forward = len(state.get("i2t.layers.0.linear1.weight", ())) or None
        queries, heads = state["query"].shape[1], heads or max(1, context_dim // 64)
        return QueryAligner(image_dim, context_dim, queries, len(layers), heads, feed_forward)
    raise UserError("it has the keys neither of TexDreamer's (visual_proj) nor of the seed's (projector)")


def encode_prompts(base: BaseModel, prompts: list[str]) -> Tensor:
    """B prompts → encoder_hidden_states: (B, L, D) float32; a prompt longer than the tokenizer's limit is cut.

    Differentiable where the text encoder has a LoRA that is trained.
    """
    tokens = base.tokenizer(
        prompts, padding="max_length", max_length=base.context_tokens, truncation=True, return_tensors="pt"
    )
    return base.text_encoder(tokens.input_ids.to(base.device)).last_hidden_state.float()


@torch.no_grad()
def prompt_pieces(base: BaseModel, prompt: str) -> list[list[int]]:
    """A prompt's tokens, cut where the text encoder has no more room; one piece, empty, for an empty prompt.

    Raises UserError for a prompt of more than LONGEST_PROMPT characters.
    """
    if len(prompt) > LONGEST_PROMPT:
        raise UserError(f"a prompt of {len(prompt)} characters ({prompt[:40]} ...): give at most {LONGEST_PROMPT}")
    tokens = base.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    room = base.context_tokens - 2  # for the two markers
    return [tokens[start : start + room] for start in range(0, max(1, len(tokens)), room)]


def encode_long_prompt(base: BaseModel, prompt: str) -> Tensor:
    """A prompt of any length → encoder_hidden_states (1, n * L, D): what is over the limit goes through the text
    encoder in further pieces of the same length, whose states follow one another in the UNet's context."""
    tokenizer, length = base.tokenizer, base.context_tokens
    rows = []
    for piece in prompt_pieces(base, prompt):
        marked = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
        rows.append(marked + [tokenizer.pad_token_id] * (length - len(marked)))
    input_ids = torch.tensor(rows)
    states = base.text_encoder(input_ids.to(base.device)).last_hidden_state.float()
    return states.flatten(0, 1)[None]


def same_length(*states: Tensor) -> list[Tensor]:
    """(B, L, D) each, the longest a multiple of the others: repeats the shorter, which changes nothing they say, since
    attention weighs each copy alike."""
    longest = max(condition.shape[1] for condition in states)
    return [condition.repeat(1, longest // condition.shape[1], 1) for condition in states]


def picture_size(base: BaseModel, shape: tuple[int, int], image_size: int | None) -> tuple[int, int]:
    """(height, width) at which the image encoder reads a picture of that shape: the square it was made for, or, with
    image_size (a multiple of its patches) for the longer side, as much of the other as the picture fills."""
    own, patch = base.image_encoder.config.image_size, base.image_encoder.config.patch_size
    if image_size is None:
        return own, own
    if image_size % patch:
        raise UserError(f"model.image_size {image_size} is not a multiple of {patch}, the image encoder's patches")
    patches = (math.ceil(image_size * side / (max(shape) * patch)) for side in shape)
    height, width = (max(1, count) * patch for count in patches)
    return height, width


def encode_images(base: BaseModel, images: Tensor) -> Tensor:
    """images: (B, 3, H, W) in [-1, 1] → all of the image encoder's tokens: (B, T, image_dim) float32. Where H and W are
    not its own size, its learned positions are interpolated (as in Dosovitskiy et al. 2021, section 3.2).

    Differentiable where the image encoder has a LoRA that is trained.
    """
    mean, std = (
        torch.tensor(values, device=base.device)[:, None, None]
        for values in (base.image_processor.image_mean, base.image_processor.image_std)
    )
    pixels = ((images.to(base.device) + 1) / 2 - mean) / std
    pixels = pixels.to(base.image_encoder.dtype)
    return base.image_encoder(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state.float()


def drop_conditions(encoder_hidden_states: Tensor, null_states: Tensor, dropped: Tensor) -> Tensor:
    """Replaces the rows of (B, L, D) that `dropped` (B,) names by null_states (1, L, D)."""
    return torch.where(dropped.to(encoder_hidden_states.device)[:, None, None], null_states, encoder_hidden_states)
