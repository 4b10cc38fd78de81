"""What the `heads` command shows."""

from rich.table import Table

from pyfastcircuits.result import Result

__all__ = ["head_table"]

SCORES = ("induction", "prefix_matching", "previous_token", "duplicate_token", "copying")
EVIDENCE = ("k_composition", "matching", "copying")


def head_table(scores: Result, found: Result | None, top: int) -> Table:
    """Heads by induction score, of head_scores; with what their weights say, of induction_heads."""
    table = Table(title="Heads by induction score, on random tokens that come again", collapse_padding=True)
    evidence = () if found is None else ("after", "K-comp. z", "matching", "OV copies")
    for name in ("head", *(name.replace("_", " ") for name in SCORES), *evidence):
        table.add_column(name, justify="right", overflow="fold")  # in a narrow window, of names rather than figures
    table.caption = "copying: share of what a head raises that is for the tokens it attends to; -1: none, 1: all."
    pairs = [] if found is None else found.pairs.tolist()
    places = {tuple(destination): i for i, (_, destination) in enumerate(pairs)}
    measured = [getattr(scores, name).flatten() for name in SCORES]
    for i in scores.values.flatten().argsort(descending=True, stable=True)[:top].tolist():
        head = divmod(i, scores.values.shape[1])
        row = ["{}.{}".format(*head), *(f"{float(x[i]):.3f}" for x in measured)]
        if found is not None and (at := places.get(head)) is not None:
            z, *signs = (float(getattr(found, name)[at]) for name in EVIDENCE)
            row += ["{}.{}".format(*pairs[at][0]), f"{z:+.1f}", *(f"{x:+.3f}" for x in signs)]
        table.add_row(*row)
    if found is not None:
        table.caption += (
            "\nafter: the earlier head that attends most to the previous token. By the weights alone: K-comp. z, how\n"
            "their K-composition stands out from a random rotation; matching, positivity of the eigenvalues of their\n"
            "composed QK circuit; OV copies, that of the head's OV circuit."
        )
    return table
