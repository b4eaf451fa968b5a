"""Which tokens of a row the loss counts: literal masks on tokenizers small enough to read."""

from datetime import date
from typing import Any

import pytest

from small_tokenizers import CHATML, LLAMA2, OPENING, PLAIN, THINKING, joining_tokenizer, word_tokenizer
from smidgen.data import render
from smidgen.data.layouts import Row
from smidgen.data.render import Example, Renderer
from smidgen.errors import DataError, ModelError
from smidgen.events import Note, Progress, Warned


def row(*turns: tuple[str, str], tools: Any = None) -> Row:
    return Row(tuple({"role": role, "content": content} for role, content in turns), None, tools, "rows.jsonl:1")


def marked(example: Example, tokenizer: Any) -> str:
    """Tokens joined by '|', the labelled ones in [brackets]: what the tests compare."""
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids)
    assert all(label in (-100, token_id) for label, token_id in zip(example.labels, example.input_ids, strict=True))
    return "|".join(
        f"[{token}]" if label != -100 else token for token, label in zip(tokens, example.labels, strict=True)
    ).replace("\n", "~")


HI = [{"role": "user", "content": "hi"}]
ONE_TURN = row(("user", "hi"), ("assistant", "hello there"))
TWO_TURNS = row(("system", "be brief"), ("user", "one"), ("assistant", "two"), ("user", "hi"), ("assistant", "bye"))


def test_chatml_labels_the_answer_and_its_end_token_but_not_the_line_break() -> None:
    tokenizer = word_tokenizer(CHATML)
    assert marked(Renderer(tokenizer).render(ONE_TURN), tokenizer) == (
        "<|im_start|>|user|~|hi|<|im_end|>|~|<|im_start|>|assistant|~|[hello]|[ ]|[there]|[<|im_end|>]|~"
    )


def test_every_assistant_turn_is_labelled() -> None:
    tokenizer = word_tokenizer(CHATML)
    assert marked(Renderer(tokenizer).render(TWO_TURNS), tokenizer) == (
        "<|im_start|>|system|~|be| |brief|<|im_end|>|~|<|im_start|>|user|~|one|<|im_end|>|~"
        "|<|im_start|>|assistant|~|[two]|[<|im_end|>]|~|<|im_start|>|user|~|hi|<|im_end|>|~"
        "|<|im_start|>|assistant|~|[bye]|[<|im_end|>]|~"
    )


def test_a_template_that_writes_the_date_is_told_the_day_that_it_is_given() -> None:
    head = "{% macro head(form) %}{{ strftime_now(form) }}{% endmacro %}{{ head('%d %B %Y, %-d.%-m., %H:%M') }}"
    tokenizer = word_tokenizer(head + CHATML)
    days = (None, date.today(), date(2024, 1, 2))
    now, today, then = (Renderer(tokenizer, today=day) for day in days)
    assert then.prompt_text(HI).startswith("02 January 2024, 2.1., 00:00<|im_start|>user")
    assert now.prompt_text(HI).startswith(f"{date.today():%d %B %Y, %-d.%-m., }")
    prints = [renderer.fingerprint(chat=True) for renderer in (now, today, then)]
    assert prints[0] == prints[1] != prints[2]


def test_rows_are_rendered_anew_where_the_code_makes_other_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer(word_tokenizer(CHATML))
    before = renderer.fingerprint(chat=True)
    assert renderer.fingerprint(chat=True) == before
    monkeypatch.setattr(render, "_LABELS_VERSION", -1)
    assert renderer.fingerprint(chat=True) != before


def test_llama2_writes_one_bos_and_its_answers_end_with_eos() -> None:
    tokenizer = word_tokenizer(LLAMA2, bos=True)
    example = Renderer(tokenizer).render(ONE_TURN)
    assert marked(example, tokenizer) == ("<s>|[|INST|]| |hi| |[|/|INST|]|[ ]|[hello]|[ ]|[there]|[ ]|[</s>]")


def test_a_template_without_system_messages_gets_them_in_the_first_user_message() -> None:
    events: list[Any] = []
    tokenizer = word_tokenizer(LLAMA2)
    example = Renderer(tokenizer, report=events.append).render(
        row(("system", "be brief"), ("user", "hi"), ("assistant", "bye"))
    )
    assert marked(example, tokenizer) == ("<s>|[|INST|]| |be| |brief|~|~|hi| |[|/|INST|]|[ ]|[bye]|[ ]|[</s>]")
    assert [type(event) for event in events] == [Note]


