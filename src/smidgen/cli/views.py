"""How things look: pure functions from values to rich's renderables. Nothing here prints."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from smidgen.events import Answer, Answers, Saved
from smidgen.measures.titles import TITLES
from smidgen.units import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from smidgen.data.report import DataReport, Sharing

__all__ = [
    "TITLES",
    "before_after",
    "comparison",
    "data_report",
    "evaluation",
    "facts",
    "files",
    "forecast",
    "histogram",
    "marked_row",
    "percent",
    "printable",
    "quantisation",
    "run_figures",
    "worse",
]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_ROW_CHARACTERS = 1500
_SHARES = {"same_top_token"}


def printable(text: str) -> str:
    """Without control characters: what a model says must not steer the terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %".replace(".0 %", " %")


def marked_row(pieces: Sequence[tuple[str, bool]], *, plain: bool) -> Text:
    """A training row. What the loss counts is green and underlined; plain: between [[ and ]]."""
    text = Text()
    for number, (piece, trained) in enumerate(pieces):
        shown = printable(piece if number < len(pieces) - 1 else piece.rstrip("\n"))
        if plain:
            text.append(f"[[{shown}]]" if trained else shown)
        else:
            text.append(shown, style="bold green underline" if trained else "")
    if len(text) > _ROW_CHARACTERS:
        half = _ROW_CHARACTERS // 2
        left_out = f"\n... {len(text) - 2 * half:,} characters left out ...\n"
        text = Text.assemble(text[:half], (left_out, "dim"), text[-half:])
    return text


def before_after(summary: Mapping[str, Any]) -> Table:
    """Held-out figures before and after training; rows without figures are left out."""
    table = _table("", "before", "after", right=("before", "after"))
    losses = [("held-out loss", "loss", "{:.3f}".format), ("perplexity", "perplexity", "{:.4g}".format)]
    answers = [(title, key, percent) for key, title in TITLES.items() if key not in ("loss", "perplexity")]
    for title, key, form in (*losses, *answers):
        before, after = summary.get(f"{key}_before"), summary.get(f"{key}_after")
        if before is not None or after is not None:
            table.add_row(
                title, "-" if before is None else form(before), Text("-" if after is None else form(after), "bold")
            )
    return table


def comparison(before: Answers | None, after: Answers, *, limit: int = 4) -> Table:
    """Some answers before and after, one under the other so that lines of JSON can be compared by eye."""
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    earlier = {(a.prompt, a.expected): a for a in before.rows} if before else {}
    for number, row in enumerate(_most_telling(after.rows, earlier)[:limit]):
        if number:
            table.add_row()
        was = earlier.get((row.prompt, row.expected))
        table.add_row("asked", "", Text(_short(row.prompt, 160), "bold"))
        if not _right(row):  # else it is the line of the answer
            table.add_row("expected", "", _short(row.expected, 240))
        if was is not None:
            table.add_row("before", _mark(was), _short(was.answer, 240))
        table.add_row("after" if before else "answer", _mark(row), _short(row.answer, 240))
    return table


def files(saved: Iterable[Saved], *, most: int = 12) -> Table:
    """Files written, each once, with sizes; the files of a checkpoint are one line."""
    sizes: dict[str, int] = {}
    counts: dict[str, int] = {}
    newest = {event.path: event.nbytes for event in saved}
    for path, nbytes in sorted(newest.items(), key=lambda item: "checkpoints" in item[0].parts):
        shown = _near(path)
        if "checkpoints" in path.parts[:-2]:
            shown = _near(path.parent) + "/"
        sizes[shown] = sizes.get(shown, 0) + nbytes
        counts[shown] = counts.get(shown, 0) + 1
    table = _table("file", "size", right=("size",))
    for shown, nbytes in list(sizes.items())[:most]:
        table.add_row(f"{shown} ({counts[shown]} files)" if shown.endswith("/") else shown, format_bytes(nbytes))
    if len(sizes) > most:
        rest = list(sizes.values())[most:]
        table.add_row(f"and {len(rest)} more", format_bytes(sum(rest)))
    return table


