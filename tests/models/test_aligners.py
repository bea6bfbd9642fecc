"""Peers' aligners, written here from their own definitions, give the same here."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from common.errors import UserError
from config.configuration import Aligner
from models.base import BaseModel
from models.checkpoints import TrainedModel, load_aligner
from models.conditioning import make_aligner
from models.generation import picture_condition


class Image2Token(nn.Module):
    """TexDreamer's model_i2t.py (Liu et al. 2024): the decoder layers have PyTorch's own defaults."""

    def __init__(self, visual_hidden_size=1280, text_hidden_size=1024, max_length=77, num_layers=3):
        super().__init__()
        self.num_layers = num_layers
        self.visual_proj = nn.Linear(visual_hidden_size, text_hidden_size)
        if num_layers > 0:
            self.query = nn.Parameter(torch.randn(1, max_length, text_hidden_size))
            layer = nn.TransformerDecoderLayer(text_hidden_size, nhead=text_hidden_size // 64, batch_first=True)
            self.i2t = nn.TransformerDecoder(layer, num_layers=num_layers)

    def forward(self, x):
        memory = self.visual_proj(x)
        return self.i2t(self.query.repeat(len(x), 1, 1), memory) if self.num_layers else memory


class ImageAligner(nn.Module):
    """The earlier re-implementation's: a class token, a mean, or attention, through an MLP, 77 times."""

    def __init__(self, input_dim=1024, output_dim=768, use_all_tokens=False, pooling="mean"):
        super().__init__()
        self.attends = use_all_tokens and pooling == "attention"
        if self.attends:
            self.cls_token = nn.Parameter(torch.randn(1, 1, input_dim))
            self.attn_pool = nn.MultiheadAttention(input_dim, num_heads=8, batch_first=True)
        self.projector = nn.Sequential(nn.Linear(input_dim, input_dim), nn.GELU(), nn.Linear(input_dim, output_dim))

    def forward(self, x):
        pooled = x[:, :1]
        if self.attends:
            pooled, _ = self.attn_pool(self.cls_token.expand(len(x), -1, -1), x, x)
        return self.projector(pooled).expand(-1, 77, -1)


def base_of(image_dim, context_dim):
    """As much of a base as an aligner is fitted to."""
    configs = SimpleNamespace(hidden_size=image_dim, cross_attention_dim=context_dim, max_position_embeddings=77)
    module = SimpleNamespace(config=configs, device=torch.device("cpu"))
    return BaseModel(module, None, module, None, module, None, None)


def saved(module, tmp_path):
    torch.save(module.state_dict(), tmp_path / "aligner.pth")
    return tmp_path / "aligner.pth"


@pytest.mark.parametrize("layers", [1, 3])
def test_texdreamers_aligner_at_full_size(tmp_path, layers):
    theirs = Image2Token(num_layers=layers).eval()
    ours = load_aligner(saved(theirs, tmp_path), Aligner(heads=8, layers=2), base_of(1280, 1024))
    assert len(ours.i2t.layers) == layers and ours.i2t.layers[0].multihead_attn.num_heads == 16
    tokens = torch.randn(2, 257, 1280)
    with torch.no_grad():
        assert torch.allclose(ours(tokens), theirs(tokens), atol=1e-5)


@pytest.mark.parametrize("attends", [True, False])
def test_the_seeds_aligners_at_full_size(tmp_path, capsys, attends):
    theirs = ImageAligner(use_all_tokens=attends, pooling="attention" if attends else "mean").eval()
    ours = load_aligner(saved(theirs, tmp_path), Aligner(heads=2), base_of(1024, 768))
    tokens = torch.randn(2, 257, 1024)
    with torch.no_grad():
        assert torch.allclose(ours(tokens), theirs(tokens), atol=1e-5)
    assert ("class token, not the mean" in capsys.readouterr().err) == (not attends)


def test_a_class_token_is_of_one_picture(base, make_config, tmp_path):
    aligner = load_aligner(saved(ImageAligner(24, 16), tmp_path), Aligner(), base)
    trained, person = TrainedModel(base, aligner, make_config()), Image.new("RGB", (32, 32), "red")
    assert picture_condition(trained, [person]).shape == (1, 77, 16)
    with pytest.raises(UserError, match="one picture alone"):
        picture_condition(trained, [person, person])


def test_aligners_that_do_not_fit_are_refused_by_their_reason(base, tmp_path):
    cases = [
        (Image2Token(num_layers=0), "no decoder layers .* guidance cannot pair"),
        (Image2Token(num_layers=1), "image tokens of 1280 it makes 77 of 1024, but .* are of 24 and .* reads 77 of 16"),
        (Image2Token(24, 64, max_length=60, num_layers=1), "makes 60 of 64"),
        (nn.Linear(2, 2), "keys neither"),
    ]
    for module, message in cases:
        with pytest.raises(UserError, match=message):
            load_aligner(saved(module, tmp_path), Aligner(), base)
    torn = Image2Token(24, 64, num_layers=1).state_dict()
    del torn["i2t.layers.0.linear1.weight"]
    torch.save(torn, tmp_path / "torn.pth")
    with pytest.raises(UserError, match="Missing key"):
        load_aligner(tmp_path / "torn.pth", Aligner(), base)


def test_our_own_new_aligners_keep_their_shape(base):
    assert make_aligner(Aligner(heads=2), base).i2t.layers[0].linear1.out_features == 4 * 16
