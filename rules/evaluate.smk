# `snakemake --cores N evaluated` stops after all networks have been attacked.
rule evaluated:
    input:
        [
            LAYOUT.evaluation(cell, selection)
            for cell in STUDY.cells()
            for selection in STUDY.evaluation.selections
        ],


rule evaluate:
    input:
        model=f"{ROOT}/models/{CELL}/{{selection}}.safetensors",
        training=f"{ROOT}/models/{CELL}/training.json",
        surrogates=surrogate_weights,
    output:
        record=f"{ROOT}/evaluations/{CELL}/{{selection}}.json",
        flags=f"{ROOT}/evaluations/{CELL}/{{selection}}.flags.npz",
    log:
        f"{ROOT}/logs/evaluate/{CELL}.{{selection}}.log",
    benchmark:
        f"{ROOT}/logs/evaluate/{CELL}.{{selection}}.benchmark.tsv"
    threads: STUDY.machine.threads
    resources:
        **gpu_of_job(),
        mem_mb=lambda _, attempt: attempt * STUDY.machine.memory_mb,
        runtime=lambda _, attempt: attempt * STUDY.machine.minutes,
    params:
        cell=CELL,
        fingerprint=of_evaluation,
    message:
        "attack {params.cell} ({wildcards.selection})"
    shell:
        "exec robsparse evaluate {STUDY_FILE:q} --cell {params.cell:q}"
        " --selection {wildcards.selection:q}"
        " --threads {threads} > {log:q} 2>&1"