def run_figures(summary: Mapping[str, Any]) -> str:
    """'75 steps, 23,682 tokens in 4m05s (86 tokens/s). Peak memory of the process 1.10 GB. ...'"""
    parts = []
    if "steps" in summary and "tokens" in summary:
        parts.append(
            f"{summary['steps']:,} steps, {summary['tokens']:,} tokens trained at {summary.get('tokens_per_s', 0):.0f}"
            f" tokens/s; {format_duration(summary.get('wall_s', 0))} in all."
        )
    if "peak_rss_bytes" in summary:
        forecast = summary.get("forecast_peak_bytes")
        beside = f"; forecast {format_bytes(forecast)}" if forecast else ""
        parts.append(f"Peak memory of the process: {format_bytes(summary['peak_rss_bytes'])}{beside}.")
    if summary.get("swapped_bytes"):
        parts.append(f"Up to {format_bytes(summary['swapped_bytes'])} of it lay in swap: --memory keeps it within RAM.")
    if count := summary.get("streamed_layers"):
        steps = max(1, summary["steps"])
        read, waited = format_bytes(summary["read_bytes"] / steps), format_duration(summary["wait_s"] / steps)
        parts.append(f"{count} layers streamed: {read} read from disk and {waited} waited for it in each step.")
    if "trainable_parameters" in summary:
        parts.append(f"{format_count(summary['trainable_parameters'])} parameters trained.")
    return " ".join(parts)


