"""The connectors against the same network built of torch modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blip3o_rt.connector.model import Connector


def network(features_in: int, features_out: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(features_in, features_out),
        nn.GELU(approximate="tanh"),
        nn.Linear(features_out, features_out),
        nn.RMSNorm(features_out, eps=1e-5),
    )
    nn.init.normal_(layers[3].weight, 1.0, 0.3)  # type: ignore[arg-type]
    for parameter in layers[2].parameters():
        parameter.data *= 0.03  # so small that the norm's epsilon shows
    return layers.requires_grad_(False)


def connector(layers: nn.Sequential, dtype: torch.dtype) -> Connector:
    weights = {
        f"diffusion_connector.{name}": tensor.to(dtype) for name, tensor in layers.state_dict().items()
    }
    return Connector(weights, "diffusion_connector")


@pytest.mark.parametrize(("features_in", "features_out"), [(1, 1), (7, 24), (64, 96)])
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3)])
def test_equals_the_network_in_float32(features_in: int, features_out: int, shape: tuple[int, ...]) -> None:
    layers = network(features_in, features_out)
    features = torch.randn(*shape, features_in)
    found = connector(layers, torch.float32)(features)
    torch.testing.assert_close(found, layers(features), rtol=1e-5, atol=1e-5)  # order of sums


def test_bfloat16_weights_take_float32_features() -> None:
    layers = network(64, 96).bfloat16()
    features = torch.randn(50, 64)
    exact = layers.double()(features.double())
    found = connector(layers, torch.bfloat16)(features)
    assert found.dtype == torch.bfloat16
    error = (found.double() - exact).norm() / exact.norm()
    assert error < 4 * 2.0**-9  # features, two intermediate results and the output are rounded, each by 2^-9


def test_zeros_do_not_stay_zeros() -> None:
    layers = network(6, 8)
    assert connector(layers, torch.float32)(torch.zeros(1, 6)).abs().min() > 0
