"""The VAE of `pvae.VAE.mlp`, 784-400-50 and Bernoulli, by other means: plain PyTorch, NumPyro and pythae.

Each takes its weights from a pvae VAE, so that all start from the same, and does the same calculation. NumPyro comes
with ``pip install .[bench]``. pythae 0.1.2 asks for a backport of ``dataclasses`` that has no place in Python 3.11, so
leave that out::

    pip install --no-deps pythae && pip install cloudpickle imageio pydantic
"""

from __future__ import annotations

import copy
import io
import logging
import math
import os
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, relu

import pvae

LR = 1e-3
MAX_LOG_SCALE = 7.0

Epoch = Callable[[], float]
"""One pass over the data; returns the training ELBO, in nats per datum."""

LogPx = Callable[[], tuple[float, int]]
"""Estimates log p(x) of some images; returns its mean, in nats per datum, and how many images there were."""


def layers(vae: pvae.VAE) -> list[nn.Linear]:
    """Copies of the linear layers: the encoder's two and the decoder's two."""
    return [copy.deepcopy(m) for part in (vae.encoder, vae.decoder) for m in part.modules() if isinstance(m, nn.Linear)]


# --- Plain PyTorch -------------------------------------------------------------------------------------------------


def log_weights(parts: list[nn.Linear], x: Tensor, *draws: int) -> Tensor:
    """``log p(x, z) - log q(z|x)`` for draws of z from q(z|x), shape ``(*draws, N)``; ``x`` has shape ``(N, 784)``."""
    encode, infer, generate, decode = parts
    loc, raw = infer(relu(encode(x))).chunk(2, -1)
    log_scale = MAX_LOG_SCALE * torch.tanh(raw / MAX_LOG_SCALE)
    noise = torch.randn(*draws, *loc.shape, device=x.device)
    z = loc + log_scale.exp() * noise
    logits = decode(relu(generate(z)))
    log_px = -binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
    return log_px + (0.5 * (noise.square() - z.square()) + log_scale).sum(-1)


def plain(vae: pvae.VAE, x: Tensor, batch_size: int, *, compiled: bool = False) -> Epoch:
    """Written by hand, with one fused Adam; ``torch.compile`` makes a graph for each of the two sizes of batches."""
    parts, x = layers(vae), x.flatten(1)
    optimizer = torch.optim.Adam([p for layer in parts for p in layer.parameters()], lr=LR, fused=True)

    def loss(batch: Tensor) -> Tensor:
        return -log_weights(parts, batch).sum()

    if compiled:
        loss = torch.compile(loss, dynamic=False, mode="reduce-overhead" if x.is_cuda else "default")

    def epoch() -> float:
        total = torch.zeros((), device=x.device)
        for rows in torch.randperm(len(x), device=x.device).split(batch_size):
            value = loss(x[rows])
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += value.detach()
        return -total.item() / len(x)

    return epoch


