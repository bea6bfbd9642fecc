"""The frozen base: a Stable Diffusion folder or hub name, and a CLIP vision model for image conditioning."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoModel, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPImageProcessorPil, CLIPTextModel, CLIPTokenizer, CLIPVisionModel
from transformers.utils import logging as transformers_logging

from common.errors import UserError, reason
from common.files import PROJECT_ROOT

transformers_logging.set_verbosity_error()  # loading one tower of CLIP is meant, not worth a report
transformers_logging.disable_progress_bar()
# StableDiffusionPipeline reads block_out_channels of every autoencoder; AutoencoderDC's own configuration has none, and
# warns at each load that it ignores the one that we gave it.
logging.getLogger("diffusers.configuration_utils").addFilter(
    lambda record: "'block_out_channels'" not in record.getMessage() or "AutoencoderDC" not in record.getMessage()
)


@dataclass
class BaseModel:
    """Everything the LoRA and the aligner are trained on top of; all of it in eval mode and without gradients."""

    unet: UNet2DConditionModel
    vae: torch.nn.Module  # any of diffusers' autoencoders of pictures: AutoencoderKL, AutoencoderTiny, AutoencoderDC
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    image_encoder: CLIPVisionModel | None
    image_processor: CLIPImageProcessorPil | None
    noise_scheduler: DDPMScheduler

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def context_tokens(self) -> int:
        """Length of a prompt in tokens (77 for CLIP)."""
        return self.text_encoder.config.max_position_embeddings

    @property
    def native_resolution(self) -> int:
        """Side in pixels of the pictures the UNet was trained on."""
        return self.unet.config.sample_size * self.vae_scale

    @property
    def vae_scale(self) -> int:
        """Pixels a latent is wide (8 for Stable Diffusion)."""
        if hasattr(self.vae, "spatial_compression_ratio"):  # AutoencoderDC
            return self.vae.spatial_compression_ratio
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def modules(self) -> dict[str, torch.nn.Module]:
        """By name; without the image encoder where the base has none."""
        modules = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        return modules if self.image_encoder is None else {**modules, "image_encoder": self.image_encoder}


def resolve_source(name: str) -> str:
    """A folder as given, a folder relative to the project, or else a name on the model hub."""
    for path in (Path(name), PROJECT_ROOT / name):
        if path.is_dir():
            return str(path)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(f"base model {name!r} is neither a folder nor a hub name like 'owner/model'")
    return name


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises UserError for a device this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"training.device {name!r} cannot be used ({reason(error)}); set it to auto, cpu or cuda"
        ) from None


def load_base(
    pretrained_model: str,
    image_encoder: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    zero_terminal_snr: bool = False,
    vae: str | None = None,
) -> BaseModel:
    """Loads a base frozen.

    pretrained_model: a folder in the diffusers layout or a hub name. image_encoder: a CLIP vision model's folder
    or hub name; None means `image_encoder/` and `feature_extractor/` inside pretrained_model, if it has them.
    dtype: of the frozen weights. zero_terminal_snr: the noise schedule is rescaled to end in pure noise. vae: another
    autoencoder's folder or hub name; None means `vae/` inside pretrained_model. Raises UserError when a component is
    missing or unreadable, or when the autoencoder's latents are not the UNet's.
    """
    source = resolve_source(pretrained_model)
    if attention == "xformers":
        check_xformers()

    def load(cls, name=source, folder="", **options):
        try:
            return cls.from_pretrained(name, subfolder=folder, **options)
        except Exception as error:  # these libraries raise many kinds for a missing, damaged or private file
            what = folder or ("the autoencoder" if cls is AutoModel else "the image encoder")
            raise UserError(
                f"cannot load {what} of {name} ({reason(error)}); set model.pretrained_model, model.image_encoder and "
                "model.vae to diffusers and transformers folders, or to hub names you can reach"
            ) from error

    vision = processor = None
    if image_encoder is not None:
        name = resolve_source(image_encoder)
        vision = load(CLIPVisionModel, name, dtype=dtype)
        # TexDreamer's folder has weights alone: its pictures go through CLIP's own defaults.
        lacks_processor = Path(name).is_dir() and not (Path(name) / "preprocessor_config.json").exists()
        processor = CLIPImageProcessorPil() if lacks_processor else load(CLIPImageProcessorPil, name)
    elif (Path(source) / "image_encoder").is_dir():
        vision = load(CLIPVisionModel, folder="image_encoder", dtype=dtype)
        processor = load(CLIPImageProcessorPil, folder="feature_extractor")
    unet = load(UNet2DConditionModel, folder="unet", dtype=dtype)
    autoencoder = (
        load(AutoModel, resolve_source(vae), dtype=dtype) if vae else load(AutoModel, folder="vae", dtype=dtype)
    )
    latent_channels = autoencoder.config.get("latent_channels")
    if latent_channels != unet.config.in_channels:
        raise UserError(
            f"{vae or source} is no autoencoder for this base: {type(autoencoder).__name__} with {latent_channels} "
            f"latent channels for a UNet of {unet.config.in_channels}; set model.vae to another one"
        )
    base = BaseModel(
        unet=unet,
        vae=autoencoder,
        text_encoder=load(CLIPTextModel, folder="text_encoder", dtype=dtype),
        tokenizer=load(CLIPTokenizer, folder="tokenizer"),
        image_encoder=vision,
        image_processor=processor,
        noise_scheduler=load(DDPMScheduler, folder="scheduler"),
    )
    prediction_type = base.noise_scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"{pretrained_model} predicts {prediction_type!r}; epsilon and v_prediction are supported")
    if zero_terminal_snr and prediction_type == "epsilon":
        raise UserError("model.zero_terminal_snr needs a base that predicts v: of pure noise, epsilon tells nothing")
    if zero_terminal_snr:
        base.noise_scheduler = DDPMScheduler.from_config(base.noise_scheduler.config, rescale_betas_zero_snr=True)
    for module in base.modules().values():
        module.requires_grad_(False).eval().to(device)
    if attention == "xformers":
        base.unet.enable_xformers_memory_efficient_attention()
    return base


def load_configured_base(settings, device: torch.device, dtype: torch.dtype) -> BaseModel:
    """The base that configuration.Model names."""
    return load_base(
        settings.pretrained_model,
        settings.image_encoder,
        device,
        dtype,
        settings.attention,
        settings.zero_terminal_snr,
        settings.vae,
    )


def check_xformers() -> None:
    """Raises UserError unless xformers is installed and its kernels load under this torch."""
    try:
        import xformers.ops

        if not torch.cuda.is_available():
            raise RuntimeError("there is no CUDA device")
        sample = torch.zeros(1, 8, 1, 32, device="cuda", dtype=torch.float16)
        xformers.ops.memory_efficient_attention(sample, sample, sample)
    except Exception as error:
        raise UserError(f"model.attention: xformers cannot be used ({reason(error)}); set it to sdpa") from error
