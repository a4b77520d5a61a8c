rule time_inference:
    input:
        pruned=pruned_net,
    output:
        "results/{suite}/{experiment}/{method}/seed{seed}/time.json",
    log:
        "results/{suite}/{experiment}/{method}/seed{seed}/time.log",
    conda:
        "../envs/vdbench.yaml"
    # All the cores, so that nothing else runs meanwhile; the job sets its own number of threads.
    threads: workflow.cores
    resources:
        mem_mb=memory("time"),
        runtime=minutes("time"),
        cpus_per_task=timed_threads(),
    params:
        spec=time_spec,
        versions=versions("time"),
        folder=subpath(output[0], parent=True),
        given=inputs,
    shell:
        "vdbench time --suite {wildcards.suite:q} --spec {params.spec:q} --output {params.folder:q}"
        " {params.given:q} --log {log:q}"