def test_a_template_that_rewrites_history_trains_the_last_answer_only_and_says_it_once() -> None:
    events: list[Any] = []
    tokenizer = word_tokenizer(THINKING)
    renderer = Renderer(tokenizer, report=events.append)
    turns = row(("user", "one"), ("assistant", "<think>a</think>two"), ("user", "hi"), ("assistant", "bye"))
    examples = renderer.render_all([turns, turns], report=lambda event: None)
    assert marked(examples[0], tokenizer) == (
        "<|im_start|>|user|~|one|<|im_end|>|~|<|im_start|>|assistant|~|two|<|im_end|>|~"
        "|<|im_start|>|user|~|hi|<|im_end|>|~|<|im_start|>|assistant|~|[bye]|[<|im_end|>]|~"
    )
    assert [type(event) for event in events] == [Warned]


def test_a_template_that_asks_otherwise_than_it_writes_is_trained_behind_what_it_asks() -> None:
    events: list[Any] = []
    renderer = Renderer(word_tokenizer(OPENING), report=events.append)
    example, prompt = renderer.render(ONE_TURN), renderer.prompt_ids(ONE_TURN)
    assert example.input_ids[: len(prompt)] == prompt
    assert renderer.answer_text(ONE_TURN) == "hello there"
    assert [type(event) for event in events] == [Warned]


def test_a_template_that_ends_answers_with_no_token_gets_eos() -> None:
    tokenizer = word_tokenizer(PLAIN)
    renderer = Renderer(tokenizer)
    turns = row(("user", "one"), ("assistant", "two"), ("user", "hi"), ("assistant", "bye"))
    assert (
        marked(renderer.render(turns), tokenizer)
        == "user|:|one|~|assistant|:|[two]|~|user|:|hi|~|assistant|:|[bye]|[</s>]"
    )
    assert renderer.end_ids == (tokenizer.eos_token_id,)
    assert renderer.answer_text(turns) == "bye"


@pytest.mark.parametrize(("chatml", "ending"), [(True, "<|im_end|>"), (False, "</s>")])
def test_a_tokenizer_without_template_gets_chatml_and_keeps_it(chatml: bool, ending: str) -> None:
    events: list[Any] = []
    tokenizer = word_tokenizer(None, chatml=chatml, bos=True)
    renderer = Renderer(tokenizer, report=events.append)
    text = marked(renderer.render(ONE_TURN), tokenizer)
    assert text.startswith("<s>|") and text.count("<s>") == 1
    assert text.endswith(f"|assistant|~|[hello]|[ ]|[there]|[{ending}]|~")
    assert ending in events[0].text and "ChatML" in events[0].text
    assert tokenizer.chat_template and renderer.end_ids[0] == tokenizer.convert_tokens_to_ids(ending)


def test_plain_text_is_trained_whole_ends_with_eos_and_sets_no_template() -> None:
    tokenizer = word_tokenizer(None, bos=True)
    renderer = Renderer(tokenizer)
    example = renderer.render(Row((), "one two", None, "a.jsonl:1"))
    assert marked(example, tokenizer) == "<s>|[one]|[ ]|[two]|[</s>]"
    assert renderer.end_ids == (tokenizer.eos_token_id,)
    assert tokenizer.chat_template is None


def test_train_on_prompt_labels_all_but_the_first_token() -> None:
    tokenizer = word_tokenizer(CHATML)
    example = Renderer(tokenizer, train_on_prompt=True).render(ONE_TURN)
    assert example.labels == [-100, *example.input_ids[1:]]


def test_a_long_row_loses_its_end() -> None:
    tokenizer = word_tokenizer(CHATML)
    whole = Renderer(tokenizer).render(ONE_TURN)
    example = Renderer(tokenizer, seq_len=11).render(ONE_TURN)
    assert marked(example, tokenizer).endswith("|assistant|~|[hello]|[ ]")
    assert (example.truncated, example.cut_tokens) == (True, 3)
    assert (whole.truncated, whole.cut_tokens) == (False, 0)


def test_each_policy_does_with_a_long_row_what_it_says() -> None:
    tokenizer = word_tokenizer(LLAMA2, bos=True)
    turns = row(("user", "hi"), ("assistant", "hello there hello"))
    whole = Renderer(tokenizer).render(turns)
    short = len(whole.input_ids) - 3
    right, left, dropped = (
        Renderer(tokenizer, seq_len=short, too_long=how).render(turns) for how in ("right", "left", "drop")
    )
    assert right == Example(whole.input_ids[:short], whole.labels[:short], True, "rows.jsonl:1", 3)
    # the start token stays, as every row that the model has seen began with it
    bos = tokenizer.bos_token_id
    assert left.input_ids == [bos, *whole.input_ids[4:]] and left.labels == [-100, *whole.labels[4:]]
    assert (left.truncated, left.cut_tokens, left.labels[-1]) == (True, 3, tokenizer.eos_token_id)
    assert dropped == Example([], [], True, "rows.jsonl:1", len(whole.input_ids))
    with pytest.raises(
        DataError, match=rf"rows\.jsonl:1 is too long, expected at most {short} tokens, found {short + 3}"
    ):
        Renderer(tokenizer, seq_len=short, too_long="error").render(turns)
    for how in ("right", "left", "drop", "error"):  # rows that fit are the same for all
        assert Renderer(tokenizer, seq_len=len(whole.input_ids), too_long=how).render(turns) == whole


