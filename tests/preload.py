"""What processes that are forked for a test have loaded already, which would else take each of them five seconds."""

from __future__ import annotations

import torch

import pvae

torch.set_num_threads(1)
_x = torch.zeros(4, 6)
for _likelihood in ("bernoulli", "gaussian"):
    _vae = pvae.VAE.mlp(6, 2, [8], _likelihood)
    pvae.fit(_vae.model, _vae.guide, _x, epochs=1, validation=_x, compile=False, progress=False)
    pvae.log_evidence(_vae.model, _vae.guide, _x, num_samples=2)
