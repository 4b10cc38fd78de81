"""What Triton's interpreter launches: the kernels for a GPU so small that splits hold several tiles of these shapes."""

import pytest

from pyfastcircuits.kernels import configs


@pytest.fixture(autouse=True)
def _a_small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "WAVES", 4)
    monkeypatch.setattr(configs, "MULTIPROCESSORS", dict.fromkeys(configs.MULTIPROCESSORS, 1))
