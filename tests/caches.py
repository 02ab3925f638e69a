"""Processes that share one cache directory, and somebody who looks at it from outside."""

from contextlib import contextmanager
from contextlib import ExitStack
import os
import random
import re
import subprocess
import sys
import threading

from zodb_s3blobs.cache import S3BlobCache


# Seconds for which the end of a process is waited for.
PATIENCE = 60
TID = (1).to_bytes(8, "big")
# Of all names that differ in their last three digits: few directories are quickly looked at.
DIRECTORIES = 8
REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

_DIRECTORY = re.compile(r"[0-9a-f]{3}")
_FILE = re.compile(r"[0-9a-f]{16}\.[0-9a-f]{16}\.blob")


# Looking from outside


def committed(directory):
    """Return the committed files, a dict of name to size, inode and time of the last change."""
    found = {}
    for below in filter(_DIRECTORY.fullmatch, _listed(directory)):
        for name in filter(_FILE.fullmatch, _listed(f"{directory}/{below}")):
            try:
                status = os.stat(f"{directory}/{below}/{name}")
            except FileNotFoundError:
                continue
            found[name] = status.st_size, status.st_ino, status.st_ctime_ns
    return found


def _listed(directory):
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def committed_size(directory):
    """Return the sum of the sizes of the committed files."""
    return sum(size for size, *_rest in committed(directory).values())


class Observer:
    """Looks at the committed files again and again.

    A look takes a while, in which one file may go and another come. What two looks in a row have
    seen unchanged was there together, between the two: that sum counts. It is never too large.

    :ivar largest: of these sums, in bytes
    """

    def __init__(self, directory):
        self.largest = 0
        self._directory = directory
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self):
        os.makedirs(self._directory, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._ended.set()
        self._thread.join()

    def _look(self):
        ended, before = False, {}
        while not ended:
            ended = self._ended.is_set()  # the last two looks are at what remains
            for _ in range(2):
                now = committed(self._directory)
                both = now.items() & before.items()
                self.largest = max(self.largest, sum(status[0] for _name, status in both))
                before = now


# The other processes


def oid_of(filler, number):
    """Return an oid that no other filler uses, and this one for no other number."""
    return ((filler << 24 | number) << 12 | number % DIRECTORIES).to_bytes(8, "big")


def put(cache, oid, size, tid=TID):
    """Put a file of this size, which takes no room on disk, and return its path."""
    path = cache.temporary_file()
    with open(path, "wb") as file:
        file.truncate(size)
    return cache.put(oid, tid, path)


class Filler:
    """Opens a cache and puts files into it whose sizes differ, as it is told line by line.

    :param int number: no other one's in the same test.
    """

    def __init__(self, directory, max_size, number):
        self._arguments = directory, max_size
        self._number = number
        self._sizes = random.Random(number)
        self._count = 0
        self._cache = None

    def open(self):
        self.close()
        self._cache = S3BlobCache(*self._arguments)

    def close(self):
        if self._cache is not None:
            self._cache.close()

    def fill(self, count, reopen=0):
        """Put so many files, a line after each; open the cache again after each `reopen`."""
        for done in range(1, count + 1):
            say("put" if self._put() else "beside")
            if reopen and done % reopen == 0:
                self.open()

    def fill_until_told(self):
        """Put files until there is another line."""
        told = threading.Event()
        thread = threading.Thread(target=lambda: (sys.stdin.readline(), told.set()))
        thread.start()
        while not told.is_set():
            self._put()
            if self._count % 50 == 0:
                self.open()
        thread.join()

    def _put(self):
        largest = self._arguments[1] // self._sizes.choice((3, 10, 10, 20))
        self._count += 1
        oid = oid_of(self._number, self._count)
        path = put(self._cache, oid, self._sizes.randrange(largest))
        # A hit, or not any more
        self._cache.get(oid_of(self._number, max(1, self._count - 5)), TID)
        return path == self._cache.path(oid, TID)

    def exit(self):
        """End as a script does."""
        sys.exit()

    def vanish(self):
        """End at once, with everything left as it is."""
        os._exit(0)


def say(line):
    """Print a line at once."""
    os.write(1, f"{line}\n".encode())


def main(directory, max_size, number):
    """Do what standard input says and print a line after each step."""
    filler = Filler(directory, int(max_size), int(number))
    say("done")
    while line := sys.stdin.readline():
        command, *arguments = line.split()
        getattr(filler, command)(*map(int, arguments))
        say("done")


class FillerProcess:
    """A `Filler` in a process of its own.

    :ivar beside: how many files the cache did not take
    """

    def __init__(self, directory, max_size, number):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.caches", directory, str(max_size), str(number)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        # Commands that are not done; to be ready is the first.
        self._pending = 1
        self.beside = 0

    def begin(self, *commands):
        """Let it do this, one after the other."""
        for command in commands:
            self._tell(command)
            self._pending += 1

    def stop(self):
        """End what it does until it is told."""
        self._tell("stop")

    def _tell(self, line):
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def line(self):
        """Wait for the next line that it prints."""
        line = self._process.stdout.readline().strip()
        assert line, f"the process ended with {self._process.wait(PATIENCE)}"
        self._pending -= line == "done"
        self.beside += line == "beside"
        return line

    def wait(self):
        """Wait until everything is done."""
        while self._pending:
            self.line()

    def do(self, *commands):
        """Let it do this, one after the other, and wait for the end of that."""
        self.begin(*commands)
        self.wait()

    def kill(self):
        """Kill it now, whatever it does."""
        self._process.kill()
        self._process.communicate()

    def end(self):
        """Wait for its end, which its last command or that of its input brings."""
        self._process.communicate(timeout=PATIENCE)
        assert self._process.returncode == 0

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self._process.returncode is None:
            self.kill()


@contextmanager
def filler_processes(directory, max_size, count):
    """Context manager: so many processes; those that are left in the end are killed."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(FillerProcess(directory, max_size, number))
            for number in range(1, count + 1)
        ]


if __name__ == "__main__":
    main(*sys.argv[1:])
