"""How the numbers and the tokens of a report are put into its page: as JSON, large arrays in few bytes.

A large array is a mapping of its shape, its type and its bytes in base64. Half precision ("f16") is scaled so that the
largest value is 2048: values down to 3e-8 of it keep three digits. Shares of 1 ("u8") are multiples of 1/255.
"""

import base64
import json
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyfastcircuits.adapters.texts import TokenText, no_token

_LARGEST = 2048.0
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
_SHOWN = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍", "": "empty"}

Packed = dict[str, Any]


def halves(values: Tensor) -> Packed:
    """An array in half precision; NaN stays NaN."""
    values = values.detach().double().cpu()
    finite = values[values.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    scale = largest / _LARGEST or 1.0
    return _packed("f16", (values / scale).half(), scale)


def shares(values: Tensor) -> Packed:
    """An array of values from 0 to 1, to 1/255."""
    return _packed("u8", (values.detach().double().cpu() * 255).round().clamp(0, 255).to(torch.uint8), 1 / 255)


def numbers(values: Tensor) -> Packed:
    """An array of whole numbers from 0 to 65,535."""
    return _packed("u16", values.cpu().to(torch.uint16), 1.0)


def _packed(kind: str, values: Tensor, scale: float) -> Packed:
    return {
        "shape": list(values.shape),
        "type": kind,
        "scale": scale,
        "bytes": base64.b64encode(bytes_of(values)).decode("ascii"),
    }


def bytes_of(values: Tensor) -> bytes:
    """The bytes of a tensor's values, in order."""
    content: bytes = values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return content


def rounded(values: Tensor) -> Any:
    """A small array as lists of numbers of six significant digits; null where a value is none."""
    return _rounded(values.detach().double().cpu().tolist())


def _rounded(values: Any) -> Any:
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return None if values != values or abs(values) == float("inf") else float(f"{values:.6g}")


def as_json(found: Any) -> str:
    """JSON that may stand in a script element of a page: it holds no <, > or &, and no line break of JavaScript's."""
    return json.dumps(found, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


class Pieces:
    """The tokens that a report speaks of, each once, as the page shows them: `shown` is what goes into it.

    A token's entry is its text where that is printable; else a list, its text and then parts that are in turn plain and
    replaced: a space by ·, a line break by ↵, a byte that is no character by 0xe2.
    """

    def __init__(self, text: TokenText) -> None:
        self._text = text
        self._bytes = _byte_decoder(text)
        self._places: dict[int, int] = {}
        self.shown: list[str | list[str]] = []

    def __call__(self, tokens: Any) -> Any:
        """Where tokens stand in `shown`: for a token, or lists of them."""
        if isinstance(tokens, Tensor):
            tokens = tokens.tolist()
        if isinstance(tokens, (list, tuple)):
            return [self(token) for token in tokens]
        if tokens not in self._places:
            self._places[tokens] = len(self.shown)
            self.shown.append(self._entry(tokens))
        return self._places[tokens]

    def _entry(self, token: int) -> str | list[str]:
        if self._text.tokenizer is None:
            return [str(token), "", f"#{token}"]
        if not self._text.has(token):
            return [no_token(token), "", no_token(token)]
        content = self._bytes(token)
        parts = _parts(self._text.decode([token]) if content is None else content)
        if len(parts) == 1 and parts[0]:
            return parts[0]
        raw = self._text.decode([token]) if content is None else content.decode("utf-8", errors="backslashreplace")
        return [raw.encode("utf-8", errors="backslashreplace").decode(), *parts]


def _parts(content: str | bytes) -> list[str]:
    """A token's content as parts that are in turn plain and replaced."""
    parts, replaced = [""], False
    pieces = content if isinstance(content, str) else _characters(content)
    for piece in pieces or [""]:
        shown = _replacement(piece)
        if (shown is not None) != replaced:
            parts.append("")
            replaced = not replaced
        space = " " if replaced and len(shown or "") > 1 and parts[-1] else ""
        parts[-1] += piece if isinstance(piece, str) and shown is None else f"{space}{shown}"
    return parts


def _characters(content: bytes) -> Sequence[str | bytes]:
    """The characters of some bytes; bytes that are no character stand alone."""
    out: list[str | bytes] = []
    start = 0
    while start < len(content):
        for end in range(min(start + 4, len(content)), start, -1):
            try:
                character = content[start:end].decode("utf-8")
            except UnicodeDecodeError:
                continue
            out += character
            break
        else:
            end = start + 1
            out.append(content[start:end])
        start = end
    return out


def _replacement(piece: str | bytes) -> str | None:
    """What stands for a character or byte that is not shown as it is; None if it is."""
    if isinstance(piece, bytes):
        return f"0x{piece.hex()}"
    if piece in _SHOWN:
        return _SHOWN[piece]
    if piece.isprintable() and not unicodedata.combining(piece):
        return None
    return f"U+{ord(piece):04X}"


def _byte_decoder(text: TokenText) -> Callable[[int], bytes | None]:
    """The bytes of a token of a byte-level tokenizer; None for other tokens."""
    if text.tokenizer is None:
        return lambda token: None
    decoder = json.loads(text.tokenizer.to_str()).get("decoder") or {}
    special = {token for token, added in text.tokenizer.get_added_tokens_decoder().items() if added.special}
    if any(part.get("type") == "ByteLevel" for part in (decoder, *decoder.get("decoders", ()))):
        alphabet = _byte_alphabet()

        def of_letters(token: int) -> bytes | None:
            letters = text.tokenizer.id_to_token(token)
            if token in special or not all(letter in alphabet for letter in letters):
                return None
            return bytes(alphabet[letter] for letter in letters)

        return of_letters

    underlined = "▁" in json.dumps(decoder, ensure_ascii=False)  # for a space: decoding would drop the first

    def of_name(token: int) -> bytes | None:
        name = text.tokenizer.id_to_token(token)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes.fromhex(name[3:5])
        return name.replace("▁", " ").encode() if underlined and token not in special else None

    return of_name


def _byte_alphabet() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte: itself if it is visible, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
