"""`python examples/train_drafters corpus`, then the drafter to train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import corpus
import features
import torch
import typer
from checkpoints import write_card
from draft_model import Draft
from eagle import Eagle
from medusa import Medusa
from mlp_speculator import Speculator
from streaming import Streams
from torch import Tensor
from training import Schedule, System, train

from specdec_kernels.hf.features import HFTargetView
from specdec_kernels.hf.target import HFTarget
from specdec_kernels.hf.text import TextModel, silence_transformers
from specdec_kernels.registry import cpu_capability

app = typer.Typer(no_args_is_help=True, add_completion=False)

Folder = Annotated[Path, typer.Option(help="Where the corpus and the trained weights go.")]
Model = Annotated[str, typer.Option(help="The target: smollm2, a folder, or a HuggingFace id.")]
Dtype = Annotated[Literal["bf16", "fp32"], typer.Option(help="Of the target and of its features.")]
Epochs = Annotated[int, typer.Option(min=1, help="Times that each conversation is seen.")]
Rate = Annotated[float, typer.Option(min=0.0, help="Largest learning rate.")]
DraftVocab = Annotated[
    int, typer.Option(min=1, help="Tokens that can be drafted: the most frequent ones.")
]
Depths = Annotated[int, typer.Option(min=1, help="Tokens ahead that are learned.")]
Exclude = Annotated[
    list[Path] | None,
    typer.Option(exists=True, help="JSON lines with turns that must not be learned; repeatable."),
]
Licence = Annotated[str, typer.Option(help="Of the weights, for their card.")]
FOLDER = Path("results/drafters")
CORPUS = "corpus"


@app.callback()
def about() -> None:
    """Train drafters on what their target wrote. Every command goes on where it stopped."""


@app.command(name="corpus")
def write_corpus(
    folder: Folder = FOLDER,
    model: Model = "smollm2",
    dtype: Dtype = "bf16",
    tokens: Annotated[int, typer.Option(min=1, help="Least tokens to write.")] = 1_000_000,
    first_shard: Annotated[
        int, typer.Option(min=0, help="Its number; far ones for other processes, same folder.")
    ] = 0,
) -> None:
    """Let the target write conversations, and compute its features for them."""
    target = _load(model, dtype)
    written = corpus.Writer(target, folder / CORPUS).write(tokens, first_shard)
    features.compute(target.model, written)  # other processes compute those of theirs


def _add_command(
    name: str,
    make: Callable[[HFTargetView, Tensor, Path, int], System],
    *,
    vocab: int,
    ahead: int,
    largest_rate: float = 1e-3,
    times: int = 2,
) -> None:
    def command(
        folder: Folder = FOLDER,
        model: Model = "smollm2",
        dtype: Dtype = "bf16",
        epochs: Epochs = times,
        rate: Rate = largest_rate,
        draft_vocab: DraftVocab = vocab,
        depths: Depths = ahead,
        exclude: Exclude = None,
        licence: Licence = "to be filled in; mind the target's own",
    ) -> None:
        target = _load(model, dtype)
        network = target.model.requires_grad_(False)
        if network.device.type == "cpu" and cpu_capability() != "avx512_bf16":
            network.float()  # without products of bfloat16 the larger numbers are the faster ones
        view = HFTargetView(HFTarget(network, capacity=1))
        paths = exclude or []
        examples = features.Examples(folder / CORPUS, corpus.read_texts(paths, target))
        ids = examples.frequent_tokens(draft_vocab, view.vocab_size)
        system = make(view, ids, folder / name, depths)
        facts = train(system, examples, folder / name, Schedule(epochs, rate))
        write_card(folder / name, name, model, licence, paths, facts, system.use)
        shares = ", ".join(f"{share:.1%}" for share in facts["held_out"]["hit_rate"])
        typer.echo(f"{folder / name}: right first guesses by depth on held-out text: {shares}")

    app.command(name, help=f"Train {name} on the corpus.")(command)


_add_command("eagle", Eagle, vocab=8192, ahead=3, largest_rate=2e-3)
_add_command("mlp-speculator", Speculator, vocab=3072, ahead=4, largest_rate=1e-2)
_add_command("medusa", Medusa, vocab=8192, ahead=4, largest_rate=2e-3)
_add_command("streaming", Streams, vocab=8192, ahead=3, largest_rate=2e-3, times=1)
_add_command("draft", Draft, vocab=8192, ahead=1, times=1)


def _load(model: str, dtype: str) -> TextModel:
    silence_transformers()
    target = TextModel(model, dtype=dtype)
    target.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return target


if __name__ == "__main__":
    app()
