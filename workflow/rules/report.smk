# Files of a suite are called what they are: among patterns that begin alike Snakemake would look for each of thousands.
rule collect:
    input:
        records,
    output:
        f"results/{SUITE.suite}/collected.csv",
    log:
        f"results/{SUITE.suite}/collect.log",
    localrule: True
    conda:
        "../envs/vdbench.yaml"
    params:
        suite_file=SUITE_FILE,
        spec=suite_spec,
        folder=subpath(output[0], parent=True),
    shell:
        "vdbench collect {params.suite_file:q} --results {params.folder:q} --output {output:q} --log {log:q}"


rule table:
    input:
        records,
        "configs/reference/table1.csv",
    output:
        table_files(),
    log:
        f"results/{SUITE.suite}/table.log",
    localrule: True
    conda:
        "../envs/vdbench.yaml"
    params:
        suite_file=SUITE_FILE,
        spec=suite_spec,
        results=subpath(output[0], ancestor=2),
        folder=subpath(output[0], parent=True),
        beside=beside,
    shell:
        "vdbench table {params.suite_file:q} --results {params.results:q} {params.beside:q}"
        " --output {params.folder:q} --log {log:q}"


rule plot:
    input:
        records,
        "configs/reference/table1.csv",
        "configs/reference/rnn_curves.csv",
        histories_and_nets,
    output:
        figure_files(),
    log:
        f"results/{SUITE.suite}/plot.log",
    localrule: True
    conda:
        "../envs/vdbench.yaml"
    params:
        suite_file=SUITE_FILE,
        spec=suite_spec,
        results=subpath(output[0], ancestor=2),
        folder=subpath(output[0], parent=True),
        beside=beside,
    shell:
        "vdbench plot {params.suite_file:q} --results {params.results:q} {params.beside:q}"
        " --output {params.folder:q} --log {log:q}"


# Without outputs, so always run: the recorded runs are in the checkout, and this takes seconds.
rule tables:
    log:
        f"results/{SUITE.suite}/recorded.log",
    localrule: True
    conda:
        "../envs/vdbench.yaml"
    params:
        suite_file=SUITE_FILE,
        recorded=RECORDED,
    shell:
        "(vdbench table {params.suite_file:q} --recorded {params.recorded:q} --output {params.recorded:q}/tables"
        " && vdbench plot {params.suite_file:q} --recorded {params.recorded:q} --output {params.recorded:q}/figures"
        " --partial)"
        " > {log:q} 2>&1"
