"""The configuration: every key with its type and default, one YAML file, dotted overrides on the command line.

Unknown keys and wrong types are errors that name the key. The resolved configuration is saved with each checkpoint.
"""

import argparse
import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from common.errors import UserError
from common.files import PROJECT_ROOT, current_name
from common.text import read_text

DEFAULT_CONFIG = PROJECT_ROOT / "config" / "train_config.yaml"
MOST_NODES = 10_000  # keys and values of a file; train_config.yaml has some 150


def _number(value):
    """The number that a text such as 1e-4 says."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
# YAML 1.1 reads a bare `no` as false.
Precision = Annotated[
    Literal["auto", "no", "bf16", "fp16"], BeforeValidator(lambda value: "no" if value is False else value)
]
Positive = Annotated[int, Field(gt=0, lt=2**31)]
BaseName = Annotated[str, AfterValidator(current_name)]
Share = Annotated[Number, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, strict=True, protected_namespaces=())


class LoRA(Section):
    r: Positive = 16
    alpha: Annotated[Number, Field(gt=0)] = 32  # the update is scaled by alpha / r
    dropout: Share = 0.0
    target_modules: list[str] = ["to_q", "to_k", "to_v", "to_out.0"]
    use_rslora: bool = False  # scale by alpha / sqrt(r) (Kalajdzievski 2023)
    use_dora: bool = False  # magnitude and direction apart (Liu et al. 2024)
    text_encoder_r: Positive | None = None  # rank of a LoRA on the text encoder's attention too; null: none
    image_encoder_r: Positive | None = None  # the same on the image encoder's, at the aligner's learning rate


class Aligner(Section):
    kind: Literal["query", "pooled"] = "query"  # query: learned queries cross-attend to all image tokens
    layers: Positive = 3
    heads: Positive = 8


class Model(Section):
    pretrained_model: BaseName = "embedded/base"  # folder in the diffusers layout, or hub name
    vae: str | None = None  # another autoencoder for the same latents, as TAESD; null: vae/ in pretrained_model
    image_encoder: str | None = None  # CLIP vision folder or hub name; null: image_encoder/ in pretrained_model
    attention: Literal["sdpa", "xformers"] = "sdpa"  # xformers is optional and never needed
    gradient_checkpointing: bool = False
    channels_last: bool = False  # memory format of the UNet's convolutions
    # The whole UNet, for fixed shapes: true, or a mode of torch.compile (reduce-overhead: CUDA graphs). Needs a C++
    # compiler, on CUDA Triton.
    compile: bool | Literal["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = False
    zero_terminal_snr: bool = False  # the last timestep is pure noise (Lin et al. 2024); for v-prediction
    image_size: Positive | None = None  # longer side of pictures for the image encoder; null: the square it knows
    prompt_template: str = "{prompt}"  # what the text encoder is given, in training and inference
    lora: LoRA = LoRA()
    aligner: Aligner = Aligner()

    @field_validator("prompt_template")
    @classmethod
    def _has_a_place_for_the_prompt(cls, template):
        if "{prompt}" not in template or set("{}") & set(template.replace("{prompt}", "")):
            raise ValueError(f"{template!r} must hold {{prompt}} once or more and no other braces")
        return template


class Schedule(Section):
    """How one task trains; t2uv and i2uv take the values of joint unless they are set."""

    schedule: Literal["alternate", "paired"] = "alternate"  # text, then image; paired: both in one UNet forward
    batch_size: Positive = 8  # rows in one forward of one process
    effective_batch_size: Positive = 32  # rows in one optimiser step, a multiple of batch_size times processes
    num_epochs: Positive = 10
    max_steps: Positive | None = None  # optimiser steps; null: num_epochs
    max_minutes: Annotated[Number, Field(gt=0)] | None = None  # wins over both: steps follow from the speed
    learning_rate: Annotated[Number, Field(gt=0)] = 1e-4
    aligner_learning_rate: Annotated[Number, Field(gt=0)] | None = None  # null: learning_rate
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 50
    weight_decay: Annotated[Number, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[Number, Field(gt=0)] = 1.0
    condition_dropout: Share = 0.1  # share of rows trained without their condition, for guidance
    alpha: Annotated[Number, Field(ge=0)] = 1.0  # weight of loss/t2uv
    beta: Annotated[Number, Field(ge=0)] = 1.0  # weight of loss/i2uv
    gamma: Annotated[Number, Field(ge=0)] = 0.0  # weight of loss/align: aligner tokens against the prompt's states
    both_share: Share = 0.0  # share of I2UV rows conditioned on a random blend of picture and prompt
    partial_share: Share = 0.0  # share of I2UV rows that see what a picture would show of their texture
    partial_learning_rate: Annotated[Number, Field(gt=0)] | None = None  # of those input channels; null: learning_rate

    @model_validator(mode="after")
    def _divides(self):
        if self.effective_batch_size % self.batch_size:
            raise ValueError(
                f"effective_batch_size {self.effective_batch_size} is not a multiple of batch_size {self.batch_size}"
            )
        return self


class PersonalSchedule(Schedule):
    """How personalise.py trains; alpha weighs loss/t2uv and loss/edit of the examples, beta loss/prior."""

    schedule: Literal["alternate", "paired"] = "paired"
    batch_size: Positive = 3
    effective_batch_size: Positive = 3
    max_steps: Positive | None = 400  # at most: the run stops by itself
    learning_rate: Annotated[Number, Field(gt=0)] = 3e-3
    word_learning_rate: Annotated[Number, Field(gt=0)] = 5e-3  # of the new word's embedding
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 10
    condition_dropout: Share = 0.0  # the empty prompt is one of the prior's: it must not learn the person


class FastSchedule(Schedule):
    """How distill.py trains; alpha weighs prompts, beta pictures."""

    schedule: Literal["alternate", "paired"] = "paired"
    batch_size: Positive = 6
    effective_batch_size: Positive = 6
    max_steps: Positive | None = 1000
    learning_rate: Annotated[Number, Field(gt=0)] = 1e-3
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 10
    condition_dropout: Share = 0.0  # there is no guidance that would need it


class Training(Section):
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "auto"  # auto: CUDA where there is one
    mixed_precision: Precision = "auto"  # auto: bf16 where the hardware has it
    max_skipped_steps: Annotated[int, Field(ge=0)] = 5  # in a row, for a gradient that is not finite; more end the run
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "schedulefree"] = "adamw"  # all but adamw: their own package
    ema_decay: Annotated[Number, Field(gt=0, lt=1)] | None = None  # checkpoints hold the average; null: none
    min_snr_gamma: Annotated[Number, Field(gt=0)] | None = None  # weight of timesteps (Hang et al. 2023), 5 say
    outside_weight: Share = 1.0  # of texels outside the UV islands in the loss; 0 leaves them out
    leading_channels: Annotated[int, Field(gt=0)] | None = None  # count for half the loss; null: all latents alike
    joint: Schedule = Schedule()
    t2uv: Schedule = Schedule()
    i2uv: Schedule = Schedule()
    personal: PersonalSchedule = PersonalSchedule()
    fast: FastSchedule = FastSchedule()

    @model_validator(mode="before")
    @classmethod
    def _joint_is_the_default(cls, values):
        if isinstance(values, dict) and isinstance(values.get("joint"), dict):
            tasks = [name for name, field in cls.model_fields.items() if field.annotation is Schedule]
            for task in tasks:
                if isinstance(values.get(task, {}), dict):
                    values = {**values, task: {**values["joint"], **values.get(task, {})}}
        return values


def _in_order(values: list[float]) -> list[float]:
    if values[0] > values[1]:
        raise ValueError(f"{values} is no range: write [low, high]")
    return values


Range = Annotated[list[Number], Field(min_length=2, max_length=2), AfterValidator(_in_order)]


class Backgrounds(Section):
    """How often each kind stands behind the body, in any unit."""

    plain: Annotated[Number, Field(ge=0)] = 0.4  # one colour, any
    gradient: Annotated[Number, Field(ge=0)] = 0.3
    noise: Annotated[Number, Field(ge=0)] = 0.3
    pictures: Annotated[Number, Field(ge=0)] = 0.0  # of data.render.background_folder
    white: Annotated[Number, Field(ge=0)] = 0.0  # as in a studio


class Render(Section):
    """What each render shows, drawn anew: ranges are uniform, angles in degrees."""

    poses: str = "own"  # own: the body's own sampler; rest; or a folder of AMASS motions (SMPL family)
    azimuth: Range = [0, 360]  # 0 sees the front, 90 the left side
    elevation: Range = [-15, 25]
    fov_degrees: Range = [22, 45]
    full_body: Share = 0.8  # share of renders that show the whole body; the others end between waist and knees
    fill: Range = [0.7, 0.95]  # share of the picture's height that is body
    ambient: Range = [0.3, 0.5]  # strength of the light from all sides
    key: Range = [0.4, 0.65]  # of the main light
    side: Range = [0.0, 0.2]  # of the light that fills the shadows
    tint: Share = 0.1  # how far a light's colour strays from white
    environment: Share = 0.25  # share of renders lit by a random environment instead of ambient, key and side
    backgrounds: Backgrounds = Backgrounds()
    background_folder: str | None = None

    @model_validator(mode="after")
    def _has_backgrounds(self):
        weights = self.backgrounds.model_dump()
        if not sum(weights.values()):
            raise ValueError("backgrounds: all are 0; give at least one a weight")
        if weights["pictures"] and not self.background_folder:
            raise ValueError("backgrounds.pictures needs background_folder, a folder of pictures")
        return self


class Data(Section):
    dataset: str = "procedural:240"  # folder built by build_atlas_large or in the seed's layout, or procedural:COUNT
    views: Literal["stored", "online"] = "stored"  # online: training renders fresh views, none is read
    views_per_texture: Positive = 4  # for procedural:COUNT and for online views
    body: str | None = None  # whose UV layout the textures have: anny or obj:PATH; null: what the data set says
    render: Render = Render()  # what online views and newly built data sets show
    cache: Literal["none", "latents", "all"] = "all"  # on disk: posteriors; all: text states and image tokens too
    cache_dir: str = "data_cache"
    validation_textures: Annotated[int, Field(ge=0)] = 0  # held out of training, always the same of a data set
    resolution: Positive | None = None  # side of the textures; null: what the base was trained on
    num_workers: Annotated[int, Field(ge=0)] = 0


class Output(Section):
    out_dir: str = "checkpoints"
    log_dir: str = "logs"
    log_every: Positive = 10  # steps
    save_every: Positive = 500
    half_precision: bool = False  # checkpoints hold LoRA and aligner in float16; resuming stays exact
    keep_last: Positive | None = None  # checkpoints of a run; null: all
    sample_every: Positive = 500
    validate_every: Positive = 100
    evaluate_every: Positive | None = None  # steps; makes and measures 8 validation textures: eval/; null: never
    sample_prompts: list[str] = []  # besides pictures of the data set, for the grid in TensorBoard


class Inference(Section):
    num_inference_steps: Positive = 30
    guidance_scale: Annotated[Number, Field(ge=1)] = 3.0
    image_guidance_scale: Annotated[Number, Field(ge=1)] | None = None  # from a picture alone; null: guidance_scale
    sampler: Literal["auto", "dpmsolver++", "euler_a", "ddim", "pndm", "unipc"] = "auto"  # auto: what fits the schedule
    negative_prompt: str = ""


class Personal(Section):
    """What personalise.py trains: a small LoRA of its own and a new word, on top of a checkpoint."""

    checkpoint: str | None = None  # on whose top; null: this is no personal run
    weights: str | None = None  # hash of that checkpoint's weights
    word: str = "sks"  # new, for the prompts
    class_prompt: str = "a person"  # what the word is one of
    class_images: str | None = None  # textures of the class to keep; null: what the checkpoint itself predicts
    region: str | None = None  # of the body, which alone is learned, as a garment's; null: all, and to be edited
    r: Positive = 8
    alpha: Annotated[Number, Field(gt=0)] = 8
    # What reads the prompt alone, as Custom Diffusion (Kumari et al. 2023) has it: what another word stands for moves
    # least, so that adapters go together.
    target_modules: list[str] = ["attn2.to_k", "attn2.to_v"]
    measure_every: Positive = 20  # steps
    patience: Positive | None = 5  # measures without a better one before it stops; null: never
    keep_best: bool = True  # false: the last step
    seeds: Positive = 3  # textures of the word and of the class at each measure
    num_inference_steps: Positive = 10  # of those


FAST_STEPS = (1, 2, 4, 8)  # that may be asked for
DEFAULT_FAST_STEPS = 4


class Fast(Section):
    """What distill.py trains: a LoRA with which a checkpoint needs few steps, and no guidance."""

    checkpoint: str | None = None  # whose; null: this is no such run
    r: Positive = 16
    alpha: Annotated[Number, Field(gt=0)] = 16
    windows: Positive = 4  # of the timesteps, each a step of inference
    teacher_steps: Positive = 4  # of each window, with guidance


class Config(Section):
    model: Model = Model()
    training: Training = Training()
    personal: Personal = Personal()
    fast: Fast = Fast()
    data: Data = Data()
    output: Output = Output()
    inference: Inference = Inference()


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    keys = []
    for name, field in section.model_fields.items():
        nested = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        keys += known_keys(field.annotation, f"{prefix}{name}.") if nested else [prefix + name]
    return keys


def _explain(error: ValidationError) -> str:
    """The first problem of a validation error in one line."""
    problem = error.errors()[0]
    key, given = ".".join(str(name) for name in problem["loc"]), repr(problem["input"])
    given = given if len(given) <= 200 else f"{given[:200]} ..."
    if problem["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.0)
        return f"unknown key {key!r}; did you mean {nearest[0]!r}?"
    if problem["type"] == "value_error":
        return f"{key}: {problem['ctx']['error']}"
    if problem["type"] == "string_type":
        return f"{key} is text: put {given} in quotes, or leave the key out"
    return f"{key}: {problem['msg'].lower()}, got {given}"


def read_config(values: dict, where: str) -> Config:
    """A checked Config from nested values; `where` names their source in the error message."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file with overrides like "training.joint.max_steps=200" applied.

    Raises UserError when the file cannot be read, or when it or an override has an unknown key or a wrong type.
    """
    try:
        content = read_text(path)
    except UserError as error:
        raise UserError(f"config: {error}; give a YAML file with --config") from None
    try:
        values = yaml.load(content, KeyLoader) or {}
        texts = yaml.load(content, yaml.BaseLoader) or {}
    except RecursionError:
        raise UserError(f"config {path} is nested too deeply; it holds sections such as model: and training:") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"config {path} must hold sections such as model: and training:")
    values = _of_the_keys_types(values, texts, Config)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"{override!r}: write overrides as --section.key=value")
        *sections, name = key.split(".")
        target, section = values, Config
        for section_name in sections:
            target = target.setdefault(section_name, {})
            section = _annotation(section, section_name)
            if not isinstance(target, dict):
                raise UserError(f"unknown key {key!r}: {section_name!r} is not a section")
        target[name] = _override(text, _annotation(section, name))
    return read_config(values, str(path))


class KeyLoader(yaml.SafeLoader):
    """YAML whose scalars are text but for truth values, null and decimal integers, and where a key that is given twice
    is an error, as are anchors that in a small file stand for more than MOST_NODES values.

    So a date is the text that it is, `Number` reads 1e-4, and an integer 010 or 1:30, to YAML 1.1 8 and 90, is refused.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("bool", "null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self):
        node = super().get_single_node()
        if node is not None and _count_nodes(node, {}) > MOST_NODES:
            raise yaml.constructor.ConstructorError(None, None, f"it stands for more than {MOST_NODES} values")
        return node

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        for (key, _), name in zip(node.value, names):
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _count_nodes(node: yaml.Node, counts: dict[int, float]) -> float:
    """Values that a node stands for, those of an anchor as often as it is named; counts: of nodes that were counted."""
    if id(node) not in counts:
        counts[id(node)] = math.inf  # stays so in a node that is inside itself
        pairs = isinstance(node, yaml.MappingNode)
        children = [child for pair in node.value for child in pair] if pairs else node.value
        is_scalar = isinstance(node, yaml.ScalarNode)
        counts[id(node)] = 1 if is_scalar else 1 + sum(_count_nodes(child, counts) for child in children)
    return counts[id(node)]


KeyLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile("[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))


def _annotation(section, name: str):
    """The type of a section's key; None for an unknown key."""
    fields = getattr(section, "model_fields", {})
    return fields[name].annotation if name in fields else None


def _is_text(annotation) -> bool:
    """Whether a key takes any text, or none."""
    return str in (annotation, *get_args(annotation)) and get_origin(annotation) is not list


def _override(text: str, annotation):
    """The value that an override's text means to a key of this type."""
    if _is_text(annotation):
        is_none = text == "null" and annotation is not str
        return None if is_none else text
    try:
        value, written = yaml.load(text, KeyLoader), yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    return _of_the_keys_types(value, written, annotation) if text else text  # write null for none


def _of_the_keys_types(value, text, annotation):
    """A value as YAML guesses it, but as it is written where the key is text: 12 and no are names too.

    text: the same, each scalar as text. annotation: a section, a type, or None for a key that pydantic will refuse.
    """
    if isinstance(value, dict) and isinstance(text, dict):
        return {
            name: _of_the_keys_types(inner, text.get(name), _annotation(annotation, name))
            for name, inner in value.items()
        }
    if get_origin(annotation) is list and isinstance(value, list) and isinstance(text, list):
        (item_type,) = get_args(annotation)
        return [_of_the_keys_types(*pair, item_type) for pair in zip(value, text)]
    if _is_text(annotation) and isinstance(value, bool | int) and isinstance(text, str):
        return text
    return value


def save_config(cfg: Config, path: Path) -> None:
    path.write_text(dump_config(cfg))


def dump_config(cfg: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(cfg.model_dump(), sort_keys=False)


def dotted_overrides(unknown: list[str]) -> list[str]:
    """["--a.b=1", "--c.d", "2"] → ["a.b=1", "c.d=2"]; anything else is a UserError."""
    overrides, arguments = [], iter(unknown)
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if not option.startswith("--") or "." not in option:
            raise UserError(f"unknown argument {argument!r}; see --help; config keys are written --section.key=value")
        if not equals:
            value = next(arguments, "--")
            if value.startswith("--"):
                raise UserError(f"{option} has no value; write {option}=VALUE")
        overrides.append(f"{option[2:]}={value}")
    return overrides


def parse_training_args(description: str) -> tuple[Config, dict]:
    """The command line of the training scripts → (configuration, the other arguments of training.train)."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Any key of the config can be set: --training.joint.max_steps=200. Keys: " + ", ".join(known_keys()),
    )
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="YAML file (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, load one batch, report, stop")
    parser.add_argument("--resume", metavar="auto|DIR", help="go on from the newest checkpoint, or from this one")
    parser.add_argument("--cache-only", action="store_true", help="build the caches on disk and stop")
    parser.add_argument("--rebuild-cache", action="store_true", help="build the caches on disk anew")
    args, unknown = parser.parse_known_args()
    options = vars(args)
    return load_config(options.pop("config"), dotted_overrides(unknown)), options
