"""Programs of the kinds that people write in Pyro: small, on made-up data, each with its guide and its objective."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.contrib import gp
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

__all__ = ["PROGRAMS", "Program"]


class Program(NamedTuple):
    """What SVI is given."""

    parts: list[tuple[Any, Any, Any]]  # model, guide and loss, of which steps take turns; all share one optimizer
    arguments: Callable[[int], tuple[Any, ...]]  # of a step, by its number
    lr: float = 1e-3


def eight_schools() -> Program:
    """A hierarchy of eight means, and a Gaussian with a full covariance."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(y: Tensor, sigma: Tensor) -> None:
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * effect, sigma), obs=y)

    return Program([(model, AutoMultivariateNormal(model), Trace_ELBO())], lambda _: (y, sigma), lr=0.01)


def regression() -> Program:
    """Linear regression as a PyroModule, with an automatic guide."""

    class Regression(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = PyroModule[nn.Linear](3, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

        def forward(self, x: Tensor, y: Tensor) -> None:
            scale = pyro.sample("scale", dist.HalfNormal(3.0))
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, scale), obs=y)

    x = torch.randn(170, 3)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3 * torch.randn(170)
    model = Regression()
    return Program([(model, AutoDiagonalNormal(model), Trace_ELBO())], lambda _: (x, y), lr=0.03)


def logistic_regression() -> Program:
    """Logistic regression, with a guide of low rank."""
    x = torch.randn(1000, 20)
    y = torch.bernoulli(torch.sigmoid(x @ torch.randn(20)))

    def model(x: Tensor, y: Tensor) -> None:
        weights = pyro.sample("weights", dist.Normal(torch.zeros(20), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ weights), obs=y)

    return Program([(model, AutoLowRankMultivariateNormal(model, rank=4), Trace_ELBO())], lambda _: (x, y), lr=0.01)


def item_response() -> Program:
    """Answers of students to questions: two plates, three kinds of latents, a mean-field guide."""
    answers = torch.bernoulli(torch.full((200, 30), 0.6))

    def model(answers: Tensor) -> None:
        students, items = (pyro.plate(name, n, dim=-d) for name, n, d in zip("si", answers.shape, (2, 1), strict=True))
        with students:
            ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with items:
            difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
            slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5))
        with students, items:
            pyro.sample("answer", dist.Bernoulli(logits=slope * (ability - difficulty)), obs=answers)

    return Program([(model, AutoNormal(model), Trace_ELBO())], lambda _: (answers,), lr=0.01)


