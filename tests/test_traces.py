"""Programs that people write, and what of them has a log p(x) for each datum."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.distributions import transforms
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

import pvae
from pvae.evidence import bidirectional_monte_carlo, gauss_hermite
from pvae.evidence.proposals import Annealed, Defensive, Guide, Prior

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


@pytest.mark.parametrize("make", [AutoNormal, AutoDiagonalNormal])
def test_autoguides_are_refused_before_they_are_set_up(make):
    guide = make(simple)
    with pytest.raises(pvae.ProgramError, match=r"the guide is an Auto.*Normal, whose parameters belong to the data"):
        pvae.log_evidence(simple, guide, torch.randn(6))
    guide(torch.randn(6))  # sets itself up for the caller's data


def test_programs_for_a_fixed_number_of_data_are_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(6)), 1.0))

    with pytest.raises(pvae.ProgramError, match="can be run on any number of data; on 1 this pair failed"):
        pvae.log_evidence(simple, guide, torch.randn(6))


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
