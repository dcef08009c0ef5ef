"""The textbook loop is right, the stopwatch counts what it says, every case of `bench` runs."""

import dataclasses
import itertools
import json
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import benchmark

from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.compute.perturb import ascend, cross_entropy_of
from robsparse.fast import folding
from robsparse.sparsity.layers import prunable
from robsparse.tools import bench
from robsparse.tools.bench import evaluate, inference, perturb, sides, together
from robsparse.tools.stopwatch import Comparison, Side, Stopwatch, copy_rate, multiply_rate

CPU = torch.device("cpu")
ROW_KEYS = ["case", "unit", "ours", "rival", "rival_name", "ratio", "limit", "limit_share"]
textbook = sides.load_textbook()


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * 25, 3))


def batch(n=6):
    return torch.rand(n, 1, 5, 5), torch.arange(n) % 3


# ---------------------------------------------------------------- the textbook


def test_textbook_pgd_gives_our_images_from_the_same_start():
    model, (x, y) = network(), batch()
    torch.manual_seed(5)
    start = (x + torch.empty_like(x).uniform_(-0.1, 0.1)).clamp(0, 1)
    torch.manual_seed(5)
    theirs = textbook.pgd(model, x, y, (0.1, 0.03, 7))
    loss = cross_entropy_of(y)
    ours = ascend(model.eval(), x, start, loss, eps=0.1, step_size=0.03, steps=7)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_textbook_step_of_many_networks_is_that_of_each():
    """Batch norm while training, momentum; the start is at x, so that both craft the same."""
    models, (x, y) = [network(), network()], batch()
    with torch.no_grad():
        models[1][0].weight.neg_()
    stacked = torch.func.stack_module_state(models)
    optimizer, threat = torch.optim.SGD(stacked[0].values(), lr=0.1, momentum=0.9), (1e-9, 0, 2)
    for _ in range(3):
        textbook.at_step_of_many(models[0], stacked, optimizer, (x, y), threat)
    for number, model in enumerate(models):
        alone = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            textbook.at_step(model, alone, x, y, threat)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            found = (stacked[0] | stacked[1])[name][number]
            assert torch.allclose(found, tensor, atol=1e-5), name


def test_textbook_pgd_of_many_networks_is_that_of_each(monkeypatch):
    models, (x, y) = [network().eval(), network().eval()], batch()
    with torch.no_grad():
        models[1][0].weight.neg_()
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_: self.zero_())  # starts at x
    stacked = torch.func.stack_module_state(models)
    both = textbook.pgd_of_many(models[0], stacked, x, y, (0.1, 0.03, 5))
    for model, found in zip(models, both, strict=True):
        assert torch.allclose(found, textbook.pgd(model, x, y, (0.1, 0.03, 5)), atol=1e-6)


@pytest.mark.parametrize("step", ["at_step", "trades_step"])
def test_textbook_steps_lower_the_robust_loss(step):
    model, (x, y) = network(), batch(12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def robust_loss():
        adversarial = textbook.pgd(model, x, y, (0.05, 0.02, 5))
        return F.cross_entropy(model(adversarial), y).item()

    before = robust_loss()
    for _ in range(15):
        getattr(textbook, step)(model, optimizer, x, y, (0.05, 0.02, 3))
    assert robust_loss() < 0.9 * before


@pytest.mark.parametrize("kind", ["masked", "sampled", "scored"])
def test_textbook_layers_have_their_density(kind):
    model = textbook.sparsify(nn.Sequential(nn.Linear(200, 100), nn.ReLU()), kind, 0.1)
    outputs = model[0](torch.eye(200)) - model[0].bias
    assert 0.08 < (outputs != 0).float().mean() < 0.12
    if kind == "scored":
        assert int((outputs != 0).sum()) == 2000
        outputs.sum().backward()
        assert model[0].score.grad.count_nonzero() == 20_000  # straight through
        assert not model[0].weight.requires_grad


def test_textbook_rewiring_restores_the_budget():
    model = textbook.sparsify(nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 30)), "sampled", 0.2)
    weights = [layer.weight for layer in model]
    sides.make_dormant(weights)
    textbook.rewire(model, 0.2, 0.1)
    live = sum(int((weight > 0).sum()) for weight in weights)
    assert abs(live - round(0.2 * (50 * 40 + 40 * 30))) <= 40  # sparsify draws, it does not count
    for weight in weights:
        weight.data.clamp_(max=0)
    textbook.rewire(model, 0.2, 0.1)
    assert sum(int((weight > 0).sum()) for weight in weights) == 640


