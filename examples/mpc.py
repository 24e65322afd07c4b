"""Model predictive control that learns its cost from demonstrations, by differentiating through the controller.

An inverted pendulum, linearised about the upright position, is balanced by a motor of limited torque. The controller
plans ahead by a quadratic program, applies the first torque of the plan, and plans again. Its dynamics and limits are
known: they are the equalities and the bounds of the program. Its cost, a weight for each state and for the torque, is
not. The expert is such a controller with other weights, and only its inputs and outputs are given, the latter with
noise: the learner changes its weights until its own torques are the expert's. A network that imitates the same
demonstrations is trained beside it.

The matrices of the program are sparse: each step of the plan has to do with the next alone. `--horizon 100` plans for
ten seconds instead of one and a half.

B. Amos, I. Jimenez, J. Sacks, B. Boots, J. Z. Kolter, "Differentiable MPC for end-to-end planning and control", NeurIPS
2018.
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

import matplotlib
import numpy as np
import scipy.sparse as sp
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from scipy.linalg import expm
from torch import nn

import qpdiff.torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HORIZON, STEP = 15, 0.1
"""Steps of a plan, and their length in seconds."""
STATES = 2
LIMIT = 2.0
"""The largest torque, in N m."""
EXPERT = np.array([20.0, 1.0, 0.1])
"""The expert's weights of angle², speed² and torque², in 1/rad², s²/rad² and 1/(N m)²."""
NOISE = 0.05
"""Standard deviation of the demonstrated torques, in N m."""
DEMONSTRATED, NEAR = 15, 0.7
"""Steps of a demonstration, and how far out it starts, see `starts`."""
RUNS, LOOP, FAR = 200, 40, 0.97
"""Closed loops for comparison, their steps, and how far out they start."""
SHOWN = range(6)
COLORS = ("C0", "C1")


def pendulum() -> tuple[torch.Tensor, torch.Tensor]:
    """Next state = F state + g torque, of angle [rad] and speed [rad/s], for 1 kg at the end of 1 m of rod."""
    continuous = np.zeros((STATES + 1, STATES + 1))
    continuous[:STATES] = [[0, 1, 0], [9.81, -0.1, 1]]
    discrete = expm(STEP * continuous)
    return torch.from_numpy(discrete[:STATES, :STATES]), torch.from_numpy(discrete[:STATES, STATES])


F, g = pendulum()


# ---- the two learners


class Controller(nn.Module):
    """The first torque of the best plan; variables of the program are states 1 to T, then torques 0 to T − 1."""

    rate = 0.1

    def __init__(self, weights, horizon: int | None = None):
        super().__init__()
        self.horizon = T = HORIZON if horizon is None else horizon
        self.logarithms = nn.Parameter(torch.log(torch.as_tensor(weights, dtype=torch.float64)))
        states, before = sp.eye_array(STATES * T), sp.eye_array(T, k=-1)
        dynamics = sp.hstack([states - sp.kron(before, F), -sp.kron(sp.eye_array(T), g[:, None])], format="csr")
        self.dynamics = qpdiff.Sparse.like(dynamics, torch.from_numpy(dynamics.data))
        self.diagonal = sp.eye_array((STATES + 1) * T, format="csr")
        self.limits = torch.cat([torch.full((STATES * T,), torch.inf), torch.full((T,), LIMIT)]).double()

    def weights(self):
        return torch.exp(self.logarithms)

    def forward(self, state):
        *states, torque = self.weights()
        weights = torch.cat([torch.stack(states).repeat(self.horizon), torque.repeat(self.horizon)])
        Q = qpdiff.Sparse.like(self.diagonal, weights)
        start = nn.functional.pad(state @ F.mT, (0, STATES * (self.horizon - 1)))
        plan = qpdiff.torch.solve_qp(
            Q, torch.zeros_like(weights), A=self.dynamics, b=start, lb=-self.limits, ub=self.limits
        )
        return plan.x[..., STATES * self.horizon]


