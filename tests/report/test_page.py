"""RUN/report.html: whole, alone, and safe whatever the data says."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import smidgen
from smidgen.errors import RunError
from smidgen.events import Event, Saved, Step
from smidgen.report.page import run_page
from smidgen.units import format_bytes
from tiny import tiny_folder, write_rows

EVIL = '</td><script src="https://x.example/a.js">alert(1)</script>\x07\x1b[31m'


class _Page(HTMLParser):
    """Tags with attributes, checked to be balanced, and the text outside of the style sheet."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "circle"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data + " "

    @property
    def headings(self) -> list[str]:
        return [word for word in ("Training", "Answers to held-out rows", "Data", "Settings") if word in self.text]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> smidgen.Run:
    folder = tmp_path_factory.mktemp("run")
    model, rows = tiny_folder(folder / "base"), write_rows(folder / "rows.jsonl")
    evil = {"messages": [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}]}
    rows.write_text(12 * (json.dumps(evil) + "\n") + rows.read_text())
    how: dict[str, Any] = {"rank": 2, "compute_dtype": "float32", "compare": 3, "eval_interval": 2}
    return smidgen.finetune(str(model), str(rows), folder / "run", **how)


def test_a_finished_run_has_a_page_with_everything(run: smidgen.Run) -> None:
    page = _Page((run.path / "report.html").read_text(encoding="utf-8"))
    assert page.headings == ["Training", "Answers to held-out rows", "Data", "Settings"]
    assert [tag for tag, _ in page.tags].count("svg") == 4
    assert f"{run.summary['loss_after']:.3f}" in page.text and f"{run.summary['steps']:,} steps in" in page.text
    figures = run.summary
    for size in (figures["peak_rss_bytes"], figures["forecast_peak_bytes"], max(figures["forecast_terms"].values())):
        assert format_bytes(size) in page.text
    assert set(figures["forecast_terms"]) - {"scratch"} and "Forecast by parts" in page.text
    assert f"{figures['perplexity_after']:.4g}" in page.text
    for title in ("exact match", "valid JSON", "JSON fields F1"):
        assert title in page.text
    assert "tokens cut off" in page.text and "an epoch takes" not in page.text  # there is one data set
    for shown in ("learning rate", "0.0005", "torch", "nf4-dq", "rows to train on", "held out"):
        assert shown in page.text


