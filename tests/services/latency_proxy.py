#!/usr/bin/env python3
"""TCP proxy that adds latency and a bandwidth cap, and counts HTTP requests.

Two models of latency, both in the client-to-server direction only, so that a
request pays the delay exactly once and the answer flows back undelayed:

  --request-delay-ms D  D is charged once per HTTP request, at its header (the
                        time to first byte of an object store seen from the
                        same region; a body sent after "100 Continue" pays
                        nothing more).
  --delay-ms D          D is charged to every byte (a long wire): a request
                        with "Expect: 100-continue" then pays 2 x D.

--connect-delay-ms D delays the first bytes of a new connection by D more.
--up-mbps / --down-mbps cap the rate (megabytes per second, all connections
together), as a link does: chunks queue behind each other.

The delay is a pipeline, not a stop-and-wait: chunks carry a due time, so the
throughput of a large body is not reduced by the delay.

It prints "ready PORT CONTROL-PORT" when it listens.

Control: one JSON line in, one JSON line out, on --control-port:
  {"cmd": "stats"} | {"cmd": "reset"} | {"cmd": "set", "request_delay_ms": 25}
"""

import argparse
import asyncio
import collections
import json
import socket


class Link:
    """A shared wire: hands out the time at which a chunk has passed."""

    def __init__(self):
        self.rate = 0.0  # bytes per second, 0 = unlimited
        self.free_at = 0.0

    def passed(self, now, size):
        if not self.rate:
            return now
        start = self.free_at if self.free_at > now else now
        self.free_at = start + size / self.rate
        return self.free_at


class Settings:
    names = ("request_delay_ms", "delay_ms", "connect_delay_ms", "up_mbps", "down_mbps")

    def __init__(self, args):
        self.up = Link()
        self.down = Link()
        self.apply({n: getattr(args, n) for n in self.names})

    def apply(self, values):
        for name in self.names:
            if name in values:
                setattr(self, name, float(values[name]))
        self.up.rate = self.up_mbps * 1e6
        self.down.rate = self.down_mbps * 1e6
        self.up.free_at = self.down.free_at = 0.0


class Stats:
    def __init__(self):
        self.open_now = 0
        self.reset()

    def reset(self):
        self.requests = 0
        self.methods = collections.Counter()
        self.kinds = collections.Counter()
        self.expect = 0
        self.bytes_up = self.bytes_down = 0
        self.connections = 0
        self.open_max = self.open_now
        self.log = collections.deque(maxlen=2000)

    def as_dict(self, log=False):
        d = {
            "requests": self.requests,
            "methods": dict(self.methods),
            "kinds": dict(self.kinds),
            "expect_continue": self.expect,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "connections": self.connections,
            "open_now": self.open_now,
            "open_max": self.open_max,
        }
        if log:
            d["log"] = list(self.log)
        return d


def kind_of(method, target):
    """A coarse name for an S3 request, enough to tell the calls apart."""
    path, _, query = target.partition("?")
    has_key = path.strip("/").count("/") >= 1
    names = {part.split("=")[0] for part in query.split("&")}
    if method == "GET":
        return (
            "get"
            if has_key
            else ("list" if names & {"list-type", "prefix", "versions"} else "bucket-get")
        )
    if method == "POST":
        if "delete" in names:
            return "multi-delete"
        return "mp-create" if "uploads" in names else "mp-complete"
    if method == "PUT" and "partNumber" in names:
        return "mp-part"
    return method.lower()


class RequestParser:
    """Finds the beginnings of HTTP/1.1 requests in a byte stream."""

    def __init__(self, stats):
        self.stats = stats
        self.buffer = b""
        self.body_left = 0
        self.chunked = False
        self.line_mode = True

    def feed(self, data):
        """True if a new request header begins in this data."""
        begins = False
        view = data
        while view:
            if self.body_left:
                used = min(self.body_left, len(view))
                self.body_left -= used
                view = view[used:]
                continue
            if self.chunked:
                view = self._chunk_line(view)
                continue
            if not self.buffer:
                begins = True
            self.buffer += view
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                break
            head, view = self.buffer[:end], self.buffer[end + 4 :]
            self.buffer = b""
            self._header(head)
        return begins

    def _chunk_line(self, view):
        self.buffer += view
        end = self.buffer.find(b"\r\n")
        if end < 0:
            return b""
        line, rest = self.buffer[:end], self.buffer[end + 2 :]
        self.buffer = b""
        if self.trailer:
            if not line:
                self.chunked = self.trailer = False
            return rest
        size = int(line.split(b";")[0] or b"0", 16)
        if size == 0:
            self.trailer = True
        else:
            self.body_left = size + 2
        return rest

    def _header(self, head):
        lines = head.decode("latin-1").split("\r\n")
        method, target, _ = lines[0].split(" ", 2)
        s = self.stats
        s.requests += 1
        s.methods[method] += 1
        s.kinds[kind_of(method, target)] += 1
        s.log.append(f"{method} {target}")
        for line in lines[1:]:
            name, _, value = line.partition(":")
            name = name.lower()
            if name == "content-length":
                self.body_left = int(value)
            elif name == "transfer-encoding" and "chunked" in value.lower():
                self.chunked, self.trailer = True, False
            elif name == "expect":
                s.expect += 1


