"""Write a run's report, one HTML page with its log and evaluations: `ds-classifier report RUN`.

Training and evaluate.py write it too. This program updates it, also while the run is going on.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from ds_classifier.common import installation

    installation.check()

from ds_classifier.common import files
from ds_classifier.config.parser import Parser
from ds_classifier.distributed import failures


def main(argv: list[str] | None = None, prog: str = "report.py") -> int:
    """Parse the command line, write the report and print its path; return the exit code."""
    parser = Parser(
        prog=prog,
        description="Write a run's report, one HTML page that needs no network.",
    )
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="[RUN/report.html]")
    arguments = parser.parse_args(argv)

    from ds_classifier.report.page import write_report

    try:
        if arguments.out or arguments.run.is_dir():  # else another message names what is wrong
            files.refuse_unwritable_file("--out", arguments.out or arguments.run / "report.html")
        print(write_report(arguments.run, arguments.out))
    except (ValueError, OSError) as error:
        return failures.report(error)
    except KeyboardInterrupt:
        return failures.interrupted()
    return 0


if __name__ == "__main__":
    sys.exit(main())
