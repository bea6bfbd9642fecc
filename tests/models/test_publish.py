"""What goes to the model hub: whole, told truly, and loadable again."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from test_interchange import deep_compression_base  # noqa: F401  a fixture

from infer_uv import TexturePipeline
from lora_utils import FAST_FOLDER, LORA_FILE
from models.adapters import weights_hash
from models.checkpoints import CONFIG_FILE
from models.fast import Fast, save_fast
from models.partial import PARTIAL_FILE
from models.publish import main as publish_main


@pytest.fixture()
def published(checkpoint, tmp_path, run_script, monkeypatch):
    """Runs publish.py → (status, stderr, folder, uploads)."""
    uploads = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **options: uploads.append(name))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **options: uploads.append(options))

    def publish(*arguments):
        out = tmp_path / "hub"
        status, _, error = run_script(
            publish_main, "--checkpoint", checkpoint, "--licence", "mit", "--out", out, *arguments
        )
        return status, error, out, uploads

    return publish


def test_the_card_tells_what_was_measured_and_shows_it(published, tmp_path):
    interval = {"value": 3.5, "low": 3.0, "high": 4.0, "count": 2, "skipped": 0}
    t2uv = {"color": {"top": 0.75}, "texture": {"psnr": interval, "lpips": "needs torchvision"}}
    figures = {"t2uv": t2uv, "i2uv": {"psnr": 11.25}, "skipped": ["4.png"]}
    (tmp_path / "figures.txt").write_text("{\n}\n" + json.dumps(figures) + "\n")
    status, error, out, uploads = published("--metrics", tmp_path / "figures.txt", "--push-to-hub", "someone/textures")
    assert status == 0, error
    _, front, body = (out / "README.md").read_text().split("---\n", 2)
    front_matter = yaml.safe_load(front)
    assert front_matter["license"] == "mit" and front_matter["library_name"] == "diffusers"
    assert [row["text"] for row in front_matter["widget"]] == ["a man in red"]
    with Image.open(out / front_matter["widget"][0]["output"]["url"]) as picture:
        assert picture.mode == "RGBA" and np.asarray(picture).std() > 0
    assert "| t2uv.color.top | 0.750 |" in body and "| i2uv.psnr | 11.250 |" in body and "Licence: mit" in body
    assert str(tmp_path) not in (out / "README.md").read_text(), "no path of this machine"
    assert "# textures\n" in body and uploads[0] == "someone/textures" and uploads[1]["repo_type"] == "model"
    (texture,) = TexturePipeline.from_pretrained(out)(prompt="a man in red", size=32)
    assert texture.size == (32, 32)


def test_every_weight_goes_along(published, checkpoint):
    save_file({"conv.weight": torch.ones(16, 5, 3, 3)}, checkpoint / PARTIAL_FILE)
    (checkpoint / FAST_FOLDER).mkdir()
    shutil.copy(checkpoint / LORA_FILE, checkpoint / FAST_FOLDER)
    save_fast(checkpoint / FAST_FOLDER, Fast(weights_hash(checkpoint), 4))
    status, error, out, _ = published()
    assert status == 0, error
    assert weights_hash(out) == weights_hash(checkpoint)
    TexturePipeline.from_pretrained(out, fast=4)


def test_the_card_says_how_plain_diffusers_decodes(published, checkpoint, deep_compression_base):  # noqa: F811
    config = checkpoint / CONFIG_FILE
    settings = yaml.safe_load(config.read_text())
    settings["model"]["vae"] = str(deep_compression_base / "vae")
    config.write_text(yaml.safe_dump(settings))
    status, error, out, _ = published()
    assert status == 0, error
    card = (out / "README.md").read_text()
    assert 'output_type="latent"' in card and "vae.decode(latents / vae.config.scaling_factor)" in card


def test_bad_input_of_publishing_is_one_line(published, tmp_path, monkeypatch):
    (tmp_path / "figures.txt").write_text("no figures")
    status, error, out, _ = published("--metrics", tmp_path / "figures.txt")
    assert status == 2 and "figures.txt" in error and error.count("\n") == 1 and not out.exists()
    status, error, out, _ = published("--checkpoint", tmp_path / "nowhere")
    assert status == 2 and "nowhere" in error and not out.exists()
    status, _, out, _ = published()
    card = (out / "README.md").read_text()
    assert status == 0 and "Not measured." in card and 'output_type="latent"' not in card

    def offline(self, name, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", offline)
    status, error, out, _ = published("--push-to-hub", "someone/textures")
    assert status == 2 and "cannot push to someone/textures (no route)" in error