def facts(pairs: Mapping[str, Any], *, title: str = "") -> Table:
    """Names and values, one a line; nested mappings are indented."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    if title:
        table.add_row(Text(title, "bold"), "")

    def fill(items: Mapping[str, Any], indent: str) -> None:
        for name, value in items.items():
            label = Text(indent + str(name).replace("_", " "), "dim")
            if isinstance(value, Mapping):
                table.add_row(label, "")
                fill(value, indent + "  ")
            else:
                table.add_row(label, printable(_value(str(name), value)))

    fill(pairs, "")
    return table


def data_report(report: "DataReport", *, plain: bool) -> list[tuple[str, Any]]:
    """(title, what to show under it) for each part of the report."""
    share = f"{report.trained_tokens:,} of {report.tokens:,} tokens ({percent(report.share)})"
    counts = {
        "layout": report.layout,
        "rows": report.rows,
        "the loss counts": share,
        "longest row": f"{report.longest_tokens:,} tokens",
        "longer than --seq-len": f"{report.truncated:,}, {report.lost_tokens:,} tokens lost",
        "suspicious rows": report.suspicious_rows,
    }
    if report.mix:
        counts["an epoch"] = report.mix
    if report.sharing is not None:
        counts["shared prefixes"] = _sharing(report.sharing)
    bounds = [0, *(bound for bound, _ in report.lengths)]
    buckets = [(f"{low + 1:,}-{bound:,}", rows) for low, (bound, rows) in zip(bounds, report.lengths, strict=False)]
    how = "in [[ ]]" if plain else "green, underlined"
    parts: list[tuple[str, Any]] = [
        (f"The first row; the loss counts what is {how}", marked_row(report.shown.pieces, plain=plain)),
        ("Rows", facts(counts)),
        ("Lengths in tokens", histogram(buckets, mark="#" if plain else "█")),
    ]
    if report.suspicious:
        shown = dict.fromkeys(f"{where}: {why}" for where, why in report.suspicious[:10])
        more = report.suspicious_rows - len({where for where, _ in report.suspicious[:10]})
        lines = [*map(printable, shown), *([f"and {more:,} more rows"] if more > 0 else [])]
        parts.append(("Worth a look", Text("\n".join(lines))))
    return parts


def _sharing(sharing: "Sharing") -> str:
    """'41.2 % of the tokens saved (1.70 times fewer), at 4 rows at once'"""
    if sharing.off:
        return f"nothing is saved: {sharing.off}"
    at_once = f"{sharing.pack:,} tokens" if sharing.pack else f"{sharing.micro_batch} rows"
    steps = f", {sharing.micro_batch * sharing.accumulation} rows a step"
    fewer = sharing.tokens / max(1, sharing.computed_tokens)
    return f"{percent(sharing.saved)} of the tokens saved ({fewer:.2f} times fewer), at {at_once} at once{steps}"


def quantisation(result: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """(title, table) of the errors of GPTQ, by kind of layer, and of the perplexities; nothing for other forms."""
    parts: list[tuple[str, Table]] = []
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for error in result.get("errors", ()):
        kinds.setdefault(str(error["layer"]).rpartition(".")[2], []).append(error)
    if kinds:
        titles = ("layers", "GPTQ, mean", "worst", "nearest, mean", "worst")
        table = _table("", *titles, right=titles)
        for kind, errors in kinds.items():
            columns = [[error[key] for error in errors] for key in ("gptq", "rtn")]
            figures = [percent(value) for column in columns for value in (sum(column) / len(column), max(column))]
            table.add_row(printable(kind), f"{len(errors):,}", *figures)
        parts.append(("Relative error of the layers' outputs, GPTQ beside rounding to nearest", table))
    if perplexity := result.get("perplexity"):
        table = _table("", "perplexity", right=("perplexity",))
        for key, title in (("before", "before"), ("gptq", "GPTQ"), ("rtn", "rounding to nearest"), ("nf4", "NF4")):
            table.add_row(title, f"{perplexity[key]:.2f}")
        parts.append((f"Perplexity of {perplexity['tokens']:,} held-out tokens", table))
    return parts


def forecast(result: Mapping[str, Any], *, plain: bool) -> list[tuple[str, Any]]:
    """(title, table) of a forecast: parts of the memory with a bar each, the settings, other settings."""
    terms = {name: size for name, size in result["terms"].items() if size}
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    most, mark = max(terms.values()), "#" if plain else "█"
    for name, size in sorted(terms.items(), key=lambda item: -item[1]):
        table.add_row(name, format_bytes(size), Text(mark * max(1, round(size * 36 / most)), "green"))
    table.add_row(Text("in all", "bold"), Text(format_bytes(result["peak_bytes"]), "bold"))
    if (host := result.get("host_bytes", result["peak_bytes"])) != result["peak_bytes"]:
        table.add_row("RAM beside it", format_bytes(host), "an estimate; CUDA's own share is assumed")
    while_it = f", while it is quantised by {result['during']}" if "during" in result else ""
    where = f"Memory of {result['model']} on {result['device']}{while_it}"
    step_s = result["step_s"]
    counts = ("tokens_per_step", "computed_tokens_per_step", "labels_per_step")
    settings = dict(result["settings"]) | {name: result[name] for name in counts if name in result}
    if step_s:
        settings |= {"step_s": step_s} | {name: result[name] for name in ("tokens_per_s", "run_s") if name in result}
    others = _table("what if", "memory", "", "step", right=("memory", "", "step"))
    for row in result["what_if"]:
        less = row["peak_bytes"] / result["peak_bytes"] - 1
        step = format_duration(row["step_s"]) if row["step_s"] else "-"
        others.add_row(row["change"], format_bytes(row["peak_bytes"]), f"{less:+.0%}", step)
    return [(where, table), ("Settings", facts(settings)), ("Other settings", others)]


def evaluation(result: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """(title, table) of each file: its figures with their 95 % intervals, beside those of the other model if any."""
    parts: list[tuple[str, Table]] = []
    against = result.get("against")
    for part in result["data"]:
        names = [printable(str(name)) for name in ([against, result["model"]] if against else [result["model"]])]
        table = _table("", *names, *(["difference"] if against else []), right=[*names, "difference"])
        for name, figure in part["figures"].items():
            cells = [_with_interval(name, figure)]
            if against:
                cells = [
                    _with_interval(name, figure.get("against")),
                    *cells,
                    _with_interval(name, figure.get("difference"), sign="+"),
                ]
            table.add_row(TITLES[name], *cells)
        counted = f"{part['rows']:,} {'windows' if part['kind'] == 'text' else 'rows'}"
        tokens = f", {part['tokens']:,} tokens" if "tokens" in part else ""
        protocol = f", protocol {part['protocol']}" if "protocol" in part else ""
        parts.append((f"{part['data']}: {counted}{tokens}{protocol}; 95 % intervals in brackets", table))
    return parts


def worse(result: Mapping[str, Any]) -> list[str]:
    """A line for each file on which the model became worse beyond the interval; one for none."""
    if "worse" not in result:
        return []
    lines = []
    by_name = {part["data"]: part["figures"] for part in result["data"]}
    for found in result["worse"]:
        name, figure = found["figure"], by_name[found["data"]][found["figure"]]
        what = "Worse" if found["kind"] == "rows" else "Forgotten"
        was, now = (_figure(name, value) for value in (figure["against"]["value"], figure["value"]))
        lines.append(
            f"{what}: {found['data']}: {TITLES[name]} {was} → {now}, worse beyond the 95 % interval of the difference,"
            f" {_interval(name, figure['difference'], sign='+')}."
        )
    return lines or [f"Nowhere worse than {result['against']} beyond the 95 % intervals."]


def _figure(name: str, value: float, sign: str = "") -> str:
    return f"{value:{sign}.4g}" if name in ("loss", "perplexity") else f"{100 * value:{sign}.1f} %"


def _with_interval(name: str, figure: Mapping[str, Any] | None, sign: str = "") -> str:
    """'57.0 % (50.1 to 63.7)'."""
    if figure is None:
        return "-"
    shown = _figure(name, figure["value"], sign)
    if figure["low"] is None:
        return shown
    return f"{shown} ({_interval(name, figure, sign)})"


def _interval(name: str, figure: Mapping[str, Any], sign: str = "") -> str:
    low, high = (_figure(name, figure[end], sign).removesuffix(" %") for end in ("low", "high"))
    return f"{low} to {high}"


def histogram(buckets: Sequence[tuple[str, int]], *, mark: str = "█", width: int = 40) -> Table:
    """Labels with counts, and a bar for each."""
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    most = max((count for _, count in buckets), default=0)
    for label, count in buckets:
        table.add_row(label, f"{count:,}", Text(mark * -(-count * width // most) if most else "", "green"))
    return table


def _table(*titles: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in titles:
        table.add_column(title, justify="right" if title in right else "left", overflow="fold")
    return table


def _most_telling(rows: Sequence[Answer], earlier: Mapping[tuple[str, str], Answer]) -> list[Answer]:
    """What changed first, right or wrong, in the order of the data."""

    def unchanged(row: Answer) -> bool:
        was = earlier.get((row.prompt, row.expected))
        return was is not None and was.answer == row.answer

    return sorted(rows, key=unchanged)


def _right(row: Answer) -> bool:
    return row.answer.strip() == row.expected.strip()


def _mark(row: Answer) -> Text:
    return Text("✓", "green") if _right(row) else Text("✗", "red")


def _short(text: str, most: int) -> str:
    """On one line, cut at `most` characters."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= most else line[: most - 3] + "..."


def _near(path: Path) -> str:
    """Relative to where the user stands, if below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name in _SHARES and isinstance(value, (int, float)):
        return percent(value)
    if (name == "bytes" or name.endswith("_bytes")) and isinstance(value, (int, float)):
        return format_bytes(value)
    if name.endswith("_bytes_per_s") and isinstance(value, (int, float)):
        return f"{format_bytes(value)}/s"
    if name.endswith("_s") and isinstance(value, (int, float)) and not name.endswith("per_s"):
        return format_duration(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "none"
    return "-" if value is None else str(value)
