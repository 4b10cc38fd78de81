"""Every family and its variants: experiments are plain reruns of the model's own modules, tables its own scores."""

from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="pip install 'pyfastcircuits[hf]'")

from support.configurations import ALONE, CONFIGURATIONS, IN_FP32, LATENT, WITHOUT_QK, build, nothing_in_fp32, tokens  # noqa: E402
