"""The command line: verbs, their flags and what help says of them."""

import argparse
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import get_args

from vdbench.config_timing import Backend

Verb = Callable[[argparse.Namespace], int]
_NET = "a shipped net, such as lenet5-mnist-vd_warmup, or a pruned.npz"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def parser(functions: Iterable[Verb]) -> argparse.ArgumentParser:
    """The command line of functions that are named, and explained, as their verbs are."""
    root = argparse.ArgumentParser(
        prog="vdbench", description="Sparse variational dropout, reproduced: from one command to the table."
    )
    root.add_argument("--version", action="version", version=f"%(prog)s {version('vdbench')}")
    verbs = root.add_subparsers(metavar="VERB", required=True)

    by_name = {function.__name__: function for function in functions}

    def verb(name: str) -> argparse.ArgumentParser:
        function = by_name[name]
        sub = verbs.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(run=function)
        return sub

    def data_flags(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--cache", type=Path, metavar="DIR", help="verified data (VDBENCH_CACHE, else ~/.cache/vdbench)"
        )
        sub.add_argument(
            "--mirror", type=Path, metavar="DIR", help="read before downloading; VDBENCH_MIRROR overrides it"
        )

    def log_flag(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--log", type=Path, metavar="FILE", help="say everything there; logs of past runs are kept")

    def job(name: str, *, by_hand: bool = False) -> argparse.ArgumentParser:
        sub = verb(name)
        which = sub.add_mutually_exclusive_group(required=True)
        if by_hand:
            which.add_argument("net", nargs="?", help=_NET)
        which.add_argument("--spec", metavar="JSON", help="the run, as the workflow writes it")
        sub.add_argument(
            "--suite", dest="suite_name", required=not by_hand, metavar="NAME", help="that the record will name"
        )
        sub.add_argument("--output", required=not by_hand, type=Path, metavar="DIR", help="folder of the run")
        log_flag(sub)
        return sub

    def suite(name: str) -> argparse.ArgumentParser:
        sub = verb(name)
        sub.add_argument("suite_file", type=Path, metavar="SUITE", help="suite file, such as configs/paper.yaml")
        sub.add_argument("--results", type=Path, metavar="DIR", help="its runs here (default: results/<suite>)")
        return sub

    sub = verb("fetch")
    sub.add_argument("dataset", help="one of those that `vdbench info` lists")
    sub.add_argument("--output", type=Path, metavar="FILE", help="report to write (JSON)")
    log_flag(sub)
    data_flags(sub)

    sub = job("train")
    sub.add_argument("--pretrained", type=Path, metavar="FILE", help="weights.pt of the dense run to start from")
    sub.add_argument("--matched", type=Path, metavar="FILE", help="prune.json of the run whose sparsity is copied")
    data_flags(sub)
    sub = job("prune")
    sub.add_argument("--weights", type=Path, required=True, metavar="FILE", help="weights.pt of the run")
    sub.add_argument("--control", type=Path, metavar="FILE", help="prune.json of the dense run to compare with")
    data_flags(sub)
    sub = job("time", by_hand=True)
    sub.add_argument("--pruned", type=Path, metavar="FILE", help="pruned.npz of the run; none for a net not trained")
    by_hand = sub.add_argument_group("with a net", "in place of --spec, --suite and --pruned; --output keeps a record")
    by_hand.add_argument("--batch-sizes", type=_positive, nargs="+", metavar="N", help="images, or texts, a call")
    by_hand.add_argument("--threads", type=_positive, metavar="N", help="default: 1, and as many as there are cores")
    by_hand.add_argument(
        "--backends", nargs="+", choices=get_args(Backend), metavar="NAME", help="as `vdbench info` lists them"
    )

    sub = suite("collect")
    sub.add_argument("--output", type=Path, metavar="FILE", help="default: results/<suite>/collected.csv")
    log_flag(sub)
    for name in ("table", "plot"):
        sub = suite(name)
        sub.add_argument("--recorded", type=Path, metavar="DIR", help="the shipped runs (default: both)")
        sub.add_argument("--output", type=Path, required=name == "plot", metavar="DIR", help="folder to write to")
        if name == "plot":
            sub.add_argument("--partial", action="store_true", help="leave out figures that there is no data for")
        log_flag(sub)
    sub = suite("record")
    sub.add_argument("--output", type=Path, metavar="DIR", help="folder to replace (default: results/recorded/<suite>)")
    sub.add_argument("--partial", action="store_true", help="leave out what is stale or missing, and say so")
    suite("plan").add_argument("--cores", type=_positive, default=8, help="as for snakemake (default: %(default)s)")
    suite("status")

    sub = verb("compile")
    sub.add_argument("net", help=f"{_NET}, or what --output kept")
    sub.add_argument("--output", type=Path, metavar="FILE", help="keep the compiled net here (.npz)")
    sub.add_argument("--threads", type=_positive, help="at the most (default: as many as PyTorch uses)")

    sub = verb("verify")
    sub.add_argument("folders", type=Path, nargs="*", metavar="DIR", help="recorded suites (default: all)")
    data_flags(sub)
    data_flags(verb("info"))
    return root
