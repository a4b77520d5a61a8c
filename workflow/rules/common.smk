"""Helpers only: the suite, its runs, and what each job is told."""

import os
import re
import sys
from pathlib import Path

from vdbench import estimates, outputs
from vdbench.config import BASELINE_METHODS, VARIATIONAL_METHODS, Methods, SuiteError, canonical, load_suite
from vdbench.stages import stage_versions


def read_suite(files, settings):
    """The suite and its file. Snakemake would merge several files, and tables could then not name what they show."""
    if len(files) != 1:
        raise WorkflowError(f"one suite at a time, please: {', '.join(map(str, files))}")
    if settings:
        raise WorkflowError(
            f"--config {' '.join(settings)}: a suite is what its file says; edit a copy of {files[0]} instead"
        )
    try:
        return load_suite(Path(files[0])), os.path.relpath(files[0])
    except SuiteError as error:
        raise WorkflowError(str(error))


if not Path("configs/reference").is_dir():
    raise WorkflowError(f"run Snakemake in the project's folder, where results go too: cd {workflow.basedir}")
# Jobs find the `vdbench` beside the Python that runs Snakemake, in an activated environment or not.
os.environ.update(PATH=os.pathsep.join((os.path.dirname(sys.executable), *os.get_exec_path())))
# Snakemake insists on --cores before it runs anything on this machine: one core, then, for what needs no more.
if workflow.resource_settings.cores is None:
    workflow.resource_settings.cores = workflow.global_resources["_cores"] = 1
SUITE, SUITE_FILE = read_suite(workflow.configfiles, workflow.config_settings.config)
# The project's own runs of this suite, if it has any, are shown beside those of this machine.
RECORDED = Path("results/recorded") / SUITE.suite
# What a method's runs start from: nothing, dense nets, or nets whose sparsity they copy.
LEVELS = (
    {"dense": "dense"} | dict.fromkeys(VARIATIONAL_METHODS, "variational") | dict.fromkeys(BASELINE_METHODS, "baseline")
)
# What stands for the method of the nets that are not trained.
nets = {re.escape(net) for case in SUITE.cases().values() for net in case.nets()}


wildcard_constraints:
    suite=SUITE.suite,
    experiment="|".join([*SUITE.experiments, *SUITE.cases()]),
    method="|".join([*Methods.model_fields, *nets]),
    seed=r"\d+",


def versions(stage):
    """Of the code behind a stage: as a parameter, so that raising one reruns the jobs that stand on it."""
    return lambda wildcards: canonical(stage_versions(stage, wildcards.get("method", "")))


def spec_of(stage, wildcards):
    return SUITE.spec_of(stage, wildcards.experiment, wildcards.method, int(wildcards.seed))


def run_spec(wildcards):
    return canonical(spec_of("train", wildcards))


def time_spec(wildcards):
    return canonical(spec_of("time", wildcards))


def suite_spec(wildcards):
    return canonical(SUITE.model_dump(mode="json", exclude={"mirror"}))


def memory(stage):
    """Megabytes to ask for, from the peaks of the runs that the project ships; more at every retry."""
    return lambda wildcards, attempt: estimates.shipped().megabytes_to_ask_for(
        stage, spec_of(stage, wildcards), attempt
    )


def minutes(stage):
    """The time limit to ask for, from how long the runs took that the project ships; more at every retry."""
    return lambda wildcards, attempt: estimates.shipped().minutes_to_ask_for(stage, spec_of(stage, wildcards), attempt)


def timed_threads():
    """The cores that timing is given on a cluster; all of them are what the suite means by `all`."""
    return max((count for count in SUITE.timing.threads if count != "all"), default=1)


def submission(wildcards):
    """What is sent to a cluster as one, where the profile says of how many runs with `group-components`: the training and
    pruning of one run, or of several that take minutes. Those are of one level, for none may wait for one of its group.
    """
    if not workflow.group_settings.group_components:
        return None
    seconds, _ = estimates.shipped().seconds("train", spec_of("train", wildcards))
    if seconds > estimates.SHORT_S:
        return f"{wildcards.experiment}-{wildcards.method}-{wildcards.seed}"
    return f"short_{LEVELS[wildcards.method]}"


