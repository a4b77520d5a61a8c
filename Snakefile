# snakemake --cores 8                                    the full reproduction, configs/paper.yaml
# snakemake --cores 2 --configfile configs/smoke.yaml    another suite
# snakemake tables                                       tables and figures from the recorded runs, without data or training
from snakemake.utils import min_version

min_version("9.0")


report: "workflow/report/workflow.rst"


if not workflow.configfiles:

    configfile: "configs/paper.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/prune.smk"
include: "workflow/rules/timing.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        everything(),
