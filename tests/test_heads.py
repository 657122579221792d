"""Trained heads: published checkpoints load, compute the papers' formulas, and stay lossless."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_model
from head_checkpoints import (
    draft_ids,
    save_eagle1,
    save_eagle3,
    save_medusa,
    save_speculator,
)
from prompts import greedy, left_pad, random_prompts
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from specdec_kernels import (
    AutoDrafter,
    DraftContext,
    Drafter,
    DraftNetwork,
    ModelDrafter,
    SampledTree,
    SpeculativeDecoder,
    TopKTree,
    load_heads,
)
from specdec_kernels.drafters.adviser import Adviser
from specdec_kernels.drafters.eagle import Eagle1Head, Eagle3Head
from specdec_kernels.drafters.medusa import MedusaHeads
from specdec_kernels.drafters.mlp_speculator import MLPSpeculator, place
from specdec_kernels.drafters.network import Level
from specdec_kernels.drafting import GREEDY
from specdec_kernels.hf.attention import tree_attention_in
from specdec_kernels.hf.features import HFTargetView
from specdec_kernels.hf.target import HFTarget

SIZE, VOCAB, DRAFT_VOCAB, LAYERS = 64, 101, 40, 6
NEW = 16
LAYERS_OF_EAGLE3 = (2, 3, 3)
TREES = {
    "top-k": TopKTree(10, depth=3, width=3),
    "chain": SampledTree((1, 1, 1)),
    "greedy drafts": SampledTree((3, 2), greedy_drafts=True),
}


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    """The tiny Llama with six layers, whose text the drafts sometimes guess."""
    return make_tiny_model(LAYERS)


@pytest.fixture(scope="module")
def rows() -> list[Tensor]:
    return random_prompts((9, 14, 5), VOCAB)


def _features(target: PreTrainedModel, tokens: Sequence[int], layers: Sequence[int]) -> Tensor:
    """[n, F] float64 of all tokens but the root, by a fresh forward pass."""
    with torch.no_grad():
        out = target(torch.tensor([tokens[:-1]]), output_hidden_states=True)
    hidden = out.hidden_states
    return torch.cat([hidden[i][0].double() for i in (layers or [-1])], -1)


@pytest.fixture(scope="module")
def saved(target: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Name -> (folder, class, formula, layers of its features)."""
    root = tmp_path_factory.mktemp("heads")
    made: dict[str, Any] = {}

    def add(name: str, kind: type, layers: Sequence[int], save: Callable[..., Any], **more: Any):
        formula = save(root / name, SIZE, VOCAB, **more)
        made[name] = (root / name, kind, formula, layers)

    add("medusa", MedusaHeads, (), save_medusa)
    add("medusa-safetensors", MedusaHeads, (), save_medusa, file="model.safetensors")
    add("speculator", MLPSpeculator, (), save_speculator)
    add("speculator-tied", MLPSpeculator, (), save_speculator, tied=True, scaled=False)
    some = {"draft_vocab": DRAFT_VOCAB}
    add("medusa-some", MedusaHeads, (), save_medusa, **some)
    add("medusa-rows", MedusaHeads, (), save_medusa, rows_of=target, **some)
    add("speculator-some", MLPSpeculator, (), save_speculator, tied=True, **some)
    lent = {"embeddings_of": target, "inner": SIZE}
    add("speculator-lent", MLPSpeculator, (), save_speculator, **lent)
    rows = {"rows_of": target, **some}
    add("eagle-3-rows", Eagle3Head, LAYERS_OF_EAGLE3, save_eagle3, **rows)
    add("eagle-1", Eagle1Head, (), save_eagle1, target=target)
    add("eagle-3", Eagle3Head, LAYERS_OF_EAGLE3, save_eagle3, draft_vocab=DRAFT_VOCAB)
    add("eagle-3-full", Eagle3Head, LAYERS_OF_EAGLE3, save_eagle3, draft_vocab=VOCAB, llama3=False)
    return made


NAMES = [
    "medusa", "medusa-safetensors", "speculator", "speculator-tied", "eagle-1", "eagle-3",
    "eagle-3-full", "medusa-some", "medusa-rows", "speculator-some", "speculator-lent",
    "eagle-3-rows",
]  # fmt: skip


