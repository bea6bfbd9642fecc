"""One training run at step 0: a frozen base, what is trained on it, and on what."""

import importlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn import functional as F

from atlas_dataset.building import build_dataset
from atlas_dataset.dataset import ATLASLarge
from atlas_dataset.sources import fingerprint
from common import processes
from common.errors import UserError, reason
from config.configuration import Config, Schedule
from embedded.sources import is_procedural, open_textures
from lora_utils import adapted_modules, add_image_encoder_lora, add_lora, add_text_encoder_lora
from models.base import BaseModel, load_configured_base, pick_device
from models.conditioning import encode_prompts, make_aligner, picture_size
from models.diffusion import autocast, frozen_dtype, resolve_precision
from models.partial import PartialInput, attach
from render.bodies import Body
from render.rigs import load_body
from render.uv_space import uv_mask
from training.caching import use_caches
from training.fast import Shortcuts, add_fast
from training.launcher import check_launch, launched_device, launched_precision
from training.partial import Partials
from training.personal import Lessons, Watch, add_personal, build_examples, make_lessons, make_watch
from training.tasks import CONDITIONS

# Optimisers from packages that are not required: module, class.
OPTIMIZERS = {
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "prodigy": ("prodigyopt", "Prodigy"),
    "schedulefree": ("schedulefree", "AdamWScheduleFree"),
}


@dataclass
class Run:
    """Everything a checkpoint must bring back is in `parameters`, `optimizer`, `lr_scheduler`, `scaler`, `ema` and
    `global_step`; all else follows from the configuration.
    """

    cfg: Config
    task: str
    base: BaseModel
    aligner: torch.nn.Module | None
    parameters: list[torch.nn.Parameter]  # of LoRA and aligner, float32
    dataset: ATLASLarge
    validation: ATLASLarge | None
    body: Body
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    ema: EMAModel | None
    precision: torch.dtype | None
    total_steps: int
    texel_weight: Tensor | None  # (h, w) of the latents, in the loss; None: all alike
    null_states: Tensor | None  # (1, L, D) of the empty prompt; None: it is being trained
    lessons: Lessons | None = None  # of the task "personal", as is the next
    watch: Watch | None = None
    shortcuts: Shortcuts | None = None  # of the task "fast"
    partial_input: PartialInput | None = None  # trained where training.<task>.partial_share is above 0, for the next
    partials: Partials | None = None
    global_step: int = 0
    skipped: int = 0  # steps in a row whose gradient was not finite

    @property
    def schedule(self) -> Schedule:
        return getattr(self.cfg.training, self.task)

    @property
    def accumulation(self) -> int:
        """Micro-batches of each process in one optimiser step."""
        return self.schedule.effective_batch_size // (self.schedule.batch_size * processes.world_size())

    @property
    def folder(self) -> Path:
        return Path(self.cfg.output.out_dir) / self.task

    def state(self) -> dict:
        """What `restore` needs, in types that torch.load(weights_only=True) reads."""
        return {
            "parameters": [parameter.detach().cpu().clone() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "global_step": self.global_step,
            "skipped": self.skipped,
            "total_steps": self.total_steps,
            "max_minutes": self.schedule.max_minutes,
            "watch": self.watch.state() if self.watch else None,
        }

    def train_until(self, total_steps: int) -> None:
        """Ends the run, and the decay of its learning rate, at that step; to be called before `restore`."""
        self.total_steps = total_steps
        self.lr_scheduler = make_lr_scheduler(self.optimizer, self.schedule, total_steps)

    def restore(self, state: dict) -> None:
        """Takes over what `state` gave, but for the learning rates: the configuration may have lowered them."""
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                if parameter.shape != saved.shape:  # copy_ would repeat a single number
                    raise ValueError(f"a weight of shape {list(saved.shape)} for one of {list(parameter.shape)}")
                parameter.copy_(saved)
        rates = self.lr_scheduler.base_lrs
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if state["scaler"]:  # empty when that run was not in fp16
            self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.base.device)
        if self.watch:
            self.watch.restore(state["watch"])
        self.lr_scheduler.base_lrs = rates
        for group, rate, factor in zip(self.optimizer.param_groups, rates, self.lr_scheduler.lr_lambdas):
            group["initial_lr"], group["lr"] = rate, rate * factor(self.lr_scheduler.last_epoch)
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.global_step, self.skipped = state["global_step"], state["skipped"]

    @contextmanager
    def evaluating(self):
        """Inside, LoRA drops nothing out."""
        adapted = adapted_modules(self.base).values()
        modes = {layer: layer.training for module in adapted for layer in module.modules()}
        for module in adapted:
            module.eval()
        yield
        for layer, is_training in modes.items():
            layer.training = is_training

    @contextmanager
    def averaged(self):
        """Inside, the model has the weights to keep: the moving average, or a schedule-free optimiser's own."""
        is_schedule_free = self.cfg.training.optimizer == "schedulefree"
        if not self.ema and not is_schedule_free:
            yield
            return
        trained = [parameter.detach().clone() for parameter in self.parameters]
        if self.ema:
            self.ema.copy_to(self.parameters)
        else:
            self.optimizer.eval()
        yield
        if is_schedule_free:
            self.optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(self.parameters, trained):
                parameter.copy_(value)


