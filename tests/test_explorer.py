"""The explorer: its decoder against torch's, its numbers against ours, and its page in a browser."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import subprocess
import types
from importlib.resources import files

import numpy as np
import pyro
import pytest
import torch
from browser import Browser, find_chromium
from pyro import distributions as dist
from torch import nn

import pvae
from pvae import likelihoods, networks
from pvae.explorer import write_explorer, writing
from pvae.explorer.decoders import describe_decoder
from pvae.explorer.packing import pack_depths, to_json
from pvae.explorer.planes import choose_plane
from pvae.runtime import isolate

SMALL = {"num_data": 12, "num_samples": 60, "num_prior_samples": 300}
NEEDED = ("model", "guide", "prior", "encode", "decode", "decoder")
HOSTILE = "</script><script>document.title='broken'</script><!--"


@pytest.fixture(scope="module")
def digits():
    return pvae.datasets.digits()


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return pvae.VAE.mlp((8, 8), 2, [16])


@pytest.fixture(scope="module")
def page(vae, digits, tmp_path_factory):
    """A page of two latents, 12 digits, and labels of which one is hostile."""
    labels = [str(label) for label in digits.test_y[:12].tolist()]
    labels[3] = HOSTILE
    return write_explorer(vae, digits.test_x[:12], labels, tmp_path_factory.mktemp("page") / "page.html", **SMALL)


def contents_of(path):
    found = re.search(r'<script type="application/json" id="contents">(.*?)</script>', path.read_text("utf-8"), re.S)
    return json.loads(found[1])


def unpacked(packed):
    kinds = {"f32": "<f4", "u8": "u1", "u16": "<u2"}
    return np.frombuffer(base64.b64decode(packed["base64"]), kinds[packed["type"]]).reshape(packed["shape"])


def drawn(vae, x, proposal):
    """The draws that the page shows."""
    return pvae.evidence.weighted_draws(vae.model, vae.guide, x, num_samples=60, proposal=proposal)


# --- the decoder in JavaScript ----------------------------------------------------------------------------------------


def shaken(module):
    """A module whose parameters and buffers are no longer what they began as."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
    return module.eval()


ACTIVATIONS = [
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid, nn.Hardswish,
]  # fmt: skip


def decoders():
    """Name to a decoder of 3 latents: every likelihood, layer and activation that the page knows."""
    torch.manual_seed(0)
    for name in likelihoods.NAMED:
        yield name, pvae.VAE.mlp((2, 3), 3, [7], name).decoder
    yield "categorical", likelihoods.Categorical(networks.mlp(3, [7], (5, 6)), num_classes=5)
    for scale in (0.2, "learned", "network"):
        network = networks.mlp(3, [7], 2 * 6 if scale == "network" else 6)
        yield f"levels {scale}", likelihoods.DiscretizedLogistic(network, num_levels=16, scale=scale, event_shape=(6,))
    for kind in ("plain", "residual"):
        for name in ("bernoulli", "gaussian-per-pixel"):
            yield f"{kind} {name}", pvae.VAE.conv((2, 8, 12), 3, (4, 6), 5, name, network=kind).decoder
    yield "float64", likelihoods.Bernoulli(networks.mlp(3, [7], 6)).double()
    for make in ACTIVATIONS:
        yield make.__name__, likelihoods.Gaussian(nn.Sequential(nn.Linear(3, 40), nn.BatchNorm1d(40), make()))
    yield "tanh GELU", likelihoods.Gaussian(nn.Sequential(nn.Linear(3, 40), nn.GELU("tanh")))
    layers = [
        nn.Linear(3, 4 * 9), nn.LayerNorm(36), nn.Dropout(0.5), networks.GaussianNoise(1.0),
        nn.Unflatten(1, (4, 3, 3)), nn.BatchNorm2d(4), nn.PReLU(4), nn.Upsample(scale_factor=2),
        nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=1),
        nn.ConvTranspose2d(6, 4, 3, stride=(2, 3), padding=(1, 0), output_padding=(1, 2), groups=2, bias=False),
        nn.Upsample((9, 5)), nn.Conv2d(4, 3, (1, 2), stride=(2, 1), bias=False), nn.Flatten(), nn.Identity(),
    ]  # fmt: skip
    yield "layers", likelihoods.Laplace(networks.Batched(nn.Sequential(*layers), 3))
    layers = [
        nn.Linear(3, 35), nn.Unflatten(1, (1, 7, 5)), nn.Upsample(scale_factor=(1.5, 2.7)),
        nn.Upsample(scale_factor=1.3), nn.Upsample(scale_factor=1.7, recompute_scale_factor=True),
        nn.UpsamplingNearest2d(scale_factor=0.6),
    ]  # fmt: skip
    yield "factors that are no whole numbers", likelihoods.Laplace(networks.Batched(nn.Sequential(*layers), 3))


