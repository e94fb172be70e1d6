"""A server of completions that answers by the clock, in a process of its own; keeps what it did and when.

`python scripted_server.py '{"first_seconds": 0.05, …}'` prints its port, then one JSON line for each answer: when the
request was there, and when each chunk went out (`time.perf_counter`, the same clock in every process of a machine).
"""

import asyncio
import heapq
import json
import sys
import time

SCRIPT = {
    "first_seconds": 0.0,  # from the request to the first chunk
    "chunk_seconds": 0.0,  # from one chunk to the next
    "tokens_per_chunk": 1,
    "usage": True,
    "counted": None,  # tokens of each answer by its usage; None: as many as there are
    "max_model_len": None,  # told by /v1/models
    "refuse_over": None,  # 400 for a longer prompt
    "fail_every": None,  # every n-th answer of a cell breaks off
    "cached": None,  # share of prompt tokens that /metrics says were in the prefix cache; None: there is no /metrics
    "die_at": None,  # the server dies of this request
    "short": 0,  # tokens that each answer lacks
    "slots": None,  # answers at a time, the others wait: slots / (seconds of an answer) per second, by the clock
    **json.loads(sys.argv[1]),
}
asked = {"requests": 0, "prompt_tokens": 0}
free_at = [0.0] * (SCRIPT["slots"] or 0)  # each slot


async def serve(reader, writer):
    try:
        while line := await reader.readline():
            length = 0
            while (header := await reader.readline()) not in (b"\r\n", b""):
                if header.lower().startswith(b"content-length:"):
                    length = int(header.split(b":")[1])
            path, body = line.split()[1].decode(), await reader.readexactly(length)
            if path == "/tokenize":
                whole(writer, 200, json.dumps({"tokens": [ord(letter) for letter in json.loads(body)["prompt"]]}))
            elif path == "/v1/completions":
                await complete(writer, json.loads(body), time.perf_counter())
            else:
                tell(writer, path)
            await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


def tell(writer, path):
    if path == "/v1/models":
        return whole(writer, 200, json.dumps({"data": [{"id": "played", "max_model_len": SCRIPT["max_model_len"]}]}))
    if path == "/metrics" and SCRIPT["cached"] is not None:
        hits = asked["prompt_tokens"] * SCRIPT["cached"]
        text = f'vllm:prefix_cache_queries_total{{engine="0"}} {asked["prompt_tokens"]:.1f}\n'
        return whole(writer, 200, f'# TYPE x counter\n{text}vllm:prefix_cache_hits_total{{engine="0"}} {hits:.1f}\n')
    whole(writer, 404, "no such page")


def whole(writer, status, text):
    writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode())


async def complete(writer, asked_for, came):
    prompt, tokens = asked_for["prompt"], asked_for["max_tokens"] - SCRIPT["short"]
    asked["requests"] += 1
    asked["prompt_tokens"] += len(prompt)
    if asked["requests"] == SCRIPT["die_at"]:
        sys.exit()
    if SCRIPT["refuse_over"] and len(prompt) > SCRIPT["refuse_over"]:
        return whole(writer, 400, '{"error": "This model\'s maximum context length is 64 tokens"}')
    broken = SCRIPT["fail_every"] and asked["requests"] % SCRIPT["fail_every"] == 0
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    sent, begun = [], turn(came, -(-tokens // SCRIPT["tokens_per_chunk"]))
    for number in range(0, tokens, SCRIPT["tokens_per_chunk"]):
        due = begun + SCRIPT["first_seconds"] + SCRIPT["chunk_seconds"] * len(sent)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        last = number + SCRIPT["tokens_per_chunk"] >= tokens
        event(writer, {"choices": [{"text": " x", "finish_reason": "length" if last else None}]})
        sent.append(time.perf_counter())
        if broken:
            return writer.close()
    # before the end of the answer: a test that has it reads this
    print(json.dumps({"came": came, "sent": sent, "asked": asked_for}), flush=True)
    if SCRIPT["usage"]:
        counted = tokens if SCRIPT["counted"] is None else SCRIPT["counted"]
        event(writer, {"choices": [], "usage": {"prompt_tokens": len(prompt), "completion_tokens": counted}})
    event(writer, "[DONE]")
    writer.write(b"0\r\n\r\n")


def turn(came, chunks):
    """When a request's turn begins. By the script, not by when a busy machine woke up: the capacity is exact."""
    if not free_at:
        return came
    begun = max(came, free_at[0])
    heapq.heapreplace(free_at, begun + SCRIPT["first_seconds"] + SCRIPT["chunk_seconds"] * (chunks - 1))
    return begun


def event(writer, data):
    text = f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()
    writer.write(f"{len(text):x}\r\n".encode() + text + b"\r\n")


async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
