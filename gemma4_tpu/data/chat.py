"""Conversations to token ids and loss flags, by the checkpoint's own chat template.

Text comes from the template; which tokens carry loss is read off the token ids, never off the lengths of separately
encoded pieces. One policy for thought channels holds in training and generation alike:

- `drop`: thoughts are removed. The instruction checkpoints' template opens a non-thinking *generation prompt* with an
  empty thought channel, but leaves it out of assistant turns of the past. Here it stands at the head of every assistant
  turn, without loss, so that the model is trained right behind what it is going to see. A server with the stock
  template makes the same prompt for a first answer; in longer conversations it leaves out only the past empty channels.
- `train`: the template is told to enable thinking; thoughts stay in their turns, and carry loss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.errors import UserError

TURN, TURN_END = "<|turn>", "<turn|>"
MODEL_HEADER = f"{TURN}model\n"
THINK = "<|think|>"
CHANNEL_START, CHANNEL_END = "<|channel>", "<channel|>"
CHANNEL = re.compile(f"{re.escape(CHANNEL_START)}(.*?){re.escape(CHANNEL_END)}", re.DOTALL)
TOOL_RESPONSE, TOOL_RESPONSE_END = "<|tool_response>", "<tool_response|>"
ROLES = ("system", "user", "assistant", "tool")
POLICIES = ("drop", "train")

Message = dict[str, Any]


class ChatFormat:
    """Renders conversations with one tokenizer under one policy.

    Args:
      tokenizer: a Hugging Face tokenizer with Gemma 4's control tokens and a chat template.
      thoughts: `drop` or `train`, see the module's text.
      train_on: `all` assistant turns carry loss, or only the `last` one.

    Raises:
      UserError: the tokenizer lacks a template or Gemma 4's turn tokens, or the template is of another kind.
    """

    def __init__(self, tokenizer: Any, thoughts: str = "drop", train_on: str = "all"):
        if thoughts not in POLICIES or train_on not in ("all", "last"):
            raise UserError(f"data.thoughts={thoughts} (drop or train), data.train_on={train_on} (all or last)")
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template; take that of an instruction-tuned checkpoint")
        self._tokenizer = tokenizer
        self._keep_thoughts = thoughts == "train"
        self._train_on = train_on
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in (TURN, TURN_END) if token not in vocabulary]
        if missing or tokenizer.bos_token is None:
            raise UserError(f"the tokenizer has no {' and '.join(missing) or 'BOS token'}: it is not one of Gemma 4")
        self._turn, self._turn_end = vocabulary[TURN], vocabulary[TURN_END]
        self._channel = vocabulary.get(CHANNEL_START, -1)
        self._tool_response = vocabulary.get(TOOL_RESPONSE, -1)
        self._tool_response_end = vocabulary.get(TOOL_RESPONSE_END, -1)
        self._control_token = _control_tokens(tokenizer)
        self.primer = self._find_primer()
        """What the template's generation prompt puts behind the model's header."""
        self._header_ids = np.array(self._encode([MODEL_HEADER])[0], np.int32)
        self._primer_ids = np.array(self._encode([self.primer])[0], np.int32)

    def render(self, messages: list[Message], tools: list[Any] | None = None) -> str:
        """The text of a conversation.

        Raises:
          RowDropped: it is malformed, or the template refuses it.
        """
        prepared, thoughts = self._prepare(messages)
        if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise RowDropped("bad_tool_call", "tools")
        try:
            text = self._apply(prepared, tools=tools or None)
        except Exception as error:  # whatever a template's own code raises about this conversation
            raise RowDropped("template_error", str(error)[:120]) from error
        for marker, thought in thoughts.items():
            text = text.replace(marker, thought)
        if self._keep_thoughts and (lost := [t for t in self._field_thoughts(prepared) if t not in text]):
            raise RowDropped("thought_lost", f"{lost[0][:60]!r}")
        if not text.startswith(self._tokenizer.bos_token):
            text = self._tokenizer.bos_token + text
        if self.primer:
            text = re.sub(f"{re.escape(MODEL_HEADER)}(?!{re.escape(self.primer)})", MODEL_HEADER + self.primer, text)
        return text

    def render_prompt(self, messages: list[Message], tools: list[Any] | None = None) -> str:
        """The text after which the model is to answer: a prefix of `render` of the answered conversation.

        Raises:
          UserError: the conversation is malformed.
        """
        try:
            text = self.render(messages, tools)
        except RowDropped as problem:
            raise UserError(f"cannot render the prompt: {problem}") from problem
        opened = text.rfind(MODEL_HEADER) > text.rfind(TURN_END)  # the model goes on after a tool's response
        return text if opened else text + MODEL_HEADER + self.primer

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """int32 [n + 1] ids of each rendered text."""
        return [np.array(ids, np.int32) for ids in self._encode(texts)]

    def loss_flags(self, ids: np.ndarray, text: str) -> np.ndarray:
        """Loss flags, bool [n + 1]: what the model itself has to produce, among the ids of the rendered `text`.

        That is what follows the header (and primer) of its turns, including the end of the turn or, behind a tool
        call, the token that hands over to the tool; not the tool's response.

        Raises:
          RowDropped: there is not exactly one BOS, a header did not come out as its own tokens, or nothing has loss.
        """
        bos = self._tokenizer.bos_token_id
        if ids[0] != bos or np.count_nonzero(ids == bos) != 1:
            raise RowDropped("bad_rendering", f"{np.count_nonzero(ids == bos)} BOS tokens")
        flags = np.zeros(len(ids), bool)
        turns = 0
        ends = np.append(np.flatnonzero(ids == self._turn_end), len(ids) - 1)
        for turn in np.flatnonzero(ids == self._turn).tolist():
            start = _skip(ids, turn, self._header_ids)
            if start is None:
                continue
            turns += 1
            start = _skip(ids, start, self._primer_ids) or start
            stop = int(ends[np.searchsorted(ends, start)]) + 1
            if self._train_on == "last":
                flags[:] = False
            flags[start:stop] = True
            self._clear_tool_responses(ids, flags, start, stop)
        if turns != text.count(MODEL_HEADER):
            raise RowDropped("bad_rendering", f"{turns} of {text.count(MODEL_HEADER)} model turns found")
        if not flags[1:].any():
            raise RowDropped("no_target")
        return flags

    def holds_thoughts(self, ids: np.ndarray) -> bool:
        """Whether any thought channel is among the ids (under `train`, where empty ones are left out)."""
        return bool(np.any(ids == self._channel))

    def _clear_tool_responses(self, ids: np.ndarray, flags: np.ndarray, start: int, stop: int) -> None:
        inside = ids[start:stop]
        closes = np.flatnonzero(inside == self._tool_response_end) + start
        for opened in np.flatnonzero(inside == self._tool_response) + start:
            later = closes[closes > opened]
            follows_response = opened > 0 and ids[opened - 1] == self._tool_response_end
            # The model itself hands over with the opening token, unless one response follows another.
            first = opened if follows_response else opened + 1
            flags[first : (later[0] + 1 if len(later) else stop)] = False

    def _prepare(self, messages: Any) -> tuple[list[Message], dict[str, str]]:
        """Messages fit for the template, and thoughts by the marker that stands for each in its turn's text.

        Markers are needed because the stock template strips thoughts from the assistant turns that it renders.
        """
        if not isinstance(messages, list) or not messages:
            raise RowDropped("no_messages", type(messages).__name__)
        prepared: list[Message] = []
        thoughts: dict[str, str] = {}
        for position, message in enumerate(messages):
            turn = _checked_turn(message, position)
            if turn["role"] == "assistant":
                if prepared and prepared[-1]["role"] == "assistant" and not prepared[-1].get("tool_calls"):
                    raise RowDropped("bad_order", f"turn {position}")
                self._prepare_answer(turn, position, thoughts)
            elif turn["role"] == "system" and turn["content"].startswith(THINK):
                turn["content"] = turn["content"].removeprefix(THINK).lstrip()  # the policy decides on thinking
            if any(self._control_token.search(text) for text in _strings(turn)):
                raise RowDropped("control_token", f"turn {position}")
            prepared.append(turn)
        for thought in thoughts.values():
            if self._control_token.search(thought.removeprefix(CHANNEL_START).removesuffix(CHANNEL_END)):
                raise RowDropped("control_token", "in a thought")
        return prepared, thoughts

    def _prepare_answer(self, turn: Message, position: int, thoughts: dict[str, str]) -> None:
        """Take thoughts out of an assistant turn; under `train`, leave markers (or fields, for tool calls) behind."""
        given = turn.pop("reasoning", None) or turn.pop("reasoning_content", None)
        turn.pop("reasoning_content", None)
        blocks = CHANNEL.findall(turn["content"])
        if not self._keep_thoughts:
            turn["content"] = CHANNEL.sub("", turn["content"])
        elif turn.get("tool_calls"):
            turn["content"] = CHANNEL.sub("", turn["content"])
            if thought := (given or "\n".join(_thought_text(block) for block in blocks)).strip():
                turn["reasoning"] = turn["reasoning_content"] = thought
        else:
            if given and not blocks:
                turn["content"] = f"{CHANNEL_START}thought\n{given.strip()}\n{CHANNEL_END}{turn['content'].strip()}"

            def leave_marker(match: re.Match[str]) -> str:
                if not _thought_text(match[1]):
                    return ""
                marker = f"\ue000{position}.{len(thoughts)}\ue001"
                thoughts[marker] = match[0]
                return marker

            turn["content"] = CHANNEL.sub(leave_marker, turn["content"])
        turn["content"] = turn["content"].strip()
        answer = turn["content"]
        for marker in thoughts:
            answer = answer.replace(marker, "")
        if not answer.strip() and not turn.get("tool_calls"):
            raise RowDropped("empty_answer", f"turn {position}")

    def _field_thoughts(self, prepared: list[Message]) -> list[str]:
        return [turn["reasoning"] for turn in prepared if turn.get("reasoning")]

    def _find_primer(self) -> str:
        probe = [{"role": "user", "content": "x"}]
        past = self._apply(probe)
        prompt = self._apply(probe, add_generation_prompt=True)
        head = past + MODEL_HEADER
        primer = prompt.removeprefix(head)
        if not prompt.startswith(head) or (primer and not CHANNEL.fullmatch(primer)):
            raise UserError(
                f"the chat template's generation prompt is {prompt!r}; expected Gemma 4's {head!r}, "
                "and behind it nothing or a closed thought channel"
            )
        return primer

    def _apply(self, messages: list[Message], **options: Any) -> str:
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, enable_thinking=self._keep_thoughts, **options
        )

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # What `self._tokenizer(texts)` does too, but without offsets into the text: a quarter of the time less.
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return [encoded.ids for encoded in backend.encode_batch_fast(texts, add_special_tokens=False)]


def render_prompt(tokenizer: Any, messages: list[Message], policy: str) -> list[int]:
    """Ids of the generation prompt for `messages` under the thought policy `policy` (`drop` or `train`).

    Raises:
      UserError: the conversation or the tokenizer is unfit.
    """
    chat = ChatFormat(tokenizer, policy)
    return chat.encode([chat.render_prompt(messages)])[0].tolist()


def _checked_turn(message: Any, position: int) -> Message:
    """A copy of one message with known role and text content, without empty fields (Parquet fills every column)."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise RowDropped("bad_role", f"turn {position}")
    if message["role"] == "system" and position:
        raise RowDropped("bad_role", f"turn {position}: system")
    turn = {key: value for key, value in message.items() if value is not None}
    turn["content"] = _text(turn.get("content", "" if turn.get("tool_calls") else None), position)
    if not all(isinstance(turn.get(key, ""), str) for key in ("reasoning", "reasoning_content")):
        raise RowDropped("bad_content", f"turn {position}: reasoning")
    if "tool_calls" in turn:
        turn["tool_calls"] = [_tool_call(call, position) for call in turn["tool_calls"]]
    return turn


