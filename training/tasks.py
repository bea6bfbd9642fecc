"""The tasks, as data: what each conditions the UNet on.

Of "personal", all three are prompts: of the examples, of the examples with one thing changed, and of what is to stay as
it is (training/personal.py `Lessons`). "fast" has what a checkpoint makes of the same conditions for its target
(training/fast.py).

A further task on these conditions is a line in CONDITIONS, its section beside the others in config/configuration.py
`Training`, and a command such as t2uv.py, named in tests/test_house.py and tests/test_commands.py. A new kind of
condition also needs its lines below, its states in training/objective.py `STATES_OF`, what makes them in
training/run.py `_add_trained`, a column of the data set and a line in training/monitoring.py `sample_grid`.
"""

CONDITIONS = {
    "t2uv": ("text",),
    "i2uv": ("image",),
    "joint": ("text", "image"),
    "personal": ("text", "edit", "prior"),
    "fast": ("text", "image"),
}
# Of a condition, in logs: loss/t2uv, val/i2uv.
LOSS_NAME = {"text": "t2uv", "image": "i2uv", "edit": "edit", "prior": "prior"}
# Keys of a task's section, where it has several conditions.
LOSS_WEIGHT = {"text": "alpha", "image": "beta", "edit": "alpha", "prior": "beta"}