def test_a_row_cut_at_its_beginning_has_no_label_on_its_first_token() -> None:
    tokenizer = word_tokenizer(CHATML)
    example = Renderer(tokenizer, seq_len=8, too_long="left").render(row(("user", "hi"), ("assistant", "one " * 9)))
    assert len(example.input_ids) == 8 and example.labels[0] == -100 and example.labels[1] != -100


@pytest.mark.parametrize("template", [CHATML, LLAMA2, THINKING, PLAIN])
@pytest.mark.parametrize("turns", [ONE_TURN, TWO_TURNS])
def test_generation_starts_from_the_tokens_that_training_had(template: str, turns: Row) -> None:
    renderer = Renderer(word_tokenizer(template))
    example, prompt = renderer.render(turns), renderer.prompt_ids(turns)
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[len(prompt) - 1] == -100
    assert all(label != -100 for label in example.labels[len(prompt) : -1])


@pytest.mark.parametrize(("template", "answer"), [(CHATML, "\nyes"), (PLAIN, "a"), (PLAIN, "no")])
def test_a_token_that_would_join_prompt_and_answer_is_kept_apart(template: str, answer: str) -> None:
    tokenizer = joining_tokenizer(template)
    renderer = Renderer(tokenizer)
    turns = row(("user", "hi:a"), ("assistant", answer))
    example, prompt = renderer.render(turns), renderer.prompt_ids(turns)
    assert example.input_ids[: len(prompt)] == prompt
    trained = [label for label in example.labels if label != -100]
    assert tokenizer.decode(trained, skip_special_tokens=True) == answer
    assert example.labels[: len(prompt)] == [-100] * len(prompt)


def test_a_prompt_may_be_a_row_messages_or_one_text() -> None:
    renderer = Renderer(word_tokenizer(CHATML))
    messages = [{"role": "user", "content": "hi"}]
    assert renderer.prompt_ids(ONE_TURN) == renderer.prompt_ids(messages) == renderer.prompt_ids("hi")


def test_tool_calls_become_text_where_the_template_takes_none() -> None:
    events: list[Any] = []
    renderer = Renderer(word_tokenizer(CHATML), report=events.append)
    call = {"type": "function", "function": {"name": "hello", "arguments": {"a": 1}}}
    turns = Row(
        ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}),
        None,
        ({"type": "function", "function": {"name": "hello"}},),
        "rows.jsonl:1",
    )
    assert renderer.answer_text(turns) == '{"name": "hello", "arguments": {"a": 1}}'
    assert sorted(event.text.split(":")[0] for event in events) == [
        "the chat template takes no tool calls",
        "the chat template takes no tools",
    ]


def test_a_conversation_that_the_template_refuses_names_its_line() -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the model's chat template refuses .*Only user and assistant"):
        Renderer(word_tokenizer(LLAMA2)).render(row(("user", "hi"), ("tool", "one"), ("assistant", "bye")))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth"),
        ("{{ 1 // (messages | length - messages | length) }}", "division"),
        ("{{ messages[9].content.x }}", "undefined|no element"),
    ],
)
def test_a_template_without_bounds_is_one_line(template: str, reason: str) -> None:
    with pytest.raises(DataError, match=rf"the model's chat template refuses this conversation \(.*({reason})"):
        Renderer(word_tokenizer(template)).render(row(("user", "hi"), ("assistant", "bye")))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0].content * 10**15 }}", "takes more than 256 MiB of memory"),
        ("{{ 9 ** (9 ** 9) }}", "computes for more than 2 s"),  # native code, which no timer of Python's interrupts
    ],
)
def test_a_template_that_would_take_all_time_or_memory_is_ended(template: str, reason: str) -> None:
    """Before a row is rendered."""
    chat = CHATML + template
    with pytest.raises(ModelError, match=f"the model's chat template {reason}"):
        Renderer(word_tokenizer(chat)).render(row(("user", "hi"), ("assistant", "bye")))


def test_render_all_keeps_the_order_of_mixed_chunks_and_reports_progress() -> None:
    events: list[Any] = []
    rows = [row(("user", "hi"), ("assistant", "one" if i % 2 else "two")) for i in range(300)]
    renderer = Renderer(word_tokenizer(CHATML))
    assert renderer.render_all(rows, events.append) == [renderer.render(one) for one in rows]
    assert events == [Progress("tokenising", 256, 300), Progress("tokenising", 300, 300)]
