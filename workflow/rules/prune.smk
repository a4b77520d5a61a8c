rule prune:
    input:
        data=data_report,
        weights="results/{suite}/{experiment}/{method}/seed{seed}/weights.pt",
        control=control_record,
    output:
        record="results/{suite}/{experiment}/{method}/seed{seed}/prune.json",
        net="results/{suite}/{experiment}/{method}/seed{seed}/pruned.npz",
    log:
        "results/{suite}/{experiment}/{method}/seed{seed}/prune.log",
    group:
        submission
    conda:
        "../envs/vdbench.yaml"
    threads: 1
    resources:
        mem_mb=memory("prune"),
        runtime=minutes("prune"),
        gpu=1,
    params:
        spec=run_spec,
        versions=versions("prune"),
        folder=subpath(output.record, parent=True),
        given=given,
    shell:
        "vdbench prune --suite {wildcards.suite:q} --spec {params.spec:q} --output {params.folder:q}"
        " {params.given:q} --log {log:q}"
