"""Requests to the embedded server's application in this process, good and bad ones."""

import asyncio
import json
import time

import httpx

from gemma4_tpu.serving.local_api import Api
from gemma4_tpu.serving.local_engine import LOADING, READY
from gemma4_tpu.serving.local_metrics import Metrics

LONGEST = 64
ASK = {"model": "m", "prompt": "module a", "max_tokens": 3}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
SPIN = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def started(engine):
    engine.start()
    while engine.state == LOADING:
        time.sleep(0.01)
    assert engine.state == READY, engine.error
    return engine


def application(engine, longest=LONGEST):
    return httpx.ASGITransport(Api(engine, Metrics("m"), "m", longest, key=None).app())


def send(engine, requests, at_once=1):
    """Sends requests, so many at a time. An error of the application's own is one of the test."""

    async def run():
        turn = asyncio.Semaphore(at_once)
        async with httpx.AsyncClient(transport=application(engine), base_url="http://local") as client:

            async def one(request):
                async with turn:
                    return await client.request(request.pop("method", "POST"), **request)

            return await asyncio.gather(*(one(dict(request)) for request in requests))

    return asyncio.run(run())


def completions(body, **more):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return {"url": "/v1/completions", "content": content, "headers": {"content-type": "application/json"}} | more


def chat(body, **more):
    return completions(body, **more) | {"url": "/v1/chat/completions"}


def tool(**parameters):
    return {"type": "function", "function": {"name": "f", "description": "d", "parameters": parameters}}


def called(name, arguments):
    made = [{"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "content": None, "tool_calls": made}


def schema(content):
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": content}}