def data_report(wildcards):
    """Existence is enough: content is verified at every use, so a report written anew reruns nothing."""
    return ancient(f"results/{wildcards.suite}/data/{SUITE.experiments[wildcards.experiment].dataset}.json")


def beside(wildcards):
    """The recorded runs, as a flag, where there are any."""
    return ["--recorded", str(RECORDED)] if RECORDED.is_dir() else []


def to_fetch():
    """Data sets without a report, as a pattern. One that is there is no rule's output any more: were fetching to run
    again, cut off as it may have been, Snakemake would pass over all that is missing behind an `ancient` input."""
    datasets = dict.fromkeys(experiment.dataset for experiment in SUITE.experiments.values())
    reports = {name: Path("results") / SUITE.suite / "data" / f"{name}.json" for name in datasets}
    return "|".join(re.escape(name) for name, report in reports.items() if not report.exists()) or "(?!)"


def matched_record(wildcards):
    """The variational net whose sparsity a baseline copies."""
    return f"results/{{suite}}/{{experiment}}/{SUITE.experiments[wildcards.experiment].match}/seed{{seed}}/prune.json"


def pruned_net(wildcards):
    """What is timed; a net that is not trained needs no file."""
    if wildcards.experiment in SUITE.cases():
        return []
    return "results/{suite}/{experiment}/{method}/seed{seed}/pruned.npz"


def control_record(wildcards):
    """The dense net that a pruned one is compared with."""
    if wildcards.method == "dense":
        return []
    return "results/{suite}/{experiment}/dense/seed{seed}/prune.json"


def mirror(wildcards, input):
    """The suite's mirror folder, as a flag. Taking `input` keeps it from being a reason to run a job again: where the
    same bytes come from changes no result."""
    return ["--mirror", SUITE.mirror] if SUITE.mirror else []


def inputs(wildcards, input):
    """The files a job starts from, as the flags of its verb."""
    return [word for name, path in input.items() if name != "data" and path for word in (f"--{name}", path)]


def given(wildcards, input):
    """The same, and where data comes from."""
    return inputs(wildcards, input) + mirror(wildcards, input)


def records(wildcards):
    return [f"results/{SUITE.suite}/{e}/{method}/seed{seed}/{stage}.json" for stage, e, method, seed in SUITE.jobs()]


def histories_and_nets(wildcards):
    return [
        f"results/{SUITE.suite}/{experiment}/{method}/seed{seed}/{name}"
        for experiment, method, seed in SUITE.runs()
        for name in ("history.csv", "pruned.npz")
    ]


def everything():
    """What a run of the suite is for."""
    return [f"results/{SUITE.suite}/collected.csv", *table_files(), *figure_files()]


def table_files():
    return [
        file
        for stem in outputs.tables(SUITE)
        for file in in_report("tables", stem, outputs.TABLE_FORMATS, {"Table": outputs.TABLES[stem]})
    ]


def figure_files():
    return [
        file
        for stem, (kind, experiments) in outputs.figures(SUITE).items()
        for file in in_report(
            "figures",
            stem,
            outputs.FIGURE_FORMATS,
            {"Figure": outputs.FIGURES[kind], "Experiment": ", ".join(experiments)},
            kind,
        )
    ]


def in_report(folder, stem, formats, labels, kind=None):
    """The files of one table or figure; the report shows the first, with the caption of its kind."""
    first, *others = [f"results/{SUITE.suite}/{folder}/{stem}.{extension}" for extension in formats]
    caption = f"{workflow.basedir}/workflow/report/{folder}/{kind or stem}.rst"
    shown = report(first, caption=caption, category=folder.capitalize(), labels=labels)
    return [shown, *others]
