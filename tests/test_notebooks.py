"""The notebooks of examples/ run, and what they hold is what they print."""

import importlib.util
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install 'pyfastcircuits[test]'")
pytest.importorskip("nbclient", reason="pip install 'pyfastcircuits[test]'")

from support.run_notebook import executed, words_and_numbers  # noqa: E402


def printed(cell):
    return words_and_numbers("".join(output.text for output in cell.outputs if output.output_type == "stream"))


def figures(cell):
    return sum(output.output_type == "display_data" and "image/png" in output.data for output in cell.outputs)


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb")), ids=lambda f: f.stem)
def test_outputs_are_what_the_cells_print(file, tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    held = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    made = [cell for cell in executed(file).cells if cell.cell_type == "code"]
    assert file.stat().st_size < 400_000
    for old, new in zip(held, made, strict=True):
        assert old.execution_count == new.execution_count  # held outputs are of one run from top to bottom
        if "transformers" in old.metadata.get("tags", ()) and not importlib.util.find_spec("transformers"):
            assert "needs transformers" in printed(new)[0]
            continue
        (words, numbers), (new_words, new_numbers) = printed(old), printed(new)
        assert words == new_words
        assert numbers == pytest.approx(new_numbers, rel=1e-2, abs=2e-3)
        assert figures(old) == figures(new)
    assert sum(map(figures, made)) > 0
