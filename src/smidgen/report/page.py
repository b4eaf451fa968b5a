"""RUN/report.html: one file that shows a run, made from what lies in its folder.

Nothing in it is fetched: style and drawings are inside, there is no script, and the reader's browser chooses light or
dark. Texts of the data and the model are escaped. A run that is not finished has a page too, with what there is so far.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from smidgen.data.records import as_specs
from smidgen.export.files import read_object, replace_file
from smidgen.measures.answers import ANSWER_MEASURES
from smidgen.measures.titles import TITLES
from smidgen.report.chart import Series, bars, line_chart, smoothed, thinned
from smidgen.report.style import STYLE
from smidgen.train.run import STATISTICS, SUMMARY, RunFolder
from smidgen.units import format_bytes, format_count, format_duration

__all__ = ["PAGE", "run_page", "write_page"]

PAGE = "report.html"
_MOST_ANSWERS = 12
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_MOST_CHARACTERS = 600  # of a text

Lines = Sequence[Mapping[str, Any]]


def write_page(run: Path) -> Path:
    """Make or replace RUN/report.html; returns its path. Raises RunError if `run` is no run folder."""
    page = run / PAGE
    replace_file(page, run_page(run))
    return page


def run_page(run: Path) -> str:
    """The page as text. Raises RunError if `run` is no run folder or one of its files is damaged."""
    folder, settings, model, data = RunFolder.open(run)
    summary, statistics = _read(run / SUMMARY), _read(run / STATISTICS)
    lines = folder.logged()
    state = _state(summary, lines)
    specs = as_specs(data)
    names, where = ", ".join(Path(spec).name for spec in specs), {"model": model, "data": ", ".join(specs)}
    record = asdict(folder.record)
    versions = record.pop("versions")
    body = [
        f"<header><h1>{escape(run.resolve().name)}</h1><p>{escape(model)}, trained on {escape(names)}."
        f" {escape(state)}</p></header>",
        _tiles(summary, lines),
        _section("Training", _charts(lines), "charts"),
        _section("Memory", _memory(summary), "charts"),
        _section("Answers to held-out rows", _answers(folder.answers())),
        _section("Data", _data(statistics)),
        _section("Settings", _facts(where | asdict(settings)), "fold"),
        _section("Base, machine and versions", _facts(record | versions), "fold"),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(run.resolve().name)}: smidgen</title><style>{STYLE}</style></head><body>"
        + "\n".join(part for part in body if part)
        + "</body></html>\n"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_object(file, cure="copy the run again")
    except FileNotFoundError:
        return {}


def _state(summary: Mapping[str, Any], lines: Lines) -> str:
    steps = max((line["step"] for line in lines), default=0)
    if not summary:
        return f"Not finished: {steps:,} steps so far."
    ended = f"{summary['steps']:,} steps in {format_duration(summary['wall_s'])}"
    return f"{ended}, stopped by {summary['stopped']}." if summary.get("stopped") else f"{ended}."


def _tiles(summary: Mapping[str, Any], lines: Lines) -> str:
    """The figures that one looks for first, before and after where there are two."""
    losses = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    before = summary.get("loss_before", losses[0] if losses else None)
    after = summary.get("loss_after", losses[-1] if len(losses) > 1 else None)
    tiles = [("held-out loss", _change(before, after, "{:.3f}".format))]
    perplexity = _change(summary.get("perplexity_before"), summary.get("perplexity_after"), "{:.4g}".format)
    tiles.append(("perplexity", perplexity))
    for key in ANSWER_MEASURES:
        tiles.append((TITLES[key], _change(summary.get(f"{key}_before"), summary.get(f"{key}_after"), _percent)))
    if summary:
        tiles.append(("tokens a second", f"{summary['tokens_per_s']:,.0f}"))
        tiles.append(("tokens trained", format_count(summary["tokens"])))
        tiles.append(("peak memory", format_bytes(summary["peak_rss_bytes"])))
        if summary.get("swapped_bytes"):
            tiles.append(("of it in swap", format_bytes(summary["swapped_bytes"])))
        tiles.append(("trained parameters", format_count(summary["trainable_parameters"])))
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in tiles if value)
    return f'<dl class="tiles">{cells}</dl>' if cells else ""


def _change(before: float | None, after: float | None, form: Any) -> str:
    if after is None:
        return "" if before is None else escape(form(before))
    return escape(form(after)) + (f"<small>{escape(form(before))} before</small>" if before is not None else "")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _charts(lines: Lines) -> str:
    steps = [line for line in lines if "loss" in line]

    def curve(key: str) -> list[tuple[float, float]]:
        return [(line["step"], line[key]) for line in steps]

    loss = curve("loss")
    held_out = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
    most = max((number for _, number in curve("rss_bytes")), default=0)
    nbytes, unit = (1e9, "GB") if most >= 1e9 else (1e6, "MB")
    memory = [(step, number / nbytes) for step, number in thinned(curve("rss_bytes"))]
    charts = [
        line_chart(
            "Loss",
            [
                Series("", thinned(loss), "faint"),
                Series("training, smoothed", thinned(smoothed(loss))),
                Series("held out", held_out, "dots", "b"),
            ],
            "{:.3g}".format,
        ),
        *_answer_charts(lines),
        line_chart("Learning rate", [Series("", thinned(curve("learning_rate")))], "{:.2g}".format, from_zero=True),
        line_chart("Tokens per second", [Series("", thinned(_speed(steps)))], "{:,.0f}".format, from_zero=True),
        line_chart(f"Memory of the process, {unit}", [Series("", memory)], "{:.3g}".format, from_zero=True),
    ]
    return "".join(charts)


def _answer_charts(lines: Lines) -> list[str]:
    """The measures of answers in training, exact match beside each of the others."""

    def dots(measure: str, colour: str) -> Series:
        key = f"held_out_{measure}"
        return Series(TITLES[measure], [(line["step"], line[key]) for line in lines if key in line], "dots", colour)

    exact, others = ANSWER_MEASURES[0], ANSWER_MEASURES[1:]
    shown = [name for name in others if any(f"held_out_{name}" in line for line in lines)]
    title = "Answers to held-out rows"
    return [line_chart(title, [dots(exact, "a"), dots(name, "b")], _percent, from_zero=True) for name in shown]


def _memory(summary: Mapping[str, Any]) -> str:
    """The forecast beside what the process took at most, and the forecast's parts, largest first."""
    terms = summary.get("forecast_terms")
    if not terms:  # not finished, or a run of before the parts were kept
        return ""
    peaks = [("forecast", summary["forecast_peak_bytes"]), ("measured", summary["peak_rss_bytes"])]
    parts = sorted(((name, size) for name, size in terms.items() if size), key=lambda part: -part[1])
    return bars("Peak of the process", peaks, format_bytes) + bars("Forecast by parts", parts, format_bytes)


