"""One training loop for all drafters: resumable, with its curve on disk."""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import corpus
import torch
from checkpoints import write_checkpoint
from distillation import cross_entropy, teacher_law
from features import Batch, Examples
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from specdec_kernels.drafters.shipped import FINGERPRINT, fingerprint
from specdec_kernels.drafters.trained import TrainedHeads
from specdec_kernels.hf.features import HFTargetView
from specdec_kernels.shapes import PAD

SECONDS_BETWEEN_SAVES = 120.0
WARMUP, LEAST_RATE = 0.04, 0.05
"""Share of the steps in which the rate grows, and what is left of it at the end."""
DEPTH_DECAY = 0.8
"""The loss of each depth weighs so much less than the one before."""


@dataclass(frozen=True, slots=True)
class DepthLoss:
    """Attributes:
    loss: mean over the positions that are learned, nats.
    hit_rate: share of them whose likeliest draft token is the target's likeliest one.
    """

    loss: Tensor
    hit_rate: Tensor


class System(ABC):
    """A drafter in training.

    Args:
        parameters: what is trained, by name: float32 leaves that need a gradient.
        config: of its checkpoint.
        target: whom it drafts for; not trained.
        ids: [U] int64 sorted, the draft vocabulary.
        num_depths: how deep the drafts are that it learns.

    Attributes:
        ids: the draft vocabulary.
        draft_ids: [V] int64, the draft id of each of the target's, PAD where it has none.
        use: the options of `specdec generate` that take what was saved, but for its folder.
        muon: how the names of those matrices begin that Muon trains, not AdamW. Not in float32: it
            multiplies in bfloat16, for which some CPUs have no products.
        muon_rate: its learning rate over AdamW's, which trains the others.
    """

    use = "--drafter heads --heads"
    muon: tuple[str, ...] = ()
    muon_rate = 1.0

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        config: Mapping[str, Any],
        target: HFTargetView,
        ids: Tensor,
        num_depths: int,
    ) -> None:
        self.target, self.config, self.num_depths = target, config, num_depths
        self.parameters = parameters
        self.ids = ids.to(target.device)
        self._rows = target.head_rows(self.ids)
        self.draft_ids = torch.full((target.vocab_size,), PAD, device=target.device)
        self.draft_ids[self.ids] = torch.arange(len(ids), device=target.device)

    @abstractmethod
    def outputs(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """For each depth, what goes into the output head [B, T - 2, d], and the head [U, d].

        Entry i takes in token i + 1 and guesses token i + 2. At depth k, from 0 on, the target's
        hidden states up to token i - k are known. The first k entries are arbitrary.
        """

    @abstractmethod
    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write config and weights, in this dtype."""

    def losses(self, batch: Batch, is_learned: Tensor) -> list[DepthLoss]:
        """One for each depth: the mean over the tokens that is_learned [B, T] holds."""
        wanted = is_learned[:, 2:].clone()
        wanted[:, : self.num_depths - 1] = False  # arbitrary at some depth
        before = batch.hidden[:, 1:-1][wanted]
        law = teacher_law(before, batch.logsumexp[:, 1:-1][wanted], self._rows)
        best = self.draft_ids[batch.best[:, 1:-1][wanted].long()]
        with torch.autocast(
            self.target.device.type, torch.bfloat16, enabled=self.target.dtype != torch.float32
        ):
            return [
                DepthLoss(*cross_entropy(hidden[wanted], head, law, best))
                for hidden, head in self.outputs(batch)
            ]


class HeadsSystem(System):
    """Heads on the target, whose own code computes what is trained.

    Args:
        heads: with initial weights, which training replaces.
        config, target, ids, num_depths: as in `System`.
    """

    def __init__(
        self,
        heads: TrainedHeads,
        config: Mapping[str, Any],
        target: HFTargetView,
        ids: Tensor,
        num_depths: int,
    ) -> None:
        with heads.attach(target):
            pass
        heads.weights = {
            name: weight.detach().float().clone().requires_grad_()
            for name, weight in heads.weights.items()
        }
        super().__init__(dict(heads.weights), config, target, ids, num_depths)

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """See `System`."""
        weights = {name: w.to(dtype) for name, w in self.parameters.items()}
        config = {**self.config, FINGERPRINT: fingerprint(self.target)}
        write_checkpoint(folder, config, weights, self.ids)


def later(values: Tensor) -> Tensor:
    """[B, M, d], each entry with what the entry before had."""
    return torch.cat([values[:, :1], values[:, :-1]], 1)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Attributes:
    epochs: times that each conversation is seen.
    rate: largest learning rate of AdamW.
    seed: of the order of the batches.
    """

    epochs: int
    rate: float
    seed: int = 0


def train(system: System, examples: Examples, folder: Path, schedule: Schedule) -> dict[str, Any]:
    """Train, or go on with what `folder` has, and save the weights there.

    Returns:
        what happened: data, steps, seconds, the curve, and loss and hit rate by depth on held-out
        conversations. It is also written to `training.json`.

    Raises:
        ValueError: what the folder has was begun with other data or settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    steps_per_epoch = examples.num_steps(examples.learned)
    run = _Run(system, folder, schedule, steps_per_epoch * schedule.epochs, examples.num_tokens)
    run.resume()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task(folder.name, total=run.num_steps, completed=run.step)
        for epoch in range(run.step // steps_per_epoch, schedule.epochs):
            seed = schedule.seed * 1000 + epoch
            skip = run.step - epoch * steps_per_epoch
            for batch in examples.epoch(examples.learned, seed, skip=skip):
                described = run.learn(batch.to(system.target.device, system.target.dtype))
                progress.update(task, completed=run.step, description=described)
    run.save()
    system.save(folder, examples.dtype)
    facts: dict[str, Any] = {
        **asdict(schedule),
        "num_conversations": len(examples.learned),
        "num_tokens": examples.num_tokens,
        "num_held_out": len(examples.held_out),
        "num_dropped": examples.num_dropped,
        "ngram": corpus.NGRAM,
        "hidden_size": system.target.hidden_size,
        "vocab_size": system.target.vocab_size,
        "draft_vocab": system.config["draft_vocab_size"],
        "parameters": sum(p.numel() for p in system.parameters.values()),
        "steps": run.step,
        "optimizers": " and ".join(type(o).__name__ for o in run.optimizers),
        "seconds": round(run.seconds),
        "held_out": measure(system, examples, examples.held_out),
        "curve": run.curve,
    }
    (folder / "training.json").write_text(json.dumps(facts) + "\n")
    return facts


@torch.no_grad()
def measure(system: System, examples: Examples, indices: Sequence[int]) -> dict[str, list[float]]:
    """Loss and hit rate by depth, mean over the answer tokens of these conversations."""
    sums = torch.zeros((system.num_depths, 2))
    weight = 0
    for batch in examples.epoch(indices, 0):
        moved = batch.to(system.target.device, system.target.dtype)
        depths = system.losses(moved, moved.is_answer)
        count = int(batch.is_answer.sum())
        sums += count * torch.tensor([[float(d.loss), float(d.hit_rate)] for d in depths])
        weight += count
    means = (sums / weight).tolist()
    return {
        "loss": [round(loss, 4) for loss, _ in means],
        "hit_rate": [round(rate, 4) for _, rate in means],
    }


def _optimizers(system: System, rate: float) -> list[torch.optim.Optimizer]:
    """AdamW, then Muon if it trains anything.

    Source: Jordan et al., "Muon", 2024; its rate as in Liu et al., 2502.16982, section 2.2.
    """
    matrices, others = [], []
    for name, parameter in system.parameters.items():
        is_muon_s = name.startswith(system.muon) and parameter.ndim == 2
        is_muon_s &= system.target.dtype != torch.float32
        (matrices if is_muon_s else others).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if others:
        group = {"params": others, "largest": rate}
        optimizers.append(torch.optim.AdamW([group], betas=(0.9, 0.95), weight_decay=0.01))
    if matrices:
        group = {"params": matrices, "largest": rate * system.muon_rate}
        optimizers.append(
            torch.optim.Muon([group], weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


class _Run:
    """The state of a training run."""

    def __init__(
        self, system: System, folder: Path, schedule: Schedule, num_steps: int, num_tokens: int
    ) -> None:
        self.system, self.schedule = system, schedule
        self.num_steps, self.step, self.seconds = num_steps, 0, 0.0
        self.curve: list[list[float]] = []  # step, loss at depth 1, hit rates
        self._name, self._path = folder.name, folder / "state.pt"
        self._settings = {
            "tokens": num_tokens,
            "steps": num_steps,
            "muon": [*system.muon, system.muon_rate],
            **asdict(schedule),
            **system.config,
        }
        self._parameters = system.parameters
        self.optimizers = _optimizers(system, schedule.rate)
        self._saved = time.monotonic()

    def learn(self, batch: Batch) -> str:
        """One step; what to show of it."""
        start = time.monotonic()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["largest"] * self._share()
            optimizer.zero_grad()
        depths = self.system.losses(batch, batch.is_learned)
        total = torch.stack([d.loss * DEPTH_DECAY**i for i, d in enumerate(depths)]).sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self.seconds += time.monotonic() - start
        loss = float(depths[0].loss.detach())
        hits = [round(float(d.hit_rate), 3) for d in depths]
        self.curve.append([self.step, round(loss, 3), *hits])
        if time.monotonic() - self._saved > SECONDS_BETWEEN_SAVES:
            self.save()
        return f"{self._name}: loss {loss:.2f}, hits {hits}"

    def resume(self) -> None:
        """Go on where an earlier run stopped."""
        if not self._path.exists():
            return
        state = torch.load(self._path, weights_only=True)
        settings = state["settings"]
        changed = [name for name, value in self._settings.items() if settings.get(name) != value]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{self._path}: was begun with {name} = {settings.get(name)}, now it is "
                f"{self._settings[name]}; remove the file to begin anew"
            )
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state["parameters"][name])
        for optimizer, begun in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(begun)
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]

    def save(self) -> None:
        """Write the state, whole or not at all."""
        state = {
            "settings": self._settings,
            "parameters": {name: p.detach() for name, p in self._parameters.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
        }
        partial = self._path.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(self._path)
        self._saved = time.monotonic()

    def _share(self) -> float:
        """Of the largest learning rate, at this step."""
        warmup = max(1, int(WARMUP * self.num_steps))
        if self.step < warmup:
            return (self.step + 1) / warmup
        done = (self.step - warmup) / max(1, self.num_steps - warmup)
        return LEAST_RATE + (1 - LEAST_RATE) * (1 + math.cos(math.pi * done)) / 2
