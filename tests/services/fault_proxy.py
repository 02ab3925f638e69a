#!/usr/bin/env python3
"""HTTP proxy in front of an S3 server that misbehaves at random, as it is told at run time.

    python -m tests.services.fault_proxy --upstream HOST:PORT --port PORT [--seed SEED]

It prints "ready PORT CONTROL-PORT" when it listens. `FaultProxy` starts it and talks to it.

Control: one JSON line in, one JSON line out, on the control port:
  {"cmd": "stats"} | {"cmd": "set", "refuse": 1} | {"cmd": "set", "error": 0.2, "delay_ms": 30}

``set`` says all there is: what it does not name is 0. The names of `PROBABILITIES` are the parts of
the requests that meet that fault; ``delay_ms`` is what a request waits for at most; while
``refuse`` is not 0 nothing listens, and connections that there were are reset.
"""

import argparse
import asyncio
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
import json
import os
from pathlib import Path
import random
import socket
import struct
import sys
import tempfile

from .latency_proxy import Control
from .latency_proxy import kind_of
from .process import ports_free
from .process import spawn
from .process import wait_for_line
from .proxy import ControlledProxy
from .proxy import ready_line


REPOSITORY = Path(__file__).parents[2]
PROBABILITIES = (
    "error",  # answered by 500 or 503, and not passed on
    "cut_up",  # reset, when a part of the body has reached the server
    "lose_answer",  # done by the server, and reset in the place of its answer
    "cut_head",  # closed in the middle of the answer's head, which is in the order of AWS
    "cut_down",  # closed in the middle of the answer's body
    "stall",  # silent in the middle of the answer, for some seconds
    "silence",  # neither passed on nor answered
    "damage",  # one byte of an object that is read as a whole is another one
)
# Seconds of silence, longer than the time-outs that tests use.
SILENCE = 6.0
CHUNK = 1 << 16
LARGEST_HEAD = 1 << 16
ERRORS = ((503, "SlowDown"), (503, "ServiceUnavailable"), (500, "InternalError"))


class Weather:
    """What is wrong at the moment, and what was done.

    :param seed: of all choices; which request meets which of them depends on when they come.
    """

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.counts = Counter()
        self.set({})

    def set(self, values):
        """Forget what was wrong before; see above."""
        self.delay = values.get("delay_ms", 0) / 1000
        self.refuse = bool(values.get("refuse", 0))
        self._chances = {name: values.get(name, 0) for name in PROBABILITIES}

    def choose(self, request):
        """Return the name of the fault that a request meets, or None."""
        self.counts["requests"] += 1
        chance = self.random.random()
        for name, probability in self._chances.items():
            chance -= probability
            if chance < 0:
                if name == "damage" and not request.is_download:
                    return None
                self.counts[name] += 1
                return name
        return None


class Ended(Exception):
    """This connection is at its end."""


@dataclass
class Head:
    """The head of a request or an answer, as it arrived.

    :ivar str line: the first.
    :ivar dict fields: by lower-case name.
    """

    data: bytes
    line: str
    fields: dict

    @classmethod
    async def read(cls, reader):
        """Read a head, or return None at the end of the connection."""
        try:
            data = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise Ended from None
            return None
        line, *lines = data.decode("latin-1").rstrip("\r\n").split("\r\n")
        fields = {}
        for text in lines:
            name, _, value = text.partition(":")
            fields[name.strip().lower()] = value.strip()
        return cls(data, line, fields)

    @property
    def method(self):
        return self.line.split(" ")[0]

    @property
    def status(self):
        return int(self.line.split(" ")[1])

    @property
    def kind(self):
        return kind_of(self.method, self.line.split(" ")[1])

    @property
    def is_download(self):
        return self.kind == "get" and "range" not in self.fields

    @property
    def expects(self):
        return "expect" in self.fields

    @property
    def is_chunked(self):
        return "chunked" in self.fields.get("transfer-encoding", "").lower()

    @property
    def length(self):
        return int(self.fields.get("content-length") or 0)

    @property
    def closes(self):
        return self.fields.get("connection", "").lower() == "close"


async def body_of(head, reader):
    """Iterate over the pieces of a body as they stand in the stream."""
    if head.is_chunked:
        while True:
            line = await reader.readline()
            size = int(line.split(b";")[0] or b"0", 16)
            yield line + await reader.readexactly(size + 2)
            if not size:
                return
    left = head.length
    while left:
        data = await reader.read(min(left, CHUNK))
        if not data:
            raise Ended
        left -= len(data)
        yield data


def as_aws(answer):
    """Return the head of an answer with the ETag before metadata and length, as AWS sends it."""

    def place(line):
        name = line.partition(b":")[0].lower()
        return 0 if name == b"etag" else 2 if name == b"content-length" else 1

    first, *lines = answer.data.rstrip(b"\r\n").split(b"\r\n")
    return b"\r\n".join([first, *sorted(lines, key=place), b"", b""])


