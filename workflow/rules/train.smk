# Every named input but `data` is passed on as the flag of its name.


rule pretrain:
    input:
        data=data_report,
    output:
        record="results/{suite}/{experiment}/{method}/seed{seed}/train.json",
        weights="results/{suite}/{experiment}/{method}/seed{seed}/weights.pt",
        history="results/{suite}/{experiment}/{method}/seed{seed}/history.csv",
    log:
        "results/{suite}/{experiment}/{method}/seed{seed}/train.log",
    wildcard_constraints:
        method="dense",
    group:
        submission
    conda:
        "../envs/vdbench.yaml"
    threads: 1
    resources:
        mem_mb=memory("train"),
        runtime=minutes("train"),
        gpu=1,
    params:
        spec=run_spec,
        versions=versions("train"),
        folder=subpath(output.record, parent=True),
        given=given,
    shell:
        "vdbench train --suite {wildcards.suite:q} --spec {params.spec:q} --output {params.folder:q}"
        " {params.given:q} --log {log:q}"


use rule pretrain as vd_warmup with:
    wildcard_constraints:
        method="vd_warmup",


use rule pretrain as vd_finetune with:
    input:
        data=data_report,
        pretrained="results/{suite}/{experiment}/dense/seed{seed}/weights.pt",
    wildcard_constraints:
        method="vd_finetune",


use rule pretrain as baseline with:
    input:
        data=data_report,
        pretrained="results/{suite}/{experiment}/dense/seed{seed}/weights.pt",
        matched=matched_record,
    wildcard_constraints:
        method="magnitude|random",