def mixture() -> Program:
    """A mixture of Gaussians: assignments enumerated, the rest at its mode."""
    x = torch.cat([torch.randn(100) + loc for loc in (-4.0, 0.0, 5.0)])

    @config_enumerate
    def model(x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("components", 3):
            locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            which = pyro.sample("which", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(locs[which], scale), obs=x)

    guide = AutoDelta(poutine.block(model, expose=["weights", "locs", "scale"]))
    return Program([(model, guide, TraceEnum_ELBO(max_plate_nesting=1))], lambda _: (x,), lr=0.05)


def hidden_markov() -> Program:
    """A hidden Markov model: states enumerated along the sequence, parameters at their mode."""
    x = torch.bernoulli(torch.full((50, 12, 8), 0.3))

    def model(x: Tensor) -> None:
        num_sequences, length, num_bits = x.shape
        moves = pyro.sample("moves", dist.Dirichlet(0.9 * torch.eye(4) + 0.1).to_event(1))
        probs = pyro.sample("probs", dist.Beta(torch.full((4, num_bits), 0.5), 0.5).to_event(2))
        bits = pyro.plate("bits", num_bits, dim=-1)
        with pyro.plate("sequences", num_sequences, dim=-2):
            state: Any = 0
            for t in pyro.markov(range(length)):
                state = pyro.sample(f"state_{t}", dist.Categorical(moves[state]), infer={"enumerate": "parallel"})
                with bits:
                    pyro.sample(f"x_{t}", dist.Bernoulli(probs[state.squeeze(-1)]), obs=x[:, t])

    guide = AutoDelta(poutine.block(model, expose=["moves", "probs"]))
    return Program([(model, guide, TraceEnum_ELBO(max_plate_nesting=2))], lambda _: (x,), lr=0.02)


def lda() -> Program:
    """Latent Dirichlet allocation on a subsample of documents: words' topics enumerated, an amortized guide."""
    topics, words, num_docs, num_words = 6, 64, 200, 32
    documents = torch.randint(words, (num_words, num_docs))

    def model(documents: Tensor, batch_size: int) -> None:
        with pyro.plate("topics", topics):
            topic_weights = pyro.sample("topic_weights", dist.Gamma(1.0 / topics, 1.0))
            topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(words)))
        with pyro.plate("documents", num_docs, batch_size) as rows:
            doc_topics = pyro.sample("doc_topics", dist.Dirichlet(topic_weights))
            with pyro.plate("words", num_words):
                options = {"infer": {"enumerate": "parallel"}}
                word_topics = pyro.sample("word_topics", dist.Categorical(doc_topics), **options)
                pyro.sample("doc_words", dist.Categorical(topic_words[word_topics]), obs=documents[:, rows])

    predictor = nn.Sequential(nn.Linear(words, 50), nn.Sigmoid(), nn.Linear(50, topics), nn.Softmax(-1))

    def guide(documents: Tensor, batch_size: int) -> None:
        weights = pyro.param("weights_loc", lambda: torch.ones(topics), constraint=constraints.positive)
        mixes = pyro.param("words_loc", lambda: torch.rand(topics, words).softmax(-1), constraint=constraints.simplex)
        with pyro.plate("topics", topics):
            pyro.sample("topic_weights", dist.Delta(weights))
            pyro.sample("topic_words", dist.Delta(mixes, event_dim=1))
        pyro.module("predictor", predictor)
        with pyro.plate("documents", num_docs, batch_size) as rows:
            chosen = documents[:, rows]
            counts = torch.zeros(words, chosen.shape[1]).scatter_add(0, chosen, torch.ones(chosen.shape))
            mix = 0.99 * predictor(counts.T) + 0.01 / topics  # a Dirichlet's density may be infinite at 0
            pyro.sample("doc_topics", dist.Delta(mix, event_dim=1))

    return Program([(model, guide, TraceEnum_ELBO(max_plate_nesting=2))], lambda _: (documents, 32), lr=0.01)


def _mlp(*sizes: int) -> nn.Sequential:
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.Softplus())]
    return nn.Sequential(*layers[:-1])


def vae() -> Program:
    """A VAE of MNIST's size."""
    encoder, decoder = _mlp(784, 400, 100), _mlp(50, 400, 784)
    batches = torch.bernoulli(torch.full((4, 256, 784), 0.2))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 50), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return Program([(model, guide, Trace_ELBO())], lambda step: (batches[step % 4],))


