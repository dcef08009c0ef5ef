"""Adversarial training of sparse networks as public implementations write it: the rival of `bench`.

Plain on purpose: masks multiplied in again on every forward pass, fp32, NCHW, batch norm on its
own, images through PIL one at a time, bookkeeping over all weights. No trick, and no mistake.
"""

import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class MaskedConv2d(nn.Conv2d):
    """weight * mask, formed in every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class MaskedLinear(nn.Linear):
    """weight * mask, formed in every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class SampledConv2d(nn.Conv2d):
    """sign * relu(theta), formed in every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.sign * torch.relu(self.weight), self.bias)


class SampledLinear(nn.Linear):
    """sign * relu(theta), formed in every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.sign * torch.relu(self.weight), self.bias)


class ScoredConv2d(nn.Conv2d):
    """weight * (score among the largest), sorted in every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * TopShare.apply(self.score, self.keep), self.bias)


class ScoredLinear(nn.Linear):
    """weight * (score among the largest), sorted in every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * TopShare.apply(self.score, self.keep), self.bias)


class TopShare(torch.autograd.Function):
    """1 for the largest |scores|, 0 for the others; the gradient goes straight through."""

    @staticmethod
    def forward(_, score: Tensor, keep: float) -> Tensor:
        mask = torch.zeros_like(score)
        order = score.abs().flatten().sort().indices
        mask.flatten()[order[int((1 - keep) * score.numel()) :]] = 1
        return mask

    @staticmethod
    def backward(_, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


KINDS = {
    "masked": (MaskedConv2d, MaskedLinear),
    "sampled": (SampledConv2d, SampledLinear),
    "scored": (ScoredConv2d, ScoredLinear),
}


def sparsify(model: nn.Module, kind: str, density: float) -> nn.Module:
    """Turn every convolution and linear layer into its sparse kind, at random."""
    conv, linear = KINDS[kind]
    for module in model.modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        module.__class__ = conv if isinstance(module, nn.Conv2d) else linear
        live = (torch.rand_like(module.weight) < density).float()
        if kind == "masked":
            module.register_buffer("mask", live)
        if kind == "sampled":
            module.register_buffer("sign", module.weight.detach().sign())
            module.weight.data = module.weight.detach().abs() * live
        if kind == "scored":
            module.score = nn.Parameter(torch.rand_like(module.weight))
            module.keep = density
            module.weight.requires_grad_(False)
    return model


def pgd(model: nn.Module, x: Tensor, y: Tensor, threat: tuple) -> Tensor:
    """PGD in eval mode from a random start; threat is (eps, step, steps)."""
    eps, step, steps = threat
    model.eval()
    adversarial = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        adversarial.requires_grad_(True)
        with torch.enable_grad():
            loss = F.cross_entropy(model(adversarial), y)
        gradient = torch.autograd.grad(loss, [adversarial])[0]
        adversarial = adversarial.detach() + step * torch.sign(gradient.detach())
        adversarial = torch.min(torch.max(adversarial, x - eps), x + eps)
        adversarial = torch.clamp(adversarial, 0.0, 1.0)
    return adversarial.detach()


def pgd_of_many(
    model: nn.Module, stacked: tuple[dict, dict], x: Tensor, y: Tensor, threat: tuple
) -> Tensor:
    """PGD as above on several networks of one architecture at once, by vmap.

    stacked: their parameters and buffers, as torch.func.stack_module_state gives them; model: any
    one of them, for its layers. Returns the images of each network (networks x N x C x H x W).
    """
    eps, step, steps = threat
    networks = len(next(iter(stacked[0].values())))
    gradient_of = torch.func.vmap(torch.func.grad(_loss_of(model, y), argnums=2))
    model.eval()
    x = x.expand(networks, *x.shape)
    adversarial = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        gradient = gradient_of(*stacked, adversarial)
        adversarial = adversarial + step * torch.sign(gradient.detach())
        adversarial = torch.min(torch.max(adversarial, x - eps), x + eps)
        adversarial = torch.clamp(adversarial, 0.0, 1.0)
    return adversarial.detach()


def _loss_of(model: nn.Module, y: Tensor) -> Callable[[dict, dict, Tensor], Tensor]:
    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, (parameters, buffers), images), y)

    return loss


