"""Single cases out of unittest and doctest suites, to be run one by one by pytest."""

import unittest

import pytest


def flatten(suite, layer=None):
    """Yield (case, layer) for each case; the layer is the nearest suite's own, or None."""
    layer = getattr(suite, "layer", layer)
    if not isinstance(suite, unittest.TestSuite):
        yield suite, layer
        return
    for part in suite:
        yield from flatten(part, layer)


def by_name(suite):
    """Return {name: (case, layer)}; the name is short, and one of a kind within the suite."""
    found = {}
    for case, layer in flatten(suite):
        name = ".".join(case.id().split(".")[-2:])
        assert name not in found, name
        found[name] = case, layer
    return found


def run(case, layer, check=None):
    """Run one case inside its layer, then a check before its files are removed; report to pytest.

    The layers of ZODB's suites make a working directory when they are set up, which the caller
    provides, and change the clock for each test (``testSetUp``), which pytest would leave out.
    """
    if check is not None:
        tear_down = case.tearDown
        case.tearDown = lambda: (case.addCleanup(tear_down), check())
    result = unittest.TestResult()
    enter = getattr(layer, "testSetUp", None)
    if enter:
        enter()
    try:
        case.run(result)
    finally:
        if enter:
            layer.testTearDown()
    problems = result.errors + result.failures
    if problems:
        pytest.fail("\n\n".join(text for _case, text in problems), pytrace=False)
    if result.skipped:
        pytest.skip(result.skipped[0][1])
    assert result.testsRun == 1