class Network(nn.Module):
    """Two hidden layers, and an output that cannot exceed the limit."""

    rate = 0.01

    def __init__(self, width: int = 64):
        super().__init__()
        layers = nn.Linear(STATES, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        self.layers = nn.Sequential(*layers).double()

    def forward(self, state):
        return LIMIT * torch.tanh(self.layers(state)[..., 0])


# ---- demonstrations


class Demonstrations(NamedTuple):
    """States (count, STATES) that the expert was in, and the torques (count) that it applied."""

    states: torch.Tensor
    torques: torch.Tensor


def starts(rng: np.random.Generator, count: int, spread: float) -> torch.Tensor:
    """Draw states from which the limited torque can bring the pendulum up, up to `spread` of the way to where not.

    Along the unstable direction of the dynamics, a torque of LIMIT holds a state of at most this size.
    """
    values, left = np.linalg.eig(F.numpy().T)
    unstable = np.argmax(values)
    reach = LIMIT * abs(left[:, unstable] @ g.numpy()) / (values[unstable] - 1)
    speeds = rng.uniform(-1, 1, size=count)
    along = spread * reach * rng.uniform(-1, 1, size=count)
    angles = (along - left[1, unstable] * speeds) / left[0, unstable]
    return torch.from_numpy(np.stack([angles, speeds], axis=1))


def closed_loop(controller, state, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states (steps + 1, batch, STATES) and the torques (steps, batch) from these states on."""
    states, torques = [state], []
    with torch.no_grad():
        for _ in range(steps):
            torques.append(controller(state))
            state = state @ F.mT + torques[-1][:, None] * g
            states.append(state)
    return torch.stack(states), torch.stack(torques)


def demonstrate(expert: Controller, seed: int, runs: int, steps: int, spread: float, noise: float = 0.0):
    """Return the `Demonstrations` of an expert."""
    rng = np.random.default_rng(seed)
    states, torques = closed_loop(expert, starts(rng, runs, spread), steps)
    noise = noise * torch.from_numpy(rng.normal(size=torques.shape))
    return Demonstrations(states[:-1].reshape(-1, STATES), (torques + noise).reshape(-1))


# ---- learning


def imitation_loss(learner, demonstrations: Demonstrations):
    """Return the mean squared error of the torques, in (N m)²."""
    return torch.mean((learner(demonstrations.states) - demonstrations.torques) ** 2)


def imitate(learner, demonstrations: Demonstrations, epochs: int, batch: int, seed: int, watch) -> None:
    """Train by Adam, its learning rate falling to 0 along half a cosine; `watch` is called every epoch."""
    generator = torch.Generator().manual_seed(seed)
    count = len(demonstrations.states)
    adam = torch.optim.Adam(learner.parameters(), lr=learner.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, epochs)
    watch()
    for _ in range(epochs):
        for part in torch.randperm(count, generator=generator).split(batch):
            adam.zero_grad()
            imitation_loss(learner, Demonstrations(*(array[part] for array in demonstrations))).backward()
            adam.step()
        schedule.step()
        watch()


class History(NamedTuple):
    """Per epoch, epoch 0 before any training: loss in test states, and weights where there are any."""

    losses: list[float]
    weights: list[np.ndarray]


class Outcome(NamedTuple):
    """A trained learner: its history, and what it does from starts as far out as FAR."""

    history: History
    far_loss: float
    states: np.ndarray
    torques: np.ndarray


def learn(learner, demonstrations, test, far, options, seed: int, step) -> Outcome:
    history = History([], [])

    def watch():
        with torch.no_grad():
            history.losses.append(float(imitation_loss(learner, test)))
        if isinstance(learner, Controller):
            history.weights.append(learner.weights().detach().numpy())
        step()

    imitate(learner, demonstrations, options.epochs, options.batch, seed, watch)
    with torch.no_grad():
        far_loss = float(imitation_loss(learner, far))
    states, torques = closed_loop(learner, far.states[:RUNS], LOOP)
    return Outcome(history, far_loss, states.numpy(), torques.numpy())


# ---- the report


def plot(outcomes: dict[str, list[Outcome]], expert: tuple[np.ndarray, np.ndarray], path: str) -> None:
    """Draw loss and recovered weights by epoch, a thin line a seed; closed loops of the first seed from far starts."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for color, (name, runs) in zip(COLORS, outcomes.items(), strict=True):
        for i, run in enumerate(runs):
            axes[0, 0].semilogy(run.history.losses, color=color, linewidth=1.2, label=name if i == 0 else None)
    axes[0, 0].set(xlabel="epoch", ylabel="mean squared error of the torque [(N m)²]", title="Imitation in test states")
    axes[0, 0].legend()

    for k, label in enumerate(("angle² [(N m)²/rad²]", "speed² [(N m)² s²/rad²]")):
        for i, run in enumerate(outcomes["controller"]):
            ratios = [weights[k] / weights[-1] for weights in run.history.weights]
            axes[0, 1].semilogy(
                ratios, color=f"C{k + 2}", linewidth=1.2, label=f"weight of {label}" if i == 0 else None
            )
        axes[0, 1].axhline(EXPERT[k] / EXPERT[-1], color=f"C{k + 2}", linestyle=":")
    axes[0, 1].set(xlabel="epoch", ylabel="relative to the weight of torque²", title="Weights; dotted: the expert's")
    axes[0, 1].legend()

    time = STEP * np.arange(LOOP + 1)
    loops = {"expert": expert} | {name: (runs[0].states, runs[0].torques) for name, runs in outcomes.items()}
    styles = zip(("black", *COLORS), ("-", "--", ":"), (3.0, 1.5, 1.5), strict=True)
    for (name, (states, torques)), (color, line, width) in zip(loops.items(), styles, strict=True):
        options = {"color": color, "linestyle": line, "linewidth": width, "alpha": 0.5 if name == "expert" else 1}
        for i in SHOWN:
            label = name if i == SHOWN[0] else None
            axes[1, 0].plot(time, states[:, i, 0], label=label, **options)
            axes[1, 1].step(time[:-1], torques[:, i], where="post", label=label, **options)
    axes[1, 0].set(xlabel="time [s]", ylabel="angle [rad]", ylim=(-0.7, 0.7), title="Closed loop from far starts")
    axes[1, 1].set(xlabel="time [s]", ylabel="torque [N m]", title="The torques applied")
    axes[1, 0].legend()
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None) -> int:
    """Train both learners for each seed, report, plot, and fail if the expert's weights are not recovered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--runs", type=int, default=16, help=f"demonstrations, of {DEMONSTRATED} steps each")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--horizon", type=int, help=f"steps of a plan, {HORIZON} by default")
    parser.add_argument("--output", default="mpc.png", help="the plot")
    parser.add_argument("--quick", action="store_true", help="one seed and few epochs, to test that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.epochs = options.seeds[:1], 5

    outcomes: dict[str, list[Outcome]] = {"controller": [], "network": []}
    expert = Controller(EXPERT, options.horizon)
    test, far = demonstrate(expert, 1000, 64, DEMONSTRATED, NEAR), demonstrate(expert, 1001, RUNS, 1, FAR)
    expert_loop = tuple(array.numpy() for array in closed_loop(expert, far.states, LOOP))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for seed in options.seeds:
        torch.manual_seed(seed)
        demonstrations = demonstrate(expert, seed, options.runs, DEMONSTRATED, NEAR, NOISE)
        controller = Controller(np.ones(STATES + 1), options.horizon)
        for name, learner in (("controller", controller), ("network", Network())):
            with Progress(*columns) as progress:
                task = progress.add_task(f"{name}, seed {seed}", total=options.epochs + 1)
                outcome = learn(
                    learner,
                    demonstrations,
                    test,
                    far,
                    options,
                    seed,
                    step=lambda progress=progress, task=task: progress.advance(task),
                )
            outcomes[name].append(outcome)
            fallen = np.sum(np.abs(outcome.states[-1, :, 0]) > 1)
            print(
                f"{name}, seed {seed}: imitation loss {outcome.history.losses[0]:.2e} before, "
                f"{outcome.history.losses[-1]:.2e} after training, {outcome.far_loss:.2e} far out; "
                f"the pendulum falls in {fallen} of {RUNS} closed loops"
            )
            if outcome.history.weights:
                print(f"    weights {ratios_text(outcome.history.weights[-1])}, the expert's {ratios_text(EXPERT)}")
    print(f"the expert's pendulum falls in {np.sum(np.abs(expert_loop[0][-1, :, 0]) > 1)} of {RUNS}")
    plot(outcomes, expert_loop, options.output)
    print(f"plot: {options.output}")
    found = np.array([run.history.weights[-1] for run in outcomes["controller"]])
    errors = np.abs(np.log(found[:, :-1] / found[:, -1:]) - np.log(EXPERT[:-1] / EXPERT[-1]))
    if np.max(errors) > 0.25 and not options.quick:
        print(f"the weights are off by a factor of {np.exp(np.max(errors)):.2f}", file=sys.stderr)
        return 1
    return 0


def ratios_text(weights) -> str:
    return " : ".join(f"{weight / weights[-1]:.3g}" for weight in weights)


if __name__ == "__main__":
    sys.exit(main())