def at_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, threat: tuple
) -> None:
    """One step on adversarial images; threat is (eps, step, steps)."""
    adversarial = pgd(model, x, y, threat)
    model.train()
    optimizer.zero_grad()
    F.cross_entropy(model(adversarial), y).backward()
    optimizer.step()


def at_step_of_many(
    model: nn.Module,
    stacked: tuple[dict, dict],
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    threat: tuple,
) -> None:
    """One step on adversarial images for each of several networks at once (see pgd_of_many)."""
    x, y = batch
    adversarial = pgd_of_many(model, stacked, x, y, threat)
    model.train()
    gradients = torch.func.vmap(torch.func.grad(_loss_of(model, y)))(*stacked, adversarial)
    for name, parameter in stacked[0].items():
        parameter.grad = gradients[name].detach()
    optimizer.step()


def trades_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, threat: tuple
) -> None:
    """One step of TRADES with beta 6; threat is (eps, step, steps)."""
    eps, step, steps = threat
    criterion = nn.KLDivLoss(reduction="sum")
    model.eval()
    adversarial = x.detach() + 0.001 * torch.randn(x.shape, device=x.device)
    for _ in range(steps):
        adversarial.requires_grad_(True)
        with torch.enable_grad():
            loss = criterion(F.log_softmax(model(adversarial), dim=1), F.softmax(model(x), dim=1))
        gradient = torch.autograd.grad(loss, [adversarial])[0]
        adversarial = adversarial.detach() + step * torch.sign(gradient.detach())
        adversarial = torch.min(torch.max(adversarial, x - eps), x + eps)
        adversarial = torch.clamp(adversarial, 0.0, 1.0)
    model.train()
    optimizer.zero_grad()
    logits = model(x)
    robust = criterion(F.log_softmax(model(adversarial.detach()), dim=1), F.softmax(logits, dim=1))
    (F.cross_entropy(logits, y) + 6.0 * robust / len(x)).backward()
    optimizer.step()


def rewire(model: nn.Module, density: float, lr: float) -> None:
    """Noise on all theta, and as many regrown as died: all dormant positions are shuffled."""
    layers = [m for m in model.modules() if isinstance(m, SampledConv2d | SampledLinear)]
    with torch.no_grad():
        for layer in layers:
            noise = torch.randn_like(layer.weight) * (layer.weight > 0)
            layer.weight.add_(noise, alpha=lr * 1e-6)
        sizes = torch.tensor([layer.weight.numel() for layer in layers], dtype=torch.float64)
        live = sum(int((layer.weight > 0).sum()) for layer in layers)
        missing = max(0, round(density * float(sizes.sum())) - live)
        chosen = torch.zeros(0).long()
        if missing:
            chosen = torch.multinomial(sizes, missing, replacement=True)
        counts = torch.bincount(chosen, minlength=len(layers))
        for layer, count in zip(layers, counts.tolist(), strict=True):
            dormant = (layer.weight <= 0).flatten().nonzero().squeeze(1)
            order = torch.randperm(len(dormant), device=dormant.device)
            layer.weight.view(-1)[dormant[order[:count]]] = 1e-12


class Images(Dataset):
    """uint8 images, one PIL image at a time: padded by 4, cropped, flipped, made a tensor."""

    def __init__(self, images_NHWC: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images_NHWC, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = ImageOps.expand(Image.fromarray(self.images[index]), border=4)
        side = self.images.shape[1]
        top, left = random.randint(0, 8), random.randint(0, 8)
        image = image.crop((left, top, left + side, top + side))
        if random.random() < 0.5:
            image = ImageOps.mirror(image)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return x, int(self.labels[index])


def batches(images: np.ndarray, labels: np.ndarray, size: int, workers: int) -> Iterator:
    """Shuffled batches of one epoch."""
    loader = DataLoader(Images(images, labels), size, shuffle=True, num_workers=workers)
    return iter(loader)
