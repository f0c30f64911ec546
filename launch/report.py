"""Make a run's report, one page with all it tells of itself: `python launch/report.py RUN`.

Training and evaluate.py make it too; this one makes it anew, also while the run is under way.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_classifier.distributed import failures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="report.py",
        description="Write a run's report, one HTML page that needs no network.",
    )
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="[RUN/report.html]")
    arguments = parser.parse_args(argv)

    from ds_classifier.report.page import write_report

    try:
        print(write_report(arguments.run, arguments.out))
    except (ValueError, OSError) as error:
        return failures.report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