@pytest.mark.parametrize("width", [500, 1200])
def test_a_browser_shows_all_of_it_without_scrolling_sideways(width: int, run: smidgen.Run, tmp_path: Path) -> None:
    """Chromium counts what sticks out on the right, in a copy of the page with a script. 500 is its least width."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium")
    count = (
        "<script>onload = () => { const edge = document.documentElement.clientWidth + 1; document.title = 'outside: ' +"
        " [...document.querySelectorAll('body *')].filter((e) => !e.closest('svg svg') &&"
        " e.getBoundingClientRect().right > edge).length }</script>"
    )
    page = re.sub(
        r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", (run.path / "report.html").read_text("utf-8")
    )
    (tmp_path / "page.html").write_text(page.replace("</head>", count + "</head>"), encoding="utf-8")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    words += [f"--window-size={width},900", "--dump-dom", (tmp_path / "page.html").as_uri()]
    shown = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "<title>outside: 0</title>" in shown, re.findall("<title>.*</title>", shown)
    assert shown.count("<svg") == 4


def test_the_page_asks_for_nothing_and_runs_nothing(run: smidgen.Run) -> None:
    text = (run.path / "report.html").read_text(encoding="utf-8")
    page = _Page(text)
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "base", "form", "a"} == set()
    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset"} & attributes.keys(), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    assert "url(" not in text and "@import" not in text
    assert "alert(1)" in page.text, "the row must be one that is shown"
    assert "\x07" not in text and "\x1b" not in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme:dark" in text


def test_the_end_of_a_run_tells_of_its_page_and_the_verb_makes_it_again(run: smidgen.Run, tmp_path: Path) -> None:
    page = run.path / "report.html"
    before = page.read_bytes()
    page.unlink()
    words = [sys.executable, "-m", "smidgen", "report", str(run.path), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == {"page": str(page), "bytes": len(before)}
    assert page.read_bytes() == before
    saved: list[Path] = []

    def report(event: Event) -> None:
        if isinstance(event, Saved):
            saved.append(event.path)

    smidgen.resume(run.path, report=report)
    assert not saved, "a finished run is left as it is"
    page.unlink()
    smidgen.resume(run.path, report=report)
    assert saved == [page] and page.read_bytes() == before


def test_a_run_that_is_not_finished_has_a_page_of_what_there_is(tmp_path: Path) -> None:
    class Crash(Exception):
        pass

    def report(event: Event) -> None:
        if isinstance(event, Step) and event.step == 3:
            raise Crash

    model, rows = tiny_folder(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(Crash):
        smidgen.finetune(str(model), str(rows), tmp_path / "run", report=report, rank=2, compute_dtype="float32")
    page = _Page(smidgen.write_report(tmp_path / "run").read_text())
    assert "Not finished: 3 steps so far." in page.text
    assert page.headings == ["Training", "Data", "Settings"]
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "data.json").unlink()  # a run of before there were statistics
    assert _Page(run_page(tmp_path / "run")).headings == ["Settings"]


def test_the_page_shows_mix_cut_tokens_sharing_and_wording_where_a_run_has_them(
    run: smidgen.Run, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    for name in ("a", "b"):
        turns = [{"role": "user", "content": f"say {name}"}, {"role": "assistant", "content": "an answer in words"}]
        (tmp_path / f"{name}.jsonl").write_text(24 * (json.dumps({"messages": turns}) + "\n") + rows.read_text())
    mixed = smidgen.finetune(
        str(run.path.parent / "base"), [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], tmp_path / "run",
        mix="2,1", system="Be polite.", seq_len=64, too_long="left", max_steps=1, rank=2,
        compute_dtype="float32",
    )  # fmt: skip
    statistics = json.loads((mixed.path / "data.json").read_text())
    text = " ".join(_Page(run_page(mixed.path)).text.split())
    assert statistics["lost_tokens"] and f"tokens cut off {statistics['lost_tokens']:,}" in text
    assert statistics["mix"] and f"an epoch takes {statistics['mix']}" in text
    assert statistics["sharing"]["saved"] > 0.05
    assert f"saved by shared beginnings {100 * statistics['sharing']['saved']:.0f} %" in text
    measures = {
        f"{key}_{when}": 0.5 for key in ("rouge_1", "rouge_2", "rouge_l", "bleu") for when in ("before", "after")
    }
    (mixed.path / "summary.json").write_text(json.dumps(mixed.summary | measures))
    text = _Page(run_page(mixed.path)).text
    for title in ("ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU"):
        assert title in text


def test_what_is_no_run_or_damaged_is_one_line(run: smidgen.Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run folder"):
        smidgen.write_report(tmp_path)
    assert not list(tmp_path.iterdir())
    kept = (run.path / "data.json").read_text()
    (run.path / "data.json").write_text(kept[:50])
    with pytest.raises(RunError, match=r"data.json cannot be read"):
        smidgen.write_report(run.path)
    (run.path / "data.json").write_text("[]")
    with pytest.raises(RunError, match=r"data.json is not a JSON object, found list"):
        smidgen.write_report(run.path)
    (run.path / "data.json").write_text(kept)
    answers = run.path / "answers.jsonl"
    kept = answers.read_text(encoding="utf-8")
    for broken, said in ((kept[:-3] + "}\n", "cannot be read"), ('{"prompt": "hi"}\n', "a line is no answer")):
        answers.write_text(broken, encoding="utf-8")
        with pytest.raises(RunError, match=rf"answers.jsonl:? {said}"):
            smidgen.write_report(run.path)
    line = {"prompt": "a\u2028b", "expected": "c", "before": None, "after": "c"}
    answers.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert "a\u2028b" in run_page(run.path), "it ends a line to Python, and not in the file"
    answers.write_text(kept, encoding="utf-8")
