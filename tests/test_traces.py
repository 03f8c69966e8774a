"""Programs that people write, and what of them has a log p(x) for each datum."""

from __future__ import annotations

from functools import partial

import helpers
import pyro
import pytest
import torch
from pairs import ModulePair
from pyro import distributions as dist
from pyro.distributions import transforms
from torch import nn

import pvae
from pvae.evidence import bidirectional_monte_carlo, gauss_hermite
from pvae.evidence.proposals import Annealed, Defensive, Guide, Prior
from pvae.testing import linear_gaussian

evidence = partial(helpers.evidence, num_samples=1000)

MOVING = ["refined", "laplace", "student-t", "ais"]


def simple(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)


def simple_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.8))


def test_masked_latents_are_drawn_and_not_moved():
    """A latent that a datum does not have: its Gaussian would have nothing to hold it."""

    def model(x, m):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0).mask(m))
            pyro.sample("x", dist.Normal(a, 0.5), obs=x[:, 0])
            pyro.sample("y", dist.Normal(b, 0.5).mask(m), obs=x[:, 1])

    def guide(x, m):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.8 * x[:, 0], 0.6))
            pyro.sample("b", dist.Normal((a + 4 * x[:, 1]) / 5, 0.6).mask(m))

    x, m = torch.randn(20, 2), torch.arange(20) % 2 == 0
    both = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.25, 1.0], [1.0, 2.25]])).log_prob(x)
    exact = torch.where(m, both, dist.Normal(0.0, 1.25**0.5).log_prob(x[:, 0]))
    for proposal in ("guide", "prior", "defensive"):
        estimate = pvae.log_evidence(model, guide, (x, m), num_samples=4000, proposal=proposal)
        assert ((estimate.corrected - exact).abs() < 5 * estimate.std_error)[~estimate.unreliable].all()
    for proposal in MOVING:
        with pytest.raises(pvae.ProgramError, match="site 'b' is masked"):
            pvae.log_evidence(model, guide, (x, m), proposal=proposal)


def test_angles_are_drawn_and_not_moved():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.VonMises(torch.tensor(0.0), torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(z.cos(), 2.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.VonMises(torch.tensor(0.0), torch.tensor(0.5)))

    x = torch.randn(10)
    grid = torch.linspace(-torch.pi, torch.pi, 2001)[:-1, None]
    joint = dist.VonMises(torch.tensor(0.0), torch.tensor(0.5)).log_prob(grid) + dist.Normal(grid.cos(), 2.0).log_prob(
        x
    )
    exact = joint.logsumexp(0) + torch.log(grid[1] - grid[0])
    estimate = pvae.log_evidence(model, guide, x, num_samples=4000)
    assert ((estimate.log_px - exact).abs() < 5 * estimate.std_error).all()
    with pytest.raises(pvae.ProgramError, match="site 'z' is an angle"):
        gauss_hermite(model, guide, x)


@pytest.mark.parametrize("proposal", ["guide", "prior", Annealed(temperatures=3)], ids=["guide", "prior", "ais"])
def test_latents_that_come_and_go_with_the_batch_are_refused(proposal):
    def model(x, n):
        with pyro.plate("data", len(x)):
            for t in range(int(n.max())):
                pyro.sample(f"x{t}", dist.Normal(pyro.sample(f"z{t}", dist.Normal(0.0, 1.0)), 0.5), obs=x[:, t])

    def guide(x, n):
        with pyro.plate("data", len(x)):
            for t in range(int(n.max())):
                pyro.sample(f"z{t}", dist.Normal(x[:, t], 0.4))

    x = torch.randn(4, 3)
    for n in ([1, 1, 3, 3], [1, 2, 3, 3]):
        with pytest.raises(pvae.ProgramError, match="latent sites are not the same in every batch"):
            pvae.log_evidence(model, guide, (x, torch.tensor(n)), num_samples=50, proposal=proposal, chunk_size=16)


def test_data_that_depend_on_each_other_are_found_though_the_first_are_equal():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x - x.mean(0))

    with pytest.raises(pvae.ProgramError, match="treat each datum"):
        pvae.log_evidence(model, simple_guide, torch.tensor([0.0, 0.0, 3.0, 5.0]))
    equal = pvae.log_evidence(simple, simple_guide, torch.zeros(5), num_samples=50)
    assert equal.log_px.shape == (5,)


