"""The layouts that rows of data come in, and how each becomes chat messages.

    messages           {"messages": [{"role", "content"}, ...]}, "tools" beside it
    sharegpt           {"conversations": [{"from", "value"}, ...]}, "system" and "tools" beside it
    alpaca             {"instruction", "output"}, "input" and "system" beside it
    dolly              {"instruction", "response"}, "context" beside it
    oasst              {"message_tree_id", "prompt"}: a tree of messages, of which the best ranked path is taken
    preference         {"chosen", "rejected"}: the chosen answer, after "prompt", or "instruction" and "input"; or two
                       whole conversations, as lists of messages or as texts of "Human: ..." and "Assistant: ..."
    prompt/completion  {"prompt", "completion"}: two texts or two lists of messages
    prompt/response    {"prompt", "response"}
    text               {"text"}: no turns; every token is trained

The first row decides; a later row without the columns of that layout is an error, not a guess. Columns that the layout
does not know are left out, which `read_data` says.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from smidgen.data.files import describe
from smidgen.errors import DataError

__all__ = ["LAYOUTS", "Layout", "Row", "detect_layout"]

Message = dict[str, Any]
Columns = Mapping[str, Any]

_HH = re.compile(r"(?:\A|\n)\s*\n(Human|Assistant):")
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "prompter": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


@dataclass(frozen=True)
class Row:
    """One example.

    messages: chat messages {"role", "content"[, "tool_calls", ...]}; empty for plain text.
    text: the text of a plain text row, else None.
    tools: descriptions of the tools that the assistant may call, or None.
    where: the place in the file, "train.jsonl:12".
    """

    messages: tuple[Message, ...]
    text: str | None
    tools: tuple[dict[str, Any], ...] | None
    where: str

    @property
    def answer(self) -> str:
        """The last assistant message's content; "" for plain text."""
        last = self.last_assistant
        return "" if last is None else self.messages[last]["content"]

    @property
    def last_assistant(self) -> int | None:
        """Index of the last assistant message."""
        turns = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]
        return turns[-1] if turns else None


@dataclass(frozen=True)
class Layout:
    """A layout: the columns that mark it, the ones it may have besides, and how a record becomes a Row."""

    name: str
    needs: tuple[str, ...]
    may_have: tuple[str, ...]
    messages_of: Callable[[Columns, str], list[Message]]

    def matches(self, record: Columns) -> bool:
        return all(column in record for column in self.needs)

    def row(self, record: Columns, where: str) -> Row:
        """The record as a Row. Raises DataError if it has no answer or a column of the wrong type."""
        tools = _tools(record.get("tools"), where) if "tools" in self.may_have else None
        if self.name == "text":
            text = _text(record, "text", where)
            if not text.strip():
                raise DataError(f"{where} has no text", expected="text in column text", found=describe(text))
            row = Row((), text, None, where)
        else:
            row = Row(tuple(self.messages_of(record, where)), None, tools, where)
            _check_answer(row)
        _check_encodable(row)
        return row


def detect_layout(record: Columns, where: str) -> Layout:
    """The layout of a file, by the columns of its first row. Raises DataError when none fits."""
    if all(column in record for column in _ONE_OF_TREE):
        raise DataError(
            f"{where} is one message of a tree", expected="a whole tree, with its replies, in every row",
            cure="take the file *_trees.jsonl of that data set, or the built-in name oasst1",
        )  # fmt: skip
    for layout in LAYOUTS:
        if layout.matches(record):
            return layout
    known = "; ".join(" + ".join(layout.needs) for layout in LAYOUTS)
    raise DataError(
        f"{where} has columns of no known layout",
        expected=f"one of: {known}",
        found=", ".join(map(str, record)) or "no columns",
        cure="rename the columns",
    )


def _from_turns(column: str) -> Callable[[Columns, str], list[Message]]:
    def messages_of(record: Columns, where: str) -> list[Message]:
        return _system(record, where) + _turns(record[column], column, where)

    return messages_of


def _from_instruction(extra: str, answer: str) -> Callable[[Columns, str], list[Message]]:
    def messages_of(record: Columns, where: str) -> list[Message]:
        request = _text(record, "instruction", where)
        more = _text(record, extra, where)
        user = f"{request}\n\n{more}" if more.strip() else request
        return [*_system(record, where), _message("user", user), _message("assistant", _text(record, answer, where))]

    return messages_of


