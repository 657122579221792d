"""Compiled steps: one graph for all steps and lengths, and the same text."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny_model
from functorch.compile import make_boxed_func
from prompts import greedy, left_pad, random_prompts
from torch._dynamo.backends.common import aot_autograd

import specdec_kernels
from specdec_kernels import (
    DraftContext,
    Drafter,
    OracleDrafter,
    Proposal,
    SpeculativeDecoder,
    layouts,
)
from specdec_kernels.hf import attention
from specdec_kernels.hf.compiled import bucket, compiled_capacity, pad_tree
from specdec_kernels.tree import TokenTree

VOCAB = 101


class _Full(Drafter):
    """Chains that fill their size."""

    def __init__(self, nodes: int) -> None:
        self.max_nodes = nodes

    def propose(self, context: DraftContext) -> Proposal:
        tokens = list(range(1, self.max_nodes))
        chain = [-1, *range(self.max_nodes - 1)]
        pairs = zip(context.sequences, context.active, strict=True)
        rows = [([s[-1], *tokens], chain) if active else ([], []) for s, active in pairs]
        return Proposal.onehot(rows, context.device)


def _texts(model, rows, truth, new: int, compile: object) -> list[list[int]]:
    drafter = OracleDrafter(truth, VOCAB, max_nodes=8)
    decoder = SpeculativeDecoder(drafter, compile=compile)
    inputs = left_pad(rows)
    output = model.generate(**inputs, max_new_tokens=new, do_sample=False, custom_generate=decoder)
    assert decoder.stats.tokens_per_step > 1.3
    return output[:, inputs["input_ids"].shape[1] :].tolist()


class _NotInGraphs:
    """A context variable as torch 2.13 has it."""

    def __init__(self, name: str) -> None:
        self._variable = getattr(attention, name)
        self.set, self.reset = self._variable.set, self._variable.reset

    def get(self) -> object:
        assert not torch.compiler.is_compiling()
        return self._variable.get()


def test_a_graph_reads_no_context_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch before 2.14 cannot."""
    model = make_tiny_model()
    rows = random_prompts((9, 14), VOCAB)
    truth = [greedy(model, r, 20) for r in rows]
    for name in ("_call", "_ragged"):
        monkeypatch.setattr(attention, name, _NotInGraphs(name))
    texts = _texts(model, rows, truth, 12, "eager")
    assert texts == [t[len(r) : len(r) + 12] for r, t in zip(rows, truth, strict=True)]


def test_all_steps_and_lengths_share_one_graph() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    model = make_tiny_model()
    for lengths, new in (((9, 14), 20), ((30, 3), 8), ((5, 6), 12)):
        rows = random_prompts(lengths, VOCAB)
        truth = [greedy(model, r, new + 8) for r in rows]
        want = [t[len(r) : len(r) + new] for t, r in zip(truth, rows, strict=True)]
        assert _texts(model, rows, truth, new, backend) == want
    assert len(graphs) == 1
    names = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("tree_attention" in name for name in names) == 3  # one per layer


@torch._dynamo.config.patch(recompile_limit=2)
def test_every_batch_size_and_bucket_has_its_graph() -> None:
    """More of them than torch compiles for one function: 8 unless told otherwise."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    model = make_tiny_model(1)
    sizes = [(1, 8), (2, 8), (2, 16), (3, 16)]
    for _ in range(2):
        for batch, nodes in sizes:
            inputs = left_pad(random_prompts((5, 9, 3)[:batch], VOCAB))
            plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            decoder = SpeculativeDecoder(_Full(nodes), compile=backend)
            output = model.generate(
                **inputs, max_new_tokens=6, do_sample=False, custom_generate=decoder
            )
            assert output.tolist() == plain.tolist()
    assert len(graphs) == len(sizes)


def test_nothing_in_a_graph_waits_for_the_device() -> None:
    """What reads a tensor's values on the host would end a CUDA graph."""
    operators: set[str] = set()

    def note(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]):
        operators.update(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return make_boxed_func(graph.forward)

    model = make_tiny_model(1)
    decoder = SpeculativeDecoder(_Full(8), compile=aot_autograd(fw_compiler=note))
    inputs = left_pad(random_prompts((5, 9), VOCAB))
    model.generate(**inputs, max_new_tokens=6, do_sample=False, custom_generate=decoder)
    assert len(operators) > 20, operators
    assert any("tree_attention" in name for name in operators)
    waits = ("_local_scalar_dense", "item", "nonzero", "unique", "masked_select", "equal.default")
    assert not [n for n in operators if n.startswith("aten.") and any(w in n for w in waits)]


def test_a_conversation_goes_on_in_the_same_graph() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    model = make_tiny_model()
    texts = random_prompts((9, 14), VOCAB)
    options: dict = {}
    for turn in range(2):
        said = random_prompts((3, 5), VOCAB, seed=turn)
        texts = [torch.cat(pair) for pair in zip(texts, said, strict=True)]
        truth = [greedy(model, t, 20) for t in texts]
        inputs = left_pad(texts)
        output = specdec_kernels.generate(
            model, **inputs, max_new_tokens=9, do_sample=False, return_dict_in_generate=True,
            drafter=OracleDrafter(truth, VOCAB, max_nodes=8), compile=backend, **options,
        )  # fmt: skip
        want = [t[: len(row) + 9] for t, row in zip(truth, texts, strict=True)]
        pads = (inputs["attention_mask"] == 0).sum(1).tolist()
        got = [row[pad:] for row, pad in zip(output.sequences.tolist(), pads, strict=True)]
        assert got == want
        texts = [torch.tensor(t) for t in got]
        options = {"past_key_values": output["cache" if "cache" in output else "past_key_values"]}
    assert len(graphs) == 1


@pytest.mark.slow
def test_inductor_writes_the_same_text() -> None:
    model = make_tiny_model()
    rows = random_prompts((9, 14), VOCAB)
    truth = [greedy(model, r, 20) for r in rows]
    want = [t[len(r) : len(r) + 12] for t, r in zip(truth, rows, strict=True)]
    assert _texts(model, rows, truth, 12, True) == want


def test_trees_are_padded_to_powers_of_two() -> None:
    assert [bucket(n) for n in (1, 8, 9, 64, 65)] == [8, 8, 16, 64, 128]
    assert compiled_capacity(100, 9) == 256
    assert compiled_capacity(250, 9) == 512
    tree = pad_tree(TokenTree.from_rows([([5, 6], [-1, 0]), ([], [])]))
    assert tree.tokens.tolist() == [[5, 6, *[0] * 6], [0] * 8]
    assert tree.parents.tolist() == [[-1, 0, *[-1] * 6], [-1] * 8]
    assert tree.num_nodes.tolist() == [2, 0]


def test_compiled_steps_multiply_by_panels_and_by_new_ones_after_an_edit(monkeypatch) -> None:
    monkeypatch.setattr(layouts, "layout_for", lambda dtype: layouts.Panels)
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    model = make_tiny_model().bfloat16()
    ids = torch.tensor([[5, 6, 7, 8]])

    def text(**how: object) -> list[int]:
        decoder = SpeculativeDecoder("suffix", **how)
        out = model.generate(ids, max_new_tokens=12, do_sample=False, custom_generate=decoder)
        return out[0].tolist()

    before = text(compile=backend, pack=True)
    names = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("packed_linear" in name for name in names) == 3 * 7 + 1
    assert before == text(pack=True)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0).clone())
    after = text(compile=backend, pack=True)
    assert after != before and after == text(pack=True)
    assert len(graphs) == 1
