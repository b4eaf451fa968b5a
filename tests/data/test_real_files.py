"""Real data sets, read and rendered: found through SMIDGEN_TEST_DATA, skipped without it."""

import os
from pathlib import Path

import pytest

from small_tokenizers import CHATML, LLAMA2, word_tokenizer
from smidgen.data.gate import check_examples
from smidgen.data.records import read_data
from smidgen.data.render import Renderer

FOLDER = os.environ.get("SMIDGEN_TEST_DATA")
pytestmark = pytest.mark.skipif(not FOLDER, reason="SMIDGEN_TEST_DATA is not set: no real data here")

FILES = [
    ("sft/snips_valid.jsonl", "messages", 210),
    ("sft/wikisql_test.jsonl", "messages", 100),
    ("chat/instruction-data_raschka.json", "alpaca", 1100),
    ("chat/fastchat_dummy_conversation.json", "sharegpt", 500),
    ("chat/glaive_toolcall_en_demo.json", "sharegpt", 300),
    ("chat/instruction-data-with-preference_raschka.json", "preference", 1100),
    ("chat/oasst_en_100_tree.jsonl", "oasst", 100),
    ("chat/dolly_hhrlhf_train_small.jsonl", "prompt/response", 1000),
    ("text/c4_demo.jsonl", "text", 300),
]


@pytest.mark.parametrize(("name", "layout", "count"), FILES)
def test_real_rows_are_read_rendered_and_pass_the_gate(name: str, layout: str, count: int) -> None:
    data = read_data(str(Path(FOLDER or "") / name), hold_out=False)
    assert (data.layout, len(data.train)) == (layout, count)
    tokenizer = word_tokenizer(CHATML)
    renderer = Renderer(tokenizer, seq_len=100_000)
    examples = renderer.render_all(data.train)
    check_examples(examples, tokenizer, len(tokenizer), renderer.end_ids, layout=layout)
    if layout == "text":
        return
    for row, example in zip(data.train, examples, strict=True):
        prompt = renderer.prompt_ids(row)
        assert example.input_ids[: len(prompt)] == prompt
        # all of the last turn is trained, up to the end token; one line break follows it
        assert all(label != -100 for label in example.labels[len(prompt) : -1])
        assert example.labels[-2] == renderer.end_ids[0] and example.labels[-1] == -100


def test_a_strict_template_renders_alternating_turns() -> None:
    data = read_data(str(Path(FOLDER or "") / "chat/fastchat_dummy_conversation.json"), hold_out=False)
    tokenizer = word_tokenizer(LLAMA2)
    examples = Renderer(tokenizer).render_all(data.train)
    for row, example in zip(data.train, examples, strict=True):
        answers = sum(message["role"] == "assistant" for message in row.messages)
        assert example.labels.count(tokenizer.eos_token_id) == answers
