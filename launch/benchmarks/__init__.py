"""What launch/benchmark.py measures, a module a command: `measure` returns a table's rows."""
