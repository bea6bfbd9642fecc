"""One page of results that needs nothing beside it: the table, and the best, median and worst cases on the body."""

import base64
import html
from collections.abc import Callable

from PIL import Image
from torch import Tensor

from common.pictures import encode_image, image_from_pixels
from evaluation.data import EvaluationSet
from evaluation.measuring import Measures, ranking
from evaluation.render_space import render_four_views
from evaluation.report import TITLES, better, heading, shown
from evaluation.texture_space import filled
from render.rigs import load_body
from render.uv_space import uv_mask

FAMILIES = {
    "texture": "Against the true textures, texel by texel",
    "render": "On the body",
    "uv": "UV consistency",
    "follows": "What was asked for",
}
SIDE = 220  # of a picture on the page, in pixels
# Grays no lighter than #595959 on white: a contrast of 7, where WCAG AA asks for 4.5.
STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #1f2328; background: #fff;
  max-width: 1200px; margin: 0 auto; padding: 2rem 1.25rem 4rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 3rem 0 .75rem }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem }
p { max-width: 75ch; margin: .5rem 0; overflow-wrap: anywhere }
code { font: .88em ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere }
.warning { border-left: 4px solid #9a6700; background: #fff8e5; padding: .6rem .9rem }
table { border-collapse: collapse; width: 100%; table-layout: fixed }
th, td { text-align: left; vertical-align: top; padding: .4rem 1rem .4rem 0; border-bottom: 1px solid #d8dee4 }
thead th { border-bottom: 2px solid #59636e }
tbody th code { overflow-wrap: normal }
tbody th { font-weight: 400 }
.family th { font-weight: 700; padding-top: 1.5rem; border-bottom-color: #59636e }
.network, .interval, .reason, figcaption, .better { color: #595959 }
.network { display: block; font-size: .85rem; line-height: 1.3 }
.value { font-weight: 600; font-variant-numeric: tabular-nums }
.interval { display: block; font-size: .82rem; line-height: 1.4; font-variant-numeric: tabular-nums }
.reason { font-size: .85rem; line-height: 1.4; overflow-wrap: anywhere }
.case { margin: 2rem 0 0; padding-top: 1rem; border-top: 1px solid #d8dee4 }
.case h3 { margin: 0 }
.row { display: grid; grid-template-columns: repeat(5, 1fr); gap: .5rem; margin-top: .75rem }
figure { margin: 0 } figcaption { font-size: .85rem; line-height: 1.3; margin-top: .2rem }
img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #f6f8fa }
.picture { max-width: 240px }
.lists li { margin: .4rem 0; overflow-wrap: anywhere }
@media (max-width: 720px) {
  body { padding-top: 1.25rem }
  h1 { font-size: 1.6rem }
  thead { display: none }
  table, tbody, tr, th, td { display: block; border: 0; padding: 0 }
  tbody tr { padding: .7rem 0; border-bottom: 1px solid #d8dee4 }
  tbody .family { border-bottom: 2px solid #59636e; padding-bottom: .3rem }
  td[data-task] { display: grid; grid-template-columns: 9rem 1fr; gap: .5rem; margin-top: .3rem }
  td[data-task]::before { content: attr(data-task); color: #595959; font-size: .85rem; line-height: 1.7 }
  td:empty { display: none }
  .row { grid-template-columns: repeat(2, 1fr) }
  .row figure:first-child { grid-column: 1 / -1 }
}
"""


def page(results: dict, samples: EvaluationSet, measured: dict[str, Measures], made: dict[str, Callable]) -> str:
    """The HTML. made: a task's name → the number of a sample → its texture (3, size, size) in [0, 1]."""
    told = (
        f"{html.escape(heading(results))} Below each value stands its 95&nbsp;% interval; N is the number of samples."
    )
    sections = [f"<p>{told}</p>"]
    warnings = results.get("warnings", [])
    sections += [f'<p class="warning"><b>Warning:</b> {html.escape(warning)}.</p>' for warning in warnings]
    sections += [_table(results)]
    for task, textures in made.items():
        sections.append(
            f"<h2>{TITLES[task]}: best, median and worst</h2>{_cases(samples, measured[task], textures, task)}"
        )
    skipped = "".join(f"<li>{html.escape(line)}</li>" for line in results["skipped"]) or "<li>Nothing.</li>"
    sections.append(f'<h2>Skipped</h2><ul class="lists">{skipped}</ul>')
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<head><meta charset="utf-8">{viewport}<title>Evaluation</title><style>{STYLE}</style></head>'
    body = f"<body><main><h1>Evaluation</h1>{''.join(sections)}</main></body>"
    return f'<!doctype html><html lang="en">{head}{body}</html>\n'


def _table(results: dict) -> str:
    """A row a measure, a column a task; what could be had of none stands below, with the reason."""
    tasks, families = results["tasks"], list(FAMILIES)
    names = dict.fromkeys(name for measures in tasks.values() for name in measures["figures"])
    names = sorted(names, key=lambda name: (families.index(name.partition(".")[0]), name.count(".")))
    heads = "".join(f'<th scope="col">{html.escape(TITLES[task])}</th>' for task in tasks)
    rows, reasons, family = [], {}, ""
    for name in names:
        figures = {task: measures["figures"].get(name) for task, measures in tasks.items()}
        told = [figure for figure in figures.values() if isinstance(figure, str)]
        if not any(isinstance(figure, dict) for figure in figures.values()):
            reasons.setdefault(told[0], []).append(name)
            continue
        if name.partition(".")[0] != family:
            family = name.partition(".")[0]
            columns = len(tasks) + 1
            rows.append(f'<tr class="family"><th colspan="{columns}" scope="colgroup">{FAMILIES[family]}</th></tr>')
        cells = "".join(_cell(task, figure) for task, figure in figures.items())
        rows.append(f'<tr><th scope="row">{_name(name)}</th>{cells}</tr>')
    left_out = "".join(
        f"<li><code>{html.escape(', '.join(names))}</code>: {html.escape(text)}</li>" for text, names in reasons.items()
    )
    head = f'<thead><tr><th scope="col">measure</th>{heads}</tr></thead>'
    table = f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"
    left_out = f'<h3>Not measured</h3><ul class="lists">{left_out}</ul>' if left_out else ""
    return f"<h2>Figures</h2>{table}{left_out}"


def _name(name: str) -> str:
    """A measure without its family, the network that it is of below, and which way is better."""
    _, *network, leaf = name.split(".")
    if network and name.startswith("follows."):
        network, leaf = ([leaf], network[0]) if "retrieval" in network[0] else (network, leaf)
    arrow = f' <span class="better" title="larger is better">{better(name)}</span>' if better(name) else ""
    arrow = arrow.replace("larger", "smaller") if better(name) == "↓" else arrow
    below = f'<span class="network">{html.escape(": ".join(network))}</span>' if network else ""
    return f"<code>{html.escape(leaf)}</code>{arrow}{below}"


def _cell(task: str, figure: dict | str | None) -> str:
    label = f'data-task="{html.escape(TITLES[task].partition(" (")[0])}"'
    if figure is None:
        return "<td></td>"
    if isinstance(figure, str):
        return f'<td {label}><span class="reason">{html.escape(figure)}</span></td>'
    skipped = f", {figure['skipped']} not measured" if figure["skipped"] else ""
    interval = f"{shown(figure['low'])} to {shown(figure['high'])}, N&nbsp;=&nbsp;{figure['count']}{skipped}"
    value = f'<span class="value">{shown(figure["value"])}</span><span class="interval">{interval}</span>'
    return f"<td {label}><span>{value}</span></td>"


def chosen_cases(values: Tensor) -> dict[str, int]:
    """The numbers of the best, the median and the worst sample; fewer where they are one and the same."""
    order = [number for number in values.argsort(descending=True).tolist() if values[number].isfinite()]
    cases = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    return {
        name: number for name, number in cases.items() if number not in list(cases.values())[: list(cases).index(name)]
    }


def _cases(samples: EvaluationSet, measures: Measures, textures: Callable, task: str) -> str:
    ranked = ranking(measures)
    if ranked is None:
        return "<p>No measure orders these textures: give a CLIP model with --extractor, or true textures.</p>"
    name, values = ranked
    cases = [f"<p>By <code>{html.escape(name)}</code>.</p>"]
    for case, number in chosen_cases(values).items():
        told = f"{case.capitalize()}: {shown(values[number].item())}, sample {html.escape(samples.names[number])}"
        prompt = html.escape(samples.prompts[number])
        prompt = f"“{prompt}”" if task != "i2uv" else f"from the picture alone; it shows “{prompt}”"
        rows = [_row(samples, textures(number), "made")]
        if samples.truth:
            rows.append(_row(samples, samples.truth(number), "true"))
        if task == "i2uv" and samples.picture:
            rows.insert(0, f'<div class="picture">{_figure(samples.picture(number), "the picture")}</div>')
        cases.append(f'<div class="case"><h3>{told}</h3><p>{prompt}</p>{"".join(rows)}</div>')
    return "".join(cases)


def _row(samples: EvaluationSet, texture: Tensor, what: str) -> str:
    """A texture and its four renders."""
    body = load_body(samples.body)
    views = render_four_views(body, filled(texture[None], uv_mask(body, samples.size))[0], 2 * SIDE)
    sides = ["in front", "one side", "behind", "the other side"]
    pictures = [(image_from_pixels(view * 2 - 1), f"{what}, {side}") for view, side in zip(views, sides)]
    pictures.insert(0, (image_from_pixels(texture * 2 - 1), f"{what} texture"))
    return f'<div class="row">{"".join(_figure(*pair) for pair in pictures)}</div>'


def _figure(image: Image.Image, caption: str) -> str:
    image = image.convert("RGB")
    image.thumbnail((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
    encoded = base64.b64encode(encode_image(image, format="JPEG", quality=88)).decode()
    picture = f'<img src="data:image/jpeg;base64,{encoded}" alt="{caption}">'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"
