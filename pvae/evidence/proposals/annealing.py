"""Annealed importance sampling: chains that walk from a tractable density to the posterior, and back.

``f_b(u) = q(u)^(1-b) p(x, u)^b`` leads from the start q at b = 0 to the joint at b = 1. A chain collects
``log w = sum_t (b_t - b_(t-1)) [log p(x, u_t) - log q(u_t)]`` and moves by Hamiltonian Monte Carlo in between; then
``E[w] = p(x)``, however badly it mixes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pvae.errors import positive_int, real_number
from pvae.evidence.densities import Batch, Densities
from pvae.evidence.latents import Latents
from pvae.evidence.proposals.base import Gaussian, Guide, Prior, Proposal, Sampler
from pvae.evidence.proposals.gaussians import Elliptical
from pvae.evidence.proposals.slopes import log_joint_and_slope, run_in_tiles

__all__ = ["Annealed", "Chains", "ladder"]

_KEPT = 0.7  # of a momentum, from one move to the next
_TRIES = 20  # moves for the first step size
_PRIOR_WIDTH = 4.0
_GAUSSIAN_WIDTH = 2.0


@dataclass(frozen=True)
class Annealed(Proposal):
    """Annealed importance sampling from a start to the posterior; ``num_samples`` is the number of chains.

    Step sizes are tuned for each datum and temperature by pilot chains, towards ``acceptance``, and then frozen: steps
    that adapt inside of a weighted run would bias it. From a Gaussian start chains move in coordinates in which it is
    standard.

    Args:
        start: `pvae.evidence.proposals.Guide` (seen as a Gaussian), another Gaussian proposal, or the prior.
        temperatures: ``T``, how many steps from q to p; the variance of log w falls about as ``1 / T``.
        leapfrog_steps: For each temperature.
        acceptance: Of moves, aimed at in tuning.
        pilots: Chains for tuning, over a quarter of the temperatures.

    Source: Neal, 2001, Annealed Importance Sampling; Wu, Burda, Salakhutdinov and Grosse, 2017, On the Quantitative
    Analysis of Decoder-Based Generative Models; for momenta that are kept in part, Horowitz, 1991, A Generalized Guided
    Monte Carlo Algorithm, and Sohl-Dickstein and Culpepper, 2012, Hamiltonian Annealed Importance Sampling.
    """

    start: Gaussian | Prior = field(default_factory=Guide)
    temperatures: int = 100
    leapfrog_steps: int = 3
    acceptance: float = 0.65
    pilots: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.start, Prior):
            Gaussian.check("start", self.start)
        for argument in ("temperatures", "leapfrog_steps", "pilots"):
            positive_int(argument, getattr(self, argument))
        real_number("acceptance", self.acceptance, above=0, below=1)

    @property
    def name(self) -> str:
        """What to call it in results."""
        return f"AIS from the {self.start.name}, {self.temperatures} temperatures"

    @property
    def words(self) -> str:
        """The same for a reader."""
        return f"chains annealed from {self.start.words} over {self.temperatures} temperatures"

    def count_evaluations(self, num_samples: int) -> int:
        """About how often the model is evaluated for each datum and so many chains; a gradient counts as two more."""
        moves = num_samples * self.temperatures + self.pilots * (self._tuned + _TRIES)
        return self.start.count_evaluations(0) + 3 * self.leapfrog_steps * moves

    def on(self, pair: Densities, batch: Batch) -> Chains:
        """Chains for the data of one batch, with step sizes tuned and frozen."""
        if isinstance(self.start, Prior):
            pair.check_prior()
        start = None if isinstance(self.start, Prior) else replace(self.start.gaussian(pair, batch), sobol=None)
        width = _PRIOR_WIDTH if start is None else _GAUSSIAN_WIDTH
        chains = Chains(pair, batch, start, ladder(self._tuned, width), self.leapfrog_steps)
        chains.tune(self.pilots, self.acceptance)
        return chains.over(ladder(self.temperatures, width))

    @property
    def _tuned(self) -> int:
        """Temperatures of the pilot chains."""
        return min(self.temperatures, max(10, self.temperatures // 4))


def ladder(temperatures: int, width: float = _GAUSSIAN_WIDTH) -> Tensor:
    """``b_0 = 0 < ... < b_T = 1``, denser at both ends: a logistic curve over ``-width`` to ``width``, scaled.

    Shape ``(T + 1,)``. A prior is far from the posterior, and chains from it leave slowly at first: width 4. Chains
    from a Gaussian that is near gain by more even steps.
    """
    curve = torch.sigmoid(torch.linspace(-width, width, temperatures + 1, dtype=torch.float64))
    return (curve - curve[0]) / (curve[-1] - curve[0])


@dataclass(eq=False)
class Chains(Sampler):
    """Annealing chains for the data of one batch; v are the coordinates that they move in.

    Attributes:
        start: The density at b = 0; the prior if none.
        betas: Shape ``(T + 1,)``.
        leapfrog_steps: For each temperature.
        step_sizes: Frozen, for the temperatures ``b_1`` to ``b_(T-1)``, shape ``(T - 1, N)``.
    """

    start: Elliptical | None
    betas: Tensor
    leapfrog_steps: int
    step_sizes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.step_sizes = torch.zeros(0)
        self._accepted: list[Tensor] = []
        self._ends: list[tuple[Tensor, Tensor, Tensor]] = []

    def tune(self, pilots: int, target: float) -> None:
        """Finds step sizes with pilot chains, which count for nothing else."""
        state = self._begin(pilots)
        _, num_data, dim = state.v.shape
        size = torch.full((num_data,), 0.5 / dim**0.25, dtype=torch.float64, device=state.v.device)
        sizes = []
        for index, beta in enumerate(self.betas[1:-1].tolist()):
            # The first size is a guess, and is given some tries: great steps at first, then small ones.
            for rate in [2.0] * (_TRIES // 2) + [1.0] * (_TRIES // 2) if index == 0 else [1.0]:
                state, accepted = self._move(state, beta, size)
                size = size * torch.exp(rate * (accepted.mean(0) - target))
            sizes.append(size)
        self.step_sizes = torch.stack(sizes) if sizes else size.new_zeros(0, num_data)

    def over(self, betas: Tensor) -> Chains:
        """The chains over other temperatures, ``(T + 1,)``, with step sizes in between those that were tuned."""
        other = replace(self, betas=betas, diagnostics={})
        if len(self.step_sizes):
            tuned = self.betas[1:-1].contiguous()
            place = torch.searchsorted(tuned, betas[1:-1].clamp(tuned[0], tuned[-1])).clamp(1, max(1, len(tuned) - 1))
            below, above = place - 1, place.clamp(max=len(tuned) - 1)
            share = (betas[1:-1] - tuned[below]) / (tuned[above] - tuned[below]).clamp(min=1e-12)
            logs = self.step_sizes.log()
            share = share.clamp(0, 1).to(logs)[:, None]
            other.step_sizes = (logs[below] + share * (logs[above] - logs[below])).exp()
        return other

    def log_weights(self, num_samples: int) -> Tensor:
        """Returns log w of K fresh chains for each datum, nats, shape ``(K, N)``."""
        state = self._begin(num_samples)
        total = torch.zeros(state.v.shape[:2], dtype=torch.float64, device=state.v.device)
        for t in range(1, len(self.betas)):
            total += self._gain(state, t)
            if t < len(self.betas) - 1:
                state, accepted = self._move(state, self.betas[t].item(), self.step_sizes[t - 1])
                self._accepted.append(accepted.mean(0))
        if self._accepted:
            self.diagnostics["acceptance"] = torch.stack(self._accepted).mean(0)
            self._ends.append((total, state.v, state.slope_p))
            self.diagnostics["reach"] = _reach(*map(torch.cat, zip(*self._ends, strict=True)))
        return total

    def reverse_log_weights(self, latents: Latents, num_samples: int) -> Tensor:
        """Runs K chains back from draws of the posterior, so that ``E[1 / w] = 1 / p(x)``.

        Args:
            latents: One draw of ``p(z|x)`` for each datum, such as the z that x was simulated from.
            num_samples: ``K`` chains from each.

        Returns:
            log w, nats, shape ``(K, N)``.
        """
        v = self._coordinates(latents)
        state = self._at(v.expand(num_samples, *v.shape[1:]))
        total = torch.zeros(state.v.shape[:2], dtype=torch.float64, device=v.device)
        for t in range(len(self.betas) - 1, 0, -1):
            if t < len(self.betas) - 1:
                state, _ = self._move(state, self.betas[t].item(), self.step_sizes[t - 1])
            total += self._gain(state, t)
        return total

    def _gain(self, state: _State, t: int) -> Tensor:
        """What the step to the t-th temperature adds to log w."""
        return (self.betas[t] - self.betas[t - 1]).item() * (state.log_p - state.log_q)

    def _begin(self, num_samples: int) -> _State:
        if self.start is None:
            return self._at(self._coordinates(self.pair.draw_prior(self.batch, num_samples)))
        return self._at(self._coordinates(self.start.draw(num_samples)[0]))

    def _coordinates(self, latents: Latents) -> Tensor:
        u = self.pair.space.flatten(latents)[0]
        return u if self.start is None else self.start.standardize(u)

    def _at(self, v: Tensor, momentum: Tensor | None = None) -> _State:
        """Evaluates both ends of the path at v; the momentum is a fresh one if left out."""
        momentum = torch.randn_like(v) if momentum is None else momentum
        if self.start is None:
            return _State(v, momentum, *run_in_tiles(self.pair, "prior and joint", self._ends_at, self.batch, v))
        log_q, slope_q = self.start.log_standard(v) - self.start.log_scale, self.start.standard_slope(v)
        log_p, slope_p = log_joint_and_slope(self.pair, self.batch, self.start.place(v))
        return _State(v, momentum, log_q, log_p, slope_q, self.start.pull_back(slope_p))

    def _ends_at(self, v: Tensor, *batch: Tensor) -> tuple[Tensor, ...]:
        """Log densities of prior and joint, and their gradients."""
        with torch.enable_grad():
            v = v.detach().requires_grad_()
            latents, log_det = self.pair.space.unflatten(v)
            log_pz, log_px_given_z = self.pair.densities(batch, latents)
            log_q = log_pz + log_det
            log_p = log_q + log_px_given_z
            (slope_q,) = torch.autograd.grad(log_q.sum(), v, retain_graph=True)
            (slope_p,) = torch.autograd.grad(log_p.sum(), v)
        return log_q.detach(), log_p.detach(), slope_q, slope_p

    def _move(self, state: _State, beta: float, sizes: Tensor) -> tuple[_State, Tensor]:
        """One step of Hamiltonian Monte Carlo, which leaves f_b, and normal momenta, invariant.

        Momenta are kept in part, so that few leapfrog steps lead far. Of a move that is not accepted they turn round.

        Returns:
            The chains after it, and their probabilities of acceptance, ``(K, N)``.
        """
        size = sizes.to(state.v)[:, None]
        begin = _KEPT * state.momentum + math.sqrt(1 - _KEPT**2) * torch.randn_like(state.v)
        state, new = state._replace(momentum=-begin), state._replace(momentum=begin)
        for _ in range(self.leapfrog_steps):
            half = new.momentum + size / 2 * new.slope(beta)
            new = self._at(new.v + size * half, half)
            new = new._replace(momentum=half + size / 2 * new.slope(beta))
        energy = (begin.square() - new.momentum.square()).sum(-1).double() / 2
        # A trajectory that runs off ends in nan: it is not accepted.
        rate = (new.log_f(beta) - state.log_f(beta) + energy).nan_to_num(-torch.inf).clamp(max=0.0).exp()
        accept = torch.rand_like(rate) < rate
        chosen = (
            torch.where(accept if a.dim() == 2 else accept[..., None], a, b) for a, b in zip(new, state, strict=True)
        )
        return _State(*chosen), rate


def _reach(log_weights: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    """How wide the chains' ends lie, beside how wide the posterior is, in the direction where that is least.

    ``E[-(v_i - E v_i) d log p / dv_i] = 1`` under any posterior, however scaled, in each coordinate. Weighted ends of
    chains that never came as far as its curvature is felt have about 0, however alike their weights are.

    Args:
        log_weights: Shape ``(K, N)``.
        v: Where chains ended, ``(K, N, D)``.
        slope: The gradient of log p there.

    Returns:
        For each datum the least of these numbers, each with 4 standard errors added and at most 1, shape ``(N,)``. The
        error is the one seen, or that of a Gaussian posterior, whose number has a chi-squared law: of few chains a low
        number comes with a low error.

    Source: for judging draws by such identities, Gorham and Mackey, 2015, Measuring Sample Quality with Stein's Method;
    for quantiles of the chi-squared law, Wilson and Hilferty, 1931, The Distribution of Chi-Square.
    """
    weights = log_weights.softmax(0)[..., None]
    v, slope = v.double(), slope.double()
    products = -(v - (weights * v).sum(0)) * (slope - (weights * slope).sum(0))
    mean = (weights * products).sum(0)
    error = (weights * (products - mean)).square().sum(0).sqrt()
    spread = torch.tensor(2 / (9 * len(v)), dtype=v.dtype)
    gaussian = mean.clamp(min=0.0) / (1 - spread - 4 * spread.sqrt()).clamp(min=0.0) ** 3
    return torch.maximum(mean + 4 * error, gaussian).amin(-1).clamp(max=1.0).nan_to_num(0.0)


class _State(NamedTuple):
    """Where chains are and go, the log densities of both ends of the path there, and their gradients."""

    v: Tensor
    momentum: Tensor
    log_q: Tensor
    log_p: Tensor
    slope_q: Tensor
    slope_p: Tensor

    def log_f(self, beta: float) -> Tensor:
        return (1 - beta) * self.log_q + beta * self.log_p

    def slope(self, beta: float) -> Tensor:
        return (1 - beta) * self.slope_q + beta * self.slope_p
