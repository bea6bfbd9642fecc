"""Options that touch the same tensors, in pairs: each combination trains two steps, and resumes to the bit after one.

What does not go together is refused before a step. The rows are a covering array: every pair of two options' values
that may stand together stands in one of them.
"""

import itertools
import random

import pytest
import torch
from tally import IS_LONG, count

from common.errors import UserError
from tests.training.test_resume import assert_equal, state
from training import loop
from training.loop import train

# Option → its values, each as overrides of the configuration.
OPTIONS = {
    "memory format": {"contiguous": (), "channels_last": ("model.channels_last=true",)},
    "LoRA": {
        "plain": (),
        "rslora": ("model.lora.use_rslora=true",),
        "dora": ("model.lora.use_dora=true",),
        "text encoder": ("model.lora.text_encoder_r=2",),
        "image encoder": ("model.lora.image_encoder_r=2",),
    },
    "checkpointing": {"off": (), "on": ("model.gradient_checkpointing=true",)},
    "compile": {"off": (), "on": ("model.compile=true",)},
    "precision": {"float32": (), "bf16": ("training.mixed_precision=bf16",)},
    "cache": {name: (f"data.cache={name}",) for name in ("none", "latents", "all")},
    "schedule": {name: (f"training.joint.schedule={name}",) for name in ("alternate", "paired")},
    "average": {"off": (), "on": ("training.ema_decay=0.9",)},
    "views": {"stored": (), "online": ("data.views=online", "data.views_per_texture=2")},
}
# What is refused: an encoder that is trained gives nothing that can be kept.
REFUSED = {
    (("LoRA", "text encoder"), ("cache", "all")): "text_encoder_r trains the text encoder",
    (("LoRA", "image encoder"), ("cache", "all")): "image_encoder_r trains the image encoder",
}
FORBIDDEN = [set(pair) for pair in REFUSED]
SHORT = ("training.joint.max_steps=2", "output.save_every=1", "training.joint.learning_rate=0.01",
         "model.lora.dropout=0.1", "training.joint.batch_size=2", "training.joint.effective_batch_size=2",
         "model.lora.r=4", "model.lora.alpha=4", "output.log_every=1", "data.resolution=16")  # fmt: skip


def pairs_of(row: dict[str, str]) -> set[frozenset]:
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


def is_allowed(row: dict[str, str]) -> bool:
    return not any(pair <= row.items() for pair in FORBIDDEN)


def covering_array() -> list[dict[str, str]]:
    """Rows, one value of each option, that have every allowed pair: greedily, the best of random rows at a time."""
    values = {name: list(choices) for name, choices in OPTIONS.items()}
    wanted = {
        frozenset(((first, one), (second, other)))
        for first, second in itertools.combinations(values, 2)
        for one in values[first]
        for other in values[second]
    }
    wanted = {pair for pair in wanted if not any(forbidden <= pair for forbidden in FORBIDDEN)}
    rng, rows = random.Random(0), []
    while wanted:
        needed = dict(min(wanted, key=lambda pair: sorted(pair)))
        candidates = [{name: rng.choice(choices) for name, choices in values.items()} | needed for _ in range(300)]
        best = max(filter(is_allowed, candidates), key=lambda row: len(pairs_of(row) & wanted))
        rows.append(best)
        wanted -= pairs_of(best)
    return rows


ROWS = covering_array()
QUICK = 3  # rows that a quick run takes, of those that trace no graph for the compiler, which takes a while
CHOSEN = ROWS if IS_LONG else [row for row in ROWS if row["compile"] == "off"][:QUICK]


@pytest.mark.parametrize("row", CHOSEN, ids=lambda row: "-".join(row.values()).replace(" ", "_"))
def test_a_combination_trains_and_resumes_to_the_bit(row, make_config, tmp_path, monkeypatch):
    # Traced as for the compiler, and run as it is: compiling takes minutes and a compiler.
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: original(function, backend="eager", **options))
    overrides = [override for name, value in row.items() for override in OPTIONS[name][value]]

    def config(name: str):
        return make_config(f"output.out_dir={tmp_path / name}", *SHORT, *overrides)

    whole = train(config("whole"), "joint")
    resumed = train(config("resumed"), "joint", resume=str(whole.with_name("step-000001")))
    assert whole.name == resumed.name == "step-000002"
    assert_equal(state(whole), state(resumed))
    first, last = (state(whole.with_name(f"step-00000{step}"))["parameters"] for step in (1, 2))
    assert any(not torch.equal(*pair) for pair in zip(first, last)), "nothing was learned"
    seen = set().union(*map(pairs_of, ROWS[: ROWS.index(row)]))
    count(option_pairs=len(pairs_of(row) - seen), option_rows=1)


@pytest.mark.parametrize("pair", REFUSED, ids=str)
def test_what_cannot_go_together_is_refused_before_a_step(pair, make_config, monkeypatch):
    monkeypatch.setattr(loop, "optimizer_step", lambda *_: pytest.fail("it trained"))
    overrides = [override for name, value in pair for override in OPTIONS[name][value]]
    with pytest.raises(UserError, match=REFUSED[pair]):
        train(make_config(*SHORT, *overrides), "joint")


def test_the_rows_have_every_pair():
    covered = set().union(*map(pairs_of, ROWS))
    for (first, ones), (second, others) in itertools.combinations(OPTIONS.items(), 2):
        for one, other in itertools.product(ones, others):
            pair = {(first, one), (second, other)}
            assert (frozenset(pair) in covered) != (pair in FORBIDDEN), pair
