"""Train the bundled models on the standard library's source: `python examples/train.py induction-2l`.

CPU, seeded, resumable: a killed run goes on from its last checkpoint when the same command is given again.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor, nn

import pyfastcircuits as fc
from pyfastcircuits.adapters.texts import stdlib_files

MODELS = Path(__file__).parents[1] / "pyfastcircuits" / "models"
START = 0


@dataclass(frozen=True)
class Recipe:
    """What is trained and on what. `random_steps` come first and hold nothing but repeated random tokens."""

    layers: int
    heads: int
    width: int
    steps: int
    random_steps: int = 0
    repeated_rows: int = 0
    rows: int = 24
    context: int = 128
    vocabulary: int = 4096
    learning_rate: float = 2e-3
    seed: int = 0


RECIPES = {
    "bigram-0l": Recipe(layers=0, heads=1, width=128, steps=3000),
    "skip-trigram-1l": Recipe(layers=1, heads=8, width=192, steps=3000),
    "induction-2l": Recipe(layers=2, heads=8, width=256, steps=7000, random_steps=1800, repeated_rows=8),
}


def sinusoids(positions: int, width: int) -> Tensor:
    """Sinusoidal positions of amplitude 1, [positions, width]."""
    rates = torch.exp(-math.log(10_000) * torch.arange(0, width, 2) / width)
    angles = torch.arange(positions)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)


class AttentionOnly(nn.Module):
    """Pre-norm (RMS, no parameters), shortformer positions, no biases: the article's subjects."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        d, heads = recipe.width, recipe.heads
        r, scale = d // heads, d**-0.5
        self.W_E = nn.Parameter(torch.randn(recipe.vocabulary, d))
        self.W_U = nn.Parameter(self.W_E.detach().T.clone() * scale)
        shape = (recipe.layers, heads, d, r)
        self.W_Q, self.W_K, self.W_V = (nn.Parameter(torch.randn(shape) * scale) for _ in range(3))
        self.W_O = nn.Parameter(torch.randn(recipe.layers, heads, r, d) * scale)
        self.register_buffer("W_pos", sinusoids(recipe.context, d))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of tokens [B, T]."""
        residual = self.W_E[tokens]
        for W_Q, W_K, W_V, W_O in zip(self.W_Q, self.W_K, self.W_V, self.W_O, strict=True):
            normed = F.rms_norm(residual, residual.shape[-1:], eps=1e-5)
            addressed = normed + self.W_pos[: tokens.shape[1]]
            q, k, v = (_heads(x, W) for x, W in ((addressed, W_Q), (addressed, W_K), (normed, W_V)))
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            residual = residual + z.transpose(1, 2).flatten(2) @ W_O.flatten(0, 1)
        return F.rms_norm(residual, residual.shape[-1:], eps=1e-5) @ self.W_U


def _heads(x: Tensor, W: Tensor) -> Tensor:
    heads, d, r = W.shape
    return (x @ W.transpose(0, 1).reshape(d, heads * r)).unflatten(-1, (heads, r)).transpose(1, 2)


def train_tokenizer(path: Path, vocabulary: int) -> Tokenizer:
    """A byte-level BPE of the training files, written once as tokenizer.json."""
    if not path.exists():
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train([str(f) for f in stdlib_files(held_out=False)], vocabulary, special_tokens=["[START]"])
        tokenizer.save(str(path))
    return Tokenizer.from_file(str(path))


def encode_files(tokenizer: Tokenizer, held_out: bool) -> Tensor:
    """Every file's tokens, one after the other, each behind [START]."""
    ids: list[int] = []
    for path in stdlib_files(held_out):
        ids += [START, *tokenizer.encode(path.read_text(encoding="utf-8", errors="replace")).ids]
    return torch.tensor(ids)


