"""Renders conversations to token ids and loss flags with the checkpoint's own chat template.

An answer is trained exactly as a server would ask for it: the ids of its prompt (the template's rendering of the
preceding messages, with the generation prompt), followed by the ids of the answer. Answers share one example if each
prompt begins with everything before it. Where the template renders earlier turns differently from how they were
generated (thoughts and empty channels removed, content moved), each answer gets its own example. `proof` reads every
example back.

The same policy for thoughts applies in training and in generation:

- `drop`: thoughts are removed, and the template is told that thinking is off;
- `train`: the template is told that thinking is on; an answer's thought comes first and carries loss.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from gemma4_tpu.data import markup
from gemma4_tpu.data.drops import RowDropped, unreadable
from gemma4_tpu.data.forms import Conversation
from gemma4_tpu.data.pictures import Picture, pictures_of
from gemma4_tpu.data.proof import Prover, Span
from gemma4_tpu.data.served import differences_of_servers
from gemma4_tpu.data.tokenizer import apply_template, encode
from gemma4_tpu.errors import UserError

logger = logging.getLogger(__name__)

POLICIES = ("drop", "train")

Message = dict[str, Any]

# What can follow the model's header: an empty, closed thought channel or, in a prompt, one that was just opened.
_EMPTY_CHANNEL = re.compile(rf"{re.escape(markup.CHANNEL)}(?:thought)?\s*{re.escape(markup.CHANNEL_END)}\s*")
_CHANNEL_TAIL = re.compile(rf"{_EMPTY_CHANNEL.pattern}|{re.escape(markup.CHANNEL)}(?:thought)?\s*")


class Example(NamedTuple):
    """An example that was verified."""

    ids: np.ndarray
    """int32 [n + 1]."""
    flags: np.ndarray
    """bool [n + 1]: True where predicting this token counts in the loss."""
    answers: int
    """Number of answers with loss."""
    second: int = 0
    """Index in `ids` where the second sequence (the rejected side of a pair) begins; 0 if there is only one."""
    pictures: tuple[Picture, ...] = ()
    """In the order of their soft tokens."""

    @property
    def slots(self) -> int:
        """Slots that it takes in a packed row."""
        return len(self.ids) - 1 - (self.second > 0)


class _AnswerPlace(NamedTuple):
    """An answer, and what a server sends before it."""

    message: int
    prompt: str
    text: str
    closes: bool
    """The first token only closes a thought that the prompt opened and the answer lacks, so it carries no loss."""


@dataclass
class Rendering:
    """A conversation as texts, before encoding."""

    messages: list[Message]
    tools: list[Any] | None = None
    answers: list[_AnswerPlace] = field(default_factory=list)
    text: str | None = None
    """Plain text, all of it with loss."""

    @property
    def texts(self) -> list[str]:
        """The texts to encode, in the order in which `ChatFormat.examples` consumes them."""
        if self.text is not None:
            return [self.text]
        return [text for answer in self.answers for text in (answer.prompt, answer.text)]


class ChatFormat:
    """Renders conversations with one tokenizer under one policy.

    Args:
      tokenizer: a Hugging Face tokenizer with Gemma 4's control tokens and a chat template.
      thoughts: `drop` or `train`; see the module docstring.
      train_on: `all` answers carry loss, or only the `last` one of a conversation.

    Raises:
      UserError: the tokenizer lacks a template or Gemma 4's turn tokens, or its template is not a Gemma 4 template.
    """

    def __init__(self, tokenizer: Any, thoughts: str = "drop", train_on: str = "all"):
        if thoughts not in POLICIES or train_on not in ("all", "last"):
            raise UserError(f"data.thoughts={thoughts} (drop or train), data.train_on={train_on} (all or last)")
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template; use that of an instruction-tuned checkpoint")
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in (markup.TURN, markup.TURN_END) if token not in vocabulary]
        if missing or tokenizer.bos_token is None:
            raise UserError(
                f"the tokenizer has no {' and '.join(missing) or 'BOS token'}: it is not a Gemma 4 tokenizer"
            )
        self._tokenizer = tokenizer
        self._keep_thoughts = thoughts == "train"
        self._train_on = train_on
        control = markup.control_tokens(tokenizer)
        self._control = markup.control_pattern(control)
        self._channel_end = vocabulary.get(markup.CHANNEL_END, -1)
        self._bos_added = False
        self._check_generation_prompt()
        for difference in differences_of_servers(tokenizer, self._keep_thoughts, self._bos_added):
            logger.warning("%s", difference)
        header = self.encode([markup.MODEL_HEADER])[0][1:]
        words = {role: self._find_words(role) for role in ("system", "user")}
        self._shows_pictures = {markup.IMAGE, markup.IMAGE_START, markup.IMAGE_END} <= vocabulary.keys()
        self._prover = Prover(control, tokenizer.bos_token_id, header, words)

    def render(self, conversation: Conversation) -> Rendering:
        """Renders a conversation: one prompt and one answer for each answer with loss.

        Raises:
          RowDropped: the conversation is malformed, or the template refuses it or misrenders an answer.
        """
        if conversation.text is not None:
            return self._plain_text(conversation.text)
        messages = self._prepare(conversation.messages, conversation.tools)
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        asked = numbers[-1:] if self._train_on == "last" else numbers
        # No server is ever asked to begin a conversation.
        learned = [number for number in asked if number and conversation.messages[number].get("train", True)]
        if not learned:
            raise RowDropped("no_target")
        answers = [self._answer(messages, number, conversation.tools) for number in learned]
        return Rendering(messages[: learned[-1] + 1], conversation.tools, answers)

    def render_prompt(self, messages: list[Message], tools: list[Any] | None = None) -> str:
        """The text that a server with the same template sends to get the next answer.

        Raises:
          UserError: the conversation is malformed.
        """
        try:
            return self._prompt(self._prepare(messages, tools), tools)
        except RowDropped as problem:
            raise UserError(f"cannot render the prompt: {problem}") from problem

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [n + 1]; adds no special tokens."""
        return encode(self._tokenizer, texts)

    def examples(self, renderings: list[Rendering]) -> list[list[Example] | RowDropped]:
        """The verified examples of each rendering, or the reason for dropping it; encodes all texts in one call."""
        encoded = iter(self.encode([text for rendering in renderings for text in rendering.texts]))
        made: list[list[Example] | RowDropped] = []
        for rendering in renderings:
            ids = [next(encoded) for _ in rendering.texts]
            try:
                made.append(self._examples(rendering, ids))
            except RowDropped as problem:
                made.append(problem)
            except Exception as error:  # an unforeseen kind of row must not stop the run
                made.append(unreadable(error))
        return made

    def holds_thoughts(self, ids: np.ndarray, flags: np.ndarray) -> bool:
        """Whether any thought carries loss."""
        return bool(np.any((ids == self._channel_end) & flags))

    def _examples(self, rendering: Rendering, encoded: list[np.ndarray]) -> list[Example]:
        if rendering.text is not None:
            flags = np.ones(len(encoded[0]), bool)
            flags[0] = False
            return [Example(encoded[0], flags, 0)]
        drafts: list[tuple[np.ndarray, str, list[Span]]] = []
        for answer, prompt, own in zip(rendering.answers, encoded[::2], encoded[1::2], strict=True):
            start = len(prompt)
            span = Span(answer.message, start + answer.closes, start + len(own))
            spans = [span]
            # A prompt that begins with exactly the ids of the example so far continues it, so both answers share one
            # example. If the template changes earlier turns (by dropping thoughts, say), each answer gets its own.
            if drafts and np.array_equal(prompt[: len(drafts[-1][0])], drafts[-1][0]):
                spans = [*drafts.pop()[2], span]
            drafts.append((np.concatenate([prompt, own]), answer.prompt + answer.text, spans))
        examples = []
        for ids, text, spans in drafts:
            messages = rendering.messages[: spans[-1].message + 1]
            self._prover.check(ids, text, messages, rendering.tools, spans)
            flags = np.zeros(len(ids), bool)
            for span in spans:
                flags[span.start : span.stop] = True
            examples.append(Example(ids, flags, len(spans), pictures=tuple(pictures_of(messages))))
        return examples

    def _answer(self, messages: list[Message], number: int, tools: list[Any] | None) -> _AnswerPlace:
        """Prompt and answer number `number`, with the answer as the template renders it, preceded by its thought."""
        prompt = self._prompt(messages[:number], tools)
        history, header, channel = _split_prompt(prompt)
        message = {key: value for key, value in messages[number].items() if not key.startswith("reasoning")}
        shown = self._apply([*messages[:number], message], tools)
        body = shown.removeprefix(history + header)
        if body == shown:
            raise RowDropped("bad_rendering", f"message {number} (assistant): {_difference(history + header, shown)}")
        closed = channel.rstrip().endswith(markup.CHANNEL_END)
        body = body.removeprefix(channel) if closed else body
        # A template can render earlier turns with an empty thought, whatever its prompt ends in; nobody wrote that
        # thought.
        if empty := _EMPTY_CHANNEL.match(body.lstrip()):
            body = _own_space(empty[0], messages[number]) + body.lstrip()[empty.end() :]
        body = body.rstrip()  # what follows the token that ends the turn
        thought = messages[number].get("reasoning")
        if thought and closed:
            raise RowDropped(
                "bad_rendering", f"message {number} (assistant): the prompt has already closed its thought"
            )
        opened = bool(channel) and not closed
        if opened:
            body = (f"{thought}\n" if thought else "") + markup.CHANNEL_END + body
        elif thought:
            body = markup.thought_channel(thought) + body
        return _AnswerPlace(number, prompt, body, closes=opened and not thought)

    def _prompt(self, messages: list[Message], tools: list[Any] | None) -> str:
        return self._apply(messages, tools, add_generation_prompt=True)

    def _prepare(self, messages: Any, tools: Any = None) -> list[Message]:
        """Prepares messages for the template: no control tokens, thoughts handled by the policy."""
        if not isinstance(messages, list) or not messages:
            raise RowDropped("no_messages", type(messages).__name__)
        if any(self._control.search(text) for text in markup.strings(tools)):
            raise RowDropped("control_token", "in tools")
        prepared: list[Message] = []
        for number, message in enumerate(messages):
            turn = {key: value for key, value in message.items() if key != "train"}
            if turn["role"] == "system" and str(turn.get("content")).startswith(markup.THINK):
                # The policy decides whether thinking is on.
                turn["content"] = turn["content"].removeprefix(markup.THINK).lstrip()
            if any(self._control.search(text) for text in markup.strings(turn)):
                raise RowDropped("control_token", f"message {number} ({turn['role']})")
            if turn["role"] == "assistant":
                if prepared and prepared[-1]["role"] == "assistant" and not prepared[-1].get("tool_calls"):
                    raise RowDropped("bad_order", f"message {number}")
                if not (turn.get("content") or "").strip() and not turn.get("tool_calls"):
                    raise RowDropped("empty_answer", f"message {number}")
                thought = turn.pop("reasoning", None)
                if thought and self._keep_thoughts:
                    turn["reasoning"] = turn["reasoning_content"] = thought.strip()  # templates read either key
            prepared.append(turn)
        return prepared

    def _plain_text(self, text: str) -> Rendering:
        if self._control.search(text):
            raise RowDropped("control_token", "in the text")
        if not text.strip():
            raise RowDropped("no_target", "the text is empty")
        return Rendering([], text=self._tokenizer.bos_token + text + self._tokenizer.eos_token)

    def _check_generation_prompt(self) -> None:
        """Raises `UserError` if the template's generation prompt is not Gemma 4's."""
        try:
            prompt = self._prompt([{"role": "user", "content": "x"}], None)
        except RowDropped as problem:
            raise UserError(
                f"the chat template cannot render a single question ({problem}); use the original one"
            ) from problem
        _, header, _ = _split_prompt(prompt)
        if not header:
            raise UserError(
                f"the chat template's generation prompt ends in {prompt[-60:]!r}; expected Gemma 4's "
                f"{markup.MODEL_HEADER!r}, followed by nothing or by a thought channel"
            )

    def _find_words(self, role: str) -> tuple[str, str]:
        """The text that the template itself adds (before, after) a message of this role within its turn."""
        probe = "0probe0"
        messages = [{"role": role, "content": probe}] + [{"role": "user", "content": "x"}] * (role == "system")
        try:
            before, _, behind = self._prompt(messages, None).partition(probe)
        except RowDropped:  # a template can lack such turns
            return "", ""
        return self._control.split(before)[-1].partition("\n")[2].lstrip(), self._control.split(behind)[0].rstrip()

    def _apply(self, messages: list[Message], tools: list[Any] | None, **options: Any) -> str:
        options |= {"tools": tools or None, "enable_thinking": self._keep_thoughts}
        text = apply_template(self._tokenizer, messages, **options)
        if pictures := pictures_of(messages):
            text = self._with_pictures(text, pictures)
        bos = self._tokenizer.bos_token
        self._bos_added = bos not in text
        return bos + text if self._bos_added else text

    def _with_pictures(self, text: str, pictures: list[Picture]) -> str:
        """A rendering in which each picture's placeholder is expanded to its soft tokens, as transformers' processor
        does.
        """
        if not self._shows_pictures:
            raise RowDropped("template_error", f"the tokenizer has no {markup.IMAGE} and its delimiters")
        first, *others = text.split(markup.IMAGE)
        if len(others) != len(pictures):
            raise RowDropped("bad_rendering", f"the template shows {len(others)} of {len(pictures)} pictures")
        return first + "".join(markup.picture(one.tokens) + rest for one, rest in zip(pictures, others, strict=True))