class Connection:
    """One client, and a connection to the server that is made when it is needed."""

    def __init__(self, weather, upstream, reader, writer):
        self._weather = weather
        self._upstream = upstream
        self._reader, self._writer = reader, writer
        self._server = None

    async def serve(self):
        """Answer all requests of the connection."""
        try:
            while (request := await Head.read(self._reader)) is not None:
                await asyncio.sleep(self._weather.delay * self._weather.random.random())
                await self._answer(request, self._weather.choose(request))
                if request.closes:
                    break
        except (Ended, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # one end is gone: so is the other now
        finally:
            self.close()

    def close(self):
        """Close both connections; closing again does nothing."""
        for writer in (self._writer, self._server and self._server[1]):
            if writer is not None:
                writer.close()

    def reset(self):
        """End the client's connection as a host that goes down does."""
        with suppress(OSError):
            connection = self._writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()
        self.close()

    async def _answer(self, request, fault):
        if fault == "error":
            await self._refuse(request)
        if fault == "silence":
            await asyncio.sleep(SILENCE)
            raise Ended
        if self._server is None:
            self._server = await asyncio.open_connection(*self._upstream, limit=LARGEST_HEAD)
        reader, writer = self._server
        writer.write(request.data)
        if fault == "cut_up" and not request.length:
            self.reset()
            raise Ended
        if request.expects:
            answer = await self._head(reader)
            if answer.status != 100:
                await self._pass_down(request, answer, reader, None)
                raise Ended
            await self._send(self._writer, answer.data)
        await self._pass_up(request, writer, fault)
        answer = await self._head(reader)
        while answer.status == 100:
            answer = await self._head(reader)
        await self._pass_down(request, answer, reader, fault)
        if answer.closes:
            raise Ended

    async def _refuse(self, request):
        """Answer that the server is busy, at once, and close the connection."""
        status, code = self._weather.random.choice(ERRORS)
        body = f"<Error><Code>{code}</Code><Message>says the proxy</Message></Error>".encode()
        if not request.expects:
            # What was not read when a connection is closed makes the answer vanish.
            async for _piece in body_of(request, self._reader):
                pass
        head = [
            f"HTTP/1.1 {status} {code}",
            "Content-Type: application/xml",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        data = "\r\n".join([*head, "", ""]).encode()
        await self._send(self._writer, data if request.method == "HEAD" else data + body)
        raise Ended

    async def _head(self, reader):
        head = await Head.read(reader)
        if head is None:
            raise Ended
        return head

    async def _send(self, writer, data):
        writer.write(data)
        await writer.drain()

    async def _pass_up(self, request, writer, fault):
        cut = self._weather.random.randrange(request.length or 1) if fault == "cut_up" else None
        async for piece in body_of(request, self._reader):
            if cut is not None:
                piece = piece[:cut]
                cut -= len(piece)
            await self._send(writer, piece)
            if cut == 0:
                self.reset()
                raise Ended
        await writer.drain()

    async def _pass_down(self, request, answer, reader, fault):
        has_body = request.method != "HEAD" and answer.status not in (204, 304)
        pieces = [piece async for piece in body_of(answer, reader)] if has_body else []
        if fault == "lose_answer":
            self.reset()
            raise Ended
        body = b"".join(pieces)
        place = self._weather.random.randrange(len(body) or 1)
        if fault == "damage" and body and answer.status == 200 and not answer.is_chunked:
            body = body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
        data, cut = answer.data + body, None
        if fault == "cut_head":
            data, cut = as_aws(answer), self._weather.random.randrange(len(answer.data))
        if fault in ("cut_down", "stall"):
            # Without a body all of it arrives.
            cut = len(answer.data) + place
        await self._send(self._writer, data[:cut])
        if fault == "stall":
            await asyncio.sleep(SILENCE)
        if cut is not None:
            raise Ended


class Proxy:
    """Listens, unless the weather is that nobody does."""

    def __init__(self, weather, upstream, port):
        self._weather = weather
        self._upstream = upstream
        self.port = port
        self._listener = None
        self._connections = set()

    async def follow(self):
        """Listen, or do not, as the weather is now."""
        if self._weather.refuse:
            if self._listener is not None:
                self._weather.counts["refuse"] += 1
                self._listener.close()
                self._listener = None
            for connection in list(self._connections):
                connection.reset()
        elif self._listener is None:
            self._listener = await asyncio.start_server(
                self._serve, "127.0.0.1", self.port, limit=LARGEST_HEAD, backlog=512
            )

    async def _serve(self, reader, writer):
        connection = Connection(self._weather, self._upstream, reader, writer)
        self._connections.add(connection)
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)


async def control(reader, writer, proxy, weather):
    """Do what one client of the control port says."""
    while line := await reader.readline():
        message = json.loads(line)
        if message["cmd"] == "set":
            weather.set(message)
            await proxy.follow()
        writer.write(json.dumps(weather.counts).encode() + b"\n")
        await writer.drain()
    writer.close()


async def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream", required=True, help="HOST:PORT")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seed", default="0")
    arguments = parser.parse_args()
    host, _, port = arguments.upstream.rpartition(":")
    weather = Weather(arguments.seed)
    proxy = Proxy(weather, (host, int(port)), arguments.port)
    await proxy.follow()
    answer = partial(control, proxy=proxy, weather=weather)
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    sys.stdout.write(f"ready {proxy.port} {server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


# In whoever started it


class FaultProxy(ControlledProxy):
    """A running proxy in front of an http endpoint.

    :param str upstream: URL of the server.
    :param seed: of its choices.
    """

    def __init__(self, upstream, seed=0):
        port = _free_port()
        options = ["--upstream", upstream.rpartition("/")[2], "--port", port, "--seed", seed]
        program = [sys.executable, "-m", __name__, *map(str, options)]
        with tempfile.NamedTemporaryFile("w", suffix=".log") as log:
            self._process = spawn(program, cwd=REPOSITORY, stdout=log, stderr=log)
            _, _, control_port = wait_for_line(self._process, log.name, ready_line)
        self.endpoint_url = f"http://127.0.0.1:{port}"
        self._control = Control(int(control_port))

    def set(self, **values):
        """Say what is wrong from now on; nothing, without arguments."""
        self._control.set(**values)

    def counts(self):
        """Return how many requests came, and met which fault, a dict."""
        return self._control.stats()


def _free_port():
    """Return a port that is free, and that the kernel does not give to others meanwhile."""
    while True:
        port = random.Random(os.urandom(8)).randrange(20000, 30000)
        if ports_free(port):
            return port


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