class Checked(DraftNetwork):
    """Compares all logits of a network with a formula, from scratch."""

    def __init__(self, network: DraftNetwork, formula: Callable[..., Tensor]) -> None:
        self.network = network
        self.formula = formula
        self.offsets, self.max_depth = network.offsets, network.max_depth
        self.num_checked, self.worst = 0, 0.0

    def attach(self, target: Any) -> Any:
        return self.network.attach(target)

    def begin(self, batch: int, num_slots: int) -> None:
        self.network.begin(batch, num_slots)

    def start(self, context: DraftContext) -> Tensor:
        logits = self.network.start(context)
        self.offsets = self.network.offsets
        self.sequences = [list(s) for s in context.sequences]
        self.paths: list[list[list[int]]] = [[] for _ in self.sequences]
        for row, active in enumerate(context.active):
            if active:
                self._compare(logits[row], row, [])
        return logits

    def extend(self, level: Level) -> Tensor:
        logits = self.network.extend(level)
        for row, nodes in enumerate(level):
            before = list(self.paths[row])
            for column, (token, parent) in enumerate(nodes):
                path = [*(before[parent] if parent >= 0 else []), token]
                self.paths[row].append(path)
                self._compare(logits[row, column], row, path)
        return logits

    def _compare(self, logits: Tensor, row: int, path: list[int]) -> None:
        want = self.formula(self.sequences[row], path)
        self.num_checked += 1
        error = float((logits.double() - want).abs().max() / want.abs().max())
        self.worst = max(self.worst, error)


def _drafter(network: DraftNetwork, tree: str) -> Drafter:
    if tree == "merged":
        return AutoDrafter(24, heads=network, heads_depth=3, heads_width=3)
    return ModelDrafter(network, TREES[tree])


@pytest.mark.parametrize("tree", [*TREES, "merged"])
@pytest.mark.parametrize("name", NAMES)
def test_heads_compute_the_papers_formula_and_greedy_text_is_the_target_s(
    target, rows, saved, name: str, tree: str, report
) -> None:
    folder, kind, formula, layers = saved[name]
    network = load_heads(folder)
    assert type(network) is kind
    features: dict[tuple[int, ...], Tensor] = {}

    def reference(tokens: Sequence[int], path: Sequence[int]) -> Tensor:
        key = tuple(tokens)
        if key not in features:
            features[key] = _features(target, tokens, layers)
        return formula(features[key], tokens, path)

    checked = Checked(network, reference)
    decoder = SpeculativeDecoder(_drafter(checked, tree), budget=False)
    inputs = left_pad(rows)
    output = target.generate(**inputs, max_new_tokens=NEW, do_sample=False, custom_generate=decoder)
    want = [greedy(target, row, NEW)[len(row) :] for row in rows]
    assert output[:, inputs["input_ids"].shape[1] :].tolist() == want
    assert checked.num_checked > 80 and checked.worst < 1e-4
    report(f"{name}, {tree}: {checked.num_checked} laws, worst error {checked.worst:.1e}")


