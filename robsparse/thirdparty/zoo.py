"""Loads a network of RobustBench's model zoo by its name, and downloads it on first use."""

import contextlib
import importlib
import io
from typing import Any

from torch import nn

from robsparse.base.errors import UsageError, nearest_match, one_line
from robsparse.thirdparty.robustbench_repair import import_robustbench

FOLDER = "data/robustbench"  # downloaded files are stored here


def load(name: str, dataset: str, norm: str) -> nn.Module:
    """Return a network of the zoo in eval mode. Its inputs are images in [0,1].

    Args:
        name: name of the network in the zoo.
        dataset: data set of the network, e.g. "cifar10".
        norm: "Linf" or "L2".

    Raises:
        UsageError: if the extra `robustbench` is not installed, if the zoo has no such network for
            the data set and the norm, or if the download fails.
    """
    import_robustbench()
    found = importlib.import_module("robustbench.model_zoo").model_dicts
    enums = importlib.import_module("robustbench.model_zoo.enums")
    load_model = importlib.import_module("robustbench.utils").load_model
    try:
        known: dict[str, Any] = found[enums.BenchmarkDataset(dataset)][enums.ThreatModel(norm)]
    except (KeyError, ValueError):
        raise UsageError(f"RobustBench's zoo has no networks for {dataset} under {norm}") from None
    if name not in known:
        raise UsageError(
            f"RobustBench's zoo has no '{name}' for {dataset} under {norm}"
            f"{nearest_match(name, known)}"
        )
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model = load_model(name, model_dir=FOLDER, dataset=dataset, threat_model=norm)
    except (Exception, SystemExit) as error:  # e.g. there is no internet connection
        raise UsageError(
            f"{name}: RobustBench could not download it ({one_line(error)}); expected an "
            f"internet connection, or the file under {FOLDER}/{dataset}/{norm}"
        ) from None
    return model.eval()
