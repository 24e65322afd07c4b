"""Compile a network with a layer of quadratic programs in it to one graph, train it, and export it.

A linear layer predicts a cost; the layer behind it finds the point that has the least cost under learned constraints.

    python examples/compile.py
"""

import torch

import qpdiff.torch


def main() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 4), qpdiff.torch.OptNet(4, m=3, p=1))
    # "aot_eager" needs no C++ compiler; leave `backend` out for compiled kernels.
    program = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    inputs, target = torch.randn(32, 5), torch.rand(32, 4)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for epoch in range(20):
        loss = (program(inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: loss {loss.item():.4f}")

    size = torch.export.Dim("size", min=2)
    exported = torch.export.export(net, (inputs,), dynamic_shapes=({0: size},))
    others = torch.randn(7, 5)
    difference = (exported.module()(others) - net(others)).abs().max()
    print(f"exported and eager network differ by at most {difference.item():.1e}")


if __name__ == "__main__":
    main()
