"""The command ``qtools``: run the chapters, check what is installed."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qtools import __version__

ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one ``qtools`` command and return its exit status.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process by default.

    Returns
    -------
    int
        0 for success, 1 for a chapter that failed or something required that is missing, 2 for a command that asks
        for what does not exist, 130 when interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    about = "Quantizing neural networks for Qualcomm's Hexagon NPU: the tools of the course."
    parser = argparse.ArgumentParser(prog="qtools", description=about)
    parser.add_argument("--version", action="version", version=f"qtools {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    check = commands.add_parser("check", help="say what is installed, and how to mend what is missing")
    check.set_defaults(command=_check)
    return parser


def _add_run(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    run = commands.add_parser("run", help="run chapters and renew their outputs, figures and results")
    names = "1, 01, 01_linear_quantization or a path; none for all"
    run.add_argument("chapters", nargs="*", metavar="CHAPTER", help=names)
    run.add_argument(
        "-p",
        dest="params",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=VALUE",
        help="set a parameter of the chapters; the output then goes to runs/",
    )
    run.add_argument("--jobs", type=_positive, default=2, metavar="N", help="chapters at a time (default 2)")
    run.add_argument("--output", type=Path, metavar="DIR", help="leave the committed files alone and write to DIR")
    run.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> int:
    from qtools.suite.run import UsageError, run

    try:
        return run(ROOT, args.chapters, dict(args.params), args.jobs, args.output)
    except UsageError as error:
        print(f"qtools run: {error}", file=sys.stderr)
        return 2


def _check(_: argparse.Namespace) -> int:
    from qtools.suite.check import check

    return check(ROOT)


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"'{text}': expected NAME=VALUE, such as SOC=sm8650")
    return name, value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': expected a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
