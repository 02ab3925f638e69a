"""Servers that the tests, the demo and the benchmarks start and end themselves."""
