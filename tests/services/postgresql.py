"""PostgreSQL: a cluster of our own, reached through a socket that only its owner can enter."""

from itertools import count
import os
from pathlib import Path
import pwd
import re
import signal
import subprocess

from .process import end
from .process import find_program
from .process import ServiceMissing
from .process import spawn
from .process import wait_for_line


INSTALLED = Path("/usr/lib/postgresql")  # Debian's, one directory a version
PROGRAMS = ["initdb", "postgres"]
ROLE = "postgres"
# Nothing outlives the session, so nothing needs to reach the disk.
SETTINGS = {
    "autovacuum": "off",
    # Below the directory of the cluster: elsewhere it would outlive a server that is killed.
    "dynamic_shared_memory_type": "mmap",
    "fsync": "off",
    "full_page_writes": "off",
    "listen_addresses": "",
    "max_connections": "200",
    "max_wal_size": "128MB",
    "synchronous_commit": "off",
}
READY = re.compile("ready to accept connections").search


class PostgresqlServer:
    """Serve databases from below ``directory``, which is new and has a short path.

    It refuses to run as root: then it runs as the user postgres. Start it in a thread that lives
    on, since the server ends with that thread. ``start`` after ``stop`` serves the same databases.
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        self.process = None
        self._numbers = count()
        self._maintenance = None

    def start(self):
        """Start the server, making its files first, about a second.

        :raises ServiceMissing: PostgreSQL or psycopg2 is not installed
        """
        try:
            import psycopg2
        except ImportError as error:
            raise ServiceMissing(f"psycopg2 is missing: {error}") from error
        initdb, postgres = map(_find, PROGRAMS)
        user = _other_user()
        data = self.directory / "data"
        if not data.exists():
            if user:
                # We stay the owner, and it enters as the group.
                os.chown(self.directory, -1, user["group"])
                self.directory.chmod(0o770)
            options = ["--no-sync", "--no-locale", "--encoding", "UTF8"]
            options += ["--auth", "trust", "--username", ROLE]
            _run([initdb, "--pgdata", data, *options], self.directory, user)
        log = self.directory / "postgresql.log"
        arguments = [postgres, "-D", data, "-k", self.directory]
        for name, value in SETTINGS.items():
            arguments += ["-c", f"{name}={value}"]
        with open(log, "w") as output:
            self.process = spawn(
                arguments, cwd=self.directory, stdout=output, stderr=output, **user
            )
        wait_for_line(self.process, log, READY)
        self._maintenance = psycopg2.connect(self._dsn("postgres"))
        self._maintenance.autocommit = True

    def _dsn(self, name):
        return f"dbname={name} user={ROLE} host={self.directory}"

    def new_database(self):
        """Create an empty database, about 25 ms.

        :returns: its dsn, as psycopg2 and the section ``<postgresql>`` of RelStorage take it
        """
        name = f"test{next(self._numbers)}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE template0")
        return self._dsn(name)

    def drop_database(self, dsn):
        """Drop a database of ours, 8 MB, whoever is connected to it."""
        name = dsn.split()[0].removeprefix("dbname=")
        self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    def _execute(self, statement):
        with self._maintenance.cursor() as cursor:
            cursor.execute(statement)

    def stop(self):
        """End the server, whoever is connected; stopping again does nothing."""
        if self._maintenance is not None:
            self._maintenance.close()
            self._maintenance = None
        if self.process is not None:
            # A SIGTERM alone would wait until the last client has gone.
            self.process.send_signal(signal.SIGINT)
            end(self.process)
            self.process = None

    def remove(self):
        """Remove the databases, which are the other user's; removing again does nothing."""
        data = self.directory / "data"
        if data.exists():
            _run(["rm", "-rf", data], self.directory, _other_user())

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc_info):
        self.stop()
        self.remove()


def _find(name):
    """Return the path of a program, of the newest version that is installed."""
    found = sorted(INSTALLED.glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    program = found[-1] if found else find_program(name)
    if program is None:
        raise ServiceMissing(f"{name} is missing; on Debian: apt-get install postgresql")
    return program


def _other_user():
    """Return the options of `subprocess.Popen` for who runs the server, none where that is us."""
    if os.geteuid():
        return {}
    try:
        entry = pwd.getpwnam("postgres")
    except KeyError:
        raise ServiceMissing("PostgreSQL refuses root, and there is no user postgres") from None
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def _run(arguments, directory, user):
    subprocess.run(arguments, cwd=directory, check=True, capture_output=True, text=True, **user)