@pytest.mark.parametrize("name", ["medusa", "speculator", "eagle-1", "eagle-3"])
def test_sampled_rows_depend_on_their_seed_alone(target, rows, saved, name: str) -> None:
    options = {"do_sample": True, "temperature": 0.8, "max_new_tokens": 6}

    def run(order: Sequence[int], tree: str, rule: str | None) -> list[list[int]]:
        network = load_heads(saved[name][0])
        decoder = SpeculativeDecoder(
            _drafter(network, tree), seed=list(order), rule=rule, budget=False
        )
        inputs = left_pad([rows[i] for i in order])
        output = target.generate(**inputs, custom_generate=decoder, **options)
        assert sum(decoder.stats.num_drafted) > 10
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    together = run([0, 1, 2], "greedy drafts", "gd_traversal")
    assert run([2, 0], "greedy drafts", "gd_traversal") == [together[2], together[0]]
    plain = SpeculativeDecoder(None, seed=[0, 1, 2])
    inputs = left_pad(rows)
    want = target.generate(**inputs, custom_generate=plain, **options)
    for tree in ("top-k", "merged"):
        assert run([0, 1, 2], tree, None) == want[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", ["medusa", "speculator", "eagle-3"])
def test_a_conversation_that_goes_on_from_a_cache_drafts_as_a_new_one(
    target, rows, saved, name: str
) -> None:
    """Heads that see the newest token alone do not have the others computed again."""
    folder, _, formula, layers = saved[name]
    checked = Checked(
        load_heads(folder),
        lambda tokens, path: formula(_features(target, tokens, layers), tokens, path),
    )
    decoder = SpeculativeDecoder(_drafter(checked, "top-k"))
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    first = target.generate(**left_pad(rows), custom_generate=decoder, **options)
    cache = first["cache"] if "cache" in first else first["past_key_values"]
    texts = [torch.tensor(greedy(target, row, 6)) for row in rows]
    longer = [torch.cat([text, torch.tensor([7, 8, 9])]) for text in texts]
    num_before, widths = checked.num_checked, []
    hook = target.register_forward_pre_hook(
        lambda module, args, kwargs: (
            widths.append(kwargs["input_ids"].shape[1]) if "input_ids" in kwargs else None
        ),
        with_kwargs=True,
    )
    inputs = left_pad(longer)
    second = target.generate(**inputs, custom_generate=decoder, past_key_values=cache, **options)
    hook.remove()
    # The last token of the first turn is not in the cache.
    assert widths[0] == (max(map(len, longer)) if name == "eagle-3" else 4)
    new = second.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    assert new == [greedy(target, row, 6)[len(row) :] for row in longer]
    assert checked.num_checked > num_before + 20 and checked.worst < 1e-4


@pytest.mark.parametrize("name", ["eagle-3", "medusa-some", "medusa-rows", "speculator-some"])
def test_heads_draft_only_what_their_vocabulary_holds(target, rows, saved, name: str) -> None:
    ids = draft_ids(VOCAB, DRAFT_VOCAB)
    seen: set[int] = set()

    class Spy(ModelDrafter):
        def propose(self, context: DraftContext) -> Any:
            proposal = super().propose(context)
            for tokens, size in zip(
                proposal.tree.tokens.tolist(), proposal.tree.num_nodes.tolist(), strict=True
            ):
                seen.update(tokens[1:size])
            return proposal

    for tree in TREES.values():
        drafter = Spy(load_heads(saved[name][0]), tree)
        target.generate(
            **left_pad(rows), max_new_tokens=6, do_sample=True,
            custom_generate=SpeculativeDecoder(drafter, seed=0),
        )  # fmt: skip
    assert len(seen) > 20 and seen <= set(ids.tolist())


def _rewritten(folder: Path, to: Path, change: Callable[[dict, dict], None]) -> Path:
    """A copy of a checkpoint with its config and tensors changed."""
    config = json.loads((folder / "config.json").read_text())
    (source,) = [path for path in folder.iterdir() if path.name != "config.json"]
    is_safe = source.suffix == ".safetensors"
    tensors = load_file(source) if is_safe else torch.load(source, weights_only=True)
    change(config, tensors)
    to.mkdir(exist_ok=True)
    (to / "config.json").write_text(json.dumps(config))
    if is_safe:
        save_file({k: v.contiguous() for k, v in tensors.items()}, to / source.name)
    else:
        torch.save(tensors, to / source.name)
    return to


def _drop(key: str) -> Callable[[dict, dict], None]:
    return lambda config, tensors: tensors.pop(key)


def _cut(key: str) -> Callable[[dict, dict], None]:
    def change(config: dict, tensors: dict) -> None:
        tensors[key] = tensors[key][:-1].clone()

    return change


def _set(key: str, value: object) -> Callable[[dict, dict], None]:
    return lambda config, tensors: config.update({key: value})


def _add(key: str) -> Callable[[dict, dict], None]:
    return lambda config, tensors: tensors.update({key: torch.zeros(64)})


def _shift_id(config: dict, tensors: dict) -> None:
    tensors["d2t"][0] = -1


def _repeat_id(config: dict, tensors: dict) -> None:
    tensors["d2t"][1] = tensors["d2t"][0] - 1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("medusa", _drop("1.0.linear.bias"),
         r"medusa_lm_head.pt: must have the tensor 1.0.linear.bias \[64\], found 14 others: 0.0"),
        ("medusa", _cut("0.1.linear.weight"),
         r"medusa_lm_head.pt: 0.1.linear.weight must be \[64, 64\], found \[63, 64\]"),
        ("medusa", _set("medusa_num_heads", 4),
         r"medusa_lm_head.pt: must have the tensor 3.0.linear.weight \[64, 64\]"),
        ("speculator", _drop("speculator.proj.2.weight"),
         r"model.safetensors: must have the tensor speculator.proj.2.weight \[24, 24\]"),
        ("speculator", _set("inner_dim", 23),
         r"speculator.emb.0.weight must be \[101, 23\], found \[101, 24\]"),
        ("speculator", _set("vocab_size", "many"),
         r"config.json: vocab_size must be a number >= 1, found 'many'"),
        ("eagle-1", _cut("fc.weight"),
         r"pytorch_model.bin: fc.weight must be \[64, 128\], found \[63, 128\]"),
        ("eagle-1", _drop("layers.0.mlp.up_proj.weight"),
         r"must have the tensor layers.0.mlp.up_proj.weight \[48, 64\]"),
        ("eagle-1", _set("num_hidden_layers", 2), r"num_hidden_layers must be 1, found 2"),
        ("eagle-1", _set("hidden_act", "gelu"), r"hidden_act must be silu, found 'gelu'"),
        ("eagle-1", _set("rope_scaling", {"rope_type": "yarn"}), r"must be one of .*found 'yarn'"),
        ("eagle-3", _drop("d2t"), r"must have the tensor d2t \[40\]"),
        ("eagle-3", _drop("midlayer.hidden_norm.weight"),
         r"must have the tensor midlayer.hidden_norm.weight \[64\]"),
        ("eagle-3", _set("draft_vocab_size", 41),
         r"lm_head.weight must be \[41, 64\], found \[40, 64\]"),
        ("medusa", _add("0.2.bias"), r"medusa_lm_head.pt: must have no tensor 0.2.bias, found"),
        ("speculator", _add("speculator.forget_ln.0.weight"), r"no tensor speculator.forget_ln"),
        ("eagle-1", _add("layers.0.input_layernorm.weight"),
         r"pytorch_model.bin: must have no tensor layers.0.input_layernorm.weight, found \[64\]"),
        ("eagle-3", _add("midlayer.mlp.up_proj.bias"), r"no tensor midlayer.mlp.up_proj.bias"),
        ("medusa-some", _shift_id, r"d2t must map draft ids to .* found \[-1, "),
        ("medusa-some", _drop("1.2.weight"), r"must have the tensor 1.2.weight \[40, 64\]"),
        ("medusa-rows", _cut("d2t"), r"medusa_lm_head.pt: d2t must be \[40\]"),
        ("speculator-some", _drop("speculator.d2t"), r"must have the tensor speculator.d2t \[40\]"),
        ("speculator-lent", _set("inner_dim", 24),
         r"must have the tensor speculator.emb.0.weight \[101, 24\]"),
        ("eagle-3", _repeat_id, r"d2t must map draft ids to distinct target ids in \[0, 101\)"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    saved, tmp_path: Path, name: str, change: Callable[[dict, dict], None], message: str
) -> None:
    folder = _rewritten(saved[name][0], tmp_path / "changed", change)
    with pytest.raises(ValueError, match=message) as error:
        load_heads(folder)
    assert str(error.value).startswith(str(folder))


def test_a_folder_that_holds_no_heads_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent: no such folder"):
        load_heads(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"config.json: no such file"):
        load_heads(tmp_path)
    config = tmp_path / "config.json"
    for text, message in (
        ("{", r"config.json: cannot be read"),
        ("[]", r"config.json: must be a JSON object, found list"),
        ("{}", r"must have \*.safetensors, \*.bin or \*.pt, found none"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_heads(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 99)
    with pytest.raises(ValueError, match=r"model.safetensors: cannot be read"):
        load_heads(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"config.json: must describe Medusa .*model_type None"):
        load_heads(tmp_path)
    index = {"weight_map": {"x": "model.safetensors", "y": "more.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json: must have the file more.safetensors"):
        load_heads(tmp_path)


def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (exec, ("raise SystemExit('ran')",))

    (tmp_path / "config.json").write_text('{"medusa_num_heads": 1}')
    torch.save({"0.1.weight": Evil()}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ValueError, match=r"medusa_lm_head.pt: cannot be read"):
        load_heads(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((60, VOCAB), r"for a hidden size of 60, LlamaForCausalLM has 64"),
     ((SIZE, 99), r"for a vocabulary of 99, LlamaForCausalLM has 101")],
)  # fmt: skip
def test_heads_for_another_target_are_refused(
    target, rows, tmp_path: Path, sizes: tuple[int, int], message: str
) -> None:
    save_medusa(tmp_path, *sizes)
    decoder = SpeculativeDecoder(ModelDrafter(load_heads(tmp_path)))
    with pytest.raises(ValueError, match=message):
        target.generate(**left_pad(rows[:1]), max_new_tokens=3, custom_generate=decoder)


def test_features_of_layers_that_the_target_lacks_are_refused(tmp_path: Path) -> None:
    save_eagle3(tmp_path, SIZE, VOCAB, DRAFT_VOCAB)
    decoder = SpeculativeDecoder(ModelDrafter(load_heads(tmp_path)))
    (row,) = random_prompts((5,), VOCAB)
    with pytest.raises(ValueError, match=r"come from the layers \[2, 1, -1\], it has 2"):
        make_tiny_model(2).generate(**left_pad([row]), max_new_tokens=3, custom_generate=decoder)


@pytest.mark.parametrize("name", ["medusa", "speculator", "eagle-3"])
def test_heads_see_the_features_of_compiled_steps(target, rows, saved, name: str) -> None:
    inputs = left_pad(rows)
    steps = []
    for compiled in (False, "eager"):
        decoder = SpeculativeDecoder(
            _drafter(load_heads(saved[name][0]), "top-k"), budget=False, compile=compiled
        )
        output = target.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, custom_generate=decoder
        )
        want = [greedy(target, row, NEW)[len(row) :] for row in rows]
        assert output[:, inputs["input_ids"].shape[1] :].tolist() == want
        steps.append((decoder.stats.num_steps, decoder.stats.num_accepted))
        assert not decoder.stats.num_failures
    assert steps[0] == steps[1], "drafts from the same features are the same"


@pytest.mark.parametrize("sizes", [[2, 2], [1, 2], [2, 0]])
def test_a_level_s_states_lie_behind_those_of_each_row(sizes: list[int]) -> None:
    kept, new = torch.randn((2, 2, 3)), torch.randn((2, 4, 3))
    placed = place(kept, new, sizes)
    for b, size in enumerate(sizes):
        assert torch.equal(placed[b, : size + 4], torch.cat([kept[b, :size], new[b]]))


@contextmanager
def _prefilled(
    model: PreTrainedModel, network: DraftNetwork, prompts: Sequence[Tensor]
) -> Iterator[DraftContext]:
    """The network attached to the model, which has the prompts in its cache."""
    target = HFTarget(model, capacity=64)
    texts = [prompt.tolist() for prompt in prompts]
    with torch.no_grad(), tree_attention_in(model), network.attach(HFTargetView(target)):
        target.prefill(texts)
        network.begin(len(texts), 8)
        sequences = [[*text, 3] for text in texts]
        batch = len(texts)
        yield DraftContext(
            sequences, [True] * batch, [9] * batch, torch.device("cpu"), VOCAB, GREEDY
        )


@pytest.mark.parametrize("name", ["eagle-1", "eagle-3", "speculator"])
def test_levels_of_different_sizes_are_what_each_row_gives_alone(
    target, rows, saved, name: str
) -> None:
    levels = [[[(5, -1), (6, -1)], [(7, -1)]], [[(8, 1)], [(9, 0), (10, 0), (11, 0)]]]

    def logits(chosen: Sequence[int]) -> list[Tensor]:
        network = load_heads(saved[name][0])
        with _prefilled(target, network, [rows[i] for i in chosen]) as context:
            network.start(context)
            given = [network.extend([level[i] for i in chosen]) for level in levels]
        return [
            out[b, : len(level[i])]
            for out, level in zip(given, levels, strict=True)
            for b, i in enumerate(chosen)
        ]

    first, second = logits([0]), logits([1])
    for got, want in zip(logits([0, 1]), [first[0], second[0], first[1], second[1]], strict=True):
        assert float((got - want).abs().max() / want.abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["eagle-3", "medusa"])
def test_an_adviser_names_the_target_s_tokens(target, rows, saved, name: str) -> None:
    network = load_heads(saved[name][0])
    adviser = Adviser(network, 2, 2, num_tokens=4)
    with _prefilled(target, network, rows[:2]) as context:
        adviser.begin(2)
        laws = network.start(context).log_softmax(-1).exp()
    ids = torch.arange(laws.shape[1])
    ids = ids if network.offsets is None else ids + network.offsets
    with _prefilled(target, network, rows[:2]) as context:
        adviser.begin(2)
        for law, advice in zip(laws, adviser.start(context), strict=True):
            best = law.topk(4)
            assert list(advice.probabilities) == ids[best.indices].tolist()
            assert list(advice.probabilities.values()) == pytest.approx(best.values.tolist())
