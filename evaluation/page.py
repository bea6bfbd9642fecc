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

FAMILIES = ("texture", "render", "uv", "follows")
SIDE = 220  # of a picture on the page, in pixels
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1240px; margin: 2em auto; padding: 0 1em }
h1, h2, h3 { line-height: 1.25 } h2 { margin-top: 2.2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: 1em 0 } th { text-align: left; color: #555; font-weight: 600 }
td, th { padding: .2em .9em .2em 0; border-bottom: 1px solid #eee; vertical-align: top }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap } td.reason { color: #777 }
.row { display: flex; gap: 8px; flex-wrap: wrap; align-items: flex-end } figure { margin: 0 0 .6em }
figcaption { font-size: 12px; color: #666 } img { display: block; width: 150px; height: 150px; object-fit: contain }
.case { margin: 1.6em 0 } .case p { margin: .2em 0 } code { font-size: 13px }
"""


def page(results: dict, samples: EvaluationSet, measured: dict[str, Measures], made: dict[str, Callable]) -> str:
    """The HTML. made: a task's name → the number of a sample → its texture (3, size, size) in [0, 1]."""
    sections = [f"<p>{html.escape(heading(results))} Values with 95&nbsp;% intervals; N is the number of samples.</p>"]
    warnings = results.get("warnings", [])
    sections += [f'<p class="warning"><b>Warning:</b> {html.escape(warning)}.</p>' for warning in warnings]
    sections += [_table(results)]
    for task, textures in made.items():
        sections.append(
            f"<h2>{TITLES[task]}: best, median and worst</h2>{_cases(samples, measured[task], textures, task)}"
        )
    skipped = "".join(f"<li>{html.escape(line)}</li>" for line in results["skipped"]) or "<li>Nothing.</li>"
    sections.append(f"<h2>Skipped</h2><ul>{skipped}</ul>")
    head = f'<head><meta charset="utf-8"><title>Evaluation</title><style>{STYLE}</style></head>'
    body = f"<body><h1>Evaluation</h1>{''.join(sections)}</body>"
    return f'<!doctype html><html lang="en">{head}{body}</html>\n'


def _table(results: dict) -> str:
    """A row a measure, a column a task; what could be had of none stands below, with the reason."""
    tasks = results["tasks"]
    names = dict.fromkeys(name for measures in tasks.values() for name in measures["figures"])
    names = sorted(names, key=lambda name: FAMILIES.index(name.partition(".")[0]))
    heads = "".join(f"<th>{html.escape(TITLES[task])}</th>" for task in tasks)
    rows, reasons, family = [], {}, ""
    for name in names:
        figures = [measures["figures"].get(name) for measures in tasks.values()]
        told = [figure for figure in figures if isinstance(figure, str)]
        if not any(isinstance(figure, dict) for figure in figures):
            reasons.setdefault(told[0], []).append(name)
            continue
        if name.partition(".")[0] != family:
            family = name.partition(".")[0]
            rows.append(f'<tr><th colspan="{len(tasks) + 2}">{family}</th></tr>')
        cells = "".join(map(_cell, figures))
        rows.append(f"<tr><td><code>{html.escape(name)}</code></td><td>{better(name)}</td>{cells}</tr>")
    left_out = "".join(
        f"<li><code>{html.escape(', '.join(names))}</code>: {html.escape(text)}</li>" for text, names in reasons.items()
    )
    table = f"<table><tr><th>measure</th><th></th>{heads}</tr>{''.join(rows)}</table>"
    return f"<h2>Figures</h2>{table}" + (f"<h3>Not measured</h3><ul>{left_out}</ul>" if left_out else "")


def _cell(figure: dict | str | None) -> str:
    if figure is None:
        return "<td></td>"
    if isinstance(figure, str):
        return f'<td class="reason">{html.escape(figure)}</td>'
    interval = f"[{shown(figure['low'])}, {shown(figure['high'])}]"
    return f'<td class="number"><b>{shown(figure["value"])}</b> {interval} N={figure["count"]}</td>'


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
        told = f"{case}: <code>{shown(values[number].item())}</code>, sample {html.escape(samples.names[number])}"
        prompt = html.escape(samples.prompts[number])
        prompt = f"“{prompt}”" if task != "i2uv" else f"from the picture alone; it shows “{prompt}”"
        rows = [_row(samples, textures(number), "made")]
        if samples.truth:
            rows.append(_row(samples, samples.truth(number), "true"))
        if task == "i2uv" and samples.picture:
            rows.insert(0, f'<div class="row">{_figure(samples.picture(number), "the picture")}</div>')
        cases.append(f'<div class="case"><p><b>{told}</b></p><p>{prompt}</p>{"".join(rows)}</div>')
    return "".join(cases)


def _row(samples: EvaluationSet, texture: Tensor, what: str) -> str:
    """A texture and its four renders."""
    body = load_body(samples.body)
    views = render_four_views(body, filled(texture[None], uv_mask(body, samples.size))[0], 2 * SIDE)
    captions = ["in front", "one side", "behind", "the other side"]
    pictures = [(image_from_pixels(view * 2 - 1), caption) for view, caption in zip(views, captions)]
    pictures.insert(0, (image_from_pixels(texture * 2 - 1), f"{what} texture"))
    return f'<div class="row">{"".join(_figure(*pair) for pair in pictures)}</div>'


def _figure(image: Image.Image, caption: str) -> str:
    image = image.convert("RGB")
    image.thumbnail((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
    encoded = base64.b64encode(encode_image(image, format="JPEG", quality=88)).decode()
    picture = f'<img src="data:image/jpeg;base64,{encoded}" alt="{caption}">'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"
