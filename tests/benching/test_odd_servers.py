"""Streams as other servers write them: what is an answer, what a failure, and why; nothing ends a benchmark."""

import asyncio
import json

import pytest

from gemma4_tpu.benching.client import (
    Target,
    TimedAnswer,
    ask,
    find_target,
    prefix_cache_growth,
    prefix_cache_tokens,
    session,
)
from gemma4_tpu.errors import UserError
from tests.benching.conftest import cell

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


def event(**content):
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def token(finish=None):
    return event(choices=[{"text": "é漢", "finish_reason": finish}])


def counted(tokens):
    return event(choices=[], usage={"completion_tokens": tokens})


END = token("length")


def answered(pieces, kind="text/event-stream", *, use, wait=0.0, patience=60.0):
    """What `use(client, endpoint)` returns where every request is answered by these pieces."""

    async def serve(reader, writer):
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"content-length: " in head.lower():
                await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n".encode())
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(wait)
        except ConnectionError:  # the client has left
            pass
        finally:
            writer.close()

    async def run():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server, session(patience) as client:
            return await use(client, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")

    return asyncio.run(run())


def answer_to(pieces, kind="text/event-stream", **more):
    async def use(client, endpoint):
        answer = TimedAnswer(prompt_tokens=1, due_at=0.0)
        await ask(client, Target(endpoint, "m", None), b"{}", answer)
        return answer

    return answered(pieces, kind, use=use, **more)


@pytest.mark.parametrize(
    ("stream", "tokens"),
    [
        (token() + END + counted(5) + DONE, 5),
        ((token() + END + counted(5) + DONE).replace(b"\n", b"\r\n"), 5),
        (PING + token() + PING + END + PING + counted(5) + DONE, 5),
        (b"data:\n\n" + token() + b"data: \n\n" + END + counted(5) + DONE, 5),
        (event(type="metadata") + token() + END + counted(5) + DONE, 5),
        (token() + END + counted(5), 5),
        (token() + token() + counted(5) + DONE, 5),
        (token() + token("eos_token") + counted(5) + DONE, 5),
        (token() + END + counted(5.0) + DONE, 5),
        (token() + END + DONE, None),
        (token() + END + event(choices=[], usage=None) + DONE, None),
        (token() + END + counted(None) + DONE, None),
        (token() + END + event(choices=[], usage={"total_tokens": 6}) + DONE, None),
    ],
)
def test_answers(stream, tokens):
    """`tokens`: as the server counts them; None: it doesn't."""
    for pieces in ([stream], [stream[place : place + 1] for place in range(len(stream))]):
        answer = answer_to(pieces)
        assert answer.error is None and answer.chunks == 2
        assert (answer.counted, answer.output_tokens) == (tokens is not None, tokens or 2)


@pytest.mark.parametrize(
    ("stream", "told"),
    [
        (token() + event(error={"message": "no memory"}) + DONE, "no memory"),
        (token() + b"event: error\n" + event(message="no memory") + DONE, "broke off after 1 chunks; the server says"),
        (token() + event(object="error", message="no memory") + DONE, "no memory"),
        (event(object="error", message="no memory") + DONE, 'no token; the server says {"object": "error"'),
        (token() + token("abort") + DONE, "ended with finish_reason abort after 2 chunks"),
        (token() + token(), "broke off after 2 chunks"),
        (token() + END + counted(-1) + DONE, "usage.completion_tokens=-1 is not a number of tokens"),
        (token() + END + counted("5") + DONE, "usage.completion_tokens='5' is not"),
        (token() + END + counted(10**400) + DONE, "usage.completion_tokens=1000"),
        (token() + END + counted(True) + DONE, "usage.completion_tokens=True is not"),
        (token() + END + event(choices=[], usage=[1]) + DONE, "not a chunk of a completion: "),
        (token() + event(choices={"text": "x"}) + DONE, "not a chunk of a completion: "),
        (token() + event(choices=["x"]) + DONE, "not a chunk of a completion: "),
        (token() + b"data: 5\n\n" + DONE, "not a chunk of a completion: 5"),
        (token() + b"data: " + b"[" * 100_000 + b"\n\n" + DONE, "not a chunk of a completion: [["),
        (token() + b'data: {"choices\n\n', "not a chunk of a completion: "),
    ],
)
def test_failures(stream, told):
    assert told in answer_to([stream]).error


def test_an_answer_that_is_no_stream():
    answer = answer_to([b'{"choices": [{"text": "x", "finish_reason": "length"}]}'], "application/json")
    assert answer.error == "the answer contains no events; its content-type is application/json"


def test_a_server_that_only_keeps_its_connection_alive():
    answer = answer_to([PING] * 10_000, wait=0.02, patience=0.3)
    assert answer.error == "no chunk within 0.3 s (bench.request_timeout_seconds)"


@pytest.mark.parametrize(
    ("listed", "longest"), [(64, 64), (None, None), ("64", None), (0, None), (64.0, None)]
)  # fmt: skip
def test_the_longest_sequence_if_the_server_says_it(listed, longest):
    models = json.dumps({"data": [{"id": "m", "max_model_len": listed}]}).encode()
    found = answered([models], "application/json", use=lambda client, endpoint: find_target(endpoint, None))
    assert (found.model, found.max_model_len) == ("m", longest)


@pytest.mark.parametrize(
    "models",
    [
        b"{}",
        b"<html>",
        b'{"data": [{"id": 7}, {"id": "m"}]}',
        b'{"data": ["m"]}',
        b'{"data": [{"id": "\xff"}]}',
        b"[" * 100_000,
    ],
)
def test_a_server_that_lists_no_models(models):
    with pytest.raises(UserError, match="lists no models"):
        answered([models], use=lambda client, endpoint: find_target(endpoint, None))


@pytest.mark.parametrize(
    ("page", "found"),
    [
        (b'vllm:prefix_cache_hits_total 3\nvllm:prefix_cache_queries_total{a="b"} 1.2e+1\n', (3, 12)),
        (b"vllm:prefix_cache_hits_total 3\nvllm:prefix_cache_queries_total 12 1700000000000\n# \xe9\xff", (3, 12)),
        (b"vllm:prefix_cache_hits_total --\nvllm:prefix_cache_queries_total 1e\n", None),
        (b"<html>", None),
    ],
)
def test_prefix_cache_counters(page, found):
    assert answered([page], "text/plain", use=prefix_cache_tokens) == found


@pytest.mark.parametrize(
    ("before", "after", "grown"),
    [
        ((3, 12), (5, 20), (2, 8)),
        ((3, 12), (3, 12), (0, 0)),
        (None, (5, 20), (None, None)),
        ((3, 12), None, (None, None)),
        ((300, 1200), (5, 20), (None, None)),  # another server, or a new one
        ((3, 1200), (300, 1201), (None, None)),
    ],
)
def test_what_a_cell_adds_to_them(before, after, grown):
    assert prefix_cache_growth(before, after) == grown


def test_answers_without_tokens_are_reported(played, bench):
    server = played(counted=0)
    code, folder, out, _ = bench(server, "bench.lengths=[[16,4]]", "bench.rates=[inf]", "bench.requests=3")
    found = cell(folder, "in16_out4_rateinf")
    assert (code, found["output_throughput"], found["chunks_per_token"]) == (0, 0, None)
    assert "3 answers shorter than requested" in out


def test_a_warm_up_that_fails_is_told(played, bench):
    server = played(fail_every=1)
    _, _, _, err = bench(
        server, "bench.lengths=[[16,4]]", "bench.rates=[inf]", "bench.requests=3", "bench.warmup_requests=2"
    )
    assert "2 of 2 warm-up requests failed: " in err
