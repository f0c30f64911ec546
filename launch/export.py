"""Write a run's classifier as guided-diffusion's modelNNNNNN.pt: `python launch/export.py RUN`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run by its path: use the source tree it lies in
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_classifier import files


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="export.py",
        description="Write a classifier as guided-diffusion's file, a plain fp32 state dict.",
    )
    parser.add_argument("source", type=Path, help="a run directory, or one of its checkpoints")
    parser.add_argument("--out", type=Path, help="a directory [the run's export/]")
    arguments = parser.parse_args(argv)

    from ds_classifier.export import export_reference

    try:
        path, obstacles = export_reference(arguments.source, arguments.out)
    except (ValueError, OSError) as error:
        print(f"error: {files.problem(error)}", file=sys.stderr)
        return 2
    print(path)
    if obstacles:
        print("unmodified guided-diffusion cannot build this classifier; it would need:")
        for obstacle in obstacles:
            print(f"  {obstacle}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
