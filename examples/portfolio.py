"""Portfolio choice: a model of returns trained on the regret of the portfolios it leads to, not on its error.

Expected returns are nonlinear in the features, the model is linear: it has to be wrong somewhere. Least squares is
wrong where that makes the squared error small. Trained through the quadratic program that makes portfolios of the
predictions, minimise γ/2 xᵀΣx − rᵀx over 1ᵀx = 1, x ≥ 0, the same model is wrong where it costs little.

With little risk aversion the program is nearly linear: its solutions jump from asset to asset and their derivative is
mostly 0. The third way trains through a program with a quadratic term ρ/2 xᵀx more, and uses the one without.

A. N. Elmachtoub, P. Grigas, "Smart 'predict, then optimize'", Management Science, 2022, whose portfolio experiment has
such returns, with other noise and a limit on the risk.
P. L. Donti, B. Amos, J. Z. Kolter, "Task-based end-to-end model learning in stochastic optimization", NeurIPS 2017.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import qpdiff.torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ASSETS, FEATURES, FACTORS = 20, 5, 4
DEGREES = (1, 8, 16)
"""Of the expected returns as polynomials of the features; with degree 1 a linear model can be right."""
RISK_AVERSIONS = (0.5, 0.005)
"""γ, per percent: several assets share a portfolio, or nearly always one has it all."""
RIDGE = 2.0
"""Of the program that is trained through in the third way, in percent."""
NOISE = 2.0
"""Standard deviation of what is specific to an asset, in percent."""
BATCH = 100


# ---- the market and who invests in it


class Periods(NamedTuple):
    """Features (periods, FEATURES + 1) with a constant, expected and actual returns (periods, ASSETS) in percent."""

    features: torch.Tensor
    expected: torch.Tensor
    returns: torch.Tensor


class Market(NamedTuple):
    """Training, validation and test periods, and the covariance of the returns given the features, in percent²."""

    train: Periods
    validation: Periods
    test: Periods
    covariance: torch.Tensor


def make_market(seed: int, degree: int, train: int, test: int) -> Market:
    rng = np.random.default_rng(seed)
    chosen = rng.integers(2, size=(ASSETS, FEATURES))
    loadings = rng.uniform(-1, 1, size=(ASSETS, FACTORS))

    def draw(count: int) -> Periods:
        features = rng.normal(size=(count, FEATURES))
        base = 0.05 / np.sqrt(FEATURES) * features @ chosen.T + 0.1 ** (1 / degree)
        expected = 100 * base**degree
        noise = rng.normal(size=(count, FACTORS)) @ loadings.T + NOISE * rng.normal(size=(count, ASSETS))
        features = np.concatenate([features, np.ones((count, 1))], axis=1)
        return Periods(*map(torch.from_numpy, (features, expected, expected + noise)))

    covariance = torch.from_numpy(loadings @ loadings.T + NOISE**2 * np.eye(ASSETS))
    return Market(draw(train), draw(train // 2), draw(test), covariance)


class Investor(NamedTuple):
    """The utility of a portfolio: covariance and risk aversion."""

    covariance: torch.Tensor
    risk_aversion: float

    def portfolios(self, predictions, ridge: float = 0.0):
        """Return the shares (periods, ASSETS) that are best if returns are as predicted."""
        Q = self.risk_aversion * self.covariance + ridge * torch.eye(ASSETS, dtype=torch.float64)
        every, none = torch.ones(1, ASSETS, dtype=torch.float64), torch.zeros(ASSETS, dtype=torch.float64)
        return qpdiff.torch.solve_qp(Q, -predictions, A=every, b=every[0, :1], lb=none).x

    def utility(self, shares, returns):
        """Compute return less the price of risk, mean over the periods, in percent."""
        risk = torch.sum(shares @ self.covariance * shares, 1)
        return torch.mean(torch.sum(shares * returns, 1) - self.risk_aversion / 2 * risk)

    def regret(self, W, periods: Periods) -> float:
        """Compute the expected loss of utility against knowing the expected returns; in percent a period."""
        with torch.no_grad():
            chosen, best = self.portfolios(periods.features @ W), self.portfolios(periods.expected)
            return float(self.utility(best, periods.expected) - self.utility(chosen, periods.expected))


def squared_error(W, periods: Periods) -> float:
    return float(torch.mean((periods.features @ W - periods.expected) ** 2))


# ---- training


def train_on_error(market: Market):
    """Fit by least squares."""
    return torch.linalg.lstsq(market.train.features, market.train.returns).solution


def train_on_regret(W, market: Market, investor: Investor, ridge: float, epochs: int, seed: int, step):
    """Train W by Adam on the utility under the actual returns; return the best epoch by validation."""
    generator = torch.Generator().manual_seed(seed)
    W = W.clone().requires_grad_()
    adam = torch.optim.Adam([W], lr=0.005)
    train, validation = market.train, market.validation
    best, weights = -np.inf, W
    for epoch in range(epochs + 1):
        with torch.no_grad():
            shares = investor.portfolios(validation.features @ W)
            value = float(investor.utility(shares, validation.returns))
        if value > best:
            best, weights = value, W.detach().clone()
        if epoch == epochs:
            return weights
        for part in torch.randperm(len(train.features), generator=generator).split(BATCH):
            shares = investor.portfolios(train.features[part] @ W, ridge)
            adam.zero_grad()
            (-investor.utility(shares, train.returns[part])).backward()
            adam.step()
        step()


# ---- the report


WAYS = ("squared error", "regret", f"regret, with ρ = {RIDGE:g}")


def experiment(options, step) -> np.ndarray:
    """Return regret and squared error on test periods: (2, risk aversions, degrees, seeds, ways)."""
    shape = (2, len(RISK_AVERSIONS), len(options.degrees), len(options.seeds), len(WAYS))
    out = np.empty(shape)
    for g, d, s in np.ndindex(shape[1:4]):
        seed = options.seeds[s]
        market = make_market(seed, options.degrees[d], options.train, options.test)
        investor = Investor(market.covariance, RISK_AVERSIONS[g])
        W = train_on_error(market)
        models = [W, *(train_on_regret(W, market, investor, r, options.epochs, seed, step) for r in (0.0, RIDGE))]
        out[0, g, d, s] = [investor.regret(model, market.test) for model in models]
        out[1, g, d, s] = [squared_error(model, market.test) for model in models]
    return out


def plot(results: np.ndarray, degrees, path: str) -> None:
    """Draw regret and squared error by degree: lines are means over the seeds, dots the seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    relative = results[1, 0] / results[1, 0, ..., :1]
    titles = [f"Regret, γ = {value:g} per percent" for value in RISK_AVERSIONS]
    panels = (*results[0], relative)
    for axis, values, title in zip(axes, panels, (*titles, f"Squared error, γ = {RISK_AVERSIONS[0]:g}"), strict=True):
        for k, way in enumerate(WAYS):
            axis.plot(values[..., k].mean(axis=1), color=f"C{k}", label=f"trained on {way}")
            axis.plot(np.arange(len(degrees)) + 0.06 * (k - 1), values[..., k], ".", color=f"C{k}", markersize=4)
        axis.set(xticks=range(len(degrees)), xticklabels=degrees, xlabel="degree of the returns", title=title)
    for axis in axes[:2]:
        axis.set(ylabel="regret on test periods [% a period]", yscale="log")
    axes[2].set(ylabel="mean squared error, relative to least squares")
    axes[0].legend()
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None) -> int:
    """Train in all ways for each seed and degree, report, plot, and fail if regret does not fall where it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--degrees", type=int, nargs="+", default=DEGREES)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--train", type=int, default=1000, help="training periods")
    parser.add_argument("--test", type=int, default=2000, help="test periods")
    parser.add_argument("--output", default="portfolio.png", help="the plot")
    parser.add_argument("--quick", action="store_true", help="one seed, two degrees, few epochs, to test that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.degrees, options.epochs, options.test = options.seeds[:1], (1, 16), 3, 500

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        trainings = len(RISK_AVERSIONS) * len(options.degrees) * len(options.seeds) * (len(WAYS) - 1)
        task = progress.add_task("epochs", total=trainings * options.epochs)
        results = experiment(options, partial(progress.advance, task))
    print(f"mean over {len(options.seeds)} seeds, and how often the regret is below that of squared error")
    for g, d in np.ndindex(results.shape[1:3]):
        print(f"γ = {RISK_AVERSIONS[g]:g}, degree {options.degrees[d]}")
        for k, way in enumerate(WAYS):
            regret, error = results[:, g, d, :, k]
            wins = np.sum(regret < results[0, g, d, :, 0])
            print(f"    {way:22} regret {regret.mean():.4f}%   squared error {error.mean():.4f}   {wins}")
    plot(results, options.degrees, options.output)
    print(f"plot: {options.output}")
    hardest = results[0, 0, -1]
    if np.any(hardest[:, 1] >= hardest[:, 0]) and not options.quick:
        print("training on the regret has not lowered it at the highest degree", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
