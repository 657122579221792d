"""Every operator x backend x case x dtype: equal to the reference, inputs untouched, contract
enforced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import cuda_emulated
import pytest
import torch
from torch import Tensor

from specdec_kernels import registry
from specdec_kernels.registry import BACKENDS, INTERPRETS_TRITON, OPS, Op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _fresh_memory_is_poisoned() -> Iterator[None]:
    """torch.empty is NaN, or the largest integer: what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _dtypes(operator: Op) -> tuple[torch.dtype, ...]:
    if any(spec.dtype == "bfloat16" for spec in operator.shapes):
        return (torch.bfloat16,)
    is_any = any(spec.dtype == "float" for spec in operator.shapes)
    return DTYPES if is_any else DTYPES[:1]


def _cases() -> list[Any]:
    rows = []
    for operator in OPS.values():
        for backend in BACKENDS:
            if backend == "reference" or operator.why_absent(backend) is not None:
                continue
            for case in operator.cases:
                for dtype in _dtypes(operator):
                    sizes = "_".join(f"{k}{v}" for k, v in case.items())
                    name = f"{operator.name}-{backend}-{sizes}-{str(dtype)[6:]}"
                    marks = [pytest.mark.gpu] if BACKENDS[backend] == "cuda" else []
                    rows.append(pytest.param(operator, backend, case, dtype, id=name, marks=marks))
    return rows


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (list, tuple)):
        return [t for v in values for t in _tensors(v)]
    return []


def _copy(value: Any, device: str = "cpu") -> Any:
    """A deep copy that keeps strides."""
    if isinstance(value, Tensor):
        like = {"dtype": value.dtype, "device": device}
        return torch.empty_strided(value.shape, value.stride(), **like).copy_(value)
    if isinstance(value, list):
        return [_copy(v, device) for v in value]
    return value


