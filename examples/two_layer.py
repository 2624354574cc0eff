"""The article's own example: two fully connected layers learn y = x from (1, 1) and (2, 2).

It prints the gradient, the loss and the parameters every so often, and at the end the prediction
for x = 3. The optimizer is the article's variant: every gradient of two or more entries is brought
to mean 0 and standard deviation 1, without momentum.

Three things of the article's listing had to be mended to make it run. It computes
``norm.cdf(g) / (g.std() * sqrt(2 * pi)) * (1 / std)``, which is positive for every g, so that every
parameter could only ever fall; here the gradient is standardised instead. It divides by the
standard deviation, which is 0 for a gradient of one entry (the last bias); here such a gradient
becomes its sign. And it uses names that it does not define, so the initial values below are our
own. Steps of this method do not shrink near an optimum: the learning rate falls linearly to 0.
"""

from __future__ import annotations

import torch
from torch import nn

from bngd_triton import BNGD

X, Y = [[1.0], [2.0]], [[1.0], [2.0]]
TEST_X, TEST_Y = 3.0, 3.0
FIRST_WEIGHT, FIRST_BIAS = [[0.1], [0.2], [0.3], [0.4]], [0.0, 0.0, 0.0, 0.0]
SECOND_WEIGHT, SECOND_BIAS = [[0.4, 0.1, 0.2, 0.3]], [0.0]
STEPS = 1000
LR = 0.003
PRINT_EVERY = 200


def network() -> nn.Sequential:
    """Two layers with the initial values above."""
    model = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1))
    values = (FIRST_WEIGHT, FIRST_BIAS, SECOND_WEIGHT, SECOND_BIAS)
    with torch.no_grad():
        for param, value in zip(model.parameters(), values):
            param.copy_(torch.tensor(value))
    return model


def show(step: int, loss: float, model: nn.Module) -> None:
    """Print what the article prints."""
    print(f"step {step}: loss {loss:.3e}")
    for name, param in model.named_parameters():
        grad = [] if param.grad is None else param.grad.flatten().tolist()
        print(f"  {name:9} gradient  " + " ".join(f"{entry:10.6f}" for entry in grad))
        entries = param.detach().flatten().tolist()
        print(f"  {'':9} parameter " + " ".join(f"{entry:10.6f}" for entry in entries))


def main() -> float:
    """Train, print, and return the prediction for the test point."""
    x, y = torch.tensor(X), torch.tensor(Y)
    model = network()
    optimizer = BNGD.article(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        if step % PRINT_EVERY == 0 or step == STEPS - 1:
            show(step, loss.item(), model)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        prediction = model(torch.tensor([[TEST_X]])).item()
    print(f"prediction at x = {TEST_X:g}: {prediction:.4f} (the line y = x gives {TEST_Y:g})")
    return prediction


if __name__ == "__main__":
    main()