def semi_supervised_vae() -> Program:
    """A VAE with labels, enumerated where they are missing, and an auxiliary loss; both share one optimizer."""
    classify, encoder, decoder = _mlp(196, 64, 10), _mlp(206, 64, 20), _mlp(20, 64, 196)
    x = torch.bernoulli(torch.full((4, 100, 196), 0.3))
    y = torch.eye(10)[torch.randint(10, (4, 100))]

    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 10), 1.0).to_event(1))
            label = pyro.sample("y", dist.OneHotCategorical(x.new_ones(len(x), 10) / 10), obs=y)
            pyro.sample("x", dist.Bernoulli(logits=decoder(_join(z, label))).to_event(1), obs=x)

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("classify", classify)
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            if y is None:
                y = pyro.sample("y", dist.OneHotCategorical(logits=classify(x)))
            loc, log_scale = encoder(_join(x, y)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def auxiliary(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("classify", classify)
        if y is not None:
            with pyro.plate("data", len(x)), poutine.scale(scale=46.0):
                pyro.sample("y_aux", dist.OneHotCategorical(logits=classify(x)), obs=y)

    def nothing(x: Tensor, y: Tensor | None = None) -> None:
        pass

    main = (model, config_enumerate(guide), TraceEnum_ELBO(max_plate_nesting=1))

    def arguments(step: int) -> tuple[Any, ...]:
        labelled = step // 2 % 3 == 0
        return (x[step // 2 % 4], y[step // 2 % 4]) if labelled else (x[step // 2 % 4],)

    return Program([main, (auxiliary, nothing, Trace_ELBO())], arguments)


def _join(*parts: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)


def deep_markov() -> Program:
    """A deep Markov model of sequences of different lengths, with a recurrent guide and an annealed weight."""
    length, size, bits = 10, 8, 20
    emit, gate, move = _mlp(size, 24, bits), _mlp(size, 24, size), _mlp(size, 24, 2 * size)
    rnn, combine = nn.RNN(bits, 16, batch_first=True), nn.Linear(size + 16, 2 * size)
    x = torch.bernoulli(torch.full((4, 40, length, bits), 0.3))
    mask = (torch.arange(length) < torch.randint(3, length + 1, (4, 40, 1))).float()

    def transition(z: Tensor) -> dist.Normal:
        loc, raw = move(z).chunk(2, -1)
        weight = torch.sigmoid(gate(z))
        return dist.Normal(weight * loc + (1 - weight) * z, softplus(raw) + 1e-3)

    def model(x: Tensor, mask: Tensor, weight: float) -> None:
        for name, part in (("emit", emit), ("gate", gate), ("move", move)):
            pyro.module(name, part)
        z = x.new_zeros(len(x), size)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(length)):
                with poutine.scale(scale=weight):
                    z = pyro.sample(f"z_{t}", transition(z).mask(mask[:, t : t + 1]).to_event(1))
                density = dist.Bernoulli(logits=emit(z)).mask(mask[:, t : t + 1]).to_event(1)
                pyro.sample(f"x_{t}", density, obs=x[:, t])

    def guide(x: Tensor, mask: Tensor, weight: float) -> None:
        pyro.module("rnn", rnn)
        pyro.module("combine", combine)
        hidden = rnn(x.flip(1))[0].flip(1)
        z = x.new_zeros(len(x), size)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(length)):
                loc, raw = combine(torch.cat([z, hidden[:, t]], -1)).chunk(2, -1)
                with poutine.scale(scale=weight):
                    density = dist.Normal(loc, softplus(raw) + 1e-3).mask(mask[:, t : t + 1]).to_event(1)
                    z = pyro.sample(f"z_{t}", density)

    def arguments(step: int) -> tuple[Any, ...]:
        return x[step % 4], mask[step % 4], min(1.0, (step + 1) / 100)

    return Program([(model, guide, Trace_ELBO())], arguments)


def attend_infer_repeat() -> Program:
    """Objects that are looked for one after another, until a draw says that there are no more: a branch on data."""
    steps, size = 3, 5
    look, encode, decode = nn.GRUCell(100 + size, 32), nn.Linear(32, 1 + 2 * size), _mlp(size, 32, 100)
    images = torch.rand(4, 32, 100)

    def model(x: Tensor) -> None:
        pyro.module("decode", decode)
        with pyro.plate("data", len(x)):
            mean, there = torch.zeros_like(x), x.new_ones(len(x))
            for t in range(steps):
                there = pyro.sample(f"there_{t}", dist.Bernoulli(0.4 * there))
                if not there.any():
                    break
                z = pyro.sample(f"z_{t}", dist.Normal(x.new_zeros(len(x), size), 1.0).to_event(1))
                mean = mean + there[:, None] * torch.sigmoid(decode(z))
            pyro.sample("x", dist.Normal(mean, 0.3).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("look", look)
        pyro.module("encode", encode)
        with pyro.plate("data", len(x)):
            state, z, there = x.new_zeros(len(x), 32), x.new_zeros(len(x), size), x.new_ones(len(x))
            for t in range(steps):
                state = look(torch.cat([x, z], -1), state)
                logit, loc, raw = encode(state).split([1, size, size], -1)
                there = pyro.sample(f"there_{t}", dist.Bernoulli(torch.sigmoid(logit[:, 0]) * there))
                if not there.any():
                    break
                z = pyro.sample(f"z_{t}", dist.Normal(loc, softplus(raw)).to_event(1))

    return Program([(model, guide, Trace_ELBO())], lambda step: (images[step % 4],), lr=1e-4)


def gaussian_process() -> Program:
    """Regression by a Gaussian process, with its hyperparameters at their mode."""
    x = torch.linspace(0.0, 5.0, 60)
    y = torch.sin(3.0 * x) + 0.2 * torch.randn(60)
    kernel = gp.kernels.RBF(input_dim=1)
    kernel.variance = PyroSample(dist.LogNormal(0.0, 1.0))
    kernel.lengthscale = PyroSample(dist.LogNormal(0.0, 1.0))
    process = gp.models.GPRegression(x, y, kernel, noise=torch.tensor(0.1))
    return Program([(process.model, process.guide, Trace_ELBO())], lambda _: (), lr=0.01)


def sparse_gamma() -> Program:
    """A deep exponential family: three layers of Gamma latents, Poisson counts, a mean-field guide of Gammas."""
    widths, pixels, num_data = (20, 10, 5), 64, 80
    x = torch.poisson(torch.rand(num_data, pixels) * 5)

    def model(x: Tensor) -> None:
        above = None
        for layer, width in enumerate(reversed(widths)):
            if above is None:
                rate = x.new_full((num_data, width), 0.3)
            else:
                shape = (above.shape[-1], width)
                weights = pyro.sample(f"w_{layer}", dist.Gamma(x.new_full(shape, 0.1), 0.3).to_event(2))
                rate = 0.1 / (above @ weights)
            with pyro.plate(f"data_{layer}", num_data):
                above = pyro.sample(f"z_{layer}", dist.Gamma(x.new_tensor(0.1), rate).to_event(1))
        weights = pyro.sample("w_x", dist.Gamma(x.new_full((widths[0], pixels), 0.1), 0.3).to_event(2))
        with pyro.plate("data", num_data):
            pyro.sample("x", dist.Poisson(above @ weights).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        def gamma(name: str, *shape: int) -> dist.Gamma:
            raw = [pyro.param(f"{part}_{name}", lambda: 0.5 + 0.1 * torch.randn(shape)) for part in ("alpha", "mean")]
            alpha, mean = (softplus(r).clamp(min=low) for r, low in zip(raw, (0.1, 1e-4), strict=True))
            return dist.Gamma(alpha, alpha / mean)

        for layer, width in enumerate(reversed(widths)):
            if layer:
                pyro.sample(f"w_{layer}", gamma(f"w_{layer}", widths[-layer], width).to_event(2))
            with pyro.plate(f"data_{layer}", num_data):
                pyro.sample(f"z_{layer}", gamma(f"z_{layer}", num_data, width).to_event(1))
        pyro.sample("w_x", gamma("w_x", widths[0], pixels).to_event(2))

    return Program([(model, guide, Trace_ELBO())], lambda _: (x,), lr=0.01)


PROGRAMS: dict[str, Callable[[], Program]] = {
    make.__name__.replace("_", " "): make
    for make in (
        eight_schools,
        regression,
        logistic_regression,
        item_response,
        mixture,
        hidden_markov,
        lda,
        vae,
        semi_supervised_vae,
        deep_markov,
        attend_infer_repeat,
        gaussian_process,
        sparse_gamma,
    )
}
