# `snakemake --cores N trained` stops after all networks have been trained.
rule trained:
    input:
        [LAYOUT.training(cell) for cell in STUDY.cells()],


rule train:
    input:
        inputs_of_training,
    output:
        weights=[
            f"{ROOT}/models/{CELL}/{selection}.safetensors"
            for selection in STUDY.saved_selections()
        ],
        record=f"{ROOT}/models/{CELL}/training.json",
        steps=f"{ROOT}/models/{CELL}/steps.parquet",
        lifetimes=f"{ROOT}/models/{CELL}/lifetimes.parquet",
    log:
        f"{ROOT}/logs/train/{CELL}.log",
    benchmark:
        f"{ROOT}/logs/train/{CELL}.benchmark.tsv"
    threads: STUDY.machine.threads
    resources:
        **gpu_of_job(),
        mem_mb=lambda _, attempt: attempt * STUDY.machine.memory_mb,
        runtime=lambda _, attempt: attempt * STUDY.machine.minutes,
    params:
        cell=CELL,
        fingerprint=of_training,
    message:
        "train {params.cell}"
    shell:
        "exec robsparse train {STUDY_FILE:q} --cell {params.cell:q} --threads {threads} > {log:q} 2>&1"