def run_in_node(cases, folder):
    code = (
        f"const N = require({json.dumps(str(files('pvae.explorer') / 'network.js'))});"
        "const cases = JSON.parse(require('fs').readFileSync(process.argv[1], 'utf8'));"
        "console.log(JSON.stringify(cases.map(([spec, zs]) => "
        "zs.map((z) => Array.from(N.makeDecoder(N.unpack(spec))(z))))))"
    )
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    return json.loads(subprocess.run(["node", "-e", code, path], capture_output=True, check=True, text=True).stdout)


def run_in_chromium(cases, page):
    with Browser() as browser:
        browser.open(page)
        code = "zs.map((z) => Array.from(Network.makeDecoder(Network.unpack(spec))(z)))"
        return [browser.run(f"(([spec, zs]) => {code})({json.dumps(case)})") for case in cases]


@pytest.mark.parametrize("where", ["node", "chromium"])
def test_every_decoder_gives_torchs_pixels(where, page, tmp_path):
    """To 1e-4, relative above 1. Classes are equal: of random logits none are near a tie."""
    if where == "chromium" and not find_chromium():
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    if where == "node" and not shutil.which("node"):
        pytest.skip("no node is installed")
    names, cases, expected = [], [], []
    z = 1.5 * torch.randn(6, 3)
    for name, decoder in decoders():
        decoder = shaken(decoder)
        zs = z.to(next(decoder.parameters()))
        with torch.no_grad():
            spec = describe_decoder(decoder, zs[:1])
            expected.append(decoder(zs).mean.flatten(1).float())
        names.append(name)
        cases.append((spec, zs.tolist()))
    found = run_in_node(cases, tmp_path) if where == "node" else run_in_chromium(cases, page)
    for name, ours, theirs in zip(names, found, expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(ours).float(), theirs, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


class Scaled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize(
    "decoder, words",
    [
        (likelihoods.Bernoulli(nn.Sequential(nn.Linear(3, 4), Scaled())), r"decoder\.network\.1 .*Scaled.*It runs"),
        (likelihoods.Bernoulli(nn.Sequential(nn.Linear(3, 4), nn.RReLU())), r"decoder\.network\.1 .*RReLU"),
        (Scaled(), r"Scaled: it knows the means of pvae.likelihoods \(Bernoulli"),
        (
            likelihoods.Bernoulli(nn.Sequential(nn.Unflatten(1, (1, 1, 3)), nn.Conv2d(1, 1, (1, 3), padding="same"))),
            "padding must be a number",
        ),
    ],
)
def test_a_decoder_that_the_page_cannot_run_is_refused(decoder, words):
    with pytest.raises(pvae.ProgramError, match=words):
        describe_decoder(decoder, torch.zeros(1, 3))


def test_a_decoder_with_hooks_is_refused():
    network = nn.Sequential(nn.Linear(3, 4))
    network.register_forward_hook(lambda *_: torch.zeros(1, 4))
    with pytest.raises(pvae.ProgramError, match="hooks"):
        describe_decoder(likelihoods.Bernoulli(network), torch.zeros(1, 3))


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_names_no_address(page):
    text = page.read_text("utf-8")
    assert set(re.findall(r"https?://[^\s\"'`]*", text)) == {"http://www.w3.org/2000/svg"}  # a namespace
    assert "default-src 'none'" in text
    assert not re.search(r"\{\{\w+\}\}", text)
    assert text.count("</script") == 2  # a label would end one
    assert contents_of(page)["labels"][3] == HOSTILE
    assert page.stat().st_size < 100_000


def test_json_cannot_leave_its_element():
    text = to_json({"<!--</script>&": "<\u2028>"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"<!--</script>&": "<\u2028>"}


def test_a_title_is_text(vae, digits, tmp_path):
    path = write_explorer(vae, digits.test_x[:1], path=tmp_path / "a.html", title="<b>&", **SMALL)
    assert "<title>&lt;b&gt;&amp;</title>" in path.read_text("utf-8")


def test_weights_and_draws_are_those_of_the_evidence(page, vae, digits):
    """Rounded as the page says: log-weights to 0.0002 nats at the top."""
    contents, x = contents_of(page), digits.test_x[:12]
    for name in ("guide", "prior"):
        packed = contents[name]
        depths = np.expm1(unpacked(packed["depths"]) * math.log1p(packed["deepest"]) / 65534)
        weights = torch.tensor(np.array(packed["top"])[:, None] - depths)  # (N, K)
        ours = drawn(vae, x, name)
        torch.testing.assert_close(weights.logsumexp(1) - math.log(60), ours.log_px, rtol=0, atol=1e-3)
        # The same draws: weights at the points that the page has, by the pair's own densities.
        steps = 255 if name == "guide" else 65535
        low, high = (unpacked(packed[end])[:, None] for end in ("low", "high"))
        z = torch.tensor(low + unpacked(packed["points"]) / steps * (high - low)).float()
        with isolate([vae], seed=0):
            z = z.transpose(0, 1)
            log_ratio = vae.prior().log_prob(z) - vae.encode(x).log_prob(z) if name == "guide" else 0
            again = vae.decode(z).log_prob(x) + log_ratio
        assert (again.T - weights).abs().max() < 0.5  # of places rounded to 1/255 of their spread
        assert (again.T - weights).abs().median() < 0.02
    reference = pvae.log_evidence(vae.model, vae.guide, x, seed=2)
    assert contents["reference"]["value"] == pytest.approx(reference.corrected.tolist(), abs=1e-4)
    low, high = reference.interval()
    assert contents["reference"]["low"] == pytest.approx(low.tolist(), abs=1e-4)
    assert contents["reference"]["high"] == pytest.approx(high.tolist(), abs=1e-4)


def test_the_longer_run_goes_on_from_the_draws_that_are_shown(page, vae, digits):
    later = contents_of(page)["later"]
    assert later["draws"][0] == 61
    assert later["draws"][-1] == 300
    more = pvae.log_weights(vae.model, vae.guide, digits.test_x[:12], num_samples=240, proposal="prior", seed=1)
    first = drawn(vae, digits.test_x[:12], "prior").log_px
    expected = torch.logaddexp(more.logsumexp(0), first + math.log(60)) - math.log(300)
    assert unpacked(later["estimates"])[:, -1] == pytest.approx(expected.numpy(), abs=1e-3)


def test_depths_are_finest_at_the_top():
    weights = torch.tensor([[0.0, -0.001, -1000.0, -torch.inf]], dtype=torch.float64)
    codes = unpacked(pack_depths(weights, torch.zeros(1, 1, dtype=torch.float64), 1000.0))[0]
    found = np.expm1(codes * math.log1p(1000.0) / 65534)
    assert found[:3] == pytest.approx([0, 0.001, 1000.0], abs=1e-4)
    assert codes[3] == 65535


def test_the_same_seed_gives_the_same_page_and_leaves_the_caller_alone(vae, digits, tmp_path, caller_state):
    before, modes = caller_state(), vae.training
    pages = [write_explorer(vae, digits.test_x, path=tmp_path / f"{n}.html", **SMALL) for n in range(2)]
    before.assert_unchanged()
    assert vae.training == modes
    assert pages[0].read_bytes() == pages[1].read_bytes()
    contents = contents_of(pages[0])
    assert len(contents["indices"]) == 12
    assert contents["indices"] == sorted(set(contents["indices"]))
    assert "12 of 360, chosen at random" in contents["about"]


@pytest.mark.parametrize("plane", ["active", "principal", (4, 1)])
def test_a_plane_of_many_dimensions_says_what_it_is(plane):
    torch.manual_seed(0)
    codes = torch.randn(500, 6, dtype=torch.float64) * torch.tensor([0.01, 1, 0.02, 0.5, 2, 0.03])
    chosen = choose_plane(codes, plane)
    torch.testing.assert_close(chosen.basis.T @ chosen.basis, torch.eye(2, dtype=torch.float64))
    if plane == "principal":
        assert chosen.basis.abs().argmax(0).tolist() == [4, 1]
        assert chosen.project(codes).mean(0).abs().max() < 1e-12
    else:
        assert [axis["short"] for axis in chosen.axes] == ["z₅", "z₂"]
        assert chosen.project(codes)[7].tolist() == codes[7, [4, 1]].tolist()
    if plane != (4, 1):
        assert "Of 6 latent dimensions 3 are active" in chosen.words
        assert "95%" in chosen.words


def test_codes_that_all_are_one_have_a_plane():
    assert "none of the variance" in choose_plane(torch.zeros(9, 4, dtype=torch.float64), "active").words
    assert "with none" in choose_plane(torch.zeros(9, 4, dtype=torch.float64), "principal").words


@pytest.mark.parametrize("plane", ["other", (1, 1), (0, 6), (1,), (1.0, 2)])
def test_no_other_planes(plane):
    with pytest.raises(pvae.ArgumentError, match="plane must be 'active', 'principal' or two"):
        choose_plane(torch.zeros(9, 6, dtype=torch.float64), plane)


def test_one_latent_vectors_one_datum_and_no_labels(tmp_path):
    vae = pvae.VAE.mlp(5, 1, [4], "gaussian")
    path = write_explorer(vae, torch.randn(1, 5), path=tmp_path / "a.html", **SMALL)
    contents = contents_of(path)
    assert contents["picture"] is None
    assert contents["labels"] is None
    assert "one dimension" in contents["plane"]
    assert len(contents["heights"]) == 1


@pytest.mark.parametrize(
    "event_shape, image_shape, channels",
    [((8, 8), None, 1), ((3, 4, 5), None, 3), ((4, 5, 3), None, 3), ((12,), (4, 3), 1), ((2, 3, 4), (6, 4), 1)],
)
def test_images_are_found(event_shape, image_shape, channels):
    found = writing._find_picture(event_shape, image_shape)
    assert found["channels"] == channels
    assert found["height"] * found["width"] * channels == math.prod(event_shape)


def test_what_is_unlike_an_image_is_refused():
    for event_shape, image_shape in (((2, 3, 4), None), ((4, 4, 4, 4), None), ((300,), None), ((6,), (6,))):
        with pytest.raises(pvae.DataError, match="image_shape"):
            writing._find_picture(event_shape, image_shape)
    with pytest.raises(pvae.ArgumentError, match=r"image_shape=\(2, 4\) has 8 entries, and a datum \(6,\) has 6"):
        writing._find_picture((6,), (2, 4))


class ByHand(nn.Module):
    """Somebody else's pair, in float64, with a site of another name."""

    def __init__(self):
        super().__init__()
        self.decoder = likelihoods.Gaussian(networks.mlp(3, [4], 6), scale=0.5)
        self.encoder = networks.mlp(6, [4], 6)
        self.double()

    def prior(self):
        return dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)

    def encode(self, x):
        loc, log_scale = self.encoder(x).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def decode(self, z):
        return self.decoder(z)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", len(x)):
            pyro.sample("obs", self.decode(pyro.sample("latent", self.prior())), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("rows", len(x)):
            pyro.sample("latent", self.encode(x))


def test_a_pair_of_somebody_elses_kind(tmp_path):
    pair = ByHand()
    path = write_explorer(
        pair, np.random.default_rng(0).normal(size=(9, 6)), path=tmp_path / "a.html", budget_seconds=1.0, **SMALL
    )
    contents = contents_of(path)
    z, means = (torch.tensor(unpacked(contents["examples"][name])) for name in ("z", "means"))
    torch.testing.assert_close(pair.decode(z.double()).mean.detach().float(), means, rtol=0, atol=1e-5)
    assert len(contents["reference"]["value"]) == 9


# --- errors, before anything is written -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"labels": [1, 2]}, pvae.DataError, "there are 20 data and 2 labels"),
        ({"labels": 3}, pvae.DataError, "labels must be a sequence"),
        ({"labels": torch.zeros(20, 10)}, pvae.DataError, r"labels.argmax\(1\)"),
        ({"x": torch.zeros(20, 64)}, pvae.DataError, r"x must have shape \(N, 8, 8\).*reshape"),
        ({"x": (torch.zeros(20, 8, 8), torch.zeros(20))}, pvae.DataError, "x must be one array, got 2"),
        ({"x": torch.full((20, 8, 8), 0.5)}, pvae.DataError, "0.5"),
        ({"path": "no/such/page.html"}, pvae.ArgumentError, "Make it first"),
        ({"path": "."}, pvae.ArgumentError, "is a folder"),
        ({"path": 3}, pvae.ArgumentError, "path must be"),
        ({"num_data": 0}, pvae.ArgumentError, "num_data"),
        ({"num_samples": 0}, pvae.ArgumentError, "num_samples"),
        ({"num_prior_samples": 0.5}, pvae.ArgumentError, "num_prior_samples"),
        ({"seed": -1}, pvae.ArgumentError, "seed"),
        ({"plane": "best"}, pvae.ArgumentError, "plane"),
        ({"image_shape": (3, 3)}, pvae.ArgumentError, "image_shape"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_anything_is_written(vae, tmp_path, monkeypatch, change, error, words):
    monkeypatch.chdir(tmp_path)
    arguments = {"x": torch.zeros(20, 8, 8), "labels": None, "path": "page.html", **SMALL, **change}
    with pytest.raises(error, match=words):
        write_explorer(vae, **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "pair, words",
    [
        (lambda: pvae.Autoencoder.mlp((8, 8), 2, [4]), "pvae.VAE"),
        (lambda: pvae.ConditionalVAE.mlp((8, 8), 2, [4], num_classes=3), "pvae.VAE"),
        (
            lambda: pvae.HierarchicalVAE.mlp((8, 8), (2, 2), ((4,), (4,))),
            r"one latent vector for each datum.*'z2': \(2,\)",
        ),
        (lambda: pvae.MaskedVAE.mlp((8, 8), 2, [4]), "pvae.VAE"),
        (lambda: nn.Linear(2, 2), "needs a pair with model, guide"),
        (lambda: types.SimpleNamespace(**dict.fromkeys(NEEDED)), "nn.Module"),
    ],
)
def test_pairs_of_other_forms_are_refused(pair, words, tmp_path):
    with pytest.raises(pvae.ProgramError, match=words):
        write_explorer(pair(), torch.zeros(4, 8, 8), path=tmp_path / "a.html", **SMALL)
    assert not list(tmp_path.iterdir())


def test_a_page_that_is_there_stays_where_the_new_one_fails(vae, digits, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("before")

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_fill", fail)
    with pytest.raises(KeyboardInterrupt):
        write_explorer(vae, digits.test_x[:2], path=path, **SMALL)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert path.read_text() == "before"
    assert write_explorer(vae, digits.test_x[:2], path=path, **SMALL) == path
    assert path.read_text("utf-8").startswith("<!doctype html>")


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if not find_chromium():
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with Browser() as one:
        yield one


@pytest.fixture
def opened(browser, page):
    """The page in a window of a desk, just opened."""
    browser.faults.clear()
    browser.requests.clear()
    browser.show()
    browser.open(page)
    browser.settle()
    yield browser
    assert not browser.faults
    assert {url.partition("#")[0] for url in browser.requests} == {page.as_uri()}


def picture(browser, name):
    """What is on a canvas, as a string."""
    return browser.run(f"document.getElementById('{name}').toDataURL()")


def place(browser, n):
    """Where the mark of a datum is in the window."""
    return browser.run(
        f"(() => {{ const box = document.getElementById('map').getBoundingClientRect(), at = Explorer.toScreen"
        f"(Explorer.places[{n}]); return [box.left + at[0], box.top + at[1]]; }})()"
    )


def test_the_page_loads_and_agrees_with_torch(opened, vae):
    assert opened.run("document.title") == "The latent space of a VAE"  # no label has run
    assert opened.run("Explorer.difference") < 1e-5
    assert "agrees with PyTorch" in opened.run("document.getElementById('about').textContent")
    assert opened.run("document.querySelectorAll('#choice option').length") == 13
    assert opened.run("document.querySelectorAll('#choice option')[4].textContent").endswith(HOSTILE)


def test_moving_over_the_map_shows_what_is_decoded_there(opened, vae):
    seen = set()
    for n in (0, 5):
        x, y = place(opened, n)
        opened.move(x + 30, y - 20)
        z = torch.tensor(opened.run("Explorer.state.cursor"))
        shown = opened.run("Array.from(Explorer.decode(Explorer.state.cursor))")
        torch.testing.assert_close(torch.tensor(shown), vae.decode(z).mean.detach().flatten(), rtol=0, atol=1e-4)
        seen.add(picture(opened, "decoded"))
    assert len(seen) == 2


def test_a_click_shows_how_the_datum_is_weighed(opened, vae, digits):
    before = [picture(opened, name) for name in ("map", "datum", "reconstruction")]
    assert opened.run("document.getElementById('answer').hidden")
    opened.click(*place(opened, 5))
    assert opened.run("Explorer.state.chosen") == 5
    assert all(
        picture(opened, name) != old for name, old in zip(("map", "datum", "reconstruction"), before, strict=True)
    )
    assert opened.run("document.querySelectorAll('#chart path').length") == 3
    for name in ("guide", "prior"):
        ours = drawn(vae, digits.test_x[:12], name)
        cells = opened.run(f"Array.from(document.querySelectorAll('tr.{name} td'), (cell) => cell.textContent)")
        assert float(cells[0].replace("\u2212", "-")) == pytest.approx(ours.log_px[5].item(), abs=0.051)
        assert float(cells[1].split()[0]) == pytest.approx(ours.ess[5].item(), abs=0.51)
        assert cells[1].endswith("of 60")
    opened.wait("document.getElementById('live').textContent.startsWith('Datum 5, label')")


def test_fewer_draws_are_those_that_came_first(opened):
    opened.run("Explorer.choose(2)")
    opened.settle()
    before = picture(opened, "map")
    opened.run("document.getElementById('draws').focus()")
    for _ in range(60):
        opened.press("ArrowLeft")
    draws = opened.run("Explorer.state.draws")
    assert 1 < draws < 60
    assert picture(opened, "map") != before
    assert opened.run("document.querySelector('tr.guide td:nth-child(3)').textContent").endswith(f"of {draws}")
    opened.run("document.getElementById('play').click()")
    opened.wait("Explorer.state.draws < 10")
    opened.run("document.getElementById('play').click()")


def test_all_can_be_done_by_keys(opened):
    opened.press("Tab")
    assert opened.run("document.activeElement.id") == "map"
    assert opened.run("getComputedStyle(document.querySelector('.canvas')).outlineStyle") == "solid"
    before = opened.run("Explorer.state.cursor")
    opened.press("ArrowRight")
    opened.press("ArrowUp", shift=True)
    after = opened.run("Explorer.state.cursor")
    assert after[0] > before[0]
    assert after[1] - before[1] == pytest.approx(5 * (after[0] - before[0]))
    opened.wait("document.getElementById('live').textContent.includes('Nearest: datum')")
    opened.press("Enter")
    assert opened.run("Explorer.state.chosen") is not None
    opened.press("Escape")
    assert opened.run("Explorer.state.chosen") is None
    for name in ("previous", "choice", "next"):
        opened.press("Tab")
        assert opened.run("document.activeElement.id") == name
    opened.press("Enter")
    assert opened.run("Explorer.state.chosen") == 0
    opened.press("Tab")
    assert opened.run("document.activeElement.id") == "draws"
    names = opened.run(
        "Array.from(document.querySelectorAll('canvas, svg'), (e) => e.getAttribute('aria-label') || e.textContent)"
    )
    assert len(names) == 5
    assert all(names)


def test_a_finger_taps_and_drags_on_a_phone(opened):
    opened.show(390, 844, phone=True)
    opened.settle()
    opened.run("window.scrollTo(0, 0)")
    opened.tap(place(opened, 4))
    assert opened.run("Explorer.state.chosen") is not None
    opened.run("window.scrollTo(0, 0); Explorer.choose(null)")
    opened.settle()
    x, y = place(opened, 4)
    opened.tap((x, y), (x + 20, y + 20), (x + 40, y + 60))
    assert opened.run("Explorer.state.chosen") is None  # it moved, and chose nothing
    assert opened.run("window.scrollY") == 0
    before = opened.run("Explorer.places[4]")
    after = opened.run("Explorer.state.cursor")
    assert after[0] > before[0]
    assert after[1] < before[1]


def test_words_can_be_read_on_a_phone(opened):
    opened.show(390, 844, phone=True)
    opened.run("Explorer.choose(1)")
    opened.settle()
    assert opened.run("document.documentElement.scrollWidth") == 390  # nothing to the side
    sizes = opened.run(
        "Array.from(document.querySelectorAll('p, td, th, dd, dt, text, button, figcaption span'),"
        "(e) => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12
    bottom = opened.run("document.querySelector('.pictures').getBoundingClientRect().bottom + scrollY")
    assert bottom < 844  # map and pictures together
    targets = opened.run(
        "Array.from(document.querySelectorAll('button, select'), (e) => e.getBoundingClientRect().height)"
    )
    assert min(targets) >= 40


def contrast(one, other):
    """Of two colours as the browser writes them, by WCAG 2."""

    def luminance(text):
        channels = [int(v) / 255 for v in re.findall(r"\d+", text)[:3]]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_words_stand_out_in_light_and_dark(opened, dark):
    opened.show(dark=dark)
    opened.run("Explorer.choose(1)")
    opened.settle()
    paper = opened.run("getComputedStyle(document.body).backgroundColor")
    assert (contrast(paper, "rgb(0, 0, 0)") < 2) == dark
    selectors = ("p", ".note", "tr.guide th", "tr.prior th", "dd", ".key", "#verdict")
    for selector in selectors:
        words = opened.run(f"getComputedStyle(document.querySelector('{selector}')).color")
        assert contrast(words, paper) >= 4.5, selector
    for line in ("path.guide", "path.prior"):
        assert contrast(opened.run(f"getComputedStyle(document.querySelector('{line}')).stroke"), paper) >= 3


def test_the_page_works_in_a_frame(browser, page, tmp_path):
    browser.faults.clear()
    (tmp_path / "frame.html").write_text(
        f'<!doctype html><iframe src="{page.as_uri()}" width="700" height="600"></iframe>'
    )
    browser.show()
    browser.open(tmp_path / "frame.html")
    assert browser.run_in_frame("document.querySelectorAll('#choice option').length") == 13
    assert not browser.faults


def test_the_page_owns_up_to_what_it_does_not_know(browser, page, tmp_path):
    """A decoder that is not torch's, and a datum whose log p(x) nobody could find."""
    contents = contents_of(page)
    contents["reference"]["low"][0] = contents["reference"]["high"][0] = None
    contents["reference"]["withheld"][0] = "k-hat is 0.9"
    changed = to_json(contents).replace('"op":"relu"', '"op":"tanh"')
    old = re.search(r'id="contents">(.*?)</script>', page.read_text("utf-8"), re.S)[1]
    path = tmp_path / "changed.html"
    path.write_text(page.read_text("utf-8").replace(old, changed), "utf-8")
    browser.show()
    browser.open(path)
    assert "do not trust its pictures" in browser.run("document.getElementById('about').textContent")
    browser.run("Explorer.choose(0)")
    browser.settle()
    words = browser.run("document.getElementById('reference').textContent")
    assert "no level line" in words
    assert "k-hat is 0.9" in words
    assert browser.run("document.querySelectorAll('#chart line.reference').length") == 0


@pytest.mark.parametrize("latent_dim, event_shape", [(1, (5,)), (5, (3, 4, 4))])
def test_other_pairs_have_pages_that_run(browser, latent_dim, event_shape, tmp_path):
    """One latent and bars; many latents, colours, and words as labels."""
    vae = pvae.VAE.mlp(event_shape, latent_dim, [4], "gaussian")
    x = torch.randn(10, *event_shape)
    labels = ["first kind", "second kind"] * 5 if latent_dim > 1 else None
    path = write_explorer(vae, x, labels, tmp_path / "a.html", **SMALL)
    browser.faults.clear()
    browser.show()
    browser.open(path)
    for n in (0, 9):
        browser.run(f"Explorer.choose({n})")
        browser.settle()
        assert browser.run("document.querySelectorAll('#chart path').length") == 3
    assert browser.run("Explorer.difference") < 1e-5
    assert not browser.faults
