"""OpenAI's completions as the embedded server sends them: answers as JSON, whole or in pieces."""

from __future__ import annotations

import json
import re
import time
import uuid
from functools import cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from gemma4_tpu.serving.local_sampling import STOP, AnswerPiece, TokenLogprob

LEAST_LOGPROB = -9999.0
"""Stands for probability 0, whose logarithm JSON cannot express; as in vLLM."""
_HALF = "\ufffd"  # what a tokenizer decodes half of a character to
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Reply:
    """Formats the answers to one request."""

    def __init__(self, model: str, prompt_tokens: int, tokenizer: Any, *, is_chat: bool, as_ids: bool):
        self._is_chat, self._as_ids = is_chat, as_ids
        self._names = TokenNames(tokenizer)
        identifier = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": identifier, "created": int(time.time()), "model": model}
        self._prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self._calls: dict[int, int] = {}  # number of calls so far, per choice

    def usage(self) -> dict[str, int]:
        """Tokens so far, as OpenAI counts them."""
        total = self._prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self._prompt_tokens, "completion_tokens": self.completion_tokens, "total_tokens": total,
        }  # fmt: skip

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One event of a stream."""
        name = "chat.completion.chunk" if self._is_chat else "text_completion"
        return {**self._head, "object": name, "choices": choices, **more}

    def delta(self, index: int, piece: AnswerPiece, *, first: bool) -> dict[str, Any]:
        """A piece of one choice, in a stream. A call is sent whole, in one piece."""
        content: dict[str, Any] = {"text": piece.text}
        if self._is_chat:
            begun = self._calls.get(index, 0)
            calls = [{"index": begun + place, **call} for place, call in enumerate(self._made(index, piece))]
            delta = {
                **({"role": "assistant"} if first else {}),
                **({"reasoning": piece.reasoning} if piece.reasoning else {}),
                "content": piece.text, **({"tool_calls": calls} if calls else {}),
            }  # fmt: skip
            content = {"delta": delta}
        return {
            "index": index,
            **content,
            "logprobs": self._logprobs([piece]),
            "finish_reason": self._why(index, piece),
        }

    def whole(self, pieces: list[list[AnswerPiece]]) -> dict[str, Any]:
        """The non-streamed answer; `pieces`: those of each choice."""
        choices = []
        for index, parts in enumerate(pieces):
            text = "".join(piece.text for piece in parts)
            content: dict[str, Any] = {"text": text}
            if self._is_chat:
                thought = "".join(piece.reasoning for piece in parts)
                calls = [call for piece in parts for call in self._made(index, piece)]
                content = {
                    "message": {
                        "role": "assistant", "content": text if text or not calls else None,
                        **({"reasoning": thought} if thought else {}), **({"tool_calls": calls} if calls else {}),
                    }
                }  # fmt: skip
            finish = self._why(index, parts[-1])
            choices.append({"index": index, **content, "logprobs": self._logprobs(parts), "finish_reason": finish})
        name = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head, "object": name, "choices": choices, "usage": self.usage()}

    def _made(self, index: int, piece: AnswerPiece) -> list[dict[str, Any]]:
        """The calls in a piece of the choice `index`."""
        self._calls[index] = self._calls.get(index, 0) + len(piece.calls)
        return [
            {
                "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
            }
            for call in piece.calls
        ]  # fmt: skip

    def _why(self, index: int, piece: AnswerPiece) -> str | None:
        return "tool_calls" if piece.finish == STOP and self._calls.get(index) else piece.finish

    def _logprobs(self, pieces: list[AnswerPiece]) -> dict[str, Any] | None:
        found = [chance for piece in pieces for chance in piece.logprobs]
        if not found:
            return None
        if self._is_chat:
            return {"content": [self._for_chat(one) for one in found], "refusal": None}
        return {
            "tokens": [self._name(one.token) for one in found],
            "token_logprobs": [_told(one.logprob) for one in found],
            "top_logprobs": [self._top(one) for one in found],
            "text_offset": [one.offset for one in found],
        }

    def _top(self, one: TokenLogprob) -> dict[str, float] | None:
        """The most likely tokens and the actual one, as in OpenAI; nothing for the first token of a text."""
        if one.logprob is None:
            return None
        return {self._name(token): max(value, LEAST_LOGPROB) for token, value in (*one.top, (one.token, one.logprob))}

    def _for_chat(self, one: TokenLogprob) -> dict[str, Any]:
        own, *top = [
            {"token": self._name(token), "logprob": _told(value), "bytes": list(self._names.bytes(token))}
            for token, value in ((one.token, one.logprob), *one.top)
        ]
        return {**own, "top_logprobs": top}

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._as_ids else self._names.name(token)


class TokenNames:
    """Tokens in OpenAI's notation."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def name(self, token: int) -> str:
        """Its text, or its bytes if that is half of a character, so that no two tokens share a name."""
        text = self._tokenizer.decode([token])
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes(token)) if _HALF in text else text

    def bytes(self, token: int) -> bytes:
        """Of its text, in UTF-8."""
        text = self._tokenizer.decode([token])
        if _HALF not in text:
            return text.encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if byte := _BYTE.fullmatch(piece):  # as in Gemma's tokenizer
            return bytes([int(byte[1], 16)])
        known = _bytes_of_characters()
        return bytes(known[character] for character in piece) if all(c in known for c in piece) else text.encode()


@cache
def _bytes_of_characters() -> dict[str, int]:
    """The notation of byte-level tokenizers, among them those of the tiny models."""
    return {character: byte for byte, character in bytes_to_unicode().items()}


def _told(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)
