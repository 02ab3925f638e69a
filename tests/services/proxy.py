"""The latency proxy as a child process: delays, bandwidth caps and request counts."""

from pathlib import Path
import sys
import tempfile

from .latency_proxy import Control
from .process import end
from .process import spawn
from .process import wait_for_line


PROGRAM = Path(__file__).with_name("latency_proxy.py")


class ControlledProxy:
    """A proxy in a child process, ``_process``, that is asked by way of ``_control``."""

    def stop(self):
        """End the proxy; stopping again does nothing."""
        if self._process is not None:
            self._control.close()
            end(self._process)
            self._process = None

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.stop()


class LatencyProxy(ControlledProxy):
    """A running proxy in front of an http endpoint.

    :param str upstream: URL of the server
    :param settings: names and values of `latency_proxy.Settings`, such as ``request_delay_ms=25``
    """

    def __init__(self, upstream, **settings):
        options = ["--upstream", upstream.rpartition("/")[2]]
        for name, value in settings.items():
            options += [f"--{name.replace('_', '-')}", str(value)]
        with tempfile.NamedTemporaryFile("w", suffix=".log") as log:
            self._process = spawn([sys.executable, PROGRAM, *options], stdout=log, stderr=log)
            _, port, control = wait_for_line(self._process, log.name, ready_line)
        self.endpoint_url = f"http://127.0.0.1:{port}"
        self._control = Control(int(control))

    def stats(self, log=False):
        """Return the counts since the last reset, a mapping.

        ``requests``, ``methods``, ``kinds`` (of S3 requests), ``expect_continue``, ``bytes_up``,
        ``bytes_down``, ``connections``, ``open_now``, ``open_max``.

        :param bool log: also ``log``, the last request lines
        """
        return self._control.stats(log)

    def reset(self):
        """Begin to count anew."""
        self._control.reset()

    def set(self, **settings):
        """Change the settings; those not named become 0."""
        self._control.set(**settings)


def ready_line(line):
    return line.split() if line.startswith("ready ") else None
