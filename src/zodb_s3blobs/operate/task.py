"""What a command gets to work with, and how it tells what came of it."""

import argparse
from collections.abc import Mapping
import json
from typing import Any
from typing import NamedTuple

from .configuration import Database
from .running import Work


class Task(NamedTuple):
    """What a command gets to work with."""

    database: Database
    #: what the command line says
    options: argparse.Namespace
    work: Work

    def tell(self, result: Mapping[str, Any], text: str | None = None) -> None:
        """Print what came of it.

        :param result: what ``--json`` prints.
        :param text: what people read; by default the result, a line for each name.
        """
        if self.options.json:
            print(json.dumps(result, indent=1, default=str))
        elif text is not None:
            print(text)
        else:
            for name, value in result.items():
                print(f"{name}: {value}")
