"""A headless Chromium, driven by selenium: how a browser takes what a site sends it."""

import os
from pathlib import Path
import re

from .process import end
from .process import ServiceMissing
from .process import spawn
from .process import wait_for_line


BROWSER = "/usr/bin/chromium"
DRIVER = "/usr/bin/chromedriver"
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Otherwise it outlives a driver that is killed.
    "--remote-debugging-pipe",
]
READY = re.compile(r"started successfully on port (\d+)").search


class Chromium:
    """A browser with a new profile, which saves what it downloads and asks nobody.

    :param directory: new; the profile and the downloads are in it
    :ivar downloads: directory of the finished and the unfinished downloads
    :ivar driver: selenium's `WebDriver`, while it runs
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        self.downloads = self.directory / "downloads"
        self.driver = None
        self._process = None

    def start(self):
        """Start the browser, about two seconds.

        :raises ServiceMissing: Chromium, its driver or selenium is not installed
        """
        try:
            from selenium import webdriver
        except ImportError as error:
            raise ServiceMissing(f"selenium is missing: {error}") from error
        missing = [program for program in (BROWSER, DRIVER) if not os.access(program, os.X_OK)]
        if missing:
            missing = " and ".join(missing)
            raise ServiceMissing(f"missing: {missing}; on Debian: apt-get install chromium-driver")
        self.downloads.mkdir(parents=True)
        log = self.directory / "chromedriver.log"
        with open(log, "w") as output:
            self._process = spawn(
                [DRIVER, "--port=0"],
                stdout=output,
                stderr=output,
                env={**os.environ, "LC_ALL": "C.UTF-8"},  # it saves under names in any script
            )
        port = wait_for_line(self._process, log, READY)[1]
        # Selenium's own way to start a driver may download one.
        self.driver = webdriver.Remote(f"http://127.0.0.1:{port}", options=self._options())

    def _options(self):
        from selenium.webdriver.chrome.options import Options

        options = Options()
        options.binary_location = BROWSER
        for flag in (*FLAGS, f"--user-data-dir={self.directory / 'profile'}"):
            options.add_argument(flag)
        preferences = {
            "download.default_directory": str(self.downloads),
            "download.prompt_for_download": False,
        }
        options.add_experimental_option("prefs", preferences)
        return options

    def stop(self):
        """End the browser; stopping again does nothing."""
        if self.driver is not None:
            self.driver.quit()
            self.driver = None
        if self._process is not None:
            end(self._process)
            self._process = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc_info):
        self.stop()