def _compare(operator: Op, dtype: torch.dtype, got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for g, w in zip((g.cpu() for g in got), want, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype
        if operator.tolerance is None or not w.is_floating_point():
            torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)
            continue
        finite = w.isfinite()
        torch.testing.assert_close(g[~finite], w[~finite], rtol=0, atol=0, equal_nan=True)
        if finite.any():
            error = (g[finite].double() - w[finite].double()).abs().max()
            limit = operator.tolerance[dtype] * float(w[finite].double().abs().max())
            assert float(error) <= limit, f"error {float(error)} above {limit}"


def _program_order(backend: str, seed: int) -> Any:
    """Interpreted programs and emulated threads run forwards, backwards and shuffled."""
    if backend == cuda_emulated.BACKEND:
        return cuda_emulated.in_order(cuda_emulated.ORDERS[seed])
    if backend != "triton" or not INTERPRETS_TRITON:
        return nullcontext()
    import triton_checks

    return triton_checks.in_order(triton_checks.ORDERS[seed])


def _seeded_cases() -> list[Any]:
    """Every case with every seed, which is a program order, too. Where kernels are interpreted or
    emulated, a case meets another order in each dtype; all orders in each are exhaustive.
    """
    cases = []
    for turn, row in enumerate(_cases()):
        backend = row.values[1]
        seeds = range(4 if backend == cuda_emulated.BACKEND else 3)
        is_slow = backend == cuda_emulated.BACKEND or (backend == "triton" and INTERPRETS_TRITON)
        for seed in seeds:
            in_turn = seed == (turn + turn // len(DTYPES)) % len(seeds) or not is_slow
            marks = [*row.marks, *[pytest.mark.exhaustive] * (not in_turn)]
            cases.append(pytest.param(*row.values, seed, id=f"{row.id}-{seed}", marks=marks))
    return cases


@pytest.mark.parametrize(("operator", "backend", "case", "dtype", "seed"), _seeded_cases())
def test_backend_equals_the_reference(
    operator: Op, backend: str, case: dict[str, Any], dtype: torch.dtype, seed: int
) -> None:
    inputs = operator.inputs(**case, dtype=dtype, seed=seed)
    device = BACKENDS[backend].replace("any", "cpu")
    mine, theirs = (
        {k: _copy(v, device) for k, v in inputs.items()},
        {k: _copy(v) for k, v in inputs.items()},
    )
    with _program_order(backend, seed):
        got = _tensors(operator(**mine, backend=backend))
    want = _tensors(operator(**theirs, backend="reference"))
    _compare(operator, dtype, got, want)
    for name, value in inputs.items():
        if name in operator.mutates:
            _compare(operator, dtype, _tensors(mine[name]), _tensors(theirs[name]))
        else:
            for before, after in zip(_tensors(value), _tensors(mine[name]), strict=True):
                same = torch.equal(before.nan_to_num(), after.cpu().nan_to_num())
                assert same, f"{name} was changed"


@pytest.mark.parametrize("operator", OPS.values(), ids=list(OPS))
def test_the_reference_changes_only_what_it_declares(operator: Op) -> None:
    inputs = operator.inputs(**operator.cases[-1])
    before = {k: _copy(v) for k, v in inputs.items()}
    operator(**inputs, backend="reference")
    changed = {
        name
        for name, value in inputs.items()
        for a, b in zip(_tensors(before[name]), _tensors(value), strict=True)
        if not torch.equal(a.nan_to_num(), b.nan_to_num())
    }
    assert changed == set(operator.mutates)


@pytest.mark.parametrize("operator", OPS.values(), ids=list(OPS))
def test_opcheck_passes(operator: Op) -> None:
    for case in operator.cases[:2]:
        torch.library.opcheck(operator.dispatch, (), operator.inputs(**case))


@pytest.mark.parametrize("operator", OPS.values(), ids=list(OPS))
def test_compiles_into_one_graph_with_the_same_result(operator: Op) -> None:
    inputs = operator.inputs(**operator.cases[1])
    copy = {k: _copy(v) for k, v in inputs.items()}
    torch.compiler.reset()  # the limit of recompilations counts those of all operators
    compiled = torch.compile(lambda kw: operator(**kw), fullgraph=True, backend="aot_eager")
    got, want = _tensors(compiled(inputs)), _tensors(operator(**copy))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)
    for name in operator.mutates:
        for g, w in zip(_tensors(inputs[name]), _tensors(copy[name]), strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)


def _wrong_inputs(operator: Op) -> list[tuple[str, str, dict[str, Any]]]:
    """(argument, rule broken, inputs): a bad rank, size, dtype for every tensor argument."""
    rows = []
    for spec in operator.shapes:
        inputs = operator.inputs(**operator.cases[1])
        value = inputs.get(spec.name)
        if value is None:
            continue
        tensor = value[0] if spec.is_list else value
        bad: dict[str, Tensor] = {"rank": tensor[None]}
        other = torch.float64 if tensor.dtype != torch.float64 else torch.float32
        bad["dtype"] = tensor.to(other)
        shared = [
            i for i, d in enumerate(spec.dims) if _is_bound_elsewhere(operator, inputs, spec, d)
        ]
        if shared:
            shape = list(tensor.shape)
            shape[shared[0]] += 1
            bad["size"] = torch.zeros(shape, dtype=tensor.dtype)
        for rule, replacement in bad.items():
            wrong = [replacement, *value[1:]] if spec.is_list else replacement
            rows.append((spec.name, rule, {**inputs, spec.name: wrong}))
    return rows


def _is_bound_elsewhere(operator: Op, inputs: dict[str, Any], spec: Any, dim: str) -> bool:
    return dim != "_" and any(
        dim in other.dims
        for other in operator.shapes
        if other != spec and inputs.get(other.name) is not None
    )


def _on_cpu_tensors(operator: Op) -> list[str]:
    return [b for b in BACKENDS if BACKENDS[b] != "cuda" and operator.why_absent(b) is None]


@pytest.mark.parametrize("operator", OPS.values(), ids=list(OPS))
def test_wrong_shapes_and_dtypes_are_named(operator: Op) -> None:
    rows = _wrong_inputs(operator)
    assert len(rows) >= 2 * sum(
        1 for s in operator.shapes if operator.inputs(**operator.cases[1]).get(s.name) is not None
    )
    for argument, rule, inputs in rows:
        for backend in _on_cpu_tensors(operator):
            with pytest.raises(ValueError, match=rf"^{operator.name}: \w+ must be ") as caught:
                operator(**inputs, backend=backend)
            # A size is bound by whichever argument comes first, so the message may name its
            # partner.
            if rule != "size":
                assert f"{operator.name}: {argument} must be" in str(caught.value), (rule, backend)


def test_an_explicit_backend_that_cannot_run_names_what_can() -> None:
    operator = OPS["tree_mask"]
    inputs = operator.inputs(**operator.cases[0])
    with pytest.raises(
        ValueError, match=r"backend 'cuda' cannot run: .+; usable here: .*reference"
    ):
        operator(**inputs, backend="cuda")
    with pytest.raises(
        ValueError, match=r"backend 'fast' cannot run: unknown; known: reference, cpu"
    ):
        operator(**inputs, backend="fast")


def test_a_library_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = OPS["tree_mask"]
    monkeypatch.delitem(operator.backends, "cuda", raising=False)
    for is_built, reason in ((False, "native library built without CUDA"), (True, "not written y")):
        monkeypatch.setattr(registry, "built_with_cuda", lambda built=is_built: built)
        assert str(operator.why_absent("cuda")).startswith(reason)


def test_the_environment_variable_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = OPS["tree_mask"]
    inputs = operator.inputs(**operator.cases[0])
    monkeypatch.setenv("SPECDEC_BACKEND", "cuda")
    with pytest.raises(ValueError, match="backend 'cuda' cannot run"):
        operator(**inputs)
    operator(**inputs, backend="reference")  # the argument wins


@pytest.mark.parametrize("operator", OPS.values(), ids=list(OPS))
def test_every_public_argument_is_documented(operator: Op) -> None:
    text = operator.reference.__doc__ or ""
    for name in operator.signature.parameters:
        assert name in text, f"{operator.name}: {name} is missing from the docstring"
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in text or (section == "Returns:" and operator.name == "write_kv")


@pytest.mark.slow
def test_rows_may_lie_beyond_32_bit_offsets() -> None:
    """20,000 rows of 152,064 logits, of which memory holds only the page that is written."""
    rows, vocab = 20_000, 152_064
    logits = torch.zeros((rows, 1, vocab), dtype=torch.bfloat16)
    logits[-1, 0, -1] = 1.0
    drawn = OPS["sample"](logits[:, 0], backend="cpu")[0][:, 0]
    next_tokens = OPS["verify"](
        logits,
        torch.zeros((rows, 1), dtype=torch.int64),
        torch.full((rows, 1), -1, dtype=torch.int32),
        torch.ones(rows, dtype=torch.int32),
        backend="cpu",
    )[2]
    for tokens in (drawn, next_tokens):
        assert int(tokens[-1]) == vocab - 1 and not bool(tokens[:-1].any())