def _text(content: Any, position: int) -> str:
    """Text content, given as a string or as a list of `{"type": "text", "text": …}` parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(texts)
    raise RowDropped("bad_content", f"turn {position}: {type(content).__name__}")


def _tool_call(call: Any, position: int) -> Message:
    """A tool call whose arguments are a mapping, as templates expect; APIs give them as a JSON string."""
    try:
        function = dict(call["function"])
        if isinstance(function.get("arguments"), str):
            function["arguments"] = json.loads(function["arguments"])
        return {**call, "function": {**function, "name": str(function["name"])}}
    except (TypeError, KeyError, ValueError) as error:
        raise RowDropped("bad_tool_call", f"turn {position}") from error


def _strings(value: Any) -> Iterator[str]:
    """Every text inside a message."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _thought_text(block: str) -> str:
    """What is thought in the inside of a channel, less the channel's name."""
    return block.removeprefix("thought").strip()


def _control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Matches what the tokenizer would read as a control token in the middle of plain text."""
    added = tokenizer.added_tokens_decoder.values()
    names = {str(token) for token in added if token.special or re.fullmatch(r"<\|.*>|<.*\|>", str(token))}
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def _skip(ids: np.ndarray, start: int, expected: np.ndarray) -> int | None:
    """Where `expected` ends if it stands in `ids` at `start`."""
    stop = start + len(expected)
    return stop if np.array_equal(ids[start:stop], expected) else None
