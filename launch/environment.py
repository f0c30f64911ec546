"""Pass environment variables on to all nodes: `python launch/environment.py FILE`.

The deepspeed launcher gives other nodes only variables whose names begin with NCCL, PYTHON, MV2 or
UCX, and the lines of a file .deepspeed_env, in which a comment or a blank line makes it fail. This
writes that file from one that may have both; launch/environment.example is such a one.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

TARGET = Path(".deepspeed_env")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="environment.py",
        description="Write ./.deepspeed_env, whose variables the deepspeed launcher sets on every "
        "node. Start the launcher in this directory.",
    )
    parser.add_argument(
        "file", type=Path, help="lines of NAME=VALUE, NAME (as it is here), # comments, or nothing"
    )
    arguments = parser.parse_args(argv)
    try:
        variables = read_variables(arguments.file.read_text())
    except (ValueError, OSError) as error:
        print(f"error: {arguments.file}: {error}", file=sys.stderr)
        return 2
    TARGET.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    print(f"{TARGET}: {', '.join(variables) or 'nothing'}")
    return 0


def read_variables(text: str) -> dict[str, str]:
    """Names and values of all lines. Raises ValueError naming every line that cannot be one."""
    variables, problems = {}, []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, given, value = (part.strip() for part in line.partition("="))
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            problems.append(f"line {number}: {name!r} is no name of a variable")
        elif not given and name not in os.environ:
            problems.append(f"line {number}: {name} has no value, and is not set here")
        else:
            value = value if given else os.environ[name]
            if name in variables:
                problems.append(f"line {number}: {name} stands twice")
            if " #" in value:
                problems.append(f"line {number}: comments stand on lines of their own")
            if set(value) & set("\"'`$\\\n"):  # a remote shell reads it, within double quotes
                problems.append(f"line {number}: {name} has quotes, $ or \\, which do not survive")
            variables[name] = value
    if problems:
        raise ValueError("; ".join(problems))
    return variables


if __name__ == "__main__":
    sys.exit(main())
