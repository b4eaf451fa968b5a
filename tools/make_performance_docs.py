"""Writes the tables of docs/{performance,quality,results,memory}.md and README.md from benchmarks/results/*.json.

Only what stands between `<!-- NAME -->` and `<!-- /NAME -->` is replaced, in whichever page has these markers. A test
compares the pages with what this makes.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from smidgen.bench.figures import format_rate
from smidgen.measures.titles import TITLES

ROOT = Path(__file__).parents[1]
_DOCS = ("performance", "quality", "results", "memory")
PAGES = (*(ROOT / "docs" / f"{name}.md" for name in _DOCS), ROOT / "README.md")
RESULTS = ROOT / "benchmarks" / "results"
_SHOWN = ("loss", "exact_match", "valid_json", "json_f1", "rouge_l")  # of docs/results.md
Result = dict[str, Any]


def read_results(folder: Path = RESULTS) -> dict[str, Result]:
    """Name of the file -> its content."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def step_table(result: Result) -> str:
    """A line for each pair of sides."""
    titles = ["shape", "smidgen recomputes", "against", "step", "theirs", "faster", "of the peak", "theirs", "memory"]
    titles += ["theirs", "4-bit tax"]
    rows = []
    for run in result["runs"]:
        tax = run.get("four_bit_tax")
        rows.append(
            [
                run["shape"],
                run["recompute"],
                str(run["against"] or "; ".join(run["skipped"]) or "-"),
                _spread(run, "step_s", "s"),
                _spread(run, "peer_step_s", "s"),
                _ratio(run.get("speedup")),
                _number(run["roofline_fraction"]),
                _number(run.get("peer_roofline_fraction")),
                _gigabytes(run["peak_rss_bytes"]),
                _gigabytes(run.get("peer_peak_rss_bytes")),
                _number(tax),
            ]
        )
    return _with_place(table(titles, rows), result["runs"][0])


def kernels_table(result: Result) -> str:
    """A line for each case and number of threads, then the memory of quantising."""
    rows = []
    for case in result["cases"]:
        ours = case["smidgen"]
        rows.append(
            [
                case["case"],
                str(case["threads"]),
                _spread(ours, "seconds", "ms", 1e3),
                format_rate(ours),
                _ratio(case.get("speedup_over_dense")),
                _ratio(case.get("speedup_over_bitsandbytes")),
            ]
        )
    titles = ["case", "threads", "time", "rate", "against dense float32", "against bitsandbytes"]
    memory = [
        [row["storage"], *(_number(row.get(side, {}).get("ratio")) for side in ("smidgen", "bitsandbytes"))]
        for row in result["quantise_memory"]
    ]
    text = (
        table(titles, rows) + "\n\n" + table(["extra memory of quantising / float32 size", "smidgen", "theirs"], memory)
    )
    return _with_place(text, result)


def decode_table(result: Result) -> str:
    """A line for each side."""
    rows = []
    for name, side in [("smidgen", result), *((peer["name"], peer) for peer in result["peers"])]:
        rows.append(
            [
                name,
                side["settings"],
                _spread(side, "prefill_tokens_per_s", ""),
                _spread(side, "decode_tokens_per_s", ""),
                _ratio(side.get("prefill_speedup")),
                _ratio(side.get("decode_speedup")),
                _gigabytes(side["peak_rss_bytes"]),
            ]
        )
    titles = ["", "weights", "prefill tokens/s", "decode tokens/s", "smidgen's prefill is", "its decode is", "memory"]
    return _with_place(table(titles, rows), result)


def load_table(result: Result) -> str:
    """Ours and theirs."""
    rows = [
        ["smidgen", _spread(result, "load_s", "s"), _gigabytes(result["load_peak_rss_bytes"])],
    ]
    if result.get("against"):
        theirs = [_spread(result, "peer_load_s", "s"), _gigabytes(result["peer_load_peak_rss_bytes"])]
        rows.append([result["against"], *theirs])
        rows.append(["smidgen / theirs", _number(result["time_ratio"]), _number(result["memory_ratio"])])
    return _with_place(table([result["shape"], "load + quantise", "peak memory"], rows), result)


