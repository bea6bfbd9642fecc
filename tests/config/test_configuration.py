import codecs
import shutil

import pytest

from common.errors import UserError
from common.files import PROJECT_ROOT
from config.configuration import DEFAULT_CONFIG, known_keys, load_config, save_config
from joint import main as joint_main
from models.base import load_base

NO_BACKGROUNDS = [f"--data.render.backgrounds.{kind}=0" for kind in ("plain", "gradient", "noise")]


@pytest.mark.parametrize("name", ["train_config", "sd15_atlas", "sd21_atlas"])
def test_presets_are_valid_and_survive_saving(name, tmp_path):
    cfg = load_config(PROJECT_ROOT / "config" / f"{name}.yaml")
    save_config(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == cfg


def test_overrides_are_typed():
    numbers = ["training.joint.max_steps=200", "training.joint.learning_rate=1e-4"]
    others = ["model.lora.target_modules=[to_q, to_k]", "model.image_encoder=null"]
    cfg = load_config(DEFAULT_CONFIG, [*numbers, *others])
    assert cfg.training.joint.max_steps == 200 and cfg.training.joint.learning_rate == 1e-4
    assert cfg.model.lora.target_modules == ["to_q", "to_k"] and cfg.model.image_encoder is None


@pytest.mark.parametrize(
    "text", ["2026-11-25", "2026-13-45", "1e5", "007", "123", "no", "on", "null", "~", "a: b", "'a'"]
)
def test_an_override_of_a_text_is_the_text_as_it_stands(text):
    assert load_config(DEFAULT_CONFIG, [f"output.out_dir={text}"]).output.out_dir == text
    assert load_config(DEFAULT_CONFIG, [f"data.body={text}"]).data.body == (None if text == "null" else text)


def test_texts_in_files_and_lists_are_what_is_written(tmp_path):
    prompts = "[2026-11-25, no, 12, 1.50, 'a: b']"
    expected = ["2026-11-25", "no", "12", "1.50", "a: b"]
    path = tmp_path / "config.yaml"
    path.write_text(f"output: {{out_dir: 2026-11-25, sample_prompts: {prompts}}}\ndata: {{dataset: 007, body: }}\n")
    cfg = load_config(path)
    assert cfg.output.out_dir == "2026-11-25" and cfg.output.sample_prompts == expected
    assert cfg.data.dataset == "007" and cfg.data.body is None
    save_config(cfg, path)
    assert load_config(path) == cfg
    assert load_config(DEFAULT_CONFIG, [f"output.sample_prompts={prompts}"]).output.sample_prompts == expected


@pytest.mark.parametrize(
    "mark,encoding", [(codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (b"", "utf-8")]
)
def test_files_of_any_editor_are_read(mark, encoding, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(mark + "output:\r\n  out_dir: größe\r\n".encode(encoding))
    assert load_config(path).output.out_dir == "größe"


def test_t2uv_and_i2uv_take_the_values_of_joint():
    cfg = load_config(DEFAULT_CONFIG, ["training.joint.learning_rate=0.5", "training.t2uv.batch_size=2"])
    assert cfg.training.t2uv.learning_rate == cfg.training.i2uv.learning_rate == 0.5
    assert cfg.training.t2uv.batch_size == 2 and cfg.training.i2uv.batch_size == cfg.training.joint.batch_size


@pytest.mark.parametrize(
    "override,message",
    [
        ("training.joint.batchsize=4", "'training.joint.batchsize'.*'training.joint.batch_size'"),
        ("modle.lora.r=4", "'modle'.*'model"),
        ("training.joint.batch_size=four", "training.joint.batch_size: .*integer.*'four'"),
        ("training.joint.batch_size=2.5", "training.joint.batch_size"),
        ("training.joint.max_steps=010", "valid integer, got '010'"),  # 8 to YAML 1.1
        ("training.seed=1:30", "valid integer, got '1:30'"),  # 90
        ("output.sample_prompts=[null]", "output.sample_prompts.0 is text"),
        ("training.joint.learning_rate=true", "training.joint.learning_rate"),
        ("training.joint.condition_dropout=1.5", "less than or equal to 1"),
        ("training.joint.batch_size=5", "not a multiple of batch_size 5"),
        ("model.attention=flash", "'sdpa' or 'xformers'"),
        ("model.lora=3", "model.lora"),
        ("seed", "write overrides as"),
        ("training.seed=-1", "training.seed"),
        ("model.prompt_template=a person", "must hold {prompt}"),
        ("model.prompt_template={style} {prompt}", "no other braces"),
    ],
)
def test_mistakes_name_the_key(override, message):
    with pytest.raises(UserError, match=message):
        load_config(DEFAULT_CONFIG, [override])


@pytest.mark.parametrize(
    "content,message",
    [
        (b"a: [", "not YAML"),
        (b"- 1\n", "sections"),
        (b"data: {views: stored}\ndata: {body: anny}\n", "key 'data' is given twice"),
        (b"output: {out_dir: }\n", "output.out_dir is text: put None in quotes"),
        (b"output: {out_dir: \xe9}\n", "save it as UTF-8"),
        (None, "cannot read .*config.yaml: No such file.* --config"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    "override",
    [
        "training.joint.learning_rate=inf",
        "training.joint.max_minutes=1e400",
        "data.render.fill=[nan, nan]",
        "data.render.azimuth=[0, inf]",
        f"training.joint.max_steps={10**400}",
        "model.prompt_template={prompt}}",
        "model.prompt_template=}{prompt}",
        "model.prompt_template={{prompt}}",
    ],
)
def test_what_no_number_or_template_is_good_for_is_refused(override):
    with pytest.raises(UserError, match=override.partition("=")[0]):
        load_config(DEFAULT_CONFIG, [override])


def test_known_keys_have_the_seeds_spelling():
    seed = {"model.pretrained_model", "model.lora.r", "model.lora.alpha", "data.cache_dir"}
    seed |= {"output.out_dir", "output.log_every"}
    schedule = ("batch_size", "effective_batch_size", "num_epochs", "learning_rate", "alpha", "beta")
    seed |= {f"training.joint.{key}" for key in schedule}
    assert seed <= set(known_keys())


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--training.joint.steps=4"], "unknown key"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--model.pretrained_model=nowhere"], "neither a folder nor a hub name"),
        (["--model.attention=xformers"], "set it to sdpa"),
        (["--training.device=tpu"], "training.device"),
        (["--data.dataset=nowhere"], "nowhere"),
        (["--data.dataset=procedural:many"], "procedural:COUNT"),
        (["--data.body=obj:box.obj"], "anny"),
        (["--data.resolution=129"], "multiple"),
        (["--data.render.azimuth=[9,3]"], "write [low, high]"),
        (["--data.render.fill=0.5"], "data.render.fill"),
        (["--data.render.backgrounds.pictures=1"], "needs background_folder"),
        (NO_BACKGROUNDS, "give at least one a weight"),
        (["--data.render.poses=amass"], "cannot take the motions"),
        (["--model.lora.target_modules=[nonsense]"], "target_modules"),
        (["--steps"], "unknown argument"),
        (["--output.out_dir", "--dry-run"], "--output.out_dir has no value"),
        (["--output.out_dir", "--data.num_workers=1"], "--output.out_dir has no value"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(arguments, message, tiny_base, tmp_path, monkeypatch, run_script):
    monkeypatch.chdir(tmp_path)
    base = [] if "pretrained" in arguments[0] else [f"--model.pretrained_model={tiny_base}", "--model.aligner.heads=2"]
    status, _, error = run_script(joint_main, *base, *arguments)
    assert status == 2 and message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "logs").exists()


def test_a_damaged_base_is_refused(tiny_base, tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(tiny_base, copy)
    (copy / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="cannot load unet"):
        load_base(str(copy))
    shutil.rmtree(copy / "vae")
    with pytest.raises(UserError, match="cannot load"):
        load_base(str(copy))
    with pytest.raises(UserError, match="cannot load the image encoder"):
        load_base(str(tiny_base), image_encoder=str(tmp_path))