class Pipe:
    """One direction of one connection: a queue of (due, data)."""

    def __init__(self, loop, link):
        self.loop = loop
        self.link = link
        self.queue = collections.deque()
        self.size = 0
        self.source = None  # transport read from
        self.sink = None  # transport written to
        self.blocked = False  # the sink's buffer is full
        self.paused = False
        self.timer = None
        self.last_due = 0.0
        self.eof = False

    @property
    def limit(self):
        return 1 << 20 if self.link.rate else 64 << 20

    def push(self, data, delay):
        now = self.loop.time()
        due = self.link.passed(now, len(data)) + delay
        if due < self.last_due:
            due = self.last_due
        self.last_due = due
        self.queue.append((due, data))
        self.size += len(data)
        if self.size > self.limit and not self.paused:
            self.paused = True
            self.source.pause_reading()
        if self.timer is None:
            self.flush()

    def finish(self):
        self.eof = True
        if self.timer is None:
            self.flush()

    def flush(self):
        self.timer = None
        if self.sink is None or self.blocked:
            return
        now = self.loop.time()
        while self.queue and not self.blocked:
            due, data = self.queue[0]
            if due > now + 0.0002:
                self.timer = self.loop.call_at(due, self.flush)
                break
            self.queue.popleft()
            self.size -= len(data)
            self.sink.write(data)
        if self.paused and self.size < self.limit // 2:
            self.paused = False
            if not self.source.is_closing():
                self.source.resume_reading()
        if self.eof and not self.queue and not self.sink.is_closing():
            self.sink.close()


def nodelay(transport):
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Server(asyncio.Protocol):
    """The side that faces the server."""

    def __init__(self, client):
        self.client = client

    def connection_made(self, transport):
        nodelay(transport)
        c = self.client
        c.up.sink = transport
        c.down.source = transport
        if c.up.timer is None:
            c.up.flush()

    def data_received(self, data):
        c = self.client
        c.stats.bytes_down += len(data)
        c.down.push(data, 0.0)

    def connection_lost(self, exc):
        self.client.down.finish()

    def pause_writing(self):
        self.client.up.blocked = True

    def resume_writing(self):
        self.client.up.blocked = False
        if self.client.up.timer is None:
            self.client.up.flush()


class Client(asyncio.Protocol):
    """The side that faces the client."""

    def __init__(self, loop, settings, stats, upstream):
        self.loop, self.settings, self.stats = loop, settings, stats
        self.upstream = upstream
        self.parser = RequestParser(stats)
        self.up = Pipe(loop, settings.up)
        self.down = Pipe(loop, settings.down)
        self.fresh = True

    def connection_made(self, transport):
        nodelay(transport)
        self.transport = transport
        self.up.source = transport
        self.down.sink = transport
        s = self.stats
        s.connections += 1
        s.open_now += 1
        s.open_max = max(s.open_max, s.open_now)
        self.task = self.loop.create_task(self.connect())

    async def connect(self):
        try:
            await self.loop.create_connection(lambda: Server(self), *self.upstream)
        except OSError:
            self.transport.close()

    def data_received(self, data):
        self.stats.bytes_up += len(data)
        st = self.settings
        delay = st.delay_ms
        if self.parser.feed(data):
            delay += st.request_delay_ms
        if self.fresh:
            self.fresh = False
            delay += st.connect_delay_ms
        self.up.push(data, delay / 1000.0)

    def connection_lost(self, exc):
        self.stats.open_now -= 1
        self.up.finish()

    def pause_writing(self):
        self.down.blocked = True

    def resume_writing(self):
        self.down.blocked = False
        if self.down.timer is None:
            self.down.flush()


async def control(reader, writer, settings, stats):
    while line := await reader.readline():
        msg = json.loads(line)
        if msg["cmd"] == "reset":
            stats.reset()
        elif msg["cmd"] == "set":
            settings.apply(msg)
        out = stats.as_dict(log=msg.get("log", False))
        writer.write(json.dumps(out).encode() + b"\n")
        await writer.drain()
    writer.close()


async def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--listen", type=int, default=0, help="port, 0 = any")
    ap.add_argument("--control-port", type=int, default=0, help="port, 0 = any")
    ap.add_argument("--upstream", required=True, help="HOST:PORT")
    for name in Settings.names:
        ap.add_argument("--" + name.replace("_", "-"), type=float, default=0)
    args = ap.parse_args()
    host, _, port = args.upstream.rpartition(":")
    settings, stats = Settings(args), Stats()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Client(loop, settings, stats, (host, int(port))),
        "127.0.0.1",
        args.listen,
        backlog=512,
    )
    ctl = await asyncio.start_server(
        lambda r, w: control(r, w, settings, stats), "127.0.0.1", args.control_port
    )
    ports = [s.sockets[0].getsockname()[1] for s in (server, ctl)]
    print("ready", *ports, flush=True)
    async with server, ctl:
        await server.serve_forever()


class Control:
    """A client of the control port (used by the benchmarks)."""

    def __init__(self, port):
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.sock.makefile("rwb")

    def _ask(self, **msg):
        self.file.write(json.dumps(msg).encode() + b"\n")
        self.file.flush()
        return json.loads(self.file.readline())

    def stats(self, log=False):
        return self._ask(cmd="stats", log=log)

    def reset(self):
        return self._ask(cmd="reset")

    def set(self, **values):
        values = {**dict.fromkeys(Settings.names, 0), **values}
        return self._ask(cmd="set", **values)

    def close(self):
        self.file.close()
        self.sock.close()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        pass
