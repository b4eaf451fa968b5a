"""Tokens in a mapped file: the same examples, found again, refused when damaged, done without on a full disk."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smidgen
from runs import adapter_bytes
from small_tokenizers import CHATML, word_tokenizer
from smidgen.data import tokens
from smidgen.data.records import read_data
from smidgen.data.render import Renderer
from smidgen.data.tokens import Examples, tokenise
from smidgen.errors import DataError
from smidgen.events import Event, Note, Progress, Warned

TOKENIZER = word_tokenizer(CHATML)


@pytest.fixture(autouse=True)
def _small_sets_are_cached_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_CACHED_FROM_TOKENS", 64)


def write(path: Path, count: int = 40, word: str = "hello") -> str:
    lines = [json.dumps({"prompt": f"one {'two ' * (i % 5)}", "completion": f"{word} there"}) for i in range(count)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def tokenised(spec: str, cache: Path | None, events: list[Event] | None = None, **how: Any) -> Examples:
    rows = read_data(spec, hold_out=False).train
    return tokenise(rows, Renderer(TOKENIZER, **how), cache=cache, report=(events if events is not None else []).append)


def texts(events: list[Event], kind: type) -> str:
    return " ".join(event.text for event in events if isinstance(event, kind))  # type: ignore[attr-defined]


def test_examples_are_those_of_the_renderer_in_memory_mapped_and_found_again(tmp_path: Path) -> None:
    spec, cache, events = write(tmp_path / "a.jsonl"), tmp_path / "cache", []
    expected = Renderer(TOKENIZER, seq_len=18).render_all(read_data(spec, hold_out=False).train)
    assert any(example.cut_tokens for example in expected)
    for examples in (
        tokenised(spec, None, seq_len=18),
        tokenised(spec, cache, seq_len=18),
        tokenised(spec, cache, events, seq_len=18),
    ):
        assert list(examples) == expected
        assert examples.lengths.tolist() == [len(example.input_ids) for example in expected]
        assert examples.cut_tokens.tolist() == [example.cut_tokens for example in expected]
        counted = [sum(label != -100 for label in example.labels) for example in expected]
        assert examples.trained_tokens.tolist() == counted
        odd = examples.select(np.arange(40) % 2 == 1)
        assert list(odd) == expected[1::2] and odd[-1].where == "a.jsonl:40"
    assert "taken from the cache" in texts(events, Note)
    assert not any(isinstance(event, Progress) for event in events)  # nothing was tokenised


@pytest.mark.parametrize(
    "other",
    [
        lambda path, cache: tokenised(write(path / "a.jsonl", word="bye"), cache),
        lambda path, cache: tokenised(write(path / "a.jsonl", count=39), cache),
        lambda path, cache: tokenised(write(path / "a.jsonl"), cache, seq_len=12),
        lambda path, cache: tokenised(write(path / "a.jsonl"), cache, seq_len=12, too_long="left"),
        lambda path, cache: tokenised(write(path / "a.jsonl"), cache, train_on_prompt=True),
    ],
)
def test_other_rows_or_settings_are_never_taken_from_the_cache(
    other: Callable[[Path, Path], Examples], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    tokenised(write(tmp_path / "a.jsonl"), cache)
    tokenised(write(tmp_path / "a.jsonl"), cache, seq_len=12, too_long="drop")
    before = set(cache.iterdir())
    examples = other(tmp_path, cache)
    assert len(set(cache.iterdir()) - before) == 1
    assert list(examples) == list(other(tmp_path, None))  # type: ignore[arg-type]


def test_the_same_rows_are_found_whatever_file_they_are_in_and_named_by_it(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    write(tmp_path / "a.jsonl")
    tokenised(str(tmp_path / "a.jsonl"), cache)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    examples = tokenised(str(tmp_path / "b.json"), cache)
    assert len(list(cache.iterdir())) == 1
    assert examples[1].where == "b.json:6"


@pytest.mark.parametrize("damage", ["cut", "longer", "flipped", "head", "empty", "other"])
def test_a_damaged_file_is_made_anew_and_that_is_said(damage: str, tmp_path: Path) -> None:
    spec, cache, events = write(tmp_path / "a.jsonl"), tmp_path / "cache", []
    expected = list(tokenised(spec, cache))
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    content = bytearray(whole)
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    elif damage == "head":
        content[17] ^= 1
    changed = {"cut": whole[:-1], "longer": whole + b"x", "empty": b"", "other": b"GGUF" * 99}
    file.write_bytes(changed.get(damage, bytes(content)))
    assert list(tokenised(spec, cache, events)) == expected
    assert "is damaged and is made anew" in texts(events, Warned)
    assert file.read_bytes() == whole


def test_a_full_disk_is_one_line_and_the_run_goes_on_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    spec, cache, events = write(tmp_path / "a.jsonl"), tmp_path / "cache", []
    monkeypatch.setattr(Path, "replace", full)
    assert list(tokenised(spec, cache, events)) == list(tokenised(spec, None))
    assert "No space left on device): this run keeps them in memory" in texts(events, Warned)
    assert list(cache.iterdir()) == []


def test_a_cache_that_is_no_folder_does_not_stop_a_run(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    events: list[Event] = []
    tokenised(write(tmp_path / "a.jsonl"), tmp_path / "cache" / "tokens", events)
    assert "this run keeps them in memory" in texts(events, Warned)


def test_rows_that_change_while_they_are_read_are_refused(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl")
    rows = read_data(spec, hold_out=False).train
    for count, word in ((40, "bye"), (39, "hello"), (41, "hello")):
        write(tmp_path / "a.jsonl", count, word)
        with pytest.raises(DataError, match="has changed while it was read"):
            list(rows)


def test_warnings_of_the_rendering_are_said_again_with_cached_tokens(tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "bye"}],
        "tools": [{"a": 1}],
    }
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(row)] * 20))
    for _ in range(2):
        events: list[Event] = []
        rows = read_data(str(tmp_path / "a.jsonl"), hold_out=False).train
        tokenise(rows, Renderer(TOKENIZER, report=events.append), cache=tmp_path / "cache", report=events.append)
        assert "the chat template takes no tools" in texts(events, Warned)
    assert "taken from the cache" in texts(events, Note)


def test_a_run_from_the_cache_is_the_same_and_token_cache_switches_it_off(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"rank": 4, "compute_dtype": "float32", "max_steps": 3}
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "home"))
    cache = tmp_path / "home" / "tokens"
    plain = smidgen.finetune(str(model), str(rows), tmp_path / "0", token_cache=False, **settings)
    assert not cache.exists()
    first = smidgen.finetune(str(model), str(rows), tmp_path / "1", **settings)
    assert len(list(cache.iterdir())) == 2  # training rows and held-out rows
    events: list[Event] = []
    second = smidgen.finetune(str(model), str(rows), tmp_path / "2", report=events.append, **settings)
    assert "taken from the cache" in texts(events, Note)
    assert adapter_bytes(plain.path) == adapter_bytes(first.path) == adapter_bytes(second.path)
    assert [(run.path / "data.json").read_text() for run in (plain, first)] == [
        (second.path / "data.json").read_text()
    ] * 2
    stored = [json.loads((run.path / "smidgen.json").read_text())["data_sha256"] for run in (plain, first, second)]
    assert len(set(stored)) == 1


def test_turns_behind_plain_text_follow_a_changed_template(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "home"))
    texts_file = tmp_path / "texts.jsonl"
    texts_file.write_text("\n".join(json.dumps({"text": f"once {number}"}) for number in range(20)))
    base = Path(shutil.copytree(model, tmp_path / "base"))

    def seen() -> tuple[str, str]:
        events: list[Event] = []
        data = [str(texts_file), str(rows)]
        smidgen.inspect_data(str(base), data, report=events.append)
        return texts(events, Note), str(smidgen.inspect_data(str(base), data).as_dict()["tokens"])

    _, before = seen()
    again, same = seen()
    assert "taken from the cache" in again and same == before
    (base / "chat_template.jinja").write_text(
        "{% for m in messages %}<<{{ m['role'] }}>> {{ m['content'] }}\n{% endfor %}", encoding="utf-8"
    )
    changed, other = seen()
    assert "taken from the cache" not in changed and other != before


def test_what_is_kept_of_a_row_is_small_and_its_pages_go_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run over a million rows took 250 bytes a row more than one over none; the file's pages were some of them."""
    few, many = (tokenised(write(tmp_path / f"{count}.jsonl", count), None) for count in (200, 4200))
    kept = [_array_bytes(examples) + _array_bytes(examples._rows) for examples in (few, many)]
    assert kept[1] - kept[0] <= 32 * 4000  # a hash of 16, a line's number of 4, two orders of 4

    monkeypatch.setattr(tokens, "_MAPPED_BYTES", 1 << 20)
    examples = tokenised(write(tmp_path / "many.jsonl", 4200), tmp_path / "cache")
    expected, most = list(many), 0
    for number, example in enumerate(examples):
        assert example.input_ids == expected[number].input_ids
        most = max(most, examples._touched_bytes)
    assert most <= 1 << 20


def _array_bytes(owner: object) -> int:
    """Of the arrays that an object has beside the file of tokens, which may be mapped."""
    parts = [*vars(owner).values(), *vars(owner).get("_places", ())]
    return sum(part.nbytes for part in parts if isinstance(part, np.ndarray))
