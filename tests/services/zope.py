"""A real Zope instance: zope.conf, ``runwsgi`` and waitress, asked over HTTP."""

import os
from pathlib import Path
import re
import subprocess
import sys

import urllib3

from .fault_proxy import _free_port
from .process import end
from .process import find_program
from .process import listens
from .process import spawn
from .process import wait_until


PRODUCT = Path(__file__).parents[1] / "zopesite"
USER, PASSWORD = "admin", "secret"
DATABASE = "Control_Panel/Database/main"
_UNDO = re.compile(r'name="transaction_info:list" value="([^"]+)"')


class ZopeInstance:
    """An instance made by ``mkwsgiinstance``, with the `Site` of zopesite in its database.

    :param directory: where it is made.
    :param str configuration: of zope.conf, with its databases; INSTANCE is defined.
    :param environ: more of its environment.
    """

    def __init__(self, directory, configuration, environ=()):
        self.directory = Path(directory)
        self.environ = {**os.environ, "PYTHONPATH": self._path(), **dict(environ)}
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._pool = urllib3.PoolManager(maxsize=16)
        self._process = None
        self._run("mkwsgiinstance", "-d", str(directory), "-u", f"{USER}:{PASSWORD}")
        self.configure(configuration)
        ini = self.directory / "etc" / "zope.ini"
        text = ini.read_text().replace("port = 8080", f"port = {self.port}\nthreads = 4")
        ini.write_text(text.replace("    translogger\n", ""))

    @staticmethod
    def _path():
        return os.pathsep.join(filter(None, (str(PRODUCT), os.environ.get("PYTHONPATH"))))

    @property
    def conf(self):
        """The path of its zope.conf."""
        return self.directory / "etc" / "zope.conf"

    def configure(self, configuration):
        """Write zope.conf anew."""
        head = f"%define INSTANCE {self.directory}\n"
        lines = [line for line in configuration.splitlines() if line.startswith("%import")]
        rest = configuration.splitlines()[len(lines) :]
        text = "\n".join([*lines, head, "instancehome $INSTANCE", *rest, ""])
        self.conf.write_text(text)

    def make_site(self):
        """Put an empty `Site` into the database."""
        self._run("zconsole", "run", str(self.conf), str(PRODUCT / "make_site.py"))

    def _run(self, program, *arguments):
        done = subprocess.run(
            [sys.executable, find_program(program), *arguments],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self):
        """Start the server and wait until it answers."""
        with open(self.directory / "var" / "output.log", "a") as log:
            program = [
                sys.executable,
                find_program("runwsgi"),
                str(self.conf.with_name("zope.ini")),
            ]
            self._process = spawn(program, stdout=log, stderr=log, env=self.environ)
        wait_until(lambda: self._process.poll() is not None or listens(self.url), 60)
        assert self._process.poll() is None, self.log()

    def stop(self):
        """End the server; stopping again does nothing."""
        if self._process is not None:
            end(self._process, 30)
            self._process = None

    def restart(self):
        """Stop and start."""
        self.stop()
        self.start()

    def log(self):
        """Return what the server has written."""
        return (self.directory / "var" / "output.log").read_text()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc_info):
        self.stop()

    # Asking

    def request(self, method, path, fields=None, headers=(), redirect=False):
        """Return the answer to a request; one with an error of the server is returned, too.

        :param fields: of a form; a file is (name, bytes).
        """
        auth = urllib3.make_headers(basic_auth=f"{USER}:{PASSWORD}")
        return self._pool.request(
            method,
            f"{self.url}/{path}",
            fields=fields,
            headers={**auth, **dict(headers)},
            redirect=redirect,
            retries=False,
            timeout=60,
        )

    def get(self, path, **headers):
        """Return the body of an answer that is no error."""
        answer = self.request("GET", path, headers=headers)
        assert answer.status < 300, (path, answer.status, self.log()[-3000:])
        return answer.data

    def fetch(self, url):
        """Return what a URL of another server has."""
        answer = self._pool.request("GET", url, retries=False, timeout=60)
        assert answer.status == 200, (answer.status, answer.data)
        return answer.data

    def post(self, path, **fields):
        """Send a form; the answer is no error."""
        answer = self.request("POST", path, fields)
        assert answer.status < 400, (path, answer.status, self.log()[-3000:])
        return answer

    def upload(self, name, data):
        """Store a file in the site."""
        return self.post("site/upload", id=name, file=(name, data))

    def download(self, name):
        """Return the bytes of a file."""
        return self.get(f"site/{name}/download")

    def delete(self, name):
        """Delete a file from the site."""
        return self.post("site/manage_delObjects", **{"ids:list": name})

    def pack(self):
        """Pack the database to the present."""
        return self.post(f"{DATABASE}/manage_pack", **{"days:float": "0"})

    def undo(self):
        """Undo the last transaction."""
        found = _UNDO.search(self.get(f"{DATABASE}/manage_UndoForm").decode())
        assert found, "nothing can be undone"
        return self.post(
            f"{DATABASE}/manage_undo_transactions", **{"transaction_info:list": found[1]}
        )
