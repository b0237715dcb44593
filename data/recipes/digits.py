"""Train a network for scikit-learn's digits from scratch, or make the skewed twin of a trained one.

    python data/recipes/digits.py train mini.safetensors
    python data/recipes/digits.py skew mini.safetensors skew.safetensors

Training takes about 10 s on one core.  The order of additions differs from computer to computer, and so do the weights
that come out; what `skew` makes of given weights is the same everywhere.
"""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from qtools.zoo.digits import digits, digits_module

# A BatchNorm and the convolution that reads what it wrote, through an activation that lets a positive factor pass.
PAIRS = (
    *(("bn", "b1.dw"), ("b1.bn1", "b1.pw"), ("b1.bn2", "b2.dw")),
    *(("b2.bn1", "b2.pw"), ("b2.bn2", "b3.dw"), ("b3.bn1", "b3.pw")),
)
BATCH, PEAK_RATE, MOMENTUM, DECAY = 64, 0.1, 0.9, 5e-4


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: layers this small gain nothing from a second one, and may wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def train(epochs: int = 40, seed: int = 0) -> nn.Module:
    """A trained network with ReLU6, in eval mode: SGD with momentum and a one-cycle schedule."""
    images, labels, _, _ = (torch.from_numpy(array) for array in digits())
    torch.manual_seed(seed)
    network = digits_module("mini", trained=False).train()
    optimizer = torch.optim.SGD(network.parameters(), PEAK_RATE, momentum=MOMENTUM, weight_decay=DECAY)
    steps = -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, epochs=epochs, steps_per_epoch=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def skewed(weights: Mapping[str, np.ndarray], seed: int = 42) -> dict[str, np.ndarray]:
    """The same function from other weights, once ReLU6 is ReLU: channel c times 2**u[c], u uniform in -3..3.

    The factor goes into a channel's BatchNorm, and out of it again in the weights that read the channel.  The outputs
    of the last convolution stay as they are.
    """
    rng, result = np.random.default_rng(seed), dict(weights)
    for norm, reader in PAIRS:
        factor = (2 ** rng.uniform(-3, 3, len(result[f"{norm}.weight"]))).astype(np.float32)
        for part in ("weight", "bias"):
            result[f"{norm}.{part}"] = result[f"{norm}.{part}"] * factor
        # A depthwise convolution has one filter for each channel it reads, another one a column of each filter.
        along = (-1, 1, 1, 1) if reader.endswith(".dw") else (1, -1, 1, 1)
        result[f"{reader}.weight"] = result[f"{reader}.weight"] / factor.reshape(along)
    return result


@torch.no_grad()
def right(network: nn.Module) -> int:
    """How many of the 540 test digits a network reads right."""
    _, _, images, labels = (torch.from_numpy(array) for array in digits())
    return int((network(images).argmax(1) == labels).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the network for the digits, or skew a trained one.")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="from scratch")
    training.add_argument("--epochs", type=int, default=40)
    training.add_argument("--seed", type=int, default=0)
    skewing = commands.add_parser("skew", help="the same function from channels of very different size")
    skewing.add_argument("source", help="checkpoint of a trained network")
    for command in (training, skewing):
        command.add_argument("target", help="checkpoint to write")
    args = parser.parse_args()
    if args.command == "train":
        network = train(args.epochs, args.seed)
        weights = {key: tensor.numpy() for key, tensor in network.state_dict().items()}
    else:
        weights = skewed(load_file(args.source))
        network = digits_module("skew", trained=False)
        network.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    save_file(weights, args.target)
    print(f"{right(network)} of 540 test digits right; weights in {args.target}")


if __name__ == "__main__":
    main()
