"""`vdbench <verb>`: what a job, or a person at a terminal, can ask for. Anything heavy is imported inside a verb."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from vdbench import current, records
from vdbench.arguments import parser
from vdbench.config import RunSpec, Suite, SuiteError, load_suite, parse_case, parse_spec
from vdbench.config_timing import Timing
from vdbench.files import DataError
from vdbench.mistakes import in_one_line

if TYPE_CHECKING:
    from vdbench.data import Dataset
    from vdbench.sparse import CompiledNet
    from vdbench.text import Text

EXPECTED_ERRORS = (SuiteError, records.RecordError, DataError)


def fetch(args: argparse.Namespace) -> int:
    """See to it that a data set's verified files are in the cache."""
    from vdbench import data

    report = data.fetch(args.dataset, cache=args.cache, mirror=args.mirror)
    if args.output:
        records.write_json(args.output, report)
    for name, file in report["files"].items():
        print(f"{args.dataset}: {name}: {file['bytes']:,} bytes from {file['source']}, verified")
    print(f"{args.dataset}: {', '.join(f'{count:,} {split}' for split, count in report['examples'].items())} examples")
    return 0


def train(args: argparse.Namespace) -> int:
    """Train one run; started again after being killed, it goes on where it was."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: large tensors in large pages, which cost less to get
    from vdbench import training
    from vdbench.running import at_work

    with at_work(args.output, "train") as work:
        record = training.train(
            args.spec,
            suite=args.suite_name,
            output=args.output,
            data=_dataset(args),
            pretrained=args.pretrained,
            matched=args.matched,
            progress=sys.stderr.isatty(),
            report=work.report,
            waited=work.waited,
        )
    return _finished(record)


def prune(args: argparse.Namespace) -> int:
    """Remove weights for good, evaluate what is left and write the pruned net."""
    from vdbench import pruning
    from vdbench.running import at_work

    with at_work(args.output, "prune"):
        record = pruning.prune(
            args.spec,
            suite=args.suite_name,
            output=args.output,
            data=_dataset(args),
            weights=args.weights,
            control=args.control,
        )
    return _finished(record)


def time(args: argparse.Namespace) -> int:
    """Time inference with a pruned net, or with a random one, on every engine there is."""
    from vdbench import timing
    from vdbench.process import keep_freed_memory
    from vdbench.running import at_work

    _check_way_of_timing(args)
    keep_freed_memory()
    spec, pruned = args.spec, args.pruned
    if args.net:
        pruned = _net_file(args.net)
        asked = {"batch_sizes": args.batch_sizes, "threads": args.threads and [args.threads], "backends": args.backends}
        how = Timing.model_validate({key: value for key, value in asked.items() if value})
        spec = timing.spec_by_hand(args.net, pruned, how)
    with at_work(args.output, "time") if args.output else nullcontext():
        record = timing.time_inference(
            spec,
            suite=args.suite_name or "by hand",
            output=args.output,
            pruned=pruned,
            progress=sys.stderr.isatty(),
        )
    if args.net:
        from vdbench import tables

        print(f"\n{tables.speeds_by_hand(record)}\n")
    return _finished(record)


def _check_way_of_timing(args: argparse.Namespace) -> None:
    """Raises SuiteError where flags that go with a net and with a spec are mixed up, or one is missing."""
    with_spec = {"--suite": args.suite_name, "--pruned": args.pruned}
    with_net = {"--batch-sizes": args.batch_sizes, "--threads": args.threads, "--backends": args.backends}
    for flag, value in (with_spec if args.net else with_net).items():
        if value is not None:
            raise SuiteError(f"{flag}: goes with {'--spec' if args.net else 'a net'} alone; leave it out")
    if not args.net and not (args.suite_name and args.output):
        raise SuiteError("--spec: needs --suite and --output too")


def _dataset(args: argparse.Namespace) -> "Dataset | Text":
    from vdbench import data

    spec: RunSpec = args.spec
    return data.load(spec.dataset, validation_size=spec.validation_size, cache=args.cache, mirror=args.mirror)


def _finished(record: records.Record) -> int:
    """Say how a job ended. A diverged run is a result too: the suite goes on, and the tables say so."""
    numbers = ", ".join(f"{name} {value:.6g}" for name, value in record.metrics.items())
    message = f" ({record.message})" if record.message else ""
    print(f"{record.stage} {record.status}{message} after {record.wall_s:.1f} s{': ' if numbers else ''}{numbers}")
    return 0


def collect(args: argparse.Namespace) -> int:
    """Write every record of a suite as one row of a CSV file."""
    from vdbench import collecting

    found, notes = current.load(_results(args), args.suite)
    output = args.output or _results(args) / "collected.csv"
    collecting.write_csv(found, output)
    print("\n".join([*notes, f"{len(found)} records: {output}"]))
    return 0


def table(args: argparse.Namespace) -> int:
    """Print Table 1 and, with --output, write every table (CSV, HTML, Markdown, LaTeX)."""
    from vdbench import tables

    _, sources, notes = _sources(args)
    print(tables.render_text(args.suite, sources, notes), end="")
    for path in tables.write_tables(args.suite, sources, notes, args.output) if args.output else ():
        print(path)
    return 0


def plot(args: argparse.Namespace) -> int:
    """Draw every figure (PNG, SVG)."""
    from vdbench import plots

    folders, sources, _ = _sources(args)
    for path in plots.write_plots(args.suite, sources, folders, args.output, partial=args.partial):
        print(path)
    return 0


def record(args: argparse.Namespace) -> int:
    """Copy a suite's current records, histories and pruned nets to where they are shipped from."""
    from vdbench import shipping

    target = args.output or shipping.FOLDER / args.suite.suite
    left_out = shipping.record(args.suite, _results(args), target, partial=args.partial)
    print("\n".join([*(f"left out: {note}" for note in left_out), f"recorded in {target}; tables and figures next:"]))
    print(f"snakemake tables --configfile {args.suite_file}")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Evaluate the shipped pruned nets again and compare with their records, to the last digit."""
    from vdbench import verification

    return verification.verify(args.folders, cache_folder=args.cache, mirror=args.mirror)


def compile(args: argparse.Namespace) -> int:
    """Compile a pruned net for this processor and say what runs how, and how fast."""
    import torch

    from vdbench.netfile import is_compiled, read_arrays
    from vdbench.pruning import load_net
    from vdbench.sparse import CompiledNet, compile_sparse
    from vdbench.structure import LanguageModel, structure

    path = _net_file(args.net)
    if is_compiled(read_arrays(path)[1]):
        print(f"{path}: compiled already")
        return _shown(CompiledNet.load(path, threads=args.threads), args.output)
    model: Any = load_net(path)[0]
    if isinstance(model, LanguageModel):
        if args.output:
            raise records.RecordError("a sparse language model is not kept in a file: its pruned.npz is small as it is")
        if args.threads:
            raise records.RecordError("a language model is counted here, not compiled: leave out --threads")
        print("a language model: vdbench.to_cpu_sparse runs it sparse; left of it:")
        print("\n".join(f"  {name} {count:,}" for name, count in structure(model).counts().items()))
        return 0
    started = perf_counter()
    compiled = compile_sparse(model, torch.zeros(1, *model.input_shape), threads=args.threads)
    print(f"compiled in {perf_counter() - started:.1f} s")
    return _shown(compiled, args.output)


def _shown(net: "CompiledNet", output: Path | None) -> int:
    print(f"\n{net.summary()}")
    if output:
        net.save(output)
        print(f"\n{output}: {output.stat().st_size:,} bytes, for vdbench.CompiledNet.load")
    return 0


def _net_file(net: str) -> Path:
    """A file, or where the net lies that is shipped under this name. Raises RecordError."""
    from vdbench import shipping

    try:
        return Path(net) if Path(net).is_file() else shipping.net_file(net)
    except KeyError as error:
        raise records.RecordError(error.args[0]) from None


def plan(args: argparse.Namespace) -> int:
    """Say which jobs a suite has left to do, how long they take and how that is known."""
    from vdbench import planning

    print(planning.describe(args.suite, _results(args), cores=args.cores))
    return 0


def status(args: argparse.Namespace) -> int:
    """Say what of a suite is done, running, failed or missing; exit status 0 all done, 1 not yet, 3 a job failed."""
    from vdbench import progress

    states = progress.states(args.suite, _results(args))
    print(progress.describe(states))
    return progress.exit_status(states)


def info(args: argparse.Namespace) -> int:
    """List data sets, models, methods, shipped nets, backends, versions and hardware."""
    from vdbench import information

    print(information.describe(cache=args.cache, mirror=args.mirror))
    return 0


def _results(args: argparse.Namespace) -> Path:
    return args.results or Path("results") / args.suite.suite


def _sources(
    args: argparse.Namespace,
) -> tuple[dict[str, Path], dict[str, list[records.Record]], dict[str, list[str]]]:
    """Folders, records and notes by where runs come from: what is named, or else the recorded and this machine's."""
    from vdbench import shipping

    suite: Suite = args.suite
    folders = {"recorded": args.recorded, "this machine": args.results}
    if not any(folders.values()):
        folders = {"recorded": shipping.recorded(suite.suite), "this machine": _results(args)}
    present = {name: folder for name, folder in folders.items() if folder and folder.is_dir()}
    if not present:
        tried = ", ".join(str(folder) for folder in folders.values() if folder)
        raise records.RecordError(f"no runs of suite {suite.suite} (looked in {tried}); run snakemake first")
    sources, notes = {}, {}
    for name, folder in present.items():
        sources[name], notes[name] = current.load(folder, suite)
    return present, sources, notes


VERBS = (fetch, train, prune, time, collect, table, plot, record, verify, compile, plan, status, info)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 for a job that failed or a check that did not pass; 2 for what the caller can put right;
    130 when interrupted. Those of `status` are its own."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # so that a log can be followed
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        args = parser(VERBS).parse_args(arguments)
        if getattr(args, "log", None):
            from vdbench.running import log_to

            log_to(args.log)
        if "suite_file" in args:
            args.suite = load_suite(args.suite_file)
        if getattr(args, "spec", None) is not None:
            is_trained = "pruned" not in args or args.pruned is not None
            args.spec = parse_spec(args.spec) if is_trained else parse_case(args.spec)
        return args.run(args)
    except BrokenPipeError:  # whoever read our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"vdbench: error: {in_one_line(error)}", file=sys.stderr)
        return 2
    except EXPECTED_ERRORS as error:
        print(f"vdbench: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vdbench: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
