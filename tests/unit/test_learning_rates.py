"""The learning rates that benchmarks/learning_rates.py chooses from training records."""

import json

import pytest
import yaml

from robsparse.study import loading
from robsparse.study.cells import Layout


@pytest.fixture(scope="module")
def tool(load_benchmark):
    return load_benchmark("learning_rates")


# Held-out accuracy of each cell; the seconds of a sparse network count those of its dense network.
ACCURACY = {
    "dense": (0.5, 10.0, ""),
    "dense_lr003": (0.5, 10.0, ""),
    "hydra_lr003/s0.9900": (0.30, 15.0, ""),
    "hydra_lr01/s0.9900": (0.32, 15.0, ""),
    "hydra_lr03/s0.9900": (0.31, 15.0, ""),
    "hydra_lr003/s0.9000": (0.40, 15.0, ""),
    "hydra_lr01/s0.9000": (0.39, 15.0, ""),
    "bcs_lr01/s0.9900": (0.20, 7.0, ""),
    "bcs_lr03/s0.9900": (0.25, 7.0, "training collapsed"),
}


@pytest.fixture
def records(repository, tmp_path):
    """Records of some networks of the real study."""
    study = loading.load(repository / "config" / "photos_lr.yaml")
    layout = Layout(tmp_path)
    for cell in study.cells():
        name = cell.method if not cell.sparsity else f"{cell.method}/s{cell.sparsity_text}"
        if name in ACCURACY:
            accuracy, seconds, failure = ACCURACY[name]
            content = {
                "cost": {"seconds": seconds, "peak_active_weights": 1},
                "curve": [],
                "selected": {"best_val": {"epoch": 5, "val_robust": accuracy}},
                "failure": failure,
            }
            path = layout.training(cell)
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(content))
    return study, layout


def test_best_held_out_accuracy_chooses_and_the_smaller_rate_wins_a_tie(tool, records):
    found = list(tool.trials(*records))
    assert len(found) == len(ACCURACY)
    assert {key: trial.lr for key, trial in tool.chosen(found).items()} == {
        ("dense", 0.0): 0.03,
        ("hydra", 0.99): 0.1,
        ("hydra", 0.90): 0.03,
        ("bcs", 0.99): 0.1,  # the better run failed
    }


def test_time_of_a_network_does_not_count_the_dense_network_twice(tool, records):
    seconds = {(t.method, t.lr): t.seconds for t in tool.trials(*records)}
    assert seconds["hydra", 0.1] == 5.0
    assert seconds["dense", 0.1] == 10.0
    assert seconds["bcs", 0.1] == 7.0


def test_table_marks_edges_failures_and_what_is_missing(tool, records):
    lines = tool.table(list(tool.trials(*records)))
    assert "| HYDRA | 99% | 30.0 | 32.0 | 31.0 | 0.1 |" in lines
    assert "| HYDRA | 90% | 40.0 | 39.0 | n/a | 0.03 (edge) |" in lines
    assert "| BCS | 99% | n/a | 20.0 | 25.0 § | 0.1 (edge) |" in lines


def test_printed_params_are_those_of_a_block(tool, records):
    """HYDRA's rate is that of finetuning; its score training has the same rate in all variants."""
    text = "\n".join(tool.block_params(list(tool.trials(*records))))
    high = yaml.safe_load(text.split("    params: # 99%")[1])
    assert high == {
        "dense": {"pretrain": {"lr": 0.03}},
        "hydra": {"finetune": {"lr": 0.1}},
        "bcs": {"train": {"lr": 0.1}},
    }
    low = yaml.safe_load(text.split("    params: # 90%")[1].split("    params:")[0])
    assert low == {"dense": {"pretrain": {"lr": 0.03}}, "hydra": {"finetune": {"lr": 0.03}}}
