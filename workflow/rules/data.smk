rule fetch:
    output:
        "results/{suite}/data/{dataset}.json",
    log:
        "results/{suite}/data/{dataset}.log",
    wildcard_constraints:
        dataset=to_fetch(),
    retries: 3
    localrule: True
    conda:
        "../envs/vdbench.yaml"
    params:
        versions=versions("data"),
        mirror=mirror,
    shell:
        "vdbench fetch {wildcards.dataset:q} --output {output:q} {params.mirror:q} --log {log:q}"