def snips_table(result: Result) -> str:
    """Ours, TRL at its best, TRL as shipped."""
    rows, shipped = [], [result["trl_shipped"]]
    for name, runs in (
        ("smidgen finetune", result["smidgen"]),
        ("smidgen finetune --share-prefix off", result["smidgen_without_sharing"]),
        ("TRL, adapters cast to float32 by hand", result["trl_best"]),
        ("TRL as shipped (bfloat16 adapters), a fifth of the rows", shipped),
    ):
        times = sorted(run["train_s"] for run in runs)
        rows.append(
            [
                name,
                f"{times[len(times) // 2]:.0f} s [{times[0]:.0f}-{times[-1]:.0f}]",
                f"{runs[0]['tokens'] / times[len(times) // 2]:.0f}",
                _gigabytes(max(run["peak_rss_bytes"] for run in runs)),
                f"{runs[0]['loss_after']:.4f}" if runs is not shipped else "",
            ]
        )
    text = table([f"{result['rows']} rows, 1 epoch", "training", "tokens/s", "peak memory", "held-out loss"], rows)
    over_best, over_shipped = _ratio(result["speedup_over_best"]), _ratio(result["speedup_over_shipped"])
    text += (
        f"\n\nsmidgen is {over_best} as fast as TRL at its best and {over_shipped} as fast as TRL as shipped,"
        f" in {result['memory_ratio']:.2f} of the memory of the former; where no beginnings are shared it is"
        f" {_ratio(result['speedup_over_best_without_sharing'])} as fast as TRL at its best."
        + (f" All kept to {result['isa'].upper()}." if result.get("isa") else "")
    )
    return _with_place(text, {**result, "versions": result["trl_best"][0]["versions"]})


def perplexity_table(result: Result) -> str:
    """A line for each stored form."""
    exact = result["forms"]["float32"]["loss"]
    rows = [
        [name, f"{form['perplexity']:.2f}", f"{form['loss']:.4f}", f"{form['loss'] - exact:+.4f}"]
        for name, form in result["forms"].items()
    ]
    tokens = result["forms"]["float32"]["tokens"]
    titles = ["stored as", f"perplexity over {tokens:,} tokens", "loss", "loss against float32"]
    return _with_place(table(titles, rows), result)


def quality_table(result: Result) -> str:
    """A line for each data set and stored form: mean and spread over seeds, and how far from float32 over the same."""
    rows = []
    for data, forms in result["table"].items():
        after_of = {(run["form"], run["seed"]): run["loss_after"] for run in result["runs"] if run["data"] == data}
        for name, form in forms.items():
            seeds = [seed for other, seed in after_of if other == name and ("float32", seed) in after_of]
            ratio = sum(after_of[name, seed] for seed in seeds) / sum(after_of["float32", seed] for seed in seeds)
            more = "-" if name == "float32" else f"{ratio - 1:+.1%}"
            before = next(run["loss_before"] for run in result["runs"] if (run["data"], run["form"]) == (data, name))
            after = f"{form['mean']:.4f} ± {form['spread']:.4f}"
            rows.append([data, name, f"{before:.3f}", after, str(form["seeds"]), more])
    titles = ["data", "base stored as", "held-out loss before", "after", "seeds", "against float32"]
    return _with_place(table(titles, rows), result)


