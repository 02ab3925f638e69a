"""ZEO: the real ``runzeo``, with the storages that a test wants it to serve."""

from dataclasses import dataclass
from itertools import count
from pathlib import Path
import random

from .process import end
from .process import find_program
from .process import ports_free
from .process import ServiceMissing
from .process import spawn
from .process import wait_for_line


# Storages of one server. Each has six files open at most, and 1024 are allowed by default.
SHARE = 50


class ZeoServer:
    """Serve storages on a port of the loopback interface.

    ``start`` after ``stop`` or ``kill`` serves the same storages on the same port. Start it in a
    thread that lives on, since the server ends with that thread.

    :param directory: of its configuration and log; relative paths of the storages begin there
    :param str storages: their ZConfig sections, each with the name that clients ask for
    :param imports: the ZConfig components that define these sections
    :param options: keys of the section ``<zeo>``, with "_" for "-"
    """

    def __init__(self, directory, storages, imports=(), **options):
        self.directory = Path(directory)
        self.port = 0
        self.process = None
        self._storages = storages
        self._imports = imports
        self._options = options

    @property
    def address(self):
        """Host and port, known once the server has been started."""
        return f"127.0.0.1:{self.port}"

    @property
    def log(self):
        """The path of what the server said since its last start."""
        return self.directory / "zeo.log"

    def start(self):
        """Start the server and wait until it listens, 0.2 seconds and more with many storages.

        :raises ServiceMissing: ZEO is not installed
        :raises ServiceFailed: it did not start
        """
        program = find_runzeo()
        self.directory.mkdir(exist_ok=True)
        # It logs the port that it was given, so that this cannot be 0.
        self.port = self.port or _free_port()
        configuration = self.directory / "zeo.conf"
        configuration.write_text(self._configuration())
        with open(self.log, "w") as output:
            self.process = spawn(
                [program, "-C", configuration], cwd=self.directory, stdout=output, stderr=output
            )
        wait_for_line(self.process, self.log, lambda line: "listening on" in line)

    def _configuration(self):
        lines = [f"%import {name}" for name in self._imports]
        lines += ["<zeo>", f"address {self.address}"]
        lines += [f"{key.replace('_', '-')} {value}" for key, value in self._options.items()]
        return "\n".join([*lines, "</zeo>", self._storages])

    def stop(self):
        """End the server, which closes its storages; stopping again does nothing."""
        if self.process is not None:
            end(self.process)
            self.process = None

    def kill(self):
        """End the server at once, whatever it is doing; killing again does nothing."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc_info):
        self.stop()


@dataclass(frozen=True)
class ZeoStorage:
    """A storage of a running server, and the name by which clients ask for it."""

    server: ZeoServer
    name: str


class ZeoStorages:
    """Hand out empty storages, each once; a server of many is started when none is left.

    :param directory: exists; the storages are below it
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        self._numbers = count()
        self._servers = {}
        self._unused = {}

    def start(self):
        """Do what can be done before the first storage is asked for.

        :raises ServiceMissing: ZEO is not installed
        """
        find_runzeo()

    def new(self, section, imports=(), **options):
        """Return a `ZeoStorage` that nobody had before.

        It is served until many more were handed out, longer than any test takes.

        :param str section: its ZConfig section, with "{name}" in the place of its name and in
            whatever it does not share with others
        :param imports: as a `ZeoServer` takes them, as the options
        """
        kind = section, tuple(imports), tuple(sorted(options.items()))
        if not self._unused.get(kind):
            self._unused[kind] = self._serve(*kind)
        return self._unused[kind].pop()

    def _serve(self, section, imports, options):
        names = [f"zeo{next(self._numbers)}" for _ in range(SHARE)]
        storages = "\n".join(section.format(name=name) for name in names)
        server = ZeoServer(self.directory / names[0], storages, imports, **dict(options))
        server.start()
        servers = self._servers.setdefault((section, imports, options), [])
        servers.append(server)
        if len(servers) > 2:
            servers.pop(0).kill()
        return [ZeoStorage(server, name) for name in names]

    def stop(self):
        """End all servers, whose files nobody needs any more; stopping again does nothing."""
        self._unused.clear()
        while self._servers:
            _, servers = self._servers.popitem()
            for server in servers:
                server.kill()


def find_runzeo():
    """Return the path of ZEO's server.

    :raises ServiceMissing: ZEO is not installed
    """
    program = find_program("runzeo")
    if program is None:
        raise ServiceMissing("runzeo is missing: pip install ZEO")
    return program


def _free_port():
    """Return a port that is free."""
    while True:
        # Below those that the kernel hands out, or it could be another's while the server is down.
        port = random.randrange(20000, 30000)
        if ports_free(port):
            return port