@pytest.mark.parametrize(
    "family, good, bad",
    [
        (lambda z: dist.Binomial(10, z.sigmoid()), torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1.0, 3.0, 3.5])),
        (lambda z: dist.Binomial(10, z.sigmoid()), torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1.0, 3.0, 12.0])),
        (
            lambda z: dist.OneHotCategorical(logits=z[..., None] * torch.tensor([1.0, 0.0, -1.0])),
            torch.eye(3),
            torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.3, 0.3, 0.4]]),
        ),
    ],
    ids=["half", "beyond", "one-hot"],
)
def test_all_data_are_held_against_supports_that_depend(family, good, bad):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", family(pyro.sample("z", dist.Normal(0.0, 1.0))), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    pvae.log_evidence(model, guide, good, num_samples=10)
    with pytest.raises(pvae.DataError, match=r"site 'x' is .* with support .*33.333% of a batch are outside"):
        pvae.log_evidence(model, guide, bad, num_samples=10)


def test_a_flow_without_an_inverse_can_be_drawn_from():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    planar = transforms.Planar(2)

    def guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(x / 2, 0.7).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [planar]))

    x = torch.randn(15, 2)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum(-1)
    estimate = pvae.log_evidence(model, guide, x, num_samples=3000)
    assert ((estimate.corrected - exact).abs() < 5 * estimate.std_error).all()
    with pytest.raises(pvae.ProgramError, match="cannot give the density of latents that it did not draw"):
        pvae.log_evidence(model, guide, x, proposal="defensive")


def test_tensors_that_agree_by_chance_are_not_confused():
    """On the first data the covariate equals the observation; it has another support."""

    def model(x, c):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z + c), obs=x)

    def guide(x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    x, c = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 5.0, 2.0])
    estimate = pvae.log_evidence(model, guide, (x, c), num_samples=1000)
    # By symmetry p(x = 1 | c = 0) is 1/2; far from 0 the sign of c decides.
    assert estimate.log_px[1].exp().item() == pytest.approx(0.5, abs=5 * 0.5 * estimate.std_error[1].item())
    with pytest.raises(pvae.DataError, match="site 'x' is Bernoulli"):
        pvae.log_evidence(model, guide, (x + 0.5, c))


