"""Tokens and names that would run, or show otherwise than they are, where a page took them for its own."""

from tokenizers import Tokenizer, models, pre_tokenizers

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "'\"><svg onload=alert(1)>",
    "<!--",
    "javascript:alert(1)",
    "=1+1",
    "\u2028\u2029",
    "\u202eback",
    "{{ 7*7 }}",
    "&lt;b&gt;",
]
NAME = "\"><script>alert('name')</script>"


def hostile_tokenizer(size=97):
    words = HOSTILE + [f"a{i}" for i in range(len(HOSTILE), size)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a96"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    return tokenizer
