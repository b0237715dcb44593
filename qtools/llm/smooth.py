"""Outliers of activations moved into weights: the same network, whose activations are easier to quantize.

Every channel that a linear layer reads is divided by a factor where it is made, and multiplied by it in the weights
that read it (SmoothQuant: G. Xiao et al., ICML 2023, section 4).  A Llama makes channels in four places that let a
factor through exactly: both norms, the values (attention mixes tokens, not channels), and up_proj (which the gate only
multiplies).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from qtools.llm.checkpoint import Config
from qtools.llm.evaluate import perplexity
from qtools.llm.llama import Llama, Taps

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 1e-5  # of a peak: below it a channel is as good as empty, and keeps its size


def peaks(model: Llama, windows: Tensor, *, progress: bool = False) -> dict[str, Tensor]:
    """Largest magnitude of every channel (inputs,) that each linear layer reads, over windows of tokens."""
    found: dict[str, Tensor] = {}

    def look(name: str, x: Tensor) -> Tensor:
        new = x.abs().flatten(0, -2).amax(0)
        found[name] = new.maximum(found.get(name, new))
        return x

    perplexity(model, windows, Taps(input=look), progress=progress)
    return found


def smoothed(model: Llama, peaks: Mapping[str, Tensor], alpha: Callable[[str], float]) -> Llama:
    """The same function from other weights, whose linear layers read channels of more equal size.

    Parameters
    ----------
    model : Llama
    peaks : mapping of str to Tensor (inputs,)
        As the function of that name finds them.
    alpha : callable
        Takes the name of a weight; how much of the outliers moves into it: the factor of a channel is
        ``peak**alpha / weight_peak**(1 - alpha)`` (equation 4).  Layers that read the same channels get that of the
        first of them.

    Raises
    ------
    ValueError
        If an alpha lies outside 0 and 1.
    """
    import torch

    changed: dict[str, Tensor] = {}

    def weight(name: str) -> Tensor:
        return changed.get(name, model.weights[name]).float()

    for maker, readers in _places(model.config):
        share = alpha(readers[0])
        if not 0 <= share <= 1:
            raise ValueError(f"alpha must lie in 0..1, got {share} for {readers[0]}")
        inputs, columns = peaks[readers[0]], torch.cat([weight(name) for name in readers]).abs().amax(0)
        times = model.config.num_attention_heads // model.config.num_key_value_heads
        grouped = maker.endswith("v_proj.weight")
        if grouped:  # a channel of the values is read once by every head of its group
            inputs, columns = (_heads(part, model.config, times).amax(1).flatten() for part in (inputs, columns))
        usable = (inputs > _TINY) & (columns > _TINY)
        factor = (inputs**share / columns ** (1 - share)).where(usable, 1.0)
        made = weight(maker)
        changed[maker] = made / (factor[:, None] if made.ndim == 2 else factor)
        spread = _heads(factor, model.config, 1).expand(-1, times, -1).flatten() if grouped else factor
        changed |= {name: weight(name) * spread for name in readers}
    return model.with_weights(changed)


def _places(config: Config) -> Iterator[tuple[str, list[str]]]:
    """The weights that make channels, row by row, each with those that read them, column by column."""
    for layer in range(config.num_hidden_layers):
        q, k, v, o, gate, up, down = config.linears(layer)
        yield f"model.layers.{layer}.input_layernorm.weight", [q, k, v]
        yield v, [o]
        yield f"model.layers.{layer}.post_attention_layernorm.weight", [gate, up]
        yield up, [down]


def _heads(x: Tensor, config: Config, times: int) -> Tensor:
    return x.reshape(config.num_key_value_heads, times, config.head_dim)