def _from_prompt(answer: str) -> Callable[[Columns, str], list[Message]]:
    def messages_of(record: Columns, where: str) -> list[Message]:
        if isinstance(record["prompt"], list):
            return _turns(record["prompt"], "prompt", where) + _turns(record[answer], answer, where)
        prompt, completion = _text(record, "prompt", where), _text(record, answer, where)
        if not prompt.strip():
            raise DataError(f"{where}, column prompt: empty", expected="what the answer answers")
        return [_message("user", prompt), _message("assistant", completion)]

    return messages_of


def _from_tree(record: Columns, where: str) -> list[Message]:
    """The path on which every message is the best ranked reply to the one before, up to the last answer.

    Trees are those of Open Assistant (arXiv 2304.07327), these paths what QLoRA's Guanaco learned (arXiv 2305.14314).
    """
    path: list[Message] = []
    node: object = record["prompt"]
    while node is not None:
        place = f"{where}, message {len(path) + 1}"
        if not isinstance(node, dict) or not isinstance(node.get("text"), str):
            expected = '{"text": ..., "role": ..., "replies": [...]}'
            raise DataError(f"{place}: wrong type", expected=expected, found=describe(node))
        path.append(_turn({"role": node.get("role"), "content": node["text"]}, place))
        replies = node.get("replies") or []
        if not isinstance(replies, list):
            raise DataError(f"{place}, replies: wrong type", expected="a list of messages", found=describe(replies))
        kept = [reply for reply in replies if not (isinstance(reply, dict) and reply.get("deleted"))]
        node = min(kept, key=_rank, default=None)
    while path and path[-1]["role"] != "assistant":
        path.pop()
    return path


def _rank(reply: object) -> float:
    """Of a message among its siblings: 0 is the best, and those without a rank come last."""
    rank = reply.get("rank") if isinstance(reply, dict) else None
    return rank if isinstance(rank, int | float) else float("inf")


def _from_preference(record: Columns, where: str) -> list[Message]:
    chosen = record["chosen"]
    if isinstance(chosen, str) and _HH.match(chosen):  # hh-rlhf: a whole conversation in one text
        _, *parts = _HH.split(chosen)
        turns = zip(parts[::2], parts[1::2], strict=True)
        return [*_system(record, where), *(_message(_ROLES[who.lower()], text.strip()) for who, text in turns)]
    if isinstance(record.get("prompt"), list):
        asked = _turns(record["prompt"], "prompt", where)
    elif "instruction" in record:
        asked = _from_instruction("input", "chosen")(record, where)[:-1]
    elif (prompt := _text(record, "prompt", where)).strip():
        asked = [*_system(record, where), _message("user", prompt)]
    else:
        asked = []
    if isinstance(chosen, str) and asked:
        return [*asked, _message("assistant", chosen)]
    if not isinstance(chosen, list):
        raise DataError(
            f"{where}, column chosen: nothing says what it answers", expected="a column prompt, or a list of messages",
            found=describe(chosen),
        )  # fmt: skip
    answer = _turns(chosen, "chosen", where)
    # a conversation may be whole in `chosen`, and its prompt beside it once more
    return answer if answer and answer[0]["role"] != "assistant" else asked + answer


LAYOUTS = (
    Layout("messages", ("messages",), ("tools",), _from_turns("messages")),
    Layout("sharegpt", ("conversations",), ("system", "tools"), _from_turns("conversations")),
    Layout("oasst", ("message_tree_id", "prompt"), ("tree_state",), _from_tree),
    Layout(
        "preference", ("chosen", "rejected"), ("prompt", "instruction", "input", "output", "system"), _from_preference
    ),
    Layout("alpaca", ("instruction", "output"), ("input", "system"), _from_instruction("input", "output")),
    Layout("dolly", ("instruction", "response"), ("context",), _from_instruction("context", "response")),
    Layout("prompt/completion", ("prompt", "completion"), ("tools",), _from_prompt("completion")),
    Layout("prompt/response", ("prompt", "response"), (), _from_prompt("response")),
    Layout("text", ("text",), (), lambda record, where: []),
)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _system(record: Columns, where: str) -> list[Message]:
    system = _text(record, "system", where)
    return [_message("system", system)] if system.strip() else []


