"""Benchmarks: `registry` lists what is measured, `run` checks and times it, `report` makes tables of the results."""
