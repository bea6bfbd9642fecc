"""Personal adapters, from a few examples to a folder: what is learned, what is kept, when it stops, what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from atlas_dataset.examples import with_word
from common.errors import STOPPED
from lora_utils import ADAPTER_FILE, LORA_FILE, bake_lora
from models.adapters import load_adapters, weights_hash
from models.base import load_base
from models.checkpoints import RESUME_FILE
from models.lora_files import load_lora
from personalise import main as personalise_main
from training import loop
from training.loop import train
from training.objective import RowDraws, batch_losses
from training.personal import Lessons, Measure, Watch
from training.personalising import personal_config
from training.run import set_up

QUICK = ("personal.measure_every=2", "personal.seeds=1", "personal.num_inference_steps=2")


@pytest.fixture()
def checkpoint(make_checkpoint):
    """Of joint training, whose own configuration has all that a personal run takes over."""
    return make_checkpoint("model.lora.r=2", "model.lora.alpha=2")


@pytest.fixture()
def config(checkpoint, examples, tmp_path):
    def make(*overrides: str, **options):
        work = [f"output.out_dir={tmp_path / 'work'}", f"data.cache_dir={tmp_path / 'work' / 'cache'}"]
        return personal_config(checkpoint, examples, "sks", "a man", overrides=[*work, *QUICK, *overrides], **options)

    return make


@pytest.fixture()
def command(checkpoint, examples, tmp_path, run_script):
    def run(*arguments, out="sks"):
        given = {"--examples": examples, "--name": "sks", "--class": "a man", "--base-checkpoint": checkpoint}
        given |= dict(zip(arguments[::2], arguments[1::2]))
        flat = [item for pair in given.items() for item in pair if item is not None]
        quick = [f"--{setting}" for setting in QUICK]
        return run_script(personalise_main, *flat, "--out", tmp_path / "adapters" / out, *quick)

    return run


def weights(run) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.parameters]


def test_a_folder_that_loads_and_nothing_else_is_left(command, checkpoint, examples, tmp_path, tiny_base):
    status, out, error = command("--training.personal.max_steps", 4)
    folder = tmp_path / "adapters" / "sks"
    assert status == 0 and out.split()[-1] == str(folder), error
    names = {path.name for path in folder.iterdir()}
    assert names == {LORA_FILE, "sks.safetensors", ADAPTER_FILE, "config.yaml", "training_state.json", "curve.png",
                     "measures.json"}  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == ["sks"], "no folder of work is left"
    said = json.loads((folder / ADAPTER_FILE).read_text())
    assert said == {"word": "sks", "class_prompt": "a man", "base_checkpoint": str(checkpoint),
                    "base_weights": weights_hash(checkpoint)}  # fmt: skip
    assert [measure["step"] for measure in json.loads((folder / "measures.json").read_text())] == [2, 4]
    base = load_base(str(tiny_base))
    load_lora(base, checkpoint)
    load_adapters(base, [(folder, 1.0)], weights_hash(checkpoint))
    assert base.tokenizer.tokenize("sks") == ["sks"]
    assert command("--training.personal.max_steps", 2)[0] == 0, "an adapter may be trained anew in its place"


def test_only_the_lora_and_the_word_move(config, tiny_base, checkpoint, monkeypatch):
    runs = []
    monkeypatch.setattr(loop, "set_up", lambda *arguments: runs.append(set_up(*arguments)) or runs[-1])
    train(config("training.personal.max_steps=3", "personal.patience=null"), "personal")
    fresh = load_base(str(tiny_base))
    load_lora(fresh, checkpoint)
    bake_lora(fresh)
    for name, module in fresh.modules().items():
        after = runs[0].base.modules()[name].state_dict()
        for key, before in module.state_dict().items():
            key = next(other for other in (key, *_wrapped(key)) if other in after)
            assert torch.equal(before, after[key]), f"{name}.{key}"
    *lora, vector = runs[0].parameters
    noun = fresh.text_encoder.get_input_embeddings().weight[fresh.tokenizer.convert_tokens_to_ids("man</w>")]
    assert vector.shape == (1, 16) and not torch.equal(vector[0], noun)
    assert sum(bool(parameter.abs().sum() > 0) for parameter in lora) == len(lora)


def _wrapped(key: str) -> list[str]:
    """What a frozen weight is called under a LoRA, and a table of embeddings under new words."""
    layer, _, kind = key.rpartition(".")
    return [f"{layer}.base_layer.{kind}", f"{layer}.table.{kind}"]


def test_the_prior_starts_at_nothing_and_is_what_the_lora_changes(config):
    run = set_up(config(), "personal")
    batch = next(loop.open_batches(run))
    (losses,) = batch_losses(run, batch, RowDraws(0, 1, range(3)))
    assert set(losses) == {"loss/t2uv", "loss/edit", "loss/prior", "loss/combined"}
    assert losses["loss/prior"] == 0 and losses["loss/t2uv"] > 0
    with torch.no_grad():
        for parameter in run.parameters[:-1]:
            parameter.normal_(std=0.3)
    (moved,) = batch_losses(run, batch, RowDraws(0, 1, range(3)))
    assert moved["loss/prior"] > 0
    moved["loss/prior"].backward()
    assert run.parameters[-1].grad is None or not run.parameters[-1].grad.any(), "the prior does not say the word"
    total = run.schedule.alpha * (moved["loss/t2uv"] + moved["loss/edit"]) + run.schedule.beta * moved["loss/prior"]
    torch.testing.assert_close(moved["loss/combined"], total)


def test_an_edit_is_the_base_in_its_region_and_the_example_elsewhere(config):
    """At step 0 the word is the class: the base's own prediction leaves no error in an edit's region."""
    run = set_up(config("training.outside_weight=1"), "personal")
    batch = next(loop.open_batches(run))
    assert len({edit.share.sum().item() for edit in run.lessons.edits}) > 1, "several regions"
    everywhere, nowhere = (
        [type(edit)(edit.prompt, edit.class_states, torch.full_like(edit.share, share)) for edit in run.lessons.edits]
        for share in (1.0, 0.0)
    )
    errors = {}
    for name, edits in {"own": run.lessons.edits, "everywhere": everywhere, "nowhere": nowhere}.items():
        run.lessons.edits = edits
        (losses,) = batch_losses(run, batch, RowDraws(0, 1, range(3)))
        errors[name] = losses["loss/edit"].item()
    # Not to the bit: "a man" has an article more.
    assert errors["everywhere"] < errors["nowhere"] / 1000 < errors["own"] < errors["nowhere"], errors


def test_a_garment_is_learned_in_its_region_alone(config):
    run = set_up(config("personal.region=top", "training.outside_weight=1"), "personal")
    assert not run.lessons.edits and 0 < run.lessons.outside.mean() < 1
    (losses,) = batch_losses(run, next(loop.open_batches(run)), RowDraws(0, 1, range(3)))
    run.lessons.outside = torch.ones_like(run.lessons.outside)
    (nothing,) = batch_losses(run, next(loop.open_batches(run)), RowDraws(0, 1, range(3)))
    assert set(losses) == {"loss/t2uv", "loss/prior", "loss/combined"} and losses["loss/t2uv"] > 0
    assert nothing["loss/t2uv"] < losses["loss/t2uv"] / 1000, "the class everywhere: the word starts as it"


def test_class_images_take_the_place_of_the_bases_prediction(config, examples, tmp_path):
    shutil.copytree(examples, tmp_path / "class")
    (tmp_path / "class" / "2.png").unlink()
    run = set_up(config(class_images=tmp_path / "class"), "personal")
    assert run.lessons.prior_latents.shape[0] == len(run.lessons.prior_states) == 2
    (losses,) = batch_losses(run, next(loop.open_batches(run)), RowDraws(0, 1, range(3)))
    assert losses["loss/prior"] > 0, "of the noise of the class's own textures"


def test_examples_take_turns_in_being_held_out(config):
    run = set_up(config(), "personal")
    turns = 3
    for epoch_of_turn in range(2 * turns):
        rows = []
        for step in range(2):
            run.global_step = 2 * epoch_of_turn + step
            rows += next(loop.open_batches(run))["texture_id"].tolist()
        assert set(rows) == {0, 1, 2} - {epoch_of_turn % turns}
    measured = [((step - 1) // 2) % 3 for step in (2, 4, 6)]  # as Watch.measure has it
    assert measured == [0, 1, 2]


def test_fewer_than_three_examples_are_all_trained_on(config, examples):
    (examples / "2.png").unlink()
    run = set_up(config(), "personal")
    assert set(next(loop.open_batches(run))["texture_id"].tolist()) == {0, 1}


def test_going_on_is_as_if_it_had_never_stopped(config, tmp_path):
    whole = train(config("training.personal.max_steps=6", "personal.patience=null"), "personal")
    measures = json.loads((whole / "measures.json").read_text())
    expected = {path.name: load_file(path) for path in whole.glob("*.safetensors")}
    shutil.rmtree(tmp_path / "work" / "personal")
    short = config("training.personal.max_steps=2", "personal.patience=null", "output.save_every=1")
    train(short, "personal")
    (last,) = (tmp_path / "work" / "personal").glob("step-000001")  # the best one lost what resuming needs
    assert (last / RESUME_FILE).is_file()
    shutil.rmtree(tmp_path / "work" / "personal" / "step-000002")
    again = train(config("training.personal.max_steps=6", "personal.patience=null"), "personal", resume="auto")
    assert again == whole and json.loads((again / "measures.json").read_text()) == measures
    for path in again.glob("*.safetensors"):
        for key, value in load_file(path).items():
            assert torch.equal(value, expected[path.name][key]), key


def test_before_training_the_class_has_not_moved_and_the_word_is_as_far_as_it(config):
    run = set_up(config(), "personal")
    measure = run.watch.measure(2)
    assert measure.prior == pytest.approx(1, abs=1e-6) and measure.identity == pytest.approx(np.exp(-1), abs=0.01)
    with torch.no_grad():
        for parameter in run.parameters[:-1]:
            parameter.normal_(std=0.3)
    assert run.watch.measure(2).prior < 1 and not run.watch.is_over


def plant(monkeypatch, scores: list[float]) -> None:
    """Measures as if a run had these scores."""
    planted = iter(scores)

    def measure(self, step):
        self.measures.append(Measure(step, next(planted), 1.0))
        return self.measures[-1]

    monkeypatch.setattr(Watch, "measure", measure)


def test_it_stops_by_itself_and_keeps_the_best_step(config, monkeypatch):
    plant(monkeypatch, [0.2, 0.5, 0.7, 0.6, 0.7, 0.4, 0.9])
    best = train(config("personal.patience=3", "training.personal.max_steps=40"), "personal")
    assert best.name == "step-000006", "the first of the equal ones"
    assert [measure["identity"] for measure in json.loads((best / "measures.json").read_text())][-1] == 0.4
    curve = np.asarray(Image.open(best / "curve.png").convert("RGB")).reshape(-1, 3)
    assert len(np.unique(curve, axis=0)) > 4
    last = max(path.name for path in best.parent.glob("step-*"))
    assert last == "step-000012", "three measures without a better one"


def test_steps_given_by_hand_are_all_trained_and_the_last_is_kept(config, monkeypatch):
    plant(monkeypatch, [0.9, 0.5, 0.4, 0.3])
    last = train(config("personal.patience=1", steps=7), "personal")
    assert last.name == "step-000007"
    assert (last / "curve.png").is_file()


def test_a_stopped_command_goes_on(command, tmp_path, monkeypatch, capsys):
    original = loop.optimizer_step

    def stop_once(run, global_step, batches, log):
        if global_step == 3:
            import os
            import signal

            monkeypatch.setattr(loop, "optimizer_step", original)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, global_step, batches, log)

    monkeypatch.setattr(loop, "optimizer_step", stop_once)
    status, out, _ = command("--training.personal.max_steps", 4)
    assert status == STOPPED and "the same command goes on" in out and not (tmp_path / "adapters" / "sks").exists()
    status, out, _ = command("--training.personal.max_steps", 4)
    assert status == 0 and "at step 3" in out and (tmp_path / "adapters" / "sks" / ADAPTER_FILE).is_file()
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["sks"]


def test_pictures_become_textures_first(command, examples, tmp_path, monkeypatch):
    shutil.rmtree(examples)
    examples.mkdir()
    for number in range(2):
        Image.new("RGB", (24, 40), (200, 90 * number, 30)).save(examples / f"{number}.jpg")
        (examples / f"{number}.txt").write_text(f"a man in number {number}")
    seen = []
    monkeypatch.setattr(loop, "set_up", lambda *arguments: seen.append(set_up(*arguments)) or seen[-1])
    arguments = ["--training.personal.max_steps", 1]
    status, _, error = command(*arguments)
    assert status == 2 and "say --pictures" in error
    status, _, error = command(*arguments, "--pictures", None)
    assert status == 0, error
    assert seen[0].dataset.prompts == ["sks in number 0", "sks in number 1"]


def test_refusals_are_one_line_and_write_nothing(command, examples, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "many").mkdir()
    for number in range(21):
        shutil.copy(examples / "0.png", tmp_path / "many" / f"{number}.png")
    (tmp_path / "other").mkdir()
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:10] = 255
    Image.fromarray(pixels).save(tmp_path / "other" / "0.png")
    (tmp_path / "half").mkdir()
    shutil.copy(examples / "0.png", tmp_path / "half")
    shutil.copy(examples / "1.png", tmp_path / "half")
    (tmp_path / "half" / "0.txt").write_text("a man in red")
    cases = {
        ("--examples", tmp_path / "empty"): "no pictures in",
        ("--examples", tmp_path / "nowhere"): "no pictures in",
        ("--examples", tmp_path / "many"): "holds 21 pictures; give 1 to 20 examples",
        ("--examples", tmp_path / "other"): "is of another UV layout: it shares",
        ("--examples", tmp_path / "half"): "texture 1.png has no prompt",
        ("--name", "man"): "'man' is a word that the text encoder knows already",
        ("--name", "two words"): "give one word",
        ("--class", " "): "--class is empty",
        ("--base-checkpoint", tmp_path / "nowhere"): "no checkpoint at",
        ("--base-checkpoint", tmp_path / "many"): "is no checkpoint",
        ("--steps", 0): "--steps 0: give 1 or more",
        ("--personal.rank", 3): "unknown key 'personal.rank'",
        ("--personal.region", "tail"): "unknown region 'tail'",
    }
    for arguments, message in cases.items():
        status, _, error = command(*arguments)
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(lines) == 1 and message in lines[0], (arguments, error)
        assert not list(tmp_path.glob("adapters/*")) and not list(tmp_path.glob("adapters/.*")), arguments
    (tmp_path / "adapters" / "mine").mkdir(parents=True)
    (tmp_path / "adapters" / "mine" / "notes.txt").write_text("mine")
    status, _, error = command(out="mine")
    assert status == 2 and "is there already and is no adapter" in error
    assert [path.name for path in Path(tmp_path / "adapters" / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "caption,said",
    [
        ("sks in a blue jacket", "sks in a blue jacket"),
        ("A man in a blue jacket", "sks in a blue jacket"),
        ("a mannequin", "sks, a mannequin"),
        ("blue jacket", "sks, blue jacket"),
        ("SKS", "SKS"),
    ],
)
def test_captions_say_the_word(caption, said):
    assert with_word(caption, "sks", "a man") == said


def test_lessons_without_regions_have_no_edits():
    lessons = Lessons(None, None, None, [], None, None)
    assert lessons.kinds(("text", "edit", "prior")) == ("text", "prior")