def set_up(cfg: Config, task: str, rebuild_cache: bool = False) -> Run:
    """Everything for a run at step 0. Raises UserError for what the configuration or its files have wrong."""
    schedule, settings = getattr(cfg.training, task), cfg.training
    _check_divides(schedule, task)
    processes.keep_freed_memory()
    processes.leave_busy_cores()
    check_launch()
    device = processes.join(pick_device(launched_device(settings.device)))
    precision = resolve_precision(launched_precision(settings.mixed_precision), device)
    base = load_configured_base(cfg.model, device, frozen_dtype(precision, device))
    latent_channels = base.unet.config.out_channels
    if settings.leading_channels and settings.leading_channels >= latent_channels:
        raise UserError(
            f"training.leading_channels is {settings.leading_channels}, but this base's latents have {latent_channels} "
            "channels in all; take fewer, or null"
        )
    aligner, partial_input, groups = _add_trained(cfg, task, base)
    parameters = [parameter for group in groups for parameter in group["params"]]
    null_states = None
    if not cfg.model.lora.text_encoder_r:
        with torch.no_grad(), autocast(device, precision):
            null_states = encode_prompts(base, [""])

    dataset = open_dataset(cfg, task, base)
    data = cfg.data.model_copy(update={"body": cfg.data.body or dataset.body})
    cfg = cfg.model_copy(update={"data": data})
    body = load_body(cfg.data.body)
    use_caches(cfg, base, dataset, precision, rebuild_cache)
    validation = dataset.hold_out(cfg.data.validation_textures) if cfg.data.validation_textures else None
    if cfg.output.evaluate_every and not validation:
        raise UserError("output.evaluate_every measures held-out textures; set data.validation_textures above 0")
    if task == "personal":
        dataset.hold_out_in_turn(cfg.personal.measure_every * schedule.effective_batch_size)
    if len(dataset) < schedule.batch_size:
        raise UserError(f"training.{task}.batch_size is {schedule.batch_size} but the data set has {len(dataset)} rows")
    total_steps = schedule.max_steps or max(1, schedule.num_epochs * len(dataset) // schedule.effective_batch_size)

    optimizer = make_optimizer(settings.optimizer, groups, schedule)
    lr_scheduler = make_lr_scheduler(optimizer, schedule, total_steps)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    ema = EMAModel(parameters, decay=settings.ema_decay) if settings.ema_decay else None
    lessons = watch = shortcuts = partials = None
    if partial_input is not None:
        partials = Partials.of(cfg, base, dataset.resolution, schedule.partial_share)
    if task == "personal":
        with autocast(device, precision):
            lessons = make_lessons(cfg, base, body, dataset.resolution)
            watch = make_watch(cfg, base, body, dataset)
    if task == "fast":
        with torch.no_grad(), autocast(device, precision):
            shortcuts = Shortcuts.of(cfg, base)
    return Run(
        cfg=cfg,
        task=task,
        base=base,
        aligner=aligner,
        parameters=parameters,
        dataset=dataset,
        validation=validation,
        body=body,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        scaler=scaler,
        ema=ema,
        precision=precision,
        total_steps=total_steps,
        texel_weight=_texel_weight(settings.outside_weight, body, dataset.resolution, base),
        null_states=null_states,
        lessons=lessons,
        watch=watch,
        shortcuts=shortcuts,
        partial_input=partial_input,
        partials=partials,
    )


def make_lr_scheduler(optimizer, schedule: Schedule, total_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    decay = "constant_with_warmup" if schedule.lr_scheduler == "constant" else schedule.lr_scheduler
    warmup = schedule.lr_warmup_steps
    return get_scheduler(decay, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)


def _texel_weight(outside_weight: float, body: Body, resolution: int, base: BaseModel) -> Tensor | None:
    """(h, w) of the latents: 1 inside the UV islands, outside_weight outside; None where that is 1."""
    if outside_weight == 1:
        return None
    side = resolution // base.vae_scale
    mask = uv_mask(body, resolution)[None, None].float()
    inside = F.interpolate(mask, size=(side, side), mode="area")[0, 0]
    return (inside + outside_weight * (1 - inside)).to(base.device)


def _add_trained(
    cfg: Config, task: str, base: BaseModel
) -> tuple[torch.nn.Module | None, PartialInput | None, list[dict]]:
    """Puts LoRA on the frozen base and makes the aligner, in float32, from the seed → the aligner (None without
    pictures), the input for partial textures (None where no row sees one) and the optimiser's groups of parameters."""
    schedule = getattr(cfg.training, task)
    torch.manual_seed(cfg.training.seed)
    aligner = partial_input = None
    if task == "personal":
        groups = add_personal(cfg, base)
    elif task == "fast":
        aligner, groups = add_fast(cfg, base)
    else:
        lora = add_lora(base.unet, cfg.model.lora)
        if cfg.model.lora.text_encoder_r:
            lora += add_text_encoder_lora(base.text_encoder, cfg.model.lora)
        groups = [{"params": lora}]
        if "image" in CONDITIONS[task]:
            aligner = make_aligner(cfg.model.aligner, base)
            groups.append({"params": list(aligner.parameters())})
            if cfg.model.lora.image_encoder_r:  # at the rate of the aligner, which reads its tokens
                groups[1]["params"] += add_image_encoder_lora(base.image_encoder, cfg.model.lora)
            if schedule.aligner_learning_rate and cfg.training.optimizer != "prodigy":  # which finds one rate for all
                groups[1]["lr"] = schedule.aligner_learning_rate
            if schedule.partial_share:
                partial_input = PartialInput.of(base.unet)
                attach(base.unet, partial_input)
                groups.append({"params": list(partial_input.parameters())})
                if schedule.partial_learning_rate and cfg.training.optimizer != "prodigy":
                    groups[2]["lr"] = schedule.partial_learning_rate
    parameters = [parameter for group in groups for parameter in group["params"]]
    processes.copy_from_main([parameter.data for parameter in parameters])
    _prepare_unet(base.unet, cfg)
    return aligner, partial_input, groups


def _check_divides(schedule: Schedule, task: str) -> None:
    rows = schedule.batch_size * processes.world_size()
    if schedule.effective_batch_size % rows:
        raise UserError(
            f"training.{task}.effective_batch_size {schedule.effective_batch_size} is not a multiple of {rows}: "
            f"batch_size {schedule.batch_size} in each of {processes.world_size()} processes"
        )


def _prepare_unet(unet, cfg: Config) -> None:
    """Memory format, checkpointing and compilation."""
    if cfg.model.channels_last:
        unet.to(memory_format=torch.channels_last)
    if cfg.model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()  # diffusers checkpoints in training mode alone; these UNets have no dropout but LoRA's
    elif cfg.model.lora.dropout:
        unet.train()
    if mode := cfg.model.compile:
        try:
            torch.compile(torch.nn.functional.silu)(torch.zeros(8, device=unet.device))
        except Exception as error:  # the compilers have many kinds
            raise UserError(f"model.compile cannot be used ({reason(error)}); set it to false") from error
        unet.compile(dynamic=False, mode=None if mode is True else mode)


def make_optimizer(name: str, groups: list[dict], schedule: Schedule) -> torch.optim.Optimizer:
    """Raises UserError when the optimiser's package is not installed."""
    options = {"lr": schedule.learning_rate, "weight_decay": schedule.weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    module, class_name = OPTIMIZERS[name]
    package = module.partition(".")[0]
    try:
        cls = getattr(importlib.import_module(module), class_name)
    except ImportError as error:
        raise UserError(
            f"training.optimizer {name} needs the package {package} ({reason(error)}); install it or take adamw"
        ) from None
    optimizer = cls(groups, **options)
    if name == "schedulefree":
        optimizer.train()
    return optimizer


def open_dataset(cfg: Config, task: str, base: BaseModel) -> ATLASLarge:
    """The configured data set. Raises UserError when it does not fit the base or the task, or cannot be read."""
    datasets.disable_progress_bars()
    settings, with_renders = cfg.data, "image" in CONDITIONS[task]
    resolution = settings.resolution or base.native_resolution
    if resolution % base.vae_scale:
        raise UserError(f"data.resolution {resolution} is not a multiple of {base.vae_scale}")
    root = Path(settings.dataset)
    if task == "personal":
        root = build_examples(cfg, settings.dataset, resolution)
    elif is_procedural(settings.dataset):
        # The same set where training starts at a smaller resolution.
        root = _build_procedural(cfg, max(resolution, base.native_resolution))
    dataset = ATLASLarge(root, with_renders, resolution, cache_dir=str(Path(settings.cache_dir) / "datasets"))
    body = settings.body or dataset.body
    if body is None:
        raise UserError(f"data set {settings.dataset} does not say which body it is for; set data.body")
    if with_renders:
        shape = (4, 3) if settings.views == "online" else dataset.render_shape()
        dataset.image_size = picture_size(base, shape, cfg.model.image_size)
        if settings.views == "online":
            dataset.render_online(settings.render, body, settings.views_per_texture, cfg.training.seed)
        elif dataset.renders is None:
            raise UserError(f"data set {settings.dataset} holds no renders; set data.views to online")
    return dataset


def _build_procedural(cfg: Config, size: int) -> Path:
    """Paints and renders a procedural data set into data.cache_dir, unless it is there already → its folder."""
    settings, seed = cfg.data, cfg.training.seed
    source = open_textures(settings.dataset, size=size, seed=seed)
    if settings.body not in (None, source.body):
        raise UserError(f"data.body is {settings.body!r}, but procedural textures are painted on {source.body}")
    views = settings.views_per_texture if settings.views == "stored" else 0
    key = fingerprint(source.fingerprint(), views, size, settings.render.model_dump())
    root = Path(settings.cache_dir) / f"procedural-{len(source)}-{key}"
    build_dataset(source, source.body, views, root, size, size * 3 // 4, seed, settings.render)
    processes.wait()
    return root
