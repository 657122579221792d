"""A model, not a measurement: what speculation brings on a GPU, from acceptance measured elsewhere.

A forward pass over n tokens of B requests with S committed tokens each takes

    T(n) = (W / bandwidth + n 2 P / rate) / efficiency + B S K / bandwidth

for W bytes of weights, P parameters and K bytes of cache per token. Reading and multiplying are
added: on an H100 the linear model that vLLM's developers fitted to measured passes of Llama-3.1-8B
has both terms, 5.886 ms + 21.0 µs a token + 39.3 ns a cached token. `EFFICIENCY` is what brings the
datasheet's rates to these figures. Speculation with trees of N nodes, of which a step keeps tau
tokens, is then faster by

    tau (T(B) + host) / (T(B N) + draft + host).

Source: the speedup formula of Leviathan et al., 2211.17192, with measured T instead of constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..bench.roofline import GPUS, Gpu

EFFICIENCY = 0.8
CARDS = (
    *GPUS,
    Gpu(
        "NVIDIA GeForce RTX 4090",
        1008,
        165_200,
        "NVIDIA Ada GPU architecture whitepaper, dense, float32 sums",
    ),
    Gpu(
        "NVIDIA GeForce RTX 5090",
        1792,
        209_500,
        "NVIDIA RTX Blackwell GPU architecture whitepaper, dense, float32 sums",
    ),
)


@dataclass(frozen=True, slots=True)
class Target:
    """A large model.

    Attributes:
        name: for the page.
        parameters: P; each takes part in one multiplication and addition per token.
        weight_bytes: W.
        cache_bytes: K, keys and values of one token in all layers.
    """

    name: str
    parameters: float
    weight_bytes: float
    cache_bytes: float


LLAMA_8B = Target("Llama-3.1-8B, bfloat16", 8.03e9, 16.06e9, 2 * 32 * 8 * 128 * 2)
HOST_SECONDS = 1.2e-3
"""Of a serving step beside the GPU, in the same fit."""


def pass_seconds(gpu: Gpu, target: Target, tokens: int, cached_tokens: int) -> float:
    """T: one forward pass over `tokens`, which attend to `cached_tokens` in all.

    Returns:
        seconds.
    """
    bandwidth, rate = gpu.bandwidth_gbs * 1e9, gpu.bf16_gflops * 1e9
    weights = target.weight_bytes / bandwidth + tokens * 2 * target.parameters / rate
    return weights / EFFICIENCY + cached_tokens * target.cache_bytes / bandwidth


def speedup(
    gpu: Gpu,
    target: Target,
    kept: Mapping[int, float],
    *,
    batch: int,
    context: int,
    draft_seconds: float = 0.0,
    host_seconds: float = HOST_SECONDS,
) -> tuple[float, int]:
    """Tokens per second with speculation / without, at the best tree size.

    Args:
        kept: N -> tokens per step (tau) of trees of N nodes.
        batch: B requests.
        context: S committed tokens of each.
        draft_seconds: of one step.
        host_seconds: of any step.

    Returns:
        the speedup, at least 1 (N = 1 is plain decoding), and N.
    """
    plain = pass_seconds(gpu, target, batch, batch * context) + host_seconds
    best, size = 1.0, 1
    for nodes, tokens in kept.items():
        step = pass_seconds(gpu, target, batch * nodes, batch * context)
        ratio = tokens * plain / (step + draft_seconds + host_seconds)
        if ratio > best:
            best, size = ratio, nodes
    return best, size
