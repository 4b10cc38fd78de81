"""A mean that takes a head's place is one of real positions, whatever stands at padded ones."""

import pytest
import torch
from support.hooked import Hooked
from support.random_models import random_tokens, random_weights

import pyfastcircuits as fc

LENGTHS = (7, 4, 6)


@pytest.mark.parametrize("attention", ["frozen", "recomputed"])
@pytest.mark.parametrize("over", ["all", "positions", "batch"])
def test_means_leave_padding_out(over, attention):
    w, given = random_weights(3, norm="rmsnorm", positional="none"), random_tokens(3, 7)
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    found = fc.head_ablation(fc.trace(w, given, mask), "mean", attention, over=over, per_token=True)
    alone = [Hooked(w, given[b : b + 1, :n]) for b, n in enumerate(LENGTHS)]
    for place in ((0, 1), (2, 3)):
        z = [run.z[place][0] for run in alone]
        for b, n in enumerate(LENGTHS):
            mean = {
                "all": torch.cat(z).mean(0),
                "positions": z[b].mean(0),
                "batch": torch.stack([torch.stack([x[t] for x in z if t < len(x)]).mean(0) for t in range(n)]),
            }[over]

            def instead(name, layer, head, x, place=place, mean=mean):
                return mean.expand_as(x) if name == "z" and (layer, head) == place else x

            frozen = (alone[b], alone[b].scales["final"]) if attention == "frozen" else ()
            logits = Hooked(w, given[b : b + 1, :n], instead, *frozen).logits[:, :-1].log_softmax(-1)
            losses = -logits.gather(-1, given[b : b + 1, 1:n, None])[0, :, 0]
            torch.testing.assert_close(found.values[place][b, : n - 1], losses, rtol=1e-9, atol=1e-9)
            assert found.values[place][b, n - 1 :].isnan().all()
