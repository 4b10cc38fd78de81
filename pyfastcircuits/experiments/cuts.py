"""How a measurement is cut to stay in bounded memory: its arithmetic, which plans of sweeps share."""

from pyfastcircuits.run import memory

SHORTEST = 32  # bytes of a removal at a position, counted at least


def sequences_at_once(length: int, removal: int, clean: int, block: int, clean_block: int) -> int:
    """The number of sequences whose removals fill a block, and whose clean logits are held at a time.

    `removal` and `clean` are the bytes of each at one position; 0 clean ones: none are held.
    """
    rows = min(block // removal, memory.ROWS)
    if clean:
        rows = min(rows, clean_block // clean)
    return max(1, rows // (length - 1))


def experiments_at_once(rows: int, removal: int, block: int) -> int:
    """The number of experiments whose removals fill a block, of so many bytes at each of the rows."""
    return max(1, block // (rows * max(removal, SHORTEST)))


def narrow(r: int, d: int, heads: int, removals: int) -> bool:
    """Whether to make W_O @ W_U of some heads is less work than to multiply removals by W_O and then, wide, by W_U."""
    return heads > 0 and heads * r * d <= removals * (d - r)
