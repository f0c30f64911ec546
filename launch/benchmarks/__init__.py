"""The measurements of launch/benchmark.py: a module per command, whose `measure` returns rows."""