def render_prompt(tokenizer: Any, messages: list[Message], policy: str) -> list[int]:
    """Ids of the generation prompt for `messages` under the thought policy `policy` (`drop` or `train`).

    Raises:
      UserError: the conversation is malformed or the tokenizer is not a Gemma 4 tokenizer.
    """
    chat = ChatFormat(tokenizer, policy)
    return chat.encode([chat.render_prompt(messages)])[0].tolist()


def _split_prompt(prompt: str) -> tuple[str, str, str]:
    """(history, header, thought channel) of a generation prompt; header and channel may be empty."""
    channel, at = "", prompt.rfind(markup.CHANNEL)
    if at >= 0 and _CHANNEL_TAIL.fullmatch(prompt, at):
        prompt, channel = prompt[:at], prompt[at:]
    header = markup.MODEL_HEADER if prompt.endswith(markup.MODEL_HEADER) else ""
    return prompt.removesuffix(header), header, channel


def _own_space(before: str, message: Message) -> str:
    """The white space that an answer itself begins with, if the text `before` it ends in that; the rest is the
    template's.
    """
    said = message.get("content") or ""
    own = said[: len(said) - len(said.lstrip())]
    return own if before.endswith(own) else ""


def _difference(prompt: str, shown: str) -> str:
    """Describes where a rendering that includes the answer departs from the prompt it should continue."""
    at = next((i for i, (a, b) in enumerate(zip(prompt, shown, strict=False)) if a != b), min(len(prompt), len(shown)))
    return f"a server's prompt has {prompt[at : at + 30]!r} where the template then shows {shown[at : at + 30]!r}"