def forecasts_table(result: Result) -> str:
    """A line for each combination of a shape and settings."""
    rows = []
    for run in result["runs"]:
        how = run["settings"]
        adapters = f"r={how.get('rank', 8)} {how.get('targets', 'q,v')}"
        wanted_rows = how.get("micro_batch", 1)
        base = [how.get("quantize", "nf4-dq")]
        base += [how["compute_dtype"]] if "compute_dtype" in how else []
        base += [f"{how['activation_dtype']} activations"] if "activation_dtype" in how else []
        chosen = [run["recompute"]]
        if run["computed_micro_batch"] < wanted_rows:
            chosen.append(f"{run['computed_micro_batch']} at once")
        if run["loss_chunk"]:
            chosen.append(f"tiles of {run['tile_tokens']:,}, loss chunks of {run['loss_chunk']}")
        if run["streamed_layers"]:
            chosen.append(f"{run['streamed_layers']} layers streamed")
        rows.append(
            [
                f"{how['shape']}, {how['layers']} layers"
                + (f", {how['vocab_size']:,} classes" if "vocab_size" in how else ""),
                f"{wanted_rows} x {how['seq_len']:,}",
                ", ".join(base),
                ", ".join(chosen),
                adapters,
                *(f"{run[key] / 1e6:,.0f} MB" for key in ("forecast_bytes", "measured_bytes")),
                f"{run['ratio']:.3f}",
            ]
        )
    titles = ["model", "rows x tokens", "base", "computed again", "adapters", "forecast", "measured", "ratio"]
    counts = (
        f"{result['combinations']} combinations: {result['good']} within the aim, {result['under']} under the peak,"
        f" {result['over']} too far over it; ratios from {result['smallest_ratio']:.3f} to"
        f" {result['largest_ratio']:.3f}."
    )
    if missing := result.get("not_measured"):
        counts += f" Not measured: {missing}."
    return f"{counts}\n\n{_with_place(table(titles, rows), result, result['runs'])}"


def limits_table(result: Result) -> str:
    """A line for each whole model in its memory cgroup."""
    rows = []
    for run in result["runs"].values():
        trains = run["mode"] == "train"
        times = [run["step_s"], run["wait_s_per_step"], *([run["resident_step_s"]] if run["resident_step_s"] else [])]
        took, waited, *resident = (f"{value:,.0f} s" if trains else f"{_three(value)} s" for value in times)
        threads = run["machine"]["threads"]
        rows.append(
            [
                ("" if run["quantize"] == "nf4-dq" else f"{run['quantize']} ")
                + f"{run['shape']}, "
                + ("a step" if trains else f"{run['seq_len']} tokens, then each new one"),
                f"{run['limit_bytes'] / (1 << 30):.3g} GiB" if run["limit_bytes"] else "none",
                *(_gigabytes(run[key]) for key in ("peak_rss_bytes", "forecast_rss_bytes", "measured_peak_bytes")),
                f"{run['streamed_layers']} of {run['layers']}",
                _gigabytes(run["read_bytes_per_step"]),
                f"{took} on {threads} thread{'s' * (threads > 1)}",
                waited,
                *(resident or ["-"]),
            ]
        )
    titles = ["model", "limit", "resident", "its forecast", "of it anonymous", "layers streamed", "read", "time"]
    titles += ["of it waiting", "with all layers in memory"]
    return _with_place(table(titles, rows), result, result["runs"].values())


def budgets_table(result: Result) -> str:
    """Two sentences and a line for each job."""
    jobs: dict[str, list[Result]] = {}
    for run in result["runs"]:
        name = f"{run['shape']}, {run['layers']} layers, {run['micro_batch']} x {run['seq_len']}"
        jobs.setdefault(f"{name}, {run.get('quantize', 'nf4-dq')}", []).append(run)
    rows = []
    for name, runs in jobs.items():
        done = [run for run in runs if run["feasible"]]
        limits = [run["budget_bytes"] for run in done]
        below = next(run for run in runs if not run["feasible"])
        ways = next((run["brute_force"] for run in done if "brute_force" in run), {})
        rows.append(
            [
                name,
                f"{below['budget_bytes'] / 1e6:,.0f} MB: {below['end']}",
                f"{min(limits) / 1e6:,.0f} to {max(limits) / 1e6:,.0f} MB",
                f"{sum(run['end'] == 'finished' for run in done)} of {len(done)}",
                str(max(run.get("streamed_layers", 0) for run in done)),
                f"{ways['planned'] / min(ways.values()):.2f} of {len(ways) - 1}" if ways else "-",
            ]
        )
    text = (
        f"{result['finished']} of {result['feasible']} finished, {result['refused']} of {result['infeasible']} refused."
    )
    if ratios := result["planned_over_best"]:
        most = f"{max(ratios):.2f} times the time of the fastest that was found by trying"
        text += f" The planner's choice took at most {most}."
    titles = ["job", "below the smallest", "limits", "finished", "most layers streamed", "planned / fastest"]
    return f"{text}\n\n{_with_place(table(titles, rows), result, result['runs'])}"


