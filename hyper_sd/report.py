"""The report of an evaluation: report.json, report.html and the grids of images, written whole or not at all."""

import base64
import html
import io
import itertools
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hyper_sd.files import replace_file

RUN_FACTS = ("engine", "resumed_from", "wall_s", "peak_rss_bytes")  # what only the training run itself can know

_CELL = (112, 256)  # shortest and longest side of an image in a grid, pixels
_GAP = 6
_FONT = 15
_CAPTION_WIDTH, _HEADER_WIDTH = 30, 16  # characters
_METRICS = {"accuracy": "accuracy", "frechet": "Fréchet distance", "gap": "gap", "mse_to_teacher": "distance to the teacher's end point"}


def write(run_dir: Path, results: Mapping[str, Any], grids: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write the report into a run's directory and return report.json's content: the evaluation's results and the run's facts.

    `grids` maps "" (the final adapter), a stage's name, or another name to columns of images (B, 3, H, W), one row a prompt:
    grid.png in the run's directory and in those of its stages, grid_<name>.png otherwise.
    """
    guards = {name: json.loads(file.read_text()) for name in results["stages"] if (file := run_dir / name / "guard.json").is_file()}
    report = {**results, "guards": guards, **{name: facts.get(name) for name in RUN_FACTS}}
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    prompts = report["grid_prompts"]
    for name, columns in grids.items():
        save_grid(_grid_path(run_dir, name, report), columns, prompts)
    replace_file(run_dir / "report.html", _html(run_dir, report, list(grids)).encode())
    replace_file(run_dir / "report.json", text.encode())
    return report


def facts_of(run_dir: Path) -> dict[str, Any]:
    """The facts of the training run, from the report that it wrote; empty if there is none."""
    file = run_dir / "report.json"
    report = json.loads(file.read_text()) if file.is_file() else {}
    return {name: report[name] for name in RUN_FACTS if name in report}


def save_grid(path: Path, columns: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
    """A labelled PNG: one row a prompt, one column an entry of `columns`, each images (len(prompts), 3, H, W) in [0, 1]."""
    image = draw_grid(columns, prompts)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    replace_file(path, buffer.getvalue())


def draw_grid(columns: Mapping[str, Tensor], prompts: Sequence[str]) -> Image.Image:
    """Small images are enlarged by whole pixels, so that they stay what they are; large ones are reduced."""
    font = ImageFont.load_default(size=_FONT)
    cells = [[_cell(images[row]) for images in columns.values()] for row in range(len(prompts))]
    captions = ["\n".join(textwrap.wrap(prompt, _CAPTION_WIDTH)) for prompt in prompts]
    headers = ["\n".join(textwrap.wrap(name, _HEADER_WIDTH)) for name in columns]
    canvas = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [canvas.multiline_textbbox((0, 0), caption, font=font) for caption in captions]
    left = int(max(box[2] for box in boxes)) + 3 * _GAP
    top = int(max(canvas.multiline_textbbox((0, 0), header, font=font)[3] for header in headers)) + 2 * _GAP
    side = cells[0][0].width + _GAP
    height = max(side, int(max(box[3] for box in boxes)) + _GAP)
    grid = Image.new("RGB", (left + side * len(columns) + _GAP, top + height * len(prompts)), "white")
    canvas = ImageDraw.Draw(grid)
    for column, header in enumerate(headers):
        center = left + column * side + (side - _GAP) / 2
        canvas.multiline_text((center, top - _GAP), header, "black", font, anchor="md", align="center")
    for row, caption in enumerate(captions):
        canvas.multiline_text((left - 2 * _GAP, top + row * height + (side - _GAP) / 2), caption, "black", font, anchor="rm", align="right")
        for column, cell in enumerate(cells[row]):
            grid.paste(cell, (left + column * side, top + row * height))
    return grid


def to_image(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] to a PIL image."""
    return Image.fromarray((image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())


def table(report: Mapping[str, Any]) -> str:
    """The results as text, a line a row; what was not measured is left out."""
    metrics = _measured(report)
    lines = [["", *(name.replace("_", " ") if name in _METRICS else name for name in metrics)]]
    lines += [[label, *(_figure(row, name) for name in metrics)] for label, row in _lines(report)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*rows, *_change_lines(report), *map(_negative, report.get("negative_prompts", []))])


def _change_lines(report: Mapping[str, Any]) -> list[str]:
    """What each stage changed against the one before it, a line a step count."""
    return [
        f"{stage} against {change['before']}, {_steps(n)}: " + ", ".join(_differences(row))
        for stage, change in report["changes"].items()
        for n, row in change["steps"].items()
    ]


def _differences(row: Mapping[str, Any]) -> Iterator[str]:
    for name in ("accuracy", "gap"):
        if row[name] is not None:
            yield f"{name} {_signed(row[name])}"
    for name, reward in row["rewards"].items():
        closed = "" if reward["closed"] is None else f" ({reward['closed']:.2f} of what was missing to fresh renders)"
        yield f"reward {name} {_signed(reward)}{closed}"


def _signed(change: Mapping[str, Any]) -> str:
    return f"{change['difference']:+.4f} ± {change['standard_error']:.4f}"


def _negative(result: Mapping[str, Any]) -> str:
    return (
        f"{result['adapter']}, {_steps(str(result['steps']))}, guidance {result['guidance']:g}: the judge finds the second object in "
        f"{result['found_without']:.3f} of {result['prompts']} images, with a negative prompt that names it in {result['found_with']:.3f}"
    )


def _lines(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(label, figures) of every row, in reading order."""
    teacher = report["teacher"]
    lines = [(f"teacher, {_steps(n)}", row) for n, row in teacher.items() if n.isdigit()]
    lines += [(f"teacher, {_steps(n)}, best guidance {row['guidance']:g}", row) for n, row in teacher["best_guidance"].items()]
    for name, rows in [*report["stages"].items(), ("final", report["final"])]:
        lines += [(f"{name}, {_steps(n)}", rows[n]) for n in sorted(rows, key=int, reverse=True)]
    return lines


def _measured(report: Mapping[str, Any]) -> list[str]:
    """The columns: what at least one row has, the judge's figures first. Reports of earlier versions have no further metrics."""
    rows = [row for _, row in _lines(report)]
    return [name for name in _METRICS if any(row[name] is not None for row in rows)] + [*rows[0].get("metrics", {})]


def _figure(row: Mapping[str, Any], name: str) -> str:
    if name in _METRICS:
        value, error = row[name], row["standard_error"][name]
    else:
        value, error = row["metrics"][name]["value"], row["metrics"][name]["standard_error"]
    if value is None:
        return "-"
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _steps(num: str) -> str:
    return f"{num} step{'' if num == '1' else 's'}"


def _cell(image: Tensor) -> Image.Image:
    cell, (low, high) = to_image(image), _CELL
    if cell.width < low:
        return cell.resize((cell.width * -(-low // cell.width), cell.height * -(-low // cell.width)), Image.Resampling.NEAREST)
    if cell.width > high:
        cell.thumbnail((high, high), Image.Resampling.LANCZOS)
    return cell


def _grid_path(run_dir: Path, name: str, report: Mapping[str, Any]) -> Path:
    if not name:
        return run_dir / "grid.png"
    return run_dir / name / "grid.png" if name in report["stages"] else run_dir / f"grid_{name}.png"


_COLORS = ("#c23", "#26a", "#2a6", "#a62", "#72a")

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; }
tr.chosen { font-weight: 600; }
tr.first td { border-top: 2px solid #bbb; }
img { max-width: 100%; }
small { color: #666; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 13px; }
"""

_NOTES = """
<p><b>accuracy</b>: share of images in which an independent classifier finds every attribute of the caption.
<b>Fréchet distance</b> (FD): between the classifier's features of the images and of fresh renders; lower is better, and perfect images
would reach the floor. <b>gap</b>: (FD - FD of the teacher) / (FD of the un-distilled teacher at as many steps, at most two, with its best
guidance - FD of the teacher); 0 is as good as the teacher, 1 is no better than without distillation. <b>Distance to the teacher's end
point</b>: mean squared difference of the latents from the same noise. ± is one standard error.</p>
"""


_METRIC_NOTES = """
<p>Rewards: higher is better, and only figures of one reward can be compared. <b>fid</b>, <b>kid</b>, <b>cmmd</b>: distances of the images'
features to those of real images, lower is better, on the features named below. <b>diversity</b>: 1 - the mean cosine between features of
images that differ in their seed alone; the teacher's is the one to keep.</p>
"""


def _html(run_dir: Path, report: Mapping[str, Any], grids: Sequence[str]) -> str:
    evaluation = report["evaluation"]
    judged = evaluation["floor"] is not None
    intro = f"{evaluation['prompts']} prompts, draws: {evaluation['draws']}; every row on the same prompts and the same noise."
    if judged:
        intro += f" Floor: FD {evaluation['floor']:.3f}, accuracy {evaluation['floor_accuracy']:.3f}."
    parts = [
        f"<h1>{html.escape(run_dir.name)}</h1><p>{intro} Teacher guidance {report['teacher']['guidance']:g}.</p>",
        _results_table(report),
        _NOTES if judged else "",
        _METRIC_NOTES if set(_measured(report)) - _METRICS.keys() else "",
        _changes_section(report),
        *(_guard_section(name, guard["history"]) for name, guard in report["guards"].items()),
        *(_grid_section(run_dir, name, report) for name in grids),
        _sweep_table(report["sampler"]["sweep"]),
        "<h2>Samplers</h2>" + _json_block({name: value for name, value in report["sampler"].items() if name != "sweep"}),
        "<h2>Run and machine</h2>" + _json_block({**{name: report[name] for name in RUN_FACTS}, "evaluation": evaluation}),
    ]
    body = "\n".join(part for part in parts if part)
    title = html.escape(run_dir.name)
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>\n{body}\n</html>\n'


def _results_table(report: Mapping[str, Any]) -> str:
    metrics = _measured(report)
    rows, owner = [], ""
    for label, row in _lines(report):
        first = ' class="first"' if label.split(",")[0] != owner else ""
        owner = label.split(",")[0]
        rows.append(f"<tr{first}><td>{html.escape(label)}</td>" + "".join(f"<td>{_figure(row, name)}</td>" for name in metrics) + "</tr>")
    head = "".join(f"<th>{html.escape(_METRICS.get(name, name))}</th>" for name in metrics)
    return f"<h2>Results</h2><table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _grid_section(run_dir: Path, name: str, report: Mapping[str, Any]) -> str:
    data = base64.b64encode(_grid_path(run_dir, name, report).read_bytes()).decode()
    title = f"Images: {name or 'final adapter'}"
    return f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def _changes_section(report: Mapping[str, Any]) -> str:
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in _change_lines(report))
    note = "On the same prompts and noise, the last stage and the one before it with the same samplers; ± is one standard error."
    return f"<h2>What stages changed</h2><p>{note}</p><ul>{lines}</ul>" if lines else ""


def _guard_section(stage: str, history: Sequence[Mapping[str, float]]) -> str:
    """The trained rewards and the held-out one while a stage was trained, each on a scale of its own."""
    names = [name for name in history[0] if name not in ("step", "trained")]
    last = max(history[-1]["step"], 1)
    lines = []
    for name, color in zip(names, itertools.cycle(_COLORS)):
        values = [row[name] for row in history]
        low, span = min(values), max(max(values) - min(values), 1e-9)
        points = " ".join(f"{600 * row['step'] / last:.1f},{150 - 140 * (row[name] - low) / span:.1f}" for row in history)
        label = f"{html.escape(name)}: {values[0]:.4f} to {values[-1]:.4f}, at most {max(values):.4f}"
        line = f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"><title>{label}</title></polyline>'
        lines.append(f'{line}<text x="610" y="{20 + 24 * len(lines)}" fill="{color}" font-size="14">{label}</text>')
    height = max(160, 24 * len(lines) + 10)
    svg = f'<svg viewBox="0 0 1000 {height}" width="1000" height="{height}" role="img">{"".join(lines)}</svg>'
    return f"<h2>Rewards while {html.escape(stage)} was trained</h2><p>Steps 0 to {last:g}.</p>{svg}"


def _sweep_table(sweep: Sequence[Mapping[str, Any]]) -> str:
    if not sweep:
        return ""
    names = ("adapter", "steps", "guidance", "eta", "start", "accuracy", "frechet")
    kinds = ["chosen" if row["chosen"] else "" for row in sweep]
    cells = ["".join(f"<td>{_value(row[name])}</td>" for name in names) for row in sweep]
    rows = [f'<tr class="{kind}">{text}</tr>' for kind, text in zip(kinds, cells, strict=True)]
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<h2>Choice of the samplers</h2><p>Chosen rows are bold.</p><table><tr>{head}</tr>{''.join(rows)}</table>"


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else html.escape(str(value))


def _json_block(value: Any) -> str:
    return f"<pre>{html.escape(json.dumps(value, indent=1))}</pre>"