def plain_log_px(vae: pvae.VAE, x: Tensor, num_samples: int, *, compiled: bool = False) -> LogPx:
    """Importance sampling from the guide, written by hand, some thousands of pairs of a draw and a datum at once."""
    parts, x = layers(vae), x.flatten(1)
    size = max(1, (100_000 if x.is_cuda else 5000) // num_samples)

    def log_px(batch: Tensor) -> Tensor:
        return log_weights(parts, batch, num_samples).logsumexp(0) - math.log(num_samples)

    if compiled:
        log_px = torch.compile(log_px, dynamic=False)

    def run() -> tuple[float, int]:
        with torch.no_grad():
            return torch.cat([log_px(batch) for batch in x.split(size)]).mean().item(), len(x)

    return run


# --- NumPyro -------------------------------------------------------------------------------------------------------


def numpyro_svi(vae: pvae.VAE, x: Tensor, batch_size: int, *, matmul: str = "highest") -> Epoch:
    """NumPyro's SVI with a whole epoch as one jitted loop, the last, smaller batch included.

    Args:
        vae: Where weights start.
        x: The data.
        batch_size: Data in a batch.
        matmul: JAX's precision of float32 matrix products, which matters on a GPU: "highest", or "tensorfloat32".
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
    import jax
    import numpyro
    import numpyro.distributions as dist
    from jax import numpy as jnp

    device = jax.devices("gpu" if x.is_cuda else "cpu")[0]

    def array(tensor: Tensor) -> Any:
        return jax.device_put(tensor.detach().cpu().numpy(), device)

    starts = [(array(layer.weight.T.contiguous()), array(layer.bias)) for layer in layers(vae)]
    images = array(x.flatten(1))

    def mlp(first: Any, last: Any, inputs: Any) -> Any:
        return jax.nn.relu(inputs @ first[0] + first[1]) @ last[0] + last[1]

    def model(batch: Any) -> None:
        decoder = numpyro.param("decoder", starts[2:])
        with numpyro.plate("data", len(batch)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([decoder[0][0].shape[0]]).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=mlp(*decoder, z)).to_event(1), obs=batch)

    def guide(batch: Any) -> None:
        encoder = numpyro.param("encoder", starts[:2])
        with numpyro.plate("data", len(batch)):
            loc, raw = jnp.split(mlp(*encoder, batch), 2, -1)
            scale = jnp.exp(MAX_LOG_SCALE * jnp.tanh(raw / MAX_LOG_SCALE))
            numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(LR), numpyro.infer.Trace_ELBO())
    full = len(x) // batch_size * batch_size

    @jax.jit
    def steps(state: Any, key: Any, data: Any) -> Any:
        order = jax.random.permutation(key, len(data))
        state, losses = jax.lax.scan(
            lambda now, rows: svi.update(now, data[rows]), state, order[:full].reshape(-1, batch_size)
        )
        total = losses.sum()
        if full < len(data):
            state, loss = svi.update(state, data[order[full:]])
            total += loss
        return state, total

    with jax.default_device(device):
        state = jax.device_put(svi.init(jax.random.key(1), images[:batch_size]), device)
        key = jax.random.key(2)

    def epoch() -> float:
        nonlocal state, key
        with jax.default_device(device), jax.default_matmul_precision(matmul):
            key, now = jax.random.split(key)
            state, total = steps(state, now, images)
            return -float(total) / len(images)

    return epoch


# --- pythae --------------------------------------------------------------------------------------------------------


def pythae_vae(vae: pvae.VAE) -> Any:
    """The VAE of pythae around copies of a VAE's networks."""
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.part = copy.deepcopy(vae.encoder)

        def forward(self, x: Tensor) -> Any:
            loc, raw = self.part.network(x).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=2 * MAX_LOG_SCALE * torch.tanh(raw / MAX_LOG_SCALE))

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.part = copy.deepcopy(vae.decoder)

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.part.network(z).sigmoid())

    config = VAEConfig(input_dim=vae.event_shape, latent_dim=vae.latent_dim, reconstruction_loss="bce")
    return VAE(config, Encoder(), Decoder())


def pythae_trainer(vae: pvae.VAE, x: Tensor, batch_size: int) -> Epoch:
    """The trainer of pythae, an epoch at a time; its ELBO is a mean of batch means, with the KL in closed form."""
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    with tempfile.TemporaryDirectory() as folder:
        logging.disable(logging.INFO)
        config = BaseTrainerConfig(folder, batch_size, learning_rate=LR, no_cuda=not x.is_cuda)
        trainer = BaseTrainer(pythae_vae(vae), BaseDataset(x.cpu(), torch.zeros(len(x))), training_config=config)
        trainer.prepare_training()
        logging.disable(logging.NOTSET)

    def epoch() -> float:
        with redirect_stderr(io.StringIO()):  # a progress bar
            return -trainer.train_step(1)

    return epoch


def pythae_log_px(vae: pvae.VAE, x: Tensor, num_samples: int) -> LogPx:
    """The importance sampling of pythae, without gradients; it makes whole batches of draws, so their size is that."""
    model = pythae_vae(vae).to(x.device)

    def run() -> tuple[float, int]:
        with torch.no_grad():
            return float(model.get_nll(x, num_samples, num_samples)), len(x)

    return run