def _text(record: Columns, column: str, where: str) -> str:
    """The text of a column; "" where the column is missing or null."""
    value = record.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}, column {column}: wrong type", expected="text", found=describe(value))
    return value


def _turns(value: object, column: str, where: str) -> list[Message]:
    if isinstance(value, str):  # a CSV cell or a parquet text column
        value = _from_json(value, f"{where}, column {column}")
    if not isinstance(value, list):
        raise DataError(f"{where}, column {column}: wrong type", expected="a list of messages", found=describe(value))
    return [_turn(turn, f"{where}, {column}[{index}]") for index, turn in enumerate(value)]


def _turn(turn: object, place: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{place}: wrong type", expected='{"role": ..., "content": ...}', found=describe(turn))
    said = turn.get("role", turn.get("from"))
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        found = repr(said) if isinstance(said, str) else describe(said)
        raise DataError(f"{place}: unknown role", expected="system, user, assistant or tool", found=found)
    content = _content(turn.get("content", turn.get("value")), place)
    # parquet gives every message the keys of all; null there means absent
    more = {key: item for key, item in turn.items() if key not in _TURN_KEYS and item is not None}
    if calls := more.pop("tool_calls", None):
        more["tool_calls"] = _calls(calls, place)
    if said == "function_call" and (call := _call_in_text(content)):
        content, more["tool_calls"] = "", [call]
    return {"role": role, "content": content, **more}


_TURN_KEYS = ("role", "from", "content", "value")
_ONE_OF_TREE = ("message_tree_id", "parent_id", "text", "role")  # OASST1 and 2 as the hub has them


def _content(value: object, place: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return "".join(str(part.get("text", "")) for part in value)
    raise DataError(f"{place}: wrong type of content", expected="text", found=describe(value))


def _calls(calls: object, place: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as an object: templates write them as JSON themselves."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{place}: wrong type of tool_calls", expected="a list of calls", found=describe(calls))
    normal = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{place}: a tool call without a name", expected='{"name": ..., "arguments": {...}}')
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _from_json(arguments or "{}", f"{place}, arguments of {function['name']}")
        kept = {key: item for key, item in call.items() if key not in ("function", "name", "arguments", "type")}
        normal.append(kept | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return normal


def _call_in_text(text: str) -> dict[str, Any] | None:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}


def _tools(value: object, where: str) -> tuple[dict[str, Any], ...] | None:
    if isinstance(value, str) and value.strip():
        value = _from_json(value, f"{where}, column tools")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{where}, column tools: wrong type", expected="a list of tools", found=describe(value))
    # templates expect the form that OpenAI's API has; bare descriptions are wrapped into it
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in value)


def _from_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{place}: not valid JSON", expected="JSON", found=repr(text[:40])) from None


def _check_answer(row: Row) -> None:
    if row.last_assistant is None:
        roles = ", ".join(message["role"] for message in row.messages) or "no messages"
        raise DataError(f"{row.where} has no answer", expected="an assistant's turn", found=roles, cure="drop the row")
    last = row.messages[row.last_assistant]
    if not last["content"].strip() and not last.get("tool_calls"):
        raise DataError(
            f"{row.where} has no answer",
            expected="text in the assistant's last turn",
            found="empty text",
            cure="fill it in or drop the row",
        )


def _check_encodable(row: Row) -> None:
    try:
        for text in _texts(row):
            text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"a lone surrogate, U+{ord(error.object[error.start]):04X}"
        cure = "write the character itself, or both halves of its pair"
        raise DataError(
            f"{row.where} holds text that is no Unicode", expected="UTF-8", found=found, cure=cure
        ) from None


def _texts(row: Row) -> Iterable[str]:
    if row.text is not None:
        yield row.text
    for message in row.messages:
        if len(message) > 2:
            yield json.dumps(message, ensure_ascii=False)
        else:
            yield message["content"]
    if row.tools:
        yield json.dumps(row.tools, ensure_ascii=False)
