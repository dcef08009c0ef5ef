"""Files that `robsparse collect` writes, and the columns of files without a pydantic model."""

# Columns of the log of rewiring, beside those of the cell; see robsparse.sparsity.history.
STEP_COLUMNS = ("step", "layer", "pruned", "regrown", "active", "age")
LIFETIME_COLUMNS = ("age", "pruned", "active")
# Files that `robsparse collect` writes. MANIFEST has the checksums of the others.
MANIFEST = "collected.json"
STEPS, LIFETIMES = "steps.parquet", "lifetimes.parquet"
COLLECTED = (
    "results.csv",
    "results.parquet",
    "outcomes.parquet",
    "layers.csv",
    "curves.csv",
    STEPS,
    LIFETIMES,
    "weights.csv",
    "overlap.csv",
    "sanity_checks.csv",
    "corruptions.csv",
    "failures.csv",
    MANIFEST,
)
# Columns of outcomes.parquet, beside those of the network: an attack, the number of images, and one
# bit for each image (numpy.packbits), 1 if the image is correct under all components of the attack.
OUTCOME_COLUMNS = ("attack", "n_examples", "correct")
# What a record has of each corruption at each severity.
CORRUPTION_COLUMNS = ("corruption", "severity", "source", "n_correct", "n_examples")
OVERLAP_COLUMNS = (
    "dataset",
    "arch",
    "objective",
    "sparsity",
    "method_a",
    "seed_a",
    "selection_a",
    "method_b",
    "seed_b",
    "selection_b",
    "jaccard",
    "expected_jaccard",
)