def repeated_rows(rows: int, length: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """[START] S S S ... of uniform random tokens, a new length of S for each row."""
    out = torch.full((rows, length), START)
    for row in out:
        period = int(torch.randint(6, length // 2, (), generator=generator))
        unit = torch.randint(1, vocabulary, (period,), generator=generator)
        row[1:] = unit.repeat(math.ceil(length / period))[: length - 1]
    return out


def text_rows(text: Tensor, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """[START] and then the text from a random place on."""
    starts = torch.randint(0, len(text) - length, (rows,), generator=generator)
    out = text[starts[:, None] + torch.arange(length)]
    out[:, 0] = START
    return out


def batch(recipe: Recipe, step: int, text: Tensor, generator: torch.Generator) -> Tensor:
    """The rows of one step. Random steps are 32 rows of 96 tokens: induction forms sooner on short rows."""
    if step < recipe.random_steps:
        return repeated_rows(32, 96, recipe.vocabulary, generator)
    repeated = repeated_rows(recipe.repeated_rows, recipe.context, recipe.vocabulary, generator)
    written = text_rows(text, recipe.rows - recipe.repeated_rows, recipe.context, generator)
    return torch.cat((repeated, written))


def learning_rate(recipe: Recipe, step: int) -> float:
    """100 steps of warm-up, flat to the end of the random steps, then a cosine to 5%."""
    done = max(0, step - recipe.random_steps) / (recipe.steps - recipe.random_steps)
    return recipe.learning_rate * min(1, (step + 1) / 100) * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


def loss_of(model: AttentionOnly, tokens: Tensor) -> Tensor:
    logits = model(tokens)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(name: str, folder: Path, checkpoint_every: int) -> None:
    recipe = RECIPES[name]
    torch.manual_seed(recipe.seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(folder / "tokenizer.json", recipe.vocabulary)
    text = encode_files(tokenizer, held_out=False)
    held_out = text_rows(encode_files(tokenizer, held_out=True), 64, recipe.context, torch.Generator().manual_seed(1))

    model = AttentionOnly(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(recipe.seed)
    losses: list[tuple[int, float]] = []
    step, checkpoint = 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        step, losses = state["step"], state["losses"]

    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=recipe.steps, completed=step, loss="")
        while step < recipe.steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step)
            loss = loss_of(model, batch(recipe, step, text, generator))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            if step % 100 == 0 or step == recipe.steps:
                with torch.no_grad():
                    written = loss_of(model, held_out).item()
                losses.append((step, loss.item()))
                progress.console.print(f"step {step}: batch {loss.item():.3f}, held-out text {written:.3f}")
            progress.update(task, completed=step, loss=f"{loss.item():.3f}")
            if step % checkpoint_every == 0 or step == recipe.steps:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                state |= {"generator": generator.get_state(), "losses": losses}
                torch.save(state, checkpoint.with_suffix(".tmp"))
                checkpoint.with_suffix(".tmp").replace(checkpoint)
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    weights = fc.CircuitWeights(**tensors, positional="shortformer", norm="rmsnorm", eps=1e-5)
    weights.save(folder / "model.safetensors", half=True)
    (folder / "README.md").write_text(card(name, recipe, folder, losses))


def induction_scores(weights: fc.CircuitWeights, sequences: int = 64, period: int = 50) -> dict[str, Tensor]:
    """[START] S S with S uniform random tokens: NLL over the first and the second S, and attention scores [L, H].

    The induction score is the mean attention of the second S to the token after the same token's first occurrence, the
    previous-token score the mean attention to the position before (Olsson et al. 2022).
    """
    generator = torch.Generator().manual_seed(2)
    unit = torch.randint(1, weights.d_vocab, (sequences, period), generator=generator)
    run = fc.trace(weights, torch.cat((torch.full((sequences, 1), START), unit, unit), 1))
    patterns = torch.stack(run.patterns) if run.patterns else torch.zeros(0, 1, weights.n_heads, 1, 1)
    induction = patterns.diagonal(1 - period, -2, -1)[..., 2:].mean((1, 3))  # from the second S on
    previous = patterns.diagonal(-1, -2, -1).mean((1, 3))
    first, second = run.token_losses.split(period, 1)
    return {"first": first.mean(), "second": second.mean(), "induction": induction, "previous": previous}


def card(name: str, recipe: Recipe, folder: Path, losses: list[tuple[int, float]]) -> str:
    """The model card: what it was trained on and what it measures now."""
    weights, tokenizer = fc.load_weights(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = encode_files(tokenizer, held_out=True)
    rows = text[: len(text) // recipe.context * recipe.context].view(-1, recipe.context).clone()
    rows[:, 0] = START
    orders = fc.order_losses(fc.trace(weights, rows))
    scores = induction_scores(weights)
    training = encode_files(tokenizer, held_out=False)
    text_rows_a_step = recipe.rows - recipe.repeated_rows
    epochs = (recipe.steps - recipe.random_steps) * text_rows_a_step * recipe.context / len(training)
    curve = " ".join(f"{step}:{loss:.2f}" for step, loss in losses if step % 500 == 0)
    lines = [
        "---",
        "license: apache-2.0",
        "language: code",
        "---",
        f"# {name}",
        "",
        f"Attention-only transformer: n_layers {recipe.layers}, n_heads {recipe.heads}, d_head "
        f"{recipe.width // recipe.heads}, d_model {recipe.width}, {recipe.vocabulary} tokens, {recipe.context} positions. Shortformer positions "
        "(sinusoids added to the inputs of W_Q and W_K), RMS norm without parameters before every layer and before "
        "W_U, no biases, no MLPs. Stored as float16, loaded as float32.",
        "",
        f"- Made by `python examples/train.py {name}`, seed {recipe.seed}, on the CPU.",
        f"- Text: the source of the standard library of Python {sys.version_info.major}.{sys.version_info.minor}, "
        f"{len(training):,} tokens of training files and {len(text):,} held out by a hash of their path; byte-level BPE.",
        f"- {recipe.steps} steps of AdamW, rate {recipe.learning_rate}."
        + (
            f" Steps 1 to {recipe.random_steps} hold only repeated random tokens (32 rows of 96); after that a step "
            f"holds {recipe.repeated_rows} such rows and {text_rows_a_step} of text. The repeated rows are mixed in on purpose: "
            "they bring induction about within minutes."
            if recipe.repeated_rows
            else f" A step holds {recipe.rows} rows of text."
        )
        + f" {epochs:.1f} epochs of text.",
        f"- Loss of the batch at every 500th step: {curve}.",
        f"- Held-out text, all paths up to each order (uniform is {math.log(recipe.vocabulary):.2f}): "
        + ", ".join(f"{x:.2f}" for x in orders.tolist())
        + " nats a token.",
        f"- [START] S S, S of 50 random tokens: {scores['first']:.2f} nats over the first S, {scores['second']:.2f} over "
        "the second.",
    ]
    for layer in range(recipe.layers):
        shown = {kind: " ".join(f"{x:.2f}" for x in scores[kind][layer].tolist()) for kind in ("induction", "previous")}
        lines.append(
            f"- Layer {layer}, heads 0 to {recipe.heads - 1}: induction scores {shown['induction']}; previous-token "
            f"scores {shown['previous']}."
        )
    lines += [
        "",
        "What it is for: trying every analysis of the article on a model whose mechanisms are known. Its text is Python "
        "source, which repeats itself far more than prose does"
        + (", and its random rows reward copying alone" if recipe.repeated_rows else "")
        + ": the share of each order in its loss is not that of a language model of English.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("--out", type=Path, default=None, help="folder of models (default: the package's own)")
    parser.add_argument("--checkpoint-every", type=int, default=250)
    arguments = parser.parse_args()
    train(arguments.model, (arguments.out or MODELS) / arguments.model, arguments.checkpoint_every)
