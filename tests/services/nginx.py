"""nginx: one server on loopback, in the foreground, with its files in a directory of its own."""

import os
from pathlib import Path
import random
import subprocess

from .process import end
from .process import find_program
from .process import listens
from .process import ports_free
from .process import ServiceFailed
from .process import ServiceMissing
from .process import spawn
from .process import wait_until


TEMPORARY = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
# A worker would outlive a master that is killed. Without a user, root's nginx gives its directories
# to nobody.
CONFIG = """\
daemon off;
master_process off;
user root;
pid nginx.pid;
events {{}}
http {{
    access_log off;
    {temporary}
    server {{
        listen 127.0.0.1:{port};
{text}
    }}
}}
"""


class NginxServer:
    """Serve one site on a free port of the loopback interface.

    :param directory: its prefix; it keeps configuration, log and temporary files there
    :param str text: what stands in its ``server`` block, such as locations
    """

    def __init__(self, directory, text):
        self.directory = Path(directory)
        self.port = 0
        self._text = text
        self._process = None

    @property
    def url(self):
        """The address without a slash at its end, known once the server has been started."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self):
        """What it has to say of errors."""
        return (self.directory / "error.log").read_text()

    def start(self):
        """Start the server, some milliseconds.

        :raises ServiceMissing: nginx is not installed
        :raises ServiceFailed: it did not start, as with a wrong configuration
        """
        program = _find()
        self.port = _free_port()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._write_config()
        self._process = spawn(
            [program, "-p", self.directory, "-e", "error.log", "-c", "nginx.conf"],
            stderr=subprocess.DEVNULL,  # the same is in the log
        )
        wait_until(lambda: self._process.poll() is not None or listens(self.url))
        if self._process.poll() is not None:
            raise ServiceFailed(f"nginx did not start:\n{self.log}")

    def _write_config(self):
        temporary = [f"{name}_temp_path {name}_temp;" for name in TEMPORARY]
        text = CONFIG.format(port=self.port, text=self._text, temporary="\n    ".join(temporary))
        (self.directory / "nginx.conf").write_text(text)

    def stop(self):
        """End the server; stopping again does nothing."""
        if self._process is not None:
            end(self._process)
            self._process = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc_info):
        self.stop()


def _find():
    # Debian has it where only root looks.
    program = find_program("nginx") or "/usr/sbin/nginx"
    if not os.access(program, os.X_OK):
        raise ServiceMissing("nginx is missing; on Debian: apt-get install nginx-light")
    return program


def _free_port():
    while True:
        port = random.randrange(20000, 30000)  # below the ports that the kernel hands out
        if ports_free(port):
            return port
