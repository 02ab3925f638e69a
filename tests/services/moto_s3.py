"""moto's S3 in a thread of this process: quick, for unit tests; it enforces little."""

from .process import ServiceMissing


class MotoServer:
    """moto's server on a free port of the loopback interface."""

    access_key = "moto-access"
    secret_key = "moto-secret"

    def __init__(self):
        self.endpoint_url = None
        self._server = None

    def start(self):
        """Start the thread.

        :raises ServiceMissing: moto is not installed
        """
        try:
            from moto.server import ThreadedMotoServer
        except ImportError as error:
            raise ServiceMissing(f"moto is missing: {error}") from error
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.endpoint_url = f"http://{host}:{port}"

    def stop(self):
        """End the thread; stopping again does nothing."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc_info):
        self.stop()