def test_textbook_images_are_windows_of_the_padded_one():
    image = np.arange(1, 28, dtype=np.uint8).reshape(3, 3, 3) * 9
    images = textbook.Images(np.stack([image]), np.array([2]))
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    windows = [padded[i : i + 3, j : j + 3] for i in range(9) for j in range(9)]
    windows += [window[:, ::-1] for window in windows]
    found = {torch.from_numpy(w.copy()).permute(2, 0, 1).float().div(255) for w in windows}
    for _ in range(20):
        x, y = images[0]
        assert y == 2
        assert any(torch.equal(x, window) for window in found)


# ---------------------------------------------------------------- the stopwatch


def test_stopwatch_takes_turns_and_leaves_out_the_first():
    order, clock = [], Stopwatch(CPU, repeats=2)
    pair = [
        Side(lambda: order.append("o"), lambda: order.append("p")),
        Side(lambda: order.append("t")),
    ]
    clock.compare("case", *pair, "rival", count=1)
    assert "".join(order) == "pot" * 3


def test_rates_shares_and_medians(monkeypatch):
    taken = iter([9, 9, 1, 4, 2, 2, 5, 8])
    monkeypatch.setattr(Stopwatch, "time", lambda self, side: (next(taken), 7.0))
    pair = [Side(lambda: None)] * 2
    row = Stopwatch(CPU, 3).compare("case", *pair, "rival", count=20, limit=40)
    assert row == Comparison("case", "images/s", 10, 5, "rival", 2, 40, 0.25, 7.0, 7.0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_memory_is_the_peak_of_the_work_alone():
    clock = Stopwatch(CPU, 1)
    kept = torch.ones(2**24)
    for megabytes in (80, 20):
        _, memory = clock.time(Side(lambda mb=megabytes: torch.ones(mb * 2**18).sum()))
        assert memory == pytest.approx(megabytes, abs=5)
    assert len(kept)


def test_limits_are_rates_of_a_machine():
    assert 1e8 < multiply_rate(CPU, "fp32") < 1e14
    assert 1e7 < copy_rate(CPU) < 1e13


def test_only_the_work_is_timed_and_a_limit_is_the_rate_of_the_shortest_run(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(benchmark, "timer", lambda: next(clock))
    side = Side(lambda: next(clock), lambda: [next(clock) for _ in range(100)])
    assert Stopwatch(CPU, 1).time(side)[0] == 2
    runs = SimpleNamespace(times=[3.0, 2.0, 5.0])
    monkeypatch.setattr(benchmark.Timer, "blocked_autorange", lambda self, **_: runs)
    assert multiply_rate.__wrapped__(CPU, "fp32") == 2048**3


# ---------------------------------------------------------------- the command


def settings(archs=("small_cnn",), precisions=("fp32",), **changes):
    options = {"batch_size": 4, "images": 2, "repeats": 1, "only": ""} | changes
    return bench.settings_of(list(archs), list(precisions), device="cpu", threads=1, **options)


@pytest.mark.parametrize(
    ("case", "only", "rows"),
    [
        ("train", "", 14),  # two objectives: dense, masked, BCS twice and its dense steps, HYDRA
        ("perturb", "", 1),
        ("rewire", "", 4),
        ("data", "", 1),
        ("train", "trades hydra", 1),
        ("sparse", "", 10),  # five sparsities: gradient and step
        ("sparse", "step small_cnn 0.99", 1),
    ],
)
def test_every_case_runs_and_writes_its_rows(case, only, rows, tmp_path, capsys):
    file = tmp_path / "rows.json"
    table = bench.run(case, settings(only=only), file)
    kept = json.loads(file.read_text())["rows"]
    assert len(kept) == rows == table.count("\n| ") - 1
    for row in kept:
        assert list(row)[:8] == ROW_KEYS
        assert row["ratio"] == pytest.approx(row["ours"] / row["rival"])
        assert row["ours"] > 0
        assert only in row["case"]
    assert capsys.readouterr().out.count("\n") == rows + 1


@pytest.mark.parametrize("arch", ["resnet18", "vgg16", "wrn28_4"])
def test_large_networks_have_their_cases(arch):
    [row] = perturb.perturb(settings([arch], batch_size=1))
    assert row.case == f"perturb {arch} fp32"
    assert 0 < row.limit_share < 1.5


def test_evaluation_is_compared_with_the_stock_package(monkeypatch):
    called = []
    monkeypatch.setattr(
        evaluate.AutoAttack,
        "run_standard_evaluation",
        lambda self, x, y, batch_size: called.append(len(x)),
    )
    attack = registry.load("attack", "autoattack")
    monkeypatch.setattr(attack, "run", lambda view, x, y, *_: called.append(len(x)))
    rows = list(evaluate.evaluate(settings()))
    assert called == [2, 2] * 3
    assert [row.case for row in rows] == [f"evaluate small_cnn {s}" for s in ("0", "0.9", "0.99")]
    assert {row.rival_name for row in rows} == {"stock package"}


def test_use_of_an_exported_network_is_compared_with_dense_networks(monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(inference, "BATCHES", (1, 3))
    seen, compare = [], Stopwatch.compare

    def compared(watch, case, *both, **options):
        seen.append(options["count"])
        return compare(watch, case, *both, **options)

    monkeypatch.setattr(Stopwatch, "compare", compared)
    rows = list(inference.inference(settings(only="0.99")))
    assert [row.case for row in rows] == [
        f"inference small_cnn 0.99 batch {n}" for n in (1, 1, 3, 3)
    ]
    assert [row.rival_name for row in rows] == ["dense, torch", "dense, onnxruntime"] * 2
    assert seen == [64, 64, 66, 66]
    assert all(row.ours > 0 for row in rows)


def test_rivals_of_an_exported_network_are_dense_and_give_the_same_logits():
    pytest.importorskip("onnxruntime")
    x, _ = sides.images_of("small_cnn", settings(), 5)
    dense = sides.build("small_cnn", settings()).eval()
    with torch.no_grad():
        expected = dense(x)
    found = inference._in_onnxruntime(dense, "small_cnn", settings())(x)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    loaded = inference._from_file("small_cnn", 0.99, settings())
    weights = [m.weight for m in prunable(loaded).values()]
    assert sum(int(w.count_nonzero()) for w in weights) < 0.011 * sum(w.numel() for w in weights)
    assert folding.runs_on(loaded._view_for(x)) == "view"


def test_several_networks_at_once(monkeypatch):
    monkeypatch.setattr(sides, "TOGETHER", 1)
    rows = list(together.together(dataclasses.replace(settings(), threads=2)))
    assert [row.rival_name for row in rows] == ["one process, in turn", "one process, vmap, fp32"]
    assert all(row.ours > 0 and row.ratio == row.ours / row.rival for row in rows)


def test_a_worker_that_dies_is_an_error_and_no_wait(monkeypatch):
    monkeypatch.setattr(sides, "begin_worker", sys.exit)
    two = dataclasses.replace(settings(), threads=2)
    with sides.processes(None, two) as side, pytest.raises(BrokenProcessPool):
        side.work()


def test_one_thread_has_nothing_to_share_out():
    with pytest.raises(UsageError, match=r"--threads 1: 'together' .* expected 2 or more"):
        bench.run("together", settings(), None)


@pytest.mark.parametrize("place", ["folder", "file/rows.json"])
def test_rows_that_cannot_be_written_are_known_before_the_work(place, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setitem(bench.CASES, "perturb", lambda _: pytest.fail("work began"))
    with pytest.raises(UsageError, match=r"folder, expected|cannot write results"):
        bench.run("perturb", settings(), tmp_path / place)


def test_rewiring_in_the_benchmark_has_something_to_do(monkeypatch):
    begun, made = sides.started, []
    monkeypatch.setattr(sides, "started", lambda *given: made.append(begun(*given)) or made[0])
    side = sides.our_rewiring("small_cnn", 0.9, settings())
    for _ in range(5):
        side.prepare()
        side.work()
    [(_, run)] = made
    table = run.connections.steps().to_pandas()
    assert table.pruned.sum() > 5
    assert table.regrown.sum() >= table.pruned.sum()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arch", "smallcnn"], "nearest match: 'small_cnn'"),
        (["--only", "zzz"], "--only zzz: no case of 'perturb' has that in its name"),
        (["--repeats", "0"], "expected a whole number of at least 1"),
    ],
)
def test_bad_input_is_one_line(words, message):
    command = [sys.executable, "-m", "robsparse", "bench", "perturb", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
