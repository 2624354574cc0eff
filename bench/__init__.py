"""Benchmarks; they run from a checkout and do not ship in the wheel."""
