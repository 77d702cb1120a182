"""Connecting to a Ray cluster."""

from __future__ import annotations

from typing import Any

from blip3o_rt.errors import ParameterError, first_line


def connected(address: str) -> Any:
    """Ray, connected to a cluster.

    Args:
        address: As ray.init takes it: "auto", "local" or "ray://host:port".

    Raises:
        ParameterError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ParameterError(f"--ray needs {error.name}: pip install 'blip3o_rt[ray]'") from None
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ParameterError(f"--ray {address}: there is no cluster ({first_line(error)})") from None
    return ray
