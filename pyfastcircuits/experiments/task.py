"""Tasks: pairs of a clean and a corrupted prompt, and the answers that tell them apart."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyfastcircuits.adapters.tracing import trace
from pyfastcircuits.arguments import as_integer, describe, public
from pyfastcircuits.experiments import task_templates
from pyfastcircuits.experiments.metrics import NLL, LogitDifference, MetricSpec
from pyfastcircuits.model.weights import CircuitWeights
from pyfastcircuits.run.trace import FrozenTrace

Padding = Literal["right", "left"]


class Task:
    """Prompts in pairs, and what the model is asked at the end of each.

    Attributes:
        name: what it is called.
        clean, corrupted: [B, T], tokens; padding is token 0.
        mask: [B, T], which tokens are real.
        positions: [B, T], where answers are asked: each prompt's last token, unless the task says otherwise.
        answers: [B, T, K], the right tokens, -1 where a set has fewer; read at `positions` alone.
        against: [B, T, K'], the wrong ones; None: the answers' loss is measured, and no difference of logits.
    """

    @public
    def __init__(
        self,
        clean: Iterable[Any],
        corrupted: Iterable[Any],
        answers: Iterable[Any],
        against: Iterable[Any] | None = None,
        *,
        tokenizer: Any = None,
        start: int | None = None,
        padding: Padding = "right",
        name: str = "task",
    ) -> None:
        """A task of B prompts, whose lengths may differ from pair to pair.

        Args:
            clean, corrupted: B prompts each, strings or sequences of token ids. The two of a pair are of one length.
            answers: of each clean prompt the token that should come next, or a set or list of such: their mean logit
                counts.
            against: likewise, the tokens whose logits are subtracted.
            tokenizer: for strings: an object with `encode` (of tokenizers or transformers), or a function of a string.
                No special token is added.
            start: a token in front of each prompt, such as the one that the model was trained to find there.
            padding: the side on which short prompts are padded. Positions count from the first real token.
            name: what it is called.

        Raises:
            TypeError: prompts or answers that are neither strings nor token ids; strings without a tokenizer.
            ValueError: numbers of prompts and answers that differ, a pair of two lengths, an empty prompt or set, an
                answer that is not a single token.
        """
        sides = {"clean": list(clean), "corrupted": list(corrupted), "answers": list(answers)}
        if against is not None:
            sides["against"] = list(against)
        if len({len(side) for side in sides.values()}) > 1 or not sides["clean"]:
            counts = ", ".join(f"{len(side)} {name}" for name, side in sides.items())
            raise ValueError(f"clean and the others are {counts}, expected as many of each, at least 1")
        read = _Reader(tokenizer, [] if start is None else [start])
        prompts = {side: [read.prompt(side, x) for x in sides[side]] for side in ("clean", "corrupted")}
        for one, other in zip(prompts["clean"], prompts["corrupted"], strict=True):
            if len(one) != len(other):
                raise ValueError(
                    f"corrupted holds a prompt of {len(other)} tokens, but the clean one has {len(one)}: the two of a "
                    f"pair must be of one length"
                )
        self.name = name
        self.clean, self.mask = _padded(prompts["clean"], padding)
        self.corrupted, _ = _padded(prompts["corrupted"], padding)
        self.positions = torch.zeros_like(self.mask)
        last = [self.mask.shape[1] - 1 if padding == "left" else len(prompt) - 1 for prompt in prompts["clean"]]
        self.positions[torch.arange(len(last)), last] = True
        sets = {side: _sets([read.tokens(side, x) for x in sides[side]]) for side in sides if side.startswith("a")}
        length = self.mask.shape[1]
        self.answers = sets["answers"][:, None].expand(-1, length, -1)
        self.against = sets["against"][:, None].expand(-1, length, -1) if "against" in sets else None

    def __repr__(self) -> str:
        """Its sizes."""
        return f"Task({self.name}: {len(self)} pairs of up to {self.clean.shape[1]} tokens)"

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.clean)

    @property
    def metric(self) -> MetricSpec:
        """What is measured: the difference of mean logits of `answers` and `against`, or the answers' loss."""
        if self.against is not None:
            return LogitDifference(self.answers, self.against)
        if self.answers.shape[-1] > 1:
            raise ValueError("against is None, but answers holds sets: a loss asks about one token")
        return NLL(self.answers[..., 0])

    @property
    def options(self) -> dict[str, Any]:
        """`metric` and `positions`, for any experiment on the task's runs."""
        return {"metric": self.metric, "positions": self.positions}

    @public
    def runs(
        self, model: Any, *, weights: CircuitWeights | None = None, store: Literal["patterns", "qk"] = "patterns"
    ) -> tuple[FrozenTrace, FrozenTrace]:
        """The runs of a model on the clean and on the corrupted prompts.

        Args:
            model, weights, store: as in `trace`.

        Raises:
            Those of `trace`.
        """
        if weights is None:
            weights = model if isinstance(model, CircuitWeights) else CircuitWeights.from_model(model)
        device = weights.device
        mask = None if bool(self.mask.all()) else self.mask.to(device)
        one, other = (
            trace(model, tokens.to(device), mask, store=store, weights=weights)
            for tokens in (self.clean, self.corrupted)
        )
        return one, other

    @staticmethod
    @public
    def load(
        file: str | Path,
        tokenizer: Any = None,
        *,
        start: int | None = None,
        padding: Padding = "right",
    ) -> "Task":
        """A task in a JSONL file: on each line "clean", "corrupted", "answers" and perhaps "against".

        Prompts are strings or lists of token ids; answers are one token, as string or id, or a list of them.

        Raises:
            OSError: the file cannot be read.
            ValueError: a line is no such object; else as Task.
            TypeError: as Task.
        """
        rows = []
        try:
            lines = Path(file).read_text().splitlines()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"file is {describe(str(file))}, which cannot be read: {reason}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"file is {str(file)!r}, whose line {number} is no JSON: {error}") from None
            if not isinstance(row, dict) or not {"clean", "corrupted", "answers"} <= row.keys():
                raise ValueError(f"file is {str(file)!r}, whose line {number} lacks 'clean', 'corrupted' or 'answers'")
            rows.append(row)
        has_against = {"against" in row for row in rows}
        if len(has_against) > 1:
            raise ValueError(f"file is {str(file)!r}, where some lines have 'against' and others do not")
        columns = {name: [row[name] for row in rows] for name in ("clean", "corrupted", "answers")}
        against = [row["against"] for row in rows] if has_against == {True} else None
        return Task(**columns, against=against, tokenizer=tokenizer, start=start, padding=padding, name=Path(file).stem)

    @staticmethod
    @public
    def induction(
        vocabulary: int, *, batch: int = 16, length: int = 12, start: int | None = 0, seed: int = 0
    ) -> "Task":
        """Random tokens, of which the last has come before: which one followed it?

        In the corrupted prompt another token stands in the place where it came before, and all else is the same: what
        tells the two apart is what previous-token heads write there. The token that followed another one counts
        against the answer.

        Args:
            vocabulary: the number of tokens; random ones are drawn from all of them but `start`.
            batch: the number of pairs.
            length: different tokens in front of the last one.
            start: the token in front; None: nothing is.
            seed: of the tokens.

        Raises:
            ValueError: batch below 1, length below 4, or more tokens than the vocabulary has.
        """
        if not 4 <= length < vocabulary - 1:
            raise ValueError(f"length is {length}, expected 4 to {vocabulary - 2}, two less than the vocabulary")
        generator = torch.Generator().manual_seed(seed)
        front = [] if start is None else [start]
        clean, corrupted, answers, against = [], [], [], []
        for _ in range(_count(batch)):
            drawn = torch.randperm(vocabulary, generator=generator)
            *tokens, other = drawn[drawn != (-1 if start is None else start)][: length + 1].tolist()
            asked, compared = (2 * torch.randperm(length // 2, generator=generator)[:2]).tolist()
            clean.append([*front, *tokens, tokens[asked]])
            corrupted.append([*front, *tokens[:asked], other, *tokens[asked + 1 :], tokens[asked]])
            answers.append(tokens[asked + 1])
            against.append(tokens[compared + 1])
        return Task(clean, corrupted, answers, against, name="induction")

    @staticmethod
    @public
    def indirect_object(
        tokenizer: Any, *, batch: int = 16, start: int | None = None, padding: Padding = "right", seed: int = 0
    ) -> "Task":
        """ "When Mary and John went to the shop, John gave a book to": which name comes next? (Wang et al. 2023.)

        In the corrupted prompt the other name comes twice, so that the answer is the one that counted against.

        Args:
            tokenizer: of the model, see Task. Names that it does not make one token are left out.
            batch: the number of pairs.
            start, padding: see Task.
            seed: of names, places and things.

        Raises:
            ValueError: batch below 1; a tokenizer that makes fewer than four of the names one token.
        """
        clean, corrupted, answers, against = task_templates.indirect_object(encoder(tokenizer), _count(batch), seed)
        return Task(
            clean, corrupted, answers, against, tokenizer=tokenizer, start=start, padding=padding,
            name="indirect-object",
        )  # fmt: skip

    @staticmethod
    @public
    def greater_than(
        tokenizer: Any, *, batch: int = 16, start: int | None = None, padding: Padding = "right", seed: int = 0
    ) -> "Task":
        """ "The war lasted from the year 1732 to the year 17": which two digits come next? (Hanna et al. 2023.)

        The answers are all larger ones, and all others count against them. In the corrupted prompt the first year ends
        in 01.

        Args:
            tokenizer: of the model, see Task. It must make the century one token and the two digits another.
            batch: the number of pairs.
            start, padding: see Task.
            seed: of nouns, centuries and years.

        Raises:
            ValueError: batch below 1; a tokenizer that does not split years so.
        """
        clean, corrupted, answers, against = task_templates.greater_than(encoder(tokenizer), _count(batch), seed)
        return Task(
            clean, corrupted, answers, against, tokenizer=tokenizer, start=start, padding=padding, name="greater-than"
        )


def _count(batch: int) -> int:
    if batch < 1:
        raise ValueError(f"batch is {batch}, expected at least 1")
    return batch


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """The tokens of a string, none added in front or behind.

    Raises:
        TypeError: no tokenizer.
    """
    encode = getattr(tokenizer, "encode", None)
    if encode is None and not callable(tokenizer):
        raise TypeError(f"tokenizer is {describe(tokenizer)}, expected one with encode, or a function of a string")

    def tokens(text: str) -> list[int]:
        found = tokenizer(text) if encode is None else encode(text, add_special_tokens=False)
        return [as_integer(token) for token in getattr(found, "ids", found)]

    return tokens


class _Reader:
    """Prompts and answers as token ids."""

    def __init__(self, tokenizer: Any, front: list[int]) -> None:
        self.encode, self.front = None if tokenizer is None else encoder(tokenizer), front

    def prompt(self, name: str, prompt: Any) -> list[int]:
        """The token ids of a prompt, with what stands in front; errors as Task."""
        ids = self._ids(name, prompt)
        if not ids:
            raise ValueError(f"{name} holds an empty prompt")
        if len(self.front) + len(ids) < 2:
            raise ValueError(f"{name} holds a prompt of one token, expected at least two, or `start`")
        return self.front + ids

    def tokens(self, name: str, entry: Any) -> list[int]:
        """The token or tokens of an answer; errors as Task."""
        several = not isinstance(entry, str) and hasattr(entry, "__iter__") and getattr(entry, "shape", None) != ()
        found = [self._token(name, one) for one in (entry if several else [entry])]
        if not found:
            raise ValueError(f"{name} holds an empty set")
        return sorted(set(found))

    def _token(self, name: str, entry: Any) -> int:
        ids = self._ids(name, entry if isinstance(entry, str) else [entry])
        if len(ids) != 1:
            raise ValueError(f"{name} holds {entry!r}, which is {len(ids)} tokens, expected one")
        return ids[0]

    def _ids(self, name: str, entry: Any) -> list[int]:
        if isinstance(entry, str):
            if self.encode is None:
                raise TypeError(f"{name} holds {describe(entry)}, expected token ids: there is no tokenizer")
            return self.encode(entry)
        try:
            ids = [as_integer(token) for token in entry]
        except (TypeError, RuntimeError):
            raise TypeError(f"{name} holds {describe(entry, entries=True)}, expected strings or token ids") from None
        if any(token < 0 for token in ids):
            raise ValueError(f"{name} holds {min(ids)}, expected token ids")
        return ids


def _padded(prompts: Sequence[list[int]], padding: Padding) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] and mask [B, T]."""
    length = max(map(len, prompts))
    tokens, mask = (
        torch.zeros(len(prompts), length, dtype=torch.long),
        torch.zeros(len(prompts), length, dtype=torch.bool),
    )
    for row, real, prompt in zip(tokens, mask, prompts, strict=True):
        where = slice(length - len(prompt), None) if padding == "left" else slice(0, len(prompt))
        row[where], real[where] = torch.tensor(prompt), True
    return tokens, mask


def _sets(sets: Sequence[list[int]]) -> Tensor:
    """[B, K], -1 where a set has fewer than the largest."""
    out = torch.full((len(sets), max(map(len, sets))), -1)
    for row, tokens in zip(out, sets, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return out
