"""Which drafter a command uses: its options, and what they make.

Modules that import torch or transformers are imported inside the functions that need them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from .drafters import Drafter, DraftNetwork
    from .drafters.model import TreePlan
    from .hf.text import TextModel

DraftModelName = Annotated[
    str | None,
    typer.Option(
        "--draft-model", help="For --drafter draft or auto: a folder or id, as for --model."
    ),
]
ExitLayer = Annotated[
    int | None, typer.Option(min=1, help="For --drafter early-exit: layers of the target to run.")
]
HeadsFolder = Annotated[
    Path | None,
    typer.Option(
        "--heads",
        help="A folder of trained heads, for --drafter heads (any kind), eagle, mlp, medusa, "
        "streaming or auto.",
    ),
]
Tree = Annotated[
    str,
    typer.Option(
        help='Of drafters with a network: "top-k", or children by depth, sampled: 4-2-1-1.'
    ),
]
Depth = Annotated[int | None, typer.Option(min=1, help="Deepest node of a top-k tree; 7.")]
Width = Annotated[
    int | None,
    typer.Option(min=1, help="Beams of a top-k tree; a quarter of its nodes, from 4 to 10."),
]
Siblings = Annotated[
    Literal["distinct", "independent", "greedy"],
    typer.Option(help="Sampled trees: drawn without or with replacement, or one drawn beside top."),
]
DraftTemperature = Annotated[
    float | None, typer.Option(min=0.0, help="Of sampled trees; the target's if not given.")
]

_HEADS = {
    "heads": (),
    "eagle": ("Eagle1Head", "Eagle3Head"),
    "mlp": ("MLPSpeculator",),
    "medusa": ("MedusaHeads",),
    "streaming": ("SpeculativeStreams",),
}
"""Drafter -> the classes of heads that go by its name; any if none is named."""
_SHIPPED = ("eagle", "mlp")
_NEEDS = {"draft": "draft_model", "early-exit": "exit_layer"} | {
    name: "heads" for name in _HEADS if name not in _SHIPPED
}
"""Drafter -> the option that it needs."""
_MAY_HAVE = {"heads": (*_SHIPPED, "auto"), "draft_model": ("auto",)}
"""Option -> the drafters that take it and need not have it."""
_HAVE_TREES = (*_NEEDS, *_SHIPPED)


def widths_of(tree: str) -> tuple[int, ...]:
    """Children by depth, of a sampled tree.

    Raises:
        typer.BadParameter: something else.
    """
    widths = tree.split("-")
    if not all(width.isdecimal() and int(width) > 0 for width in widths):
        raise typer.BadParameter(
            f'--tree must be "top-k" or children by depth like 4-2-1-1, got {tree!r}'
        )
    return tuple(int(width) for width in widths)


@dataclass(frozen=True, slots=True)
class DrafterOptions:
    """The options of one command; `check` comes before a model is loaded, `make` after.

    Attributes:
        name: of the drafter.
        max_nodes: most nodes of a tree, root included; None is the drafter's default.
        draft_model, exit_layer: what `draft` and `early-exit` need.
        heads: what drafters with trained heads need, unless they are `eagle` or `mlp`, which
            otherwise have the package's own. `auto` may have one of `heads` and `draft_model`.
        tree: "top-k" or children by depth, joined by "-".
        depth, width: of a top-k tree; None is its default.
        siblings: how a sampled tree draws them.
        draft_temperature: of a sampled tree.
    """

    name: str
    max_nodes: int | None = None
    draft_model: str | None = None
    exit_layer: int | None = None
    heads: Path | None = None
    tree: str = "top-k"
    depth: int | None = None
    width: int | None = None
    siblings: str = "distinct"
    draft_temperature: float | None = None

    def check(self) -> None:
        """Refuse options that do not belong together.

        Raises:
            typer.BadParameter: names them.
            ValueError: an unknown drafter.
        """
        for option in dict.fromkeys(_NEEDS.values()):
            flag, is_given = f"--{option.replace('_', '-')}", getattr(self, option) is not None
            if _NEEDS.get(self.name) == option:
                if not is_given:
                    raise typer.BadParameter(f"--drafter {self.name} needs {flag}")
            elif is_given and self.name not in _MAY_HAVE.get(option, ()):
                raise typer.BadParameter(f"--drafter {self.name} does not take {flag}")
        if self.name in _HAVE_TREES:
            self._plan()
            return
        if self._tree_options():
            raise typer.BadParameter(
                f"--{self._tree_options()[0]} needs --drafter {', '.join(_HAVE_TREES)}"
            )
        if self.heads is not None and self.draft_model is not None:
            raise typer.BadParameter("--drafter auto takes --heads or --draft-model, not both")
        self._text_drafter()

    def check_network(self) -> None:
        """Raise typer.BadParameter for a drafter without network, or as `check`."""
        if self.name not in _HAVE_TREES:
            raise typer.BadParameter(
                f"--drafter must have a network: {', '.join(_HAVE_TREES)}; got {self.name!r}"
            )
        self.check()

    def make(self, subject: TextModel) -> Drafter | None:
        """The drafter for this target; None decodes plainly.

        Raises:
            ValueError: a draft model or heads that cannot be loaded or do not fit.
        """
        if self.name not in _HAVE_TREES:
            return self._text_drafter(subject)
        from .drafters import ModelDrafter

        return ModelDrafter(self.network(subject), self._plan())

    def network(self, subject: TextModel) -> DraftNetwork:
        """Of a drafter that has one, see `check_network`.

        Raises:
            ValueError: as `make`.
        """
        from .drafters import load_heads, shipped_heads
        from .hf import EarlyExitModel, load_draft_model

        if self.draft_model is not None:
            dtype = subject.model.dtype
            return load_draft_model(self.draft_model, subject.tokenizer, dtype=dtype)
        if self.exit_layer is not None:
            return EarlyExitModel(self.exit_layer)
        if self.heads is None:
            return shipped_heads(self.name)
        network = load_heads(self.heads)
        kinds, found = _HEADS.get(self.name, ()), type(network).__name__
        if kinds and found not in kinds:
            raise ValueError(
                f"{self.heads}: --drafter {self.name} needs {' or '.join(kinds)}, found {found}"
            )
        return network

    def _plan(self) -> TreePlan:
        from .drafters import SampledTree, TopKTree

        if self.tree == "top-k":
            if self.siblings != "distinct" or self.draft_temperature is not None:
                raise typer.BadParameter("--siblings and --draft-temperature need a sampled --tree")
            given = {"max_nodes": self.max_nodes, "depth": self.depth, "width": self.width}
            return TopKTree(**{name: n for name, n in given.items() if n is not None})
        if self.max_nodes or self.depth or self.width:
            raise typer.BadParameter("--max-nodes, --depth and --width need --tree top-k")
        return SampledTree(
            widths_of(self.tree),
            greedy_drafts=self.siblings == "greedy",
            replacement=self.siblings == "independent",
            temperature=self.draft_temperature,
        )

    def _tree_options(self) -> list[str]:
        default = DrafterOptions(self.name)
        names = ("tree", "depth", "width", "siblings", "draft_temperature")
        return [
            name.replace("_", "-")
            for name in names
            if getattr(self, name) != getattr(default, name)
        ]

    def _text_drafter(self, subject: TextModel | None = None) -> Drafter | None:
        """With the network that `auto` merges, once there is a subject."""
        from .drafters import load_heads, make_drafter

        given: dict[str, Any] = {} if self.max_nodes is None else {"max_nodes": self.max_nodes}
        if subject is None and self.heads is not None:
            load_heads(self.heads)  # what is wrong with them is said before a model is loaded
        elif subject is not None and (self.heads or self.draft_model):
            given["heads"] = self.network(subject)
        drafter = make_drafter(self.name, **given)
        if given and drafter is None:
            raise typer.BadParameter(f"--max-nodes needs a drafter, got --drafter {self.name}")
        return drafter
