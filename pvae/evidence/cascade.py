"""``proposal="auto"``: draws are spent where they are needed, until each datum has a number or is named as unresolved.

The guide is tried on all data. Where its weights say no, a Gaussian is fitted to each datum, then given heavier tails,
then chains are annealed from it. Draws that decide are thrown away: what counts is drawn afresh. Where that in its turn
says no, it has decided too, and the next stage answers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pvae.data import InMemory
from pvae.evidence.drawing import Draws, DrawSums
from pvae.evidence.evaluation import Evaluation, name_batch
from pvae.evidence.planning import Settings
from pvae.evidence.proposals import WIDE_START, Elliptical, GivenGaussian, Guide, Refined, Sampler
from pvae.evidence.stages import (
    FEWEST_TEMPERATURES,
    WAYS,
    Judge,
    can_draw_prior,
    can_fit,
    can_mix,
    is_of_use,
    may_reach,
    surely_above,
)
from pvae.evidence.verdicts import KHAT_LIMIT, MIN_ESS, STAGES
from pvae.evidence.weights import WeightSums

__all__ = ["Cascade"]

_STD_ERROR = 0.2  # nats, as of 25 effective samples
_DRAWS = 50  # of a datum in a chunk

_FEW_PILOTS = 50  # show where draws surely will not do
_PILOTS = 200
_MORE_PILOTS = 800
_JOINT_PILOTS = 5000  # of all data's one number, whose k-hat is not pooled: of heavy tails a few show little
_MANY_PILOTS = (4000, 20_000)  # from the prior, in many dimensions and in few
_FEW_DIMENSIONS = 5
_SMALL = 64  # numbers in a datum
_TELLING = 100  # draws: fewer do not tell whether they will do
_CHECKS = 3  # times as many draws look again at a k-hat that is too high

_FIT = Refined(start=WIDE_START)
_FITS = 2  # of a datum: the second, by other draws, may find what the first did not

_CHAINS = 100
_PILOT_CHAINS = 16
_MOST_TEMPERATURES = 256
_VARIANCE = 0.7  # of a chain's log-weight
_HOPELESS = 0.7  # times its variance before, though temperatures are at least four times as many


class _Data(NamedTuple):
    """Some data of a block.

    Attributes:
        numbers: Theirs in the block.
        batch: What programs see.
        floor: What log p(x) of each surely is above, by draws from the prior.
        fitted: The Gaussian fitted to each, where there is one.
    """

    numbers: Tensor
    batch: tuple[Tensor, ...]
    floor: Tensor
    fitted: Elliptical | None = None

    def take(self, rows: Tensor) -> _Data:
        """Some of them, by their indices or a mask."""
        fitted = None if self.fitted is None else self.fitted[rows]
        return _Data(self.numbers[rows], tuple(t[rows] for t in self.batch), self.floor[rows], fitted)


class Cascade:
    """Sums over draws from whatever a datum needs.

    Args:
        evaluation: What draws are weighed by, of a pair with latents to draw.
        settings: What is asked for.
        bar: Counts data that have their number.
    """

    def __init__(self, evaluation: Evaluation, settings: Settings, bar: tqdm) -> None:
        self.evaluation, self.densities, self.settings, self.bar = evaluation, evaluation.densities, settings, bar
        self.draws = Draws(evaluation, settings, tqdm(disable=True))
        target = settings.target_std_error
        self.judge = Judge(settings.num_samples, settings.limit, target or _STD_ERROR, target is not None)
        self.has_prior = can_draw_prior(self.densities)
        self.can_fit, self.can_mix = can_fit(self.densities), can_mix(self.densities)
        dim = self.densities.space.dim if self.can_fit else 1
        self.is_small = self.can_fit and dim <= _FEW_DIMENSIONS
        # A chunk holds few data and many draws of each; fits take many data, up to what D x D numbers for each take.
        self.many = max(1, min(self.draws.chunk_size // 8, 2**25 // dim**2))
        self.few = 1 if self.densities.is_joint else max(1, min(self.many, self.draws.chunk_size // _DRAWS))
        self.answers: list[tuple[Tensor, DrawSums]] = []
        bar.total, bar.unit = evaluation.batches.num_data, " data"

    def sum_block(self, block: InMemory) -> DrawSums:
        """The sums over the draws that count for each datum of a block."""
        self.answers.clear()
        numbers, needed = torch.arange(block.num_data), torch.zeros(block.num_data, dtype=torch.long)
        floor, wide = self._find_floor(block)
        # Where the prior's draws are of use, one in ten guards against what the guide overlooks.
        begins = {name: rows for name, rows in (("defensive", numbers[wide]), ("guide", numbers[~wide])) if len(rows)}
        for name, rows in begins.items():
            needed[rows] = self._try_first(name, block, rows, floor)
        for name, rows in begins.items():
            for part in _split(rows[needed[rows] > 0], self.few):
                with _take(block, part, floor) as data:
                    answered = self._answer(name, data, torch.arange(len(part)), needed[part])
                needed[part[~answered]] = 0
        self._capture_for(int((needed == 0).sum()))
        for part in _split(numbers[needed == 0], self.many):
            with _take(block, part, floor) as data:
                self._resolve(data)
        order = torch.cat([numbers for numbers, _ in self.answers]).argsort()
        return DrawSums.cat([sums for _, sums in self.answers])[order]

    def _find_floor(self, block: InMemory) -> tuple[Tensor, Tensor]:
        """What log p(x) of each datum surely is above, and whether the prior's draws are of use for it.

        Nothing and no, where there are none.
        """
        if not self.has_prior:
            nothing = torch.full((block.num_data,), -torch.inf, dtype=torch.float64)
            return nothing, torch.zeros(block.num_data, dtype=torch.bool)
        prior = self._try_prior(block)
        return surely_above(prior, self.densities.precision), is_of_use(prior) & self.can_mix

    def _try_prior(self, block: InMemory) -> WeightSums:
        """The sums over draws from the prior, more of them where they tell anything.

        The prior misses nothing that there is. In few dimensions it so finds what the guide overlooks, as a second
        mode, of which weights of the guide's draws tell nothing.
        """
        self.bar.set_postfix_str("prior")
        shared, one_by_one = self.densities.shares_prior, self.densities.layout.one_by_one
        # Where one decoding serves all data, or a datum is small, draws are cheap.
        is_cheap = shared or self.densities.entries <= _SMALL
        many = _MANY_PILOTS[self.is_small] if is_cheap else 2 * self.settings.num_samples
        few, parts = _PILOTS // 8 if one_by_one else _PILOTS, []
        for rows in torch.arange(block.num_data).split(1024 if shared else self.few):
            sums = self.draws.sum_prior(block.take(rows), many if shared else few)
            more = (sums.ess >= (1 if is_cheap and self.is_small else 4)).nonzero()[:, 0]
            if len(more) and not (shared or one_by_one) and many > few:
                further = self.draws.sum_prior(block.take(rows[more]), many - few)
                sums = sums.put(more, sums[more].merge(further))
            parts.append(sums)
        return WeightSums.cat(parts)

    def _capture_for(self, num_data: int) -> None:
        """Begins to capture where so many data, to which something is to be fitted, make that pay."""
        programs = self.densities.programs
        programs.capture |= self.settings.is_to_be_captured(self.evaluation, _FIT, num_data)

    def _try_first(self, name: str, block: InMemory, numbers: Tensor, floor: Tensor) -> Tensor:
        """How many draws of the first stage each datum needs; 0 where they will not do."""
        self.bar.set_postfix_str(name)
        pilots = []
        for rows in numbers.split(self.few):
            with _take(block, rows, floor) as data:
                pilots.append(self._try(name, data, torch.arange(len(rows))))
        needed = self.judge.find_needed(name, WeightSums.cat(pilots), floor[numbers])
        if not self.judge.is_target:
            return needed
        for i, rows in enumerate(numbers.split(self.few)):
            with _take(block, rows, floor) as data:
                wanted = needed.split(self.few)[i]
                pilots[i] = self._try_as_often(name, data, torch.arange(len(rows)), pilots[i], wanted)
        return self.judge.find_needed(name, WeightSums.cat(pilots), floor[numbers])

    def _resolve(self, data: _Data) -> None:
        """Answers for data for which the guide's draws will not do."""
        last = "guide"
        for name in (*("refined", "heavy-tailed") * _FITS * self.can_fit, "half from the prior"):
            # A mixture with the prior helps where draws of the prior are of any use.
            is_mixed = name == "half from the prior"
            open_to = data.floor.isfinite() | (not (is_mixed and self.can_fit))
            if self._is_late or not open_to.any() or (is_mixed and not self.can_mix):
                continue
            self.bar.set_postfix_str(name)
            if name == "refined":
                data = self._fit(data)
            some, last = open_to.nonzero()[:, 0], name
            needed = self._find_needed(name, data, some)
            answered = self._answer(name, data, some[needed > 0], needed[needed > 0])
            data = data.take(~answered)
        if self.can_fit and not self._is_late:
            # Where the prior is not too far, chains from it reach what the guide overlooks.
            near = data.floor.isfinite()
            self._anneal("annealed from the prior", data.take(near))
            self._anneal("annealed", data.take(~near))
        else:
            self._answer(last, data, torch.arange(len(data.numbers)), self.settings.num_samples, accepted=False)

    def _fit(self, data: _Data) -> _Data:
        """Data with a Gaussian fitted to each; the better one where there is one already."""
        fitted = _FIT.gaussian(self.densities, data.batch)
        again = data._replace(fitted=fitted)
        if data.fitted is None:
            return again
        rows = torch.arange(len(data.numbers))
        first, second = (self._draw("refined", one, rows, _PILOTS).weights.log_px for one in (data, again))
        return data._replace(fitted=fitted.where(second > first, data.fitted))

    def _anneal(self, name: str, data: _Data) -> None:
        """Answers by chains, over as many temperatures as the scatter of pilots' weights asks for."""
        left = torch.arange(len(data.numbers))
        wanted, before = torch.full_like(left, FEWEST_TEMPERATURES), torch.full((len(left),), torch.inf).double()
        while len(left):
            temperatures = int(wanted.min())
            self.bar.set_postfix_str(f"{name}, {temperatures} temperatures")
            some = wanted == temperatures
            pilots = self._draw(name, data, left[some], _PILOT_CHAINS, temperatures).weights
            variance = pilots.squares_log / (_PILOT_CHAINS - 1)
            is_last = temperatures >= _MOST_TEMPERATURES or self._is_late
            # Nothing explains some, and more temperatures do not help others.
            is_vain = ~pilots.log_px.isfinite() | (variance > _HOPELESS * before[some])
            done = (variance <= _VARIANCE) | is_last | is_vain
            is_good = (variance <= 2 * _VARIANCE) & may_reach(pilots, data.floor[left[some]])
            for good in (True, False):
                rows = done & (is_good == good)
                if rows.any():
                    needed = self.judge.find_chains(variance[rows].clamp(max=_VARIANCE), _CHAINS)
                    self._answer(name, data, left[some][rows], needed, temperatures, accepted=good)
            # Their variance falls about as fast as temperatures get more.
            times = 2 ** (variance / _VARIANCE).log2().ceil().nan_to_num(torch.inf).clamp(1, 3)
            before[some] = torch.where(times >= 4, variance, torch.inf)
            wanted[some] = (temperatures * times).long().clamp(max=_MOST_TEMPERATURES)
            ended = torch.zeros_like(some).masked_scatter(some, done)
            left, wanted, before = left[~ended], wanted[~ended], before[~ended]

    def _answer(
        self,
        name: str,
        data: _Data,
        rows: Tensor,
        needed: Tensor | int,
        temperatures: int = FEWEST_TEMPERATURES,
        accepted: bool = True,
    ) -> Tensor:
        """Draws afresh for some of the data, as often as each needs, and notes the sums that will do.

        Where none come after it, those that will not do are noted too.

        Args:
            name: The stage.
            data: The data.
            rows: Which of them.
            needed: Draws for all of these, or for each.
            temperatures: Of chains.
            accepted: Whether trials said that these draws will do.

        Returns:
            Which of the data have their sums now, a mask.
        """
        needed, answered = torch.as_tensor(needed).expand(len(rows)), torch.zeros(len(data.numbers), dtype=torch.bool)
        may_go_on = accepted and self._has_next(name)
        for num_samples in needed.unique().tolist():
            some = rows[needed == num_samples]
            sums = self._draw(name, data, some, num_samples, temperatures)
            looked_at = torch.full((len(some),), torch.nan, dtype=torch.float64)
            high = (sums.weights.khat > KHAT_LIMIT).nonzero()[:, 0]
            if len(high) and accepted:
                # One k-hat scatters. More draws tell whether this one is high by chance; they count for it alone.
                more = self._draw(name, data, some[high], _CHECKS * num_samples, temperatures).weights
                looked_at[high] = sums.weights[high].merge(more).khat
            khat = torch.where(looked_at.isnan(), sums.weights.khat, looked_at)
            good = accepted & may_reach(sums.weights, data.floor[some])
            will_do = good & (khat <= KHAT_LIMIT) & (sums.weights.ess >= MIN_ESS)
            ends_here = not may_go_on or num_samples < _TELLING or self._is_late
            kept = (will_do | ends_here).nonzero()[:, 0]
            told = {"stage": torch.full((len(some),), STAGES.index(name)), "accepted": good, "khat": looked_at}
            sums, some = replace(sums, diagnostics=sums.diagnostics | told)[kept], some[kept]
            self.answers.append((data.numbers[some], sums))
            answered[some] = True
            self.bar.update(len(some))
        return answered

    def _has_next(self, name: str) -> bool:
        """Whether another stage may answer where this one does not."""
        if name in ("guide", "defensive"):
            return self.can_fit or self.can_mix
        return self.can_fit and not name.startswith("annealed")

    def _draw(
        self, name: str, data: _Data, rows: Tensor, num_samples: int, temperatures: int = FEWEST_TEMPERATURES
    ) -> DrawSums:
        """The sums over at least so many draws of a stage for some of the data."""
        fitted, make = data.fitted, WAYS[name].make

        def draw_on(rows: Tensor) -> Sampler:
            given = Guide() if fitted is None else GivenGaussian(fitted[rows])
            return make(given, temperatures).on(self.densities, tuple(t[rows] for t in data.batch))

        return self.draws.sum_rows(draw_on, rows, num_samples, self.few)

    def _try(self, name: str, data: _Data, rows: Tensor) -> WeightSums:
        """The sums over pilots: a few for each datum, and more where these do not tell."""
        if name == "guide":
            sums = self._draw(name, data, rows, _FEW_PILOTS).weights
            sums = self._try_more(name, data, rows, sums, self.judge.may_do(sums), _PILOTS - _FEW_PILOTS)
        else:  # made to do
            sums = self._draw(name, data, rows, _PILOTS).weights
        sums = self._try_more(name, data, rows, sums, self.judge.is_unsure(sums), _MORE_PILOTS)
        if self.densities.is_joint:
            sums = self._try_more(name, data, rows, sums, self.judge.may_do(sums), _JOINT_PILOTS)
        return sums

    def _try_more(
        self, name: str, data: _Data, rows: Tensor, pilots: WeightSums, mask: Tensor, num_samples: int
    ) -> WeightSums:
        """Pilots, and so many more for the data in a mask."""
        some = mask.nonzero()[:, 0]
        if not len(some):
            return pilots
        more = self._draw(name, data, rows[some], num_samples).weights
        return pilots.put(some, pilots[some].merge(more))

    def _find_needed(self, name: str, data: _Data, rows: Tensor) -> Tensor:
        """How many draws of a stage some of the data need; 0 where they will not do."""
        pilots = self._try(name, data, rows)
        needed = self.judge.find_needed(name, pilots, data.floor[rows])
        if self.judge.is_target:
            pilots = self._try_as_often(name, data, rows, pilots, needed)
            needed = self.judge.find_needed(name, pilots, data.floor[rows])
        return needed

    def _try_as_often(self, name: str, data: _Data, rows: Tensor, pilots: WeightSums, needed: Tensor) -> WeightSums:
        """Pilots, and as many more as draws seem to be needed: of heavy tails a few show too small an error."""
        for num_samples in needed[needed > 0].unique().tolist():
            pilots = self._try_more(name, data, rows, pilots, needed == num_samples, num_samples)
        return pilots

    @property
    def _is_late(self) -> bool:
        return time.monotonic() > self.settings.deadline


@contextmanager
def _take(block: InMemory, numbers: Tensor, floor: Tensor) -> Iterator[_Data]:
    """A block of code for some of the data, whose errors name them."""
    with name_batch(block, numbers):
        yield _Data(numbers, block.take(numbers), floor[numbers])


def _split(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """Parts of at most so many rows and of about the same size, so that few shapes occur; none of no rows."""
    return rows.tensor_split(-(-len(rows) // size)) if len(rows) else ()
