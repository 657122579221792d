"""Compiled steps: one graph for all steps and lengths, and the same text."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny_model
from prompts import greedy, left_pad, random_prompts

from specdec_kernels import OracleDrafter, SpeculativeDecoder
from specdec_kernels.hf.compiled import bucket, compiled_capacity, pad_tree
from specdec_kernels.tree import TokenTree

VOCAB = 101


def _texts(model, rows, truth, new: int, compile: object) -> list[list[int]]:
    drafter = OracleDrafter(truth, VOCAB, max_nodes=8)
    decoder = SpeculativeDecoder(drafter, compile=compile)
    inputs = left_pad(rows)
    output = model.generate(**inputs, max_new_tokens=new, do_sample=False, custom_generate=decoder)
    assert decoder.stats.tokens_per_step > 1.3
    return output[:, inputs["input_ids"].shape[1] :].tolist()


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
