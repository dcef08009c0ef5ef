"""Settings of training: of a stage, and those that all methods share. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from robsparse.schema.fields import CONTENT, Radius, Share, Strict
from robsparse.schema.imagesets import Augmentation
from robsparse.schema.threat import Crafting, Precision

Objective = Literal["natural", "at", "mat", "trades", "mart", "rst"]

MOST_EPOCHS, LARGEST_LR = 100_000, 1000


class Fit(Strict):
    """How one stage is optimised: SGD with momentum, a learning-rate schedule, weight decay.

    epochs: passes over the training images.
    lr: initial learning rate.
    momentum: share of the old velocity that a step keeps.
    weight_decay: strength of the weight decay; see decay.
    milestones: step schedule: shares of all steps after which lr drops.
    schedule: "cosine" lowers lr at every step. "cosine_epochs" lowers it once for each epoch, and
        one epoch late, as HYDRA's authors do: in epoch e = 0, 1, ... of E, lr is multiplied by
        (1 + cos(pi (e - 1) / E)) / 2.
    velocity: "torch" adds up gradients and multiplies the sum by the current lr. "tensorflow" adds
        up lr * gradient, so that a drop of lr does not change earlier terms of the sum. Both are
        the same while lr is constant.
    decay: "coupled" adds weight_decay * w to the gradient (torch SGD). "sgdw" multiplies every
        trained tensor by 1 - weight_decay * lr / lr_0 before the step, as the optimiser of the BCS
        authors does; lr_0 is the initial lr. Both are equal in steady state when lr is 0.1 and
        momentum 0.9.
    """

    epochs: PositiveInt
    lr: PositiveFloat
    schedule: Literal["constant", "cosine", "cosine_epochs", "step"] = "cosine"
    milestones: tuple[Share, ...] = Field(
        (0.5, 0.75), description="step schedule: shares of all steps after which lr drops"
    )
    gamma: float = Field(0.1, gt=0, le=1, description="step schedule: factor of each drop")
    warmup: NonNegativeInt = Field(0, description="epochs in which lr rises linearly from 0")
    clean_passes: Literal[0, 1, 2] = Field(
        0,
        description="further passes over the clean batch at each step, in train mode: they move "
        "the statistics of batch norm and count as cost; 1: before crafting (as HARP's and ADMM's "
        "authors do), 2: also after the passes of the loss (as HYDRA's authors do)",
    )
    momentum: Share = 0.9
    nesterov: bool = Field(
        False,
        description="Nesterov momentum as torch has it (Sutskever et al., ICML 2013): the step is "
        "along gradient + momentum * velocity, with the velocity that already holds the gradient",
    )
    velocity: Literal["torch", "tensorflow"] = "torch"
    weight_decay: float = Field(1e-4, ge=0)
    decay: Literal["coupled", "sgdw"] = "coupled"

    @model_validator(mode="after")
    def _check_values(self) -> "Fit":
        """Check the values here and not in the fields: a subclass may redefine a field."""
        drops = list(self.milestones)
        for key, wrong, expected in (
            ("epochs", self.epochs > MOST_EPOCHS, f"at most {MOST_EPOCHS} epochs"),
            ("lr", self.lr > LARGEST_LR, f"a learning rate of at most {LARGEST_LR}"),
            ("weight_decay", self.weight_decay >= 1, "less than 1: the share that a step takes"),
            (
                "nesterov",
                self.nesterov and not self.momentum,
                "false, because momentum is 0",
            ),
            ("milestones", drops != sorted(set(drops)), "ascending shares, like [0.5, 0.75]"),
            (
                "warmup",
                self.warmup >= self.epochs,
                f"fewer epochs of warm-up than the {self.epochs} of the stage",
            ),
        ):
            if wrong:
                context = {"key": key, "expected": expected}
                raise PydanticCustomError("stage", "expected {expected}", context)
        return self


class FromScratch(Fit):
    """The usual schedule of adversarial training from scratch: 200 epochs, lr 0.1, drops at 50 and
    75 %, weight decay 5e-4 (Rice et al., ICML 2020; the BCS authors' in steady state).
    """

    epochs: PositiveInt = 200
    lr: PositiveFloat = 0.1
    schedule: Literal["constant", "cosine", "cosine_epochs", "step"] = "step"
    weight_decay: float = Field(5e-4, ge=0)


class Finetune(Fit):
    """HYDRA's finetuning of a pruned network: 100 epochs, lr 0.01, cosine, weight decay 1e-4."""

    epochs: PositiveInt = 100
    lr: PositiveFloat = 0.01


class ScorePerturbation(Strict):
    """Perturbation of importance scores in the mask search (S2AP)."""

    gamma: float = Field(
        gt=0,
        le=1,
        description="length of the perturbation, as a share of the norm of a layer's scores; its "
        "authors choose it for each network",
    )
    warmup: NonNegativeInt = Field(5, description="first epochs of the stage without it")


class ScoreTraining(Fit):
    """Training of importance scores by HYDRA and HARP: 20 epochs, lr 0.1, cosine."""

    epochs: PositiveInt = 20
    lr: PositiveFloat = 0.1
    s2ap: ScorePerturbation | None = Field(
        None, description="compute the gradients at perturbed scores; none: at the scores"
    )

    @model_validator(mode="after")
    def _check_s2ap(self) -> "ScoreTraining":
        if self.s2ap and self.s2ap.warmup >= self.epochs:
            expected = f"s2ap.warmup of fewer epochs than the {self.epochs} of the stage"
            context = {"key": "s2ap", "expected": expected}
            raise PydanticCustomError("stage", "expected {expected}", context)
        return self


class FlyingBirdParams(Strict):
    """Settings of Flying Bird and Flying Bird+. The defaults are the authors'.

    train: how the network is trained.
    """

    train: FromScratch = FromScratch()
    init: Literal["quotas", "erk"] = Field(
        "quotas", description="densities of layers: ideal gas quotas, or Erdos-Renyi-Kernel"
    )
    growth: Literal["random", "gradient"] = Field(
        "random", description="where weights are grown: at random, or where gradients are largest"
    )
    death_rate: float = Field(0.5, gt=0, lt=1, description="share of each layer exchanged at first")
    update_every: PositiveInt = Field(900, description="steps between exchanges, first half")
    late_update_every: PositiveInt = Field(1200, description="steps between exchanges, second half")


class WeightAveraging(Strict):
    """Exponential moving average of the weights. It is validated, selected and exported."""

    decay: Share = Field(
        0.995, description="share of the old average that a step keeps, fewer in the first steps"
    )


class WeightPerturbation(Strict):
    """Adversarial weight perturbation (AWP)."""

    gamma: float = Field(
        0.005, gt=0, le=1, description="length of the perturbation, as a share of a layer's norm"
    )
    warmup: NonNegativeInt = Field(0, description="first epochs of each stage without it")


class Validation(Strict):
    """Accuracy on held-out training images; it selects the weights.

    `best_val` is the epoch with the best accuracy under PGD, `best_clean` that without attack.

    steps: steps of PGD, with one random start.
    """

    steps: PositiveInt = 10
    every: PositiveInt = Field(1, description="epochs between two validations")


class Training(Strict):
    """Settings of training that all methods share.

    batch_size: images of a step.
    crafting: how adversarial images are made.
    validation: how networks are validated on held-out images.
    """

    batch_size: PositiveInt = 128
    crafting: Crafting
    precision: Precision = Field(
        "auto", description="number format of the training pass (weights and updates: fp32)"
    )
    sparse_compute: Literal["auto", "off"] = Field(
        "off",
        description="training pass on a CPU. auto: convolutions with a known mask multiply active "
        "weights only, where this is faster; off: always dense (both are equal up to rounding)",
    )
    eps: Radius | None = Field(
        None,
        description="radius in training and validation, if it differs from that of the threat",
    )
    augmentation: Augmentation | None = Field(
        None, description="augmentation of training images, in place of that of the data set"
    )
    beta: PositiveFloat = Field(6.0, description="weight of the KL term of TRADES and MART")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="probability that the other classes share in the target of the cross entropy; "
        "images are crafted against the plain label",
    )
    ema: WeightAveraging | None = Field(
        None, description="average the weights of each stage; none: the trained weights themselves"
    )
    awp: WeightPerturbation | None = Field(
        None, description="compute the gradients at adversarially perturbed weights; none: at w"
    )
    rst_file: Annotated[str | None, CONTENT] = Field(
        None, description="rst: npz of pseudo-labelled extra images, arrays `images` and `labels`"
    )
    rst_fraction: Share = Field(
        0.5, description="rst: share of each batch that is pseudo-labelled, in [0,1)"
    )
    synthetic_file: Annotated[str | None, CONTENT] = Field(
        None,
        description="npz of further images for every objective except rst, arrays `image` and "
        "`label` or `images` and `labels`",
    )
    synthetic_fraction: Share = Field(
        0.7, description="share of each batch that comes from synthetic_file, in [0,1)"
    )
    collapse_after: NonNegativeInt = Field(
        10,
        description="number of validations in a row with the accuracy of guessing the largest "
        "class, after which training stops and the result is marked; 0: never stop",
    )
    log_every: PositiveInt = Field(
        1, description="number of steps in one row of the log of rewiring"
    )
    validation: Validation = Validation()

    def extra_images(self, objective: str) -> tuple[str, float] | None:
        """Return the file of further training images and their share of a batch, or None."""
        if objective == "rst":
            return self.rst_file or "", self.rst_fraction
        if self.synthetic_file is None:
            return None
        return self.synthetic_file, self.synthetic_fraction
