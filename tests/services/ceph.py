"""Ceph's object gateway: the server here that enforces SSE-C, digests and conditional writes."""

from pathlib import Path
import random
import shutil
import subprocess

from .process import ports_free
from .process import ServiceFailed
from .process import ServiceMissing
from .process import spawn


SCRIPT = Path(__file__).with_name("ceph_rgw.sh")
PROGRAMS = ["ceph-mon", "ceph-osd", "radosgw", "ceph", "openssl", "curl"]


class CephGateway:
    """A gateway of one node, in memory, on loopback: http, and https with ``ca_bundle``.

    Needs Debian's packages ceph-mon, ceph-osd, radosgw, ceph-common, openssl and curl, and root.

    :param directory: emptied at the start; its path is short, since sockets are made in it
    """

    access_key = "test"
    secret_key = "testtest"

    def __init__(self, directory):
        self.directory = Path(directory)
        self.port = 0
        self._guard = None

    @property
    def endpoint_url(self):
        """The address without TLS, known once the gateway has been started."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def tls_endpoint_url(self):
        """The address with TLS, known once the gateway has been started."""
        return f"https://localhost:{self.port + 1}"

    @property
    def ca_bundle(self):
        """The certificate to trust, a path."""
        return str(self.directory / "cert.pem")

    def start(self):
        """Start the daemons, about 12 seconds.

        :raises ServiceMissing: Ceph is not installed
        :raises ServiceFailed: it did not start
        """
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if missing:
            raise ServiceMissing(f"missing: {', '.join(missing)}")
        self.port = _free_ports()
        # The guard stops the daemons when its input ends, be it that this process was killed.
        self._guard = subprocess.Popen(
            [SCRIPT, "guard", self.directory], stdin=subprocess.PIPE, start_new_session=True
        )
        log = self.directory.with_suffix(".log")
        with open(log, "w") as output:
            starting = spawn(
                [SCRIPT, "start", self.directory, str(self.port)], stdout=output, stderr=output
            )
        if starting.wait():
            self.stop()
            raise ServiceFailed(f"Ceph's gateway did not start:\n{log.read_text()}")

    def create_user(self, name):
        """Create a user without any permission; its access key is the name, as its secret key."""
        command = ["radosgw-admin", "-c", self.directory / "ceph.conf", "user", "create"]
        keys = [f"--uid={name}", f"--display-name={name}", f"--access-key={name}"]
        subprocess.run(
            [*command, *keys, f"--secret-key={name}"], check=True, capture_output=True, timeout=60
        )

    def stop(self):
        """End the daemons and wait for them; stopping again does nothing."""
        if self._guard is not None:
            self._guard.communicate()
            self._guard = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc_info):
        self.stop()


def _free_ports():
    """Return a port that is free together with those that the script derives from it."""
    while True:
        port = random.randrange(20000, 30000)  # below the ports that the kernel hands out
        if ports_free(port, port + 1, port + 10, port + 11):
            return port