def _speed(steps: Lines) -> list[tuple[float, float]]:
    """Of each step, from the running totals."""
    found, tokens, seconds = [], 0, 0.0
    for line in steps:
        took = line["train_s"] - seconds
        if took > 0:
            found.append((line["step"], (line["tokens"] - tokens) / took))
        tokens, seconds = line["tokens"], line["train_s"]
    return found


def _answers(answers: Sequence[Mapping[str, Any]]) -> str:
    """Some answers; those that training changed come first."""
    chosen = sorted(answers, key=lambda answer: answer["before"] == answer["after"])[:_MOST_ANSWERS]
    cards = []
    for answer in chosen:
        rows = [("asked", answer["prompt"], ""), ("expected", answer["expected"], "")]
        for when in ("before", "after"):
            if answer[when] is not None:
                right = answer[when].strip() == answer["expected"].strip()
                rows.append((when, answer[when], "right" if right else "wrong"))
        cells = "".join(
            f"<dt>{name}</dt><dd{f' class={look}' if look else ''}>{_text(text)}</dd>" for name, text, look in rows
        )
        cards.append(f'<dl class="answer">{cells}</dl>')
    if len(answers) > len(chosen):
        cards.append(f"<p>{len(chosen)} of {len(answers):,}; the others are in answers.jsonl.</p>")
    return "".join(cards)


def _text(text: str) -> str:
    """Escaped, not too long, and without what a file in UTF-8 or a browser cannot hold."""
    shown = text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " ..."
    return escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", shown))


def _data(statistics: Mapping[str, Any]) -> str:
    if not statistics:
        return ""
    counts = {
        "layout": statistics["layout"],
        "rows to train on": statistics["rows"],
        "rows held out": statistics["held_out_rows"],
        "tokens": statistics["tokens"],
        "the loss counts": f"{statistics['trained_tokens']:,} tokens ({_percent(statistics['share'])})",
        "longest row": f"{statistics['longest_tokens']:,} tokens",
        "longer than seq_len": statistics["truncated"],
        "tokens cut off": statistics.get("lost_tokens"),
        "an epoch takes": statistics.get("mix"),
        "saved by shared beginnings": _percent(sharing["saved"]) if (sharing := statistics.get("sharing")) else None,
        "suspicious rows": statistics["suspicious_rows"],
    }
    counts = {name: value for name, value in counts.items() if value not in (None, "")}
    bounds = [0, *(bound for bound, _ in statistics["lengths"])]
    buckets = [
        (f"{low + 1:,}-{bound:,}", rows) for low, (bound, rows) in zip(bounds, statistics["lengths"], strict=False)
    ]
    pieces = "".join(f"<mark>{_text(text)}</mark>" if trained else _text(text) for text, trained in statistics["shown"])
    row = f"<figure><figcaption>A row; the loss counts what is marked</figcaption><pre>{pieces}</pre></figure>"
    looks = "".join(f"<li>{escape(f'{where}: {why}')}</li>" for where, why in statistics["suspicious"][:10])
    worth = f"<figure><figcaption>Worth a look</figcaption><ul>{looks}</ul></figure>" if looks else ""
    table = f"<figure><figcaption>Rows</figcaption>{_facts(counts)}</figure>"
    return f'<div class="charts">{table}{bars("Tokens a row", buckets)}</div>{row}{worth}'


def _facts(pairs: Mapping[str, Any]) -> str:
    return f"<table>{''.join(_fact_rows(pairs.items()))}</table>"


def _fact_rows(pairs: Iterable[tuple[str, Any]]) -> Iterable[str]:
    for name, value in pairs:
        shown = "-" if value is None or value == "" else f"{value:,}" if type(value) is int else str(value)
        if isinstance(value, bool):
            shown = "yes" if value else "no"
        yield f'<tr><th scope="row">{escape(name.replace("_", " "))}</th><td>{escape(shown)}</td></tr>'


def _section(title: str, content: str, look: str = "") -> str:
    """look: 'charts' lays figures side by side, 'fold' hides the content until it is asked for."""
    if not content:
        return ""
    if look == "fold":
        return f"<details><summary>{escape(title)}</summary>{content}</details>"
    inner = f'<div class="charts">{content}</div>' if look == "charts" else content
    return f"<section><h2>{escape(title)}</h2>{inner}</section>"
