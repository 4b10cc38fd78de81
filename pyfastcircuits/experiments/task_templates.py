"""Prompts of the tasks that need no data set: their templates, and what a tokenizer must do with them."""

from collections.abc import Callable

import torch

Encode = Callable[[str], list[int]]
Prompts = tuple[list[str], list[str], list[list[int]], list[list[int]]]  # clean, corrupted, answers, against

NAMES = (
    "Mary", "John", "Tom", "James", "Dan", "Sarah", "Anna", "Paul", "Mark", "Kate", "Peter", "Jane", "Bob", "Alice",
    "David", "Laura", "Simon", "Emma", "Jack", "Lucy",
)  # fmt: skip
PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station")
THINGS = ("ring", "kiss", "bone", "drink", "book", "computer", "necklace", "snack")
OBJECTS = (
    "When{a} and{b} went to the {place},{s} gave a {thing} to",
    "Then,{a} and{b} had a long talk at the {place}, and{s} gave a {thing} to",
    "After{a} and{b} arrived at the {place},{s} handed a {thing} to",
)
NOUNS = ("war", "siege", "reign", "plague", "voyage", "dispute", "famine", "project")
YEARS = "The {noun} lasted from the year {century}{year} to the year {century}"


def _pick(options: tuple[str, ...] | list[str], generator: torch.Generator) -> str:
    return options[int(torch.randint(len(options), (), generator=generator))]


def indirect_object(encode: Encode, batch: int, seed: int) -> Prompts:
    """See Task.indirect_object."""
    ids = {f" {name}": encode(f" {name}") for name in NAMES}
    names = [name for name, tokens in ids.items() if len(tokens) == 1]
    if len({ids[name][0] for name in names}) < 4:
        raise ValueError(
            f"tokenizer makes {len(names)} of {len(NAMES)} names one token each, such as ' Mary' and ' John'; the "
            "indirect-object task needs at least 4 different ones"
        )
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted, answers, against = [], [], [], []
    for _ in range(batch):
        first, second = (names[i] for i in torch.randperm(len(names), generator=generator)[:2].tolist())
        template = _pick(OBJECTS, generator)
        words = {"a": first, "b": second, "place": _pick(PLACES, generator), "thing": _pick(THINGS, generator)}
        subject, indirect = (first, second) if torch.rand((), generator=generator) < 0.5 else (second, first)
        clean.append(template.format(**words, s=subject))
        corrupted.append(template.format(**words, s=indirect))
        answers.append(ids[indirect])
        against.append(ids[subject])
    return clean, corrupted, answers, against


def greater_than(encode: Encode, batch: int, seed: int) -> Prompts:
    """See Task.greater_than."""
    digits = [f"{i:02d}" for i in range(1, 100)]
    centuries = [f"{i}" for i in range(11, 18)]
    ids = {two: encode(f" 17{two}")[-1:] for two in digits}
    usable = [c for c in centuries if len(encode(f" {c}")) == 1]
    wrong = [f" {c}{two}" for c in usable for two in digits if encode(f" {c}{two}") != [*encode(f" {c}"), *ids[two]]]
    if not usable or wrong or len({x for two in ids.values() for x in two}) < len(digits):
        example = wrong[0] if wrong else " 1732"
        raise ValueError(
            f"tokenizer makes {encode(example)} of {example!r}; the greater-than task needs years of two tokens, the "
            "century and two digits"
        )
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted, answers, against = [], [], [], []
    for _ in range(batch):
        year = int(torch.randint(2, 99, (), generator=generator))
        words = {"noun": _pick(NOUNS, generator), "century": _pick(usable, generator)}
        clean.append(YEARS.format(**words, year=f"{year:02d}"))
        corrupted.append(YEARS.format(**words, year="01"))
        answers.append([ids[two][0] for two in digits if int(two) > year])
        against.append([ids[two][0] for two in digits if int(two) <= year])
    return clean, corrupted, answers, against