def seed_memory_table(result: Result) -> str:
    """A table for each seed."""
    parts = []
    for seed in dict.fromkeys(cell["table"] for cell in result["cells"]):
        answers = seed == "LitGPT"
        rows = []
        for cell in (cell for cell in result["cells"] if cell["table"] == seed):
            row = [
                cell["shape"],
                {"none": "16 bits"}.get(cell["quantize"], cell["quantize"]),
                f"{cell['micro_batch']} x {cell['seq_len']:,}",
                f"{cell['theirs']} GB" if cell["theirs"] else "out of memory",
                _gigabytes(cell["peak_bytes"]),
                cell["how"],
            ]
            if answers:
                row += [
                    f"{cell['step_s'] / 3.6:.1f} hours",
                    f"{cell['theirs_answer']} GB",
                    _gigabytes(cell["answer_bytes"]),
                ]
            else:
                row += [f"{cell['epoch_days']:.0f} days" if "epoch_days" in cell else "-"]
            rows.append(row)
        titles = ["model", "base", "rows x tokens", f"{seed}, its card", "smidgen, whole process", "how"]
        more = ["1,000 steps", f"answering: {seed}, its card", "smidgen, forecast"] if answers else ["52,002 rows"]
        parts.append(table([*titles, *more], rows))
    measured = [cell["measured"] for cell in result["cells"] if "measured" in cell]
    return _with_place("\n\n".join(parts), result, measured)


def results_table(result: Result) -> str:
    """What each run gave, figure by figure, then what it took."""
    gave, took, commands = [], [], []
    for data, run in result["runs"].items():
        for name in [name for name in _SHOWN if name in run["figures"]]:
            found = run["figures"][name]
            write = _loss if name == "loss" else _percent
            sides = [_interval(side, write) for side in (found["against"], found)]
            sides.append(_interval(found["difference"], lambda value, write=write: "+" * (value >= 0) + write(value)))
            gave.append([data, TITLES[name], str(run["test_rows"]), *sides])
        summary = run["summary"]
        wall = f"{summary['wall_s'] / 60:.1f} min"
        numbers = [f"{summary['steps']:,}", f"{summary['tokens']:,}", f"{summary['tokens_per_s']:.0f}"]
        took.append([data, *numbers, wall, _gigabytes(summary["peak_rss_bytes"])])
        commands += [run["command"], run["evaluated"]]
    figures = table(["data", "figure", "test rows", "base", "fine-tuned", "difference"], gave)
    costs = table(["data", "steps", "tokens trained on", "tokens/s", "wall time, all included", "peak memory"], took)
    return _with_place("\n\n".join([figures, costs, "\n".join(["```sh", *commands, "```"])]), result)


def kills_line(result: Result) -> str:
    """One sentence."""
    same = result["same_bytes"] and result["same_log"] and not result["remains"]
    ends = "the bytes and the log of the run that was not killed, and no temporary file" if same else "ANOTHER adapter"
    return _with_place(f"Killed {result['kills']} times, the run ended with {ends}.", result)


def readme_table(results: dict[str, Result]) -> str:
    """The short version: one line for each claim."""
    rows = []
    for run in results.get("step", {}).get("runs", []):
        if run.get("speedup"):
            memory = f"{_gigabytes(run['peak_rss_bytes'])} / {_gigabytes(run['peer_peak_rss_bytes'])}"
            what = f"step, {run['shape']}, 512 tokens, recompute {run['recompute']}"
            rows.append([what, run["against"], _ratio(run["speedup"]), memory])
    if snips := results.get("snips_trl"):
        memory = f"{_peak(snips['smidgen'])} / {_peak(snips['trl_best'])}"
        rows.append(["SNIPS, 300 rows", "TRL at its best", _ratio(snips["speedup_over_best"]), memory])
    if (load := results.get("load")) and load.get("against"):
        memory = f"{_gigabytes(load['load_peak_rss_bytes'])} / {_gigabytes(load['peer_load_peak_rss_bytes'])}"
        rows.append(["load + quantise 1.1B", load["against"], _ratio(1 / load["time_ratio"]), memory])
    for peer in results.get("decode", {}).get("peers", []):
        memory = f"{_gigabytes(results['decode']['peak_rss_bytes'])} / {_gigabytes(peer['peak_rss_bytes'])}"
        for part in ("prefill", "decode"):
            rows.append([f"{part}, SmolLM2-135M", peer["name"], _ratio(peer[f"{part}_speedup"]), memory])
    if not rows:
        return "Not measured yet: `make proof`."
    return table(["", "against", "smidgen is as fast", "peak memory, ours / theirs"], rows)


