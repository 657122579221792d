"""What the loop asks of an accelerator: when a pass was over, and how often it waits for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from toy_target import ToyTarget

from specdec_kernels import (
    AutoDrafter,
    Budget,
    CostCurve,
    SamplingParams,
    decoding,
    pass_timer,
)
from specdec_kernels.decoding import decode
from specdec_kernels.drafters import PromptLookupDrafter
from specdec_kernels.pass_timer import PassTimer

VOCAB = 6
PROMPTS = [[1, 2, 3, 1, 2, 3], [4, 1, 4, 1]]
WAITS = {
    *(getattr(Tensor, name) for name in ("tolist", "item", "cpu", "numpy", "nonzero")),
    *(getattr(Tensor, f"__{name}__") for name in ("bool", "int", "float", "index")),
    torch.nonzero,
}


class Waits(TorchFunctionMode):
    """Counts calls for which the host would wait, were the tensors on an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.num += func in WAITS
        return func(*args, **kwargs or {})


class WatchedTarget(ToyTarget):
    """Counts how often others wait in each step, from one pass to the next."""

    def __init__(self, waits: Waits) -> None:
        super().__init__(VOCAB)
        self.waits = waits
        self.before_passes: list[int] = []

    def forward(self, tree: Any) -> Tensor:
        with torch._C.DisableTorchFunction():
            self.before_passes.append(self.waits.num)
            return super().forward(tree)

    def commit(self, path: Tensor, num_kept: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            super().commit(path, num_kept)

    @property
    def of_steps(self) -> set[int]:
        """Waits of the steps."""
        pairs = zip(self.before_passes, self.before_passes[1:], strict=False)
        return {after - before for before, after in pairs}


@pytest.mark.parametrize(
    ("make", "others"),
    [
        (lambda: None, 0),
        (PromptLookupDrafter, 0),
        (lambda: AutoDrafter(heads=None), 1),  # the target's candidates after each node
    ],
    ids=["none", "prompt_lookup", "auto"],
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_step_waits_once_for_its_decision(make: Any, others: int, temperature: float) -> None:
    sampling = SamplingParams(torch.tensor([3, 4]), torch.full((2,), temperature))
    with Waits() as waits:
        target = WatchedTarget(waits)
        decode(target, make(), PROMPTS, max_lengths=[60, 50], sampling=sampling)
    assert len(target.before_passes) >= 8
    assert target.of_steps == {1 + others}


class Events:
    """Stands in for `torch.Event`: work that is put in is done only when somebody waits."""

    def __init__(self) -> None:
        self.done = self.queued = 0.0

    def __call__(self, device: torch.device, *, enable_timing: bool) -> Any:
        assert device.type == "cuda" and enable_timing
        event = SimpleNamespace(at=None)

        def elapsed_time(end: Any) -> float:
            assert end.at <= self.done, "not waited for"
            return 1e3 * (end.at - event.at)

        event.record = lambda: setattr(event, "at", self.queued)
        event.synchronize = lambda: setattr(self, "done", max(self.done, event.at))
        event.elapsed_time = elapsed_time
        return event


def test_a_pass_takes_what_the_accelerator_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events()
    monkeypatch.setattr(pass_timer.torch, "Event", events)
    timer = PassTimer(torch.device("cuda", 0))
    for seconds in (0.5, 2.0):
        events.queued += 7.0  # somebody else's
        timer.start()
        events.queued += seconds
        timer.stop()
        events.queued += 3.0
        assert timer.seconds() == pytest.approx(seconds)


def test_on_a_cpu_it_takes_what_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 3.5])
    monkeypatch.setattr(pass_timer, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    timer = PassTimer(torch.device("cpu"))
    timer.start()
    timer.stop()
    assert timer.seconds() == 2.5


def test_the_budget_learns_when_a_pass_was_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the call came back, which on an accelerator is long before."""
    told: list[float] = []

    class Told(Budget):
        def record(self, *, forward_seconds: float, **others: Any) -> None:
            told.append(forward_seconds)

    class Slow:
        def __init__(self, device: torch.device) -> None:
            self.start = self.stop = lambda: None
            self.seconds = lambda: 4.0

    monkeypatch.setattr(decoding, "PassTimer", Slow)
    target, drafter = ToyTarget(VOCAB), PromptLookupDrafter()
    _, stats = decode(
        target, drafter, PROMPTS[:1], max_lengths=[30], budget=Told(CostCurve((1, 2), (1.0, 1.0)))
    )
    assert set(told) == {4.0} and stats.forward_seconds == 4.0 * len(told)
    assert 0.0 <= stats.verify_seconds < 4.0