def test_a_guide_with_fewer_plates_joins_the_pair():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("features", 3, dim=-2):
                pyro.sample("x", dist.Normal(a, 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("a", dist.Normal(0.75 * x.mean(1), 0.6))

    def other(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(torch.zeros(len(x)), 1.0))

    x = torch.randn(10, 3)
    exact = dist.MultivariateNormal(torch.zeros(3), torch.ones(3, 3) + torch.eye(3)).log_prob(x)
    estimate = pvae.log_evidence(model, guide, x, num_samples=3000, proposal=Defensive(Guide(other)))
    assert ((estimate.corrected - exact).abs() < 5 * estimate.std_error).all()


def test_closures_may_have_variables_to_come():
    def outer():
        def model(x):
            return later(x) if False else simple(x)

        yield model
        later = simple

    estimate = pvae.log_evidence(next(outer()), simple_guide, torch.randn(5), num_samples=10)
    assert estimate.num_data == 5


def test_a_rate_of_zero_is_a_rate():
    """log 0 is infinite as a natural parameter, and 0 times it nan; the density is well defined."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson(z.relu()).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))

    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 1.0]])
    shared, own = (pvae.log_evidence(model, guide, x, num_samples=4000, proposal=p) for p in (Prior(), "guide"))
    assert shared.shared_draws
    assert ((shared.log_px - own.log_px).abs() < 5 * (shared.std_error + own.std_error)).all()


# --- pairs whose log p(x) is known -----------------------------------------------------------------------------------


def test_pyros_own_style_of_vae_goes_through(module_pair, bits):
    pvae.fit(module_pair.model, module_pair.guide, bits, epochs=10, batch_size=32, lr=0.01, progress=False)
    guide, prior = (evidence(module_pair, bits[:100], num_samples=1000, proposal=p) for p in ("guide", "prior"))
    assert not guide.unreliable.any()
    error = (guide.std_error.square() + prior.std_error.square()).sqrt()
    assert ((guide.log_px - prior.log_px).abs() < 5 * error).all()


def test_a_probability_over_all_data_sums_to_one():
    """p(x) over all 64 patterns of 6 bits sums to 1; the sum's standard error is known, 5 sigma."""
    pair = ModulePair()
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6)
    estimate = evidence(pair, x, num_samples=5000)
    px = estimate.log_px.exp()
    assert px.sum().item() == pytest.approx(1, abs=5 * (px * estimate.std_error).norm().item())


def test_several_latents_and_a_nested_plate():
    """Two latents, one for each of 3 features in a plate inside the data plate; the exact log p(x) is normal."""
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[:, None]

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            with pyro.plate("features", 3, dim=-2):
                b = pyro.sample("b", dist.Normal(a, scale))
                pyro.sample("x", dist.Normal(b, 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(x.mean(1) / 2, 1.0))
            with pyro.plate("features", 3, dim=-2):
                pyro.sample("b", dist.Normal((a + x.T) / 2, 1.0))

    covariance = torch.ones(3, 3, dtype=torch.float64) + (scale[:, 0] ** 2 + 1).diag()
    exact = dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance)
    x = exact.sample((50,))
    for proposal in ("guide", "prior"):
        estimate = pvae.log_evidence(model, guide, x, num_samples=5000, proposal=proposal)
        assert ((estimate.log_px - exact.log_prob(x)).abs() < 5 * estimate.std_error + 1e-3).all()


def test_scales_are_no_part_of_log_px_and_masks_are():
    oracle = linear_gaussian(2, 3, guide_shift=0.3)
    x = oracle.sample(20)
    plain = evidence(oracle, x, num_samples=100)
    model, guide = pyro.poutine.scale(oracle.model, 10.0), pyro.poutine.scale(oracle.guide, 0.1)
    with pytest.warns(UserWarning, match=r"scales the densities of \['x', 'z'\].*log p\(x\) is .* without scales"):
        scaled = pvae.log_evidence(model, guide, x, num_samples=100, proposal="guide")
    assert torch.equal(plain.log_px, scaled.log_px)

    def subsampled(program):
        def run(x):
            with pyro.plate("data", 10_000, subsample=torch.arange(len(x))):
                z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1))
                if program == "model":
                    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        return run

    one = torch.randn(20, 1, dtype=torch.float64)
    estimate = pvae.log_evidence(subsampled("model"), subsampled("guide"), one, num_samples=4000)
    exact = dist.Normal(torch.zeros((), dtype=torch.float64), 2**0.5).log_prob(one[:, 0])
    assert ((estimate.log_px - exact).abs() < 5 * estimate.std_error).all()

    seen = torch.rand(20, 3) < 0.5

    def masked(data):
        x, seen = data[:, :3], data[:, 3:].bool()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
            px = dist.Normal(z @ oracle.weight.T + oracle.bias, oracle.noise)
            pyro.sample("x", px.mask(seen).to_event(1), obs=x)

    estimate = pvae.log_evidence(
        masked, lambda d: oracle.guide(d[:, :3]), torch.cat([x, seen.double()], 1), num_samples=4000, proposal="prior"
    )
    covariance = oracle.weight @ oracle.weight.T + oracle.noise**2 * torch.eye(3, dtype=torch.float64)
    for row, s, value, error in zip(x, seen, estimate.log_px, estimate.std_error, strict=True):
        exact = 0.0
        if s.any():
            exact = dist.MultivariateNormal(oracle.bias[s], covariance[s][:, s]).log_prob(row[s])
        assert abs(value - exact) < 6 * error + 1e-9


def test_a_site_masked_by_a_handler_says_nothing():
    """Where ``poutine.mask`` hides x, every weight of the prior is p(nothing | z) = 1."""
    oracle = linear_gaussian(2, 3)
    x = oracle.sample(20)

    def model(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
            with pyro.poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z @ oracle.weight.T + oracle.bias, oracle.noise).to_event(1), obs=x)

    seen = torch.arange(20) % 2 == 0
    estimate = pvae.log_evidence(model, lambda x, seen: oracle.guide(x), (x, seen), num_samples=4000, proposal="prior")
    assert (estimate.log_px[~seen] == 0).all()
    assert ((estimate.log_px - oracle.log_px(x)).abs() < 5 * estimate.std_error)[seen].all()


