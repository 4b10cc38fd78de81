"""Cells of the notebooks that need another library, without a kernel."""

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="pip install 'pyfastcircuits[hf]'")
matplotlib = pytest.importorskip("matplotlib")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

from support.run_notebook import words_and_numbers  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.filterwarnings("ignore")
def test_the_cell_about_ones_own_model(capsys):
    matplotlib.use("Agg")
    cells = [c for c in nbformat.read(EXAMPLES / "from_transformer_lens.ipynb", 4).cells if c.cell_type == "code"]
    (own,) = (cell for cell in cells if "transformers" in cell.metadata.get("tags", ()))
    names = {}
    exec(cells[0].source, names)
    capsys.readouterr()
    exec(own.source, names)  # it asserts for itself
    words, numbers = words_and_numbers(capsys.readouterr().out)
    held_words, held = words_and_numbers("".join(output.text for output in own.outputs))
    assert words == held_words
    assert numbers == pytest.approx(held, rel=1e-2, abs=2e-3)
