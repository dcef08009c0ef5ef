"""Repairs of dependencies are applied only where they are needed."""

import importlib.util
import sys

import pytest

REPAIRED = """
from robsparse.thirdparty import torchvision_repair as repair
module = repair.import_torchvision()
print(module.__name__, len(repair._declared))
assert repair.import_torchvision() is module
"""
# What torchvision does with the operators of its library when it is imported.
USES_OPERATORS = """
import torch
@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, threshold): ...
@torch.library.register_fake("torchvision::qnms")
def qnms(dets, scores, threshold): ...
"""
# A torchvision whose own library loads and defines them.
LOADS_ITS_LIBRARY = """
import torch
schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
library = torch.library.Library("torchvision", "DEF")
library.define("nms" + schema)
library.define("qnms" + schema)
"""


@pytest.fixture
def python(project):
    def call(code):
        environment = {"PYTHONPATH": str(project.root / "fakes")}
        return project.run(sys.executable, "-W", "ignore", "-c", code, **environment)

    return call


def fake(project, text):
    package = project.root / "fakes" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(text)


def test_torchvision_imports_and_its_transforms_work(python):
    done = python(
        "from robsparse.thirdparty.torchvision_repair import import_torchvision\n"
        "import_torchvision()\n"
        "import torch, torchvision.datasets, torchvision.transforms as T\n"
        "print(T.RandomCrop(4, padding=1)(torch.rand(1, 6, 6)).shape)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([1, 4, 4])"


def test_torchvision_is_repaired_where_its_library_cannot_load(project, python):
    fake(project, USES_OPERATORS)
    done = python(REPAIRED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torchvision", "1"]


def test_torchvision_is_left_alone_where_its_library_loads(project, python):
    fake(project, LOADS_ITS_LIBRARY + USES_OPERATORS)
    done = python(REPAIRED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torchvision", "0"]


@pytest.mark.parametrize("error", ["RuntimeError('something else')", "ImportError('no wheel')"])
def test_other_failures_of_torchvision_are_not_hidden(error, project, python):
    fake(project, f"raise {error}")
    done = python(REPAIRED)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(error.partition("(")[0])


@pytest.mark.skipif(
    importlib.util.find_spec("robustbench") is None, reason="the extra is not installed"
)
def test_robustbench_imports_with_our_autoattack(python):
    done = python(
        "from robsparse.thirdparty.robustbench_repair import import_robustbench\n"
        "module = import_robustbench()\n"
        "import autoattack, pyautoattack\n"
        "from autoattack import AutoAttack\n"
        "from robustbench.utils import clean_accuracy, load_model\n"
        "print(module.__name__, autoattack is pyautoattack)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["robustbench", "True"]


def test_missing_robustbench_says_what_to_install(python):
    done = python(
        "import sys\n"
        "sys.modules['robustbench'] = None\n"
        "from robsparse.base.errors import UsageError\n"
        "from robsparse.thirdparty.robustbench_repair import import_robustbench\n"
        "try:\n"
        "    import_robustbench()\n"
        "except UsageError as error:\n"
        "    print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    assert "pip install 'robsparse[robustbench]'" in done.stdout


def test_core_never_loads_torchvision_or_robustbench(python):
    done = python(
        "import sys\n"
        "import robsparse.training.loop, robsparse.evaluation.evaluate, robsparse.tools.planning\n"
        "from robsparse.base import registry\n"
        "for kind in registry.PACKAGES:\n"
        "    for name in registry.names(kind):\n"
        "        registry.load(kind, name)\n"
        "print([name for name in ('torchvision', 'robustbench') if name in sys.modules])\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


needs_robustbench = pytest.mark.skipif(
    importlib.util.find_spec("robustbench") is None, reason="the extra is not installed"
)


@needs_robustbench
def test_robustbench_counts_the_same_clean_accuracy(python):
    done = python(
        "import torch\n"
        "from robsparse import models; from robsparse.base import registry\n"
        "from robsparse.datasets import Part\n"
        "from robsparse.evaluation.tally import correct_flags\n"
        "from robsparse.thirdparty.robustbench_repair import import_robustbench\n"
        "import_robustbench()\n"
        "from robustbench.utils import clean_accuracy\n"
        "torch.manual_seed(0)\n"
        "params = registry.entry('arch', 'small_cnn').params()\n"
        "model = models.build('small_cnn', params, (3, 32, 32), 10).eval()\n"
        "x = torch.rand(103, 3, 32, 32)\n"
        "with torch.no_grad():\n"
        "    y = torch.where(torch.rand(103) < 0.6, model(x).argmax(1), 0)\n"
        "ours = correct_flags(model, Part(x, y), 17, torch.device('cpu'))\n"
        "print(int(ours.sum()), round(clean_accuracy(model, x, y, batch_size=10) * 103))\n"
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = done.stdout.split()[-2:]
    assert ours == theirs
    assert 40 < int(ours) < 103


@needs_robustbench
@pytest.mark.parametrize(
    ("name", "dataset", "message"),
    [
        ("Sehwag2020Hydr", "cifar10", "nearest match: 'Sehwag2020Hydra'"),
        ("Sehwag2020Hydra", "digits", "has no networks for digits"),
        ("Sehwag2020Hydra", "cifar10", "could not download it (OSError: no network)"),
    ],
)
def test_zoo_refusals_are_one_line(name, dataset, message, python):
    done = python(
        "from robsparse.base.errors import UsageError\n"
        "from robsparse.thirdparty import zoo\n"
        "zoo.import_robustbench()\n"
        "import robustbench.utils\n"
        "def offline(*words, **options): raise OSError('no network')\n"
        "robustbench.utils.load_model = offline\n"
        "try:\n"
        f"    zoo.load('{name}', '{dataset}', 'Linf')\n"
        "except UsageError as error:\n"
        "    print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    assert message in done.stdout.splitlines()[-1]


@needs_robustbench
def test_a_network_of_the_zoo_is_evaluated_like_any_other(project, python):
    done = python(
        "import sys, torch\n"
        "from robsparse import models; from robsparse.base import registry\n"
        "from robsparse.thirdparty import zoo\n"
        "zoo.import_robustbench()\n"
        "import robustbench.utils, robsparse.datasets as datasets\n"
        "params = registry.entry('arch', 'small_cnn').params()\n"
        "net = models.build('small_cnn', params, (1, 8, 8), 10)\n"
        "robustbench.utils.load_model = lambda *w, **o: net\n"
        "digits = datasets.load\n"
        "def load(name, p):\n"
        "    return digits('digits', registry.entry('dataset', 'digits').params())\n"
        "datasets.load = load\n"
        "from robsparse.cli.main import main\n"
        "sys.exit(main(['evaluate', '--zoo', 'Sehwag2020Hydra', '--dataset', 'cifar10',\n"
        "               '--attacks', 'clean', '--n-examples', '10']))\n"
    )
    assert done.returncode == 0, done.stderr
    assert "prunable weights are nonzero" in done.stdout
    assert (project.root / "results/zoo/Sehwag2020Hydra.Linf-0.03137.evaluation.json").exists()