def test_plates_may_have_any_name():
    oracle = linear_gaussian(2, 3, guide_shift=0.3)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", oracle.proposal(x))

    x = oracle.sample(9)
    ours = pvae.log_evidence(oracle.model, guide, x, num_samples=9, proposal="guide")
    assert torch.equal(ours.log_px, evidence(oracle, x, num_samples=9).log_px)


def test_a_tuple_of_data(bits):
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y.double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + y) / 2, 0.5**0.5))

    x, y = torch.randn(30, dtype=torch.float64), torch.arange(30)
    estimate = pvae.log_evidence(model, guide, (x, y), num_samples=30, proposal="guide")
    torch.testing.assert_close(estimate.log_px, dist.Normal(y.double(), 2**0.5).log_prob(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "proposal",
    ["guide", "prior", "refined", "laplace", "defensive", pytest.param(Annealed(temperatures=10), id="ais")],
)
def test_a_program_that_does_not_broadcast_gives_the_same_answer(proposal):
    """A convolution wants exactly 4 dimensions, and softmax over dimension 1 means another thing with particles."""
    weight = torch.randn(6, 2, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def made(decode):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decode(z), 0.5).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x[:, :2] / 4, 0.4).to_event(1))

        return model, guide

    def conv(z):
        return nn.functional.conv2d(torch.softmax(z, 1)[:, :, None, None], weight)[:, :, 0, 0]

    broadcasting = made(lambda z: torch.softmax(z, -1) @ weight[:, :, 0, 0].T)
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimates = [pvae.log_evidence(*pair, x, num_samples=400, proposal=proposal) for pair in (made(conv), broadcasting)]
    error = torch.stack([e.std_error for e in estimates]).norm(dim=0)
    assert ((estimates[0].log_px - estimates[1].log_px).abs() < 5 * error).all()


def test_nested_plates_fold_too():
    """Two latents, one in a plate inside the data plate, and a program that asserts what it is given."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            if a.shape[0] != len(x):
                raise ValueError("not for particles")
            with pyro.plate("features", 3, dim=-2):
                b = pyro.sample("b", dist.Normal(a, 1.0))
                pyro.sample("x", dist.Normal(b, 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(x.mean(1) / 2, 1.0))
            with pyro.plate("features", 3, dim=-2):
                pyro.sample("b", dist.Normal((a + x.T) / 2, 1.0))

    exact = dist.MultivariateNormal(torch.zeros(3).double(), (torch.ones(3, 3) + 2 * torch.eye(3)).double())
    x = exact.sample((30,))
    for proposal in ("guide", "prior", "laplace", "student-t"):
        estimate = pvae.log_evidence(model, guide, x, num_samples=3000, proposal=proposal)
        assert ((estimate.log_px - exact.log_prob(x)).abs() < 5 * estimate.std_error + 1e-6).all()


# --- data that are simulated ---------------------------------------------------------------------------------------


def pair_guide(*batch):
    with pyro.plate("data", len(batch[0])):
        pyro.sample("z", dist.Normal(torch.zeros(len(batch[0])), 1.0))


def reads_its_data(y, x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        pyro.sample("x", dist.Normal(z + 3 * y, 0.3), obs=x)


def rounds(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.float())


def ambiguous(c, x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(c, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x + 0)


@pytest.mark.parametrize(
    "model, data, match",
    [
        (reads_its_data, (torch.randn(4), torch.randn(4)), "may use data beyond observing them"),
        (rounds, torch.arange(4), "round them to whole numbers"),
        (ambiguous, (torch.zeros(4), torch.zeros(4)), "more than one of the data tensors"),
    ],
    ids=["reads", "rounds", "ambiguous"],
)
def test_data_that_cannot_be_simulated_are_refused(model, data, match):
    with pytest.raises(pvae.ProgramError, match=match):
        bidirectional_monte_carlo(model, pair_guide, data, proposal=Annealed(temperatures=2))