SECTIONS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "step": ("step.py", step_table),
    "kernels": ("kernel_speed.py", kernels_table),
    "decode": ("decode.py", decode_table),
    "load": ("load.py", load_table),
    "snips_trl": ("snips_trl.py", snips_table),
    "gptq_quality": ("gptq_quality.py", perplexity_table),
    "quality": ("quality.py", quality_table),
    "forecasts": ("forecasts.py", forecasts_table),
    "limits": ("limits.py", limits_table),
    "budgets": ("budgets.py", budgets_table),
    "seed_memory": ("seed_memory.py", seed_memory_table),
    "results": ("results.py", results_table),
    "kills": ("kills.py", kills_line),
}


def sections(results: dict[str, Result]) -> dict[str, str]:
    """Name of the markers -> what stands between them. Results of `--isa` have files of their own, not shown here."""
    made = {"performance": readme_table(results)}
    for name, (script, make) in SECTIONS.items():
        made[name] = make(results[name]) if name in results else f"Not measured yet: `python benchmarks/{script}`."
    return made


def fill(text: str, made: dict[str, str]) -> str:
    """The page with every marked section replaced."""
    for name, content in made.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda match, content=content: f"{match[1]}\n{content}\n\n{match[2]}", text)
    return text


def make() -> dict[Path, str]:
    """Page -> its whole text."""
    made = sections(read_results())
    return {page: fill(page.read_text(encoding="utf-8"), made) for page in PAGES}


def _with_place(text: str, result: Result, rows: Iterable[Result] = ()) -> str:
    """rows: those that may have been measured at commits of their own."""
    machine, versions = result["machine"], result.get("versions") or result["machine"].get("versions", {})
    isa = machine.get("isa", "")
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    instructions = f", kept to {isa.upper()}" if isa.startswith("avx") else ""
    notes = "".join(f" Note: {note}." for note in result.get("notes", []))
    commit = result.get("commit") or ""
    commit = commit[:12] + "+" * commit.endswith("+") or "an installed package"
    if any(row.get("commit") for row in rows):
        commit = "rows measured at their own commits, in the JSON"
    return (
        f"{text}\n\n{machine['processor']}, {machine['threads']} threads{instructions}; {result['measured']}, {commit};"
        f" {named}.{notes}"
    )


def _spread(side: Result, key: str, unit: str, factor: float = 1.0) -> str:
    """'4.23 s [4.10-4.60]'."""
    if side.get(key) is None:
        return "-"
    middle, low, high = (_three(side[name] * factor) for name in (key, f"{key}_min", f"{key}_max"))
    return f"{middle} {unit} [{low}-{high}]".replace("  ", " ")


def _three(value: float) -> str:
    """Three digits: 0.123, 4.56, 78.9, 123."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _interval(figure: Result, write: Callable[[float], str]) -> str:
    """'0.31 (0.25 to 0.40)'; without an interval where there are too few rows for one."""
    text = write(figure["value"])
    return text if figure["low"] is None else f"{text} ({write(figure['low'])} to {write(figure['high'])})"


def _loss(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _gigabytes(nbytes: float | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e9:.2f} GB"


def _peak(runs: list[Result]) -> str:
    return _gigabytes(max(run["peak_rss_bytes"] for run in runs))


if __name__ == "__main__":
    for page, text in make().items():
        page.write_text(text, encoding="utf-8")
