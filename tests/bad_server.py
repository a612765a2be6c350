"""A chat server that misbehaves as told: a real one, on 127.0.0.1, in a thread of its own.

    with BadServer([status(500), say("3")]) as server:    # the second reply is given again and again
        ... server.url, server.bodies, server.peak

A reply is an async function of the connection's two ends; it may write anything and close whenever it likes.
"""

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

Reply = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Script = Callable[[dict[str, Any]], Reply]

USAGE = {"prompt_tokens": 900, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 640}}


def raw(data: bytes) -> Reply:
    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return reply


def respond(status: int, body: bytes, content_type: str = "application/json", **headers: str) -> Reply:
    lines = {"Content-Type": content_type, "Content-Length": str(len(body))}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return raw(f"HTTP/1.1 {status} Whatever\r\n{head}\r\n".encode() + body)


def status(code: int, message: str = "", **headers: str) -> Reply:
    return respond(code, json.dumps({"error": {"message": message}}, ensure_ascii=False).encode(), **headers)


def answer(content: object) -> Reply:
    return respond(200, json.dumps(content, ensure_ascii=False).encode())


def completion(*choices: object, **fields: object) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": "chat.completion", "choices": list(choices), "usage": USAGE, **fields}


def choice(text: str | None, finish_reason: str = "stop", **message: object) -> dict[str, Any]:
    spoken = {"role": "assistant", "content": text, **message}
    return {"index": 0, "message": spoken, "finish_reason": finish_reason}


def say(*texts: str | None) -> Reply:
    return answer(completion(*(choice(text) for text in texts)))


def half_a_json() -> Reply:
    """Announces more than it sends, and closes."""
    body = json.dumps(completion(choice("5"))).encode()

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[: len(body) // 2])
        writer.close()

    return reply


def close_at_once() -> Reply:
    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    return reply


def reset() -> Reply:
    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Without lingering, the kernel sends RST instead of an orderly end.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()

    return reply


def hang() -> Reply:
    """Says nothing until the client hangs up."""

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)

    return reply


def drip(seconds: float) -> Reply:
    """A whole and good answer of which one byte comes every `seconds`."""
    body = json.dumps(completion(choice("5"))).encode()

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        for byte in body:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(seconds)

    return reply


def after(gate: threading.Event | float, then: Reply) -> Reply:
    """`then`, but not before the gate opens, or so many seconds have passed."""

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if isinstance(gate, float):
            await asyncio.sleep(gate)
        else:
            while not gate.is_set():
                await asyncio.sleep(0.005)
        await then(reader, writer)

    return reply


class BadServer:
    """Answers chat completions as scripted, and counts.

    Attributes:
        bodies, headers, times: of each chat completion asked for, in the order in which they came.
        in_flight, peak: requests being answered now, and the most there ever were.
    """

    def __init__(self, script: Script | Sequence[Reply], models: Reply | Sequence[str] = ("judge",)) -> None:
        """
        Args:
            script: the reply to a request's JSON; or replies in order, of which the last is given for ever.
            models: the names that /v1/models lists, or the reply to it.
        """
        self.script = script
        self.models = models if callable(models) else answer({"data": [{"id": name} for name in models]})
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.in_flight = self.peak = self.port = 0
        self.writers: set[asyncio.StreamWriter] = set()

    def __enter__(self) -> "BadServer":
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.come_back()
        return self

    def __exit__(self, *exception: object) -> None:
        self._run(self._end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def die(self) -> None:
        """Close the port and every connection."""
        self._run(self._die())

    def come_back(self) -> None:
        """Listen, on the same port as before."""
        self._run(self._listen())

    def _run(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    async def _listen(self) -> None:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def _die(self) -> None:
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()

    async def _end(self) -> None:
        await self._die()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            while not writer.is_closing():
                await self._serve_one(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has hung up, or the test is over
        finally:
            self.writers.discard(writer)
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        request_line, *lines = head.rstrip("\r\n").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        path = request_line.split(" ")[1]
        if path.endswith("/v1/models"):
            reply = self.models
        elif path.endswith("/v1/chat/completions"):
            reply = self._chat(headers, json.loads(content))
        else:
            reply = status(404, f"no {path} here")
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            await reply(reader, writer)
        finally:
            self.in_flight -= 1
        await writer.drain()

    def _chat(self, headers: dict[str, str], body: dict[str, Any]) -> Reply:
        number = len(self.bodies)
        self.bodies.append(body)
        self.headers.append(headers)
        self.times.append(time.monotonic())
        if callable(self.script):
            return self.script(body)
        return self.script[min(number, len(self.script) - 1)]
